//! The source's side of one migration, from the order to the end: a sentence of phases, and then
//! the hand-over's machine, which alone decides who owns.
//!
//! ```text
//!   travel():  disks seen -> link up -> disks into step -> QEMU pre-copies into the relay -> pause -> tail -> END
//!              -> disks sealed -> LOADED
//!   settle():  LOADED or the failure goes into handover::source; its actions are performed;
//!              past COMMIT it asks until it knows
//! ```
//!
//! One task runs it; it owns the machine, the link and the guest's QMP. Started by `registry/`,
//! told things through [`Input`]. Everything before COMMIT that goes wrong is a [`Failure`], and
//! every failure ends with the guest running here.

mod absorbing;
mod asking;
mod copying;
pub mod disk;
mod elsewhere;
mod ending;
mod failure;
mod guest;
mod link;
mod performing;
mod resting;
pub mod scattering;
pub mod seeding;
mod serving;
mod slowing;
mod storing;

use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::agent::{MigrationProgress, Phase};
use lifeboat_protocol::ids::{Generation, HostId, MigrationId, VmId};
use lifeboat_protocol::terms::Mode;
use lifeboat_protocol::units::{Bytes, BytesPerSec};
use lifeboat_scatter_gather::link::Frame;
use lifeboat_scatter_gather::link::frame::TOKEN_BYTES;
use tokio::sync::{mpsc, oneshot};

use crate::clock;
use crate::disk::process::client::Movers;
use crate::disk::rooms::DiskRooms;
use crate::guests::Guests;
use crate::handover::source::{Action, Event, Outcome, Source, State};
use crate::handover::store::Store;
use crate::handover::storing::Storing;
use crate::laps::Laps;
use crate::link::{FrameWriter, LinkError};
use crate::postcopy::absorb::Absorbed;
use crate::progress::Progress;
use crate::qemu::ram::Ram;
use crate::stores::Plan;
use crate::tls::TlsIdentity;
use disk::Leaving;
pub use failure::Failure;
use scattering::{Scattering, Stores};
use serving::Serving;

/// How long RUNNING may take after COMMIT before the state is called uncertain.
const RUNNING_LIMIT: Duration = Duration::from_secs(5);

/// What was ordered.
#[derive(Debug, Clone)]
pub struct Order {
    /// The migration.
    pub migration: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// How its memory moves.
    pub mode: Mode,
    /// Where to.
    pub destination: HostId,
    /// The destination's page listener.
    pub page_address: String,
    /// The destination's proof that the controller sent us.
    pub token: [u8; TOKEN_BYTES],
    /// What may be sent; `None`: whatever the link takes.
    pub limit: Option<BytesPerSec>,
    /// What its guest may change on its disks meanwhile; `None`: whatever it likes.
    pub disk_limit: Option<BytesPerSec>,
    /// The destination has a copy of its disks: only what differs is sent.
    pub compare_disks: bool,
    /// Of its disks that nobody writes to those that the destination has: they are not sent.
    pub disks_there: Vec<u32>,
    /// Its disks have to be in step within this time: it is held back as far as that takes.
    pub disk_window: Option<Duration>,
    /// What the pause should not exceed.
    pub downtime_limit: Duration,
    /// Most iterations; `None`: the policy's default.
    pub iterations_max: Option<u32>,
    /// Give up after this long; `None`: the policy's default.
    pub deadline: Option<Duration>,
    /// The generation that this host owns.
    pub generation: Generation,
    /// Memory for what is absorbed before COMMIT; zero: the agent's default.
    pub absorb_budget: Bytes,
    /// Where pages wait, of scatter-gather.
    pub scatter: Option<Plan>,
    /// Its guest may run at the destination before its disks are complete there.
    pub disks_follow: bool,
    /// They go on to this intermediary then.
    pub disk_store: Option<Storing>,
    /// So much of what goes before may be left then; zero: the mover's default.
    pub handover_size: Bytes,
    /// For so long it is watched before that which of its disks is busy.
    pub disk_watch: Duration,
}

/// What the task is told while it runs.
#[derive(Debug)]
pub enum Input {
    /// Stop, if it can still be stopped. The answer: whether it could.
    Cancel {
        /// For the report.
        reason: String,
        /// Answered when it is decided.
        answer: oneshot::Sender<bool>,
    },
    /// A new limit.
    Limit(Option<BytesPerSec>),
    /// A new limit for what the guest changes on its disks.
    DiskLimit(Option<BytesPerSec>),
    /// An operator says that the destination is fenced off. The answer: whether it was taken.
    Claim(oneshot::Sender<bool>),
}

