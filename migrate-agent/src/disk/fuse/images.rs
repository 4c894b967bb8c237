//! A directory of disk images as the mount shows it: names, attributes, open images.
//!
//! Used by `serve`. Only regular files of this one directory exist for it: no links are followed, no
//! folder is entered, and a name is a single component. An image is opened once, twice for
//! O_DIRECT, and all who have it open through the mount share that; its inode is its node, so that
//! a server that takes over knows it again.
//!
//! Whoever opens an image through the mount locks the image itself, too ([`super::image_lock`]).
//! Deliberately not here: FUSE's messages, and what a write means for a migration.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::{AtFlags, Dir, FallocateFlags, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

use super::abi::{Attributes, ROOT};
use super::image_lock::{self, Use};

/// O_DIRECT wants offset and length in whole sectors; what is not goes through the page cache.
const SECTOR: u64 = 512;

/// An image that somebody has open.
pub struct Image {
    node: u64,
    name: OsString,
    file: File,
    writable: bool,
    direct: OnceLock<Option<File>>,
    locked: Mutex<Option<Use>>,
}

impl Image {
    /// Its name in the directory.
    #[must_use]
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// Its node, which is its inode.
    #[must_use]
    pub fn node(&self) -> u64 {
        self.node
    }

    /// Its length in bytes, now.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn length(&self) -> Result<u64, Errno> {
        Ok(u64::try_from(rustix::fs::fstat(&self.file)?.st_size).unwrap_or(0))
    }

    /// Reads up to `into.len()` bytes at `offset`; fewer only at the end.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn read(&self, direct: bool, offset: u64, into: &mut [u8]) -> Result<usize, Errno> {
        let file = self.for_access(direct, offset, into.len());
        let mut done = 0;
        while done < into.len() {
            match file.read_at(&mut into[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(errno(&error)),
            }
            // A short read of O_DIRECT can leave an unaligned rest.
            if !(done as u64).is_multiple_of(SECTOR) {
                break;
            }
        }
        Ok(done)
    }

    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    /// When the disk fails or is full, or when the image may not be written.
    pub fn write(&self, direct: bool, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        let file = self.for_access(direct, offset, data.len());
        file.write_all_at(data, offset).map_err(|error| errno(&error))?;
        Ok(data.len())
    }

    fn for_access(&self, direct: bool, offset: u64, length: usize) -> &File {
        let aligned = offset.is_multiple_of(SECTOR) && (length as u64).is_multiple_of(SECTOR);
        match (direct && aligned).then(|| self.direct()).flatten() {
            Some(direct) => direct,
            None => &self.file,
        }
    }

    /// The same open for O_DIRECT, where the file system has it. Reached through /proc, so that a
    /// renamed image stays the same one.
    fn direct(&self) -> Option<&File> {
        let open = || {
            use std::os::fd::AsRawFd;
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let mut options = File::options();
            options.read(true).write(self.writable).custom_flags(libc::O_DIRECT);
            options.open(path).ok()
        };
        self.direct.get_or_init(open).as_ref()
    }

    /// fallocate(2): preallocates, punches or zeroes, by `mode`.
    ///
    /// # Errors
    /// As the file system answers.
    pub fn allocate(&self, mode: u32, offset: u64, length: u64) -> Result<(), Errno> {
        let flags = FallocateFlags::from_bits_retain(mode);
        rustix::fs::fallocate(&self.file, flags, offset, length)
    }

    /// Sets its length in bytes.
    ///
    /// # Errors
    /// As the file system answers.
    pub fn resize(&self, length: u64) -> Result<(), Errno> {
        rustix::fs::ftruncate(&self.file, length)
    }

    /// Makes everything that was written durable; its attributes too, unless `data_only`.
    ///
    /// # Errors
    /// When the disk fails: then what was written since the last success may be lost.
    pub fn sync(&self, data_only: bool) -> Result<(), Errno> {
        if data_only { rustix::fs::fdatasync(&self.file) } else { rustix::fs::fsync(&self.file) }
    }

    /// Where the next data or hole is; `whence` is SEEK_DATA or SEEK_HOLE.
    ///
    /// # Errors
    /// `NXIO` beyond the end, `INVAL` for another `whence`.
    pub fn seek(&self, whence: u32, offset: u64) -> Result<u64, Errno> {
        let position = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        rustix::fs::seek(&self.file, position)
    }

    /// Takes QEMU's locks on the image itself for `purpose`, or more where more is held already.
    ///
    /// # Errors
    /// `BUSY` when another program has it open natively.
    pub fn guard(&self, purpose: Use) -> Result<(), Errno> {
        let mut locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        if locked.is_some_and(|held| held >= purpose) {
            return Ok(());
        }
        match image_lock::lock(&self.file, purpose) {
            Ok(true) => *locked = Some(purpose),
            Ok(false) => {
                // What was held for readers went with the attempt; it can always be had again.
                if let Some(held) = locked.take() {
                    *locked = image_lock::lock(&self.file, held).is_ok_and(|ok| ok).then_some(held);
                }
                return Err(Errno::BUSY);
            }
            Err(error) => return Err(errno(&error)),
        }
        Ok(())
    }

    /// Gives the locks back: its QEMU is about to open it natively.
    ///
    /// # Errors
    /// As the file system answers.
    pub fn unguard(&self) -> Result<(), Errno> {
        let mut locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        *locked = None;
        image_lock::unlock(&self.file).map_err(|error| errno(&error))
    }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// The directory.
