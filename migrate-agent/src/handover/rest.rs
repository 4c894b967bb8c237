//! What a destination must remember of a guest whose disks are not all here, beside the record of who
//! owns it. Written before LOADED; until it says that nothing is missing any more, the source is told to
//! stay, and the VM is not started from these disks.
//!
//! It stays then, and says to a source that has not heard so that the VM is well: also where its guest
//! has ended meanwhile, which without it would be a guest that died. The VM's next arrival takes it away.
//! Which blocks are missing is not in it: `disk::sync::kept` has that.

use std::path::PathBuf;

use lifeboat_protocol::ids::{HostId, MigrationId, VmId};
use serde::{Deserialize, Serialize};

use super::store::{Store, StoreError};

/// A guest that runs, or is about to, without all of its disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rest {
    /// The migration.
    pub migration: MigrationId,
    /// Who has the rest.
    pub source: HostId,
    /// Nothing of them is missing any more.
    #[serde(default)]
    pub whole: bool,
    /// The intermediary to which the source sends all of them meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<HostId>,
    /// It has all: the rest comes from there, and the source may go.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stored: bool,
}

impl Store {
    fn rest_path(&self, vm: &VmId) -> PathBuf {
        self.file(&format!("{vm}.rest"))
    }

    /// What is remembered of a VM whose disks are not all here; `None` where they are.
    ///
    /// # Errors
    /// When it is there and cannot be read or is damaged.
    pub fn rest(&self, vm: &VmId) -> Result<Option<Rest>, StoreError> {
        Ok(self.read_rest(vm)?.filter(|rest| !rest.whole))
    }

    /// Whether all of the VM's disks has come since by `migration`, which brought it here before them.
    ///
    /// # Errors
    /// As [`Self::rest`].
    pub fn has_rested(&self, vm: &VmId, migration: &MigrationId) -> Result<bool, StoreError> {
        let rest = self.read_rest(vm)?;
        Ok(rest.is_some_and(|rest| rest.whole && rest.migration == *migration))
    }

    fn read_rest(&self, vm: &VmId) -> Result<Option<Rest>, StoreError> {
        self.recall(self.rest_path(vm))
    }

    /// Remembers, durably.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn write_rest(&self, vm: &VmId, rest: &Rest) -> Result<(), StoreError> {
        self.remember(&self.rest_path(vm), &format!(".{vm}.rest.new"), rest)
    }

    /// The VM is not this host's, or arrives anew. No error where nothing was remembered.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn end_rest(&self, vm: &VmId) -> Result<(), StoreError> {
        self.forget(&self.rest_path(vm))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::Record;
    use lifeboat_protocol::ids::Generation;

    #[test]
    fn until_its_disks_are_all_here_the_source_stays() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let vm = VmId::new("web").unwrap();
        let (migration, source) = (MigrationId::new("m1").unwrap(), HostId::new("h1").unwrap());
        let (via, from) = (Some(migration.clone()), Some(source.clone()));
        let owner = Record::Owner { generation: Generation(2), via, from, resumed: true };
        store.write(&vm, &owner).unwrap();
        assert!(!store.wants_source(&vm));
        let (whole, stored, via) = (false, false, Some(HostId::new("h3").unwrap()));
        let rest = Rest { migration: migration.clone(), source, whole, store: via, stored };
        store.write_rest(&vm, &rest).unwrap();
        assert_eq!(store.rest(&vm).unwrap(), Some(rest.clone()));
        let elsewhere = Rest { stored: true, ..rest.clone() };
        store.write_rest(&vm, &elsewhere).unwrap();
        assert!(!store.wants_source(&vm) && store.rest(&vm).unwrap().is_some());
        store.write_rest(&vm, &rest).unwrap();
        assert_eq!(store.read_all().unwrap().len(), 1, "it is no record of ownership");
        assert!(store.wants_source(&vm) && !store.has_rested(&vm, &migration).unwrap());
        store.write_rest(&vm, &Rest { whole: true, ..rest }).unwrap();
        assert_eq!(store.rest(&vm).unwrap(), None);
        assert!(!store.wants_source(&vm) && store.has_rested(&vm, &migration).unwrap());
        let other = MigrationId::new("m2").unwrap();
        assert!(!store.has_rested(&vm, &other).unwrap());
        store.end_rest(&vm).unwrap();
        store.end_rest(&vm).unwrap();
        assert!(!store.wants_source(&vm) && !store.has_rested(&vm, &migration).unwrap());
    }
}
