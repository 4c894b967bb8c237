//! What the source's driver does beside listening: passes over dirty blocks, the seal, the rest.
//!
//! `send` starts one at a time and hears of its end. Each is a plain sentence over [`Work`].
//!
//! # Stopping and breaking off
//!
//! A pass that is *stopped* ends between two blocks. One that is *broken off* (the connection is
//! gone) may be anywhere; nothing is lost by it, because a block whose bit was taken is in the ledger
//! before anything is awaited, and what is in the ledger gets marked again.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use tokio::io::AsyncWrite;
use tokio::sync::mpsc;

use super::blocks::{self, Pace};
use super::frame::{Frame, HEADER, Kind, encode_runs};
use super::heat::{Heat, Place};
use super::ledger::Pending;
use super::mirror::Mirror;
use super::rank::{SegmentOrder, Strategy};
use super::send::Choice;
use super::stream::{FrameWriter, StreamError};
use super::versions::Version;
use crate::clock;
use crate::disk::fuse::Image;

/// Bytes that may be on their way: a window for 1 Gbit/s at 60 ms.
const WINDOW: u64 = 8 << 20;
/// Bytes from one flush of a pass to the next.
const FLUSH_EVERY: u64 = 32 << 20;
/// In step blocks leave this part of the rate unused.
const IN_STEP_SPARED: u64 = 9;
/// What is read and sent at once at most where somebody waits behind it: a write in step, a read at the
/// destination. Bytes.
const SHORT_RUN: u64 = 64 << 10;

/// Why a pass ended before its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum PassError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("block {block} of disk {disk} cannot be read")]
    Read { disk: u16, block: u64, source: Errno },
}

/// What passes work on.
pub(super) struct Work<W> {
    pub(super) mirror: Arc<Mirror>,
    pub(super) images: Vec<Arc<Image>>,
    pub(super) orders: Mutex<Vec<SegmentOrder>>,
    pub(super) choice: Choice,
    pub(super) heat: Mutex<Heat>,
    pub(super) pace: Arc<Pace>,
    pub(super) bulk: tokio::sync::Mutex<FrameWriter<W>>,
    pub(super) control: mpsc::UnboundedSender<Frame>,
    pub(super) stopped: AtomicBool,
    /// Blocks that the destination's guest waits for.
    pub(super) wanted: Mutex<VecDeque<(u16, u64)>>,
}

impl<W: AsyncWrite + Unpin> Work<W> {
    /// Sends every block that is dirty and goes before the hand-over, and waits until they are
    /// acknowledged.
    pub(super) async fn pass(&self) -> Result<Passed, PassError> {
        self.announce_lengths();
        let (mut last, mut unflushed, mut sent) = (Version(0), 0, 0);
        let mut turns = Turns { waiting: self.places(false), looked_after: None };
        turns.waiting.reverse();
        while let Some(place) = self.next_turn(&mut turns, sent) {
            let (disk, range) = (place.0, self.blocks_at(place));
            let mut at = range.start;
            while !self.stopped.load(Ordering::Acquire) {
                let Some(run) = self.send_run(disk, at..range.end, self.at_once(disk)).await?
                else {
                    break;
                };
                at = run.end;
                let Some(version) = run.version else { continue };
                last = version;
                sent += run.blocks;
                unflushed += run.bytes;
                if unflushed >= FLUSH_EVERY {
                    last = self.flush(disk).await?;
                    unflushed = 0;
                }
            }
        }
        if last != Version(0) {
            for disk in 0..self.images.len() {
                last = self.flush(disk as u16).await?;
            }
        }
        self.mirror.ledger().until_settled(last).await;
        Ok(Passed { left: self.left(), sent })
    }

    /// So many blocks are read and sent at once. In step few: a guest's write waits behind what the link has
    /// been given already.
    fn at_once(&self, disk: u16) -> u64 {
        let most = self.choice.transfer;
        self.blocks_of(disk, if self.mirror.is_mirroring() { most.min(SHORT_RUN) } else { most })
    }

    /// So many blocks are `bytes`, at least one.
    fn blocks_of(&self, disk: u16, bytes: u64) -> u64 {
        let own = self.mirror.disks().get(usize::from(disk));
        own.map_or(1, |own| (bytes / own.dirty.block().bytes()).max(1))
    }