pub(crate) struct Images {
    directory: OwnedFd,
    inode: u64,
    open: Mutex<HashMap<u64, Arc<Image>>>,
    /// Images whose QEMU is being swapped: it has them open natively and through the mount.
    swapping: Mutex<HashSet<OsString>>,
}

impl Images {
    /// Opens the directory at `path`.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn open(path: &Path) -> Result<Self, Errno> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        let inode = rustix::fs::fstat(&directory)?.st_ino;
        Ok(Self { directory, inode, open: Mutex::default(), swapping: Mutex::default() })
    }

    /// Whether the image `name` is being swapped: while it is, opening it takes no lock.
    pub(crate) fn set_swapping(&self, name: &OsStr, swapping: bool) {
        let mut names = self.swapping.lock().unwrap_or_else(PoisonError::into_inner);
        if swapping {
            names.insert(name.to_owned());
        } else {
            names.remove(name);
        }
    }

    fn is_swapping(&self, name: &OsStr) -> bool {
        self.swapping.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }

    fn opened(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<Image>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The attributes of `name`.
    ///
    /// # Errors
    /// `NOENT` for everything that is not a regular file of this directory.
    pub(crate) fn look_up(&self, name: &OsStr) -> Result<Attributes, Errno> {
        let stat = rustix::fs::statat(&self.directory, checked(name)?, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Errno::NOENT);
        }
        Ok(attributes_of(&stat))
    }

    /// The attributes of a node.
    ///
    /// # Errors
    /// `STALE` when no file of this directory has it any more.
    pub(crate) fn attributes(&self, node: u64) -> Result<Attributes, Errno> {
        if node == ROOT {
            let stat = rustix::fs::fstat(&self.directory)?;
            return Ok(Attributes { inode: ROOT, ..attributes_of(&stat) });
        }
        if let Some(image) = self.opened().get(&node) {
            return Ok(attributes_of(&rustix::fs::fstat(&image.file)?));
        }
        self.look_up(&self.name_of(node)?)
    }

    /// The image with this node, opened unless it is open already.
    ///
    /// # Errors
    /// `STALE` when there is none, or what opening it answers.
    pub(crate) fn image(&self, node: u64) -> Result<Arc<Image>, Errno> {
        if let Some(image) = self.opened().get(&node) {
            return Ok(Arc::clone(image));
        }
        self.open_by_name(&self.name_of(node)?, OFlags::empty(), Mode::empty())
    }

    /// Creates `name` (or opens it, unless `exclusive`) with permission bits `mode`.
    ///
    /// # Errors
    /// As open(2).
    pub(crate) fn create(
        &self,
        name: &OsStr,
        exclusive: bool,
        mode: u32,
    ) -> Result<Arc<Image>, Errno> {
        let exclusive = if exclusive { OFlags::EXCL } else { OFlags::empty() };
        self.open_by_name(name, OFlags::CREATE | exclusive, Mode::from_raw_mode(mode & 0o7777))
    }

    fn open_by_name(&self, name: &OsStr, more: OFlags, mode: Mode) -> Result<Arc<Image>, Errno> {
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | more;
        let open =
            |access| rustix::fs::openat(&self.directory, checked(name)?, flags | access, mode);
        let (file, writable) = match open(OFlags::RDWR) {
            Err(Errno::ACCESS | Errno::ROFS | Errno::PERM) => (open(OFlags::RDONLY)?, false),
            other => (other?, true),
        };
        let stat = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Errno::NOENT);
        }
        // Two that open it at once must end up with one image: its locks are the file's.
        let mut open = self.opened();
        let image = open.entry(stat.st_ino).or_insert_with(|| {
            Arc::new(Image {
                node: stat.st_ino,
                name: name.to_owned(),
                file: File::from(file),
                writable,
                direct: OnceLock::new(),
                locked: Mutex::default(),
            })
        });
        Ok(Arc::clone(image))
    }

    /// Prepares `image` for being opened with `flags` of open(2).
    ///
    /// # Errors
    /// `BUSY` when it is open natively, `ROFS` when it may not be written, `STALE` where it would be emptied past
    /// the hook.
    pub(crate) fn admit(&self, image: &Image, flags: u32) -> Result<(), Errno> {
        let writes = flags.cast_signed() & libc::O_ACCMODE != libc::O_RDONLY;
        if writes && !image.writable {
            return Err(Errno::ROFS);
        }
        if !self.is_swapping(&image.name) {
            image.guard(if writes { Use::Write } else { Use::Read })?;
        }
        match flags.cast_signed() & libc::O_TRUNC != 0 && image.length()? > 0 {
            // Created by somebody else just now. The kernel looks again, and changes the length by itself.
            true => Err(Errno::STALE),
            false => Ok(()),
        }
    }

    /// Nobody has `node` open any more: its locks are given back. It is closed, too, unless a
    /// migration still reads it.
    pub(crate) fn close(&self, node: u64) {
        let image = self.opened().remove(&node);
        if let Some(Err(errno)) = image.map(|image| image.unguard()) {
            tracing::warn!(node, %errno, "an image stays locked until it is closed");
        }
    }

    /// Deletes `name`, unless somebody `uses` its node through the mount.
    ///
    /// # Errors
    /// `BUSY` then: a server that takes over could not find it again.
    pub(crate) fn delete(&self, name: &OsStr, uses: impl Fn(u64) -> bool) -> Result<(), Errno> {
        let node = self.look_up(name)?.inode;
        if uses(node) {
            return Err(Errno::BUSY);
        }
        self.close(node);
        rustix::fs::unlinkat(&self.directory, checked(name)?, AtFlags::empty())
    }

    /// Sets a node's permission bits.
    ///
    /// # Errors
    /// As chmod(2).
    pub(crate) fn set_mode(&self, node: u64, mode: u32) -> Result<(), Errno> {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        if let Some(image) = self.opened().get(&node) {
            return rustix::fs::fchmod(&image.file, mode);
        }
        let name = self.name_of(node)?;
        rustix::fs::chmodat(&self.directory, &*name, mode, AtFlags::empty())
    }

    /// The names and nodes of all images, by name.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub(crate) fn list(&self) -> Result<Vec<(OsString, u64)>, Errno> {
        use std::os::unix::ffi::OsStrExt;
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.directory)? {
            let name = OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned();
            if let Ok(attributes) = self.look_up(&name) {
                names.push((name, attributes.inode));
            }
        }
        names.sort();
        Ok(names)
    }

    fn name_of(&self, node: u64) -> Result<OsString, Errno> {
        let found = self.list()?.into_iter().find(|(_, inode)| *inode == node);
        found.map(|(name, _)| name).ok_or(Errno::STALE)
    }

    /// Makes the directory itself durable.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn sync(&self) -> Result<(), Errno> {
        rustix::fs::fsync(&self.directory)
    }

    /// The figures of its file system.
    ///
    /// # Errors
    /// When the file system fails.
    pub(crate) fn statfs(&self) -> Result<rustix::fs::StatVfs, Errno> {
        rustix::fs::fstatvfs(&self.directory)
    }

    /// The directory's inode: what the kernel calls the root.
    #[must_use]
    pub(crate) fn inode(&self) -> u64 {
        self.inode
    }
}

