//! The destination's driver: applies what arrives to images that it made, and says what is applied.
//!
//! `destination.rs` runs one [`receive`] for each stream of a migration, all with the same
//! [`Received`] (`receive/streams.rs`). Versions make their order irrelevant. After an early hand-over the destination's own
//! FUSE hook shares the images, too ([`Received::readiness`], [`Received::wrote`]).
//!
//! Nothing that is there already is overwritten: images are made anew under a name of their own, and
//! what a peer sends beyond the length that it announced is an error. Deliberately not here: giving
//! the image its final name, which comes after COMMIT.

mod files;
mod maps;
mod streams;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::frame::{Frame, Kind};
use super::incoming::{Incoming, Readiness};
use super::kept::{Before, Kept, Mapped};
use super::stream::StreamError;
use crate::disk::track::{BlockSize, GeometryError};
use files::{create, map_path};

pub(super) use files::save;
pub use maps::block_hash;
pub use streams::receive;

/// Both streams of a connection begin within this time of each other, on a busy machine.
const ANNOUNCED_WITHIN: Duration = Duration::from_secs(2);

/// The longest image that is taken in, bytes: what ext4 can hold.
const LONGEST: u64 = 16 << 40;

/// Why an image cannot be received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The stream, or what came on it.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Something is in the way at the destination.
    #[error("cannot make the image {path}; if it is left from an earlier attempt, remove it")]
    Create {
        /// The disk's number.
        disk: u16,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The image cannot be written: the disk is full, or fails.
    #[error("cannot write what arrives for disk {disk}")]
    Write {
        /// The disk's number.
        disk: u16,
        /// Why.
        source: io::Error,
    },
    /// The peer names a disk that was not announced.
    #[error("the source sends something about a disk {0} that it did not announce")]
    NoSuchDisk(u16),
    /// The peer's idea of the image is impossible.
    #[error("the source announces disk {disk} with {length} bytes, which cannot be")]
    Length {
        /// The disk's number.
        disk: u16,
        /// What it said.
        length: u64,
    },
    /// It sends beyond the end.
    #[error("the source sends content beyond the end of disk {0}")]
    BeyondEnd(u16),
    /// Its blocks have an impossible size.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// Part of it is here, in other blocks.
    #[error(
        "the source has disk {disk} in blocks of {theirs} bytes, and what is here of it came in blocks of {here}: set `block_size` back in its agent.toml, or begin anew"
    )]
    OtherBlocks {
        /// The disk's number.
        disk: u16,
        /// The source's, bytes.
        theirs: u64,
        /// Those that it began with, bytes.
        here: u64,
    },
    /// It would call a copy whole of which it knows nothing.
    #[error("the source seals disk {0} without having compared it with the copy that is here")]
    NotCompared(u16),
    /// The VM is this host's: nobody else writes to its disks.
    #[error("the source still sends for disk {0}, which is this host's now")]
    Closed(u16),
}

impl ReceiveError {
    /// What the source is told: the disk and an errno. `None` when it would help nobody.
    fn for_the_source(&self) -> Option<(u16, i32)> {
        match self {
            Self::Write { disk, source } | Self::Create { disk, source, .. } => {
                Some((*disk, source.raw_os_error().unwrap_or(libc::EIO)))
            }
            // No connection after this one would do better.
            Self::OtherBlocks { disk, .. } => Some((*disk, libc::EINVAL)),
            _ => None,
        }
    }
}

/// An image that takes nothing in while this exists: for whoever has to look at it undisturbed.
pub struct Held {
    disk: Arc<Disk>,
}

impl Drop for Held {
    fn drop(&mut self) {
        *self.disk.held.0.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.disk.held.1.notify_all();
    }
}

/// Where frames for a source go.
type Answers = mpsc::UnboundedSender<Frame>;

/// Whoever sends over a connection.
struct Source {
    answers: Answers,
    /// It leaves out what it is told that the guest has overwritten.
    spares: bool,
}

