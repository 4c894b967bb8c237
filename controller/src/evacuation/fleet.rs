//! All evacuations side by side: what one may not do because of another.
//!
//! Pure. Used by `service` when a command comes in, and by the planner for what is promised already.

use std::collections::{BTreeMap, BTreeSet};

use lifeboat_protocol::ids::{EvacuationId, HostId, MigrationId, VmId};

use super::elsewhere::DONE_WITH;
use super::machine::Evacuation;
use super::order::EvacuationOrder;
use super::vm::{Leg, VmPhase};

/// Why an order is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdmissionError {
    /// A host named twice in one order.
    #[error("host {host} is named twice; name each host once")]
    NamedTwice {
        /// The host.
        host: HostId,
    },
    /// The host is being emptied already.
    #[error(
        "host {host} is already being evacuated by {by}; see `lifeboat status {by}`, or `lifeboat cancel {by}` first"
    )]
    AlreadyLeaving {
        /// The host.
        host: HostId,
        /// The evacuation that has it.
        by: EvacuationId,
    },
    /// The VM is in another evacuation's hands.
    #[error(
        "VM {vm} is already part of {by}; see `lifeboat status {by}`, or `lifeboat cancel {by}` first"
    )]
    AlreadyMoving {
        /// The VM.
        vm: VmId,
        /// The evacuation that has it.
        by: EvacuationId,
    },
    /// A destination that is being emptied.
    #[error("host {host} cannot take VMs: it is being evacuated by {by}; leave it out of --to")]
    DestinationLeaving {
        /// The host.
        host: HostId,
        /// The evacuation that empties it.
        by: EvacuationId,
    },
    /// A destination that the order itself empties.
    #[error(
        "host {host} is to be evacuated and named as a destination; name another host with --to"
    )]
    ToItself {
        /// The host.
        host: HostId,
    },
}

/// Every evacuation that the controller remembers, by id.
#[derive(Debug, Clone, Default)]
pub struct Fleet {
    evacuations: BTreeMap<EvacuationId, Evacuation>,
}

impl Fleet {
    /// The evacuations that were in the journal.
    #[must_use]
    pub fn new(evacuations: Vec<Evacuation>) -> Self {
        Self { evacuations: evacuations.into_iter().map(|e| (e.id.clone(), e)).collect() }
    }

    /// Whether an order may become an evacuation beside the ones that run.
    ///
    /// # Errors
    /// The first thing that stands in the way.
    pub fn admit(&self, order: &EvacuationOrder) -> Result<(), AdmissionError> {
        let mut seen = BTreeSet::new();
        for host in &order.hosts {
            if !seen.insert(host) {
                return Err(AdmissionError::NamedTwice { host: host.clone() });
            }
            if let Some(by) = self.leaving(host) {
                return Err(AdmissionError::AlreadyLeaving { host: host.clone(), by: by.clone() });
            }
            if order.to.contains(host) {
                return Err(AdmissionError::ToItself { host: host.clone() });
            }
        }
        for host in &order.to {
            if let Some(by) = self.leaving(host) {
                let (host, by) = (host.clone(), by.clone());
                return Err(AdmissionError::DestinationLeaving { host, by });
            }
        }
        match order.vms.iter().find_map(|vm| Some((vm, self.moving(vm)?))) {
            Some((vm, by)) => Err(AdmissionError::AlreadyMoving { vm: vm.clone(), by: by.clone() }),
            None => Ok(()),
        }
    }

    /// The unfinished evacuation that empties a host.
    #[must_use]
    pub fn leaving(&self, host: &HostId) -> Option<&EvacuationId> {
        let empties = |e: &&Evacuation| e.order.empties_hosts() && e.order.hosts.contains(host);
        self.unfinished().find(empties).map(|e| &e.id)
    }

    /// The unfinished evacuation that has not let go of a VM.
    #[must_use]
    pub fn moving(&self, vm: &VmId) -> Option<&EvacuationId> {
        let holds = |e: &&Evacuation| e.record(vm).is_some_and(|record| !record.phase.is_final());
        self.unfinished().find(holds).map(|e| &e.id)
    }

    /// What a new controller goes on with: the unfinished ones, and those that owe stores.
    pub fn to_take_up(&self) -> impl Iterator<Item = &Evacuation> {
        let open = |e: &&Evacuation| !e.state.is_final() || !e.stores_owed().is_empty();
        self.evacuations.values().filter(open)
    }

    /// Where VMs are on their way to, over all evacuations.
    #[must_use]
    pub fn arrivals(&self) -> Vec<(VmId, HostId)> {
        let live = self.unfinished().flat_map(Evacuation::live);
        live.map(|(record, leg)| (record.vm.clone(), leg.destination.clone())).collect()
    }

    /// The migrations whose reservations are still wanted.
    #[must_use]
    pub fn live_migrations(&self) -> Vec<MigrationId> {
        let live = self.unfinished().flat_map(Evacuation::live);
        let names = |leg: &Leg| leg.store_ways().into_iter().chain([leg.migration.clone()]);
        let live = live.flat_map(|(_, leg)| names(leg).collect::<Vec<_>>());
        // From before a migration sends until its destination has gathered.
        let all = self.to_take_up().flat_map(|evacuation| &evacuation.vms);
        let gathered = all.filter(|record| !DONE_WITH.contains(&record.phase));
        let gathered = gathered.filter_map(|record| record.leg.as_ref()).flat_map(Leg::gather_ways);
        live.chain(gathered).collect()
    }

    /// The evacuation whose order carried this operation id.
    #[must_use]
    pub fn by_operation(&self, operation: &str) -> Option<&Evacuation> {
        let same = |e: &&Evacuation| !operation.is_empty() && e.order.operation == operation;
        self.evacuations.values().find(same)
    }

    /// Those that are not over.
    pub fn unfinished(&self) -> impl Iterator<Item = &Evacuation> {
        self.evacuations.values().filter(|e| !e.state.is_final())
    }

    /// Whether it is not known, or about to be found out, where a VM runs.
    #[must_use]
    pub fn has_lost_sight_of(&self, vm: &VmId) -> bool {
        let doubtful = [VmPhase::Committing, VmPhase::Settling, VmPhase::Uncertain];
        let all = self.evacuations.values().flat_map(|e| &e.vms);
        all.filter(|record| record.vm == *vm).any(|record| doubtful.contains(&record.phase))
    }

    /// All of them, oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<&Evacuation> {
        let mut all: Vec<&Evacuation> = self.evacuations.values().collect();
        all.sort_by(|a, b| (a.started, &a.id).cmp(&(b.started, &b.id)));
        all
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, id: &EvacuationId) -> Option<&Evacuation> {
        self.evacuations.get(id)
    }

    /// One of them, to apply an event to.
    pub fn get_mut(&mut self, id: &EvacuationId) -> Option<&mut Evacuation> {
        self.evacuations.get_mut(id)
    }

    /// The evacuation that began a migration.
    #[must_use]
    pub fn of_migration(&self, migration: &MigrationId) -> Option<&EvacuationId> {
        let has = |e: &&Evacuation| {
            e.vms.iter().any(|r| r.leg.as_ref().is_some_and(|leg| leg.migration == *migration))
        };
        self.evacuations.values().find(has).map(|e| &e.id)
    }

    /// Adds or replaces one.
    pub fn insert(&mut self, evacuation: Evacuation) {
        self.evacuations.insert(evacuation.id.clone(), evacuation);
    }
}
