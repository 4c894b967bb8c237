//! Scattering into stores that are slow, full and lost, in random orders: when the source is let go,
//! every page can be read from what is left.

use std::collections::BTreeMap;

use lifeboat_protocol::units;
use proptest::prelude::*;

use super::*;
use crate::pack::Width;
use crate::redundancy::directory::Way;
use crate::redundancy::parity::Parity;
use crate::redundancy::placement::Offer;

const PACK_BYTES: u64 = 200;

/// The bytes of the pack that carries page `page`: a pack has one page here, and says which.
fn content(page: u64) -> Bytes {
    let length = 20 + page as usize * 7 % 50;
    let mut bytes = vec![page as u8; length];
    bytes[..8].copy_from_slice(&page.to_be_bytes());
    bytes.into()
}

fn page_of(bytes: &[u8]) -> u64 {
    bytes[..8].try_into().map(u64::from_be_bytes).unwrap()
}

/// Stores that keep what was put, and a driver that does what it is told.
struct World {
    scatter: Scatter,
    stores: Vec<BTreeMap<Object, Bytes>>,
    alive: Vec<bool>,
    room: Vec<usize>,
    /// Puts that are not answered yet.
    puts: Vec<(StoreId, Object, Bytes)>,
    /// What the destination was told.
    directory: Directory,
    packs: BTreeMap<PackId, u64>,
    todo: Vec<u64>,
    resends: Vec<PackId>,
    evicted: bool,
    failed: bool,
}

impl World {
    fn new(stores: usize, redundancy: Redundancy, room: Vec<usize>, pages: u64) -> Self {
        let offer = Offer { room: units::Bytes(1 << 30), rate: units::BytesPerSec(100) };
        let source = units::BytesPerSec(1000);
        let placer = Placer::new(&vec![offer; stores], redundancy, source).unwrap();
        Self {
            scatter: Scatter::new(redundancy, placer, PACK_BYTES),
            stores: vec![BTreeMap::new(); stores],
            alive: vec![true; stores],
            room,
            puts: Vec::new(),
            directory: Directory::new(),
            packs: BTreeMap::new(),
            todo: (0..pages).rev().collect(),
            resends: Vec::new(),
            evicted: false,
            failed: false,
        }
    }

    fn apply(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.failed |= self.scatter.apply(event, &mut actions).is_err();
        for action in actions {
            match action {
                Action::Put { store, object, bytes } => self.puts.push((store, object, bytes)),
                Action::AnnouncePack { pack, store, protection } => {
                    self.directory.pack(pack, store, protection).unwrap();
                }
                Action::AnnounceParity { stripe, store } => {
                    self.directory.parity(stripe, store).unwrap();
                }
                Action::Resend(pack) => self.resends.push(pack),
                Action::Evict => {
                    assert!(!self.evicted, "let go twice");
                    self.evicted = true;
                }
            }
        }
    }

    /// The source packs one more page, or says that there is none.
    fn send(&mut self) {
        if let Some(pack) = self.resends.pop() {
            self.todo.push(self.packs[&pack]);
            self.apply(Event::Resent(pack));
        } else if let Some(page) = self.todo.pop() {
            let id = PackId(self.packs.len() as u64);
            self.packs.insert(id, page);
            self.apply(Event::Pack(Pack {
                id,
                slots: 1,
                width: Width::WHOLE,
                bytes: content(page),
            }));
        } else {
            self.apply(Event::Ended);
        }
    }

    /// A store answers a put.
    fn answer(&mut self, which: usize) {
        if self.puts.is_empty() {
            return;
        }
        let (store, object, bytes) = self.puts.remove(which % self.puts.len());
        let at = usize::from(store.0);
        if !self.alive[at] {
            return;
        }
        if self.stores[at].len() < self.room[at] {
            self.stores[at].insert(object, bytes);
            self.apply(Event::Acked(store, object));
        } else {
            self.apply(Event::Full(store, object));
        }
    }

    fn lose(&mut self, which: usize) {
        let at = which % self.stores.len();
        self.alive[at] = false;
        self.stores[at].clear();
        self.apply(Event::Lost(StoreId(at as u8)));
    }

    /// One step, unless it comes too late.
    fn go(&mut self, step: &Step) {
        match *step {
            Step::Send if !self.evicted => self.send(),
            Step::Answer(which) => self.answer(which),
            Step::Lose(which) if !self.evicted => self.lose(which),
            Step::Send | Step::Lose(_) => {}
        }
    }

    /// Everything is sent and answered, in order.
    fn end(&mut self) {
        while !self.evicted && !self.failed {
            self.send();
            (0..self.puts.len()).for_each(|_| self.answer(0));
        }
    }

    fn lost(&self) -> StoreSet {
        let mut set = StoreSet::default();
        let gone = (0..self.alive.len()).filter(|at| !self.alive[*at]);
        gone.for_each(|at| set.add(StoreId(at as u8)));
        set
    }

