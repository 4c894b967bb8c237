//! What does a disk cost that is open through our mount, and is a limit kept?
//!
//! ```text
//!   fio, bonnie++ ─┬─ native ─────────────────────────────────── image
//!                  ├─ swapped: lifeboat-disk move, marking ───── the same image
//!                  └─ plain FUSE mirror: bindfs ──────────────── the same image
//! ```
//!
//! MigrateFS figure 3, at the level of the disk layer: the process that serves a VM's disks while they
//! leave, its real mounts, no agent and no guest. Everything is opened with O_DIRECT, as QEMU does with
//! `cache=none`, but for what bonnie++ reads (`little_memory`). Bonnie++ works in a file system on a loop
//! device over the image, which is where a guest's kernel stands. The three ways take turns, and neighbours
//! are compared.
//!
//! The mirror is bindfs (libfuse 2): what the paper calls Mirror, a file system that only passes on.
//!
//! Idle costs nothing because nothing is in the way: a QEMU is asked which paths it has open before,
//! during and after a swap; and swapped a hundred times under load.

mod idle;
mod little_memory;
mod load;
mod rig;
mod swaps;

use std::collections::BTreeMap;

use lifeboat_lab::experiment::statistics::ratios;
use lifeboat_lab::experiment::{Bound, Check, Record, Sample};
use serde_json::json;

use self::load::{
    BONNIE_MEMORY_MIB, BONNIE_MIB, Fio, RUNTIME_MS, bonnie, fio, hot_read_us, round_trip_us,
};
use self::rig::{IMAGE_BYTES, Rig, Way};
use super::Setting;
use super::machine::machine;
use super::plot::{Ground, Plot, Point, Series, Shape};
use crate::clock;
use crate::rig::RigError;

/// Its name.
pub const NAME: &str = "migratefs-3";

/// What fio does, and how much of the native rate has to be left.
const LOADS: [(&str, Fio, f64); 6] = [
    ("4k random reads, one at a time", Fio::new("psync", 1, "randread", "4k"), 0.85),
    ("4k random writes, one at a time", Fio::new("psync", 1, "randwrite", "4k"), 0.85),
    ("4k random reads, depth 16", Fio::new("libaio", 16, "randread", "4k"), 0.4),
    ("4k random writes, depth 16", Fio::new("libaio", 16, "randwrite", "4k"), 0.55),
    ("512k reads, one at a time", Fio::new("psync", 1, "read", "512k"), 0.65),
    ("512k writes, one at a time", Fio::new("psync", 1, "write", "512k"), 0.65),
];
/// What bonnie++ does, and what the paper has left of the native rate; it does not print the rewrite's.
const BLOCKS: [(&str, Option<f64>); 3] =
    [("write", Some(0.78)), ("rewrite", None), ("read", Some(0.75))];
/// Limits in MB/s and the write's size: some hundred writes a second at each, so that one more or less
/// does not show.
const LIMITS: [(u64, &str); 6] =
    [(1, "4k"), (5, "16k"), (20, "64k"), (50, "64k"), (100, "64k"), (200, "64k")];
const LIMITED_MS: u64 = 3000;

const RATE: &str = "mb_per_sec";
const SHARE: &str = "share_of_limit";

/// What one thread's word and another's answer take here. Each request through FUSE is one more of these
/// for whoever waits for it, so it says how much of the difference is the machine's.
const MACHINE: &str = "machine";
const WAKE: &str = "round_trip_of_two_threads_us";
/// What our mount takes for 4 KiB that no disk is asked for: added to the native disk's time, the least that
/// a read through it can take.
const HOT: &str = "hot_read_through_our_mount_us";

fn fio_case(load: &str, way: Way) -> String {
    format!("{load}, {}", way.name())
}

fn bonnie_case(way: Way) -> String {
    format!("bonnie++, {}", way.name())
}

fn limit_case(limit: u64) -> String {
    format!("limit {limit} MB/s")
}

