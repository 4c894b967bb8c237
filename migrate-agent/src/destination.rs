//! The destination's side of one migration, from the room made for it to a running guest.
//!
//! ```text
//!   prepare: QEMU up, paused, waiting  ->  link: HELLO, WELCOME  (with disks: way made for them)
//!   receive(): (disks, on connections of their own; QEMU up) STREAM into QEMU -> END -> QEMU stands paused, complete
//!   settle():  handover::destination decides; its actions are performed; in doubt it asks
//! ```
//!
//! One task runs it and owns the machine, the link and QEMU's incoming socket. Started by
//! `registry/` when the controller prepares the destination; the source's link is handed in when
//! it comes. Until LOADED is durable this side may drop everything; after that, nothing.

mod arriving;
pub mod disk;
mod elsewhere;
mod following;
mod gathering;
mod receiving;
pub(crate) mod resting;
mod settling;
mod taking_up;

use std::time::Duration;

use lifeboat_protocol::agent::{MigrationProgress, Phase, VmDefinition};
use lifeboat_protocol::ids::{Generation, HostId, VmId};
use lifeboat_protocol::terms::Mode;
use lifeboat_protocol::units::BytesPerSec;
use lifeboat_scatter_gather::link::{Frame, Purpose};
use tokio::sync::{mpsc, oneshot};

use crate::guests::Arrival;
use crate::handover::destination::{Action, Destination, Event, Outcome, State};
use crate::laps::Laps;
use crate::link::{FrameReader, FrameWriter, LinkError};
use crate::progress::Progress;
use crate::qemu::qmp::Qmp;
use crate::source::{Context, Failure};
use crate::stores::Plan;
use disk::{ArrivingDisks, TakenBy};
pub use gathering::journal::JournalError;
use gathering::{Gathering, Reachable};

/// How long the source may take to come after the destination was prepared.
const LINK_LIMIT: Duration = Duration::from_secs(60);

/// What the task is told while it runs.
pub enum Input {
    /// The source's link: HELLO was right, WELCOME has not been said.
    Link(FrameReader, FrameWriter),
    /// COMMIT came on a connection made for it; the answer is what to say there.
    Commit(Generation, oneshot::Sender<Frame>),
    /// The source offers pages on a connection of their own; it has been welcomed.
    Lane(Purpose, FrameReader, FrameWriter),
    /// The intermediary that the source sends its disks to has all of them, and connects.
    Stored,
    /// What is fetched in the background keeps to this from now on; `None`: no limit.
    Limit(Option<BytesPerSec>),
    /// The controller gives up before the source has come. The answer: whether it could be.
    Cancel {
        /// For the report.
        reason: String,
        /// Answered when it is decided.
        answer: oneshot::Sender<bool>,
    },
    /// An operator says that the source is fenced off. The answer: whether it was taken.
    Claim(oneshot::Sender<bool>),
}

/// One migration's task at the destination.
pub struct DestinationTask {
    context: Context,
    vm: VmId,
    definition: VmDefinition,
    mode: Mode,
    inputs: mpsc::Receiver<Input>,
    progress: Progress,
    machine: Destination,
    qmp: Option<Qmp>,
    writer: Option<FrameWriter>,
    reader: Option<FrameReader>,
    /// Who waits on a connection of their own for the outcome of a COMMIT.
    waiting: Option<oneshot::Sender<Frame>>,
    /// The disks that come along.
    disks: Option<ArrivingDisks>,
    /// They may follow it.
    follow: bool,
    /// By way of this host; whether that has all of them; and whether that is durably noted here.
    disk_store: Option<HostId>,
    store_has_all: bool,
    stored: bool,
    /// Of a guest whose pages follow it: who brings them, and connections that came before it began.
    gathering: Option<Gathering>,
    lanes: Vec<(Purpose, FrameReader, FrameWriter)>,
    gather_limit: Option<BytesPerSec>,
    /// Of scatter-gather: the stores, and the connections to them until the gather has them.
    plan: Option<Plan>,
    reachable: Option<Reachable>,
    /// From the stream's end on.
    pause: Laps,
}

