//! The disks of a VM that leaves: onto the mount, into step with the destination, sealed; and back,
//! or away, when it is decided.
//!
//! ```text
//!   watch_disks       mover up -> QEMU swapped on: every write is seen from here on
//!   bring_into_step   bulk, dirty -> every write goes to both sides
//!   disk_figures      while memory moves: still in step? how fast? (a mover that was killed is replaced)
//!   seal              QEMU writes nothing more -> the destination has all, durably
//!   free_disks        the guest stays: whatever was sealed is this host's again, before it resumes
//!   settle_disks      after the end: swapped off and unmounted here; or, handed over, left behind
//! ```
//!
//! The order of disk and memory, and why the seal may be last: docs/decisions/0031. Deliberately not
//! here: who owns the VM (`handover/`), the transfer itself (`disk::process`), and what a date asks of the
//! guest ([`date`]).

mod date;

use std::time::{Duration, Instant};

use lifeboat_protocol::agent::Phase;
use lifeboat_protocol::ids::{MigrationId, VmId};
use lifeboat_protocol::units::BytesPerSec;
use lifeboat_scatter_gather::link::Frame;

use self::date::Spread;
use super::copying::{heard, unwelcome};
use super::{Context, Failure, SourceTask};
use crate::clock;
use crate::destination::resting::bring_arrival_home;
use crate::disk::local::{LocalDisk, local_disks};
use crate::disk::process::client::{ANSWER_LIMIT, Mover, MoverClientError};
use crate::disk::process::control::{Destination, Limits, Report, Request, Stage};
use crate::disk::rooms::RoomError;
use crate::progress::RateMeter;
use crate::qemu::qmp::{Qmp, QmpError};
use crate::qemu::swap::{DiskNodes, Side, SwapError};

/// The mover is asked this often how far it is.
const POLL: Duration = Duration::from_millis(100);
/// A sign of life for the destination's agent meanwhile.
const PING_EVERY: Duration = Duration::from_millis(500);
/// A paused guest waits for the seal at most so long.
const SEAL_LIMIT: Duration = Duration::from_secs(10);
/// Blocks that were sent are written again as fast as they are sent: that is not waited for longer.
const NO_PROGRESS_LIMIT: Duration = Duration::from_secs(120);
/// How often it is asked anew what the guest may write for the date.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// A mover that dies again and again is given up.
const REPLACED_MOST: u32 = 8;

/// What goes wrong with disks at the source.
#[derive(Debug, thiserror::Error)]
pub enum DiskFailure {
    /// The mover.
    #[error(transparent)]
    Mover(#[from] MoverClientError),
    /// QEMU.
    #[error(transparent)]
    Swap(#[from] SwapError),
    /// QEMU, which is not where this agent mounts.
    #[error(
        "its QEMU was started in another mount namespace than this agent's and does not see what the agent mounts (PrivateMounts=, PrivateTmp= and the like in the agent's unit); take that out of the unit, or stop and start the VM once"
    )]
    OtherMounts(#[source] SwapError),
    /// QEMU's monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The transfer ended for good.
    #[error("the disks cannot be sent: {0}")]
    Transfer(String),
    /// A write was not answered in time, or the connection is gone: the hand-over is vetoed.
    #[error("the disks fell out of step with the destination's just before the switchover")]
    OutOfStep,
    /// It takes longer than it may.
    #[error("the disks were not in step after {} s", .0.as_secs())]
    Late(Duration),
    /// It would never come to an end.
    #[error(
        "the guest writes to its disks as fast as the link carries them: hold it back (`--by TIME` does), or reserve more"
    )]
    Outrun,
    /// The same, of what goes before a VM that its disks may follow.
    #[error(
        "the guest writes to the busy part of its disks as fast as the link carries it: let it move with more of that left (`--handover-size`), or reserve more"
    )]
    BusyOutrun,
    /// The images here.
    #[error(transparent)]
    Room(#[from] RoomError),
    /// There is nothing to copy.
    #[error("it has no disks that only this host has")]
    NoDisks,
    /// A migration goes before the copying of disks.
    #[error("the VM has begun to move; what had been copied is used by that")]
    Moves,
    /// The mover has gone too often.
    #[error("the disk process ended {REPLACED_MOST} times")]
    Unstable,
}

