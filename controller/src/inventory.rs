//! What the agents have said last: hosts, VMs, measurements, each with its age.
//!
//! Written by the agents' poll tasks, read by the planner and by the operator's queries. What an
//! agent said stays visible after it has gone silent, marked as old. Deliberately not here: what
//! the controller itself decided (that is the fleet's), and any decision.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lifeboat_protocol::agent::{HostDescription, VmMeasurement, VmState, VmStatus};
use lifeboat_protocol::ids::{HostId, VmId};

use crate::clock::UnixMs;

/// One host, as its agent describes it.
#[derive(Debug, Clone, Default)]
pub struct HostEntry {
    /// Whether the last poll was answered.
    pub connected: bool,
    /// Why not.
    pub detail: String,
    /// Since when it is connected, or not.
    pub since: UnixMs,
    /// What it said last.
    pub description: Option<HostDescription>,
    /// The VMs it spoke of last.
    pub vms: Vec<VmStatus>,
    /// Whether an operator said that it takes no VMs.
    pub cordoned: bool,
}

/// Everything that is known, by host.
#[derive(Debug, Default)]
pub struct Inventory {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    hosts: BTreeMap<HostId, HostEntry>,
    measured: BTreeMap<VmId, (UnixMs, VmMeasurement)>,
}

impl Inventory {
    /// The hosts of the configuration, none of which has been heard yet.
    #[must_use]
    pub fn new(hosts: &[HostId], cordoned: &BTreeSet<HostId>, now: UnixMs) -> Self {
        let entry = |host: &HostId| HostEntry {
            detail: "its agent has not answered yet".to_owned(),
            since: now,
            cordoned: cordoned.contains(host),
            ..HostEntry::default()
        };
        let hosts = hosts.iter().map(|host| (host.clone(), entry(host))).collect();
        Self { known: Mutex::new(Known { hosts, measured: BTreeMap::new() }) }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Nothing here panics with the lock held; should it ever, the data are still whole.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An agent has answered a poll. Returns whether it had been silent before.
    pub fn heard(
        &self,
        host: &HostId,
        description: HostDescription,
        vms: Vec<VmStatus>,
        now: UnixMs,
    ) -> bool {
        let mut known = self.lock();
        let Some(entry) = known.hosts.get_mut(host) else { return false };
        let was_silent = !entry.connected;
        if was_silent {
            entry.since = now;
        }
        entry.connected = true;
        entry.detail.clear();
        entry.description = Some(description);
        entry.vms = vms;
        was_silent
    }

    /// An agent has not answered. Returns whether it had been there before.
    pub fn silent(&self, host: &HostId, detail: String, now: UnixMs) -> bool {
        let mut known = self.lock();
        let Some(entry) = known.hosts.get_mut(host) else { return false };
        let was_there = entry.connected;
        if was_there {
            entry.since = now;
        }
        entry.connected = false;
        entry.detail = detail;
        was_there
    }

    /// A VM has been measured.
    pub fn measured(&self, vm: &VmId, measurement: VmMeasurement, now: UnixMs) {
        self.lock().measured.insert(vm.clone(), (now, measurement));
    }

    /// An operator has said whether a host takes VMs.
    pub fn set_cordoned(&self, host: &HostId, cordoned: bool) {
        if let Some(entry) = self.lock().hosts.get_mut(host) {
            entry.cordoned = cordoned;
        }
    }

    /// Every host with what is known of it.
    #[must_use]
    pub fn hosts(&self) -> BTreeMap<HostId, HostEntry> {
        self.lock().hosts.clone()
    }

    /// One host.
    #[must_use]
    pub fn host(&self, host: &HostId) -> Option<HostEntry> {
        self.lock().hosts.get(host).cloned()
    }

    /// The newest measurement of a VM and when it was taken.
    #[must_use]
    pub fn measurement(&self, vm: &VmId) -> Option<(UnixMs, VmMeasurement)> {
        self.lock().measured.get(vm).cloned()
    }

    /// Where a VM is, by the host that owns it: not one that has ceded it or only receives it. Where one
    /// host has not heard yet that it has left, the one where it runs counts.
    #[must_use]
    pub fn owner(&self, vm: &VmId) -> Option<(HostId, VmStatus)> {
        let known = self.lock();
        let found = known.hosts.iter().flat_map(|(host, entry)| {
            let here = entry.vms.iter().filter(|status| owns(status) && is(status, vm));
            here.map(|status| (host.clone(), status.clone()))
        });
        found
            .min_by_key(|(_, status)| !matches!(status.state(), VmState::Running | VmState::Paused))
    }
}

/// Whether a status is of this VM.
#[must_use]
pub fn is(status: &VmStatus, vm: &VmId) -> bool {
    name_of(status) == vm.as_str()
}

/// The name that an agent gives a VM; not checked.
#[must_use]
pub fn name_of(status: &VmStatus) -> &str {
    status.definition.as_ref().map_or("", |definition| definition.name.as_str())
}

/// Whether the host that says so is the one to move the VM from.
#[must_use]
pub fn owns(status: &VmStatus) -> bool {
    !matches!(
        status.state(),
        VmState::Ceded | VmState::Incoming | VmState::InDoubt | VmState::Unspecified
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evacuation::testing::{host, vm};
    use lifeboat_protocol::agent::VmDefinition;

    fn status(name: &str, state: VmState) -> VmStatus {
        let definition = Some(VmDefinition { name: name.to_owned(), ..VmDefinition::default() });
        VmStatus { definition, state: state.into(), ..VmStatus::default() }
    }

    #[test]
    fn a_vm_is_where_it_is_owned_and_not_where_it_was_or_will_be() {
        let inventory = Inventory::new(&[host("h1"), host("h2")], &BTreeSet::new(), UnixMs(0));
        let describe = HostDescription::default;
        inventory.heard(&host("h1"), describe(), vec![status("a", VmState::Ceded)], UnixMs(1));
        assert_eq!(inventory.owner(&vm("a")), None);
        inventory.heard(&host("h2"), describe(), vec![status("a", VmState::Running)], UnixMs(1));
        assert_eq!(inventory.owner(&vm("a")).map(|(at, _)| at), Some(host("h2")));
    }

    #[test]
    fn what_a_silent_agent_said_stays_and_is_marked() {
        let inventory = Inventory::new(&[host("h1")], &BTreeSet::new(), UnixMs(0));
        let said = vec![status("a", VmState::Running)];
        assert!(inventory.heard(&host("h1"), HostDescription::default(), said, UnixMs(1)));
        assert!(inventory.silent(&host("h1"), "refused".to_owned(), UnixMs(2)));
        let entry = inventory.host(&host("h1")).unwrap();
        assert_eq!((entry.connected, entry.vms.len(), entry.since), (false, 1, UnixMs(2)));
    }
}
