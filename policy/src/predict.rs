//! How long a VM's migration takes and what it costs, before it starts.
//!
//! `plan` prints it, the report sets the measurement beside it. Not here: the network that decides
//! the bandwidth (`predict/host.rs`), and the measuring itself.
//!
//! The model: iteration 1 sends every non-zero page; while an iteration lasts `t`, the guest
//! dirties `D(t) = W * (1 - exp(-S * t / W))` distinct pages: S per second at first, but never more
//! than the working set W, because a page that is dirtied twice is sent once. The next iteration
//! sends those. (SOLive's equation (2) is the same without the bound, and grows without end where S
//! exceeds B.) It ends when what is left fits into the pause that is wanted, or at a cap; then the
//! remainder is sent in the pause.
//!
//! Local disks go first: their bytes at what the guest's own writes leave of the bandwidth (MigrateFS,
//! inequality (1)); after that these writes go to both sides, and memory has what they leave. A guest
//! that writes as fast as the link carries never gets there: it is counted as held to nine tenths, and
//! as not converging.
//!
//! **The error** is carried, not hidden: [`Range`] holds the figure computed with pages and dirty
//! rate lowered, and the bandwidth raised, by what the measurement says it may be off by; as
//! measured; and the other way round. The model's own error is not in it; the report shows that
//! one.

mod experience;
mod host;

pub use experience::Experience;
pub use host::{
    Departure, HostPrediction, HostTerms, LinkUse, VmPrediction, available, predict_host,
};

use std::time::Duration;

use lifeboat_protocol::units::{Bytes, BytesPerSec, PAGE_BYTES};
use serde::{Deserialize, Serialize};

use crate::measured::MeasuredVm;
use crate::stop::StopCriteria;

/// A page in QEMU's stream is preceded by its address and flags, 8 bytes (`ram.c`,
/// `save_page_header`).
const PAGE_HEADER: u64 = 8;

/// A zero page is its header and one byte.
const ZERO_PAGE: u64 = 9;

/// Bytes that a full Ethernet frame of TCP has on the wire for each byte of payload: 1514 for 1448
/// (timestamps on).
const FRAMING: f64 = 1514.0 / 1448.0;

/// A guest that writes faster than this share of the bandwidth is counted as held to it.
const WRITES_SHARE_MOST: f64 = 0.9;

/// What one migration will take.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Prediction {
    /// Pre-copy iterations; the pause's is not counted. 0 when no memory moves.
    pub iterations: u32,
    /// Start to nothing left to transfer.
    pub total_time: Duration,
    /// Pause at the source to resume at the destination.
    pub downtime: Duration,
    /// Bytes on the wire, framing included.
    pub bytes: Bytes,
    /// Whether the pause that is wanted is reached without a cap.
    pub converges: bool,
}

/// A figure with its stated error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Range<T> {
    /// If every measurement was off to our advantage.
    pub low: T,
    /// As measured.
    pub likely: T,
    /// If every measurement was off to our disadvantage.
    pub high: T,
}

impl<T> Range<T> {
    /// Each of the three figures turned into another.
    pub fn map<U>(&self, turn: impl Fn(&T) -> U) -> Range<U> {
        Range { low: turn(&self.low), likely: turn(&self.likely), high: turn(&self.high) }
    }

    /// The three figures of two ranges joined.
    pub fn join<U, V>(&self, other: &Range<U>, join: impl Fn(&T, &U) -> V) -> Range<V> {
        Range {
            low: join(&self.low, &other.low),
            likely: join(&self.likely, &other.likely),
            high: join(&self.high, &other.high),
        }
    }
}