/// A pause may wait so long for a write that the disk limit holds back.
const HELD_BEFORE_A_PAUSE_MS: u64 = 15;

/// How far the disk limit is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Force {
    Whole,
    /// The pause is near, and waits for every request: nothing is held for long.
    Loose,
    None,
}

/// The VM's disks while it leaves.
pub(super) struct Leaving {
    mover: Mover,
    /// What the guest may change per second; `None`: whatever it likes.
    limit: Option<BytesPerSec>,
    /// How far its limit is in force.
    force: Force,
    replaced: u32,
    mirrored: RateMeter,
    sent: RateMeter,
    spread: Spread,
    /// When it was first asked how far it is, and how much the guest had written then.
    first: Option<(Instant, u64)>,
    /// What the guest has written per second until its writes went to both sides.
    wrote: BytesPerSec,
}

/// How the disks are doing while memory moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Figures {
    /// Every write is on both sides, or on its way there, which the seal waits for.
    pub(super) in_step: bool,
    /// What is left to guests' writes of the link while memory moves.
    pub(super) kept_free: BytesPerSec,
    /// What all of it takes of the link, now.
    sent: BytesPerSec,
    /// Bytes of blocks that were sent so far.
    blocks: u64,
    /// Every write goes to both sides, whatever is left.
    synchronous: bool,
    /// Bytes that are not at the destination.
    left: u64,
    /// Every block has been sent once.
    bulk_is_over: bool,
}

impl SourceTask {
    pub(super) fn local_disks(&self) -> Vec<LocalDisk> {
        let definition = self.context.guests.definition(&self.order.vm);
        let Some(mut definition) = definition else { return vec![] };
        for (disk, number) in definition.disks.iter_mut().zip(0..) {
            disk.is_there = self.order.disks_there.contains(&number);
        }
        local_disks(&definition, &self.context.rooms.directories)
    }

    /// Has every write to the VM's local disks pass through a mover; nothing where it has none.
    pub(super) async fn watch_disks(&mut self, qmp: &Qmp) -> Result<(), Failure> {
        let disks = self.local_disks();
        if disks.is_empty() {
            return Ok(());
        }
        self.progress.enter(Phase::DiskBulk);
        // An earlier attempt may have left QEMU on its mount, and an arrival on another one: what it writes
        // there no mover would see.
        bring_arrival_home(&self.context, &self.order.vm).await?;
        self.bring_disks_home().await?;
        let (movers, vm) = (&self.context.movers, &self.order.vm);
        let mover = match self.disks_follow() {
            true => movers.start_following(vm, &disks).await,
            false => movers.start(vm, &disks).await,
        };
        self.disks = Some(Leaving::new(mover.map_err(DiskFailure::from)?, self.order.disk_limit));
        self.remember_store().await?;
        self.swap_onto_mount(qmp).await?;
        self.watch_what_is_hot().await
    }

    async fn swap_onto_mount(&mut self, qmp: &Qmp) -> Result<(), Failure> {
        loop {
            match self.swap_all(qmp, Side::Mount).await {
                Err(DiskFailure::Mover(error)) => self.reach_again(error).await?,
                Err(DiskFailure::Swap(error))
                    if !self.context.guests.shares_our_mounts(&self.order.vm) =>
                {
                    return Err(DiskFailure::OtherMounts(error).into());
                }
                outcome => return Ok(outcome?),
            }
        }
    }

    /// Brings them into step with the destination's.
    pub(super) async fn bring_into_step(&mut self) -> Result<(), Failure> {
        if self.disks.is_none() {
            return Ok(());
        }
        self.send_anew().await?;
        self.until_in_step().await
    }