/// What the tasks of every migration share on this host.
#[derive(Clone)]
pub struct Context {
    /// This host.
    pub host: HostId,
    /// Its guests.
    pub guests: Arc<dyn Guests>,
    /// Its ownership records.
    pub store: Store,
    /// Its certificates.
    pub identity: Option<TlsIdentity>,
    /// What brings disks away from it.
    pub movers: Movers,
    /// Where disks arrive on it.
    pub rooms: Arc<DiskRooms>,
}

/// One migration's task at the source.
pub struct SourceTask {
    context: Context,
    order: Order,
    inputs: mpsc::Receiver<Input>,
    progress: Progress,
    machine: Source,
    limit: Option<BytesPerSec>,
    /// The link, while there is one; COMMIT and ABORT go over it.
    writer: Option<FrameWriter>,
    /// What the link's reader passes on.
    words: Option<mpsc::Receiver<Result<Frame, LinkError>>>,
    stop_seen: Option<std::time::Instant>,
    pause: Laps,
    guest_quit_for_cold: bool,
    /// Its disks, from the swap onto their mount on.
    disks: Option<Leaving>,
    /// Of a guest whose pages stay here at first: its memory, what it holds, and who serves it.
    memory: Option<Arc<Ram>>,
    absorbed: Option<Arc<Absorbed>>,
    serving: Option<Serving>,
    stores: Option<Stores>,
    scattering: Option<Scattering>,
    /// Of disks that go on to an intermediary: who sends them there.
    going_on: Option<storing::GoingOn>,
    /// Since when the destination, past COMMIT, has not answered.
    silent_since: Option<std::time::Instant>,
    /// An agent before this one began it.
    taken_up: bool,
}

impl SourceTask {
    /// A migration that begins: the returned actions of the machine have not been performed yet.
    #[must_use]
    pub fn begin(
        context: Context,
        order: Order,
        inputs: mpsc::Receiver<Input>,
        progress: Progress,
    ) -> (Self, Vec<Action>) {
        let mut actions = Vec::new();
        let machine = Source::begin(
            order.generation,
            order.migration.clone(),
            order.destination.clone(),
            order.page_address.clone(),
            &mut actions,
        );
        (Self::with_machine(context, order, inputs, progress, machine), actions)
    }

    /// A hand-over that was found in the records after a restart.
    #[must_use]
    pub fn with_machine(
        context: Context,
        order: Order,
        inputs: mpsc::Receiver<Input>,
        progress: Progress,
        machine: Source,
    ) -> Self {
        let limit = order.limit;
        Self {
            context,
            order,
            inputs,
            progress,
            machine,
            limit,
            writer: None,
            words: None,
            stop_seen: None,
            pause: Laps::default(),
            guest_quit_for_cold: false,
            disks: None,
            memory: None,
            absorbed: None,
            serving: None,
            stores: None,
            scattering: None,
            going_on: None,
            silent_since: None,
            taken_up: false,
        }
    }

    /// Runs a new migration to its end.
    pub async fn run(mut self, first: Vec<Action>) -> MigrationProgress {
        if let Err(failure) = self.perform(first).await {
            // Nothing has been recorded, so nothing has begun.
            self.end_with(Phase::Failed, failure.line());
            return self.progress.now();
        }
        let event = match self.travel().await {
            Ok(generation) => Event::Loaded(generation),
            Err(failure) => {
                tracing::warn!(reason = %failure.line(), "migration given up before COMMIT");
                let cancelled = matches!(failure, Failure::Cancelled(_));
                self.progress.update(|progress| {
                    progress.reason = failure.line();
                    failure.store_host().clone_into(&mut progress.failed_store_host);
                });
                self.settle_failure(cancelled).await;
                return self.progress.now();
            }
        };
        self.progress.enter(Phase::Committing);
        self.tell(event).await;
        if self.machine.state() == State::Ceded {
            self.await_running().await;
        }
        self.finish().await
    }

    /// Goes on with a hand-over that a restart found: performs what the record calls for.
    pub async fn take_up(mut self, actions: Vec<Action>) -> MigrationProgress {
        self.taken_up = true;
        self.perform_all(actions).await;
        self.finish().await
    }