/// Pre-copy at a `bandwidth` on the wire, bytes/s, with the figures exactly as given. A bandwidth
/// of zero counts as one byte per second.
#[must_use]
pub fn pre_copy(vm: &MeasuredVm, bandwidth: BytesPerSec, criteria: &StopCriteria) -> Prediction {
    let page_bytes = (PAGE_BYTES + PAGE_HEADER) as f64 * FRAMING;
    let disk = disk_copy(vm, bandwidth);
    let rate = (bandwidth - disk.writes).0.max(1) as f64;
    let memory_pages = vm.memory.pages().0.max(vm.non_zero.0);
    let zero_bytes = (memory_pages - vm.non_zero.0) as f64 * ZERO_PAGE as f64 * FRAMING;
    let wanted = criteria.downtime.saturating_sub(criteria.fixed_pause).as_secs_f64();
    let (mut sent, mut seconds, mut iterations) = (0.0, 0.0, 0);
    let mut left = vm.non_zero.0 as f64 * page_bytes + zero_bytes;
    let converges = loop {
        let lasts = left / rate;
        (sent, seconds, iterations) = (sent + left, seconds + lasts, iterations + 1);
        left = dirtied(vm, memory_pages, lasts) * page_bytes;
        if left / rate <= wanted {
            break true;
        }
        if iterations >= criteria.max_iterations || seconds >= criteria.max_time.as_secs_f64() {
            break false;
        }
    };
    let downtime = span(left / rate).saturating_add(criteria.fixed_pause);
    let total_time = span(seconds).saturating_add(disk.time).saturating_add(downtime);
    let bytes = Bytes((sent + left) as u64) + disk.bytes;
    let converges = converges && disk.converges;
    Prediction { iterations, total_time, downtime, bytes, converges }
}

/// How fast an agent takes a guest's memory in before it stops the guest. A careful estimate: 190 MB were
/// absorbed in 60 ms on two cores.
const ABSORBED_AT: BytesPerSec = BytesPerSec(1_000_000_000);
/// After so many passes over what a guest has dirtied meanwhile there will not be less.
const ABSORBED_PASSES: u32 = 6;
/// What it takes to slow a guest down step by step, each tried for two passes of a second.
const SLOWING: Duration = Duration::from_secs(8);

/// What its own agent's taking it in costs a guest whose pages follow it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Absorption {
    time: Duration,
    pause: Duration,
    fits: bool,
}

fn absorption(vm: &MeasuredVm, criteria: &StopCriteria) -> Absorption {
    let rate = ABSORBED_AT.0 as f64;
    let memory_pages = vm.memory.pages().0.max(vm.non_zero.0);
    let wanted = criteria.downtime.saturating_sub(criteria.fixed_pause).as_secs_f64();
    let (mut seconds, mut lasts) = (0.0, vm.non_zero.bytes().0 as f64 / rate);
    for _ in 0..ABSORBED_PASSES {
        seconds += lasts;
        lasts = dirtied(vm, memory_pages, lasts) * PAGE_BYTES as f64 / rate;
        if lasts <= wanted {
            break;
        }
    }
    let pause = span(lasts).saturating_add(criteria.fixed_pause);
    let limit = criteria.downtime_limit.max(criteria.downtime);
    match pause <= limit {
        true => Absorption { time: span(seconds), pause, fits: true },
        false => {
            Absorption { time: span(seconds).saturating_add(SLOWING), pause: limit, fits: false }
        }
    }
}

/// Whether a guest's own agent takes its memory in as fast as it writes it, so that its pages can follow it
/// without that it is slowed down.
#[must_use]
pub fn is_absorbed(vm: &MeasuredVm, criteria: &StopCriteria) -> bool {
    absorption(vm, criteria).fits
}

/// Post-copy at a `bandwidth` on the wire: the source's own agent absorbs the guest at memory speed, the
/// guest runs at the destination, and every page that is not zero goes once. How much the guest writes
/// matters only where that is more than memory speed: it is counted as slowed down ([`is_absorbed`]).
#[must_use]
pub fn post_copy(vm: &MeasuredVm, bandwidth: BytesPerSec, criteria: &StopCriteria) -> Prediction {
    let page_bytes = (PAGE_BYTES + PAGE_HEADER) as f64 * FRAMING;
    let disk = disk_copy(vm, bandwidth);
    let rate = (bandwidth - disk.writes).0.max(1) as f64;
    let pages = vm.non_zero.0 as f64 * page_bytes;
    let Absorption { time: absorbing, pause: downtime, .. } = absorption(vm, criteria);
    let copying = span(pages / rate).saturating_add(absorbing).saturating_add(downtime);
    Prediction {
        iterations: 1,
        total_time: copying.saturating_add(disk.time),
        downtime,
        bytes: Bytes(pages as u64) + disk.bytes,
        converges: disk.converges,
    }
}

