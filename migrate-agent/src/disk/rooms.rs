//! Where images arrive, and what becomes of those that have left.
//!
//! `destination/disk.rs`, `source/disk.rs` and the agent's start use it. An image is made only in a
//! directory that the host's administrator gives for it, and never over a file that is there.
//!
//! # How an unfinished image is known
//!
//! ```text
//!   NAME.arriving-VM                   made (O_EXCL) when the first block comes
//!   NAME.arriving-VM + NAME            one file, two names: before QEMU opens it
//!   NAME                               before its guest runs here
//! ```
//!
//! So whatever a crash leaves can be told apart: a file with the second name is ours and unfinished;
//! NAME goes with it if, and only if, both are the same file.
//!
//! # What has left
//!
//! An image that its VM has left behind is renamed, and deleted after a time: until then it is a
//! consistent copy as of the switchover. A note in the state directory says which and since when.
//!
//! # What is there ahead of time
//!
//! `NAME.seed-VM` is a copy that was taken while the VM ran elsewhere (`lifeboat preseed`). When the
//! VM arrives it becomes the unfinished image, and what differs is sent; where the VM stays after all
//! it becomes a seed again. A note in the state directory says of which VM there are seeds; they are
//! kept until they are used or forgotten.
//!
//! Deliberately not here: content, and who owns the VM.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use lifeboat_protocol::ids::{MigrationId, VmId};
use lifeboat_protocol::units::Bytes;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, ResolveFlags};
use serde::{Deserialize, Serialize};

const ARRIVING: &str = ".arriving-";
const LEFT: &str = ".left-";
const SEED: &str = ".seed-";
/// Beneath the notes.
const SEEDS: &str = "seeds";

/// Where the image is that a definition calls `path`: there, or, for a plain name, in the first of
/// `directories`.
#[must_use]
pub fn place(directories: &[PathBuf], path: &Path) -> PathBuf {
    match directories.first() {
        Some(first) if path.is_relative() => first.join(path),
        _ => path.to_owned(),
    }
}

/// Why an image cannot be made here, or not put where it belongs.
#[derive(Debug, thiserror::Error)]
pub enum RoomError {
    /// Not in a directory that was given for it.
    #[error(
        "the disk {} lies in no directory in which this host takes in disks ({}); add its directory to `disk_dirs` in agent.toml",
        path.display(), list(.rooms)
    )]
    Outside {
        /// The disk.
        path: PathBuf,
        /// Those directories.
        rooms: Vec<PathBuf>,
    },
    /// Something has its name.
    #[error("{} is there already and is not overwritten; if nobody needs it, remove it", path.display())]
    Exists {
        /// The disk.
        path: PathBuf,
    },
    /// The directory, or the file.
    #[error("cannot make the disk {} here", path.display())]
    File {
        /// The disk.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

fn list(rooms: &[PathBuf]) -> String {
    let rooms: Vec<String> = rooms.iter().map(|room| room.display().to_string()).collect();
    if rooms.is_empty() { "none is given".to_owned() } else { rooms.join(", ") }
}

/// How much a directory for images can take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// The directory.
    pub path: PathBuf,
    /// Free for QEMU's user.
    pub free: Bytes,
    /// Of its file system.
    pub total: Bytes,
}

/// Where images arrive on this host.
#[derive(Debug, Clone)]
pub struct DiskRooms {
    /// Directories in which images may be made.
    pub directories: Vec<PathBuf>,
    /// Whose they become: QEMU's user and group.
    pub owner: (u32, u32),
    /// Where it is noted which images were left behind.
    pub notes: PathBuf,
    /// How long those are kept.
    pub kept_for: Duration,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    vm: VmId,
    /// Seconds since the epoch.
    since: u64,
    images: Vec<PathBuf>,
}

/// A copy of a VM's images that was taken ahead of time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seed {
    /// Whose.
    pub vm: VmId,
    /// What its files take.
    pub bytes: Bytes,
    /// When it was begun last, since the epoch.
    pub since: Duration,
}

impl DiskRooms {
    /// How much room there is; a directory that is not there counts as none.
    #[must_use]
    pub fn space(&self) -> Vec<Room> {
        let space = |path: &PathBuf| {
            let (free, total) = match rustix::fs::statvfs(path) {
                Ok(stat) => {
                    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
                    (bytes(stat.f_bavail), bytes(stat.f_blocks))
                }
                Err(_) => (0, 0),
            };
            Room { path: path.clone(), free: Bytes(free), total: Bytes(total) }
        };
        self.directories.iter().map(space).collect()
    }

