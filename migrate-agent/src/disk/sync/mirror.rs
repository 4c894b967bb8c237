//! The hook in the source's FUSE layer: notes what a VM changes, and in the synchronous phase sends it.
//!
//! There a flush is answered when both sides have it, and a write when it has landed here and is on its
//! way, as long as little is: what is on its way is waited for at the seal, which is what the phase is
//! for (docs/decisions/0050). Beyond that a write waits for its own acknowledgement.
//!
//! The FUSE server's threads call it; `send` reads its maps and arms it. One for each migration, with
//! all disks of the VM.
//!
//! # One after the other, where writes overlap
//!
//! A write gets its version after it has landed here and before it is answered; two that overlap do
//! this one after the other. So the newer version is what the local disk holds, too, whatever order
//! the kernel chose. Writes that do not overlap never wait for each other.
//!
//! # The switch between marking and sending
//!
//! Which of both happens is read under a lock that arming takes for writing. So once
//! [`Mirror::arm`] returns, every earlier write is marked and every later one is sent.
//!
//! Deliberately not here: which blocks are sent when, and the wire.

use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::Duration;

use rustix::io::Errno;
use tokio::sync::{mpsc, watch};

use super::frame::{Frame, Kind};
use super::ledger::{Ledger, Pending};
use crate::clock;
use crate::disk::fuse::{Expiry, Hook, Image, Op, Request};
use crate::disk::track::{Activity, BlockSize, DirtyMap, SegmentSize};

/// No answer for so long ends the synchronous phase (notes on the hand-over: QMP must stay alive).
pub const DEADLINE: Duration = Duration::from_secs(1);

/// What is known of one disk.
#[derive(Debug)]
pub struct Disk {
    name: OsString,
    /// Blocks that the destination does not have as they are here.
    pub dirty: DirtyMap,
    /// How busy its segments are.
    pub activity: Activity,
}

impl Disk {
    /// Whether its maps go as far as byte `end` of the image.
    fn reaches(&self, end: u64) -> bool {
        self.dirty.reaches(end) && self.activity.reaches(end)
    }
}

#[derive(Debug)]
enum Mode {
    /// Changes are marked.
    Marking,
    /// Changes go to both sides.
    Mirroring(mpsc::UnboundedSender<Frame>),
    /// Nothing may change: the destination may be running the VM.
    Sealed,
}

/// The hook.
pub struct Mirror {
    disks: Vec<Disk>,
    mode: RwLock<Mode>,
    /// Whether it is mirroring, for whoever has to do something then.
    mirroring: watch::Sender<bool>,
    landing: Landing,
    ledger: Arc<Ledger<Request>>,
    deadline: Duration,
    /// Bytes of guests' writes that may be on their way while nobody waits for them.
    window: AtomicU64,
    broken: watch::Sender<bool>,
    /// The VM is this host's for good: nothing is sent or sealed any more.
    retired: AtomicBool,
    /// Bytes that guests have changed.
    written: AtomicU64,
}

impl Mirror {
    /// For disks of these names and lengths (bytes).
    #[must_use]
    pub fn new(
        disks: &[(&OsStr, u64)],
        block: BlockSize,
        segment: SegmentSize,
        deadline: Duration,
    ) -> Self {
        let disk = |(name, length): &(&OsStr, u64)| Disk {
            name: (*name).to_owned(),
            dirty: DirtyMap::new(block, *length),
            activity: Activity::new(segment, *length),
        };
        Self {
            disks: disks.iter().map(disk).collect(),
            mode: RwLock::new(Mode::Marking),
            mirroring: watch::Sender::new(false),
            landing: Landing::default(),
            ledger: Arc::default(),
            deadline,
            window: AtomicU64::new(0),
            broken: watch::Sender::new(false),
            retired: AtomicBool::new(false),
            written: AtomicU64::new(0),
        }
    }

    /// The disks, by number.
    #[must_use]
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// What is on its way.
    #[must_use]
    pub fn ledger(&self) -> &Arc<Ledger<Request>> {
        &self.ledger
    }

    /// Becomes true when a write was not answered in time; [`Self::arm`] makes it false.
    #[must_use]
    pub fn broken(&self) -> watch::Receiver<bool> {
        self.broken.subscribe()
    }

    /// So many bytes of writes may be on their way, answered: none at first.
    pub fn set_window(&self, bytes: u64) {
        self.window.store(bytes, Ordering::Relaxed);
    }

