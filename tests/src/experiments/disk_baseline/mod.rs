//! A VM with its disk, taken by two agents, against QEMU by itself: blockdev-mirror into the
//! destination's QEMU, then `migrate tcp:`.
//!
//! ```text
//!   h1: agent or QEMU ── eth0 ══ 480 Mbit/s, tbf ══ eth0 ── h2: agent or QEMU
//! ```
//!
//! Same image, guest, link, aio and cache; the end is the guest running at the destination. Without a
//! throttle a mirror never catches up with a heavy writer, so the guest is guaranteed a rate and held to
//! it: by `block_set_io_throttle` there, by the agents' disk limit here. Write-blocking mode is the other
//! thing that QEMU offers against a heavy writer; its guest is compared while the disk is on its way.
//!
//! A guest is booted for each run: nothing else runs beside it. The command line comes from the agents'
//! own code on both sides, as does the guest, which checks what it reads.

mod alone;
mod hosts;
mod ours;
mod writes;

use lifeboat_lab::experiment::statistics::ratios;
use lifeboat_lab::experiment::{Bound, Check, Record, Sample};
use serde_json::json;

use self::hosts::{Hosts, IMAGE_BYTES, LINK_BITS, QUICK_IMAGE_BYTES};
use super::Setting;
use super::machine::machine;
use super::plot::{Ground, Plot, Point, Series, Shape};
use crate::clock;
use crate::rig::RigError;

/// Its name.
pub const NAME: &str = "disk-baseline";

/// What a heavy writer is guaranteed and held to, and what the moderate one wants, bytes/s.
const GUARANTEED: u64 = 20_000_000;
/// More than an emulated guest can write.
const HEAVY: u64 = 1_000_000_000;

/// One side of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Case {
    name: &'static str,
    /// The guest wants to write so much, bytes/s.
    wants: u64,
    /// It is held to so much; without, a guest that wants more than is guaranteed is held to that once the bulk
    /// phase is over.
    limit: Option<u64>,
    how: How,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Agents,
    Mirror,
    /// Nothing but the copy: such a guest is not what anybody would wait for.
    WriteBlocking,
}

const HEAVY_OURS: &str = "heavy writer, agents";
const HEAVY_MIRROR: &str = "heavy writer, mirror with throttle";
const MODERATE_OURS: &str = "20 MB/s writer, agents";
const MODERATE_MIRROR: &str = "20 MB/s writer, mirror";
const FREE_OURS: &str = "heavy writer not held back, agents";
const FREE_BLOCKING: &str = "heavy writer not held back, write-blocking mirror";

const CASES: [Case; 6] = [
    Case { name: HEAVY_OURS, wants: HEAVY, limit: Some(GUARANTEED), how: How::Agents },
    Case { name: HEAVY_MIRROR, wants: HEAVY, limit: Some(GUARANTEED), how: How::Mirror },
    Case { name: MODERATE_OURS, wants: GUARANTEED, limit: None, how: How::Agents },
    Case { name: MODERATE_MIRROR, wants: GUARANTEED, limit: None, how: How::Mirror },
    Case { name: FREE_OURS, wants: HEAVY, limit: None, how: How::Agents },
    Case { name: FREE_BLOCKING, wants: HEAVY, limit: None, how: How::WriteBlocking },
];

/// Measures every case in turn, judges.
///
/// # Errors
/// When the rig cannot be raised, or a migration fails.
pub async fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let runs = setting.runs.unwrap_or(if setting.quick { 1 } else { 3 });
    let image = if setting.quick { QUICK_IMAGE_BYTES } else { IMAGE_BYTES };
    let mut record = blank(&setting, runs, image);
    let mut hosts = Hosts::raise(&setting, image).await?;
    for run in 0..runs {
        let mut cases = CASES;
        if run % 2 == 1 {
            cases.chunks_mut(2).for_each(<[Case]>::reverse);
        }
        for (number, case) in cases.iter().enumerate() {
            let moved = match case.how {
                How::Agents => ours::migrate(&mut hosts, case).await,
                How::Mirror => alone::migrate(&mut hosts, case).await,
                How::WriteBlocking => alone::write_blocking(&mut hosts, case).await,
            };
            let moved = moved.inspect_err(|_| eprintln!("{NAME}: in the case {}", case.name))?;
            record.samples.extend(moved.samples(case.name, run));
            setting.keep(&record, run * CASES.len() + number + 1, runs * CASES.len());
        }
    }
    record.checks = checks(&record);
    Ok(record)
}

