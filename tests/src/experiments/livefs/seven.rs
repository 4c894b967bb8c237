//! What do a guest's reads wait for after the hand-over, by how long its disk was watched before?
//!
//! LiveFS figure 7. 200 threads only read, as the paper's AFS-like load: each the same place of the
//! image, round after round. The paper's 1 MB each of 6 GB is 64 KiB of our 96 MiB, and instead of
//! 1,000 rounds each thread reads five times a second until the disk is complete; every read between
//! hand-over and then counts. The threads lie the closer together the lower their place, so that some
//! segments are busier than others. Not watched at all is post-copy. Blocks have 16 KiB.
//!
//! Not here: writes, of which the paper's load has none.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use lifeboat_agent::disk::sync::rank::{Strategy, Weights};
use lifeboat_lab::experiment::statistics::{median, ratios};
use lifeboat_lab::experiment::{Bound, Check, Record, Sample};
use serde_json::json;

use super::guest::{Load, Step};
use super::rig::{Plan, migrate};
use super::{BLOCK, MIB, blank, read};
use crate::experiments::Setting;
use crate::experiments::plot::{Ground, Plot, Series, Shape};
use crate::rig::RigError;

/// Its name.
pub const NAME: &str = "livefs-7";

const MONITORING_MS: [u64; 6] = [0, 250, 500, 1000, 2000, 4000];
const THREADS: usize = 200;
/// What a thread reads, bytes.
const EACH: usize = 65_536;
const PAUSE: Duration = Duration::from_millis(200);
/// The segments that they read.
const WORKING_SET: u64 = 24;
/// The paper's 1,000 accesses, as a rank, scaled: the busiest segment has it after a quarter of a
/// second, the last after two.
const THRESHOLD: f64 = 7.0;
/// The paper's, segments.
const HANDOVER_SIZE: u64 = 30;

const MEAN: &str = "mean_delay_ms";

fn case(monitoring_ms: u64) -> String {
    format!("{monitoring_ms} ms watched")
}

/// Where a thread reads: at the square of its number, in whole pages.
fn place(thread: usize) -> u64 {
    let share = (thread as f64 / THREADS as f64).powi(2);
    (share * (WORKING_SET * MIB) as f64) as u64 / 4096 * 4096
}

fn afs() -> Load {
    Arc::new(|step: Step<'_>| {
        read(step.image, EACH, place(step.thread))?;
        // Not all at once in the same beat.
        Ok(PAUSE.mul_f64(0.5) + step.chance.up_to(PAUSE))
    })
}

fn plan(monitoring_ms: u64) -> Plan {
    Plan {
        block: BLOCK,
        strategy: Strategy::Hot {
            threshold: if monitoring_ms == 0 { f64::INFINITY } else { THRESHOLD },
        },
        weights: Weights::default(),
        monitoring: Duration::from_millis(monitoring_ms),
        watched_already: false,
        handover_segments: HANDOVER_SIZE,
        threads: THREADS,
        reads_only: true,
        load: afs(),
    }
}

/// Measures every monitoring time in turn, judges.
///
/// # Errors
/// When the rig cannot be raised, or a migration fails.
pub async fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let runs = setting.runs.unwrap_or(if setting.quick { 2 } else { 12 });
    let texts = [
        "what do a guest's reads wait for after the hand-over, by how long its disk was watched?",
        "LiveFS figure 7: 19 % less than post-copy at best, and stable once the whole working set \
         goes before",
    ];
    let parameters = json!({
        "runs": runs,
        "threads": THREADS,
        "bytes_each": EACH,
        "pause_ms": PAUSE.as_millis() as u64,
        "threshold": THRESHOLD,
        "handover_size": HANDOVER_SIZE,
        "block_bytes": BLOCK,
    });
    let mut record = blank(&setting, NAME, texts, parameters);
    for run in 0..runs {
        for time in MONITORING_MS {
            let done = migrate(setting.folder, &plan(time)).await?;
            let mut waits: Vec<f64> =
                done.after.iter().map(|wait| wait.as_secs_f64() * 1e3).collect();
            waits.sort_by(f64::total_cmp);
            let last = waits.len().saturating_sub(1);
            let figures = BTreeMap::from([
                (MEAN, waits.iter().sum::<f64>() / waits.len() as f64),
                ("p99_delay_ms", waits.get(last * 99 / 100).copied().unwrap_or(f64::NAN)),
                ("worst_delay_ms", waits.last().copied().unwrap_or(f64::NAN)),
                ("reads", waits.len() as f64),
                ("handover_seconds", done.handover.as_secs_f64()),
                ("total_seconds", done.total.as_secs_f64()),
                ("missing_at_handover_mib", done.missing_mib),
                ("bytes_that_differ", done.differ.map_or(f64::NAN, |bytes| bytes as f64)),
            ]);
            record.samples.push(Sample { case: case(time), run, figures });
        }
        setting.keep(&record, run + 1, runs);
    }
    record.checks = checks(&record);
    Ok(record)
}

fn checks(record: &Record) -> Vec<Check> {
    let by_post_copy = |time| ratios(&record.pairs(&case(time), &case(MONITORING_MS[0]), MEAN));
    let shares = MONITORING_MS[1..].iter().map(|time| by_post_copy(*time));
    let best = shares.min_by(|a, b| {
        let of = |samples: &[f64]| median(samples).unwrap_or(f64::MAX);
        of(a).total_cmp(&of(b))
    });
    let differ: Vec<f64> =
        record.samples.iter().filter_map(|s| s.figures.get("bytes_that_differ")).copied().collect();
    vec![
        Check::median(
            "mean delay after the hand-over by post-copy's, at the best monitoring time",
            Bound::AtMost(0.81),
            &best.unwrap_or_default(),
        ),
        Check::worst("bytes that differ between both images", Bound::AtMost(0.0), &differ),
    ]
}

/// The delay over monitoring time.
#[must_use]
pub fn plots(record: &Record) -> Vec<Plot> {
    let cases = MONITORING_MS.map(|time| (time as f64 / 1e3, case(time)));
    let cases: Vec<_> = cases.iter().map(|(at, name)| (*at, name.as_str())).collect();
    vec![Plot {
        name: format!("{NAME}-delay"),
        title: "What reads wait for after the hand-over".to_owned(),
        others_show: record.others_show.clone(),
        ground: Ground::numbers("monitoring time, s"),
        height: "ms, mean".to_owned(),
        series: vec![Series::of(record, "hybrid; post-copy at 0", Shape::Line, MEAN, &cases)],
    }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_read_within_the_working_set_and_closest_at_its_start() {
        let segment = |thread| place(thread) / MIB;
        assert!(place(THREADS - 1) + EACH as u64 <= (WORKING_SET + 1) * MIB);
        let in_the_first = (0..THREADS).filter(|thread| segment(*thread) == 0).count();
        let in_the_last = (0..THREADS).filter(|t| segment(*t) == WORKING_SET - 1).count();
        assert!(in_the_first > 5 * in_the_last && in_the_last > 0);
    }
}