/// Serves an image, loads it by each way in turn, limits it, judges.
///
/// # Errors
/// When the rig cannot be raised, or a load fails.
pub async fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let runs = setting.runs.unwrap_or(if setting.quick { 3 } else { 15 });
    let bonnies = if setting.quick { 1 } else { 3 };
    let limited = if setting.quick { 1 } else { 3 };
    let mut record = blank(&setting, [runs, bonnies, limited]);
    idle::look(&setting, &mut record).await?;
    swaps::look(&setting, &mut record).await?;
    let mut rig = Rig::raise(&setting).await?;
    for run in 0..runs {
        let hot = hot_read_us(&rig.image(Way::Swapped))?;
        let machine = [(WAKE, round_trip_us()?), (HOT, hot)];
        record.samples.push(sample(MACHINE.to_owned(), run, machine));
        for (name, load, _) in LOADS {
            for (place, way) in turn(run).into_iter().enumerate() {
                let seed = (run * Way::ALL.len() + place) as u64 + 1;
                let rate = fio(&rig.image(way), load, RUNTIME_MS, seed)?;
                record.samples.push(sample(fio_case(name, way), run, [(RATE, rate)]));
            }
        }
        setting.keep(&record, run + 1, runs + bonnies + limited);
    }
    for run in 0..bonnies {
        for way in turn(run) {
            let rates = bonnie(&rig.file_system(way), setting.folder)?;
            record.samples.push(sample(bonnie_case(way), run, rates));
        }
        setting.keep(&record, runs + run + 1, runs + bonnies + limited);
    }
    for run in 0..limited {
        for (limit, block) in LIMITS {
            rig.limit(Some(limit * 1_000_000)).await?;
            let load = Fio::new("libaio", 4, "randwrite", block);
            let rate = fio(&rig.image(Way::Swapped), load, LIMITED_MS, run as u64 + 1)?;
            let figures = [(RATE, rate), (SHARE, rate / limit as f64)];
            record.samples.push(sample(limit_case(limit), run, figures));
        }
        rig.limit(None).await?;
        setting.keep(&record, runs + bonnies + run + 1, runs + bonnies + limited);
    }
    rig.end().await?;
    record.checks = checks(&record);
    Ok(record)
}

/// Native and swapped are neighbours, in alternating order.
fn turn(run: usize) -> [Way; 3] {
    match run % 2 {
        0 => [Way::Native, Way::Swapped, Way::Mirror],
        _ => [Way::Mirror, Way::Swapped, Way::Native],
    }
}