fn blank(setting: &Setting<'_>, runs: usize, image: u64) -> Record {
    Record {
        name: NAME.to_owned(),
        question: "what does a VM take that goes with its disk, against QEMU's own mirror?".to_owned(),
        others_show: "blockdev-mirror with block_set_io_throttle, then pre-copy, is the baseline; \
                      without the throttle it never ends, and in write-blocking mode its guest writes \
                      less than 1 MB/s"
            .to_owned(),
        quick: setting.quick,
        began_unix: clock::unix_now().as_secs(),
        machine: machine(),
        parameters: json!({
            "runs": runs,
            "image_bytes": image,
            "guest_memory_mib": hosts::MEMORY.mib(),
            "guest_write_bytes": hosts::BLOCK,
            "guest_writes": "anywhere in the image, one at a time, a flush after 64",
            "guaranteed_bytes_per_sec": GUARANTEED,
            "link_bits_per_sec": LINK_BITS,
            "told_bytes_per_sec": hosts::TOLD,
            "link": "veth with tbf, a queue of 25 ms",
            "aio": "threads",
            "cache": "cache.direct=off",
            "accelerator": "tcg",
            "lifeboat_page_link": "TLS 1.3",
        }),
        samples: Vec::new(),
        checks: Vec::new(),
    }
}

fn checks(record: &Record) -> Vec<Check> {
    let ratio = |one: &str, other: &str, figure| ratios(&record.pairs(one, other, figure));
    let wrong: Vec<f64> = record
        .samples
        .iter()
        .filter_map(|s| s.figures.get("wrong_bytes_reported").copied())
        .collect();
    let least = record.figures(HEAVY_OURS, writes::LEAST);
    let least: Vec<f64> = least.iter().map(|least| least / (GUARANTEED as f64 / 1e6)).collect();
    vec![
        Check::median(
            "total time under a heavy writer, ratio to mirror with throttle",
            Bound::AtMost(1.0),
            &ratio(HEAVY_OURS, HEAVY_MIRROR, "total_seconds"),
        ),
        Check::median(
            "what that guest wrote in its slowest 2 s before the pause, ratio to what it is guaranteed",
            Bound::AtLeast(0.9),
            &least,
        ),
        Check::median(
            "total time with a 20 MB/s writer, ratio to mirror",
            Bound::AtMost(1.1),
            &ratio(MODERATE_OURS, MODERATE_MIRROR, "total_seconds"),
        ),
        Check::median(
            "guest's rate in the bulk phase, not held back, ratio to write-blocking mode",
            Bound::AtLeast(20.0),
            &ratio(FREE_OURS, FREE_BLOCKING, writes::BULK),
        ),
        Check::worst("wrong bytes reported by a guest", Bound::AtMost(0.0), &wrong),
    ]
}

/// The guest's rate over time in each case, of the first run.
#[must_use]
pub fn plots(record: &Record) -> Vec<Plot> {
    let series = |case: &Case| {
        let name = writes::trace_of(case.name);
        let of_case = record.samples.iter().filter(|sample| sample.case == name && sample.run == 0);
        let point = |sample: &Sample| {
            let at = *sample.figures.get(writes::AT)?;
            Point::of(at, &[*sample.figures.get(writes::RATE)?])
        };
        Series {
            name: case.name.to_owned(),
            shape: Shape::Line,
            points: of_case.filter_map(point).collect(),
        }
    };
    let figure = |name: &str, title: &str, cases: &[Case]| Plot {
        name: format!("{NAME}-{name}"),
        title: title.to_owned(),
        others_show: record.others_show.clone(),
        ground: Ground::numbers("s since the order"),
        height: "MB/s".to_owned(),
        series: cases.iter().map(series).collect(),
    };
    vec![
        figure("held", "What a guest writes while it goes with its disk", &CASES[..4]),
        figure("free", "What a heavy writer writes that nobody holds back", &CASES[4..]),
    ]
}