    /// Falls out of step if a write that was answered has not been acknowledged by the deadline.
    pub fn look_at_the_oldest(&self) {
        let late = |age: &Duration| *age > self.deadline;
        if let Some(age) = self.ledger.ahead_for().filter(late) {
            tracing::warn!(?age, "a write on its way was not acknowledged in time");
            self.fall_back();
        }
    }

    /// From now on changes are sent to `frames`.
    pub fn arm(&self, frames: mpsc::UnboundedSender<Frame>) {
        self.broken.send_replace(false);
        self.set(Mode::Mirroring(frames));
    }

    /// Bytes that guests have written so far.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Whether changes are sent.
    #[must_use]
    pub fn is_mirroring(&self) -> bool {
        *self.mirroring.borrow()
    }

    /// The same, as it changes.
    #[must_use]
    pub fn mirroring(&self) -> watch::Receiver<bool> {
        self.mirroring.subscribe()
    }

    /// From now on changes are marked only.
    pub fn disarm(&self) {
        self.set(Mode::Marking);
    }

    /// From now on changes fail.
    pub fn seal(&self) {
        self.set(Mode::Sealed);
    }

    /// From now on changes fail, if they went to both sides until now.
    #[must_use]
    pub fn seal_in_step(&self) -> bool {
        let mut mode = self.mode.write().unwrap_or_else(PoisonError::into_inner);
        let in_step = matches!(*mode, Mode::Mirroring(_));
        if in_step {
            *mode = Mode::Sealed;
            self.mirroring.send_replace(false);
        }
        in_step
    }

    /// From now on changes are marked only, whatever a task that has not noticed its end yet still
    /// asks for: the VM stays at this host.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::SeqCst);
        self.disarm();
    }

    fn set(&self, mode: Mode) {
        let mut now = self.mode.write().unwrap_or_else(PoisonError::into_inner);
        // Looked at under the lock: who was late sees it, or is overwritten by `retire`.
        *now = if self.retired.load(Ordering::SeqCst) { Mode::Marking } else { mode };
        self.mirroring.send_replace(matches!(*now, Mode::Mirroring(_)));
    }

    /// Everything that is on its way counts as dirty again, and is answered.
    pub fn give_up(&self) {
        for pending in self.ledger.give_up() {
            if let Some(disk) = self.disks.get(usize::from(pending.disk)) {
                disk.dirty.mark(&pending.range);
            }
        }
    }

    /// Deadlines have passed, or the connection is gone.
    fn fall_back(&self) {
        self.disarm();
        self.broken.send_replace(true);
    }

    fn disk(&self, image: &Image) -> Option<(u16, &Disk)> {
        let number = self.disks.iter().position(|disk| disk.name == image.name())?;
        Some((u16::try_from(number).ok()?, &self.disks[number]))
    }

    fn change(&self, number: u16, disk: &Disk, range: Range<u64>, request: Request) {
        if matches!(*self.mode.read().unwrap_or_else(PoisonError::into_inner), Mode::Sealed) {
            request.fail(Errno::IO);
            return;
        }
        let _landing = self.landing.enter(number, &range);
        let outcome = request.perform();
        // Asked only where it may be a new one: it is a system call, and most writes come here.
        if !disk.reaches(range.end) {
            let length = request.image().length().unwrap_or(range.end);
            disk.dirty.grow(length);
            disk.activity.grow(length);
        }
        disk.activity.write(&range);
        if let Op::Write { length, .. } = request.op() {
            self.written.fetch_add(length, Ordering::Relaxed);
        }
        // A failed write may have changed anything within its range.
        let mirrors = outcome.is_ok() && !disk.dirty.is_dirty(&range);
        match &*self.mode.read().unwrap_or_else(PoisonError::into_inner) {
            Mode::Mirroring(frames) if mirrors || matches!(request.op(), Op::Resize { .. }) => {
                self.send(frames, number, range, request);
            }
            // It landed while the seal was set: whoever wrote it must not believe in it.
            Mode::Sealed => {
                disk.dirty.mark(&range);
                request.fail(Errno::IO);
            }
            Mode::Marking | Mode::Mirroring(_) => {
                disk.dirty.mark(&range);
                request.answer();
            }
        }
    }

    /// Sends a change that has landed here, and answers it now or when it is acknowledged.
    fn send(
        &self,
        frames: &mpsc::UnboundedSender<Frame>,
        disk: u16,
        range: Range<u64>,
        request: Request,
    ) {
        let image = Arc::clone(request.image());
        let length = || image.length().unwrap_or(range.end);
        let (kind, range, payload) = match request.op() {
            Op::Write { .. } => (Kind::Data, range.clone(), request.data()),
            Op::Allocate { mode, .. } if is_zeroing(mode) => {
                (Kind::Zeroes, range.start..range.end.min(length()), vec![])
            }
            Op::Flush { .. } => (Kind::Flush, 0..0, vec![]),
            // Space that is set aside: no content, but perhaps a new length.
            Op::Resize { .. } | Op::Allocate { .. } | Op::Read { .. } => {
                (Kind::Resize, 0..0, vec![])
            }
        };
        // Answered by its deadline before it got here, or nothing to change within the image.
        let carries = matches!(kind, Kind::Data | Kind::Zeroes);
        if carries && (range.is_empty() || kind == Kind::Data && payload.is_empty()) {
            return;
        }
        let bytes = payload.len() as u64;
        let window = if carries { self.window.load(Ordering::Relaxed) } else { 0 };
        let (version, answered) =
            match self.ledger.enter_ahead((disk, range.clone()), bytes, window) {
                Some(version) => (version, Some(request)),
                // A flush promises something of all before it.
                None => {
                    request.set_deadline(clock::now() + self.deadline);
                    let range = range.clone();
                    let pending = Pending { disk, range, bytes, waiting: Some(request) };
                    (self.ledger.enter(pending), None)
                }
            };
        let settled = self.ledger.settled();
        // After its version: what makes the image longer meanwhile gets a later one.
        let offset = if kind == Kind::Resize { length() } else { range.start };
        let (length, payload) = (range.end - range.start, payload.into());
        let frame = Frame { version, settled, offset, length, payload, ..Frame::new(kind, disk) };
        if frames.send(frame).is_err() {
            // Nobody sends any more: the deadline would come to the same.
            self.broken.send_replace(true);
        }
        answered.into_iter().for_each(Request::answer);
    }
}

