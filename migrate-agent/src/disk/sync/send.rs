//! The source's driver: takes the disks of one VM to another host, over two streams.
//!
//! `source.rs` runs [`Outgoing::run`] for each connection: a lost one is followed by another with the
//! same [`Outgoing`], which sends only what is missing. One stream carries guests' writes and control,
//! the other blocks; versions make their order irrelevant, so a write never waits behind a block.
//!
//! What to do next is [`Phases`]' to say; `connection` turns the world into events and does what it
//! answers. Deliberately not here: making connections, TLS, and the decision to hand over.

use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::units::BytesPerSec;
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot, watch};

use super::blocks;
use super::connection::serve;
use super::mirror::Mirror;
use super::phases::{Action, Event, Goal, Phase, Phases, Veto};
use super::rank::{SegmentOrder, Strategy, Weights, order};
use super::stream::StreamError;
use crate::disk::fuse::Image;
use crate::disk::track::SegmentSize;

/// Why the disks do not go on over this connection.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The connection; another one goes on where it ended.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Nothing was heard for too long; as above.
    #[error("the destination's disks have been silent for {0:?}")]
    Silent(Duration),
    /// The local disk fails.
    #[error("cannot read block {block} of disk {disk} here")]
    Read {
        /// The disk's number.
        disk: u16,
        /// The block's.
        block: u64,
        /// Why.
        source: Errno,
    },
    /// The destination's disk fails or is full.
    #[error("the destination cannot write disk {disk}")]
    Peer {
        /// The disk's number.
        disk: u16,
        /// What it said.
        source: Errno,
    },
    /// Whoever steers this has gone.
    #[error("nobody steers the disks' way any more")]
    Abandoned,
}

impl SendError {
    /// Whether another connection helps.
    #[must_use]
    pub const fn may_retry(&self) -> bool {
        matches!(self, Self::Stream(_) | Self::Silent(_))
    }
}

/// What the agent orders.
#[derive(Debug)]
pub enum Command {
    /// The monitoring time is over.
    EndMonitoring,
    /// Have writes go to both sides at once, whatever is left: what they make dirty would not be sent
    /// in time.
    GoInStep,
    /// The VM is paused: seal, and say when it is done or why not.
    Seal(oneshot::Sender<Result<(), Veto>>),
    /// The VM runs on here after all.
    Unseal,
    /// The VM is the destination's (COMMIT).
    Cede,
}

/// How far the disks are (MigrateFS Table 1, "Query Progress", "Query Completion").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The phase.
    pub phase: Phase,
    /// Dirty blocks, of all disks.
    pub dirty: u64,
    /// Bytes on their way.
    pub on_the_way: u64,
    /// Hashes are being compared: dirty blocks are those found so far.
    pub comparing: bool,
}

/// What is chosen for a migration.
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    /// When both sides go in step, and whether the VM may move early.
    pub goal: Goal,
    /// What is sent before it does.
    pub strategy: Strategy,
    /// How reads count beside writes.
    pub weights: Weights,
    /// The segments' size.
    pub segment: SegmentSize,
    /// What is read and sent at once at most, bytes.
    pub transfer: u64,
    /// Whether reads and writes are counted first, until [`Command::EndMonitoring`].
    pub monitors: bool,
    /// The destination may have blocks of an earlier attempt: hashes are compared first.
    pub compares: bool,
}

/// The disks of one VM, on their way.
pub struct Outgoing {
    pub(super) mirror: Arc<Mirror>,
    pub(super) images: Vec<Arc<Image>>,
    pub(super) choice: Choice,
    pub(super) phases: Phases,
    pub(super) orders: Vec<SegmentOrder>,
    /// The hashes of both sides have yet to be compared.
    pub(super) compares: bool,
}

impl Outgoing {
    /// The way of `images`, which `mirror` hooks, in the order of its disks.
    ///
    /// # Errors
    /// When the file system cannot say where an image has data.
    pub fn new(
        mirror: Arc<Mirror>,
        images: Vec<Arc<Image>>,
        choice: Choice,
    ) -> Result<Self, Errno> {
        if !choice.compares {
            for (number, image) in images.iter().enumerate() {
                blocks::mark_data(&mirror, number as u16, image)?;
            }
        }
        let phases = Phases::new(choice.goal, choice.monitors);
        let compares = choice.compares;
        let mut own = Self { mirror, images, choice, phases, orders: vec![], compares };
        own.rank();
        Ok(own)
    }

    /// The way of `images` whose VM is the destination's already, by a process that knows nothing of
    /// what went before: the destination says what it lacks, each time that it is connected.
    #[must_use]
    pub fn resting(mirror: Arc<Mirror>, images: Vec<Arc<Image>>, choice: Choice) -> Self {
        // Nothing may change here any more.
        mirror.seal();
        let phases = Phases::resting(choice.goal);
        let mut own = Self { mirror, images, choice, phases, orders: vec![], compares: false };
        own.rank();
        own
    }

    /// Orders the segments by what was seen so far.
    pub(super) fn rank(&mut self) {
        let of = |disk: &super::mirror::Disk| {
            order(&disk.activity.traffic(), self.choice.weights, self.choice.strategy)
        };
        self.orders = self.mirror.disks().iter().map(of).collect();
    }

    /// Where it is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phases.phase()
    }

    /// The VM runs on here after all, and there is no connection to say so.
    pub fn unseal(&mut self) {
        if self.phases.apply(Event::Unseal).contains(&Action::Mirror(false)) {
            self.mirror.disarm();
        }
    }

    /// The VM is the destination's, and there is no connection: what is missing there goes over the
    /// next one.
    pub fn cede(&mut self) {
        let missing = self.mirror.disks().iter().map(|disk| disk.dirty.count()).sum();
        self.phases.apply(Event::Ceded { missing });
    }

    /// All was sent. A destination that was killed may have forgotten that it arrived: it is asked
    /// again over the next connection.
    pub fn rest_again(&mut self) {
        self.phases = Phases::resting(self.choice.goal);
    }

    /// Goes on over these two streams, until everything is there or the connection ends. The guest
    /// is answered whatever happens.
    ///
    /// # Errors
    /// [`SendError::may_retry`] says whether another connection helps.
    pub async fn run<R, W>(
        &mut self,
        control: (R, W),
        bulk: (R, W),
        rate: watch::Receiver<Option<BytesPerSec>>,
        commands: &mut mpsc::Receiver<Command>,
        progress: &watch::Sender<Progress>,
    ) -> Result<(), SendError>
    where
        R: AsyncRead + Unpin + Send + 'static,
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let outcome = serve(self, control, bulk, rate, commands, progress).await;
        if self.phases.apply(Event::Lost).contains(&Action::Mirror(false)) {
            self.mirror.disarm();
        }
        // After disarming: whatever was on its way is dirty again, and whoever waited is answered.
        self.mirror.give_up();
        outcome
    }
}
