//! What is left of a scattered VM once its source is rid of it: a destination that gathers, and
//! stores that have to go.
//!
//! Stores are owed from before they are opened until their hosts have said that they are gone; that
//! is in the journal, so that no crash leaves memory set aside for ever. They are never released
//! while they may hold the only copy: neither during a leg, nor while its destination gathers, nor
//! while it is uncertain where the VM is.

use lifeboat_protocol::agent::MigrationProgress;
use lifeboat_protocol::ids::{HostId, MigrationId};
use serde::{Deserialize, Serialize};

use super::event::{Action, Change};
use super::machine::Evacuation;
use super::progress::gathered_share;
use super::vm::{Leg, VmPhase, VmRecord};
use crate::clock::UnixMs;

/// Stores of one migration that have to be released.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoresOwed {
    /// Whose.
    pub migration: MigrationId,
    /// Where they are, or may be.
    pub hosts: Vec<HostId>,
    /// Since when this controller is at it.
    #[serde(skip)]
    asked: Option<UnixMs>,
}

impl StoresOwed {
    pub(super) fn by(leg: &Leg) -> Option<Self> {
        let hosts = leg.store_hosts();
        let owed = Self { migration: leg.migration.clone(), hosts, asked: None };
        (!owed.hosts.is_empty()).then_some(owed)
    }
}

/// Phases in which the stores of the last leg hold nothing that anybody needs.
pub(super) const DONE_WITH: [VmPhase; 5] =
    [VmPhase::Waiting, VmPhase::Measuring, VmPhase::Moved, VmPhase::LeftBehind, VmPhase::Lost];

impl Evacuation {
    /// Stores that are not known to have gone.
    #[must_use]
    pub fn stores_owed(&self) -> &[StoresOwed] {
        &self.stores_owed
    }

    /// Has gatherings followed that nobody follows, and stores released that nobody needs.
    pub(super) fn see_to_stores(&mut self, now: UnixMs, actions: &mut Vec<Action>) {
        for record in self.vms.iter_mut().filter(|record| record.phase == VmPhase::Gathering) {
            let vm = record.vm.clone();
            let Some(leg) = record.leg.as_mut().filter(|leg| !leg.followed) else { continue };
            leg.followed = true;
            let (migration, destination) = (leg.migration.clone(), leg.destination.clone());
            actions.push(Action::Gather { migration, vm, destination });
        }
        let vms = &self.vms;
        // What is left of a lost VM's disks may be nowhere else.
        let last_copy = |vm: &VmRecord| {
            vm.phase == VmPhase::Lost && vm.leg.as_ref().is_some_and(|leg| leg.disk_store.is_some())
        };
        let needed = |migration: &MigrationId| {
            let mut of = vms.iter().filter(|vm| vm.has_leg(migration));
            of.any(|vm| !DONE_WITH.contains(&vm.phase) || last_copy(vm))
        };
        for owed in self.stores_owed.iter_mut().filter(|owed| owed.asked.is_none()) {
            if !needed(&owed.migration) {
                owed.asked = Some(now);
                let (migration, hosts) = (owed.migration.clone(), owed.hosts.clone());
                actions.push(Action::ReleaseStores { migration, hosts });
            }
        }
    }

    /// A new controller follows and releases anew. Whether there is anything.
    pub(super) fn ask_again(&mut self) -> bool {
        for leg in self.vms.iter_mut().filter_map(|record| record.leg.as_mut()) {
            leg.followed = false;
        }
        for owed in &mut self.stores_owed {
            owed.asked = None;
        }
        !self.stores_owed.is_empty()
    }

    /// Whether stores hold memory now that will be free again: a destination gathers from them, or
    /// their hosts have been told that they may go. One that has not answered for long is not
    /// waited for.
    pub(super) fn stores_will_go(&self, now: UnixMs) -> bool {
        let gathers = self.vms.iter().any(|record| record.phase == VmPhase::Gathering);
        let patience = self.limits.stores_ms;
        let goes = |owed: &StoresOwed| owed.asked.is_some_and(|at| now.since(at) < patience);
        gathers || self.stores_owed.iter().any(goes)
    }

    pub(super) fn gathering(&mut self, said: &MigrationProgress) -> Change {
        let Ok(migration) = MigrationId::new(said.migration.clone()) else {
            return Change::Nothing;
        };
        let Some(record) = self.at(&migration, &[VmPhase::Gathering]) else {
            return Change::Nothing;
        };
        record.done = gathered_share(said).max(record.done);
        let progress = record.progress.get_or_insert_default();
        progress.pages_total = said.pages_total.max(progress.pages_total);
        progress.pages_arrived = said.pages_arrived;
        progress.faults_served = said.faults_served;
        progress.disk_bytes_left = said.disk_bytes_left;
        progress.disk_bytes_sent = said.disk_bytes_sent;
        progress.disk_bytes_per_sec = said.disk_bytes_per_sec;
        progress.rate_bits_per_sec = said.rate_bits_per_sec;
        record.reason.clone_from(&said.reason);
        if progress.resume_unix_us == 0 {
            progress.resume_unix_us = said.resume_unix_us;
        }
        Change::Progress
    }

    pub(super) fn gathered(
        &mut self,
        now: UnixMs,
        migration: &MigrationId,
        lost: Option<String>,
    ) -> Change {
        let Some(record) = self.at(migration, &[VmPhase::Gathering]) else {
            return Change::Nothing;
        };
        let began = record.leg.as_ref().map_or(now, |leg| leg.started);
        if let Some(progress) = record.progress.as_mut() {
            // The source's own figure ends when the source is rid of it.
            progress.total_ms = now.since(began).max(progress.total_ms);
            if lost.is_none() {
                progress.pages_arrived = progress.pages_total;
                progress.disk_bytes_left = 0;
            }
        }
        let store = record.leg.as_ref().and_then(|leg| leg.disk_store.as_ref());
        let kept = store.map(|store| {
            format!(
                "; its disks as of the switchover are kept at {} (`.store-` in their names), until somebody deletes them",
                store.host
            )
        });
        (record.phase, record.reason) = match lost {
            Some(reason) => (VmPhase::Lost, reason + &kept.unwrap_or_default()),
            None => (VmPhase::Moved, String::new()),
        };
        if record.phase == VmPhase::Moved {
            record.done = 1.0;
        }
        Change::State
    }

    pub(super) fn stores_released(&mut self, migration: &MigrationId) -> Change {
        let before = self.stores_owed.len();
        self.stores_owed.retain(|owed| owed.migration != *migration);
        if self.stores_owed.len() == before {
            return Change::Nothing;
        }
        self.look_again();
        Change::State
    }
}