    /// The pages that can be read with these stores lost.
    fn readable(&self, lost: StoreSet) -> Vec<u64> {
        let get = |store: StoreId, object| self.stores[usize::from(store.0)].get(&object).cloned();
        let mut pages = Vec::new();
        for pack in self.packs.keys() {
            let bytes = match self.directory.way(*pack, lost) {
                Ok(Way::From(store)) => {
                    get(store, Object::Pack(*pack)).or_else(|| get(store, Object::Copy(*pack)))
                }
                Ok(Way::Rebuild { stripe, parity, others }) => {
                    let parity = get(parity, Object::Parity(stripe)).expect("it was announced");
                    let others = others.iter().map(|(other, store)| {
                        get(*store, Object::Pack(*other)).expect("it was announced")
                    });
                    let others: Vec<Bytes> = others.collect();
                    let parity = Parity::decode(stripe, &parity).unwrap();
                    // Not of a stripe that was given up: one of its members is nowhere.
                    parity.rebuild(stripe, *pack, &others).ok().map(|bytes| bytes.freeze())
                }
                _ => None,
            };
            let Some(bytes) = bytes else { continue };
            assert_eq!(bytes, content(page_of(&bytes)), "{pack} is damaged");
            pages.push(page_of(&bytes));
        }
        pages.sort_unstable();
        pages.dedup();
        pages
    }
}

#[derive(Debug, Clone)]
enum Step {
    Send,
    Answer(usize),
    Lose(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        20 => Just(Step::Send),
        30 => any::<usize>().prop_map(Step::Answer),
        1 => any::<usize>().prop_map(Step::Lose),
    ];
    prop::collection::vec(step, 0..200)
}

fn redundancies() -> impl Strategy<Value = Redundancy> {
    prop_oneof![Just(Redundancy::None), Just(Redundancy::Mirror), Just(Redundancy::Parity)]
}

proptest! {
    #[test]
    fn the_source_is_let_go_only_when_every_page_can_be_read(
        stores in 2_usize..6,
        redundancy in redundancies(),
        rooms in prop::collection::vec(2_usize..40, 6),
        pages in 0_u64..30,
        steps in steps(),
        last in any::<usize>(),
    ) {
        let mut world = World::new(stores, redundancy, rooms, pages);
        for step in steps {
            world.go(&step);
            if world.failed {
                return Ok(());
            }
            if world.evicted {
                prop_assert_eq!(world.readable(world.lost()), (0..pages).collect::<Vec<_>>());
                prop_assert_eq!((world.scatter.kept(), world.scatter.is_evicted()), (0, true));
                world.lose(last);
                break;
            }
        }
    }

    #[test]
    fn with_parity_one_store_may_be_lost_while_the_source_scatters(
        stores in 3_usize..6,
        pages in 0_u64..40,
        steps in steps(),
        victim in any::<usize>(),
        at in 0_usize..80,
    ) {
        let mut world = World::new(stores, Redundancy::Parity, vec![1000; stores], pages);
        let moves = steps.into_iter().filter(|step| !matches!(step, Step::Lose(_)));
        for (number, step) in moves.enumerate() {
            if number == at && !world.evicted {
                world.lose(victim);
            }
            world.go(&step);
        }
        world.end();
        prop_assert!(!world.failed, "one store less is no reason to give up");
        prop_assert_eq!(world.readable(world.lost()), (0..pages).collect::<Vec<_>>());
    }

    #[test]
    fn with_parity_one_store_may_fill_up_and_another_be_lost_after_the_source_has_gone(
        stores in 3_usize..6,
        small in any::<usize>(),
        room in 0_usize..30,
        pages in 0_u64..40,
        steps in steps(),
        victim in any::<usize>(),
    ) {
        let mut rooms = vec![1000; stores];
        rooms[small % stores] = room;
        let mut world = World::new(stores, Redundancy::Parity, rooms, pages);
        let moves = steps.iter().filter(|step| !matches!(step, Step::Lose(_)));
        moves.for_each(|step| world.go(step));
        world.end();
        prop_assert!(!world.failed, "one store less is no reason to give up");
        world.lose(victim);
        prop_assert_eq!(world.readable(world.lost()), (0..pages).collect::<Vec<_>>());
    }

    #[test]
    fn with_redundancy_one_store_may_be_lost_after_the_source_has_gone(
        stores in 2_usize..6,
        parity in any::<bool>(),
        pages in 1_u64..40,
        order in prop::collection::vec(any::<usize>(), 200),
        victim in any::<usize>(),
    ) {
        let redundancy = if parity { Redundancy::Parity } else { Redundancy::Mirror };
        let mut world = World::new(stores, redundancy, vec![1000; stores], pages);
        for _ in 0..=pages {
            world.send();
        }
        for which in order {
            world.answer(which);
        }
        prop_assert!(world.evicted && !world.failed);
        world.lose(victim);
        prop_assert_eq!(world.readable(world.lost()), (0..pages).collect::<Vec<_>>());
    }
}

#[test]
fn a_guest_without_pages_leaves_at_once() {
    let mut world = World::new(3, Redundancy::Parity, vec![9; 3], 0);
    world.send();
    assert!(world.evicted);
    let pack = Pack { id: PackId(0), slots: 1, width: Width::WHOLE, bytes: content(0) };
    let late = world.scatter.apply(Event::Pack(pack), &mut Vec::new());
    assert_eq!(late, Err(ScatterError::AfterEnd(PackId(0))));
}

#[test]
fn what_only_a_lost_store_had_is_sent_again() {
    let mut world = World::new(2, Redundancy::None, vec![9; 2], 2);
    world.send();
    world.send();
    world.answer(0);
    world.answer(0);
    world.lose(0);
    assert_eq!(world.resends, [PackId(0)]);
    for _ in 0..3 {
        world.send();
        world.answer(0);
    }
    assert!(world.evicted);
    assert_eq!(world.readable(world.lost()), [0, 1]);
}
