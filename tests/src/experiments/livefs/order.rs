//! What does the order of the segments bring: those that are written most last, in a plain pre-copy pass; those
//! that are read most first, where the guest moves before its disk?
//!
//! Each is compared with the order of the disk, pair by pair. Pre-copy: a sixth of the image is rewritten at
//! random, 500 times 4 KiB a second, and lies at its front, where the order of the disk is at its worst, or at
//! its back, where it is at its best and ours can gain nothing. On demand: nothing goes before the guest, a quarter
//! at the back is read at random 80 times a second; it was watched for a second, or not at all. Blocks have
//! 16 KiB.
//!
//! Not here: how much goes before the guest (`seven`).

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use lifeboat_agent::disk::sync::rank::{Strategy, Weights};
use lifeboat_lab::experiment::statistics::ratios;
use lifeboat_lab::experiment::{Bound, Check, Record, Sample};
use serde_json::json;

use super::guest::{Load, Step};
use super::rig::{Plan, migrate};
use super::{BLOCK, SEGMENTS, blank, bonnie, read, somewhere};
use crate::experiments::Setting;
use crate::rig::RigError;

/// Its name.
pub const NAME: &str = "livefs-order";

/// What is written, where it is the worst and the best for the order of the disk.
const WRITTEN: [(&str, Range<u64>); 2] = [("front", 0..16), ("back", SEGMENTS - 16..SEGMENTS)];
/// What is read.
const READ: Range<u64> = SEGMENTS - 24..SEGMENTS;
const READERS: usize = 8;
/// What each reads, bytes, and then rests.
const EACH: usize = 65_536;
const REST: Duration = Duration::from_millis(100);
const WATCHED: Duration = Duration::from_secs(1);

const OURS: &str = "busy segments by their turn";
const DISKS: &str = "order of the disk";
const TOTAL: &str = "total_seconds";
const SENT: &str = "sent_mib";
const DELAY: &str = "mean_delay_ms";

fn pre_copy(place: &str, order: &str) -> String {
    format!("pre-copy, written at the {place}, {order}")
}

fn on_demand(order: &str) -> String {
    format!("on demand, {order}")
}

/// Everything goes before the guest. Where writes weigh nothing, the order is the disk's.
fn whole(written: &Range<u64>, order: &str) -> Plan {
    let weights = if order == OURS { Weights::default() } else { Weights::of_reads(1.0) };
    Plan {
        strategy: Strategy::Whole,
        weights,
        threads: 1,
        load: writer(written.clone()),
        ..bonnie()
    }
}

/// Nothing goes before it. What nobody has watched goes in the order of the disk.
fn following(order: &str) -> Plan {
    let monitoring = if order == OURS { WATCHED } else { Duration::ZERO };
    let watched_already = order == OURS;
    Plan {
        monitoring,
        watched_already,
        threads: READERS,
        load: reader(),
        reads_only: true,
        ..bonnie()
    }
}

fn writer(written: Range<u64>) -> Load {
    Arc::new(move |step: Step<'_>| {
        for _ in 0..10 {
            step.image.write_all_at(&[0xee; 4096], somewhere(&written, step.chance))?;
        }
        Ok(Duration::from_millis(20))
    })
}

fn reader() -> Load {
    Arc::new(|step: Step<'_>| {
        let at = somewhere(&READ, step.chance);
        read(step.image, EACH, at / EACH as u64 * EACH as u64)?;
        // Not all at once in the same beat.
        Ok(REST.mul_f64(0.5) + step.chance.up_to(REST))
    })
}

/// Measures each case by both orders in turn, judges.
///
/// # Errors
/// When the rig cannot be raised, or a migration fails.
pub async fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let runs = setting.runs.unwrap_or(if setting.quick { 2 } else { 9 });
    let texts = [
        "what does it bring to send the segments that are written most last, or those that are read \
         most first?",
        "LiveFS sends hot segments first (section III) and measures nothing else; nobody shows the \
         order of a pre-copy",
    ];
    let parameters = json!({
        "runs": runs,
        "block_bytes": BLOCK,
        "guest_writes_bytes_per_sec": 2_048_000,
        "guest_written_segments": 16,
        "guest_reads_per_sec": READERS as f64 / REST.as_secs_f64(),
        "guest_read_segments": READ.end - READ.start,
        "read_bytes_each": EACH,
        "watched_ms": WATCHED.as_millis() as u64,
    });
    let mut record = blank(&setting, NAME, texts, parameters);
    for run in 0..runs {
        // Whatever changes from the first to the last of a round changes for both.
        let orders = if run % 2 == 0 { [OURS, DISKS] } else { [DISKS, OURS] };
        for order in orders {
            for (place, written) in &WRITTEN {
                let case = pre_copy(place, order);
                take(&setting, &mut record, run, case, &whole(written, order)).await?;
            }
            take(&setting, &mut record, run, on_demand(order), &following(order)).await?;
        }
        setting.keep(&record, run + 1, runs);
    }
    record.checks = checks(&record);
    Ok(record)
}

async fn take(
    setting: &Setting<'_>,
    record: &mut Record,
    run: usize,
    case: String,
    plan: &Plan,
) -> Result<(), RigError> {
    if !setting.wants(&case) {
        return Ok(());
    }
    let done = migrate(setting.folder, plan).await?;
    let waits: Vec<f64> = done.after.iter().map(|wait| wait.as_secs_f64() * 1e3).collect();
    let figures = BTreeMap::from([
        (TOTAL, done.total.as_secs_f64()),
        (SENT, done.sent_mib),
        (DELAY, waits.iter().sum::<f64>() / waits.len() as f64),
        ("steps_after", waits.len() as f64),
        ("handover_seconds", done.handover.as_secs_f64()),
        ("paused_ms", done.paused.as_secs_f64() * 1e3),
        ("bytes_that_differ", done.differ.map_or(f64::NAN, |bytes| bytes as f64)),
    ]);
    record.samples.push(Sample { case, run, figures });
    Ok(())
}

fn checks(record: &Record) -> Vec<Check> {
    let mut checks = Vec::new();
    for (place, bound) in [("front", 1.0), ("back", 1.05)] {
        let shares =
            |figure| ratios(&record.pairs(&pre_copy(place, OURS), &pre_copy(place, DISKS), figure));
        for (what, figure) in [("bytes sent", SENT), ("total time", TOTAL)] {
            let claim = format!("{what}, written at the {place}, by those of the disk's order");
            checks.push(Check::median(&claim, Bound::AtMost(bound), &shares(figure)));
        }
    }
    let delays = ratios(&record.pairs(&on_demand(OURS), &on_demand(DISKS), DELAY));
    checks.push(Check::median(
        "what a read waits for on demand, by that of the disk's order",
        Bound::AtMost(1.0),
        &delays,
    ));
    let differ: Vec<f64> = [OURS, DISKS]
        .into_iter()
        .flat_map(|order| record.figures(&on_demand(order), "bytes_that_differ"))
        .collect();
    checks.push(Check::worst("bytes that differ between both images", Bound::AtMost(0.0), &differ));
    checks
}