    /// Makes what was sent durable as it goes, on the blocks' own stream: kept for the seal it would
    /// all be waited for by a paused guest, and on the other stream by its writes.
    async fn flush(&self, disk: u16) -> Result<Version, PassError> {
        let ledger = self.mirror.ledger();
        let version = ledger.enter(Pending { disk, range: 0..0, bytes: 0, waiting: None });
        let settled = ledger.settled();
        let frame = Frame { version, settled, ..Frame::new(Kind::Flush, disk) };
        self.bulk.lock().await.write(&frame).await?;
        Ok(version)
    }

    /// Sends everything that is dirty, what the destination asks for first, until it has all.
    pub(super) async fn rest(&self) -> Result<(), PassError> {
        for place in self.places(true) {
            let (disk, range) = (place.0, self.blocks_at(place));
            let mut at = range.start;
            loop {
                while let Some((disk, mut blocks)) = self.next_wanted() {
                    // One in the middle may have gone already.
                    while let Some(run) =
                        self.send_run(disk, blocks.clone(), blocks.end - blocks.start).await?
                    {
                        blocks.start = run.end.min(blocks.end);
                    }
                }
                // Little at a time: the next that is wanted does not wait for more.
                let most = self.blocks_of(disk, self.choice.transfer.min(SHORT_RUN));
                let Some(run) = self.send_run(disk, at..range.end, most).await? else { break };
                at = run.end;
            }
        }
        self.mirror.ledger().until_empty().await;
        Ok(())
    }

    /// What is wanted longest, with the neighbours behind it that are wanted as well: one read of a guest
    /// often touches several blocks.
    fn next_wanted(&self) -> Option<(u16, Range<u64>)> {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        let (disk, first) = wanted.pop_front()?;
        let mut blocks = first..first + 1;
        let most = self.blocks_of(disk, SHORT_RUN);
        while blocks.end - blocks.start < most && wanted.front() == Some(&(disk, blocks.end)) {
            wanted.pop_front();
            blocks.end += 1;
        }
        Some((disk, blocks))
    }

