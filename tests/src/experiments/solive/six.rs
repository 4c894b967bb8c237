//! SOLive's figure 6: what is reserved after each VM has gone, and what that is worth.
//!
//! The paper's finding (V-C): the reservation begins at the urgency, because NO leaves less than that
//! free, and rises to what is available once NO has gone; so the total migration time depends little
//! on the urgency, is about 13 % shorter than without reservation (pre-copy; 7 % in post-copy), the
//! downtime grows from 14 to 16 s from urgency 95 to 55, and neither C nor M is slower for it. Post-copy
//! is measured at one urgency, because it depends so little on it. Our NO runs at its destination a
//! second after it was told to, and sends over another link from then on: nothing contends with our
//! post-copy then. So it is measured a second time, beside an application that stays where it is.

use lifeboat_lab::experiment::statistics::ratios;
use lifeboat_lab::experiment::{Bound, Check, Record};

use super::{Arm, C_PACE, DOWNTIME, M_PACE, RESERVED, SCENARIO, TOTAL, WRONG, blank, measure};
use crate::experiments::Setting;
use crate::experiments::plot::{Ground, Plot, Point, Series, Shape};
use crate::rig::RigError;
use crate::rig::userfaultfd::Allowed;

/// Its name.
pub const NAME: &str = "solive-6";

const WITHOUT: &str = "no reservation";
const POST_COPY_WITHOUT: &str = "post-copy, no reservation";
const POST_COPY: &str = "post-copy, urgency 95";
const CONTENDED_WITHOUT: &str = "post-copy beside an application, no reservation";
const CONTENDED: &str = "post-copy beside an application, urgency 95";
const ARMS: [Arm; 8] = [
    Arm::new(WITHOUT, &["--mode", "pre-copy", "--urgency", "0"]),
    Arm::new("urgency 95", &["--mode", "pre-copy", "--urgency", "95", "--reservation", "borrow"]),
    Arm::new("urgency 75", &["--mode", "pre-copy", "--urgency", "75", "--reservation", "borrow"]),
    Arm::new("urgency 55", &["--mode", "pre-copy", "--urgency", "55", "--reservation", "borrow"]),
    Arm::new(POST_COPY_WITHOUT, &["--mode", "post-copy", "--urgency", "0"]),
    Arm::new(POST_COPY, &["--mode", "post-copy", "--urgency", "95", "--reservation", "borrow"]),
    Arm::new(CONTENDED_WITHOUT, &["--mode", "post-copy", "--urgency", "0"]).beside_an_application(),
    Arm::new(CONTENDED, &["--mode", "post-copy", "--urgency", "95", "--reservation", "borrow"])
        .beside_an_application(),
];
/// Pre-copy with a reservation.
const RESERVED_ARMS: std::ops::Range<usize> = 1..4;

/// Runs it.
///
/// # Errors
/// When the cloud cannot be raised, or an evacuation does not end.
pub fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let rounds = setting.runs.unwrap_or(if setting.quick { 1 } else { 4 });
    let arms = if setting.quick { &ARMS[..2] } else { &ARMS[..] };
    // QEMU's user fetches pages in post-copy.
    let _allowed = Allowed::now()?;
    let mut record = blank(&setting, (NAME, SCENARIO), rounds, arms);
    record.question =
        "what is reserved while NO, M, C and NI leave, and is it quicker for it?".to_owned();
    record.others_show =
        "SOLive Fig. 6: the urgency until NO has gone, then almost all of the link; \
                          13 % shorter with reservation (pre-copy; post-copy 7 %); downtime 14 to 16 s"
            .to_owned();
    measure(&setting, &mut record, arms, rounds)?;
    record.checks = checks(&record);
    Ok(record)
}

fn checks(record: &Record) -> Vec<Check> {
    let beside = |arm: &Arm, figure: &str| ratios(&record.pairs(arm.name, WITHOUT, figure));
    // A first look has fewer arms.
    let measured = |arm: &&Arm| !record.figures(arm.name, TOTAL).is_empty();
    let reserved: Vec<&Arm> = ARMS[RESERVED_ARMS].iter().filter(measured).collect();
    let mut checks: Vec<Check> = reserved
        .iter()
        .map(|arm| {
            let claim = format!("{}: total time, ratio to no reservation", arm.name);
            Check::median(&claim, Bound::AtMost(1.0), &beside(arm, TOTAL))
        })
        .collect();
    let contended = ratios(&record.pairs(CONTENDED, CONTENDED_WITHOUT, TOTAL));
    if !contended.is_empty() {
        let claim = format!("{CONTENDED}: total time, ratio to no reservation");
        checks.push(Check::median(&claim, Bound::AtMost(1.0), &contended));
    }
    for (guest, figure) in [("M", M_PACE), ("C", C_PACE)] {
        let all: Vec<f64> = reserved.iter().flat_map(|arm| beside(arm, figure)).collect();
        let claim = format!("pace of {guest}, ratio to no reservation");
        checks.push(Check::median(&claim, Bound::AtLeast(0.95), &all));
    }
    let wrong: Vec<f64> = ARMS.iter().flat_map(|arm| record.figures(arm.name, WRONG)).collect();
    checks.push(Check::worst("wrong bytes reported by a guest", Bound::AtMost(0.0), &wrong));
    checks
}

/// The paper's three pictures, (a) and (b) and the pauses.
#[must_use]
pub fn plots(record: &Record) -> Vec<Plot> {
    vec![
        reserved(record),
        by_urgency(record, "time", "Total time to empty the host", "seconds", TOTAL),
        by_urgency(record, "downtime", "Pauses of all four guests together", "seconds", DOWNTIME),
    ]
}

fn reserved(record: &Record) -> Plot {
    let line = |arm: &Arm| {
        let points = (0..RESERVED.len()).rev().zip(0_u32..);
        let points = points.filter_map(|(left, at)| {
            Point::of(f64::from(at), &record.figures(arm.name, RESERVED[left]))
        });
        Series { name: arm.name.to_owned(), shape: Shape::Line, points: points.collect() }
    };
    Plot {
        name: format!("{NAME}-reserved"),
        title: "What is reserved at the source while its guests leave".to_owned(),
        others_show: "SOLive Fig. 6 (a): the urgency while NO is there, then almost 100 %"
            .to_owned(),
        ground: Ground::names("guests on the source", &["4", "3", "2", "1"]),
        height: "% of the link".to_owned(),
        series: ARMS[RESERVED_ARMS].iter().map(line).collect(),
    }
}

fn by_urgency(record: &Record, name: &str, title: &str, height: &str, figure: &str) -> Plot {
    let places = [0.0, 1.0, 2.0];
    let ours: Vec<(f64, &str)> =
        places.into_iter().zip(ARMS[RESERVED_ARMS].iter().map(|a| a.name)).collect();
    let without = places.map(|at| (at, WITHOUT));
    Plot {
        name: format!("{NAME}-{name}"),
        title: title.to_owned(),
        others_show: record.others_show.clone(),
        ground: Ground::names("urgency, % of the link", &["95", "75", "55"]),
        height: height.to_owned(),
        series: vec![
            Series::of(record, "with reservation", Shape::Bars, figure, &ours),
            Series::of(record, WITHOUT, Shape::Bars, figure, &without),
        ],
    }
}
