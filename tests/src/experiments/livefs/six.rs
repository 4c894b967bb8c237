//! How long until the VM runs at the destination, by monitoring time and handover-size?
//!
//! LiveFS figure 6, the hybrid with blocks of 16 KiB: it grows with the monitoring one for one and not
//! with handover-size. Where the disk was watched before the migration began, monitoring costs nothing.
//!
//! Not here: pre-copy and post-copy, which watch nothing (`five` has their hand-over, too).

use std::collections::BTreeMap;
use std::time::Duration;

use lifeboat_agent::disk::sync::rank::Strategy;
use lifeboat_lab::experiment::statistics::median;
use lifeboat_lab::experiment::{Bound, Check, Record, Sample};
use serde_json::json;

use super::rig::{Plan, migrate};
use super::{BLOCK, BONNIE_THRESHOLD_PER_SEC, blank, bonnie};
use crate::experiments::Setting;
use crate::experiments::plot::{Ground, Plot, Series, Shape};
use crate::rig::RigError;

/// Its name.
pub const NAME: &str = "livefs-6";

const SIZES: [u64; 3] = [10, 40, 80];
const MONITORING_MS: [u64; 4] = [500, 1000, 2000, 4000];
const QUICK_MONITORING_MS: [u64; 2] = [500, 2000];
const NOW: &str = "watched when the migration begins";
const BEFORE: &str = "watched already";

const HANDOVER: &str = "handover_seconds";
const BEYOND: &str = "beyond_monitoring_seconds";

fn case(when: &str, monitoring_ms: u64, size: u64) -> String {
    format!("{when}, {monitoring_ms} ms, handover-size {size}")
}

fn plan(watched_already: bool, monitoring_ms: u64, size: u64) -> Plan {
    let monitoring = Duration::from_millis(monitoring_ms);
    Plan {
        strategy: Strategy::Hot { threshold: BONNIE_THRESHOLD_PER_SEC * monitoring.as_secs_f64() },
        monitoring,
        watched_already,
        handover_segments: size,
        ..bonnie()
    }
}

/// Measures every monitoring time at every size in turn, judges.
///
/// # Errors
/// When the rig cannot be raised, or a migration fails.
pub async fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let runs = setting.runs.unwrap_or(if setting.quick { 1 } else { 3 });
    let times: &[u64] = if setting.quick { &QUICK_MONITORING_MS } else { &MONITORING_MS };
    let texts = [
        "how long until the guest runs at the destination, by monitoring time and handover-size?",
        "LiveFS figure 6: it grows linearly with the monitoring time, not with handover-size",
    ];
    let parameters = json!({
        "runs": runs,
        "block_bytes": BLOCK,
        "guest_writes_bytes_per_sec": 2_048_000,
    });
    let mut record = blank(&setting, NAME, texts, parameters);
    for run in 0..runs {
        for &time in times {
            for size in SIZES {
                for (when, already) in [(NOW, false), (BEFORE, true)] {
                    let done = migrate(setting.folder, &plan(already, time, size)).await?;
                    let handover = done.handover.as_secs_f64();
                    let watched = if already { 0.0 } else { time as f64 / 1e3 };
                    let figures = BTreeMap::from([
                        (HANDOVER, handover),
                        (BEYOND, handover - watched),
                        ("paused_ms", done.paused.as_secs_f64() * 1e3),
                        ("missing_at_handover_mib", done.missing_mib),
                    ]);
                    record.samples.push(Sample { case: case(when, time, size), run, figures });
                }
            }
        }
        setting.keep(&record, run + 1, runs);
    }
    record.checks = checks(&record, times);
    Ok(record)
}

fn checks(record: &Record, times: &[u64]) -> Vec<Check> {
    let medians = |when: &str, figure: &str, time: u64| -> Vec<f64> {
        let of = |size| median(&record.figures(&case(when, time, size), figure));
        SIZES.into_iter().filter_map(of).collect()
    };
    let of_all = |when: &str, figure: &str| -> Vec<f64> {
        times.iter().flat_map(|time| medians(when, figure, *time)).collect()
    };
    let spread = |samples: &[f64]| {
        let most = samples.iter().copied().fold(f64::NAN, f64::max);
        most - samples.iter().copied().fold(f64::NAN, f64::min)
    };
    let by_size: Vec<f64> =
        times.iter().map(|time| spread(&medians(NOW, HANDOVER, *time))).collect();
    vec![
        Check::worst(
            "hand-over with monitoring, seconds beyond the monitoring time",
            Bound::AtMost(2.0),
            &of_all(NOW, BEYOND),
        ),
        Check::worst(
            "how much that differs over all monitoring times and sizes, seconds",
            Bound::AtMost(0.5),
            &[spread(&of_all(NOW, BEYOND))],
        ),
        Check::worst(
            "difference over handover-sizes at one monitoring time, seconds",
            Bound::AtMost(0.5),
            &by_size,
        ),
        Check::worst(
            "hand-over where monitoring ran already, seconds",
            Bound::AtMost(2.0),
            &of_all(BEFORE, HANDOVER),
        ),
    ]
}

/// Time until the hand-over, over monitoring time.
#[must_use]
pub fn plots(record: &Record) -> Vec<Plot> {
    let series = [NOW, BEFORE].into_iter().flat_map(|when| {
        SIZES.map(|size| {
            let cases = MONITORING_MS.map(|time| (time as f64 / 1e3, case(when, time, size)));
            let cases: Vec<_> = cases.iter().map(|(at, name)| (*at, name.as_str())).collect();
            let name = format!("{when}, handover-size {size}");
            Series::of(record, &name, Shape::Line, HANDOVER, &cases)
        })
    });
    vec![Plot {
        name: format!("{NAME}-handover"),
        title: "Time until the guest runs at the destination".to_owned(),
        others_show: record.others_show.clone(),
        ground: Ground::numbers("monitoring time, s"),
        height: "s".to_owned(),
        series: series.collect(),
    }]
}
