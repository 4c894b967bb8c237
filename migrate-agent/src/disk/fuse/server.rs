//! A FUSE server: mounts or takes over a mount, and serves it with several threads.
//!
//! The disk process (`lifeboat-disk`) and tests use it. A mount belongs to one migration, so its
//! limit is one VM's, which all of its mounts share.
//!
//! ```text
//!   kernel --> threads: read into a slot, serve() --> limit --> hook --> image --> reply
//!                                                       '--- later (due) ---'
//! ```
//!
//! A server that ends without [`Server::unmount`] leaves the mount to whoever holds its device and
//! memory (`holder`): requests wait in the kernel until a new one takes over.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::image_lock::Use;
use super::images::{Image, Images};
use super::later::Later;
use super::limit::DiskLimit;
use super::memory::{MAX_DATA, Memory, MemoryError, Slot};
use super::readers::Readers;
use super::request::Hook;
use super::serve::{close_if_unused, is_done, serve};

/// Requests that may be held at a time, each with its 1 MiB of memory once it was needed.
const SLOTS: usize = 64;
/// Threads that read requests and do them: a queue of depth 16, and some to spare. `readers` says how
/// many of them wait. docs/disks.md has what fewer cost.
const THREADS: usize = 20;
/// Threads for what is done later.
const LATER_THREADS: usize = 2;

