//! The whole table of phases and events, and random orders of events against a small world that
//! checks what must never happen.

mod table;
mod world;

use lifeboat_protocol::agent::{MigrationProgress, Phase};

use super::testing::{choice, host, order, scattered, vm};
use super::*;
use crate::clock::UnixMs;
use crate::network::Reserved;
use lifeboat_protocol::ids::{EvacuationId, MigrationId};
use lifeboat_protocol::terms::Mode;

fn migration(n: u32) -> MigrationId {
    MigrationId::new(format!("e1-m{n}")).unwrap()
}

fn progress(n: u32, phase: Phase) -> Event {
    Event::Progress(Box::new(MigrationProgress {
        migration: migration(n).to_string(),
        phase: phase.into(),
        reason: "because".to_owned(),
        ..MigrationProgress::default()
    }))
}

fn ticket() -> PageTicket {
    PageTicket {
        address: "10.0.0.2:7000".to_owned(),
        token: vec![7; 32],
        seeded: false,
        disks_there: vec![],
        scatter: None,
        disk_store: None,
    }
}

fn begun(names: &[&str], order: EvacuationOrder) -> (Evacuation, Vec<Action>) {
    let id = EvacuationId::new("e1").unwrap();
    let mut evacuation = Evacuation::new(id, order, Limits::default(), UnixMs(0));
    let waits = |name: &&str| VmRecord::waiting(vm(name), host("h1"), Prediction::default());
    let vms = names.iter().map(waits).collect();
    let mut actions = Vec::new();
    evacuation.apply(UnixMs(0), Event::Planned { vms }, &mut actions);
    (evacuation, actions)
}

#[test]
fn a_host_without_vms_is_done_at_once() {
    let (evacuation, actions) = begun(&[], order("h1"));
    assert_eq!(evacuation.state, EvacuationState::Done);
    assert!(matches!(actions[..], [Action::Finished { .. }]));
}

#[test]
fn two_at_a_time_means_two_and_not_three() {
    let (mut evacuation, _) =
        begun(&["a", "b", "c"], EvacuationOrder { parallel: 2, ..order("h1") });
    let mut actions = Vec::new();
    for name in ["a", "b"] {
        let choice = Some(choice(name, "h2"));
        evacuation.apply(UnixMs(1), Event::Chosen { choice, no_place: vec![] }, &mut actions);
    }
    assert_eq!(evacuation.live().count(), 2);
    assert_eq!(actions.iter().filter(|a| matches!(a, Action::Choose { .. })).count(), 1);
    assert_eq!(evacuation.record(&vm("c")).unwrap().phase, VmPhase::Waiting);
}

#[test]
fn a_destination_that_failed_is_told_to_the_next_choice_and_the_third_failure_is_the_last() {
    let (mut evacuation, mut actions) = begun(&["a"], order("h1"));
    for n in 1..=3 {
        let to = format!("h{}", n + 1);
        let choice = Some(choice("a", &to));
        evacuation.apply(UnixMs(1), Event::Chosen { choice, no_place: vec![] }, &mut actions);
        let failed = Event::ReserveFailed { migration: migration(n), reason: format!("no {to}") };
        evacuation.apply(UnixMs(1), failed, &mut actions);
        actions.clear();
        let released = Event::Released { migration: migration(n), failures: vec![] };
        evacuation.apply(UnixMs(1), released, &mut actions);
        if n < 3 {
            let Some(Action::Choose { waiting }) = actions.first() else { panic!("{actions:?}") };
            assert_eq!(waiting[0].tried.len(), n as usize);
        }
    }
    let record = evacuation.record(&vm("a")).unwrap();
    assert_eq!((record.phase, record.reason.as_str()), (VmPhase::LeftBehind, "no h4"));
    assert_eq!(evacuation.state, EvacuationState::Failed);
}

/// What was wanted about stores, in order.
fn about_stores(actions: &[Action]) -> Vec<&'static str> {
    let word = |action: &Action| match action {
        Action::Gather { .. } => Some("gather"),
        Action::ReleaseStores { .. } => Some("release"),
        _ => None,
    };
    actions.iter().filter_map(word).collect()
}