/// Until all of a scattered VM is off the source, which sends pages at `sent` bytes/s on the wire: each
/// goes `factor` times, to more than one store for redundancy. Its disks go before, and straight to
/// the destination, at `direct` bytes/s.
#[must_use]
pub fn eviction(
    vm: &MeasuredVm,
    direct: BytesPerSec,
    sent: BytesPerSec,
    factor: f64,
    criteria: &StopCriteria,
) -> Duration {
    let memory = MeasuredVm { disk: Bytes::ZERO, disk_writes: BytesPerSec::ZERO, ..vm.clone() };
    let once = post_copy(&memory, sent, criteria);
    let again = once.bytes.0 as f64 * (factor - 1.0).max(0.0) / sent.0.max(1) as f64;
    let disks = disk_copy(vm, direct).time;
    once.total_time.saturating_add(span(again)).saturating_add(disks)
}

/// What pages bring that go to stores while their guest still runs at its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ahead {
    /// By so much sooner the source is rid of the guest.
    pub sooner: Duration,
    /// What goes in vain, because the guest writes to it afterwards.
    pub in_vain: Bytes,
}

/// Less of a guest than this is not worth it: while it runs, its CPUs are its own. Over 1 Gbit/s, where an eighth of
/// one had gone ahead, two cores were busy with that and nothing was gained (`lab/experiment ahead`).
const AHEAD_LEAST: f64 = 0.2;

/// Whether pages of a guest are to go to stores while its own agent takes its memory in: the source's link has
/// nothing else to do in that time, which matters where it is nearly as fast as memory. `sent`: bytes/s on the
/// wire, of which each page takes `factor` times its own. `None` where it saves less than a fifth, or half
/// of it would go in vain.
#[must_use]
pub fn ahead(vm: &MeasuredVm, sent: BytesPerSec, factor: f64) -> Option<Ahead> {
    let page_bytes = (PAGE_BYTES + PAGE_HEADER) as f64 * FRAMING * factor.max(1.0);
    let pages = vm.non_zero.0 as f64;
    let seconds = vm.non_zero.bytes().0 as f64 / ABSORBED_AT.0 as f64;
    let gone = (sent.0 as f64 * seconds / page_bytes).min(pages);
    // As if everything that it writes to had gone.
    let in_vain = dirtied(vm, vm.memory.pages().0.max(vm.non_zero.0), seconds).min(gone);
    let counting = gone - in_vain;
    let pays = counting >= pages * AHEAD_LEAST && counting >= in_vain && counting > 0.0;
    pays.then(|| Ahead {
        sooner: span(counting * page_bytes / sent.0.max(1) as f64),
        in_vain: Bytes((in_vain * page_bytes) as u64),
    })
}

/// What a VM's local disks take before its memory moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskCopy {
    /// Until they are in step.
    pub time: Duration,
    /// What they hold, framing included.
    pub content: Bytes,
    /// All that goes on the wire until then.
    pub bytes: Bytes,
    /// What the guest's writes take of the link from then on.
    pub writes: BytesPerSec,
    /// Whether they get there without holding the guest back.
    pub converges: bool,
}

/// The copy of a VM's local disks at `bandwidth` on the wire.
#[must_use]
pub fn disk_copy(vm: &MeasuredVm, bandwidth: BytesPerSec) -> DiskCopy {
    if vm.disk == Bytes::ZERO {
        let (none, writes) = (Bytes::ZERO, BytesPerSec::ZERO);
        let time = Duration::ZERO;
        return DiskCopy { time, content: none, bytes: none, writes, converges: true };
    }
    let writes = vm.disk_writes.min(bandwidth.scale(WRITES_SHARE_MOST));
    let left = Bytes((vm.disk.0 as f64 * FRAMING) as u64);
    let time = left.time_at(bandwidth - writes).unwrap_or(Duration::MAX);
    let sent_twice = Bytes((writes.0 as f64 * time.as_secs_f64()) as u64);
    let converges = writes == vm.disk_writes;
    DiskCopy { time, content: left, bytes: left + sent_twice, writes, converges }
}

