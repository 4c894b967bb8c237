//! What to begin with, what to change, and what a strict migration is told.

use lifeboat_policy::reserve::Floor;
use lifeboat_policy::saturation::Saturation;
use lifeboat_protocol::ids::SwitchId;
use lifeboat_protocol::terms::Urgency;

use super::*;
use crate::evacuation::testing::{host, order};
use crate::network::{QueueRate, ReservedHop};

fn mbit(rate: u64) -> BitsPerSec {
    BitsPerSec::from_mbit(rate)
}

fn port(name: &str) -> PortRef {
    PortRef { switch: SwitchId::new("s1").unwrap(), port: name.to_owned() }
}

fn hop(name: &str) -> Hop {
    Hop { at: port(name), capacity: mbit(100), rate: mbit(50) }
}

fn id() -> EvacuationId {
    EvacuationId::new("e1").unwrap()
}

/// A port of 100 Mbit/s on which e1 holds `reserved` (0: nothing).
fn rate(name: &str, used: Option<u64>, reserved: u64, sent: u64) -> PortRate {
    let queue = QueueRate {
        evacuation: id(),
        urgency: Urgency::new(50).unwrap(),
        kind: ReservationKind::Borrow,
        migrations: Vec::new(),
        queue: 3,
        reserved: mbit(reserved),
        transmitted: Some(mbit(sent)),
    };
    PortRate {
        at: port(name),
        peer: String::new(),
        up: true,
        capacity: mbit(100),
        saturation: Saturation::Unknown,
        transmitted: used.map(mbit),
        queues: if reserved > 0 { vec![queue] } else { Vec::new() },
    }
}

fn rules() -> Rules {
    Rules { threshold: 0.05, floor: Floor::default() }
}

fn followed_on(ways: &[&[&str]], order: EvacuationOrder) -> Followed {
    let sending = (1..).zip(ways).map(|(n, way)| Sending {
        migration: MigrationId::new(format!("e1-m{n}")).unwrap(),
        source: host("h1"),
        way: way.iter().map(|name| port(name)).collect(),
        paced: None,
    });
    Followed { id: id(), order, sending: sending.collect() }
}

fn half() -> EvacuationOrder {
    EvacuationOrder { urgency: Urgency::new(50).unwrap(), ..order("h1") }
}

#[test]
fn it_begins_with_the_same_along_the_whole_way() {
    let rates = [rate("a", Some(10), 0, 0), rate("b", Some(40), 0, 0)];
    let opened = opening(&rules(), &id(), terms(&half()), &[hop("a"), hop("b")], &rates);
    assert_eq!(opened.iter().map(|hop| hop.rate).collect::<Vec<_>>(), [mbit(60), mbit(60)]);
    // Unknown is not idle: the urgency decides.
    let rates = [rate("a", Some(10), 0, 0), rate("b", None, 0, 0)];
    let opened = opening(&rules(), &id(), terms(&half()), &[hop("a"), hop("b")], &rates);
    assert_eq!(opened[0].rate, mbit(50));
}

#[test]
fn a_second_migration_joins_what_the_first_has_come_to_and_urgency_0_asks_for_nothing() {
    let rates = [rate("a", Some(90), 70, 70), rate("b", Some(5), 0, 0)];
    let opened = opening(&rules(), &id(), terms(&half()), &[hop("a"), hop("b")], &rates);
    assert_eq!((opened[0].rate, opened[1].rate), (mbit(70), mbit(50)));
    let nothing = [Hop { rate: BitsPerSec::ZERO, ..hop("b") }];
    let opened = opening(&rules(), &id(), terms(&half()), &nothing, &rates);
    assert_eq!(opened[0].rate, BitsPerSec::ZERO);
}

#[test]
fn a_fixed_order_changes_nothing_and_an_adaptive_one_follows_the_counters() {
    let rates = [rate("a", Some(60), 50, 50), rate("b", Some(99), 50, 20)];
    let ways: [&[&str]; 1] = [&["a", "b"]];
    let fixed = followed_on(&ways, EvacuationOrder { fixed: true, ..half() });
    assert_eq!(adjustment(&rules(), &fixed, &rates).ports, []);
    let adaptive = adjustment(&rules(), &followed_on(&ways, half()), &rates);
    assert_eq!(adaptive.ports, [(port("a"), mbit(20)), (port("b"), mbit(20))]);
}

#[test]
fn what_is_not_heard_of_is_left_alone() {
    let rates = [rate("a", None, 50, 50)];
    let unheard = adjustment(&rules(), &followed_on(&[&["a"]], half()), &rates);
    assert_eq!(unheard.ports, []);
}

#[test]
fn only_a_strict_migration_is_told_what_it_may_send() {
    let rates = [rate("a", Some(60), 50, 50), rate("b", Some(60), 30, 30)];
    let borrowing = followed_on(&[&["a", "b"]], half());
    assert_eq!(strict_limit(&borrowing, &borrowing.sending[0], &rates), None);
    let order = EvacuationOrder { reservation: ReservationKind::Strict, ..half() };
    let strict = followed_on(&[&["a", "b"]], order);
    assert_eq!(strict_limit(&strict, &strict.sending[0], &rates), Some(mbit(30)));

    let hop = ReservedHop { at: port("a"), capacity: mbit(100), rate: mbit(30), queue: 3 };
    let reserved = Reserved { hops: vec![hop] };
    let limit = |kind, reserved: &Reserved| sending_limit(kind, reserved, mbit(100));
    assert_eq!(limit(ReservationKind::Strict, &reserved), mbit(30));
    assert_eq!(limit(ReservationKind::Borrow, &reserved), mbit(100));
    assert_eq!(limit(ReservationKind::Strict, &Reserved::default()), mbit(100));
}

#[test]
fn where_a_port_can_do_nothing_the_source_keeps_to_what_is_wanted_of_it() {
    let queued = ReservedHop { at: port("a"), capacity: mbit(100), rate: mbit(60), queue: 3 };
    let paced = Hop { at: port("b"), capacity: mbit(100), rate: mbit(40) };
    let reserved = Reserved { hops: vec![queued] }.with_paced(vec![paced]);
    for kind in [ReservationKind::Borrow, ReservationKind::Strict] {
        assert_eq!(sending_limit(kind, &reserved, mbit(100)), mbit(40));
    }
    let order = EvacuationOrder { reservation: ReservationKind::Strict, ..half() };
    let mut strict = followed_on(&[&["a", "b"]], order);
    strict.sending[0].paced = reserved.paced_rate();
    let rates = [rate("a", Some(60), 90, 50)];
    assert_eq!(strict_limit(&strict, &strict.sending[0], &rates), Some(mbit(40)));
}