    /// Asks until the outcome is known, then says it.
    async fn finish(mut self) -> MigrationProgress {
        while !matches!(self.machine.state(), State::Over(_)) {
            self.ask_once().await;
        }
        if let State::Over(outcome) = self.machine.state() {
            self.end_storing().await;
            match outcome {
                Outcome::Confirmed => self.settle_disks_away().await,
                _ => self.settle_disks_here().await,
            }
            self.report(outcome);
        }
        self.progress.now()
    }

    fn report(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Confirmed => {
                let elapsed = self.progress.elapsed_ms();
                self.progress.update(|progress| {
                    progress.total_ms = elapsed;
                    progress.bytes_remaining = 0;
                    progress.time_to_go_known = true;
                    progress.time_to_go_ms = 0;
                    progress.reason.clear();
                });
                self.progress.enter(Phase::Completed);
            }
            Outcome::Aborted => self.end_with(Phase::Failed, String::new()),
            Outcome::Returned(generation) => self.end_with(
                Phase::Failed,
                format!("handed over, but the destination never started it: runs here again as {generation}"),
            ),
            Outcome::Claimed(generation) => self.end_with(
                Phase::Failed,
                format!("claimed back by the operator: runs here again as {generation}"),
            ),
        }
    }

    fn end_with(&mut self, phase: Phase, reason: String) {
        if !reason.is_empty() {
            self.progress.update(|progress| progress.reason = reason);
        }
        self.progress.enter(phase);
    }

    async fn settle_failure(&mut self, cancelled: bool) {
        self.scattering = None;
        self.tell(Event::GiveUp).await;
        self.end_storing().await;
        self.settle_disks_here().await;
        self.progress.enter(if cancelled { Phase::Cancelled } else { Phase::Failed });
    }

    /// From nothing to LOADED. Every `?` here ends with the guest running at this host.
    async fn travel(&mut self) -> Result<Generation, Failure> {
        let qmp = self.context.guests.qmp(&self.order.vm).await?;
        self.watch_disks(&qmp).await?;
        self.connect().await?;
        self.bring_into_step().await?;
        match self.order.mode {
            // Auto is resolved by the controller and refused by the registry.
            Mode::PreCopy | Mode::Auto => {
                self.copy_memory(&qmp).await?;
                self.seal().await?;
                self.pause.lap("disks sealed");
            }
            Mode::PostCopy | Mode::ScatterGather => {
                self.reach_stores().await?;
                self.memory = Some(Arc::new(self.context.guests.memory(&self.order.vm)?));
                self.copy_memory(&qmp).await?;
                self.seal().await?;
                self.pause.lap("disks sealed");
            }
            Mode::Cold => self.stop_for_cold(&qmp).await?,
        }
        self.await_loaded(&qmp).await
    }

    async fn reach_stores(&mut self) -> Result<(), Failure> {
        if let Some(plan) = self.order.scatter.clone() {
            let identity = self.context.identity.as_ref();
            self.stores = Some(Stores::reach(plan, &self.order.migration, identity).await?);
        }
        Ok(())
    }

    /// Waits for RUNNING on the link; its absence makes the state uncertain.
    async fn await_running(&mut self) {
        let deadline = clock::now() + RUNNING_LIMIT;
        let event = loop {
            match self.next_word(deadline).await {
                Ok(Frame::Running(generation)) => {
                    self.note_downtime();
                    if self.disks_follow() {
                        return self.until_disks_released(generation).await;
                    }
                    if self.serving.is_some() {
                        return self.until_released(generation).await;
                    }
                    break Event::Running(generation);
                }
                Ok(Frame::Refused(reason)) => {
                    tracing::warn!(reason, "the destination refused after COMMIT");
                    break Event::Refused;
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(%error, "no word after COMMIT: uncertain");
                    self.say_uncertain();
                    break Event::NoWord;
                }
            }
        };
        self.tell(event).await;
    }

    fn say_uncertain(&mut self) {
        let destination = self.order.destination.clone();
        let vm = self.order.vm.clone();
        self.end_with(
            Phase::Uncertain,
            format!(
                "COMMIT was sent to {destination} and no answer came; asking it on. If {destination} is known to be \
                 off or fenced: `lifeboat claim {vm} --fenced`"
            ),
        );
    }

    /// Downtime by one clock, this host's: STOP seen to RUNNING heard.
    fn note_downtime(&mut self) {
        if let Some(stopped) = self.stop_seen {
            self.pause.lap("until it runs there");
            tracing::info!(pause = %self.pause, "the guest stood still");
            let micros = u64::try_from(stopped.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.progress.update(|progress| progress.downtime_us = micros);
        }
    }
}