    async fn swap_all(&mut self, qmp: &Qmp, to: Side) -> Result<(), DiskFailure> {
        let Some(leaving) = &mut self.disks else { return Ok(()) };
        swap_all(&mut leaving.mover, qmp, to).await
    }

    /// Where the disks go; with `rests`, only what is missing there.
    pub(super) fn disks_go(&self, rests: bool) -> Destination {
        let order = &self.order;
        Destination {
            page_address: order.page_address.clone(),
            host: order.destination.clone(),
            own_host: self.context.host.clone(),
            migration: order.migration.clone(),
            vm: order.vm.clone(),
            generation: self.machine.next_generation(),
            token: order.token.to_vec(),
            compares: order.compare_disks,
            handover_size: order.handover_size.0,
            rests,
        }
    }

    async fn send_disks(&mut self) -> Result<(), DiskFailure> {
        let to = self.disks_go(false);
        let Some(leaving) = &mut self.disks else { return Ok(()) };
        let limits = leaving.limits(self.limit);
        let shown = limits.disk.unwrap_or(0);
        self.progress.update(|progress| progress.disk_limit_bytes_per_sec = shown);
        leaving.mover.ask(&Request::Limit(limits), ANSWER_LIMIT).await?;
        leaving.mover.ask(&Request::Send(to), ANSWER_LIMIT).await?;
        Ok(())
    }

