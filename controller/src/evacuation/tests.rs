//! The whole table of phases and events, and random orders of events against a small world that
//! checks what must never happen.

mod table;
mod world;

use lifeboat_protocol::agent::{MigrationProgress, Phase};

use super::testing::{choice, host, order, vm};
use super::*;
use crate::clock::UnixMs;
use crate::network::Reserved;
use lifeboat_protocol::ids::{EvacuationId, MigrationId};

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
    PageTicket { address: "10.0.0.2:7000".to_owned(), token: vec![7; 32] }
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
            assert_eq!(waiting[0].2.len(), n as usize);
        }
    }
    let record = evacuation.record(&vm("a")).unwrap();
    assert_eq!((record.phase, record.reason.as_str()), (VmPhase::LeftBehind, "no h4"));
    assert_eq!(evacuation.state, EvacuationState::Failed);
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
        let next = done_share(&step, done);
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