/// Distinct pages dirtied in `seconds`.
fn dirtied(vm: &MeasuredVm, memory_pages: u64, seconds: f64) -> f64 {
    let written = if vm.working_set.0 == 0 { vm.non_zero.0 } else { vm.working_set.0 };
    let working_set = written.min(memory_pages) as f64;
    if working_set == 0.0 {
        return 0.0;
    }
    working_set * -(-(vm.dirty_rate.0 as f64) * seconds / working_set).exp_m1()
}

/// Predicts one mode with figures as given: [`pre_copy`] or [`post_copy`].
pub type Model = fn(&MeasuredVm, BytesPerSec, &StopCriteria) -> Prediction;

/// A model with the measurement's error, and with a bandwidth that may be off by the share
/// `bandwidth_error`.
#[must_use]
pub fn range(
    model: Model,
    vm: &MeasuredVm,
    bandwidth: BytesPerSec,
    bandwidth_error: f64,
    criteria: &StopCriteria,
) -> Range<Prediction> {
    // What states no error is not thereby exact.
    let off = if vm.error.is_finite() { vm.error.clamp(0.0, 1.0) } else { 1.0 };
    let rate_off = bandwidth_error.clamp(0.0, 0.99);
    let with = |sign: f64| {
        let scaled = MeasuredVm {
            non_zero: vm.non_zero.scale(1.0 + sign * off),
            dirty_rate: vm.dirty_rate.scale(1.0 + sign * off),
            working_set: vm.working_set.scale(1.0 + sign * off),
            ..vm.clone()
        };
        let scaled = MeasuredVm {
            non_zero: scaled.non_zero.min(vm.memory.pages().max(vm.non_zero)),
            ..scaled
        };
        model(&scaled, bandwidth.scale(1.0 - sign * rate_off), criteria)
    };
    // Less to send does not always mean a shorter pause: the copying may stop an iteration
    // earlier, with more left. So each figure has its own lowest and highest.
    let (less, likely, more) = (with(-1.0), with(0.0), with(1.0));
    Range {
        low: less.lower(&likely).lower(&more),
        high: less.higher(&likely).higher(&more),
        likely,
    }
}

impl Prediction {
    fn lower(&self, other: &Self) -> Self {
        Self {
            iterations: self.iterations.min(other.iterations),
            total_time: self.total_time.min(other.total_time),
            downtime: self.downtime.min(other.downtime),
            bytes: self.bytes.min(other.bytes),
            converges: self.converges || other.converges,
        }
    }

    fn higher(&self, other: &Self) -> Self {
        Self {
            iterations: self.iterations.max(other.iterations),
            total_time: self.total_time.max(other.total_time),
            downtime: self.downtime.max(other.downtime),
            bytes: self.bytes.max(other.bytes),
            converges: self.converges && other.converges,
        }
    }
}

/// What stopping and starting take, from the operator's experience or an earlier report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ColdTimes {
    /// Order to shut down until the guest has gone.
    pub stop: Duration,
    /// Start until the guest does its work.
    pub start: Duration,
}

impl Default for ColdTimes {
    /// A guest that shuts down in 10 s and boots in 20 s.
    fn default() -> Self {
        Self { stop: Duration::from_secs(10), start: Duration::from_secs(20) }
    }
}

/// A cold migration: no memory moves, and what is not its disks is downtime. Times may be half or
/// twice as long.
#[must_use]
pub fn cold(times: ColdTimes, vm: &MeasuredVm, bandwidth: BytesPerSec) -> Range<Prediction> {
    let disk = disk_copy(vm, bandwidth);
    let with = |factor: f64| {
        let downtime = (times.stop.saturating_add(times.start)).mul_f64(factor);
        Prediction {
            iterations: 0,
            total_time: downtime.saturating_add(disk.time),
            downtime,
            bytes: disk.bytes,
            converges: disk.converges,
        }
    };
    Range { low: with(0.5), likely: with(1.0), high: with(2.0) }
}

/// Seconds as a `Duration`; what no `Duration` can hold is the longest one.
fn span(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests;
