//! The ledger in any order of events: no port is promised twice, the floor stays, and nothing is
//! reserved for nobody.

use std::collections::BTreeMap;

use lifeboat_ovs::openflow::Instruction;
use lifeboat_policy::reserve::{Held as HeldPort, Readings, Rules, adapt, begin};
use proptest::prelude::*;

use super::*;

fn evacuation(n: u8) -> EvacuationId {
    EvacuationId::new(format!("e{n}")).unwrap()
}

fn migration(e: u8, m: u8) -> MigrationId {
    MigrationId::new(format!("e{e}-m{m}")).unwrap()
}

fn port(n: u8) -> PortRef {
    PortRef { switch: SwitchId::new(format!("s{n}")).unwrap(), port: format!("p{n}") }
}

fn hop(n: u8, mbit: u64) -> Hop {
    let (capacity, rate) = (BitsPerSec::from_mbit(100), BitsPerSec::from_mbit(mbit));
    Hop { at: port(n), capacity, rate }
}

fn link(n: u8) -> Link {
    Link {
        source: [10, 0, 0, 1].into(),
        destination: [10, 0, 0, n].into(),
        port: 7445,
        served: false,
    }
}

/// Port pN of each switch sN leads to port q of s(N+1), and every port's number is its switch's.
fn ground() -> Ground<'static> {
    fn of(port: &PortRef) -> Option<u32> {
        port.switch.as_str()[1..].parse().ok()
    }
    fn peer(at: &PortRef) -> Option<PortRef> {
        let port = "q".to_owned();
        Some(PortRef { port, ..port_of(of(at)? + 1) })
    }
    fn port_of(n: u32) -> PortRef {
        port(u8::try_from(n).unwrap())
    }
    Ground { number: &of, peer: &peer }
}

fn flows(ledger: &Ledger, n: u8) -> Vec<FlowMod> {
    ledger.flows_on(&port(n).switch, &ground())
}

fn hold(ledger: &mut Ledger, e: u8, m: u8, urgency: u32, hops: &[Hop]) {
    let id = evacuation(e);
    let queue = ledger.queue(&id).or_else(|| ledger.free_queue(&BTreeSet::new())).unwrap();
    let terms = Terms { urgency: Urgency::new(urgency).unwrap(), kind: ReservationKind::Borrow };
    ledger.hold(&id, &migration(e, m), terms, queue, hops, link(2));
}

#[test]
fn migrations_of_an_evacuation_share_its_queue_and_the_last_one_gives_it_back() {
    let mut ledger = Ledger::new(Floor::default());
    hold(&mut ledger, 1, 1, 75, &[hop(1, 75), hop(2, 75)]);
    hold(&mut ledger, 1, 2, 75, &[hop(2, 75), hop(3, 75)]);
    let shares = ledger.shares(&port(2), BitsPerSec::ZERO).unwrap();
    assert_eq!((shares.queues.len(), shares.queues[0].queue), (1, 3));
    assert_eq!(shares.others, BitsPerSec::from_mbit(25));
    assert_eq!(flows(&ledger, 2).len(), 3);
    assert_eq!(ledger.let_go(&evacuation(1), Some(&migration(1, 1))), [port(1)]);
    assert!(ledger.is_on(&evacuation(1), &port(2).switch));
    let rest = ledger.let_go(&evacuation(1), Some(&migration(1, 2)));
    assert_eq!(rest, [port(2), port(3)]);
    assert_eq!((ledger.ports().len(), ledger.queue(&evacuation(1))), (0, None));
}

#[test]
fn over_one_page_link_every_migration_has_a_priority_of_its_own() {
    let mut ledger = Ledger::new(Floor::default());
    hold(&mut ledger, 1, 1, 50, &[hop(1, 50)]);
    hold(&mut ledger, 2, 1, 20, &[hop(1, 20)]);
    hold(&mut ledger, 1, 1, 50, &[hop(1, 50)]);
    let mut priorities: Vec<u16> = flows(&ledger, 1).iter().map(|flow| flow.priority).collect();
    priorities.sort_unstable();
    assert_eq!(priorities, [60_000, 60_000, 61_000, 61_001]);
}