    /// Whether an image may be made at `path` for `vm`; what an earlier attempt left there is
    /// removed.
    ///
    /// # Errors
    /// When it lies elsewhere, its directory is not there, or something has its name.
    pub fn make_way(&self, vm: &VmId, path: &Path) -> Result<(), RoomError> {
        self.must_be_inside(path)?;
        self.discard(vm, path)?;
        match fs::symlink_metadata(path) {
            Ok(_) => Err(RoomError::Exists { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(RoomError::File { path: path.to_owned(), source }),
        }
    }

    fn must_be_inside(&self, path: &Path) -> Result<(), RoomError> {
        let outside =
            || RoomError::Outside { path: path.to_owned(), rooms: self.directories.clone() };
        let plain = |rest: &&Path| {
            let mut parts = rest.components();
            parts.next().is_some() && rest.components().all(|p| matches!(p, Component::Normal(_)))
        };
        let within = |room: &PathBuf| {
            let rest = path.strip_prefix(room).ok().filter(plain)?;
            Some((room.clone(), rest.parent().unwrap_or(Path::new("")).to_owned()))
        };
        let (room, folder) = self.directories.iter().find_map(within).ok_or_else(outside)?;
        // Opened by the kernel beneath the room: no link leads out of it.
        let failed = |source: rustix::io::Errno| RoomError::File {
            path: path.to_owned(),
            source: source.into(),
        };
        let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        let room = rustix::fs::openat(CWD, &room, flags, Mode::empty()).map_err(failed)?;
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { &folder };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(room, folder, flags, Mode::empty(), resolve).map_err(failed)?;
        Ok(())
    }

    /// Under which name a seed of the image `path` of `vm` is kept.
    #[must_use]
    pub fn seed(vm: &VmId, path: &Path) -> PathBuf {
        with_suffix(path, &format!("{SEED}{vm}"))
    }

    /// Whether seeds of these images of `vm` may be made here, or brought up to date; noted before
    /// anything is written.
    ///
    /// # Errors
    /// When one would lie elsewhere, an image has its name here, or the note cannot be written.
    pub fn make_way_for_seeds(
        &self,
        vm: &VmId,
        images: &[PathBuf],
        now: Duration,
    ) -> Result<(), RoomError> {
        for path in images {
            self.must_be_inside(path)?;
            if fs::symlink_metadata(path).is_ok() {
                return Err(RoomError::Exists { path: path.clone() });
            }
        }
        let images = images.iter().map(|path| Self::seed(vm, path)).collect();
        let note = Note { vm: vm.clone(), since: now.as_secs(), images };
        write_note(&self.seed_note(vm), &note)
    }

    /// Makes the seed of an image the unfinished image, if there is one; what an earlier attempt
    /// left has been removed by [`Self::make_way`].
    ///
    /// # Errors
    /// When there is one and it cannot be used.
    pub fn take_seed(&self, vm: &VmId, path: &Path) -> Result<bool, RoomError> {
        let (seed, arriving) = (Self::seed(vm, path), Self::arriving(vm, path));
        // What is no plain file is nothing that we made.
        if !fs::symlink_metadata(&seed).is_ok_and(|seed| seed.is_file()) {
            return Ok(false);
        }
        match rustix::fs::renameat_with(CWD, &seed, CWD, &arriving, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(true),
            Err(errno) => Err(RoomError::File { path: path.to_owned(), source: errno.into() }),
        }
    }

    /// The VM stays where it was: its unfinished image is a seed again.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn put_back(&self, vm: &VmId, path: &Path) -> Result<(), RoomError> {
        let failed = |source| RoomError::File { path: path.to_owned(), source };
        let arriving = Self::arriving(vm, path);
        let Ok(unfinished) = fs::symlink_metadata(&arriving) else { return Ok(()) };
        if fs::symlink_metadata(path).is_ok_and(|other| same_file(&other, &unfinished)) {
            remove(path).map_err(failed)?;
        }
        fs::rename(&arriving, Self::seed(vm, path)).map_err(failed)
    }

    /// Every VM of which there are seeds.
    #[must_use]
    pub fn seeds(&self) -> Vec<Seed> {
        let notes = fs::read_dir(self.notes.join(SEEDS)).into_iter().flatten().flatten();
        let told = |place: PathBuf| {
            let note: Note = serde_json::from_slice(&fs::read(place).ok()?).ok()?;
            let there = note.images.iter().filter_map(|image| fs::symlink_metadata(image).ok());
            let taken: Vec<u64> = there.map(|file| file.blocks() * 512).collect();
            let bytes = Bytes(taken.iter().sum());
            let since = Duration::from_secs(note.since);
            (!taken.is_empty()).then_some(Seed { vm: note.vm, bytes, since })
        };
        notes.filter_map(|entry| told(entry.path())).collect()
    }

    /// Deletes the seeds of `vm`; whether there were any.
    ///
    /// # Errors
    /// When one cannot be deleted.
    pub fn forget_seeds(&self, vm: &VmId) -> Result<bool, RoomError> {
        let place = self.seed_note(vm);
        let Ok(text) = fs::read(&place) else { return Ok(false) };
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| RoomError::File { path, source }
        };
        let note: Note =
            serde_json::from_slice(&text).map_err(io::Error::from).map_err(failed(&place))?;
        for image in &note.images {
            remove(image).map_err(failed(image))?;
        }
        remove(&place).map_err(failed(&place))?;
        Ok(true)
    }

