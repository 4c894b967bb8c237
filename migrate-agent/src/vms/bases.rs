//! What lies beneath overlays, and images that nobody writes to (CDs): which files, and what they
//! hold, by hash.
//!
//! Used by the gRPC server, for a plan and for `lifeboat verify`. A base is read whole once; its hash is
//! kept as long as the file's device, inode, length, mtime and ctime are the same, so that the next
//! plan is quick. Nothing is kept of a file that was changed a moment ago: a second change within one
//! tick of the file system's clock would not show. Deliberately not here: what is made of a difference.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lifeboat_protocol::agent::{BaseChain, BaseFile, VmDefinition};
use xxhash_rust::xxh3::Xxh3;

use super::chain;
use crate::clock;
use crate::disk::local::local_disks;
use crate::disk::rooms::{DiskRooms, place};
use crate::qemu::qcow2::{Backing, Qcow2Error, backing_of};

/// No chain is longer; QEMU itself is slow far below.
pub const DEEPEST: usize = 32;
/// A file that was changed within this time may be changed again unnoticed.
const SETTLED: Duration = Duration::from_secs(2);
/// So many hashes are kept.
const KNOWN_MAX: usize = 1024;

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    /// Its length, bytes.
    pub bytes: u64,
    /// Its xxh3-128; `None` where another length was wanted and it was not read.
    pub hash: Option<u128>,
}

