//! What this host remembers of a store, so that an agent that starts again finds it: one file per
//! migration, root's alone, because the passwords are in it.
//!
//! Used by [`super::Intermediary`]. The file is there before the server is started and until it has
//! gone, so that a crash in between leaves nothing that nobody knows of.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use lifeboat_protocol::ids::{MigrationId, VmId};
use lifeboat_protocol::units::Bytes;
use serde::{Deserialize, Serialize};

/// One store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Whose pages.
    pub(super) migration: MigrationId,
    /// Which VM's.
    pub(super) vm: VmId,
    /// Room for pages.
    pub(super) room: Bytes,
    /// Set aside on this host; zero for a Redis that runs elsewhere.
    pub(super) set_aside: Bytes,
    /// Where agents reach it.
    pub(super) address: String,
    /// Without TLS.
    pub(super) plain: bool,
    /// A Redis that somebody else runs.
    pub(super) existing: bool,
    /// The migration's login.
    pub(super) user: String,
    /// Its password.
    pub(super) secret: String,
    /// Our own login's password; empty for an existing one.
    pub(super) owner_secret: String,
    /// Which start of the server has the pages; empty before it has started.
    pub(super) run: String,
    /// The server's process; 0 before it has started, and for an existing one.
    pub(super) process: u32,
    /// When it was prepared, milliseconds since 1970.
    pub(super) prepared_unix_ms: u64,
}

impl Record {
    /// Its file in `directory`.
    fn path(directory: &Path, migration: &MigrationId) -> PathBuf {
        directory.join(format!("{migration}.json"))
    }

    /// The host of its address, as a certificate names it.
    pub(super) fn named(&self) -> &str {
        let host = self.address.rsplit_once(':').map_or("", |(host, _)| host);
        host.trim_matches(['[', ']'])
    }

    /// The folder of its server.
    pub(super) fn folder(&self, directory: &Path) -> PathBuf {
        directory.join(self.migration.as_str())
    }

    /// Writes it. It need not survive a power cut: the store would not either.
    pub(super) fn write(&self, directory: &Path) -> io::Result<()> {
        let path = Self::path(directory, &self.migration);
        let partial = path.with_extension("partial");
        let mut options = std::fs::OpenOptions::new();
        let mut file =
            options.write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        std::fs::rename(&partial, &path)
    }

    /// Forgets it; again is the same.
    pub(super) fn remove(directory: &Path, migration: &MigrationId) -> io::Result<()> {
        match std::fs::remove_file(Self::path(directory, migration)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// All that are there. One that cannot be read is told and left alone.
    pub(super) fn read_all(directory: &Path) -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(directory)?.flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let read =
                std::fs::read(&path).and_then(|bytes| Ok(serde_json::from_slice::<Self>(&bytes)?));
            match read {
                Ok(record) => found.push(record),
                Err(error) => {
                    tracing::error!(file = %path.display(), %error, "a store's record is damaged");
                }
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_record_is_roots_alone_and_is_read_as_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let record = Record {
            migration: MigrationId::new("e1-m1").unwrap(),
            vm: VmId::new("web").unwrap(),
            room: Bytes(5),
            set_aside: Bytes(6),
            address: "192.0.2.1:7100".to_owned(),
            plain: false,
            existing: false,
            user: "m".to_owned(),
            secret: "s".to_owned(),
            owner_secret: "o".to_owned(),
            run: String::new(),
            process: 0,
            prepared_unix_ms: 7,
        };
        record.write(directory.path()).unwrap();
        std::fs::write(directory.path().join("x.json"), "{").unwrap();
        let read = Record::read_all(directory.path()).unwrap();
        assert_eq!(read, std::slice::from_ref(&record));
        let mode = std::fs::metadata(directory.path().join("e1-m1.json")).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        for _ in 0..2 {
            Record::remove(directory.path(), &record.migration).unwrap();
        }
        assert!(Record::read_all(directory.path()).unwrap().is_empty());
    }
}
