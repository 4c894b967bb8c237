//! Pre-copy at the source: QEMU into the relay until it is time to go, and the pause. What follows it is
//! in `ending`.
//!
//! QEMU is held at a downtime limit of 1 ms (0 would mean "now") while it copies. The limit is
//! then raised to what is wanted, and QEMU itself switches over at the first moment at which
//! what is left fits; `policy::stop` watches the iterations and ends what will not converge.
//! `pause-before-switchover` gives one last moment at which nothing has been lost by stopping.

use std::time::{Duration, Instant};

use lifeboat_policy::pace::beside_writes;
use lifeboat_policy::stop::{self, Decision, Iteration, StopCriteria};
use lifeboat_protocol::agent::Phase;
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
use crate::postcopy::absorb::{Absorbed, Absorber};
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
/// QEMU connects its stream within this time.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Of a stream whose pages are absorbed so much may wait for the link when the guest is paused.
const BACKLOG_MOST: u64 = 32 << 10;
/// A guest that goes on painting keeps it filled: that is no reason to stay.
const BACKLOG_PATIENCE: Duration = Duration::from_secs(3);
/// So near its end the first pass may be the last.
const NEARLY_THERE: Duration = Duration::from_secs(1);

/// The relay's two tasks. Dropping it ends both.
pub(super) struct Pump {
    pub(super) relay: Relay,
    /// `None` once its result has been taken.
    pub(super) fill: Option<tokio::task::JoinHandle<Result<Option<Absorbed>, Failure>>>,
    pub(super) drain: tokio::task::JoinHandle<(FrameWriter, Result<Ended, LinkError>)>,
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
    /// Every write to the disks is on both sides, or on its way; also where there are none.
    disks_in_step: bool,
    slowed: Slowed,
    /// Since when what is absorbed has waited for a backlog to leave.
    backlog_since: Option<Instant>,
}

impl SourceTask {
    /// Pre-copy, from the first page to the last byte of the stream.
    pub(super) async fn copy_memory(&mut self, qmp: &Qmp) -> Result<(), Failure> {
        let mut events = qmp.events();
        if self.has_disks() {
            self.await_arrival().await?;
        }
        if self.memory.is_some() {
            // Now, and not at the pause: a lost packet costs a new connection a second.
            self.start_serving();
        }
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
        let accepted = tokio::time::timeout(CONNECT_LIMIT, listener.accept()).await;
        let _ = std::fs::remove_file(&path);
        let slow = || Failure::Slow { what: "connect its stream", limit: CONNECT_LIMIT };
        let (socket, _) = accepted.map_err(|_| slow())?.map_err(Failure::Socket)?;
        let relay = Relay::new(self.limit);
        let writer = self.writer.take().ok_or(LinkError::Closed)?;
        let budget = self.absorb_budget();
        let absorber = self.memory.as_ref().map(|memory| Absorber::new(memory.pages()));
        if let Some(absorber) = &absorber {
            self.scatter_ahead(absorber.contents())?;
        }
        Ok(Pump {
            fill: Some(crate::tasks::spawn("relay fill", {
                let relay = relay.clone();
                async move {
                    match absorber {
                        Some(absorber) => absorb(relay, socket, absorber, budget).await,
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
            // With disks QEMU does not go by itself: whether they are in step is asked first. Nor while pages
            // go ahead on the link that its last ones take.
            downtime_limit_ms: match self.has_disks() || self.scattering.is_some() {
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
                    Ok(event) if event.name == "STOP" => {
                        self.stopped(&event, &pump.relay);
                        self.lift_disk_limit().await?;
                    }
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
            let passes = info.ram.as_ref().map_or(0, |ram| ram.dirty_sync_count);
            self.heed_scattering(passes)?;
            match info.status {
                MigrationStatus::PreSwitchover => {
                    return Ok(self.disks_must_be_in_step().await?);
                }
                MigrationStatus::Setup | MigrationStatus::Active | MigrationStatus::Device => {}
                _ => return Err(qemu_failure(&info)),
            }
            self.decide(qmp, &info, &pump.relay, &mut watch).await?;
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
            backlog_since: None,
        }
    }

    /// Guests' writes go to both sides now, and over the same link: memory has what they leave. They are
    /// counted as what the guest wrote before it had to wait for the link: memory that takes whatever is free
    /// would slow it down and have still more. Towards the end the guest's own limit holds nothing back for
    /// long, because the pause waits for every write.
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
            relay.set_limit(Some(beside_writes(limit, figures.kept_free)));
        }
        let Some(ram) = &info.ram else { return Ok(()) };
        let soon = (ram.mbps * 1e6 / 8.0 * NEARLY_THERE.as_secs_f64()) as u64;
        if ram.dirty_sync_count >= 2 || (ram.mbps > 0.0 && ram.remaining <= soon) {
            self.loosen_disk_limit().await?;
        }
        Ok(())
    }

    pub(super) fn stopped(&mut self, event: &QmpEvent, relay: &Relay) {
        self.progress.update(|progress| progress.throttle_percent = 0);
        // From here on a blocked stream would freeze QEMU's main loop.
        relay.unbound();
        if let Some(scattering) = &self.scattering {
            scattering.hold();
        }
        self.stop_seen.get_or_insert_with(clock::now);
        self.pause.begin();
        let micros = event.seconds.saturating_mul(1_000_000).saturating_add(event.microseconds);
        self.progress.update(|progress| progress.stop_unix_us = micros);
    }

    fn show(&mut self, info: &MigrateInfo, relay: &Relay, watch: &mut Watch) {
        let Some(ram) = &info.ram else { return };
        let ahead = self.serving.as_ref().map_or(0, |serving| serving.pace.sent());
        let sent = relay.sent() + ahead;
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
        relay: &Relay,
        watch: &mut Watch,
    ) -> Result<(), Failure> {
        let Some(ram) = &info.ram else { return Ok(()) };
        if ram.dirty_sync_count == watch.pass || watch.going {
            return Ok(());
        }
        if self.memory.is_some() && relay.queued() > BACKLOG_MOST {
            // QEMU does not know of it, and the guest would stand still while it leaves.
            let since = *watch.backlog_since.get_or_insert_with(clock::now);
            if since.elapsed() < BACKLOG_PATIENCE {
                return Ok(());
            }
        }
        if !self.scattering_is_quiet() {
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
        tracing::debug!(
            pass = watch.pass,
            mebibytes_left = ram.remaining >> 20,
            dirty_pages_per_sec = ram.dirty_pages_rate,
            mbit_per_sec = ram.mbps as u64,
            slowed_percent = info.cpu_throttle_percentage,
            "a pass is over"
        );
        let percent = info.cpu_throttle_percentage;
        let criteria = watch.slowed.judged_by(&watch.criteria, percent, ram.remaining);
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

pub(super) fn qemu_failure(info: &MigrateInfo) -> Failure {
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
