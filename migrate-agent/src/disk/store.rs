//! Disks of VMs between two other hosts that this one keeps (`--disk scatter`): their files, and what is
//! remembered of each, so that neither the agent's end nor the host's loses them.
//!
//! ```text
//!   DISK_DIR/VM-N.store-MIGRATION      disk N, once its first block has come
//!   NOTES/stores/MIGRATION.json        the record: before the first file is made, and until the last is gone
//! ```
//!
//! The record holds what opens the door for the source, so it is root's alone. Used by
//! `registry::disk_stores`. Deliberately not here: how they come, and how they go on.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use lifeboat_protocol::ids::{Generation, HostId, MigrationId, VmId};
use lifeboat_protocol::units::{Bytes, BytesPerSec};
use serde::{Deserialize, Serialize};

use super::rooms::DiskRooms;
use super::track::BLOCK;

/// Beneath the notes.
const FOLDER: &str = "stores";
/// What a file system keeps free beside the disks: others use it, too.
const LEFT_FREE: Bytes = Bytes::from_mib(64);

/// Why no room can be made for a VM's disks.
#[derive(Debug, thiserror::Error)]
pub enum DiskStoreError {
    /// No directory has so much free.
    #[error(
        "the disks take {needed}, and of the directories in which this host takes in disks (`disk_dirs`) none has more than {free} to spare"
    )]
    NoRoom {
        /// What they take.
        needed: Bytes,
        /// The most that is free in one of them, less what is left to others.
        free: Bytes,
    },
    /// A file of ours.
    #[error("cannot {doing} {}", path.display())]
    File {
        /// What.
        doing: &'static str,
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// One VM's disks, kept.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The migration.
    pub migration: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// Who brings them.
    pub source: HostId,
    /// Who is to have them.
    pub destination: HostId,
    /// The destination's page listener.
    pub page_address: String,
    /// The generation that the destination owns, or will own.
    pub generation: Generation,
    /// What the source shows.
    pub token: Vec<u8>,
    /// The files, in the order of the VM's disks.
    pub images: Vec<PathBuf>,
    /// What they take at the source, for which room was found.
    pub bytes: Bytes,
    /// Milliseconds since 1970.
    pub since_unix_ms: u64,
    /// What may be sent to the destination; `None`: whatever the link takes.
    pub onward: Option<BytesPerSec>,
    /// All of it has come, durably.
    pub whole: bool,
    /// The blocks in which it came, bytes; what the destination has of it came in the same.
    #[serde(default = "block")]
    pub block: u64,
}

/// Of a record by an older version.
fn block() -> u64 {
    BLOCK
}

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { migration, vm, whole, .. } = self;
        write!(f, "Record({vm}, {migration}, whole: {whole})")
    }
}

/// Where the disks of a migration's VM can lie that take so many `bytes` together.
///
/// # Errors
/// When nowhere.
pub fn place(
    rooms: &DiskRooms,
    (vm, migration): (&VmId, &MigrationId),
    disks: usize,
    bytes: Bytes,
) -> Result<Vec<PathBuf>, DiskStoreError> {
    // Files have holes until they are filled: what was promised to others is not free, wherever it will lie.
    let promised = Record::read_all(&rooms.notes);
    let promised: Bytes = promised.iter().map(|record| record.bytes - record.taken()).sum();
    let spare = |room: &super::rooms::Room| room.free - LEFT_FREE - promised;
    let widest = rooms.space().into_iter().max_by_key(spare);
    let free = widest.as_ref().map_or(Bytes::ZERO, spare);
    let room = widest.filter(|_| free >= bytes);
    let room = room.ok_or(DiskStoreError::NoRoom { needed: bytes, free })?;
    let file = |disk: usize| room.path.join(format!("{vm}-{disk}.store-{migration}"));
    Ok((0..disks).map(file).collect())
}

impl Record {
    fn path(notes: &Path, migration: &MigrationId) -> PathBuf {
        notes.join(FOLDER).join(format!("{migration}.json"))
    }

