//! The ledger against an oracle that keeps every page in a map, over random orders of events; and
//! the few rules one by one.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const BLOCKS: [u32; 3] = [5, 1, 7];

#[derive(Debug, Clone)]
enum Event {
    Note(PageAt, Where),
    NoteRun(PageAt, u32, Where),
    Place(PageAt),
    Close,
}

fn pages() -> impl Strategy<Value = PageAt> {
    (0_u16..4, 0_u32..8).prop_map(|(block, page)| PageAt { block, page })
}

fn places() -> impl Strategy<Value = Where> {
    prop_oneof![
        Just(Where::Absent),
        Just(Where::Zero),
        Just(Where::AtSource),
        (0_u64..4, 0_u16..5).prop_map(|(pack, slot)| Where::InPack { pack: PackId(pack), slot }),
        Just(Where::Placed),
    ]
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        6 => (pages(), places()).prop_map(|(at, place)| Event::Note(at, place)),
        2 => (pages(), 0_u32..8, places()).prop_map(|(at, count, place)| Event::NoteRun(at, count, place)),
        4 => pages().prop_map(Event::Place),
        1 => Just(Event::Close),
    ];
    prop::collection::vec(event, 0..150)
}

/// What the ledger should be, in the plainest words.
struct Oracle {
    pages: BTreeMap<PageAt, Where>,
    closed: bool,
    placings: BTreeMap<PageAt, u32>,
}

impl Oracle {
    fn new(known: bool) -> Self {
        let start = if known { Where::AtSource } else { Where::Absent };
        let pages = (0_u16..)
            .zip(BLOCKS)
            .flat_map(|(block, pages)| (0..pages).map(move |page| (PageAt { block, page }, start)));
        Self { pages: pages.collect(), closed: false, placings: BTreeMap::new() }
    }

    fn apply(&mut self, event: &Event) -> bool {
        match *event {
            Event::Note(at, place) => {
                let in_pack = matches!(place, Where::InPack { .. });
                let Some(before) = self.pages.get_mut(&at) else { return false };
                if place == Where::Placed || self.closed && !in_pack {
                    return false;
                }
                if *before != Where::Placed {
                    *before = place;
                }
                true
            }
            Event::NoteRun(first, count, place) => {
                let run = (first.page..first.page + count).map(|page| PageAt { page, ..first });
                // Of a block that has none of them not even nothing can be noted.
                let length = BLOCKS.get(usize::from(first.block)).copied();
                let fits = length.is_some_and(|length| first.page + count <= length);
                let may = !self.closed && matches!(place, Where::Zero | Where::AtSource);
                if !fits || !may {
                    return false;
                }
                self.pages.extend(run.map(|at| (at, place)));
                true
            }
            Event::Place(at) => {
                let Some(before) = self.pages.get_mut(&at) else { return false };
                if self.closed && *before != Where::Placed {
                    *before = Where::Placed;
                    *self.placings.entry(at).or_default() += 1;
                }
                self.closed
            }
            Event::Close => {
                let complete = self.pages.values().all(|place| *place != Where::Absent);
                self.closed |= complete;
                complete
            }
        }
    }
}

fn apply(ledger: &mut Ledger, event: &Event) -> (bool, bool) {
    match *event {
        Event::Note(at, place) => (ledger.note(at, place).is_ok(), false),
        Event::NoteRun(first, count, place) => {
            let run = first.page..first.page + count;
            (ledger.note_run(first.block, run, place).is_ok(), false)
        }
        Event::Place(at) => match ledger.place(at) {
            Ok(placing) => (true, placing != Placing::Late),
            Err(_) => (false, false),
        },
        Event::Close => (ledger.close().is_ok(), false),
    }
}

proptest! {
    #[test]
    fn the_ledger_is_what_the_oracle_says(events in events(), known in any::<bool>()) {
        let mut oracle = Oracle::new(known);
        let mut ledger = Ledger::new(&BLOCKS, 13).unwrap();
        if known {
            for at in oracle.pages.keys() {
                ledger.note(*at, Where::AtSource).unwrap();
            }
        }
        let mut placed = BTreeMap::<PageAt, u32>::new();
        for event in &events {
            let (done, now) = apply(&mut ledger, event);
            prop_assert_eq!(done, oracle.apply(event), "{:?}", event);
            if let (true, Event::Place(at)) = (now, event) {
                *placed.entry(*at).or_default() += 1;
            }
            prop_assert_eq!(ledger.self_check(), Ok(()));
            prop_assert_eq!(ledger.counts().waiting() + ledger.counts().placed, 13);
        }
        for (at, place) in &oracle.pages {
            prop_assert_eq!(ledger.find(*at), Ok(*place));
        }
        prop_assert!(placed.values().all(|times| *times == 1), "a page was placed twice");
        prop_assert_eq!(placed, oracle.placings);
    }

    #[test]
    fn what_is_next_is_what_a_search_finds(events in events(), from in pages(), pack in 0_u64..5) {
        let mut ledger = Ledger::new(&BLOCKS, 13).unwrap();
        for event in &events {
            apply(&mut ledger, event);
        }
        let all = || Oracle::new(false).pages.into_keys();
        let zero = |at: &PageAt| ledger.find(*at) == Ok(Where::Zero);
        let first = all().find(|at| *at >= from && zero(at));
        prop_assert_eq!(ledger.next_page(from, |place| place == Where::Zero), first);
        let waits = |number: u64| all().any(|at| {
            matches!(ledger.find(at), Ok(Where::InPack { pack, .. }) if pack.0 == number)
        });
        let first = (pack..5).find(|number| waits(*number)).map(PackId);
        prop_assert_eq!(ledger.next_pack(PackId(pack)), first);
        prop_assert_eq!(ledger.live(PackId(pack)) > 0, waits(pack));
    }
}

#[test]
fn a_guest_does_not_run_with_a_page_that_nobody_has() {
    let mut ledger = Ledger::new(&[2], 2).unwrap();
    let (first, second) = (PageAt { block: 0, page: 0 }, PageAt { block: 0, page: 1 });
    ledger.note(first, Where::Zero).unwrap();
    assert_eq!(ledger.place(first), Err(LedgerError::NotNow(first, Where::Placed)));
    assert_eq!(ledger.close(), Err(LedgerError::Incomplete { missing: 1, first: second }));
    ledger.note(second, Where::AtSource).unwrap();
    ledger.close().unwrap();
    assert_eq!(ledger.place(second), Ok(Placing::Now(Where::AtSource)));
    assert_eq!(ledger.place(second), Ok(Placing::Late));
}

#[test]
fn what_a_peer_says_is_never_allocated() {
    let pages = u64::from(u32::MAX) * 2;
    let refused = Ledger::new(&[u32::MAX, u32::MAX], 1000).unwrap_err();
    assert_eq!(refused, LedgerError::TooMany { pages, most: 1000 });
    let mut ledger = Ledger::new(&[1], 1).unwrap();
    let at = PageAt { block: 0, page: 0 };
    for (pack, slot) in [(4 + PACKS_SPARE, 0), (u64::MAX, 0), (0, 4096)] {
        let pack = PackId(pack);
        let refused = ledger.note(at, Where::InPack { pack, slot });
        assert_eq!(refused, Err(LedgerError::TooFar { pack, slot }));
    }
    assert_eq!(ledger.live(PackId(u64::MAX)), 0);
    assert_eq!(ledger.next_pack(PackId(u64::MAX)), None);
}
