//! What happens to one leg: how it begins, ends, is doubted, and how an uncertain VM is found again.
//!
//! Small moves that `machine` makes from several of its rules. Nothing here looks at the evacuation.

use lifeboat_protocol::agent::{MigrationProgress, Phase};
use lifeboat_protocol::ids::{HostId, MigrationId};

use super::event::{Action, Change, PlannedLeg, Settlement};
use super::vm::{Leg, Outcome, VmPhase, VmRecord};
use crate::clock::UnixMs;
use crate::network::{Hop, Reserved};

/// The reason of every VM that stays because the operator said so.
pub(super) const CANCELLED: &str = "cancelled by the operator before it left";

pub(super) fn new_leg(migration: MigrationId, planned: PlannedLeg, now: UnixMs) -> Leg {
    Leg {
        migration,
        destination: planned.destination,
        mode: planned.mode,
        hops: planned.hops,
        reserved: Reserved::default(),
        prediction: planned.prediction,
        disk_date: planned.disk_date,
        stores: planned.stores,
        disk_store: planned.disk_store,
        followed: false,
        started: now,
        committed: false,
        uncertain_since: None,
        cancel_sent: false,
        failed_store: None,
        outcome: None,
    }
}

/// The leg is over: what it reserved goes back, then its outcome counts.
pub(super) fn end_leg(
    record: &mut VmRecord,
    outcome: Outcome,
    actions: &mut Vec<Action>,
) -> Change {
    let Some(leg) = record.leg.as_mut() else { return Change::Nothing };
    leg.outcome = Some(outcome);
    record.phase = VmPhase::Releasing;
    actions.extend(release(record));
    Change::State
}

/// An intermediary of the leg is the reason why it does not get anywhere, and not its destination.
pub(super) fn blame(record: &mut VmRecord, store: Option<HostId>) {
    if let (Some(leg), Some(store)) = (record.leg.as_mut(), store)
        && leg.store_hosts().contains(&store)
    {
        leg.failed_store = Some(store);
    }
}

/// The phases in which a migration's way can be changed.
pub(super) const ON_ITS_WAY: [VmPhase; 3] =
    [VmPhase::Preparing, VmPhase::Sending, VmPhase::Committing];

/// Its pages take another way from now on.
pub(super) fn new_way(record: &mut VmRecord, hops: Vec<Hop>, reserved: Reserved) -> Change {
    let Some(leg) = record.leg.as_mut() else { return Change::Nothing };
    (leg.hops, leg.reserved) = (hops, reserved);
    record.reason.clear();
    Change::State
}

/// They take none: it is named, and the agents find out whether it lasts.
pub(super) fn cut_off(record: &mut VmRecord, reason: String) -> Change {
    record.reason = reason;
    Change::Progress
}

/// COMMIT was seen: from here on nothing is cancelled any more.
pub(super) fn commit_seen(record: &mut VmRecord) -> Change {
    if record.phase == VmPhase::Committing {
        return Change::Progress;
    }
    record.phase = VmPhase::Committing;
    if let Some(leg) = record.leg.as_mut() {
        leg.committed = true;
    }
    Change::State
}

/// A late word of the source's agent about a VM that this evacuation has given up on.
pub(super) fn prove_uncertain(record: &mut VmRecord, progress: MigrationProgress) -> Change {
    match progress.phase() {
        Phase::Completed => resolve_uncertain(record, Settlement::Moved(Some(Box::new(progress)))),
        Phase::Lost => {
            let reason = progress.reason;
            resolve_uncertain(record, Settlement::Lost { reason })
        }
        Phase::Failed | Phase::Cancelled => {
            let reason = progress.reason;
            resolve_uncertain(record, Settlement::Stayed { reason, store: None })
        }
        _ => Change::Nothing,
    }
}

/// Proof, or an operator's claim. Its reservation was given back long ago.
pub(super) fn resolve_uncertain(record: &mut VmRecord, settlement: Settlement) -> Change {
    (record.phase, record.reason) = match settlement {
        Settlement::Moved(progress) => {
            record.progress = progress.map(|progress| *progress).or(record.progress.take());
            (arrived(record), String::new())
        }
        Settlement::Stayed { reason, .. } if reason.is_empty() => {
            (VmPhase::LeftBehind, "it was found at its source".to_owned())
        }
        Settlement::Stayed { reason, .. } => (VmPhase::LeftBehind, reason),
        Settlement::Lost { reason } => (VmPhase::Lost, reason),
        Settlement::Uncertain { .. } => return Change::Nothing,
    };
    Change::State
}

/// Where a VM stands once its source is rid of it.
pub(super) fn arrived(record: &mut VmRecord) -> VmPhase {
    if record.leg.as_ref().is_some_and(Leg::is_gathered) {
        return VmPhase::Gathering;
    }
    record.done = 1.0;
    VmPhase::Moved
}

pub(super) fn release(record: &VmRecord) -> Option<Action> {
    record.leg.as_ref().map(|leg| Action::Release { migration: leg.migration.clone() })
}

pub(super) fn settle(record: &VmRecord) -> Option<Action> {
    record.leg.as_ref().map(|leg| Action::Settle {
        migration: leg.migration.clone(),
        vm: record.vm.clone(),
        source: record.source.clone(),
        destination: leg.destination.clone(),
        because: record.reason.clone(),
        committed: leg.committed,
    })
}

pub(super) fn watch(record: &VmRecord) -> Option<Action> {
    record.leg.as_ref().map(|leg| Action::Watch {
        migration: leg.migration.clone(),
        source: record.source.clone(),
        destination: leg.destination.clone(),
    })
}

pub(super) fn cancel_again(record: &VmRecord) -> Option<Action> {
    record.leg.as_ref().map(|leg| Action::Cancel {
        migration: leg.migration.clone(),
        source: record.source.clone(),
    })
}

pub(super) fn follow(record: &VmRecord) -> Action {
    let at = record.leg.as_ref().map_or(&record.source, |leg| &leg.destination);
    Action::Follow { vm: record.vm.clone(), to: HostId::clone(at) }
}