    /// Writes it, durably.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn write(&self, notes: &Path) -> Result<(), DiskStoreError> {
        let path = Self::path(notes, &self.migration);
        let failed = |source| DiskStoreError::File { doing: "write", path: path.clone(), source };
        self.write_to(&path).map_err(failed)
    }

    fn write_to(&self, path: &Path) -> io::Result<()> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder)?;
        let partial = path.with_extension("partial");
        let mut how = fs::OpenOptions::new();
        let mut file = how.write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        fs::rename(&partial, path)?;
        fs::File::open(folder)?.sync_all()
    }

    /// Deletes the files, and then what is remembered of them. Again is the same.
    ///
    /// # Errors
    /// When one of them stays; ask again.
    pub fn remove(&self, notes: &Path) -> Result<(), DiskStoreError> {
        let record = Self::path(notes, &self.migration);
        for path in self.images.iter().chain([&record]) {
            match fs::remove_file(path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    let path = path.clone();
                    return Err(DiskStoreError::File { doing: "delete", path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// All that are there. One that cannot be read is told and left alone.
    #[must_use]
    pub fn read_all(notes: &Path) -> Vec<Self> {
        let entries = fs::read_dir(notes.join(FOLDER)).into_iter().flatten().flatten();
        let paths = entries.map(|entry| entry.path());
        let records = paths.filter(|path| path.extension().is_some_and(|end| end == "json"));
        let read = |path: PathBuf| {
            let read = fs::read(&path).and_then(|bytes| Ok(serde_json::from_slice(&bytes)?));
            match read {
                Ok(record) => Some(record),
                Err(error) => {
                    tracing::error!(file = %path.display(), %error, "a disk store's record is damaged");
                    None
                }
            }
        };
        records.filter_map(read).collect()
    }

    /// What the files take.
    #[must_use]
    pub fn taken(&self) -> Bytes {
        let there = self.images.iter().filter_map(|image| fs::symlink_metadata(image).ok());
        Bytes(there.map(|file| file.blocks() * 512).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    #[test]
    fn what_is_kept_is_remembered_until_its_files_are_gone() {
        let directory = tempfile::tempdir().unwrap();
        let (disks, notes) = (directory.path().join("disks"), directory.path().join("notes"));
        fs::create_dir(&disks).unwrap();
        let rooms = DiskRooms {
            directories: vec![directory.path().join("none"), disks.clone()],
            owner: (0, 0),
            notes: notes.clone(),
            kept_for: Duration::ZERO,
        };
        let (vm, migration) = (VmId::new("web").unwrap(), MigrationId::new("e1-m1").unwrap());
        let images = place(&rooms, (&vm, &migration), 2, Bytes(5)).unwrap();
        assert_eq!(images[1], disks.join("web-1.store-e1-m1"));
        let all = place(&rooms, (&vm, &migration), 2, Bytes(u64::MAX)).unwrap_err().to_string();
        assert!(all.contains("`disk_dirs`"), "{all}");
        let mut record = Record {
            migration,
            vm,
            source: HostId::new("h1").unwrap(),
            destination: HostId::new("h2").unwrap(),
            page_address: "192.0.2.2:7001".to_owned(),
            generation: Generation(2),
            token: vec![171; 32],
            images,
            bytes: Bytes(9500),
            since_unix_ms: 7,
            onward: Some(BytesPerSec(5)),
            whole: false,
            block: 16 << 10,
        };
        assert!(Record::read_all(&notes).is_empty());
        record.write(&notes).unwrap();
        record.whole = true;
        record.write(&notes).unwrap();
        fs::write(notes.join("stores/x.json"), "{").unwrap();
        assert_eq!(Record::read_all(&notes), std::slice::from_ref(&record));
        let mode = fs::metadata(notes.join("stores/e1-m1.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!format!("{record:?}").contains("171"), "the secret is printed");
        let free = rooms.space()[1].free - LEFT_FREE;
        let other = MigrationId::new("e1-m2").unwrap();
        let beside = place(&rooms, (&record.vm, &other), 1, free - Bytes(4000));
        assert!(beside.is_err(), "what was promised to the first is not free");
        fs::write(&record.images[0], vec![1; 9000]).unwrap();
        assert!(record.taken() >= Bytes(9000));
        for _ in 0..2 {
            record.remove(&notes).unwrap();
        }
        assert!(Record::read_all(&notes).is_empty() && !record.images[0].exists());
    }
}