    /// Tells the destination that nothing changes any more, with what is missing there, and waits
    /// until it has all else durably. The VM is paused.
    /// `false`: it has fallen out of step meanwhile.
    pub(super) async fn seal(&self) -> bool {
        let ledger = self.mirror.ledger();
        ledger.until_empty().await;
        if !self.mirror.seal_in_step() {
            return false;
        }
        self.announce_lengths();
        for (number, disk) in self.mirror.disks().iter().enumerate() {
            let runs = runs(&disk.dirty, self.images[number].length().unwrap_or(0));
            let mut rest = &runs[..];
            loop {
                let (payload, later) = encode_runs(rest);
                self.say(Frame { payload, ..Frame::new(Kind::Seal, number as u16) });
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
        }
        ledger.until_empty().await;
        true
    }

    /// Says something that is acknowledged.
    pub(super) fn say(&self, frame: Frame) {
        let version = self.enter(frame.disk);
        self.say_as(version, frame);
    }

    fn enter(&self, disk: u16) -> Version {
        let pending = Pending { disk, range: 0..0, bytes: 0, waiting: None };
        self.mirror.ledger().enter(pending)
    }

    fn say_as(&self, version: Version, frame: Frame) {
        let settled = self.mirror.ledger().settled();
        // When nobody writes any more the connection is gone, and that is noticed elsewhere.
        let _ = self.control.send(Frame { version, settled, ..frame });
    }

    fn announce_lengths(&self) {
        for (number, image) in self.images.iter().enumerate() {
            // The version first: a write that makes it longer while we look gets a later one.
            let version = self.enter(number as u16);
            match image.length() {
                Ok(offset) => {
                    let frame = Frame { offset, ..Frame::new(Kind::Resize, number as u16) };
                    self.say_as(version, frame);
                }
                Err(_) => drop(self.mirror.ledger().acknowledge(version)),
            }
        }
    }

    /// The segments that go before the hand-over, or all of them, in their order. Those by which an image has
    /// grown since they were ordered go with the last.
    fn places(&self, all: bool) -> Vec<Place> {
        let orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let mut places = Vec::new();
        for (number, (order, disk)) in (0..).zip(orders.iter().zip(self.mirror.disks())) {
            let known = order.segments.len();
            let chosen = if all { known } else { order.before };
            let grown = if chosen == known { disk.activity.segments() } else { 0 };
            let segments = order.segments[..chosen].iter().copied();
            places.extend(segments.chain(known as u64..grown).map(|segment| (number, segment)));
        }
        places
    }

    /// The blocks of a segment.
    fn blocks_at(&self, (disk, segment): Place) -> Range<u64> {
        let blocks = self.blocks_of(disk, self.choice.segment.bytes());
        segment * blocks..(segment + 1) * blocks
    }

    /// The next one of a pass that has sent `sent` blocks so far. Where everything goes first, what has been
    /// written meanwhile says which: looked at once for each segment that sends something.
    fn next_turn(&self, turns: &mut Turns, sent: u64) -> Option<Place> {
        let settled = self.choice.strategy != Strategy::Whole;
        if !settled && turns.looked_after.replace(sent) != Some(sent) {
            let traffic = self.mirror.disks().iter().map(|disk| disk.activity.traffic());
            let traffic: Vec<_> = traffic.collect();
            let mut heat = self.heat.lock().unwrap_or_else(PoisonError::into_inner);
            heat.look(clock::now(), &traffic);
            heat.order(&mut turns.waiting);
        }
        turns.waiting.pop()
    }

    /// Blocks that must go before the hand-over and are dirty.
    pub(super) fn left(&self) -> u64 {
        let dirty = |place: Place| {
            let disk = &self.mirror.disks()[usize::from(place.0)];
            disk.dirty.count_within(self.blocks_at(place))
        };
        self.places(false).into_iter().map(dirty).sum()
    }

    /// Sends the first dirty block of `range` with those that follow it without a gap, at most `most`.
    /// `None` when nothing of it is dirty.
    async fn send_run(
        &self,
        disk: u16,
        range: Range<u64>,
        most: u64,
    ) -> Result<Option<Run>, PassError> {
        let Some(own) = self.mirror.disks().get(usize::from(disk)) else { return Ok(None) };
        let Some(first) = range.clone().find(|block| own.dirty.holds(*block)) else {
            return Ok(None);
        };
        self.mirror.ledger().until_at_most(WINDOW).await;
        let until = range.end.min(first + most);
        let taken = (first..until).take_while(|block| own.dirty.take_one(*block)).count() as u64;
        let mut run = Run { end: first + taken.max(1), blocks: taken, bytes: 0, version: None };
        let image = &self.images[usize::from(disk)];
        let frame = match blocks::read(&self.mirror, image, disk, first..first + taken).await {
            // One of them cannot be read, and all are dirty again: alone each says so for itself.
            Err(_) if taken > 1 && own.dirty.take_one(first) => {
                (run.end, run.blocks) = (first + 1, 1);
                blocks::read(&self.mirror, image, disk, first..first + 1).await
            }
            outcome => outcome,
        };
        let frame = frame.map_err(|source| PassError::Read { disk, block: first, source })?;
        let Some(frame) = frame else { return Ok(Some(run)) };
        let bytes = (frame.payload.len() + HEADER) as u64;
        // In step a queue on the way is what a guest's flush would wait for: blocks alone
        // must not fill the link.
        let spared = if self.mirror.is_mirroring() { bytes / IN_STEP_SPARED } else { 0 };
        self.pace.wait(bytes + spared).await;
        self.bulk.lock().await.write(&frame).await?;
        (run.bytes, run.version) = (frame.payload.len() as u64, Some(frame.version));
        Ok(Some(run))
    }
}

/// The segments of a pass that have not had their turn.
struct Turns {
    /// The next at the end.
    waiting: Vec<Place>,
    /// How many blocks had been sent when they were last ordered.
    looked_after: Option<u64>,
}

/// What a pass has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Passed {
    /// Blocks that must go before the hand-over and are dirty again.
    pub(super) left: u64,
    /// Blocks that it has sent.
    pub(super) sent: u64,
}

/// Neighbouring blocks that were sent as one.
struct Run {
    /// Where the next begins.
    end: u64,
    blocks: u64,
    bytes: u64,
    /// None of what lay beyond the image, or was sent meanwhile.
    version: Option<Version>,
}

/// Dirty blocks within `length` bytes as runs.
fn runs(dirty: &crate::disk::track::DirtyMap, length: u64) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for block in (0..dirty.block().count(length)).filter(|block| dirty.holds(*block)) {
        match runs.last_mut() {
            Some(run) if run.end == block => run.end += 1,
            _ => runs.push(block..block + 1),
        }
    }
    runs
}

#[cfg(test)]
#[path = "passes_tests.rs"]
mod tests;
