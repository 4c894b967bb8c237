//! What the service tells about the host and its VMs: records and processes joined.
//!
//! The ownership record has the first word about a VM (a ceded one is `ceded`, whatever QEMU may
//! still be there); where it says that the VM is this host's, its QEMU has the second.

use std::collections::BTreeSet;

use lifeboat_protocol::agent::{
    ForeignVm, HostDescription, Mode, VmDefinition, VmReply, VmState, VmStatus,
};
use lifeboat_protocol::ids::VmId;
use lifeboat_protocol::terms;
use tonic::Status;

use super::{Service, status};
use crate::handover::Record;
use crate::host::userfault;
use crate::qemu::foreign;
use crate::qemu::qmp::RunState;
use crate::registry::VmStanding;
use crate::vms::{Doing, VmView, chain, host_files};

/// The modes that this agent can carry out at either end.
const MODES: [terms::Mode; 4] =
    [terms::Mode::PreCopy, terms::Mode::PostCopy, terms::Mode::ScatterGather, terms::Mode::Cold];

impl Service {
    pub(super) async fn description(&self) -> HostDescription {
        let rooms = &self.rooms;
        let settings = rooms.vms.settings();
        let ours: Vec<u32> = rooms.vms.list().iter().filter_map(|view| view.pid).collect();
        let bridges = self.watch.bridges(&settings.ovs).await;
        let facts = &rooms.facts;
        let qemu = facts.qemu.clone().unwrap_or_default();
        let stores = self.stores();
        let version = qemu.version.clone();
        HostDescription {
            host: rooms.host.to_string(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            qemu_version: qemu.version,
            accelerator: settings.accelerator.as_str().to_owned(),
            machine_types: qemu.machine_types,
            cpu_models: qemu.cpu_models,
            cpu_flags: facts.cpu_flags.clone(),
            devices: qemu.devices,
            memory_total_bytes: settings.memory.0,
            memory_free_bytes: rooms.vms.memory_free().0,
            bridges,
            roles: rooms.roles.iter().map(|role| role.as_str().to_owned()).collect(),
            profiles: host_files::profiles(&settings.profiles_dir),
            page_address: rooms.page_address.clone(),
            highest_term: rooms.terms.highest().0,
            boot_id: facts.boot_id.clone(),
            foreign_vms: foreign_vms(&ours),
            cpu_cores: facts.cpu_cores.into(),
            cpu_load: self.watch.cpu_load(),
            modes: MODES.iter().map(|mode| Mode::from(*mode).into()).collect(),
            stores: stores.kept,
            store_memory_free_bytes: stores.free,
            store_obstacle: stores.obstacle,
            post_copy_obstacle: userfault::obstacle(settings.user, &version).unwrap_or_default(),
            disk_rooms: rooms.registry.disk_rooms(),
            seeds: rooms.registry.kept_seeds(),
            disk_stores: rooms.registry.kept_disks(),
        }
    }

    pub(super) fn statuses(&self) -> Result<Vec<VmStatus>, Status> {
        let views = self.rooms.vms.list();
        let mut names: BTreeSet<VmId> =
            views.iter().map(|view| view.definition.name.clone()).collect();
        // A ceded VM whose definition went with it is still to be told about; one that only ever
        // knocked is not.
        let records = self.rooms.store.read_all();
        let records = records.map_err(|error| Status::internal(chain(&error)))?.into_iter();
        let kept = records.filter(|(_, record)| !matches!(record, Record::Refused { .. }));
        names.extend(kept.map(|(vm, _)| vm));
        names.iter().map(|vm| self.status_of(vm)).collect()
    }

    pub(super) fn reply(&self, vm: &VmId) -> Result<VmReply, Status> {
        Ok(VmReply { status: Some(self.status_of(vm)?) })
    }

    fn status_of(&self, vm: &VmId) -> Result<VmStatus, Status> {
        let standing = self.rooms.registry.standing(vm);
        let standing = standing.map_err(|error| Status::internal(chain(&error)))?;
        match (self.rooms.vms.view(vm), standing) {
            (Ok(view), standing) => {
                let mut status = joined(&view, standing);
                let obstacle = self.rooms.vms.post_copy_obstacle(&view.definition);
                status.post_copy_obstacle = obstacle.unwrap_or_default();
                Ok(status)
            }
            (Err(_), Some(standing)) => Ok(recorded(vm, standing)),
            (Err(error), None) => Err(status::of_vm(&error)),
        }
    }

    pub(super) fn must_not_move(&self, vm: &VmId) -> Result<(), Status> {
        match self.rooms.registry.open_migration_of(vm) {
            None => Ok(()),
            Some(migration) => Err(Status::failed_precondition(format!(
                "VM `{vm}` is in migration `{migration}`; wait for it, or cancel it first"
            ))),
        }
    }
}

/// QEMUs of this host that others manage.
fn foreign_vms(ours: &[u32]) -> Vec<ForeignVm> {
    let describe = |foreign: foreign::Foreign| ForeignVm {
        name: foreign.name,
        owner: foreign.owner.to_owned(),
        pid: foreign.pid,
    };
    foreign::find(ours).into_iter().map(describe).collect()
}

/// A VM of which there is only the record.
fn recorded(vm: &VmId, standing: VmStanding) -> VmStatus {
    VmStatus {
        definition: Some(VmDefinition { name: vm.to_string(), ..VmDefinition::default() }),
        state: standing.state.unwrap_or(VmState::Stopped).into(),
        generation: standing.generation.0,
        migration: standing.migration.unwrap_or_default(),
        peer_host: standing.peer.unwrap_or_default(),
        detail: standing.detail,
        ..VmStatus::default()
    }
}

fn joined(view: &VmView, standing: Option<VmStanding>) -> VmStatus {
    let (own_state, own_detail) = state_of(view.doing);
    let definition = VmDefinition::from(&view.definition);
    let (state, detail) = match &standing {
        Some(VmStanding { state: Some(state), detail, .. }) => (*state, detail.clone()),
        _ => (own_state, own_detail.to_owned()),
    };
    VmStatus {
        nic_macs: view.definition.nics.iter().map(|nic| nic.mac.clone()).collect(),
        definition: Some(definition),
        state: state.into(),
        generation: standing.as_ref().map_or(0, |standing| standing.generation.0),
        qemu_pid: view.pid.unwrap_or(0),
        migration: standing.as_ref().and_then(|s| s.migration.clone()).unwrap_or_default(),
        peer_host: standing.and_then(|s| s.peer).unwrap_or_default(),
        detail,
        qemu_version: view.qemu_version.clone(),
        post_copy_obstacle: String::new(),
    }
}

fn state_of(doing: Doing) -> (VmState, &'static str) {
    match doing {
        Doing::Stopped => (VmState::Stopped, ""),
        Doing::Crashed => (
            VmState::Crashed,
            "its QEMU has gone without being asked; look at its host's log, then start it again",
        ),
        Doing::Runs(None) => {
            (VmState::Running, "its monitor does not answer; the guest may be stuck on a disk")
        }
        Doing::Runs(Some(RunState::Running)) => (VmState::Running, ""),
        Doing::Runs(Some(RunState::Shutdown)) => {
            (VmState::Stopped, "the guest has powered itself off; stop the VM to end its QEMU")
        }
        Doing::Runs(Some(RunState::GuestPanicked)) => {
            (VmState::Paused, "the guest's kernel has panicked")
        }
        Doing::Runs(Some(RunState::IoError)) => {
            (VmState::Paused, "a disk error has paused the guest")
        }
        Doing::Runs(Some(_)) => (VmState::Paused, "paused"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_powered_itself_off_is_not_running() {
        assert_eq!(state_of(Doing::Runs(Some(RunState::Shutdown))).0, VmState::Stopped);
        assert_eq!(state_of(Doing::Runs(Some(RunState::Prelaunch))).0, VmState::Paused);
        assert_eq!(state_of(Doing::Crashed).0, VmState::Crashed);
    }
}