#[test]
fn stores_are_owed_from_before_they_are_opened_until_they_have_gone() {
    let (mut evacuation, mut actions) = begun(&["a"], order("h1"));
    let chosen = Event::Chosen { choice: Some(scattered("a", "h2")), no_place: vec![] };
    evacuation.apply(UnixMs(1), chosen, &mut actions);
    assert_eq!(evacuation.stores_owed().len(), 1);
    let reserved = Event::Reserved { migration: migration(1), reserved: Reserved::default() };
    let events = [
        reserved,
        Event::Prepared { migration: migration(1), ticket: ticket() },
        progress(1, Phase::Completed),
        Event::Released { migration: migration(1), failures: vec![] },
    ];
    for event in events {
        evacuation.apply(UnixMs(2), event, &mut actions);
    }
    assert_eq!(about_stores(&actions), ["gather"]);
    assert_eq!(evacuation.live().count(), 0, "its slot is free while its destination gathers");
    // The controller is killed; the next one follows the gathering and releases nothing.
    let text = serde_json::to_string(&evacuation).unwrap();
    evacuation = serde_json::from_str(&text).unwrap();
    actions.clear();
    evacuation.apply(UnixMs(3), Event::Restarted, &mut actions);
    assert_eq!(about_stores(&actions), ["gather"]);
    let gathered = Event::Gathered { migration: migration(1), lost: None };
    evacuation.apply(UnixMs(9), gathered, &mut actions);
    assert_eq!(about_stores(&actions), ["gather", "release"]);
    assert_eq!(evacuation.state, EvacuationState::Done);
    // Killed once more: the evacuation is over, and still owes them.
    evacuation = serde_json::from_str(&serde_json::to_string(&evacuation).unwrap()).unwrap();
    actions.clear();
    assert_eq!(Fleet::new(vec![evacuation.clone()]).to_take_up().count(), 1);
    evacuation.apply(UnixMs(10), Event::Restarted, &mut actions);
    assert_eq!(about_stores(&actions), ["release"]);
    evacuation.apply(UnixMs(11), Event::StoresReleased { migration: migration(1) }, &mut actions);
    assert!(evacuation.stores_owed().is_empty());
    assert_eq!(Fleet::new(vec![evacuation]).to_take_up().count(), 0);
}

#[test]
fn an_intermediary_that_failed_is_told_to_the_next_choice_and_its_destination_may_be_tried_again() {
    // Nobody opens a store there; or one side of the migration finds that it is of no use.
    for at_the_opening in [true, false] {
        let (mut evacuation, mut actions) = begun(&["a"], order("h1"));
        let named = |store: Option<&str>| store.map(host);
        let reason = "no".to_owned();
        let stayed = |store| Settlement::Stayed { reason: "no".to_owned(), store: named(store) };
        let settled = |store| Event::Settled { migration: migration(1), settlement: stayed(store) };
        let prepare_failed = |store| Event::PrepareFailed {
            migration: migration(1),
            reason: reason.clone(),
            store: named(store),
        };
        let of_another = Some("h77");
        let events = match at_the_opening {
            true => [prepare_failed(Some("h9")), settled(of_another)],
            false => [prepare_failed(None), settled(Some("h9"))],
        };
        let chosen = Event::Chosen { choice: Some(scattered("a", "h2")), no_place: vec![] };
        evacuation.apply(UnixMs(1), chosen, &mut actions);
        let reserved = Event::Reserved { migration: migration(1), reserved: Reserved::default() };
        evacuation.apply(UnixMs(1), reserved, &mut actions);
        for event in events {
            evacuation.apply(UnixMs(1), event, &mut actions);
        }
        actions.clear();
        let released = Event::Released { migration: migration(1), failures: vec![] };
        evacuation.apply(UnixMs(1), released, &mut actions);
        let waiting = actions.iter().find_map(|action| match action {
            Action::Choose { waiting } => waiting.first(),
            _ => None,
        });
        let waiting = waiting.expect("it is its turn again");
        assert_eq!((&waiting.tried[..], &waiting.failed_stores[..]), (&[][..], &[host("h9")][..]));
    }
}

