//! Pre-copy at the source: QEMU into the relay until it is time to go, the pause, and the tail.
//!
//! QEMU is held at a downtime limit of 1 ms (0 would mean "now") while it copies. The limit is
//! then raised to what is wanted, and QEMU itself switches over at the first moment at which
//! what is left fits; `policy::stop` watches the iterations and ends what will not converge.
//! `pause-before-switchover` gives one last moment at which nothing has been lost by stopping.

use std::time::{Duration, Instant};

use lifeboat_policy::stop::{self, Decision, Iteration, StopCriteria};
use lifeboat_protocol::agent::Phase;
use lifeboat_protocol::ids::Generation;
use lifeboat_protocol::units::{Bytes, BytesPerSec};
use lifeboat_scatter_gather::link::{Ended, Frame};
use tokio::net::UnixListener;
use tokio::sync::broadcast;

use super::absorbing::absorb;
use super::disk::DiskFailure;
use super::slowing::Slowed;
use super::{Failure, Input, SourceTask};
use crate::clock;
use crate::link::io::frame_name;
use crate::link::relay::Relay;
use crate::link::{FrameWriter, LinkError};
use crate::postcopy::absorb::Absorbed;
use crate::progress::RateMeter;
use crate::qemu::qmp::{MigrateInfo, MigrateParameters, MigrationStatus, Qmp, QmpError, QmpEvent};

/// "Hold": QEMU never finds so little left by itself unless nearly nothing is dirty.
const HOLD_MS: u64 = 1;
/// "Go, whatever is left."
const GO_MS: u64 = 2_000_000;
/// QEMU is asked this often while it copies.
const POLL: Duration = Duration::from_millis(100);
/// A QEMU that emulates may hold its main loop for seconds while it looks for dirty pages; that its
/// stream moves is seen elsewhere. So often in a row it may leave the question unanswered (5 s each).
const UNANSWERED_MOST: u32 = 5;
/// From "go" to the pause, and from there to the end of QEMU's stream.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);
const STREAM_END_LIMIT: Duration = Duration::from_secs(30);
/// LOADED may take this long besides the time that the rest takes on the wire.
const LOADED_LIMIT: Duration = Duration::from_secs(20);
/// Memory keeps at least this part of the limit beside the guest's writes to its disks.
const MEMORY_SHARE_LEAST: u64 = 4;
/// Memory and those writes together take at most this part of it.
const MEMORY_SHARE_MOST: f64 = 0.9;
/// So near its end the first pass may be the last.
const NEARLY_THERE: Duration = Duration::from_secs(1);
/// A sign of life is sent this often where nothing else is.
const PING_EVERY: Duration = Duration::from_millis(500);

/// The relay's two tasks. Dropping it ends both.
struct Pump {
    relay: Relay,
    /// `None` once its result has been taken.
    fill: Option<tokio::task::JoinHandle<Result<Option<Absorbed>, Failure>>>,
    drain: tokio::task::JoinHandle<(FrameWriter, Result<Ended, LinkError>)>,
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.fill.iter().for_each(|fill| fill.abort());
        self.drain.abort();
    }
}

/// What the watching of iterations remembers.
struct Watch {
    history: Vec<Iteration>,
    pass: u64,
    meter: RateMeter,
    began: Instant,
    criteria: StopCriteria,
    /// Asked to go whatever is left.
    going: bool,
    /// Questions in a row that QEMU has not answered.
    unanswered: u32,
    /// Every write to the disks is on both sides; also where there are none.
    disks_in_step: bool,
    slowed: Slowed,
}

impl SourceTask {
    /// Pre-copy, from the first page to the last byte of the stream.
    pub(super) async fn copy_memory(&mut self, qmp: &Qmp) -> Result<(), Failure> {
        let mut events = qmp.events();
        let mut pump = self.start_copying(qmp).await?;
        self.progress.enter(Phase::MemoryCopy);
        match self.copy_with(qmp, &mut events, &mut pump).await {
            Ok(()) => Ok(()),
            Err(failure) => Err(first_cause(&mut pump, failure)),
        }
    }