struct Disk {
    /// How many hold it, and the sign that one has let go.
    held: (Mutex<usize>, Condvar),
    file: File,
    incoming: Mutex<Incoming>,
    /// The source has sealed, and all of it is durable here.
    sealed: AtomicBool,
    /// The source has asked for hashes; only a copy that was here before has to be compared.
    compared: AtomicBool,
}

impl Disk {
    fn wait_until_free(&self) {
        let mut held = self.held.0.lock().unwrap_or_else(PoisonError::into_inner);
        while *held > 0 {
            held = self.held.1.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn incoming(&self) -> MutexGuard<'_, Incoming> {
        self.incoming.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The images of one VM at its destination.
pub struct Received {
    paths: Vec<PathBuf>,
    /// What the images are called besides, by number.
    names: Vec<OsString>,
    /// Images that are there already are gone on with.
    seeded: bool,
    /// Of disks that may follow their VM: what outlives this process.
    kept: Option<Kept>,
    /// The VM runs here, or is about to: only what is missing is taken in.
    owned: AtomicBool,
    disks: Mutex<Vec<Option<Arc<Disk>>>>,
    /// A disk was announced.
    announced: Condvar,
    /// Who is asked for a block that somebody waits for.
    wants: Mutex<Vec<Source>>,
    /// Counts what has arrived, for whoever waits for a block.
    arrivals: watch::Sender<u64>,
    closed: AtomicBool,
}

impl Received {
    /// Disk N will be made at `paths[N]`, where nothing may be yet.
    #[must_use]
    pub fn new(paths: Vec<PathBuf>) -> Arc<Self> {
        Arc::new(Self::made(paths, false))
    }

    /// As [`Self::new`], but what is at one of the paths is gone on with: a copy of the same image,
    /// however old. The source has to compare hashes.
    #[must_use]
    pub fn going_on(paths: Vec<PathBuf>) -> Arc<Self> {
        Arc::new(Self::made(paths, true))
    }

    fn made(paths: Vec<PathBuf>, seeded: bool) -> Self {
        let disks = Mutex::new(paths.iter().map(|_| None).collect());
        let arrivals = watch::Sender::new(0);
        let (announced, wants, closed) = Default::default();
        let (names, kept, owned) = Default::default();
        Self { paths, names, seeded, kept, owned, disks, announced, wants, arrivals, closed }
    }

    /// Disks that may follow their VM: disk N is made at `paths[N]`, and called `names[N]` as well. A
    /// process before this one may have kept something of them: then it is gone on with.
    ///
    /// # Errors
    /// When what was kept does not belong to the images that are there.
    pub fn following(
        paths: Vec<PathBuf>,
        names: Vec<OsString>,
        kept: Kept,
        before: Before,
    ) -> io::Result<Arc<Self>> {
        let mut own = Self { names, kept: Some(kept), ..Self::made(paths, false) };
        let maps: Vec<Option<Mapped>> = match before {
            Before::Nothing => return Ok(Arc::new(own)),
            Before::Whole => own.paths.iter().map(|_| None).collect(),
            Before::Sealed(maps) => maps.into_iter().map(Some).collect(),
        };
        let paths = own.paths.iter().zip(&own.names);
        let disks = paths.zip(maps).map(|((path, name), map)| found(path, name, map));
        let disks = disks.map(|disk| disk.map(|disk| Some(Arc::new(disk))));
        own.disks = Mutex::new(disks.collect::<io::Result<_>>()?);
        own.owned = AtomicBool::new(true);
        Ok(Arc::new(own))
    }

    fn disks(&self) -> MutexGuard<'_, Vec<Option<Arc<Disk>>>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disk(&self, number: u16) -> Result<Arc<Disk>, ReceiveError> {
        let disks = self.disks();
        let disk = disks.get(usize::from(number)).and_then(Option::as_ref);
        disk.map(Arc::clone).ok_or(ReceiveError::NoSuchDisk(number))
    }

    /// Whether every disk is sealed, and durable here: only then may this side promise to run the VM.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        let is_sealed = |disk: &Option<Arc<Disk>>| {
            disk.as_ref().is_some_and(|disk| disk.sealed.load(Ordering::SeqCst))
        };
        self.disks().iter().all(is_sealed)
    }