impl DestinationTask {
    /// A migration that this host is prepared for; `machine` is new, or read off a record.
    #[must_use]
    pub fn new(
        context: Context,
        vm: VmId,
        definition: VmDefinition,
        mode: Mode,
        inputs: mpsc::Receiver<Input>,
        progress: Progress,
        machine: Destination,
    ) -> Self {
        let disks = ArrivingDisks::found(&context.rooms, &vm, &definition);
        Self {
            context,
            vm,
            definition,
            mode,
            inputs,
            progress,
            machine,
            qmp: None,
            writer: None,
            reader: None,
            waiting: None,
            disks,
            follow: false,
            disk_store: None,
            store_has_all: false,
            stored: false,
            gathering: None,
            lanes: Vec::new(),
            gather_limit: None,
            plan: None,
            reachable: None,
            pause: Laps::default(),
        }
    }

    /// Who takes the source's connections about its disks.
    #[must_use]
    pub fn disks_taken_by(&self) -> Option<TakenBy> {
        self.disks.as_ref().and_then(ArrivingDisks::taken_by)
    }

    /// Its guest may run before its disks are complete.
    #[must_use]
    pub fn let_disks_follow(mut self, follow: bool) -> Self {
        self.follow = follow;
        self
    }

    /// What follows it comes from this host, once that has all.
    #[must_use]
    pub fn by_way_of(mut self, store: Option<HostId>) -> Self {
        self.disk_store = store;
        self
    }

    /// Whether a copy of its disks was here before.
    #[must_use]
    pub fn has_seeds(&self) -> bool {
        self.disks.as_ref().is_some_and(ArrivingDisks::are_seeded)
    }

    /// What is fetched in the background keeps to this.
    #[must_use]
    pub fn gather_at(mut self, limit: Option<BytesPerSec>) -> Self {
        self.gather_limit = limit;
        self
    }

    /// The guest's pages wait in these stores.
    #[must_use]
    pub fn gather_from(mut self, plan: Option<Plan>) -> Self {
        self.plan = plan;
        self
    }

    /// Whether the guest's pages follow it.
    fn gathers(&self) -> bool {
        matches!(self.mode, Mode::PostCopy | Mode::ScatterGather)
    }

    /// Brings QEMU up, paused; for a VM with disks, makes way for them, and QEMU follows when they
    /// are here. Done before the controller hears that the destination is ready.
    ///
    /// # Errors
    /// When this host cannot run the VM; nothing is left behind.
    pub async fn prepare(&mut self) -> Result<(), Failure> {
        let arrival = self.arrival();
        // What an earlier arrival of the VM may have left.
        self.context.store.end_gathering(&self.vm)?;
        self.context.store.end_rest(&self.vm)?;
        let (context, vm, definition) = (&self.context, &self.vm, &self.definition);
        self.disks = match self.follow {
            true => ArrivingDisks::follow(context, vm, definition).await?,
            false => ArrivingDisks::make_way(&context.rooms, vm, definition)?,
        };
        if let Some(disks) = &self.disks {
            // What can be said now is said now: the disks may take hours.
            let disks = disks.clone();
            let possible = self.could_arrive().await;
            if possible.is_err() {
                disks.discard().await?;
            }
            return possible;
        }
        self.reach_stores().await?;
        match self.bring_up(arrival).await {
            Ok(qmp) => {
                self.qmp = Some(qmp);
                Ok(())
            }
            Err(failure) => {
                if let Err(error) = self.context.guests.end(&self.vm, true).await {
                    tracing::warn!(%error, "what was begun could not all be undone");
                }
                Err(failure)
            }
        }
    }

    /// Whether the guest could come once its disks are here.
    async fn could_arrive(&mut self) -> Result<(), Failure> {
        self.context.guests.could_arrive(&self.definition)?;
        self.reach_stores().await
    }

    fn arrival(&self) -> Arrival {
        match self.mode {
            Mode::PreCopy | Mode::PostCopy | Mode::ScatterGather | Mode::Auto => Arrival::Stream,
            Mode::Cold => Arrival::Cold,
        }
    }

