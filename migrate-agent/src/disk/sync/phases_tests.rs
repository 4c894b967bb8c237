//! Tests of the source's phases: the two papers' ways, every pair of phase and event, any order.

use super::*;
use proptest::prelude::*;

const WHOLE: Goal = Goal { left: 8, early: false };
const EARLY: Goal = Goal { left: 8, early: true };

fn at(phase: Phase, connected: bool, goal: Goal, left: u64) -> Phases {
    Phases { phase, connected, goal, left }
}

#[test]
fn migratefs_three_phases_follow_each_other() {
    let mut way = Phases::new(WHOLE, false);
    assert_eq!(way.apply(Event::Connected), [Action::BeginPass]);
    assert_eq!(way.apply(Event::PassOver { left: 100, sent: 900 }), [Action::BeginPass]);
    assert_eq!(way.phase(), Phase::Dirty);
    let in_step = [Action::Mirror(true), Action::BeginPass];
    assert_eq!(way.apply(Event::PassOver { left: 8, sent: 100 }), in_step);
    assert_eq!(way.apply(Event::Seal), [Action::Veto(Veto::BlocksLeft)]);
    assert_eq!(way.apply(Event::PassOver { left: 0, sent: 8 }), []);
    assert_eq!(way.apply(Event::Seal), [Action::SendSeal]);
    assert_eq!(way.apply(Event::SealAcknowledged), []);
    assert_eq!(way.apply(Event::Ceded { missing: 0 }), [Action::Finish]);
    assert_eq!(way.phase(), Phase::Complete);
}

#[test]
fn a_pass_that_gains_little_is_the_last_before_both_sides_go_in_step() {
    let mut way = Phases::new(WHOLE, false);
    way.apply(Event::Connected);
    for (sent, left) in [(2000, 1000), (1000, 749), (749, 400)] {
        assert_eq!(way.apply(Event::PassOver { left, sent }), [Action::BeginPass]);
        assert_eq!(way.phase(), Phase::Dirty);
    }
    let in_step = [Action::Mirror(true), Action::BeginPass];
    assert_eq!(way.apply(Event::PassOver { left: 300, sent: 400 }), in_step);
    assert_eq!(way.phase(), Phase::Synchronous);
    // The bulk pass may be it already.
    let mut bulk = at(Phase::Bulk, true, WHOLE, u64::MAX);
    assert_eq!(bulk.apply(Event::PassOver { left: 1500, sent: 2000 }), in_step);
    // And not sealed before all of it is drained.
    assert_eq!(way.apply(Event::Seal), [Action::Veto(Veto::BlocksLeft)]);
}

#[test]
fn who_is_in_a_hurry_goes_in_step_before_a_pass_is_over() {
    let mut way = Phases::new(WHOLE, false);
    assert_eq!(way.apply(Event::Hurry), []);
    way.apply(Event::Connected);
    assert_eq!(way.apply(Event::Hurry), [Action::Mirror(true), Action::BeginPass]);
    assert_eq!(way.phase(), Phase::Synchronous);
    assert_eq!(way.apply(Event::Hurry), []);
    // And not sealed before a pass has found nothing left.
    assert_eq!(way.apply(Event::Seal), [Action::Veto(Veto::BlocksLeft)]);
    assert_eq!(way.apply(Event::PassOver { left: 0, sent: 99 }), []);
    assert_eq!(way.apply(Event::Seal), [Action::SendSeal]);
}

#[test]
fn livefs_five_phases_follow_each_other() {
    let mut way = Phases::new(EARLY, true);
    assert_eq!(way.apply(Event::Connected), []);
    assert_eq!(way.apply(Event::MonitoringOver), [Action::Rank, Action::BeginPass]);
    assert_eq!(way.apply(Event::PassOver { left: 5, sent: 50 }).len(), 2);
    assert_eq!(way.apply(Event::Seal), [Action::SendSeal]);
    way.apply(Event::SealAcknowledged);
    assert_eq!(way.apply(Event::Ceded { missing: 70 }), [Action::SendRest]);
    assert_eq!(way.apply(Event::Lost), []);
    assert_eq!(way.apply(Event::Connected), [Action::SendRest]);
    assert_eq!(way.apply(Event::AllThere), [Action::Finish]);
}

