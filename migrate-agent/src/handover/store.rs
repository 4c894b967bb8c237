//! The ownership records on this host's disk: one file per VM, replaced as a whole.
//!
//! A record is durable when [`Store::write`] returns: the new file is fsynced, renamed over the
//! old one, and the directory is fsynced, so that a power cut leaves either the old record or the
//! new one. A record that cannot be read is an error and never "no record": a host that does not
//! know whether it has ceded a VM must not start it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use lifeboat_protocol::ids::VmId;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Record;

/// Why a record could not be read or made durable.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk said no.
    #[error("ownership record {}: cannot {doing}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done to it.
        doing: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file holds no record.
    #[error(
        "ownership record {} is damaged; the VM stays down until it is known which host owns it (then: lifeboat claim)",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

/// The records' directory.
#[derive(Debug, Clone)]
pub struct Store {
    directory: PathBuf,
}

impl Store {
    /// Opens the directory, making it when it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let directory = directory.into();
        fs::create_dir_all(&directory).map_err(|source| StoreError::Io {
            path: directory.clone(),
            doing: "make the directory",
            source,
        })?;
        Ok(Self { directory })
    }

    /// The record of one VM; `None` when this host has never had to do with it.
    ///
    /// # Errors
    /// When it is there but cannot be read or is damaged.
    pub fn read(&self, vm: &VmId) -> Result<Option<Record>, StoreError> {
        let path = self.path(vm);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|source| StoreError::Damaged { path, source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StoreError::Io { path, doing: "read", source }),
        }
    }

    /// Every record, by VM.
    ///
    /// # Errors
    /// As [`Store::read`], for the first that fails.
    pub fn read_all(&self) -> Result<BTreeMap<VmId, Record>, StoreError> {
        let io = |doing| {
            let path = self.directory.clone();
            move |source| StoreError::Io { path, doing, source }
        };
        let mut records = BTreeMap::new();
        for entry in fs::read_dir(&self.directory).map_err(io("list"))? {
            let name = entry.map_err(io("list"))?.file_name();
            let stem = name.to_str().and_then(|name| name.strip_suffix(".json"));
            let Some(vm) = stem.and_then(|stem| VmId::new(stem).ok()) else { continue };
            if let Some(record) = self.read(&vm)? {
                records.insert(vm, record);
            }
        }
        Ok(records)
    }

    /// Makes `record` the VM's record, durably.
    ///
    /// # Errors
    /// When the disk does; the old record is then still the one in force.
    pub fn write(&self, vm: &VmId, record: &Record) -> Result<(), StoreError> {
        let path = self.path(vm);
        let bytes = serde_json::to_vec_pretty(record)
            .map_err(|source| StoreError::Damaged { path: path.clone(), source })?;
        self.replace(&path, &format!(".{vm}.new"), &bytes)
    }

    /// What a file beside the records says; `None` where it is not there.
    pub(super) fn recall<T: DeserializeOwned>(
        &self,
        path: PathBuf,
    ) -> Result<Option<T>, StoreError> {
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|source| StoreError::Damaged { path, source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StoreError::Io { path, doing: "look into", source }),
        }
    }

    /// Takes such a file away, durably. No error where there is none.
    pub(super) fn forget(&self, path: &Path) -> Result<(), StoreError> {
        let failed = |source| StoreError::Io { path: path.to_owned(), doing: "take away", source };
        match fs::remove_file(path) {
            Ok(()) => self.sync().map_err(failed),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(failed(source)),
        }
    }

    /// Writes such a file, durably.
    pub(super) fn remember<T: Serialize>(
        &self,
        path: &Path,
        temporary: &str,
        value: &T,
    ) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(value)
            .map_err(|source| StoreError::Damaged { path: path.to_owned(), source })?;
        self.replace(path, temporary, &bytes)
    }

    /// Puts `bytes` in the place of `path` in one step, by way of a file called `temporary`. Both
    /// can be read by the agent's user only.
    pub(super) fn replace(
        &self,
        path: &Path,
        temporary: &str,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        let temporary = self.directory.join(temporary);
        let io = |doing| move |source| StoreError::Io { path: path.to_owned(), doing, source };
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(io("create"))?;
        file.write_all(bytes).map_err(io("write"))?;
        file.sync_data().map_err(io("fsync"))?;
        fs::rename(&temporary, path).map_err(io("rename"))?;
        self.sync().map_err(io("fsync the directory of"))
    }

    /// Makes what was renamed or removed durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }

    /// A file of the directory.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn path(&self, vm: &VmId) -> PathBuf {
        self.directory.join(format!("{vm}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat_protocol::ids::Generation;

    fn vm() -> VmId {
        VmId::new("web").unwrap()
    }

    fn owner(generation: u64) -> Record {
        Record::Owner { generation: Generation(generation), via: None, from: None, resumed: true }
    }

    #[test]
    fn what_was_written_is_read_and_the_last_one_holds() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        assert_eq!(store.read(&vm()).unwrap(), None);
        store.write(&vm(), &owner(1)).unwrap();
        store.write(&vm(), &owner(2)).unwrap();
        assert_eq!(store.read(&vm()).unwrap(), Some(owner(2)));
        assert_eq!(store.read_all().unwrap().len(), 1);
    }

    #[test]
    fn a_crash_between_write_and_rename_leaves_the_old_record() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.write(&vm(), &owner(1)).unwrap();
        fs::write(directory.path().join(".web.new"), b"{\"state\":\"ow").unwrap();
        assert_eq!(store.read(&vm()).unwrap(), Some(owner(1)));
        assert_eq!(store.read_all().unwrap().len(), 1);
    }

    #[test]
    fn a_damaged_record_is_never_no_record() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        fs::write(directory.path().join("web.json"), b"{}").unwrap();
        let error = store.read(&vm()).unwrap_err();
        assert!(error.to_string().contains("stays down"), "{error}");
    }
}