    async fn bring_up(&self, arrival: Arrival) -> Result<Qmp, Failure> {
        let mounts = self.disks.as_ref().map(ArrivingDisks::mounted).unwrap_or_default();
        let qmp = self.context.guests.arrive(&self.definition, arrival, &mounts).await?;
        if arrival == Arrival::Stream {
            qmp.migrate_set_only(&receiving::CAPABILITIES).await?;
            if self.gathers() {
                // QEMU looks itself whether it may use userfaultfd here.
                let set = qmp.migrate_set_capabilities(&[("postcopy-ram", true)]).await;
                set.map_err(Failure::NoPostCopy)?;
                if let Err(error) = self.context.guests.keep_monitor(&self.vm).await {
                    // It is for one moment alone in which this agent might die.
                    tracing::warn!(error = crate::vms::chain(&error), "no monitor is kept open");
                }
            }
            let path = self.stream_socket()?;
            let _ = std::fs::remove_file(&path);
            qmp.migrate_incoming(&format!("unix:{}", path.display())).await?;
        }
        Ok(qmp)
    }

    fn stream_socket(&self) -> Result<std::path::PathBuf, Failure> {
        Ok(self.context.guests.socket_path(&self.vm, "incoming.sock")?)
    }

    /// Runs a prepared migration to its end.
    pub async fn run(mut self) -> MigrationProgress {
        match self.receive().await {
            Ok(()) => {
                self.progress.enter(Phase::Committing);
                self.tell(Event::GuestLoaded).await;
            }
            Err(failure) => {
                tracing::warn!(reason = %failure.line(), "migration given up before LOADED");
                self.progress.update(|progress| {
                    progress.reason = failure.line();
                    failure.store_host().clone_into(&mut progress.failed_store_host);
                });
                if let Some(writer) = &mut self.writer {
                    // Best effort, and before the clean-up: a guest may stand still for this.
                    let _ = writer.send(&Frame::Refused(failure.line())).await;
                }
                let cancelled = matches!(failure, Failure::Cancelled(_));
                self.tell(Event::Abort).await;
                self.progress.enter(if cancelled { Phase::Cancelled } else { Phase::Failed });
                return self.progress.now();
            }
        }
        self.settle().await
    }

    /// Goes on with a hand-over that a restart found.
    pub async fn take_up(mut self, actions: Vec<Action>) -> MigrationProgress {
        self.follow_again();
        self.reach_qemu().await;
        if let Err(failure) = self.gather_again().await {
            tracing::error!(reason = %failure.line(), "the guest's pages cannot be taken up again");
            self.progress.update(|progress| progress.reason = failure.line());
        }
        self.perform_all(actions).await;
        self.settle().await
    }

    fn report(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Running => {
                let elapsed = self.progress.elapsed_ms();
                self.progress.update(|progress| {
                    progress.total_ms = elapsed;
                    progress.reason.clear();
                });
                self.progress.enter(Phase::Completed);
            }
            Outcome::Discarded => self.progress.enter(Phase::Failed),
            Outcome::Died => {
                let vm = self.vm.clone();
                let (source, _) = self.machine.source();
                let reason = format!(
                    "QEMU died after {vm} had been handed over. {source} may still hold the guest as it was at the \
                     switchover; to resume it there: `lifeboat claim {vm} --fenced --host {source}`"
                );
                self.progress.update(|progress| progress.reason = reason);
                self.progress.enter(Phase::Lost);
            }
        }
    }

    async fn wait_for_link(&mut self) -> Result<(), Failure> {
        let waiting = async {
            loop {
                match self.inputs.recv().await {
                    Some(Input::Link(reader, writer)) => return Ok((reader, writer)),
                    Some(Input::Cancel { reason, answer }) => {
                        let _ = answer.send(true);
                        return Err(Failure::Cancelled(reason));
                    }
                    Some(Input::Commit(_, answer)) => {
                        let _ = answer.send(Frame::Refused("nothing was loaded".into()));
                    }
                    Some(Input::Claim(answer)) => {
                        let _ = answer.send(false);
                    }
                    Some(Input::Lane(purpose, reader, writer)) => {
                        self.lanes.push((purpose, reader, writer));
                    }
                    Some(Input::Limit(limit)) => self.gather_limit = limit,
                    Some(Input::Stored) => {}
                    None => return Err(Failure::Cancelled("the agent is stopping".into())),
                }
            }
        };
        let link = tokio::time::timeout(LINK_LIMIT, waiting).await;
        let (reader, writer) = link.map_err(|_| LinkError::Silent(LINK_LIMIT))??;
        self.reader = Some(reader);
        self.writer = Some(writer);
        Ok(())
    }

    fn is_over(&self) -> Option<Outcome> {
        match self.machine.state() {
            State::Over(outcome) => Some(outcome),
            _ => None,
        }
    }
}
