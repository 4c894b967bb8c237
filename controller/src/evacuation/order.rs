//! What an operator asked for, after every word of it was checked.
//!
//! Made by `grpc/` from a request, kept in the journal, never changed afterwards. Whether it can
//! be done is the planner's business.

use lifeboat_policy::intermediary::Redundancy;
use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::terms::{DiskMode, Mode, Reason, ReservationKind, Urgency};
use serde::{Deserialize, Serialize};

use crate::clock::UnixMs;

/// One `evacuate` or `migrate` command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvacuationOrder {
    /// The hosts to empty; of a `migrate`, the host where the VM was when it was asked for.
    pub hosts: Vec<HostId>,
    /// The VMs to move; empty for all that the hosts run.
    pub vms: Vec<VmId>,
    /// What share of each link it is entitled to.
    pub urgency: Urgency,
    /// What its reservation means to the others on a link.
    #[serde(default)]
    pub reservation: ReservationKind,
    /// Whether the reservation stays as the urgency gives it instead of following the counters.
    #[serde(default)]
    pub fixed: bool,
    /// How memory moves.
    pub mode: Mode,
    /// The only destinations allowed; empty for any.
    pub to: Vec<HostId>,
    /// How many VMs move at a time; at least 1.
    pub parallel: u32,
    /// Why.
    pub reason: Reason,
    /// When it should be over; a warning in the plan and a deadline for the agents.
    pub deadline: Option<UnixMs>,
    /// The pause to aim for at the switchover, in milliseconds.
    pub downtime_limit_ms: u32,
    /// The only hosts that may keep pages in scatter-gather; empty for any that can.
    #[serde(default)]
    pub intermediaries: Vec<HostId>,
    /// How many; 0 for as many as the reservation needs.
    #[serde(default)]
    pub intermediary_count: u32,
    /// How a lost store is made up for; `None`: the best for so many stores.
    #[serde(default)]
    pub redundancy: Option<Redundancy>,
    /// When its disks move.
    #[serde(default)]
    pub disk: DiskMode,
    /// Of disks on demand: what of the busy part may be left at the hand-over, bytes; 0 for the agents'
    /// default.
    #[serde(default)]
    pub handover_size: u64,
    /// For how long it is watched before which part is busy, in milliseconds; 0 for the agents' default.
    #[serde(default)]
    pub disk_watch_ms: u32,
    /// The caller's operation id: the same one again is the same evacuation.
    pub operation: String,
    /// Who asked, as the audit log names them.
    pub operator: String,
}

impl EvacuationOrder {
    /// Whether the hosts themselves are being emptied, so that they may take no VM. A `migrate`
    /// leaves its source open.
    #[must_use]
    pub fn empties_hosts(&self) -> bool {
        self.vms.is_empty()
    }

    /// Whether a VM is among what was asked for.
    #[must_use]
    pub fn wants(&self, vm: &VmId) -> bool {
        self.vms.is_empty() || self.vms.contains(vm)
    }
}