#[test]
fn pinned_flows_name_ports_and_bring_acknowledgements_back() {
    let mut ledger = Ledger::new(Floor::default());
    hold(&mut ledger, 1, 1, 50, &[hop(1, 50), hop(2, 50)]);
    let (id, leg) = (evacuation(1), migration(1, 1));
    assert!(!ledger.is_pinned(&id, Some(&leg)) && flows(&ledger, 3).is_empty());
    ledger.pin(&id, &leg);
    assert!(ledger.is_pinned(&id, Some(&leg)) && ledger.is_pinned(&id, None));
    // The source: clear, page. On the way: and back. The destination: back alone.
    let counts = [1, 2, 3, 4].map(|n| flows(&ledger, n).len());
    assert_eq!(counts, [2, 3, 1, 0]);
    assert_eq!(ledger.switches_of(&id, &leg, &ground()).len(), 3);
    // The same way asked for again stays pinned.
    hold(&mut ledger, 1, 1, 50, &[hop(1, 50), hop(2, 50)]);
    assert!(ledger.is_pinned(&id, Some(&leg)));
}

#[test]
fn the_more_urgent_takes_from_the_less_urgent_and_the_floor_stays() {
    let mut ledger = Ledger::new(Floor::default());
    hold(&mut ledger, 1, 1, 50, &[hop(1, 50)]);
    hold(&mut ledger, 2, 1, 90, &[hop(1, 90)]);
    let shares = ledger.shares(&port(1), BitsPerSec::ZERO).unwrap();
    let rates: Vec<u64> = shares.queues.iter().map(|s| s.rate.0 / 1_000_000).collect();
    assert_eq!((rates, shares.others), (vec![5, 90], BitsPerSec::from_mbit(5)));
}

#[test]
fn what_foreign_queues_are_promised_is_not_promised_again() {
    let mut ledger = Ledger::new(Floor::default());
    hold(&mut ledger, 1, 1, 90, &[hop(1, 90)]);
    let shares = ledger.shares(&port(1), BitsPerSec::from_mbit(40)).unwrap();
    assert!(shares.queues[0].rate == BitsPerSec::from_mbit(60), "{shares:?}");
    let none = ledger.shares(&port(1), BitsPerSec(u64::MAX)).unwrap();
    assert_eq!(none.queues[0].rate, BitsPerSec::ZERO);
}

#[test]
fn where_others_are_held_back_they_have_what_is_not_reserved_and_pages_pass_beside_the_meter() {
    let metered = |flows: &[FlowMod]| {
        flows.iter().filter(|flow| flow.instructions.contains(&Instruction::Meter(METER))).count()
    };
    let mut ledger = Ledger::new(Floor::default());
    hold(&mut ledger, 1, 1, 70, &[hop(2, 70)]);
    ledger.hold_back(&evacuation(1), &migration(1, 1), &[hop(1, 70)]);
    let (at, shares) = ledger.metered_on(&port(1).switch).unwrap();
    assert_eq!((at, shares.others), (port(1), BitsPerSec::from_mbit(30)));
    assert!(ledger.is_metered(&port(1)) && !ledger.is_metered(&port(2)));
    // Three that hold back, one that clears, one for the pages.
    assert_eq!((flows(&ledger, 1).len(), metered(&flows(&ledger, 1))), (5, 2));
    assert_eq!(metered(&flows(&ledger, 2)), 0);
    // A second evacuation takes its part, and gives it back.
    hold(&mut ledger, 2, 1, 10, &[]);
    ledger.hold_back(&evacuation(2), &migration(2, 1), &[hop(1, 10)]);
    let others = |ledger: &Ledger| ledger.metered_on(&port(1).switch).map(|(_, s)| s.others);
    assert_eq!(others(&ledger), Some(BitsPerSec::from_mbit(20)));
    ledger.let_go(&evacuation(1), None);
    assert_eq!(others(&ledger), Some(BitsPerSec::from_mbit(90)));
    ledger.let_go(&evacuation(2), None);
    assert_eq!((others(&ledger), flows(&ledger, 1).len()), (None, 0));
}

#[test]
fn sixteen_evacuations_have_sixteen_numbers_and_the_next_has_none() {
    let mut ledger = Ledger::new(Floor::default());
    for n in 0..16 {
        hold(&mut ledger, n, 1, 5, &[hop(n, 5)]);
    }
    assert_eq!(ledger.free_queue(&BTreeSet::new()), None);
    ledger.let_go(&evacuation(4), None);
    assert_eq!(ledger.free_queue(&BTreeSet::new()), Some(19));
    assert_eq!(ledger.free_queue(&BTreeSet::from([19])), None);
}