#[test]
fn stores_of_a_vm_in_doubt_stay_and_those_of_a_failed_leg_go() {
    let started = |outcome: Settlement| {
        let (mut evacuation, mut actions) = begun(&["a"], order("h1"));
        let chosen = Event::Chosen { choice: Some(scattered("a", "h2")), no_place: vec![] };
        let reserved = Event::Reserved { migration: migration(1), reserved: Reserved::default() };
        let reason = "no".to_owned();
        let events = [
            chosen,
            reserved,
            Event::PrepareFailed { migration: migration(1), reason, store: None },
            Event::Settled { migration: migration(1), settlement: outcome },
            Event::Released { migration: migration(1), failures: vec![] },
        ];
        for event in events {
            evacuation.apply(UnixMs(2), event, &mut actions);
        }
        (evacuation, actions)
    };
    let (_, actions) = started(Settlement::Stayed { reason: String::new(), store: None });
    assert_eq!(about_stores(&actions), ["release"]);
    let (mut doubt, mut actions) = started(Settlement::Uncertain { reason: "silent".to_owned() });
    assert!(about_stores(&actions).is_empty());
    let proof = Event::Settled { migration: migration(1), settlement: Settlement::Moved(None) };
    doubt.apply(UnixMs(9), proof, &mut actions);
    assert_eq!(about_stores(&actions), ["gather"]);
}

#[test]
fn who_finds_no_place_waits_for_stores_that_will_be_free_again() {
    let (mut evacuation, mut actions) = begun(&["a", "b"], order("h1"));
    let chosen = Event::Chosen { choice: Some(scattered("a", "h2")), no_place: vec![] };
    let reserved = Event::Reserved { migration: migration(1), reserved: Reserved::default() };
    let ticket = ticket();
    let events = [
        chosen,
        reserved,
        Event::Prepared { migration: migration(1), ticket },
        progress(1, Phase::Completed),
        Event::Released { migration: migration(1), failures: vec![] },
    ];
    for event in events {
        evacuation.apply(UnixMs(1), event, &mut actions);
    }
    assert_eq!(evacuation.record(&vm("a")).unwrap().phase, VmPhase::Gathering);
    let full = || Event::Chosen { choice: None, no_place: vec![(vm("b"), "full".to_owned())] };
    let asked = |actions: &mut Vec<Action>| {
        let asked = actions.iter().any(|action| matches!(action, Action::Choose { .. }));
        actions.clear();
        asked
    };
    assert!(asked(&mut actions));
    // It is looked for again now and then, and not all the time.
    evacuation.apply(UnixMs(2), full(), &mut actions);
    evacuation.apply(UnixMs(3), Event::Tick, &mut actions);
    assert!(!asked(&mut actions));
    assert_eq!(evacuation.record(&vm("b")).unwrap().said(), "no place for it yet: full");
    evacuation.apply(UnixMs(3_000), Event::Tick, &mut actions);
    assert!(asked(&mut actions));
    evacuation.apply(UnixMs(3_001), full(), &mut actions);
    // Gathered: its stores are about to go, and then have gone.
    let gathered = Event::Gathered { migration: migration(1), lost: None };
    evacuation.apply(UnixMs(3_002), gathered, &mut actions);
    assert!(!asked(&mut actions));
    evacuation.apply(UnixMs(5_100), Event::Tick, &mut actions);
    assert!(asked(&mut actions));
    evacuation.apply(UnixMs(5_101), full(), &mut actions);
    assert!(!evacuation.record(&vm("b")).unwrap().phase.is_final());
    evacuation.apply(
        UnixMs(5_102),
        Event::StoresReleased { migration: migration(1) },
        &mut actions,
    );
    assert!(asked(&mut actions));
    // Nothing is left whose end could make room.
    evacuation.apply(UnixMs(5_103), full(), &mut actions);
    let record = evacuation.record(&vm("b")).unwrap();
    assert_eq!((record.phase, record.reason.as_str()), (VmPhase::LeftBehind, "full"));
}