/// Why a mount cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The directory with the images cannot be opened.
    #[error("cannot open the directory of images {path}")]
    Images {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Errno,
    },
    /// There is no /dev/fuse.
    #[error("cannot open /dev/fuse: is the kernel's module `fuse` loaded?")]
    Device(#[source] Errno),
    /// Mounting is refused.
    #[error("cannot mount at {path}: it takes an empty directory and CAP_SYS_ADMIN")]
    Mount {
        /// Where.
        path: PathBuf,
        /// Why.
        source: Errno,
    },
    /// The memory for requests.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A thread cannot be started.
    #[error("this machine has no thread left for the FUSE server")]
    Threads(#[from] io::Error),
    /// An image that is open through the mount cannot be opened again.
    #[error("the images that were open through the mount cannot be opened again")]
    Reopen(#[source] Errno),
}

/// What the threads of a server share.
pub(super) struct Shared {
    pub(super) device: OwnedFd,
    pub(super) memory: Memory,
    pub(super) images: Images,
    pub(super) hook: Arc<dyn Hook>,
    pub(super) later: Later,
    /// Held while an image is opened or closed through the mount. Otherwise one that is closed by
    /// its last user could be opened a second time before its locks are given back.
    pub(super) opening: Mutex<()>,
    pub(super) limit: DiskLimit,
    readers: Readers,
}

/// A server that runs. Dropping this does not end it: it serves until the mount is gone.
pub struct Server {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Mounts the images of `directory` at `mount_point` and serves them.
    ///
    /// # Errors
    /// When the directory, the device or the mount cannot be had.
    pub fn mount(
        directory: &Path,
        mount_point: &Path,
        hook: Arc<dyn Hook>,
    ) -> Result<Self, ServeError> {
        Self::mount_within(directory, mount_point, hook, DiskLimit::start()?)
    }

    /// The same, within a limit that others may share.
    ///
    /// # Errors
    /// As [`Self::mount`].
    pub fn mount_within(
        directory: &Path,
        mount_point: &Path,
        hook: Arc<dyn Hook>,
        limit: DiskLimit,
    ) -> Result<Self, ServeError> {
        let images = open_images(directory)?;
        let memory = Memory::create(SLOTS)?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let device = rustix::fs::open("/dev/fuse", flags, Mode::empty());
        let device = device.map_err(ServeError::Device)?;
        mount_device(&device, mount_point)?;
        match Self::start(device, memory, images, (hook, limit)) {
            Ok(server) => Ok(server),
            Err(error) => {
                let _ = unmount(mount_point);
                Err(error)
            }
        }
    }

    /// Goes on where a server has ended, with the device and memory that it left: requests that it
    /// had begun are done, or only answered where it had done them. Nobody else may be serving them.
    ///
    /// # Errors
    /// When the memory is not ours, or an image that was open is gone or open natively by another.
    pub fn take_over(
        directory: &Path,
        device: OwnedFd,
        memory: OwnedFd,
        hook: Arc<dyn Hook>,
        limit: DiskLimit,
    ) -> Result<Self, ServeError> {
        let images = open_images(directory)?;
        let (memory, unanswered) = Memory::attach(memory)?;
        for file in memory.open_files() {
            let image = images.image(file.node).map_err(ServeError::Reopen)?;
            let writes = file.flags.cast_signed() & libc::O_ACCMODE != libc::O_RDONLY;
            // A QEMU that is half way through a swap still has its own lock; the swap locks at
            // its end. Anyone else was refused when the first server still held the lock.
            if let Err(errno) = image.guard(if writes { Use::Write } else { Use::Read }) {
                tracing::warn!(image = ?image.name(), %errno, "not locked after the takeover");
            }
        }
        let server = Self::start(device, memory, images, (hook, limit))?;
        for slot in unanswered {
            tracing::info!(done = is_done(&slot), "a request of the server before");
            serve(&server.shared, slot, true);
        }
        Ok(server)
    }

    fn start(
        device: OwnedFd,
        memory: Memory,
        images: Images,
        (hook, limit): (Arc<dyn Hook>, DiskLimit),
    ) -> Result<Self, ServeError> {
        let later = Later::start(LATER_THREADS)?;
        let opening = Mutex::default();
        let readers = Readers::default();
        let shared =
            Arc::new(Shared { device, memory, images, hook, later, opening, limit, readers });
        let start = |number: usize| {
            let own = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(format!("fuse-{number}"));
            thread.spawn(move || read_and_serve(&own))
        };
        let threads = (0..THREADS).map(start).collect::<io::Result<Vec<_>>>()?;
        Ok(Self { shared, threads })
    }

    /// The device and the memory, for whoever shall outlive this process.
    #[must_use]
    pub fn parts(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        (self.shared.device.as_fd(), self.shared.memory.file())
    }

    /// An image by name.
    ///
    /// # Errors
    /// `NOENT` when there is none.
    pub fn image(&self, name: &OsStr) -> Result<Arc<Image>, Errno> {
        let node = self.shared.images.look_up(name)?.inode;
        self.shared.images.image(node)
    }

    /// A QEMU is about to be swapped onto the mount or away from it: until [`Self::end_swap`] the
    /// image may be open natively and through the mount.
    ///
    /// # Errors
    /// `NOENT` when there is no such image.
    pub fn begin_swap(&self, name: &OsStr) -> Result<(), Errno> {
        let image = self.image(name)?;
        self.shared.images.set_swapping(name, true);
        image.unguard()
    }

    /// The swap is over. An image that is used through the mount now (`on_mount`) is locked again; one
    /// that is not is its QEMU's own affair. The caller knows, and only he: the kernel tells us late
    /// that a file was closed.
    ///
    /// # Errors
    /// `BUSY` when another program has opened it natively meanwhile.
    pub fn end_swap(&self, name: &OsStr, on_mount: bool) -> Result<(), Errno> {
        self.shared.images.set_swapping(name, false);
        if on_mount {
            return self.image(name)?.guard(Use::Write);
        }
        let _alone = self.shared.opening.lock().unwrap_or_else(PoisonError::into_inner);
        close_if_unused(&self.shared, self.shared.images.look_up(name)?.inode);
        Ok(())
    }

    /// What holds changes of the images down, for whoever sets it.
    #[must_use]
    pub fn limit(&self) -> DiskLimit {
        self.shared.limit.clone()
    }

    /// Unmounts, once nobody has an image open, and ends the threads.
    ///
    /// # Errors
    /// `BUSY` while an image is open through the mount; then it is served on.
    pub fn unmount(&mut self, mount_point: &Path) -> Result<(), Errno> {
        rustix::mount::unmount(mount_point, UnmountFlags::empty())?;
        self.join();
        Ok(())
    }

    /// Waits until the mount is gone.
    pub fn join(&mut self) {
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.shared.later.end();
    }
}

/// Detaches a mount, whoever serves it; it goes when the last user has closed its files.
///
/// # Errors
/// When nothing is mounted there.
pub fn unmount(mount_point: &Path) -> Result<(), Errno> {
    rustix::mount::unmount(mount_point, UnmountFlags::DETACH)
}

fn open_images(directory: &Path) -> Result<Images, ServeError> {
    let failed = |source| ServeError::Images { path: directory.to_owned(), source };
    Images::open(directory).map_err(failed)
}

fn mount_device(device: &OwnedFd, mount_point: &Path) -> Result<(), ServeError> {
    // The permission bits of the images hold for whoever opens them (QEMU runs as another user).
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={MAX_DATA}",
        device.as_raw_fd()
    );
    let options = std::ffi::CString::new(options).unwrap_or_default();
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("lifeboat", mount_point, "fuse.lifeboat", flags, &*options)
        .map_err(|source| ServeError::Mount { path: mount_point.to_owned(), source })
}

/// What each thread does until the mount is gone.
fn read_and_serve(server: &Arc<Shared>) {
    while server.readers.enter() {
        let Some(slot) = next(server) else { return server.readers.end() };
        server.readers.leave();
        serve(server, slot, false);
        server.readers.done();
    }
}

/// Waits for a request; `None` when the mount is gone.
fn next(server: &Shared) -> Option<Slot> {
    let mut slot = server.memory.claim();
    loop {
        match rustix::io::read(&server.device, slot.request_mut()) {
            Ok(0) | Err(Errno::NODEV) => return None,
            Ok(_) => return Some(slot),
            // NOENT: the request was called off before we had it.
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => {}
            Err(errno) => {
                tracing::error!(%errno, "cannot read FUSE requests");
                return None;
            }
        }
    }
}