/// Why it cannot be said what a base holds.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// The file.
    #[error("it cannot be read")]
    Read(#[from] io::Error),
    /// A device, a directory.
    #[error("it is no regular file")]
    Kind,
    /// Somebody writes to it.
    #[error("it was written to while it was read; a base must not change")]
    Changes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl From<&Metadata> for Stamp {
    fn from(of: &Metadata) -> Self {
        Self {
            device: of.dev(),
            inode: of.ino(),
            bytes: of.len(),
            modified: (of.mtime(), of.mtime_nsec()),
            changed: (of.ctime(), of.ctime_nsec()),
        }
    }
}

/// The hashes that are known.
#[derive(Debug, Default)]
pub struct Bases {
    known: BTreeMap<PathBuf, (Stamp, u128)>,
}

impl Bases {
    /// What `path` holds, now being `now` since the Unix epoch. It blocks: as long as it takes to read
    /// the file, where it is not known and is as long as `wanted` (or that is `None`).
    ///
    /// # Errors
    /// When the file cannot be read, or changes meanwhile.
    pub fn content(
        &mut self,
        path: &Path,
        wanted: Option<u64>,
        now: Duration,
    ) -> Result<Content, BaseError> {
        // Before it is opened: opening a pipe would wait.
        let metadata = std::fs::metadata(path)?;
        if !metadata.is_file() {
            return Err(BaseError::Kind);
        }
        let bytes = metadata.len();
        if wanted.is_some_and(|wanted| wanted != bytes) {
            return Ok(Content { bytes, hash: None });
        }
        let stamp = Stamp::from(&metadata);
        if let Some((_, hash)) = self.known.get(path).filter(|(then, _)| *then == stamp) {
            return Ok(Content { bytes, hash: Some(*hash) });
        }
        let file = File::open(path)?;
        let hash = hash(&file)?;
        if Stamp::from(&file.metadata()?) != stamp {
            return Err(BaseError::Changes);
        }
        let settled = u64::try_from(stamp.changed.0).unwrap_or(0).saturating_add(SETTLED.as_secs());
        if settled < now.as_secs() {
            if self.known.len() >= KNOWN_MAX {
                self.known.clear();
            }
            self.known.insert(path.to_owned(), (stamp, hash));
        }
        Ok(Content { bytes, hash: Some(hash) })
    }
}

fn hash(mut file: &File) -> io::Result<u128> {
    let mut state = Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(state.digest128()),
            Ok(length) => state.update(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The files beneath the qcow2 image at `image`, the nearest first.
fn beneath(image: &Path) -> Result<Vec<Backing>, Qcow2Error> {
    let (mut image, mut found) = (image.to_owned(), Vec::new());
    while found.len() < DEEPEST {
        let Some(backing) = backing_of(&image)? else { break };
        image.clone_from(&backing.path);
        let goes_on = backing.format == "qcow2";
        found.push(backing);
        if !goes_on {
            break;
        }
    }
    Ok(found)
}

/// Where a chain of such names leads here, beneath the overlay at `image`.
fn placed<'a>(
    image: &Path,
    names: impl IntoIterator<Item = &'a str>,
) -> impl Iterator<Item = PathBuf> {
    names.into_iter().scan(image.to_owned(), |above, name| {
        *above = above.parent().unwrap_or(Path::new("/")).join(name);
        Some(above.clone())
    })
}

/// What lies beneath each of a VM's local overlays here, and each of its images that nobody writes to. It
/// blocks, as [`Bases::content`] does.
///
/// # Errors
/// When the head of an image cannot be read.
pub fn files_of(
    bases: &mut Bases,
    definition: &VmDefinition,
    directories: &[PathBuf],
) -> Result<Vec<BaseChain>, Qcow2Error> {
    let mut chains = Vec::new();
    for disk in local_disks(definition, directories) {
        let called = definition.disks.get(disk.number).map(|disk| disk.path.clone());
        let called = called.unwrap_or_default();
        if disk.read_only {
            let files = vec![hashed(bases, called.clone(), &disk.path, None)];
            chains.push(BaseChain { disk: called.clone(), files, image: true });
        }
        let files = match disk.format == "qcow2" {
            true => beneath(&disk.path)?,
            false => continue,
        };
        if files.is_empty() {
            continue;
        }
        let files = files.into_iter().map(|file| hashed(bases, file.name, &file.path, None));
        chains.push(BaseChain { disk: called, files: files.collect(), image: false });
    }
    Ok(chains)
}

/// The same chain, as it is here. It blocks, as [`Bases::content`] does.
pub fn as_it_is_here(bases: &mut Bases, wanted: BaseChain, directories: &[PathBuf]) -> BaseChain {
    let overlay = place(directories, Path::new(&wanted.disk));
    if wanted.image {
        let file = wanted.files.into_iter().next().unwrap_or_default();
        let file = hashed(bases, file.name, &overlay, Some(file.bytes));
        let files = vec![as_an_image(file, &overlay, directories)];
        return BaseChain { files, ..wanted };
    }
    let names: Vec<&str> = wanted.files.iter().map(|file| file.name.as_str()).collect();
    let paths: Vec<_> = placed(&overlay, names).collect();
    let files = wanted.files.into_iter().zip(paths);
    let files = files.map(|(file, path)| hashed(bases, file.name, &path, Some(file.bytes)));
    BaseChain { files: files.collect(), disk: wanted.disk, image: false }
}

/// What was found of an image that nobody writes to: it can be sent where there is none.
fn as_an_image(file: BaseFile, path: &Path, directories: &[PathBuf]) -> BaseFile {
    if DiskRooms::is_arriving(path) {
        // It is gone again if the VM that it comes with does not arrive.
        let detail = "it is just arriving with a VM; try again afterwards".to_owned();
        return BaseFile { detail, hash: String::new(), ..file };
    }
    if std::fs::symlink_metadata(path).is_ok() {
        return file;
    }
    match directories.iter().any(|room| path.starts_with(room)) {
        true => BaseFile { absent: true, ..file },
        false => BaseFile {
            detail: "it is not there, and lies in no directory in which this host takes in disks; put it there, \
                     or add its directory to `disk_dirs` in agent.toml"
                .to_owned(),
            ..file
        },
    }
}

fn hashed(bases: &mut Bases, name: String, path: &Path, wanted: Option<u64>) -> BaseFile {
    let named = BaseFile { name, path: path.display().to_string(), ..BaseFile::default() };
    match bases.content(path, wanted, clock::unix_now()) {
        Ok(content) => {
            let hash = content.hash.map(|hash| format!("{hash:032x}"));
            BaseFile { bytes: content.bytes, hash: hash.unwrap_or_default(), ..named }
        }
        Err(error) => BaseFile { detail: chain(&error), ..named },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat_protocol::agent::Disk;

    /// Long after every file of these tests was made.
    const LATER: Duration = Duration::from_secs(1 << 40);

    #[test]
    fn a_base_is_read_again_once_it_has_changed_and_only_then() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base");
        std::fs::write(&path, "one").unwrap();
        let mut bases = Bases::default();
        let first = bases.content(&path, None, LATER).unwrap();
        assert_eq!((first.bytes, bases.known.len()), (3, 1));
        // What is known is not read: a wrong hash would come back.
        bases.known.get_mut(&path).unwrap().1 = 7;
        assert_eq!(bases.content(&path, Some(3), LATER).unwrap().hash, Some(7));
        // The same length, another inode.
        std::fs::write(folder.path().join("other"), "two").unwrap();
        std::fs::rename(folder.path().join("other"), &path).unwrap();
        let second = bases.content(&path, Some(3), LATER).unwrap();
        assert!(second.hash != first.hash && second.hash != Some(7));
    }

    #[test]
    fn nothing_is_kept_of_a_file_that_was_changed_just_now() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base");
        std::fs::write(&path, "one").unwrap();
        let changed = Duration::from_secs(std::fs::metadata(&path).unwrap().ctime() as u64);
        let mut bases = Bases::default();
        bases.content(&path, None, changed + SETTLED).unwrap();
        assert!(bases.known.is_empty());
    }

    #[test]
    fn another_length_is_told_without_reading_and_what_is_no_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base");
        std::fs::write(&path, "one").unwrap();
        let mut bases = Bases::default();
        let found = bases.content(&path, Some(4), LATER).unwrap();
        assert_eq!(found, Content { bytes: 3, hash: None });
        assert!(matches!(bases.content(folder.path(), None, LATER), Err(BaseError::Kind)));
        let none = bases.content(&folder.path().join("none"), None, LATER);
        assert!(matches!(none, Err(BaseError::Read(_))));
    }

    #[test]
    fn an_image_that_nobody_writes_to_is_the_same_or_can_be_sent_or_is_in_the_way() {
        let folder = tempfile::tempdir().unwrap();
        let rooms = ["here", "there"].map(|name| folder.path().join(name));
        rooms.iter().for_each(|room| std::fs::create_dir(room).unwrap());
        let image = rooms[0].join("a.iso");
        std::fs::write(&image, "one").unwrap();
        let disk = Disk { path: "a.iso".into(), read_only: true, ..Disk::default() };
        let definition = VmDefinition { disks: vec![disk], ..VmDefinition::default() };
        let [here, there] = rooms.map(|room| vec![room]);
        let chains = files_of(&mut Bases::default(), &definition, &here).unwrap();
        let wanted = &chains[0];
        assert!(chains.len() == 1 && wanted.image && wanted.files[0].hash.len() == 32);
        let found = |room: &[PathBuf], wanted: &BaseChain| {
            as_it_is_here(&mut Bases::default(), wanted.clone(), room).files[0].clone()
        };
        assert_eq!(found(&here, wanted).hash, wanted.files[0].hash);
        assert!(found(&there, wanted).absent);
        let outside = BaseChain { disk: "/nowhere/a.iso".into(), ..wanted.clone() };
        let outside = found(&there, &outside);
        assert!(!outside.absent && outside.detail.contains("disk_dirs"), "{outside:?}");
        std::fs::write(there[0].join("a.iso"), "two").unwrap();
        let other = found(&there, wanted);
        assert!(!other.absent && other.bytes == 3 && other.hash != wanted.files[0].hash);
        std::fs::write(there[0].join("a.iso.arriving-b"), "one").unwrap();
        assert!(found(&there, wanted).detail.contains("arriving"));
    }

    #[test]
    fn names_are_relative_to_the_image_above() {
        let found: Vec<_> = placed(Path::new("/d/over"), ["../b/one", "two", "/x/three"]).collect();
        assert_eq!(found, ["/d/../b/one", "/d/../b/two", "/x/three"].map(PathBuf::from));
    }
}
