//! How far, and how long still: what a person is shown. Pure arithmetic.
//!
//! Two promises. `done` never runs backwards: it is mapped from what can only grow, and the greater
//! of old and new is kept. And a time to go that is not known is `None`, never a guess: one part
//! unknown makes the whole unknown.

use lifeboat_protocol::agent::{MigrationProgress, Phase};
use lifeboat_protocol::terms::Mode;

use super::machine::Evacuation;
use super::vm::{Leg, VmPhase, VmRecord};

/// Share of the bar that disks fill, where there are any; memory goes on from there.
const DISKS_END: f64 = 0.60;
/// Share of the bar that the first pass over the memory fills.
const FIRST_PASS: f64 = 0.80;
/// Where all further iterations together end; each fills half of what is left.
const ITERATIONS_END: f64 = 0.95;
/// Shown while the guest is paused.
const SWITCHOVER: f64 = 0.96;
/// Shown from COMMIT on.
const COMMITTED: f64 = 0.98;
/// Where pages follow their guest, what comes before COMMIT costs little: it ends here.
const PAGES_BEGIN: f64 = 0.10;
/// Shown when everything of a scattered VM is in stores; its destination gathers from here on.
const SCATTERED: f64 = 0.60;

/// How much of a migration is done, 0 to 1, not below `before`.
///
/// The first pass fills the bar in proportion to the memory no longer outstanding. Each further
/// iteration sends what was dirtied meanwhile; how many there will be is not known, so iteration
/// n + 1 begins half way between where iteration n began and the end of them all.
#[must_use]
pub fn done_share(mode: Mode, progress: &MigrationProgress, before: f64) -> f64 {
    let now = match (progress.phase(), mode) {
        (Phase::Completed, Mode::ScatterGather) => SCATTERED,
        (Phase::Completed, _) => 1.0,
        (Phase::Failed | Phase::Cancelled | Phase::Lost, _) => before,
        (_, Mode::PostCopy) => pages_follow(progress, COMMITTED),
        (_, Mode::ScatterGather) => pages_follow(progress, SCATTERED),
        (_, Mode::Auto | Mode::PreCopy | Mode::Cold) => copied_first(progress),
    };
    now.max(before).clamp(0.0, 1.0)
}

/// The same of a leg: where its disks go on to an intermediary, its source is rid of it at [`SCATTERED`].
#[must_use]
pub(super) fn leg_share(leg: Option<&Leg>, progress: &MigrationProgress, before: f64) -> f64 {
    let mode = leg.map_or(Mode::Auto, |leg| leg.mode);
    match leg.is_some_and(|leg| leg.disk_store.is_some()) {
        true => SCATTERED * done_share(mode, progress, before / SCATTERED),
        false => done_share(mode, progress, before),
    }
}

/// Everything goes before COMMIT.
fn copied_first(progress: &MigrationProgress) -> f64 {
    match progress.phase() {
        Phase::DiskBulk => DISKS_END * disks_copied(progress),
        Phase::MemoryCopy => copied(progress),
        Phase::Switchover => SWITCHOVER,
        Phase::Committing | Phase::Uncertain => COMMITTED,
        Phase::PostCopy | Phase::Gather | Phase::DiskRest => COMMITTED,
        _ => 0.0,
    }
}

/// The guest's memory leaves the source after COMMIT; its disks before. All has left at `end`.
fn pages_follow(progress: &MigrationProgress, end: f64) -> f64 {
    let disks = progress.disk_bytes_sent.saturating_add(progress.disk_bytes_left) > 0;
    let begin = if disks { SCATTERED.min(DISKS_END) } else { PAGES_BEGIN };
    match progress.phase() {
        Phase::DiskBulk => begin * disks_copied(progress),
        Phase::MemoryCopy | Phase::Switchover | Phase::Committing | Phase::Uncertain => begin,
        Phase::PostCopy | Phase::Gather | Phase::DiskRest => {
            let sent = progress.bytes_sent as f64;
            let all = sent + progress.bytes_remaining as f64;
            begin + (end - begin) * sent / all.max(1.0)
        }
        _ => 0.0,
    }
}