    async fn until_in_step(&mut self) -> Result<(), Failure> {
        let (began, mut pinged, mut asked) = (clock::now(), clock::now(), clock::now());
        // The least that was ever left once all blocks were sent, and since when.
        let (mut least, mut since) = (u64::MAX, clock::now());
        let mut poll = tokio::time::interval(POLL);
        poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = poll.tick() => {}
                input = self.inputs.recv() => {
                    self.take_input(input, None).await?;
                    continue;
                }
                word = heard(&mut self.words) => return Err(unwelcome(word)),
            }
            let Some(figures) = self.disk_figures().await? else { return Ok(()) };
            if figures.in_step {
                return Ok(self.hold_to_the_plan().await?);
            }
            if let Some(window) = self.order.disk_window
                && asked.elapsed() >= ASK_EVERY
            {
                asked = clock::now();
                self.keep_date(&figures, window.saturating_sub(began.elapsed())).await?;
            }
            if figures.left < least || !figures.bulk_is_over {
                (least, since) = (figures.left, clock::now());
            }
            if since.elapsed() > NO_PROGRESS_LIMIT {
                return Err(match self.disks_follow() {
                    true => DiskFailure::BusyOutrun.into(),
                    false => DiskFailure::Outrun.into(),
                });
            }
            if pinged.elapsed() >= PING_EVERY {
                pinged = clock::now();
                self.ping().await?;
            }
            if let Some(limit) = self.order.deadline.filter(|limit| began.elapsed() > *limit) {
                return Err(DiskFailure::Late(limit).into());
            }
        }
    }

    async fn ping(&mut self) -> Result<(), Failure> {
        match &mut self.writer {
            Some(writer) => Ok(writer.send(&Frame::Ping(0)).await?),
            None => Ok(()),
        }
    }

    /// Whether this VM has disks that go along.
    pub(super) fn has_disks(&self) -> bool {
        self.disks.is_some()
    }

    /// How the disks are doing; told to whoever watches, too. `None` where there are none.
    pub(super) async fn disk_figures(&mut self) -> Result<Option<Figures>, DiskFailure> {
        let report = match &mut self.disks {
            Some(leaving) => leaving.mover.report().await,
            None => return Ok(None),
        };
        let report = match report {
            Ok(report) if report.stage != Stage::Idle => report,
            Ok(_) => return self.send_anew().await,
            Err(error) => {
                self.reach_again(error).await?;
                return self.send_anew().await;
            }
        };
        if let Some(reason) = report.failed {
            return Err(DiskFailure::Transfer(reason));
        }
        let (Some(leaving), now) = (&mut self.disks, clock::now()) else { return Ok(None) };
        let mirrored = BytesPerSec(leaving.mirrored.read(now, report.mirrored) / 8);
        leaving.look_at_writes(&report, now);
        let kept_free = mirrored.max(leaving.limit.unwrap_or(leaving.wrote));
        let rate = leaving.sent.read(now, report.sent);
        // What may follow its VM is not waited for.
        let in_step =
            report.stage == Stage::Synchronous && (report.dirty == 0 || self.order.disks_follow);
        let left = report.left;
        let bulk_is_over = report.stage != Stage::Bulk;
        self.show_disks(&report, rate);
        let sent = BytesPerSec(rate / 8);
        let blocks = report.sent.saturating_sub(report.mirrored);
        let synchronous = report.stage >= Stage::Synchronous;
        Ok(Some(Figures { in_step, kept_free, sent, blocks, synchronous, left, bulk_is_over }))
    }

    /// To a mover that knows nothing of the transfer.
    async fn send_anew(&mut self) -> Result<Option<Figures>, DiskFailure> {
        match self.send_disks().await {
            // Gone again: the next look finds out.
            Ok(()) | Err(DiskFailure::Mover(MoverClientError::Gone(_))) => {}
            Err(error) => return Err(error),
        }
        let none = BytesPerSec::ZERO;
        Ok(Some(Figures {
            in_step: false,
            kept_free: none,
            sent: none,
            blocks: 0,
            synchronous: false,
            left: u64::MAX,
            bulk_is_over: false,
        }))
    }

    fn show_disks(&mut self, report: &Report, rate: u64) {
        let limit = self.limit.map_or(0, |limit| limit.bits_per_sec().0);
        self.progress.update(|progress| {
            progress.disk_bytes_left = report.left;
            progress.disk_bytes_per_sec = rate / 8;
            progress.disk_bytes_sent = report.sent;
            if progress.phase() == Phase::DiskBulk {
                progress.rate_bits_per_sec = rate;
                progress.limit_bits_per_sec = limit;
            }
        });
    }

    /// A mover has gone: its mounts are held, and the guest's requests wait. The next one takes both
    /// over.
    async fn reach_again(&mut self, error: MoverClientError) -> Result<(), DiskFailure> {
        let gone = matches!(error, MoverClientError::Gone(_) | MoverClientError::Silent { .. });
        let Some(leaving) = self.disks.as_mut().filter(|_| gone) else { return Err(error.into()) };
        tracing::warn!(%error, "the mover is replaced");
        leaving.replaced += 1;
        if leaving.replaced > REPLACED_MOST {
            return Err(DiskFailure::Unstable);
        }
        if let Some(mover) = self.context.movers.reach(&self.order.vm).await? {
            leaving.mover = mover;
        }
        Ok(())
    }

    /// Sets what the guest may change per second.
    pub(super) async fn limit_disks(
        &mut self,
        limit: Option<BytesPerSec>,
    ) -> Result<(), DiskFailure> {
        if let Some(leaving) = &mut self.disks {
            leaving.limit = limit;
        }
        self.progress.update(|progress| {
            progress.disk_limit_bytes_per_sec = limit.map_or(0, |limit| limit.0);
        });
        self.tell_limits().await
    }

    /// Tells the mover both limits anew.
    pub(super) async fn tell_limits(&mut self) -> Result<(), DiskFailure> {
        let network = self.limit;
        let Some(leaving) = &mut self.disks else { return Ok(()) };
        let limits = leaving.limits(network);
        match leaving.mover.ask(&Request::Limit(limits), ANSWER_LIMIT).await {
            Ok(_) => Ok(()),
            // The next look replaces it, and the limits are told again.
            Err(MoverClientError::Gone(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Lets the limit hold nothing back for long: QEMU is about to pause the guest, which waits for every
    /// request.
    pub(super) async fn loosen_disk_limit(&mut self) -> Result<(), DiskFailure> {
        self.limit_with(Force::Loose).await
    }

    /// Takes the limit away: the guest has been paused, or told to shut down, and what is written now is
    /// what its end waits for.
    pub(super) async fn lift_disk_limit(&mut self) -> Result<(), DiskFailure> {
        self.limit_with(Force::None).await
    }

    /// It only ever gets weaker.
    async fn limit_with(&mut self, force: Force) -> Result<(), DiskFailure> {
        match &mut self.disks {
            Some(leaving) if leaving.force < force => leaving.force = force,
            _ => return Ok(()),
        }
        self.tell_limits().await
    }

    /// The last cheap veto: the guest is paused, and nothing has been lost by stopping.
    pub(super) async fn disks_must_be_in_step(&mut self) -> Result<(), DiskFailure> {
        match self.disk_figures().await? {
            Some(Figures { in_step: false, .. }) => Err(DiskFailure::OutOfStep),
            _ => Ok(()),
        }
    }

    /// QEMU writes nothing more. Returns when the destination has everything durably; the
    /// destination's agent hears of this side meanwhile.
    pub(super) async fn seal(&mut self) -> Result<(), Failure> {
        let follow = self.disks_follow();
        let Some(leaving) = &mut self.disks else { return Ok(()) };
        let began = clock::now();
        let sealed = leaving.mover.ask(&Request::Seal, SEAL_LIMIT);
        tokio::pin!(sealed);
        let mut ping = tokio::time::interval(PING_EVERY);
        let sealed = loop {
            tokio::select! {
                sealed = &mut sealed => break sealed,
                _ = ping.tick() => if let Some(writer) = &mut self.writer {
                    writer.send(&Frame::Ping(0)).await?;
                }
            }
        };
        sealed.map_err(DiskFailure::from)?;
        let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(took_ms, "disks sealed");
        if !follow {
            self.progress.update(|progress| progress.disk_bytes_left = 0);
        }
        Ok(())
    }

    /// The guest stays, and is about to be resumed: nothing is sealed any more, nobody waits for the
    /// destination. Also after a restart of this agent, which finds the mover by its socket.
    pub(super) async fn free_disks(&mut self) {
        if let Err(error) = self.stop_mover().await {
            // The guest is resumed all the same: what it then waits for is told here.
            tracing::error!(%error, "the disks could not be taken back from the mover");
        }
    }

    async fn stop_mover(&mut self) -> Result<(), DiskFailure> {
        if let Some(leaving) = &mut self.disks
            && leaving.mover.ask(&Request::Stop, ANSWER_LIMIT).await.is_ok()
        {
            return Ok(());
        }
        if let Some(mut mover) = self.context.movers.reach(&self.order.vm).await? {
            mover.ask(&Request::Stop, ANSWER_LIMIT).await?;
        }
        Ok(())
    }

    /// After the end, with the guest here: QEMU goes back to the images themselves, and the mover
    /// ends. A guest that cannot be swapped back runs on through the mount, and is told of.
    pub(super) async fn settle_disks_here(&mut self) {
        if let Err(error) = self.bring_disks_home().await {
            tracing::error!(error = crate::vms::chain(&error), "the disks stay on their mount");
        }
    }

    async fn bring_disks_home(&mut self) -> Result<(), DiskFailure> {
        self.disks = None;
        bring_home(&self.context, &self.order.vm).await
    }

    /// After the end, with the guest at the destination: its QEMU is gone here, its images are kept
    /// for a while under other names.
    pub(super) async fn settle_disks_away(&mut self) {
        self.disks = None;
        let order = &self.order;
        if let Err(error) = leave_behind(&self.context, &order.vm, &order.migration).await {
            tracing::error!(error = crate::vms::chain(&error), "the disks keep their names here");
        }
    }
}

impl Leaving {
    /// With this mover, and what the guest may change per second.
    pub(super) fn new(mover: Mover, limit: Option<BytesPerSec>) -> Self {
        Self {
            mover,
            limit,
            force: Force::Whole,
            replaced: 0,
            mirrored: RateMeter::default(),
            sent: RateMeter::default(),
            spread: Spread::default(),
            first: None,
            wrote: BytesPerSec::ZERO,
        }
    }

    /// Its mover.
    pub(super) fn mover(&mut self) -> &mut Mover {
        &mut self.mover
    }

    /// What is sent of them by this report, bits per second.
    pub(super) fn rate(&mut self, report: &Report) -> u64 {
        self.sent.read(clock::now(), report.sent)
    }

    /// How fast the guest writes is seen while it does not wait for the link.
    fn look_at_writes(&mut self, report: &Report, now: Instant) {
        let (since, written) = *self.first.get_or_insert((now, report.written));
        let seconds = now.saturating_duration_since(since).as_secs_f64();
        if report.stage < Stage::Synchronous && seconds > 0.0 {
            let bytes = report.written.saturating_sub(written);
            self.wrote = BytesPerSec((bytes as f64 / seconds) as u64);
        }
    }

    pub(super) fn limits(&self, network: Option<BytesPerSec>) -> Limits {
        let held_at_most_ms = (self.force == Force::Loose).then_some(HELD_BEFORE_A_PAUSE_MS);
        let disk = self.limit.filter(|_| self.force < Force::None);
        let [network, disk] = [network, disk].map(|rate| rate.map(|rate| rate.0));
        Limits { network, disk, held_at_most_ms }
    }
}

/// Swaps every disk that the guest can write; the others stay where they are, nothing changes them.
pub(crate) async fn swap_all(mover: &mut Mover, qmp: &Qmp, to: Side) -> Result<(), DiskFailure> {
    let setting = mover.setting().clone();
    for (place, disk) in setting.disks.iter().enumerate().filter(|(_, disk)| !disk.read_only) {
        let nodes = DiskNodes::launched(disk.number, &disk.format).with_its_backing(qmp).await?;
        let (natively, through) = setting.paths(disk);
        let path = if to == Side::Mount { through } else { natively };
        if nodes.side(qmp).await? == Some(to) {
            continue;
        }
        let place = u16::try_from(place).unwrap_or(u16::MAX);
        mover.ask(&Request::BeginSwap { disk: place }, ANSWER_LIMIT).await?;
        let swapped = nodes.swap(qmp, to, &path).await;
        // What QEMU says of itself: an answer that was lost proves nothing. In the middle of a swap it
        // may write through the mount.
        let on_mount = nodes.side(qmp).await? != Some(Side::Native);
        mover.ask(&Request::EndSwap { disk: place, on_mount }, ANSWER_LIMIT).await?;
        let took_us = u64::try_from(swapped?.as_micros()).unwrap_or(u64::MAX);
        tracing::info!(disk = disk.number, ?to, took_us, "disk swapped");
    }
    Ok(())
}

/// Brings the disks of a guest that is here back to their images, and ends its mover; nothing where
/// there is none. Also for what an agent before this one left when it ended.
pub(crate) async fn bring_home(context: &Context, vm: &VmId) -> Result<(), DiskFailure> {
    let Some(mut mover) = context.movers.reach(vm).await? else {
        // At most a directory, of one that was never begun.
        return Ok(context.movers.forget(vm)?);
    };
    mover.ask(&Request::Stop, ANSWER_LIMIT).await?;
    if context.guests.lives(vm)
        && let Ok(qmp) = context.guests.qmp(vm).await
    {
        swap_all(&mut mover, &qmp, Side::Native).await?;
    }
    Ok(mover.finish().await?)
}

/// Ends the mover of a guest that runs elsewhere, and keeps its images under other names for a while.
pub(crate) async fn leave_behind(
    context: &Context,
    vm: &VmId,
    migration: &MigrationId,
) -> Result<(), DiskFailure> {
    let Some(mover) = context.movers.reach(vm).await? else { return Ok(()) };
    let images = mover.setting().writable_images();
    mover.finish().await?;
    let (rooms, vm, migration) = (context.rooms.clone(), vm.clone(), migration.clone());
    let now = clock::unix_now();
    let left = move || rooms.leave(&vm, &migration, &images, now);
    Ok(crate::tasks::blocking(left).await?)
}