#[test]
fn room_that_was_made_while_it_was_looked_for_is_looked_for_again() {
    let (mut evacuation, mut actions) = begun(&["a", "b"], order("h1"));
    let failed = Event::ReserveFailed { migration: migration(1), reason: "no".to_owned() };
    let first = [
        Event::Chosen { choice: Some(scattered("a", "h2")), no_place: vec![] },
        failed,
        Event::Released { migration: migration(1), failures: vec![] },
    ];
    for event in first {
        evacuation.apply(UnixMs(1), event, &mut actions);
    }
    // Asked for while the stores were there, answered when they had gone.
    actions.clear();
    let full = || {
        let no_place = ["a", "b"].map(|name| (vm(name), "full".to_owned())).to_vec();
        Event::Chosen { choice: None, no_place }
    };
    evacuation.apply(UnixMs(2), Event::StoresReleased { migration: migration(1) }, &mut actions);
    evacuation.apply(UnixMs(3), full(), &mut actions);
    assert!(actions.iter().any(|action| matches!(action, Action::Choose { .. })), "{actions:?}");
    assert!(evacuation.vms.iter().all(|record| !record.phase.is_final()));
    evacuation.apply(UnixMs(4), full(), &mut actions);
    assert!(evacuation.vms.iter().all(|record| record.phase == VmPhase::LeftBehind));
}

#[test]
fn a_store_that_nobody_releases_is_not_waited_for_for_ever() {
    let (mut evacuation, mut actions) = begun(&["a"], order("h1"));
    let chosen = Event::Chosen { choice: Some(scattered("a", "h2")), no_place: vec![] };
    let failed = Event::ReserveFailed { migration: migration(1), reason: "no".to_owned() };
    let released = Event::Released { migration: migration(1), failures: vec![] };
    for event in [chosen, failed, released] {
        evacuation.apply(UnixMs(1), event, &mut actions);
    }
    let mut now = 2;
    while !evacuation.record(&vm("a")).unwrap().phase.is_final() {
        let full = Event::Chosen { choice: None, no_place: vec![(vm("a"), "full".to_owned())] };
        evacuation.apply(UnixMs(now), full, &mut actions);
        now += 2_000;
        evacuation.apply(UnixMs(now), Event::Tick, &mut actions);
        assert!(now < 40_000, "waits on");
    }
}

#[test]
fn what_is_past_commit_arrives_although_it_was_cancelled() {
    let mut evacuation = table::standing_at(VmPhase::Committing);
    let mut actions = Vec::new();
    evacuation.apply(UnixMs(5), Event::CancelRequested, &mut actions);
    assert!(actions.is_empty(), "{actions:?}");
    evacuation.apply(UnixMs(6), progress(1, Phase::Completed), &mut actions);
    let released = Event::Released { migration: migration(1), failures: vec![] };
    evacuation.apply(UnixMs(7), released, &mut actions);
    assert_eq!(evacuation.state, EvacuationState::Done);
}

#[test]
fn uncertain_is_waited_for_and_then_given_up_but_still_open_to_proof() {
    let mut evacuation = table::standing_at(VmPhase::Committing);
    let mut actions = Vec::new();
    evacuation.apply(UnixMs(1_000), progress(1, Phase::Uncertain), &mut actions);
    evacuation.apply(UnixMs(60_999), Event::Tick, &mut actions);
    assert!(actions.is_empty());
    evacuation.apply(UnixMs(61_000), Event::Tick, &mut actions);
    assert!(matches!(actions[..], [Action::Release { .. }]));
    let released = Event::Released { migration: migration(1), failures: vec![] };
    evacuation.apply(UnixMs(61_001), released, &mut actions);
    assert_eq!(evacuation.state, EvacuationState::Failed);
    assert_eq!(evacuation.vms[0].phase, VmPhase::Uncertain);
    let proof = Event::Settled { migration: migration(1), settlement: Settlement::Moved(None) };
    evacuation.apply(UnixMs(70_000), proof, &mut actions);
    assert_eq!(
        (evacuation.state, evacuation.vms[0].phase),
        (EvacuationState::Done, VmPhase::Moved)
    );
}

