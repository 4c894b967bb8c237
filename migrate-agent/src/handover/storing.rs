//! What a source must remember of a VM whose disks go on to an intermediary once it runs elsewhere
//! (`--disk scatter`): where that is, and what opens its door.
//!
//! Written before the VM may be handed over, so that an agent that starts again goes on with it; without it
//! the disks would stay until the destination has taken all of them from here. Not a record of ownership.

use std::path::PathBuf;

use lifeboat_protocol::ids::{HostId, MigrationId, VmId};
use lifeboat_protocol::units::BytesPerSec;
use serde::{Deserialize, Serialize};

use super::store::{Store, StoreError};

/// Where a VM's disks go on to.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Storing {
    /// The migration.
    pub migration: MigrationId,
    /// The intermediary.
    pub host: HostId,
    /// Its page listener.
    pub page_address: String,
    /// Its proof that the controller sent us.
    pub token: Vec<u8>,
    /// What may be sent to it; `None`: whatever the link takes.
    pub limit: Option<BytesPerSec>,
}

impl std::fmt::Debug for Storing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Storing({} at {})", self.host, self.page_address)
    }
}

impl Store {
    fn storing_path(&self, vm: &VmId) -> PathBuf {
        self.file(&format!("{vm}.storing"))
    }

    /// Where the VM's disks go on to; `None`: nowhere.
    ///
    /// # Errors
    /// When it is there and cannot be read or is damaged.
    pub fn storing(&self, vm: &VmId) -> Result<Option<Storing>, StoreError> {
        self.recall(self.storing_path(vm))
    }

    /// Remembers, durably. Its file is the agent's alone.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn write_storing(&self, vm: &VmId, storing: &Storing) -> Result<(), StoreError> {
        self.remember(&self.storing_path(vm), &format!(".{vm}.storing.new"), storing)
    }

    /// They are there, or stay. No error where nothing was remembered.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn end_storing(&self, vm: &VmId) -> Result<(), StoreError> {
        self.forget(&self.storing_path(vm))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn where_disks_go_on_to_is_remembered_and_its_secret_kept() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let vm = VmId::new("web").unwrap();
        let storing = Storing {
            migration: MigrationId::new("m1").unwrap(),
            host: HostId::new("h3").unwrap(),
            page_address: "192.0.2.3:7001".to_owned(),
            token: vec![171; 32],
            limit: Some(BytesPerSec(5)),
        };
        assert_eq!(store.storing(&vm).unwrap(), None);
        store.write_storing(&vm, &storing).unwrap();
        assert_eq!(store.storing(&vm).unwrap(), Some(storing.clone()));
        assert!(store.read_all().unwrap().is_empty(), "it is no record of ownership");
        assert!(!format!("{storing:?}").contains("171"), "the secret is printed");
        let mode = fs::metadata(directory.path().join("web.storing")).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0);
        store.end_storing(&vm).unwrap();
        store.end_storing(&vm).unwrap();
        assert_eq!(store.storing(&vm).unwrap(), None);
    }
}