fn sample(
    case: String,
    run: usize,
    figures: impl IntoIterator<Item = (&'static str, f64)>,
) -> Sample {
    Sample { case, run, figures: figures.into_iter().collect::<BTreeMap<_, _>>() }
}

fn blank(setting: &Setting<'_>, [runs, bonnies, limited]: [usize; 3]) -> Record {
    Record {
        name: NAME.to_owned(),
        question: "what does a disk cost that is open through our mount, and is a limit kept?"
            .to_owned(),
        others_show:
            "MigrateFS figure 3: almost identical to a plain FUSE mirror; where nothing is \
                      cached, 25 % less than native for reads and 22 % for writes"
                .to_owned(),
        quick: setting.quick,
        began_unix: clock::unix_now().as_secs(),
        machine: machine(),
        parameters: json!({
            "runs": runs,
            "runs_of_bonnie": bonnies,
            "runs_of_each_limit": limited,
            "image_bytes": IMAGE_BYTES,
            "fio_ms": RUNTIME_MS,
            "fio_ms_limited": LIMITED_MS,
            "bonnie_mib": BONNIE_MIB,
            "bonnie_memory_mib": BONNIE_MEMORY_MIB,
            "caching": "O_DIRECT everywhere, but for what bonnie++ reads",
            "mirror": "bindfs, several threads, O_DIRECT passed on",
        }),
        samples: Vec::new(),
        checks: Vec::new(),
    }
}

fn shares(record: &Record, load: &str, way: Way, of: Way) -> Vec<f64> {
    ratios(&record.pairs(&fio_case(load, way), &fio_case(load, of), RATE))
}

fn bonnie_shares(record: &Record, block: &str, way: Way, of: Way) -> Vec<f64> {
    ratios(&record.pairs(&bonnie_case(way), &bonnie_case(of), block))
}

fn checks(record: &Record) -> Vec<Check> {
    let mut checks = Vec::new();
    for (load, _, least) in LOADS {
        let claim = format!("swapped by native, {load}");
        let shares = shares(record, load, Way::Swapped, Way::Native);
        checks.push(Check::median(&claim, Bound::AtLeast(least), &shares));
    }
    for (block, least) in BLOCKS {
        if let Some(least) = least {
            let claim = format!("swapped by native, bonnie++ {block}");
            let shares = bonnie_shares(record, block, Way::Swapped, Way::Native);
            checks.push(Check::median(&claim, Bound::AtLeast(least), &shares));
        }
    }
    for (block, _) in BLOCKS {
        let claim = format!("swapped by plain FUSE mirror, bonnie++ {block}");
        let shares = bonnie_shares(record, block, Way::Swapped, Way::Mirror);
        checks.push(Check::median(&claim, Bound::AtLeast(MIRROR), &shares));
    }
    for (limit, _) in LIMITS {
        let claim = format!("writes by their limit of {limit} MB/s");
        let shares = record.figures(&limit_case(limit), SHARE);
        checks.push(Check::worst(&claim, Bound::Within(0.97, 1.03), &shares));
    }
    checks.extend(idle::checks(record));
    checks.extend(swaps::checks(record));
    checks
}

/// The paper's "almost identical": within a twentieth of the mirror, or better.
const MIRROR: f64 = 0.95;

/// What is left of the native rate, bonnie++'s rates, and how near the limit is.
#[must_use]
pub fn plots(record: &Record) -> Vec<Plot> {
    let plot = |name: &str, title: &str, height: &str, ground: Ground, series| Plot {
        name: format!("{NAME}-{name}"),
        title: title.to_owned(),
        others_show: record.others_show.clone(),
        ground,
        height: height.to_owned(),
        series,
    };
    let at = |place: usize| place as f64;
    let left = [Way::Swapped, Way::Mirror].map(|way| Series {
        name: way.name().to_owned(),
        shape: Shape::Bars,
        points: LOADS
            .iter()
            .enumerate()
            .filter_map(|(i, (load, ..))| Point::of(at(i), &shares(record, load, way, Way::Native)))
            .collect(),
    });
    let rates = Way::ALL.map(|way| Series {
        name: way.name().to_owned(),
        shape: Shape::Bars,
        points: BLOCKS
            .iter()
            .enumerate()
            .filter_map(|(i, (block, _))| {
                Point::of(at(i), &record.figures(&bonnie_case(way), block))
            })
            .collect(),
    });
    let limits = LIMITS.map(|(limit, _)| (limit as f64, limit_case(limit)));
    let limits: Vec<(f64, &str)> = limits.iter().map(|(at, case)| (*at, case.as_str())).collect();
    let kept = Series::of(record, "writes", Shape::Line, SHARE, &limits);
    vec![
        plot(
            "rates",
            "Block I/O by bonnie++",
            "MB/s",
            Ground::names("what bonnie++ does", &BLOCKS.map(|(block, _)| block)),
            rates.into(),
        ),
        plot(
            "left",
            "What is left of the native rate",
            "rate by native rate",
            Ground::names("load", &LOADS.map(|(load, ..)| load)),
            left.into(),
        ),
        plot(
            "limits",
            "Writes by their limit",
            "rate by limit",
            Ground::numbers("limit, MB/s"),
            vec![kept],
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn native_and_swapped_are_always_neighbours_and_neither_is_always_first() {
        let places = |run: usize| {
            let place = |way| turn(run).into_iter().position(|each| each == way).unwrap();
            (place(Way::Native), place(Way::Swapped))
        };
        assert_eq!((places(0), places(1)), ((0, 1), (2, 1)));
    }

    #[test]
    fn a_record_without_samples_breaks_every_bound() {
        let record = Record {
            name: NAME.to_owned(),
            question: String::new(),
            others_show: String::new(),
            quick: true,
            began_unix: 0,
            machine: machine(),
            parameters: json!({}),
            samples: vec![],
            checks: vec![],
        };
        let checks = checks(&record);
        assert_eq!(checks.len(), LOADS.len() + 2 + BLOCKS.len() + LIMITS.len() + 7);
        assert!(checks.iter().all(|check| !check.holds));
    }
}