#[test]
fn a_peer_that_does_not_answer_costs_the_step_and_nothing_else() {
    for (event, veto) in [(Event::Unanswered, Veto::Unanswered), (Event::Lost, Veto::Lost)] {
        for phase in [Phase::Synchronous, Phase::Sealing] {
            let mut way = at(phase, true, WHOLE, 0);
            let actions = way.apply(event);
            assert_eq!(actions[..2], [Action::Mirror(false), Action::Veto(veto)]);
            assert_eq!(way.phase(), Phase::Dirty);
            assert_eq!(way.apply(Event::Seal), [Action::Veto(Veto::NotInStep)]);
        }
    }
}

#[test]
fn a_seal_outlives_the_connection_until_somebody_decides() {
    let mut way = at(Phase::Sealed, true, WHOLE, 0);
    assert_eq!(way.apply(Event::Lost), []);
    assert_eq!(way.phase(), Phase::Sealed);
    assert_eq!(way.clone().apply(Event::Ceded { missing: 0 }), [Action::Finish]);
    assert_eq!(way.apply(Event::Unseal), [Action::Mirror(false)]);
    assert_eq!(way.phase(), Phase::Dirty);
}

/// Every phase with every event: where it leads with a connection and blocks left (of an early
/// hand-over). A phase that is not named keeps to itself.
#[test]
fn every_pair_of_phase_and_event_leads_where_the_picture_says() {
    use Phase::*;
    let table = |phase, event| match (phase, event) {
        (Monitoring, Event::MonitoringOver) => Bulk,
        (Bulk | Dirty, Event::PassOver { left: 0, .. }) => Synchronous,
        (Bulk, Event::PassOver { .. }) => Dirty,
        (Synchronous | Sealing, Event::Unanswered | Event::Lost) => Dirty,
        (Synchronous, Event::Seal) => Sealing,
        (Sealing, Event::SealAcknowledged) => Sealed,
        (Sealing | Sealed, Event::Unseal) => Synchronous,
        (Sealed, Event::Ceded { missing: 0 }) => Complete,
        (Sealed, Event::Ceded { .. }) => Rest,
        (Rest, Event::AllThere) => Complete,
        (phase, _) => phase,
    };
    for phase in Phase::ALL {
        for event in Event::ALL {
            let mut way = at(phase, true, EARLY, 3);
            way.apply(event);
            assert_eq!(way.phase(), table(phase, event), "{phase:?} {event:?}");
        }
    }
}

#[test]
fn without_a_connection_nothing_is_sent() {
    let sends = |action: &Action| {
        matches!(
            action,
            Action::BeginPass | Action::SendSeal | Action::SendUnseal | Action::SendRest
        )
    };
    for phase in Phase::ALL {
        for event in Event::ALL.into_iter().filter(|event| *event != Event::Connected) {
            // Mirrored phases end when the connection does.
            if matches!(phase, Phase::Synchronous | Phase::Sealing) {
                continue;
            }
            let actions = at(phase, false, EARLY, 3).apply(event);
            assert!(!actions.iter().any(sends), "{phase:?} {event:?} {actions:?}");
        }
    }
}

proptest! {
    /// Whatever happens in whatever order: writes are mirrored exactly in the phases that promise
    /// it, nothing leads back across the hand-over, and a whole disk is sealed only with none left.
    #[test]
    fn any_order_of_events_keeps_the_promises(
        events in prop::collection::vec(0..Event::ALL.len(), 0..80),
        early in any::<bool>(),
        monitors in any::<bool>(),
    ) {
        let mut way = Phases::new(Goal { left: 8, early }, monitors);
        let mut mirrors = false;
        for index in events {
            let before = way.phase();
            for action in way.apply(Event::ALL[index]) {
                match action {
                    Action::Mirror(on) => mirrors = on,
                    Action::SendSeal => prop_assert!(early || way.left == 0),
                    _ => {}
                }
            }
            let promised = (Phase::Synchronous..=Phase::Sealed).contains(&way.phase());
            prop_assert!(mirrors == promised || way.phase() > Phase::Sealed, "{:?}", way);
            prop_assert!(before < Phase::Rest || way.phase() >= before);
        }
    }
}