    async fn copy_with(
        &mut self,
        qmp: &Qmp,
        events: &mut broadcast::Receiver<QmpEvent>,
        pump: &mut Pump,
    ) -> Result<(), Failure> {
        self.iterate(qmp, events, pump).await?;
        self.progress.enter(Phase::Switchover);
        if self.memory.is_some() {
            self.start_serving();
        }
        self.finish_stream(qmp, events, pump).await
    }

    /// What QEMU may write, bytes/s; 0 is no limit. What is absorbed never leaves the host.
    fn stream_limit(&self) -> u64 {
        match self.memory {
            Some(_) => 0,
            None => self.limit.map_or(0, |limit| limit.0),
        }
    }

    async fn start_copying(&mut self, qmp: &Qmp) -> Result<Pump, Failure> {
        self.set_capabilities(qmp).await?;
        qmp.migrate_set_parameters(MigrateParameters {
            downtime_limit_ms: Some(HOLD_MS),
            max_bandwidth_bytes: Some(self.stream_limit()),
        })
        .await?;
        let vm = &self.order.vm;
        let path = self.context.guests.socket_path(vm, "stream.sock")?;
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(Failure::Socket)?;
        self.context.guests.grant(vm, &path)?;
        qmp.migrate(&format!("unix:{}", path.display())).await?;
        let accepted = tokio::time::timeout(PAUSE_LIMIT, listener.accept()).await;
        let _ = std::fs::remove_file(&path);
        let slow = || Failure::Slow { what: "connect its stream", limit: PAUSE_LIMIT };
        let (socket, _) = accepted.map_err(|_| slow())?.map_err(Failure::Socket)?;
        let relay = Relay::new(self.limit);
        let writer = self.writer.take().ok_or(LinkError::Closed)?;
        let budget = self.absorb_budget();
        let memory = self.memory.as_ref().map(|memory| memory.pages());
        Ok(Pump {
            fill: Some(crate::tasks::spawn("relay fill", {
                let relay = relay.clone();
                async move {
                    match memory {
                        Some(pages) => absorb(relay, socket, pages, budget).await,
                        None => Ok(relay.fill(socket).await.map(|()| None)?),
                    }
                }
            })),
            drain: crate::tasks::spawn("relay drain", {
                let relay = relay.clone();
                async move {
                    let mut writer = writer;
                    let ended = relay.drain(&mut writer).await;
                    (writer, ended)
                }
            }),
            relay,
        })
    }

