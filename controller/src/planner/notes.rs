//! What an operator should know of a plan before saying yes. Pure.
//!
//! Used by the planner. What needs a question to the switches (ports that can only be paced) is not
//! here.

use std::fmt::Display;

use lifeboat_policy::predict::is_absorbed;
use lifeboat_protocol::terms::{DiskMode, Mode};
use lifeboat_protocol::units::BitsPerSec;

use super::measure::criteria;
use super::{FullPlan, Goes, millis};
use crate::evacuation::EvacuationOrder;

/// All of it, in the order in which the VMs leave.
pub(super) fn notes(order: &EvacuationOrder, full: &FullPlan) -> Vec<String> {
    let mut notes = Vec::new();
    for host in &order.hosts {
        notes.extend(full.goes.iter().find(|goes| goes.source == *host).and_then(crowded_source));
    }
    for goes in &full.goes {
        let likely = &goes.step.predicted.prediction.likely;
        let pages_follow = matches!(goes.step.mode, Mode::PostCopy | Mode::ScatterGather);
        if pages_follow && !is_absorbed(&goes.figures, &criteria(order)) {
            notes.push(format!(
                "{} dirties {}, faster than its own host takes its memory in: until it stands, its CPUs are slowed \
                 down step by step",
                goes.step.vm, goes.figures.dirty_rate
            ));
        }
        if !likely.converges {
            notes.push(format!(
                "{} writes faster than its path carries: its pause is expected to be {} ms, not {} ms",
                goes.step.vm,
                millis(likely.downtime),
                order.downtime_limit_ms
            ));
        }
        notes.extend(narrow_destination(goes));
        notes.extend(super::elsewhere::note(goes));
        notes.extend(goes.disk_store.as_ref().map(|store| {
            let (vm, source, destination) = (&goes.step.vm, &goes.source, &goes.step.destination);
            format!(
                "{vm} runs at {destination} before its disks are there: all of them ({}) go to {} meanwhile, then \
                 {source} is rid of it, and what {destination} still lacks is at {} alone: while that is down, \
                 {vm} waits for it",
                store.bytes, store.host, store.host
            )
        }));
        if order.disk == DiskMode::OnDemand {
            notes.push(format!(
                "{} runs at {} before its disks are there: until they are it needs {}, which keeps it that long; the \
                 forecast counts all of them as if they went before",
                goes.step.vm, goes.step.destination, goes.source
            ));
        }
        notes.extend(goes.seeded.then(|| {
            format!(
                "{} has a copy of {}'s disks: only what differs is sent, but the forecast counts all of them",
                goes.step.destination, goes.step.vm
            )
        }));
        if goes.step.mode == Mode::Cold {
            notes.push(format!(
                "{} will be stopped and started again at its destination",
                goes.step.vm
            ));
        }
    }
    if order.urgency.percent() == 0 && !full.goes.is_empty() {
        notes.push(
            "urgency 0 reserves nothing: busy links may slow the evacuation without end".to_owned(),
        );
    }
    notes
}

/// SOLive V-A-b: the same is to be reserved at the destination as at the source, where that is
/// feasible; and where it is not, somebody there pays for it.
fn narrow_destination(goes: &Goes) -> Option<String> {
    let reserved = goes.hops.first()?.rate;
    let facing = goes.step.way.hops.last()?;
    (facing.spare < reserved).then(|| {
        format!(
            "{} is to send {reserved}, and {} has {} unused: applications at {} will feel it",
            goes.step.vm, facing.egress, facing.spare, goes.step.destination
        )
    })
}

/// At the source somebody pays as well: while the first VM leaves, all others still send as they do
/// now. The later ones leave less behind.
fn crowded_source(goes: &Goes) -> Option<String> {
    let reserved = goes.hops.first()?.rate;
    let link = goes.step.way.hops.first()?;
    crowded(&goes.step.vm, &link.egress, (link.capacity, link.spare), reserved)
}

fn crowded(
    vm: &dyn Display,
    at: &dyn Display,
    (capacity, spare): (BitsPerSec, BitsPerSec),
    reserved: BitsPerSec,
) -> Option<String> {
    let (sent, left) = (capacity - spare, capacity - reserved);
    (sent > left).then(|| {
        format!(
            "while {vm} leaves, {at} has {left} for the {sent} that others send there now: what is more is delayed and dropped (a lower --urgency leaves them more)"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_loses_at_the_source_is_told_and_only_then() {
        let mbit = BitsPerSec::from_mbit;
        let said =
            |spare, reserved| crowded(&"web", &"s1:p", (mbit(200), mbit(spare)), mbit(reserved));
        assert_eq!(said(180, 180), None, "20 are sent, 20 are left");
        let said = said(165, 180).unwrap();
        let expected = "while web leaves, s1:p has 20 Mbit/s for the 35 Mbit/s that others send";
        assert!(said.starts_with(expected), "{said}");
    }
}