    fn seed_note(&self, vm: &VmId) -> PathBuf {
        self.notes.join(SEEDS).join(format!("{vm}.json"))
    }

    /// Under which name the image `path` of `vm` is made.
    #[must_use]
    pub fn arriving(vm: &VmId, path: &Path) -> PathBuf {
        with_suffix(path, &format!("{ARRIVING}{vm}"))
    }

    /// Gives the arriving image its name as well, and to QEMU's user: QEMU is about to open it.
    ///
    /// # Errors
    /// When something has that name by now, or it did not arrive.
    pub fn name(&self, vm: &VmId, path: &Path) -> Result<(), RoomError> {
        let failed = |source| RoomError::File { path: path.to_owned(), source };
        let arriving = Self::arriving(vm, path);
        let (uid, gid) = self.owner;
        std::os::unix::fs::lchown(&arriving, Some(uid), Some(gid)).map_err(failed)?;
        match fs::hard_link(&arriving, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(RoomError::Exists { path: path.to_owned() })
            }
            outcome => outcome.and_then(|()| sync_folder(path)).map_err(failed),
        }
    }

    /// The VM is this host's: its image is no longer unfinished.
    ///
    /// # Errors
    /// When that cannot be made durable.
    pub fn settle(&self, vm: &VmId, path: &Path) -> Result<(), RoomError> {
        let failed = |source| RoomError::File { path: path.to_owned(), source };
        remove(&Self::arriving(vm, path)).and_then(|()| sync_folder(path)).map_err(failed)
    }

    /// Removes an unfinished image; nothing where there is none.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn discard(&self, vm: &VmId, path: &Path) -> Result<(), RoomError> {
        let failed = |source| RoomError::File { path: path.to_owned(), source };
        let arriving = Self::arriving(vm, path);
        let Ok(unfinished) = fs::symlink_metadata(&arriving) else { return Ok(()) };
        // This name first: without the other one it would pass for a whole image.
        if fs::symlink_metadata(path).is_ok_and(|other| same_file(&other, &unfinished)) {
            remove(path).map_err(failed)?;
        }
        remove(&arriving).map_err(failed)
    }

    /// Whether the image `path` is just arriving with some VM: it may go again.
    #[must_use]
    pub fn is_arriving(path: &Path) -> bool {
        let entries = fs::read_dir(path.parent().unwrap_or(Path::new("/"))).into_iter().flatten();
        let mut found = entries.flatten().filter_map(|entry| unfinished(&entry.path()));
        found.any(|(image, _)| image == path)
    }

    /// Removes the unfinished images of every VM that shall not be `kept`: what a crash left.
    pub fn sweep(&self, kept: impl Fn(&VmId) -> bool) {
        for room in &self.directories {
            self.sweep_folder(room, &kept, 0);
        }
    }

    fn sweep_folder(&self, folder: &Path, kept: &impl Fn(&VmId) -> bool, depth: usize) {
        /// DiskRooms are shallow; a deeper one is somebody's archive.
        const DEEPEST: usize = 4;
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if depth < DEEPEST && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.sweep_folder(&path, kept, depth + 1);
            }
            let Some((image, vm)) = unfinished(&path) else { continue };
            if kept(&vm) {
                continue;
            }
            tracing::warn!(%vm, image = %image.display(), "removing a disk that had not all arrived");
            if let Err(error) = self.discard(&vm, &image) {
                tracing::error!(%error, "it stays");
            }
        }
    }

    /// The VM runs elsewhere: its images here are renamed, and kept for a while.
    ///
    /// # Errors
    /// The first image that could not be renamed; the others were.
    pub fn leave(
        &self,
        vm: &VmId,
        migration: &MigrationId,
        images: &[PathBuf],
        now: Duration,
    ) -> Result<(), RoomError> {
        let renamed = |path: &PathBuf| with_suffix(path, &format!("{LEFT}{migration}"));
        let note = Note {
            vm: vm.clone(),
            since: now.as_secs(),
            images: images.iter().map(renamed).collect(),
        };
        let place = self.notes.join(format!("{migration}.json"));
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| RoomError::File { path, source }
        };
        write_note(&place, &note)?;
        let mut first = Ok(());
        for (image, left) in images.iter().zip(&note.images) {
            let outcome =
                match rustix::fs::renameat_with(CWD, image, CWD, left, RenameFlags::NOREPLACE) {
                    // Done before a crash.
                    Err(rustix::io::Errno::NOENT) if left.exists() => Ok(()),
                    outcome => outcome.map_err(|errno| failed(image)(errno.into())),
                };
            first = first.and(outcome);
        }
        first
    }

    /// Deletes the images that were left behind long enough ago.
    pub fn expire(&self, now: Duration) {
        for entry in fs::read_dir(&self.notes).into_iter().flatten().flatten() {
            let place = entry.path();
            let text = fs::read(&place).unwrap_or_default();
            let Ok(note) = serde_json::from_slice::<Note>(&text) else { continue };
            if now.as_secs().saturating_sub(note.since) < self.kept_for.as_secs() {
                continue;
            }
            let deleted: io::Result<()> = note.images.iter().try_for_each(|image| remove(image));
            match deleted.and_then(|()| remove(&place)) {
                Ok(()) => tracing::info!(vm = %note.vm, "deleted the disks that it had left here"),
                Err(error) => {
                    tracing::error!(vm = %note.vm, %error, "disks that it left here stay")
                }
            }
        }
    }
}