    /// The VM is about to run here with all of its disks: whatever a source still sends is refused
    /// once this returns.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        // Whoever looked before that still holds this.
        self.disks().iter().flatten().for_each(|disk| drop(disk.incoming()));
    }

    /// Whether nothing more is taken in.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// The VM is about to run here, and what is missing follows it: from now on nothing else is taken
    /// in.
    pub fn own(&self) {
        self.owned.store(true, Ordering::SeqCst);
        // As in `close`.
        self.disks().iter().flatten().for_each(|disk| drop(disk.incoming()));
    }

    /// Whether the VM is this host's.
    #[must_use]
    pub fn is_owned(&self) -> bool {
        self.owned.load(Ordering::SeqCst)
    }

    /// Nothing is missing any more: makes that durable, and forgets what was kept for the way there.
    /// `false`: something is missing.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn settle(&self) -> Result<bool, ReceiveError> {
        if self.missing() > 0 || !self.is_owned() {
            return Ok(false);
        }
        for (number, disk) in self.disks().iter().flatten().enumerate() {
            let failed = |source| ReceiveError::Write { disk: number as u16, source };
            disk.file.sync_all().map_err(failed)?;
        }
        if let Some(kept) = &self.kept {
            kept.settle().map_err(|source| ReceiveError::Write { disk: 0, source })?;
        }
        Ok(true)
    }

    /// What only a source says whose VM it is.
    fn must_not_be_owned(&self, number: u16) -> Result<(), ReceiveError> {
        match self.is_owned() {
            true => Err(ReceiveError::Closed(number)),
            false => Ok(()),
        }
    }

    fn must_be_open(&self, number: u16) -> Result<(), ReceiveError> {
        match self.is_closed() {
            true => Err(ReceiveError::Closed(number)),
            false => Ok(()),
        }
    }

    /// Bytes of the images that are there by now: what their files take.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let blocks = |disk: &Arc<Disk>| disk.file.metadata().map_or(0, |data| data.blocks());
        self.disks().iter().flatten().map(|disk| blocks(disk) * 512).sum()
    }

    /// Changes whenever something has arrived.
    #[must_use]
    pub fn arrivals(&self) -> watch::Receiver<u64> {
        self.arrivals.subscribe()
    }

    /// The number of the disk that was made as `name`.
    #[must_use]
    pub fn number_of(&self, name: &OsStr) -> Option<u16> {
        let number = self.paths.iter().position(|path| path.file_name() == Some(name));
        let number = number.or_else(|| self.names.iter().position(|own| own == name))?;
        u16::try_from(number).ok()
    }

    /// Makes disk `number` durable: while blocks are missing, with its map beside it
    /// ([`Incoming::save`], under the image's name with `.missing` added).
    ///
    /// # Errors
    /// When there is no such disk, or it cannot be written.
    pub fn make_durable(&self, number: u16) -> Result<(), ReceiveError> {
        let disk = self.disk(number)?;
        let failed = |source| ReceiveError::Write { disk: number, source };
        if let Some(kept) = &self.kept {
            // The map first, as below. One that is kept says that the disk was sealed, so QEMU, which
            // flushes as it starts, must not make one before that.
            if disk.sealed.load(Ordering::SeqCst) {
                kept.save(number, || disk.incoming().save()).map_err(failed)?;
            }
            return disk.file.sync_data().map_err(failed);
        }
        let map = {
            let incoming = disk.incoming();
            (incoming.missing() > 0).then(|| incoming.save())
        };
        if let Some(map) = map {
            // The map before the content: a write that the map does not know would be lost to a
            // block that arrives after a crash; one that it knows and that did not land was not
            // promised to anybody.
            save(&map_path(&self.paths[usize::from(number)]), &map).map_err(failed)?;
        }
        disk.file.sync_data().map_err(failed)
    }

    /// What a read of this side's guest has to wait for; the blocks that nobody has asked for are
    /// asked for.
    ///
    /// # Errors
    /// When there is no such disk.
    pub fn readiness(&self, disk: u16, range: &Range<u64>) -> Result<Readiness, ReceiveError> {
        let own = self.disk(disk)?;
        let mut incoming = own.incoming();
        let readiness = incoming.readiness(range);
        if let Readiness::Missing { ask, .. } = &readiness {
            for block in ask {
                let range = incoming.block().range(*block, incoming.length());
                let length = range.end - range.start;
                // Without a connection it is asked for again once there is one.
                self.tell(&Frame { offset: range.start, length, ..Frame::new(Kind::Want, disk) });
            }
        }
        Ok(readiness)
    }

    /// What was asked for may be lost: whoever reads it next asks again.
    pub fn ask_again(&self) {
        self.disks().iter().flatten().for_each(|disk| disk.incoming().forget_questions());
    }

    /// This side's guest writes `range`: call before the write lands, and [`Self::ended`] when it has or has failed.
    ///
    /// # Errors
    /// When there is no such disk.
    pub fn wrote(&self, disk: u16, range: &Range<u64>) -> Result<(), ReceiveError> {
        let own = self.disk(disk)?;
        if let Some(kept) = &self.kept {
            kept.note(disk, range).map_err(|source| ReceiveError::Write { disk, source })?;
        }
        own.incoming().begins(range);
        Ok(())
    }

    /// A write of this side's guest is over. What it has overwritten as a `whole` need not come any more, and
    /// whoever sends is told.
    ///
    /// # Errors
    /// When there is no such disk.
    pub fn ended(&self, disk: u16, range: &Range<u64>, whole: bool) -> Result<(), ReceiveError> {
        let own = self.disk(disk)?;
        let mut incoming = own.incoming();
        let awaited = incoming.ended(range);
        let blocks = if whole { incoming.landed(range) } else { vec![] };
        // They are neighbours, but for those that had come already.
        if let (Some(first), Some(last)) = (blocks.first(), blocks.last()) {
            let (size, length) = (incoming.block(), incoming.length());
            let offset = size.range(*first, length).start;
            let length = size.range(*last, length).end - offset;
            self.tell(&Frame { offset, length, ..Frame::new(Kind::Overwritten, disk) });
        }
        drop(incoming);
        if awaited || !blocks.is_empty() {
            self.arrivals.send_modify(|count| *count = count.wrapping_add(1));
        }
        Ok(())
    }

    /// Says it to whoever sends: whichever is still alive, and what comes twice is applied once.
    fn tell(&self, frame: &Frame) {
        let wants = self.wants.lock().unwrap_or_else(PoisonError::into_inner);
        let heeds = |source: &&Source| frame.kind != Kind::Overwritten || source.spares;
        wants.iter().filter(heeds).for_each(|source| drop(source.answers.send(frame.clone())));
    }

    /// Blocks that are missing, of all disks.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.disks().iter().flatten().map(|disk| disk.incoming().missing()).sum()
    }

    /// The same, in bytes of whole blocks.
    #[must_use]
    pub fn missing_bytes(&self) -> u64 {
        let bytes = |disk: &Arc<Disk>| {
            let incoming = disk.incoming();
            incoming.missing() * incoming.block().bytes()
        };
        self.disks().iter().flatten().map(bytes).sum()
    }

    /// The blocks in which they come; `None` before the first has been announced.
    #[must_use]
    pub fn block(&self) -> Option<BlockSize> {
        self.disks().iter().flatten().next().map(|disk| disk.incoming().block())
    }

    /// Lets nothing be applied to disk `number` until the answer is dropped: `verify` compares both
    /// sides meanwhile. The source waits; longer than its deadline, and it falls out of step.
    ///
    /// # Errors
    /// When there is no such disk.
    pub fn hold(&self, number: u16) -> Result<Held, ReceiveError> {
        let disk = self.disk(number)?;
        *disk.held.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Ok(Held { disk })
    }

    /// The connection of `answers` is gone. What it was asked for is asked of another one, if there is one.
    fn stop_wanting(&self, answers: &Answers) {
        let others = {
            let mut wants = self.wants.lock().unwrap_or_else(PoisonError::into_inner);
            wants.retain(|source| !source.answers.same_channel(answers));
            !wants.is_empty()
        };
        if others {
            self.ask_again();
            self.arrivals.send_modify(|count| *count = count.wrapping_add(1));
        }
    }

    fn announce(&self, frame: &Frame) -> Result<(), ReceiveError> {
        let (number, length) = (frame.disk, frame.length);
        let mut disks = self.disks();
        let slot = disks.get_mut(usize::from(number)).ok_or(ReceiveError::NoSuchDisk(number))?;
        if let Some(disk) = slot {
            // The source has come back, or another one. Whoever waits for a block asks again.
            let mut incoming = disk.incoming();
            incoming.forget_questions();
            let (theirs, here) = (frame.offset, incoming.block().bytes());
            // Where nothing is missing any more nobody counts in blocks.
            let is_whole = self.is_owned() && incoming.missing() == 0;
            return match theirs == here || is_whole {
                true => Ok(()),
                false => Err(ReceiveError::OtherBlocks { disk: number, theirs, here }),
            };
        }
        self.must_be_open(number)?;
        if length > LONGEST {
            return Err(ReceiveError::Length { disk: number, length });
        }
        let block = BlockSize::new(frame.offset)?;
        let path = self.paths[usize::from(number)].clone();
        let file = create(&path, length, self.seeded);
        let failed = |source| ReceiveError::Create { disk: number, path, source };
        let file = file.map_err(failed)?;
        let incoming = Mutex::new(Incoming::new(block, length));
        let (held, sealed) = Default::default();
        let compared = AtomicBool::new(!self.seeded);
        *slot = Some(Arc::new(Disk { held, file, incoming, sealed, compared }));
        self.announced.notify_all();
        Ok(())
    }

    /// Blocks come over a stream of their own, and may overtake the announcement on the other.
    fn wait_until_announced(&self, number: u16) {
        let is_missing = |disks: &mut Vec<Option<Arc<Disk>>>| {
            disks.get(usize::from(number)).is_some_and(Option::is_none)
        };
        // Still missing then: whoever asks for it says so.
        drop(self.announced.wait_timeout_while(self.disks(), ANNOUNCED_WITHIN, is_missing));
    }
}

/// A disk of which a process before us has kept `map`; without one, all of it is there.
fn found(path: &Path, name: &OsStr, map: Option<Mapped>) -> io::Result<Disk> {
    use std::os::unix::fs::OpenOptionsExt;
    // It may have its last name only.
    let path = if path.exists() { path.to_owned() } else { path.with_file_name(name) };
    let mut how = File::options();
    let file = how.read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    let length = file.metadata()?.len();
    let incoming = match map {
        Some((map, written)) => {
            let mut incoming = Incoming::load(&map, length).map_err(io::Error::other)?;
            written.iter().for_each(|range| incoming.wrote(range));
            incoming
        }
        None => {
            let mut incoming = Incoming::new(BlockSize::default(), length);
            incoming.seal(&[]);
            incoming
        }
    };
    let (sealed, compared) = (AtomicBool::new(true), AtomicBool::new(true));
    let held = Default::default();
    Ok(Disk { held, file, incoming: Mutex::new(incoming), sealed, compared })
}