/// How much is done of a VM whose source is rid of it, as its destination tells.
pub(super) fn gathered_share(progress: &MigrationProgress) -> f64 {
    let have = match progress.pages_total {
        // Its disks follow it.
        0 => disks_copied(progress),
        all => progress.pages_arrived as f64 / all as f64,
    };
    SCATTERED + (COMMITTED - SCATTERED) * have.clamp(0.0, 1.0)
}

fn disks_copied(progress: &MigrationProgress) -> f64 {
    let all = progress.disk_bytes_sent.saturating_add(progress.disk_bytes_left);
    progress.disk_bytes_sent as f64 / all.max(1) as f64
}

fn copied(progress: &MigrationProgress) -> f64 {
    let total = progress.bytes_total.max(1) as f64;
    let left = (progress.bytes_remaining as f64 / total).clamp(0.0, 1.0);
    if progress.iteration <= 1 {
        return FIRST_PASS * (1.0 - left);
    }
    let further = f64::from(progress.iteration.saturating_sub(2).min(60));
    let left_of_bar = (ITERATIONS_END - FIRST_PASS) * 0.5_f64.powf(further);
    ITERATIONS_END - left_of_bar * (0.5 + 0.5 * left)
}

/// Milliseconds until the evacuation is over; `None` when it cannot be said.
///
/// What moves now counts with the agents' own estimate, what waits with the plan's. Side by side,
/// the waiting ones share the slots.
#[must_use]
pub fn time_to_go(evacuation: &Evacuation) -> Option<u64> {
    let slots = u64::from(evacuation.order.parallel.max(1));
    let mut live = 0;
    let mut waiting: u64 = 0;
    for record in evacuation.vms.iter().filter(|record| !record.phase.is_final()) {
        match record.phase {
            VmPhase::Waiting | VmPhase::Measuring => {
                let between = record.prediction.between_ms;
                waiting = waiting.saturating_add(predicted(record)?).saturating_add(between);
            }
            _ => live = live.max(vm_time_to_go(record)?),
        }
    }
    Some(waiting.div_ceil(slots).saturating_add(live))
}

/// Milliseconds until a VM's leg is over; `None` when it cannot be said.
#[must_use]
pub fn vm_time_to_go(record: &VmRecord) -> Option<u64> {
    match (record.phase, &record.progress) {
        (VmPhase::Reserving | VmPhase::Preparing, _) | (VmPhase::Sending, None) => {
            predicted(record)
        }
        (VmPhase::Committing, Some(progress)) if pages_leave(progress) => {
            let rate = progress.rate_bits_per_sec / 8;
            (rate > 0).then(|| progress.bytes_remaining.saturating_mul(1000) / rate)
        }
        (VmPhase::Committing, Some(progress)) if progress.phase() == Phase::DiskRest => {
            let rate = progress.disk_bytes_per_sec;
            (rate > 0).then(|| progress.disk_bytes_left.saturating_mul(1000) / rate)
        }
        (VmPhase::Sending | VmPhase::Committing, Some(progress)) => {
            progress.time_to_go_known.then_some(progress.time_to_go_ms)
        }
        // Blocks that come from an intermediary; pages that are gathered do not say how long.
        (VmPhase::Gathering, Some(progress)) if progress.disk_bytes_per_sec > 0 => {
            let left = progress.disk_bytes_left.saturating_mul(1000);
            Some(left / progress.disk_bytes_per_sec)
        }
        (VmPhase::Releasing, _) => Some(0),
        _ => None,
    }
}

/// Whether pages follow their guest now: then what is left, at the rate of the last second, is all that
/// there is to say.
fn pages_leave(progress: &MigrationProgress) -> bool {
    matches!(progress.phase(), Phase::PostCopy | Phase::Gather)
}

fn predicted(record: &VmRecord) -> Option<u64> {
    let leg = record.leg.as_ref().filter(|_| record.phase.is_live());
    let prediction = leg.map_or(record.prediction, |leg| leg.prediction);
    (prediction.total_ms > 0).then_some(prediction.total_ms)
}