/// The image and the VM of an unfinished image's second name.
fn unfinished(path: &Path) -> Option<(PathBuf, VmId)> {
    let name = path.file_name()?.to_str()?;
    let (image, vm) = name.rsplit_once(ARRIVING)?;
    Some((path.with_file_name(image), VmId::new(vm).ok()?))
}

fn write_note(place: &Path, note: &Note) -> Result<(), RoomError> {
    let failed = |source| RoomError::File { path: place.to_owned(), source };
    let written = || -> io::Result<()> {
        fs::create_dir_all(place.parent().unwrap_or(Path::new("/")))?;
        fs::write(place, serde_json::to_vec_pretty(note)?)
    };
    written().map_err(failed)
}

fn same_file(one: &fs::Metadata, other: &fs::Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(OsStr::new(suffix));
    name.into()
}

fn remove(path: &Path) -> io::Result<()> {
    match rustix::fs::unlinkat(CWD, path, AtFlags::empty()) {
        Err(rustix::io::Errno::NOENT) => Ok(()),
        outcome => outcome.map_err(io::Error::from),
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rooms(directory: &Path) -> DiskRooms {
        let own = fs::metadata(directory).unwrap();
        DiskRooms {
            directories: vec![directory.join("room")],
            owner: (own.uid(), own.gid()),
            notes: directory.join("notes"),
            kept_for: Duration::from_secs(100),
        }
    }

    fn vm(name: &str) -> VmId {
        VmId::new(name).unwrap()
    }

    #[test]
    fn an_image_is_made_only_in_a_room_and_never_over_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let rooms = rooms(directory.path());
        let room = directory.path().join("room");
        fs::create_dir_all(room.join("sub")).unwrap();
        std::os::unix::fs::symlink("/tmp", room.join("link")).unwrap();
        fs::write(room.join("there"), "mine").unwrap();
        let way = |path: PathBuf| rooms.make_way(&vm("a"), &path);
        assert!(way(room.join("new")).is_ok() && way(room.join("sub/new")).is_ok());
        assert!(matches!(way(room.join("there")), Err(RoomError::Exists { .. })));
        for outside in ["/etc/new", "room/../new", "room", "room/sub/../../new"] {
            let error = way(directory.path().join(outside)).unwrap_err();
            assert!(matches!(error, RoomError::Outside { .. }), "{outside}: {error}");
        }
        assert!(matches!(way(room.join("link/new")), Err(RoomError::File { .. })));
        assert!(matches!(way(room.join("absent/new")), Err(RoomError::File { .. })));
        assert_eq!(fs::read(room.join("there")).unwrap(), b"mine");
    }

    #[test]
    fn what_a_crash_left_is_told_from_what_is_somebodys() {
        let directory = tempfile::tempdir().unwrap();
        let rooms = rooms(directory.path());
        let image = directory.path().join("room/disk");
        fs::create_dir(directory.path().join("room")).unwrap();
        let arriving = DiskRooms::arriving(&vm("a"), &image);
        // Begun only.
        fs::write(&arriving, "half").unwrap();
        rooms.sweep(|kept| *kept == vm("a"));
        assert!(arriving.exists());
        rooms.name(&vm("a"), &image).unwrap();
        assert!(matches!(rooms.name(&vm("a"), &image), Err(RoomError::Exists { .. })));
        // Both names: ours.
        rooms.make_way(&vm("a"), &image).unwrap();
        assert!(!arriving.exists() && !image.exists());
        // Another file has the name: not ours.
        fs::write(&arriving, "half").unwrap();
        fs::write(&image, "mine").unwrap();
        rooms.sweep(|_| false);
        assert!(!arriving.exists());
        assert_eq!(fs::read(&image).unwrap(), b"mine");
    }

    #[test]
    fn an_image_that_has_settled_is_nobodys_to_remove() {
        let directory = tempfile::tempdir().unwrap();
        let rooms = rooms(directory.path());
        let image = directory.path().join("room/disk");
        fs::create_dir(directory.path().join("room")).unwrap();
        fs::write(DiskRooms::arriving(&vm("a"), &image), "all").unwrap();
        rooms.name(&vm("a"), &image).unwrap();
        assert!(DiskRooms::is_arriving(&image));
        rooms.settle(&vm("a"), &image).unwrap();
        rooms.settle(&vm("a"), &image).unwrap();
        assert!(!DiskRooms::is_arriving(&image));
        rooms.sweep(|_| false);
        rooms.discard(&vm("a"), &image).unwrap();
        assert_eq!(fs::read(&image).unwrap(), b"all");
    }

    #[test]
    fn a_seed_becomes_the_unfinished_image_and_a_seed_again() {
        let directory = tempfile::tempdir().unwrap();
        let rooms = rooms(directory.path());
        let image = directory.path().join("room/disk");
        fs::create_dir(directory.path().join("room")).unwrap();
        let (a, now) = (vm("a"), Duration::from_secs(50));
        assert!(!rooms.take_seed(&a, &image).unwrap());
        rooms.make_way_for_seeds(&a, std::slice::from_ref(&image), now).unwrap();
        assert_eq!(rooms.seeds(), []);
        fs::write(DiskRooms::seed(&a, &image), "most").unwrap();
        assert_eq!(
            rooms.seeds().iter().map(|s| (s.vm.as_str(), s.since)).collect::<Vec<_>>(),
            [("a", now)]
        );
        // It is no unfinished image: a crash does not cost it.
        rooms.sweep(|_| false);
        rooms.make_way(&a, &image).unwrap();
        assert!(rooms.take_seed(&a, &image).unwrap());
        assert!(DiskRooms::arriving(&a, &image).exists() && rooms.seeds().is_empty());
        rooms.name(&a, &image).unwrap();
        rooms.put_back(&a, &image).unwrap();
        assert_eq!(fs::read(DiskRooms::seed(&a, &image)).unwrap(), b"most");
        assert!(!image.exists() && !DiskRooms::arriving(&a, &image).exists());
        assert!(rooms.forget_seeds(&a).unwrap() && !rooms.forget_seeds(&a).unwrap());
        assert!(!DiskRooms::seed(&a, &image).exists());
        // Somebody's link is not followed, and an image that is here is not seeded.
        std::os::unix::fs::symlink("/etc/hostname", DiskRooms::seed(&a, &image)).unwrap();
        assert!(!rooms.take_seed(&a, &image).unwrap());
        fs::write(&image, "whole").unwrap();
        let way = rooms.make_way_for_seeds(&a, &[image], now);
        assert!(matches!(way, Err(RoomError::Exists { .. })));
    }

    #[test]
    fn what_was_left_behind_is_kept_for_its_time() {
        let directory = tempfile::tempdir().unwrap();
        let rooms = rooms(directory.path());
        let image = directory.path().join("disk");
        fs::write(&image, "old").unwrap();
        let migration = MigrationId::new("m1").unwrap();
        let leave = || {
            let images = std::slice::from_ref(&image);
            rooms.leave(&vm("a"), &migration, images, Duration::from_secs(1000))
        };
        leave().unwrap();
        leave().unwrap();
        let left = directory.path().join("disk.left-m1");
        assert!(!image.exists() && left.exists());
        rooms.expire(Duration::from_secs(1099));
        assert!(left.exists());
        rooms.expire(Duration::from_secs(1100));
        assert!(!left.exists());
        assert_eq!(fs::read_dir(directory.path().join("notes")).unwrap().count(), 0);
    }
}