proptest! {
    #[test]
    fn in_any_order_no_port_is_promised_twice_and_all_of_it_comes_back(
        steps in prop::collection::vec((0u8..3, 0u8..3, 0u8..4, 0u64..200, any::<bool>()), 0..40)
    ) {
        let mut ledger = Ledger::new(Floor::default());
        for (e, m, p, mbit, take) in steps {
            if take {
                hold(&mut ledger, e, m, 50, &[hop(p, mbit), hop(p + 1, mbit)]);
            } else {
                ledger.let_go(&evacuation(e), Some(&migration(e, m)));
            }
            for at in ledger.ports() {
                let shares = ledger.shares(&at, BitsPerSec::ZERO).unwrap();
                let sum: BitsPerSec = shares.queues.iter().map(|s| s.rate).sum();
                prop_assert_eq!(sum + shares.others, shares.capacity);
                prop_assert!(shares.others >= Floor::default().of(shares.capacity));
                prop_assert!(!ledger.flows_on(&at.switch, &ground()).is_empty());
            }
        }
        for e in 0..3 {
            ledger.let_go(&evacuation(e), None);
        }
        prop_assert!(ledger.ports().is_empty());
    }
}

/// What can happen to reservations.
#[derive(Debug, Clone)]
enum Happens {
    /// A migration of an evacuation begins, on three ports from this one on.
    Begins { e: u8, m: u8, from: u8, urgency: u32, strict: bool, used: Option<u64> },
    /// A port of its way goes down: it takes another.
    Reroutes { e: u8, m: u8, from: u8 },
    /// A second passes, with these counters.
    Second { used: Vec<Option<(u64, u64)>> },
    /// A migration ends.
    Ends { e: u8, m: u8 },
    /// An evacuation ends.
    AllEnd { e: u8 },
    /// The controller is killed, and the next one finds the queues and pinned flows.
    Restart,
}

fn happens() -> impl Strategy<Value = Happens> {
    let (e, m) = (|| 0u8..3, || 0u8..3);
    let mbit = 0u64..150;
    prop_oneof![
        3 => (e(), m(), 0u8..4, 0u32..=100, any::<bool>(), prop::option::of(mbit.clone())).prop_map(
            |(e, m, from, urgency, strict, used)| {
                Happens::Begins { e, m, from, urgency, strict, used }
            }
        ),
        1 => (e(), m(), 0u8..4).prop_map(|(e, m, from)| Happens::Reroutes { e, m, from }),
        4 => prop::collection::vec(prop::option::of((mbit.clone(), mbit)), 8)
            .prop_map(|used| Happens::Second { used }),
        2 => (e(), m()).prop_map(|(e, m)| Happens::Ends { e, m }),
        1 => e().prop_map(|e| Happens::AllEnd { e }),
        1 => Just(Happens::Restart),
    ]
}

fn rules() -> Rules {
    Rules { threshold: 0.05, floor: Floor::default() }
}

fn way(from: u8, mbit: BitsPerSec) -> Vec<Hop> {
    (from..from + 3).map(|n| Hop { rate: mbit, ..hop(n, 0) }).collect()
}

/// One second of Algorithm 1 for every evacuation, as the controller takes it.
fn second(ledger: &mut Ledger, used: &[Option<(u64, u64)>]) {
    let ids: Vec<EvacuationId> = ledger.evacuations().cloned().collect();
    for id in ids {
        let mut ports = BTreeMap::new();
        for at in ledger.ports_of(&id) {
            let shares = ledger.shares(&at, BitsPerSec::ZERO).unwrap();
            let share = shares.queues.iter().find(|share| share.evacuation == id).unwrap();
            let n: usize = at.switch.as_str()[1..].parse().unwrap();
            let readings = used[n % used.len()].map(|(used, migration)| Readings {
                used: BitsPerSec::from_mbit(used),
                migration: BitsPerSec::from_mbit(migration),
            });
            ports
                .insert(at, HeldPort { capacity: shares.capacity, reserved: share.rate, readings });
        }
        let terms = ledger.evacuations[&id].terms;
        let ways: Vec<Vec<PortRef>> = ledger.evacuations[&id]
            .migrations
            .values()
            .map(|held| held.ports.iter().cloned().collect())
            .collect();
        for (at, (rate, _)) in adapt(&rules(), terms, &ports, &ways) {
            assert!(ledger.want(&id, &at, rate), "a port without its evacuation");
        }
    }
}

