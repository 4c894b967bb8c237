//! Whether this host may start a VM: asked before every start, answered by the durable records.
//!
//! A host that has ceded a VM refuses, also after a reboot; it says who has it. The records and
//! the rules by which they change are `handover/`'s; this is only the question.

use lifeboat_protocol::ids::{Generation, HostId, MigrationId, VmId};

use crate::handover::Record;
use crate::handover::store::{Store, StoreError};

/// Why a VM may not be started here.
#[derive(Debug, thiserror::Error)]
pub enum OwnershipRefusal {
    /// Another host owns it.
    #[error(
        "VM `{vm}` may not be started here: this host ceded it to {owner} ({generation}) by migration `{migration}`; look there (`lifeboat vms {owner}`), and if {owner} is known to be off for good: `lifeboat claim {vm} --fenced`"
    )]
    Ceded {
        /// The VM.
        vm: VmId,
        /// Who owns it.
        owner: HostId,
        /// By which generation.
        generation: Generation,
        /// By which migration.
        migration: MigrationId,
    },
    /// A hand-over is not decided.
    #[error(
        "VM `{vm}` may not be started here: migration `{migration}` with {peer} is not settled; wait for it, or cancel it"
    )]
    Unsettled {
        /// The VM.
        vm: VmId,
        /// The other host.
        peer: HostId,
        /// The migration.
        migration: MigrationId,
    },
    /// It arrived here once and was given up.
    #[error(
        "VM `{vm}` may not be started here: it stayed with {owner} when migration `{migration}` was given up"
    )]
    Kept {
        /// The VM.
        vm: VmId,
        /// Who kept it.
        owner: HostId,
        /// The migration.
        migration: MigrationId,
    },
    /// It was handed over to this host, and its QEMU vanished before it was seen to run.
    #[error(
        "VM `{vm}` may not be started here: its QEMU vanished just as migration `{migration}` brought it, and {peer} may still hold the guest; resume it there with `lifeboat claim {vm} --fenced --host {peer}`, or give its memory up and claim it here"
    )]
    Vanished {
        /// The VM.
        vm: VmId,
        /// The host that it came from.
        peer: HostId,
        /// The migration.
        migration: MigrationId,
    },
    /// Its guest ran here before its disks were complete, and ended.
    #[error(
        "VM `{vm}` may not be started here: its disks are not all here; where they still come from {peer} (`lifeboat status`), start it when they are; otherwise resume the guest there as it was at the switchover with `lifeboat claim {vm} --fenced --host {peer}`"
    )]
    Incomplete {
        /// The VM.
        vm: VmId,
        /// The host that it came from.
        peer: HostId,
    },
    /// The same, and its source was rid of it before.
    #[error(
        "VM `{vm}` may not be started here: its disks are not all here; where they still come from {keeper} (`lifeboat status`), start it when they are; otherwise they are kept as of the switchover at {keeper} (`.store-` in their names), and for a while at {source_host} (`.left-`)"
    )]
    Elsewhere {
        /// The VM.
        vm: VmId,
        /// The intermediary that has them.
        keeper: HostId,
        /// The host that it came from.
        source_host: HostId,
    },
    /// The record cannot be read or written: nothing may be assumed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Answers whether a VM may be started on this host.
pub trait Ownership: Send + Sync {
    /// The generation by which this host owns the VM. A VM that this host has never had to do with
    /// is its own from now on.
    ///
    /// # Errors
    /// When it does not own the VM, or that cannot be known.
    fn may_start(&self, vm: &VmId) -> Result<Generation, OwnershipRefusal>;
}

impl Ownership for Store {
    fn may_start(&self, vm: &VmId) -> Result<Generation, OwnershipRefusal> {
        let vm = vm.clone();
        if let Some(rest) = self.rest(&vm)? {
            return Err(match rest.store.filter(|_| rest.stored) {
                Some(keeper) => {
                    OwnershipRefusal::Elsewhere { vm, keeper, source_host: rest.source }
                }
                None => OwnershipRefusal::Incomplete { vm, peer: rest.source },
            });
        }
        match self.read(&vm)? {
            None => {
                let generation = Generation(1);
                let owner = Record::Owner { generation, via: None, from: None, resumed: true };
                self.write(&vm, &owner)?;
                Ok(generation)
            }
            Some(Record::Owner {
                via: Some(migration), from: Some(peer), resumed: false, ..
            }) => Err(OwnershipRefusal::Vanished { vm, peer, migration }),
            Some(Record::Owner { generation, .. }) => Ok(generation),
            Some(Record::Ceded { destination: owner, generation, migration, .. }) => {
                Err(OwnershipRefusal::Ceded { vm, owner, generation, migration })
            }
            Some(
                Record::Sending { migration, destination: peer, .. }
                | Record::Loaded { migration, source: peer, .. },
            ) => Err(OwnershipRefusal::Unsettled { vm, peer, migration }),
            Some(Record::Refused { migration, source: owner, .. }) => {
                Err(OwnershipRefusal::Kept { vm, owner, migration })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::rest::Rest;

    #[test]
    fn a_vm_is_not_started_from_disks_that_are_not_all_here() {
        let directory = tempfile::tempdir().unwrap();
        let (vm, source) = (VmId::new("web").unwrap(), HostId::new("h1").unwrap());
        let store = Store::open(directory.path()).unwrap();
        let migration = MigrationId::new("m1").unwrap();
        let (whole, store_host, stored) = (false, None, false);
        let rest = Rest { migration, source, whole, store: store_host, stored };
        store.write_rest(&vm, &rest).unwrap();
        let said = store.may_start(&vm).unwrap_err().to_string();
        assert!(said.contains("its disks are not all here") && said.contains("h1"), "{said}");
        let keeper = Some(HostId::new("h3").unwrap());
        let stored = Rest { store: keeper, stored: true, ..rest.clone() };
        store.write_rest(&vm, &stored).unwrap();
        let said = store.may_start(&vm).unwrap_err().to_string();
        assert!(said.contains("kept as of the switchover at h3") && said.contains("h1"), "{said}");
        store.write_rest(&vm, &Rest { whole: true, ..rest }).unwrap();
        assert!(store.may_start(&vm).is_ok());
    }

    #[test]
    fn a_ceded_vm_is_refused_with_the_name_of_its_owner_also_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let vm = VmId::new("web").unwrap();
        let store = Store::open(directory.path()).unwrap();
        assert_eq!(store.may_start(&vm).unwrap(), Generation(1));
        assert_eq!(store.may_start(&vm).unwrap(), Generation(1));
        let ceded = Record::Ceded {
            generation: Generation(2),
            migration: MigrationId::new("m1").unwrap(),
            destination: HostId::new("h2").unwrap(),
            page_address: "10.0.0.2:7001".to_owned(),
            confirmed: true,
        };
        store.write(&vm, &ceded).unwrap();
        let reopened = Store::open(directory.path()).unwrap();
        let error = reopened.may_start(&vm).unwrap_err().to_string();
        assert!(error.contains("ceded it to h2 (g2)") && error.contains("--fenced"), "{error}");
    }
}