    /// Watches QEMU iterate until the guest is paused.
    async fn iterate(
        &mut self,
        qmp: &Qmp,
        events: &mut broadcast::Receiver<QmpEvent>,
        pump: &mut Pump,
    ) -> Result<(), Failure> {
        let mut watch = self.watch();
        qmp.migrate_set_parameters(MigrateParameters {
            // With disks QEMU does not go by itself: whether they are in step is asked first.
            downtime_limit_ms: match self.has_disks() {
                true => Some(HOLD_MS),
                false => Some(limit_ms(&watch.criteria)),
            },
            max_bandwidth_bytes: None,
        })
        .await?;
        let mut poll = tokio::time::interval(POLL);
        poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = poll.tick() => {}
                event = events.recv() => match event {
                    Ok(event) if event.name == "STOP" => self.stopped(&event, &pump.relay),
                    Ok(event) if event.name == "MIGRATION" || event.name == "MIGRATION_PASS" => {}
                    Err(broadcast::error::RecvError::Closed) => return Err(Failure::GuestGone),
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => continue,
                },
                input = self.inputs.recv() => {
                    self.take_input(input, Some((qmp, &pump.relay))).await?;
                    continue;
                }
                word = heard(&mut self.words) => return Err(unwelcome(word)),
                drained = &mut pump.drain => {
                    return Err(drain_failure(drained));
                }
            }
            let info = match qmp.query_migrate().await {
                Err(QmpError::Deadline { .. }) if watch.unanswered < UNANSWERED_MOST => {
                    watch.unanswered += 1;
                    tracing::warn!(
                        times = watch.unanswered,
                        "QEMU is too busy to say how far it is"
                    );
                    continue;
                }
                answer => answer?,
            };
            watch.unanswered = 0;
            self.show(&info, &pump.relay, &mut watch);
            self.show_slowing(&info, &watch.slowed);
            self.heed_disks(&info, &pump.relay, &mut watch).await?;
            match info.status {
                MigrationStatus::PreSwitchover => {
                    return Ok(self.disks_must_be_in_step().await?);
                }
                MigrationStatus::Setup | MigrationStatus::Active | MigrationStatus::Device => {}
                _ => return Err(qemu_failure(&info)),
            }
            self.decide(qmp, &info, &mut watch).await?;
        }
    }

    fn watch(&self) -> Watch {
        let within = StopCriteria::within(self.order.downtime_limit);
        let criteria = StopCriteria {
            max_iterations: self.order.iterations_max.unwrap_or(within.max_iterations),
            max_time: self.order.deadline.unwrap_or(within.max_time),
            ..within
        };
        Watch {
            history: Vec::new(),
            pass: 0,
            meter: RateMeter::default(),
            began: clock::now(),
            criteria,
            going: false,
            unanswered: 0,
            disks_in_step: true,
            slowed: Slowed::default(),
        }
    }

    /// Guests' writes go to both sides now, and over the same link: memory has what they leave of nine
    /// tenths of the limit. They are counted as what the guest wrote before it had to wait for the
    /// link: memory that takes whatever is free would slow it down and have still more. The tenth keeps
    /// the queues on the way short, which each write waits for. Towards the end the guest's own limit is
    /// lifted, because the pause waits for every write.
    async fn heed_disks(
        &mut self,
        info: &MigrateInfo,
        relay: &Relay,
        watch: &mut Watch,
    ) -> Result<(), Failure> {
        let Some(figures) = self.disk_figures().await? else { return Ok(()) };
        watch.disks_in_step = figures.in_step;
        if self.stop_seen.is_none()
            && let Some(limit) = self.limit
        {
            let free = limit.scale(MEMORY_SHARE_MOST) - figures.kept_free;
            relay.set_limit(Some(free.max(BytesPerSec(limit.0 / MEMORY_SHARE_LEAST))));
        }
        let Some(ram) = &info.ram else { return Ok(()) };
        let soon = (ram.mbps * 1e6 / 8.0 * NEARLY_THERE.as_secs_f64()) as u64;
        if ram.dirty_sync_count >= 2 || (ram.mbps > 0.0 && ram.remaining <= soon) {
            self.lift_disk_limit().await?;
        }
        Ok(())
    }

    fn stopped(&mut self, event: &QmpEvent, relay: &Relay) {
        self.progress.update(|progress| progress.throttle_percent = 0);
        // From here on a blocked stream would freeze QEMU's main loop.
        relay.unbound();
        self.stop_seen.get_or_insert_with(clock::now);
        let micros = event.seconds.saturating_mul(1_000_000).saturating_add(event.microseconds);
        self.progress.update(|progress| progress.stop_unix_us = micros);
    }

    fn show(&mut self, info: &MigrateInfo, relay: &Relay, watch: &mut Watch) {
        let Some(ram) = &info.ram else { return };
        let sent = relay.sent();
        let rate = watch.meter.read(clock::now(), sent);
        let limit = self.limit.map_or(0, |limit| limit.bits_per_sec().0);
        let dirty = ram.dirty_pages_rate.saturating_mul(ram.page_size);
        let left = Bytes(ram.remaining + relay.queued());
        let to_go = time_to_go(left, BytesPerSec(rate / 8), BytesPerSec(dirty));
        self.progress.update(|progress| {
            progress.iteration = u32::try_from(ram.dirty_sync_count).unwrap_or(u32::MAX);
            progress.bytes_total = ram.total;
            progress.bytes_remaining = left.0;
            progress.bytes_sent = sent;
            progress.rate_bits_per_sec = rate;
            progress.limit_bits_per_sec = limit;
            progress.dirty_pages_per_sec = ram.dirty_pages_rate;
            progress.time_to_go_known = to_go.is_some();
            progress.time_to_go_ms = to_go.map_or(0, millis);
        });
    }

    /// After each iteration: does this come to an end?
    async fn decide(
        &mut self,
        qmp: &Qmp,
        info: &MigrateInfo,
        watch: &mut Watch,
    ) -> Result<(), Failure> {
        let Some(ram) = &info.ram else { return Ok(()) };
        if ram.dirty_sync_count == watch.pass || watch.going {
            return Ok(());
        }
        if !watch.disks_in_step {
            if watch.began.elapsed() > watch.criteria.max_time {
                return Err(DiskFailure::OutOfStep.into());
            }
            // Whatever the memory's state is, it is not time to go; the next look decides.
            return Ok(());
        }
        watch.pass = ram.dirty_sync_count;
        if watch.pass < 2 {
            // The first sync only says that all memory is to be sent.
            return Ok(());
        }
        watch.history.push(Iteration {
            remaining: Bytes(ram.remaining),
            dirty_rate: BytesPerSec(ram.dirty_pages_rate.saturating_mul(ram.page_size)),
            bandwidth: BytesPerSec((ram.mbps * 1e6 / 8.0) as u64),
            elapsed: watch.began.elapsed(),
        });
        let criteria = watch.slowed.judged_by(&watch.criteria, info);
        match stop::decide(&watch.history, &criteria) {
            Decision::KeepCopying => Ok(()),
            Decision::GoNow { downtime, because } => {
                tracing::info!(?because, expected_ms = downtime.as_millis() as u64, "go");
                watch.going = true;
                let parameters =
                    MigrateParameters { downtime_limit_ms: Some(GO_MS), max_bandwidth_bytes: None };
                Ok(qmp.migrate_set_parameters(parameters).await?)
            }
            Decision::GiveUp { because, .. } => {
                self.slow_down(qmp, &mut watch.slowed, because).await
            }
        }
    }

    /// The guest is paused and QEMU waits: the last cheap veto has passed. The tail, END.
    async fn finish_stream(
        &mut self,
        qmp: &Qmp,
        events: &mut broadcast::Receiver<QmpEvent>,
        pump: &mut Pump,
    ) -> Result<(), Failure> {
        self.catch_stop(events, &pump.relay);
        pump.relay.unbound();
        let unlimited = MigrateParameters { downtime_limit_ms: None, max_bandwidth_bytes: Some(0) };
        qmp.migrate_set_parameters(unlimited).await?;
        qmp.migrate_continue().await?;
        let mut migration_done = false;
        let continued = clock::now();
        let deadline = continued + STREAM_END_LIMIT;
        let mut poll = tokio::time::interval(Duration::from_millis(5));
        while !migration_done {
            tokio::select! {
                _ = poll.tick() => {}
                word = heard(&mut self.words) => return Err(unwelcome(word)),
                input = self.inputs.recv() => {
                    self.take_input(input, Some((qmp, &pump.relay))).await?;
                    continue;
                }
            }
            let info = qmp.query_migrate().await?;
            match info.status {
                MigrationStatus::Completed => migration_done = true,
                MigrationStatus::Active
                | MigrationStatus::Device
                | MigrationStatus::PreSwitchover => {}
                _ => return Err(qemu_failure(&info)),
            }
            if clock::now() > deadline {
                let limit = STREAM_END_LIMIT;
                return Err(Failure::Slow { what: "end its stream", limit });
            }
        }
        let (qemu_ms, drained) = (millis(continued.elapsed()), clock::now());
        self.drain_rest(pump).await?;
        tracing::info!(
            qemu_ms,
            link_ms = millis(drained.elapsed()),
            "the guest stands; its stream has left"
        );
        Ok(())
    }

    /// The STOP event comes at about the same time as the status that was polled.
    fn catch_stop(&mut self, events: &mut broadcast::Receiver<QmpEvent>, relay: &Relay) {
        while let Ok(event) = events.try_recv() {
            if event.name == "STOP" {
                self.stopped(&event, relay);
            }
        }
        self.stop_seen.get_or_insert_with(clock::now);
    }

    async fn drain_rest(&mut self, pump: &mut Pump) -> Result<(), Failure> {
        let (writer, ended) = loop {
            tokio::select! {
                drained = &mut pump.drain => break drained.map_err(|_| LinkError::Closed)?,
                word = heard(&mut self.words) => return Err(unwelcome(word)),
                input = self.inputs.recv() => {
                    self.take_input_paused(input, &pump.relay)?;
                }
            }
        };
        self.writer = Some(writer);
        let ended = ended?;
        self.progress.update(|progress| {
            progress.bytes_sent = ended.total;
            progress.bytes_remaining = 0;
        });
        let fill = pump.fill.take().ok_or(LinkError::Closed)?;
        let filled = fill.await.map_err(|_| LinkError::Closed)?;
        if let Some(absorbed) = filled? {
            self.tell_pages(absorbed).await?;
        }
        if let Some(writer) = &mut self.writer {
            writer.send(&Frame::End(ended)).await?;
        }
        Ok(())
    }

    /// Waits for LOADED, showing that this side is alive.
    pub(super) async fn await_loaded(&mut self, qmp: &Qmp) -> Result<Generation, Failure> {
        let deadline = clock::now() + LOADED_LIMIT;
        loop {
            let until = deadline.min(clock::now() + PING_EVERY);
            tokio::select! {
                word = self.next_word_or_ping(until) => match word? {
                    Some(Frame::Loaded(generation)) => return self.last_veto(qmp, generation),
                    Some(other) => return Err(unwelcome(Ok(other))),
                    None => {}
                },
            }
            if clock::now() >= deadline {
                return Err(LinkError::Silent(LOADED_LIMIT).into());
            }
        }
    }

    /// LOADED is here. Whoever cancels must have done so by now; a guest that died meanwhile, or
    /// runs, must not be ceded.
    fn last_veto(&mut self, qmp: &Qmp, generation: Generation) -> Result<Generation, Failure> {
        if qmp.is_closed() && !self.guest_quit_for_cold {
            return Err(Failure::GuestGone);
        }
        while let Ok(input) = self.inputs.try_recv() {
            if let Input::Cancel { reason, answer } = input {
                let _ = answer.send(true);
                return Err(Failure::Cancelled(reason));
            }
        }
        Ok(generation)
    }

    async fn next_word_or_ping(&mut self, until: Instant) -> Result<Option<Frame>, Failure> {
        match self.next_word(until).await {
            Ok(word) => Ok(Some(word)),
            Err(LinkError::Silent(_)) => {
                if let Some(writer) = &mut self.writer {
                    writer.send(&Frame::Ping(0)).await?;
                }
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// An input while the guest runs.
    pub(super) async fn take_input(
        &mut self,
        input: Option<Input>,
        at_work: Option<(&Qmp, &Relay)>,
    ) -> Result<(), Failure> {
        match input {
            Some(Input::Cancel { reason, answer }) => {
                let _ = answer.send(true);
                Err(Failure::Cancelled(reason))
            }
            Some(Input::Limit(limit)) => {
                self.limit = limit;
                if let Some((qmp, relay)) = at_work {
                    relay.set_limit(limit);
                    self.tell_limits().await?;
                    self.limit_serving(limit);
                    let parameters = MigrateParameters {
                        downtime_limit_ms: None,
                        max_bandwidth_bytes: Some(self.stream_limit()),
                    };
                    qmp.migrate_set_parameters(parameters).await?;
                }
                Ok(())
            }
            Some(Input::DiskLimit(limit)) => Ok(self.limit_disks(limit).await?),
            Some(Input::Claim(answer)) => {
                let _ = answer.send(false);
                Ok(())
            }
            // Nobody is left to tell us anything; the migration goes on by itself.
            None => {
                tokio::time::sleep(POLL).await;
                Ok(())
            }
        }
    }

    /// An input while the guest is paused and QEMU's part is over.
    fn take_input_paused(&mut self, input: Option<Input>, relay: &Relay) -> Result<(), Failure> {
        match input {
            Some(Input::Cancel { reason, answer }) => {
                let _ = answer.send(true);
                Err(Failure::Cancelled(reason))
            }
            Some(Input::Limit(limit)) => {
                self.limit = limit;
                relay.set_limit(limit);
                self.limit_serving(limit);
                Ok(())
            }
            // Nothing is written any more that it could hold back.
            Some(Input::DiskLimit(_)) => Ok(()),
            Some(Input::Claim(answer)) => {
                let _ = answer.send(false);
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// The next word of the destination; for ever where there is no link.
pub(super) async fn heard(
    words: &mut Option<tokio::sync::mpsc::Receiver<Result<Frame, LinkError>>>,
) -> Result<Frame, LinkError> {
    match words {
        Some(words) => words.recv().await.unwrap_or(Err(LinkError::Closed)),
        None => std::future::pending().await,
    }
}

/// What a word means that has no place before LOADED.
pub(super) fn unwelcome(word: Result<Frame, LinkError>) -> Failure {
    match word {
        Ok(Frame::Abort(reason) | Frame::Refused(reason)) => Failure::Refused(reason),
        Ok(other) => LinkError::Unexpected { got: frame_name(&other), wanted: "LOADED" }.into(),
        Err(error) => error.into(),
    }
}

/// What the other half of the pump said: an end of the link may have been its doing.
fn first_cause(pump: &mut Pump, failure: Failure) -> Failure {
    use futures_util::FutureExt;
    match pump.fill.as_mut().and_then(FutureExt::now_or_never) {
        Some(Ok(Err(cause))) => cause,
        _ => failure,
    }
}

fn drain_failure(
    drained: Result<(FrameWriter, Result<Ended, LinkError>), tokio::task::JoinError>,
) -> Failure {
    match drained {
        Ok((_, Err(error))) => error.into(),
        // The stream ended before the guest was paused: QEMU gave up, and says why if asked.
        Ok((_, Ok(_))) | Err(_) => Failure::GuestGone,
    }
}

fn qemu_failure(info: &MigrateInfo) -> Failure {
    Failure::Qemu { status: info.status, detail: info.error_desc.clone() }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What QEMU may leave for the pause: what is wanted less what else the pause costs.
fn limit_ms(criteria: &StopCriteria) -> u64 {
    let left = criteria.downtime.saturating_sub(criteria.fixed_pause);
    millis(left).clamp(20, GO_MS)
}

/// What is left divided by what of the rate is gained on the guest; unknown where nothing is.
fn time_to_go(left: Bytes, rate: BytesPerSec, dirty: BytesPerSec) -> Option<Duration> {
    // While more is dirtied than half of what is sent, "left over gain" swings wildly from one
    // iteration to the next: then the honest word is "unknown".
    if rate.0 == 0 || dirty.0 > rate.0 / 2 {
        return None;
    }
    left.time_at(rate - dirty)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_to_go_is_given_only_where_there_is_one() {
        let (left, rate) = (Bytes(100 << 20), BytesPerSec(25 << 20));
        assert_eq!(time_to_go(left, rate, BytesPerSec(0)), Some(Duration::from_secs(4)));
        assert_eq!(time_to_go(left, rate, BytesPerSec(5 << 20)), Some(Duration::from_secs(5)));
        assert_eq!(time_to_go(left, rate, BytesPerSec(20 << 20)), None);
        assert_eq!(time_to_go(left, BytesPerSec(0), BytesPerSec(0)), None);
    }
}