/// The ledger that a new controller makes of what it finds on the switches.
fn found_again(ledger: &Ledger) -> Ledger {
    let mut new = Ledger::new(Floor::default());
    for (id, holding) in &ledger.evacuations {
        for (migration, held) in &holding.migrations {
            let hops: Vec<Hop> = held
                .ports
                .iter()
                .map(|at| {
                    let shares = ledger.shares(at, BitsPerSec::ZERO).unwrap();
                    let share = shares.queues.into_iter().find(|s| s.evacuation == *id).unwrap();
                    Hop { at: at.clone(), capacity: shares.capacity, rate: share.rate }
                })
                .collect();
            let cookie = mark::Cookie { kind: mark::Kind::Page, evacuation: 1, migration: 1 };
            let page = FoundPage {
                cookie,
                slot: held.slot,
                link: held.link,
                pinned: held.pinned,
                queue: holding.queue,
            };
            let found = FoundQueue {
                number: holding.queue,
                rate: BitsPerSec::ZERO,
                kind: holding.terms.kind,
            };
            new.adopt(id, migration, found, &hops, &page);
        }
    }
    new
}

fn apply(ledger: &mut Ledger, event: Happens) {
    match event {
        Happens::Begins { e, m, from, urgency, strict, used } => {
            let kind = if strict { ReservationKind::Strict } else { ReservationKind::Borrow };
            let terms = Terms { urgency: Urgency::new(urgency).unwrap(), kind };
            let used = used.map(BitsPerSec::from_mbit);
            let rate = begin(&rules(), terms, BitsPerSec::from_mbit(100), used);
            let id = evacuation(e);
            let queue = ledger.queue(&id).or_else(|| ledger.free_queue(&BTreeSet::new())).unwrap();
            ledger.hold(&id, &migration(e, m), terms, queue, &way(from, rate), link(m));
        }
        Happens::Reroutes { e, m, from } => {
            let (id, leg) = (evacuation(e), migration(e, m));
            if ledger.holds(&id, &leg) {
                let (queue, terms) = (ledger.queue(&id).unwrap(), ledger.evacuations[&id].terms);
                let hops = way(from, BitsPerSec::from_mbit(40));
                ledger.hold(&id, &leg, terms, queue, &hops, link(m));
                ledger.pin(&id, &leg);
            }
        }
        Happens::Second { used } => second(ledger, &used),
        Happens::Ends { e, m } => drop(ledger.let_go(&evacuation(e), Some(&migration(e, m)))),
        Happens::AllEnd { e } => drop(ledger.let_go(&evacuation(e), None)),
        Happens::Restart => *ledger = found_again(ledger),
    }
}

/// What must hold after every event.
fn check(ledger: &Ledger) {
    for at in ledger.ports() {
        let shares = ledger.shares(&at, BitsPerSec::ZERO).unwrap();
        let sum: BitsPerSec = shares.queues.iter().map(|share| share.rate).sum();
        let floor = Floor::default().of(shares.capacity);
        assert!(sum + floor <= shares.capacity, "{at}: more is reserved than it carries");
        assert!(shares.others >= floor, "{at}: the floor starves");
        assert!(shares.others_most >= shares.others, "{at}: a ceiling below what is guaranteed");
        for share in &shares.queues {
            assert!(share.rate > BitsPerSec::ZERO, "{at}: a queue that starves");
            assert!(share.most(shares.capacity) >= share.rate);
            let owners = ledger.migrations_at(&share.evacuation, &at);
            assert!(!owners.is_empty(), "{at}: reserved for nobody");
        }
        let mut numbers: Vec<u32> = shares.queues.iter().map(|share| share.queue).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), shares.queues.len(), "{at}: two with one number");
        assert!(!ledger.flows_on(&at.switch, &ground()).is_empty(), "{at}: a queue without flows");
    }
}

proptest! {
    #[test]
    fn no_order_of_events_reserves_too_much_starves_anybody_or_leaves_a_reservation_without_owner(
        events in prop::collection::vec(happens(), 0..60)
    ) {
        let mut ledger = Ledger::new(Floor::default());
        for event in events {
            apply(&mut ledger, event);
            check(&ledger);
        }
        for e in 0..3 {
            ledger.let_go(&evacuation(e), None);
        }
        prop_assert!(ledger.ports().is_empty());
    }
}