/// A name that stays in the directory: one component, and neither `.` nor `..`.
fn checked(name: &OsStr) -> Result<&OsStr, Errno> {
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        (Some(std::path::Component::Normal(one)), None) if one == name => Ok(name),
        _ => Err(Errno::NOENT),
    }
}

fn attributes_of(stat: &Stat) -> Attributes {
    let unsigned = |value: i64| u64::try_from(value).unwrap_or(0);
    let time = |seconds: i64, nanos: u64| (seconds, u32::try_from(nanos).unwrap_or(0));
    Attributes {
        inode: stat.st_ino,
        size: unsigned(stat.st_size),
        blocks: unsigned(stat.st_blocks),
        times: [
            time(stat.st_atime, stat.st_atime_nsec),
            time(stat.st_mtime, stat.st_mtime_nsec),
            time(stat.st_ctime, stat.st_ctime_nsec),
        ],
        mode: stat.st_mode,
        links: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
        uid: stat.st_uid,
        gid: stat.st_gid,
        block_size: 4096,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> (tempfile::TempDir, Images) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a.raw"), vec![7; 8192]).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", directory.path().join("link")).unwrap();
        std::fs::create_dir(directory.path().join("folder")).unwrap();
        let images = Images::open(directory.path()).unwrap();
        (directory, images)
    }

    #[test]
    fn only_regular_files_of_the_directory_exist() {
        let (_directory, images) = directory();
        let names: Vec<_> = images.list().unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["a.raw"]);
        for name in ["link", "folder", "..", ".", "../a.raw", "/etc/passwd", "a.raw/", ""] {
            assert_eq!(images.look_up(OsStr::new(name)), Err(Errno::NOENT), "{name}");
            assert!(images.create(OsStr::new(name), false, 0o600).is_err(), "{name}");
        }
    }

    #[test]
    fn an_image_that_is_open_natively_for_writing_is_refused_unless_it_is_being_swapped() {
        let (directory, images) = directory();
        let native = File::options().read(true).write(true).open(directory.path().join("a.raw"));
        let native = native.unwrap();
        assert!(image_lock::lock(&native, Use::Write).unwrap());
        let node = images.look_up(OsStr::new("a.raw")).unwrap().inode;
        let image = images.image(node).unwrap();
        let write = libc::O_RDWR.cast_unsigned();
        assert_eq!(images.admit(&image, write), Err(Errno::BUSY));
        images.set_swapping(image.name(), true);
        assert_eq!(images.admit(&image, write), Ok(()));
        image_lock::unlock(&native).unwrap();
        assert_eq!(image.guard(Use::Write), Ok(()));
        assert!(!image_lock::lock(&native, Use::Write).unwrap());
    }

    #[test]
    fn an_image_in_use_is_not_deleted() {
        let (_directory, images) = directory();
        let name = OsStr::new("a.raw");
        let node = images.image(images.look_up(name).unwrap().inode).unwrap().node();
        assert_eq!(images.delete(name, |used| used == node), Err(Errno::BUSY));
        assert_eq!(images.delete(name, |_| false), Ok(()));
        assert_eq!(images.attributes(node), Err(Errno::STALE));
    }

    #[test]
    fn unaligned_access_passes_by_o_direct() {
        let (_directory, images) = directory();
        let image = images.image(images.look_up(OsStr::new("a.raw")).unwrap().inode).unwrap();
        let mut bytes = [0; 10];
        assert_eq!(image.write(true, 3, b"abc"), Ok(3));
        assert_eq!(image.read(true, 0, &mut bytes), Ok(10));
        assert_eq!(&bytes, b"\x07\x07\x07abc\x07\x07\x07\x07");
        assert_eq!(image.read(true, 8190, &mut bytes), Ok(2));
    }
}
