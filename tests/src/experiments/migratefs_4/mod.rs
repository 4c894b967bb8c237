//! MigrateFS' figure 4: a disk leaves by a date, and its guest is held back no further than that takes.
//!
//! Two levels, each where its claim is honest:
//!
//! ```text
//!   window        lifeboat ── controller ── agent h1 ══ 200 Mbit/s ══ agent h2      `evacuate --by`, real
//!                                             QEMU                      QEMU        guests: date and rate
//!   synchronous   fio ── FUSE mount ── source's driver ══ shaped link ══ destination's driver
//!                 fio ── NBD ═══════════════════════════ the same link ══ qemu-nbd  beside a memory stream
//! ```
//!
//! The paper's 10 GB over some 24 MB/s in 550 s, with a process that wants 20 MB/s and gets 6, become a
//! GiB over 25 MB/s and a guest that wants four times what the date leaves it. Its writes lie anywhere in
//! the image, 64 KiB each; the paper does not say where its process writes.

mod synchronous;
mod window;

use lifeboat_lab::experiment::statistics::ratios;
use lifeboat_lab::experiment::{Bound, Check, Record};
use serde_json::json;

use super::Setting;
use super::machine::machine;
use super::plot::{Ground, Plot, Point, Series, Shape};
use crate::clock;
use crate::rig::RigError;

/// Its name.
pub const NAME: &str = "migratefs-4";

const MIB: u64 = 1 << 20;

/// Measures both, judges.
///
/// # Errors
/// When the rig cannot be raised, or a migration fails.
pub async fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let runs = setting.runs.unwrap_or(if setting.quick { 1 } else { 3 });
    let mut record = blank(&setting, runs);
    window::measure(&setting, runs, &mut record).await?;
    synchronous::measure(&setting, runs, &mut record).await?;
    record.checks = checks(&record);
    Ok(record)
}

fn blank(setting: &Setting<'_>, runs: usize) -> Record {
    Record {
        name: NAME.to_owned(),
        question: "does a disk leave by its date, and what does that leave its guest?".to_owned(),
        others_show:
            "MigrateFS figure 4: 10 GB in 550 s; of the 20 MB/s that a guest wants it gets 6 \
                      until both sides are in step; then each write goes to both"
                .to_owned(),
        quick: setting.quick,
        began_unix: clock::unix_now().as_secs(),
        machine: machine(),
        parameters: json!({
            "runs": runs,
            "window": window::parameters(setting.quick),
            "synchronous": synchronous::parameters(setting.quick),
        }),
        samples: Vec::new(),
        checks: Vec::new(),
    }
}

fn checks(record: &Record) -> Vec<Check> {
    let of = |figure: &str| record.figures(window::CASE, figure);
    let mut checks = vec![
        Check::worst(
            "share of the window used; more than 1 is late",
            Bound::AtMost(1.0),
            &of("window_used"),
        ),
        Check::worst("share of the window used", Bound::AtLeast(0.9), &of("window_used")),
        Check::worst(
            "what the guest wants, ratio to what the date leaves it at first",
            Bound::AtLeast(3.5),
            &of("wanted_by_first_limit"),
        ),
        Check::worst(
            "what the guest writes until both sides are in step, ratio to its limit",
            Bound::Within(0.9, 1.05),
            &of("written_by_limit"),
        ),
        Check::worst(
            "seconds in which it writes within a fifth of its limit, share",
            Bound::AtLeast(0.8),
            &of("seconds_near_limit"),
        ),
        Check::worst("wrong bytes and other offences seen", Bound::AtMost(0.0), &of("offences")),
    ];
    for block in synchronous::BLOCKS {
        let pairs = record.pairs(
            &synchronous::case(synchronous::OURS, block),
            &synchronous::case(synchronous::REMOTE, block),
            synchronous::RATE,
        );
        checks.push(Check::median(
            &format!(
                "synchronous writes of {} KiB in step, ratio to fio's over the same link",
                block >> 10
            ),
            Bound::AtLeast(0.5),
            &ratios(&pairs),
        ));
    }
    checks
}

/// Figure 4: the guest's rate and its limit over time, of the first run.
#[must_use]
pub fn plots(record: &Record) -> Vec<Plot> {
    let series = |name: &str, case: &str, figure: &str| {
        let of_case = record.samples.iter().filter(|sample| sample.case == case);
        let point = |sample: &lifeboat_lab::experiment::Sample| {
            let at = *sample.figures.get(window::AT)?;
            Point::of(at, &[*sample.figures.get(figure)?])
        };
        Series {
            name: name.to_owned(),
            shape: Shape::Line,
            points: of_case.filter_map(point).collect(),
        }
    };
    vec![Plot {
        name: format!("{NAME}-rate"),
        title: "What a guest writes while its disk leaves by a date".to_owned(),
        others_show: record.others_show.clone(),
        ground: Ground::numbers("s since the order"),
        height: "MB/s".to_owned(),
        series: vec![
            series("the guest writes", window::TRACE_GUEST, window::RATE),
            series("it may write", window::TRACE_LIMIT, window::RATE),
        ],
    }]
}
