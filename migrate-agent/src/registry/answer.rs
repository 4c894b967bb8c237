//! How a VM stands on this host, in words for people and states for the controller; and claims.

use lifeboat_protocol::agent::{Phase, VmState};
use lifeboat_protocol::ids::{Generation, MigrationId, VmId};
use tokio::sync::oneshot;

use super::{Registry, RegistryError, Task};
use crate::destination;
use crate::handover::Record;
use crate::handover::store::StoreError;
use crate::source;

/// How a VM stands on this host by its ownership record; QEMU's own state refines it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmStanding {
    /// The state that the record gives; `None`: the guest's own state counts.
    pub state: Option<VmState>,
    /// The generation of the record.
    pub generation: Generation,
    /// The migration that it speaks of.
    pub migration: Option<String>,
    /// The host at the other end of it.
    pub peer: Option<String>,
    /// For a person.
    pub detail: String,
}

impl Registry {
    /// How a VM stands here; `None` where this host has no record of it.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub fn standing(&self, vm: &VmId) -> Result<Option<VmStanding>, StoreError> {
        let Some(record) = self.context.store.read(vm)? else {
            return Ok(self.arriving(vm));
        };
        if matches!(record, Record::Refused { .. } | Record::Ceded { confirmed: true, .. })
            && let Some(arriving) = self.arriving(vm)
        {
            return Ok(Some(arriving));
        }
        let (state, migration, peer) = match &record {
            Record::Owner { .. } => (None, None, None),
            Record::Sending { migration, destination, .. } => {
                (Some(VmState::Sending), Some(migration), Some(destination))
            }
            Record::Ceded { migration, destination, confirmed, .. } => {
                let state = match *confirmed || self.serves(migration) {
                    true => VmState::Ceded,
                    false => VmState::Uncertain,
                };
                (Some(state), Some(migration), Some(destination))
            }
            Record::Loaded { migration, source, .. } => {
                (Some(VmState::InDoubt), Some(migration), Some(source))
            }
            Record::Refused { migration, source, .. } => {
                (Some(VmState::Ceded), Some(migration), Some(source))
            }
        };
        Ok(Some(VmStanding {
            state,
            generation: record.generation(),
            migration: migration.map(ToString::to_string),
            peer: peer.map(ToString::to_string),
            detail: match (&record, state) {
                (Record::Ceded { destination, confirmed: false, .. }, Some(VmState::Ceded)) => {
                    format!(
                        "{destination} runs it, and still wants pages of its memory, or blocks of its disks, that are here"
                    )
                }
                _ => words(&record),
            },
        }))
    }

    /// Whether the migration's guest is known to run elsewhere, and its pages are here. Of a destination that is
    /// silent nobody knows.
    fn serves(&self, migration: &MigrationId) -> bool {
        let entries = self.entries();
        entries.by_id.get(migration).is_some_and(|entry| {
            entry.is_open()
                && entry.progress.borrow().silent_ms == 0
                && matches!(entry.phase(), Phase::PostCopy | Phase::Gather | Phase::DiskRest)
        })
    }

    /// A VM that is being received and about which nothing is promised yet.
    fn arriving(&self, vm: &VmId) -> Option<VmStanding> {
        let entries = self.entries();
        let (migration, entry) =
            entries.by_id.iter().find(|(_, entry)| entry.vm == *vm && entry.is_open())?;
        let Task::Destination { generation, .. } = &entry.task else { return None };
        let source = entry.progress.borrow().source_host.clone();
        Some(VmStanding {
            state: Some(VmState::Incoming),
            generation: *generation,
            migration: Some(migration.to_string()),
            detail: format!("being received from {source}; it runs there"),
            peer: Some(source),
        })
    }

    /// Ends `uncertain` (or in doubt) by an operator's word that the other side is fenced off.
    ///
    /// # Errors
    /// When nothing is uncertain about the VM here, or the word was not given.
    pub async fn claim(&self, vm: &VmId, fenced: bool) -> Result<(), RegistryError> {
        if !fenced {
            return Err(RegistryError::NotClaimable {
                vm: vm.clone(),
                why: "a claim needs --fenced: your word that the other host cannot run it",
            });
        }
        let not_open = || RegistryError::NotClaimable {
            vm: vm.clone(),
            why: "its ownership is not uncertain on this host",
        };
        if self.claim_vanished(vm)? {
            return Ok(());
        }
        let (answer, answered) = oneshot::channel();
        {
            let entries = self.entries();
            let mut open = entries.by_id.values().filter(|entry| {
                entry.vm == *vm
                    && (entry.is_open() || entry.phase() == lifeboat_protocol::agent::Phase::Lost)
            });
            let entry = open.next().ok_or_else(not_open)?;
            let taken = match &entry.task {
                Task::Source(inputs) => inputs.try_send(source::Input::Claim(answer)).is_ok(),
                Task::Destination { inputs, .. } => {
                    inputs.try_send(destination::Input::Claim(answer)).is_ok()
                }
            };
            if !taken {
                return Err(not_open());
            }
        }
        if answered.await.unwrap_or(false) { Ok(()) } else { Err(not_open()) }
    }
}

impl Registry {
    /// A VM that vanished here before it was seen to run: claimed, it is this host's, and down.
    fn claim_vanished(&self, vm: &VmId) -> Result<bool, RegistryError> {
        let store = &self.context.store;
        match store.read(vm)? {
            Some(Record::Owner { generation, via: Some(_), resumed: false, .. })
                if self.open_migration_of(vm).is_none() && !self.context.guests.lives(vm) =>
            {
                let record = Record::Owner { generation, via: None, from: None, resumed: true };
                store.write(vm, &record)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

/// What a record says, for a person: who has the VM, and what to do.
#[must_use]
pub(super) fn words(record: &Record) -> String {
    match record {
        Record::Owner { generation, .. } => format!("owned by this host ({generation})"),
        Record::Sending { destination, migration, .. } => {
            format!("being sent to {destination} by migration `{migration}`")
        }
        Record::Ceded { destination, generation, confirmed: true, .. } => {
            format!("ceded: {destination} owns it ({generation}), and this host may not start it")
        }
        Record::Ceded { destination, generation, .. } => format!(
            "uncertain: ceded to {destination} ({generation}), which has not said that it runs; this host goes on \
             asking. If {destination} is known to be off or fenced: `lifeboat claim VM --fenced`"
        ),
        Record::Loaded { source, generation, .. } => format!(
            "in doubt: loaded here ({generation}) and paused; {source} has not said whether it ceded. If {source} is \
             known to be off or fenced: `lifeboat claim VM --fenced`"
        ),
        Record::Refused { source, migration, .. } => {
            format!("migration `{migration}` was given up before COMMIT; {source} kept it")
        }
    }
}