#[test]
fn done_never_runs_backwards_and_an_unknown_time_stays_unknown() {
    let at = |iteration, left: u64| MigrationProgress {
        phase: Phase::MemoryCopy.into(),
        iteration,
        bytes_total: 100,
        bytes_remaining: left,
        ..MigrationProgress::default()
    };
    let mut done = 0.0;
    let mut shown = Vec::new();
    for step in [at(1, 100), at(1, 50), at(1, 0), at(2, 30), at(2, 0), at(3, 90), at(9, 1)] {
        let next = done_share(Mode::PreCopy, &step, done);
        assert!(next >= done && next < 0.96, "{shown:?} {next}");
        done = next;
        shown.push(done);
    }
    assert_eq!(shown[1], 0.4);
    let mut evacuation = table::standing_at(VmPhase::Sending);
    evacuation.apply(UnixMs(1), progress(1, Phase::MemoryCopy), &mut Vec::new());
    assert_eq!(time_to_go(&evacuation), None);
}

#[test]
fn where_pages_follow_traffic_follows_at_once_and_the_bar_moves_afterwards() {
    let at = |phase: Phase, sent: u64| MigrationProgress {
        migration: migration(1).to_string(),
        phase: phase.into(),
        bytes_sent: sent,
        bytes_remaining: 100 - sent,
        rate_bits_per_sec: 80,
        ..MigrationProgress::default()
    };
    let mut evacuation = table::standing_at(VmPhase::Sending);
    evacuation.vms[0].leg.as_mut().unwrap().mode = Mode::PostCopy;
    let mut step = |phase, sent| {
        let mut actions = Vec::new();
        let event = Event::Progress(Box::new(at(phase, sent)));
        evacuation.apply(UnixMs(2), event, &mut actions);
        let follows = actions.iter().filter(|action| matches!(action, Action::Follow { .. }));
        (follows.count(), evacuation.vms[0].done, time_to_go(&evacuation))
    };
    let (_, absorbed, _) = step(Phase::MemoryCopy, 0);
    assert!(absorbed <= 0.1, "memory speed says nothing of the network: {absorbed}");
    assert_eq!(step(Phase::Committing, 0).0, 0);
    let (follows, begun, left) = step(Phase::PostCopy, 0);
    assert_eq!((follows, left), (1, Some(10_000)));
    let (follows, half, left) = step(Phase::PostCopy, 50);
    assert_eq!((follows, left), (0, Some(5_000)));
    assert!(begun < 0.2 && half > 0.5 && half < 0.6, "{begun} {half}");
    step(Phase::Completed, 100);
    assert_eq!(evacuation.vms[0].phase, VmPhase::Releasing);
}

#[test]
fn an_order_that_another_evacuation_stands_in_the_way_of_is_refused() {
    let (evacuation, _) = begun(&["a"], order("h1"));
    let fleet = Fleet::new(vec![evacuation]);
    let refused = |order: EvacuationOrder| fleet.admit(&order).unwrap_err().to_string();
    assert!(refused(order("h1")).contains("already being evacuated by e1"));
    let to = EvacuationOrder { to: vec![host("h1")], ..order("h2") };
    assert!(refused(to).contains("cannot take VMs"));
    let twice = EvacuationOrder { hosts: vec![host("h2"), host("h2")], ..order("h2") };
    assert!(refused(twice).contains("named twice"));
    let same = EvacuationOrder { vms: vec![vm("a")], ..order("h2") };
    assert!(refused(same).contains("VM a is already part of e1"));
    assert!(fleet.admit(&order("h2")).is_ok());
}