impl Hook for Mirror {
    fn arrived(&self, request: Request) {
        let image = Arc::clone(request.image());
        let Some((number, disk)) = self.disk(&image) else { return request.answer() };
        match request.op() {
            Op::Read { offset, length } => {
                disk.activity.read(&(offset..offset.saturating_add(length)));
                request.answer();
            }
            Op::Flush { .. } => {
                if request.perform().is_err() {
                    return request.answer();
                }
                match &*self.mode.read().unwrap_or_else(PoisonError::into_inner) {
                    Mode::Mirroring(frames) => self.send(frames, number, 0..0, request),
                    Mode::Marking | Mode::Sealed => request.answer(),
                }
            }
            op => match op.changes() {
                Some(range) => self.change(number, disk, range, request),
                None => request.answer(),
            },
        }
    }

    fn expired(&self, image: &Image, op: &Op) -> Expiry {
        if let (Some((_, disk)), Some(range)) = (self.disk(image), op.changes()) {
            disk.dirty.mark(&range);
        }
        self.fall_back();
        Expiry::Answer
    }
}

/// Does fallocate(2) with this mode leave zeroes?
pub(super) fn is_zeroing(mode: u32) -> bool {
    mode.cast_signed() & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0
}

/// Ranges whose writes are landing; overlapping ones wait for each other. It is a wait for the local
/// disk, never for the network.
#[derive(Default)]
struct Landing {
    ranges: Mutex<Ranges>,
    left: Condvar,
}

#[derive(Default)]
struct Ranges {
    taken: Vec<(u16, Range<u64>)>,
    /// Threads that wait; waking nobody would enter the kernel all the same, with each write.
    waiting: usize,
}

struct Landed<'a> {
    landing: &'a Landing,
    range: (u16, Range<u64>),
}

impl Landing {
    fn enter(&self, disk: u16, range: &Range<u64>) -> Landed<'_> {
        let overlaps = |(other, taken): &(u16, Range<u64>)| {
            *other == disk && taken.start < range.end && range.start < taken.end
        };
        let mut ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        while ranges.taken.iter().any(overlaps) {
            ranges.waiting += 1;
            ranges = self.left.wait(ranges).unwrap_or_else(PoisonError::into_inner);
            ranges.waiting -= 1;
        }
        ranges.taken.push((disk, range.clone()));
        Landed { landing: self, range: (disk, range.clone()) }
    }
}

impl Drop for Landed<'_> {
    fn drop(&mut self) {
        let mut ranges = self.landing.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = ranges.taken.iter().position(|range| *range == self.range) {
            ranges.taken.swap_remove(index);
        }
        let waited_for = ranges.waiting > 0;
        drop(ranges);
        if waited_for {
            self.landing.left.notify_all();
        }
    }
}
