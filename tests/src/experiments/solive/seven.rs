//! SOLive's figure 7: a reservation that follows the link, against one that stays.
//!
//! With `--reservation strict` on both sides, as in the paper: a reservation is a ceiling there, too.
//! The paper's finding (V-C): fixed at 75 or 55 %, the total migration time is much longer than
//! without any reservation and than with the adaptive one.

use lifeboat_lab::experiment::statistics::ratios;
use lifeboat_lab::experiment::{Bound, Check, Record};

use super::{Arm, SCENARIO, TOTAL, USED, WRONG, blank, measure};
use crate::experiments::Setting;
use crate::experiments::plot::{Ground, Plot, Series, Shape};
use crate::rig::RigError;

/// Its name.
pub const NAME: &str = "solive-7";

const WITHOUT: &str = "no reservation";
const ARMS: [Arm; 7] = [
    Arm::new(WITHOUT, &["--mode", "pre-copy", "--urgency", "0"]),
    Arm::new("adaptive 95", &["--mode", "pre-copy", "--urgency", "95", "--reservation", "strict"]),
    Arm::new(
        "fixed 95",
        &["--mode", "pre-copy", "--urgency", "95", "--reservation", "strict", "--fixed"],
    ),
    Arm::new("adaptive 75", &["--mode", "pre-copy", "--urgency", "75", "--reservation", "strict"]),
    Arm::new(
        "fixed 75",
        &["--mode", "pre-copy", "--urgency", "75", "--reservation", "strict", "--fixed"],
    ),
    Arm::new("adaptive 55", &["--mode", "pre-copy", "--urgency", "55", "--reservation", "strict"]),
    Arm::new(
        "fixed 55",
        &["--mode", "pre-copy", "--urgency", "55", "--reservation", "strict", "--fixed"],
    ),
];
const ADAPTIVE: [&str; 3] = [ARMS[1].name, ARMS[3].name, ARMS[5].name];
const FIXED: [&str; 3] = [ARMS[2].name, ARMS[4].name, ARMS[6].name];

/// Runs it.
///
/// # Errors
/// When the cloud cannot be raised, or an evacuation does not end.
pub fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let rounds = setting.runs.unwrap_or(if setting.quick { 1 } else { 3 });
    let arms = if setting.quick { &ARMS[5..] } else { &ARMS[..] };
    let mut record = blank(&setting, (NAME, SCENARIO), rounds, arms);
    record.question = "is a host empty sooner when its reservation follows the link?".to_owned();
    record.others_show =
        "SOLive Fig. 7: fixed at 75 or 55 % it takes much longer than adaptive, and \
                          than without reservation"
            .to_owned();
    measure(&setting, &mut record, arms, rounds)?;
    record.checks = checks(&record);
    Ok(record)
}

fn checks(record: &Record) -> Vec<Check> {
    // A first look has fewer arms.
    let measured = |arm: &str| !record.figures(arm, TOTAL).is_empty();
    let pairs = ADAPTIVE.iter().zip(FIXED).filter(|(_, fixed)| measured(fixed));
    let mut checks: Vec<Check> = pairs
        .map(|(adaptive, fixed)| {
            let claim = format!("{adaptive}: total time, ratio to {fixed}");
            Check::median(
                &claim,
                Bound::AtMost(1.03),
                &ratios(&record.pairs(adaptive, fixed, TOTAL)),
            )
        })
        .collect();
    let fixed = FIXED.iter().zip([95.0, 75.0, 55.0]).filter(|(fixed, _)| measured(fixed));
    for (fixed, percent) in fixed {
        let claim = format!("{fixed}: what is sent while sending, % of the link");
        checks.push(Check::median(
            &claim,
            Bound::AtMost(percent + 2.0),
            &record.figures(fixed, USED),
        ));
    }
    let wrong: Vec<f64> = ARMS.iter().flat_map(|arm| record.figures(arm.name, WRONG)).collect();
    checks.push(Check::worst("wrong bytes reported by a guest", Bound::AtMost(0.0), &wrong));
    checks
}

/// The paper's picture (a), with both beside each other.
#[must_use]
pub fn plots(record: &Record) -> Vec<Plot> {
    let places = [0.0, 1.0, 2.0];
    let of =
        |cases: [&'static str; 3]| -> Vec<(f64, &str)> { places.into_iter().zip(cases).collect() };
    let bars =
        |name: &str, cases: &[(f64, &str)]| Series::of(record, name, Shape::Bars, TOTAL, cases);
    vec![Plot {
        name: format!("{NAME}-time"),
        title: "Total time to empty the host, strict reservations".to_owned(),
        others_show: record.others_show.clone(),
        ground: Ground::names("urgency, % of the link", &["95", "75", "55"]),
        height: "seconds".to_owned(),
        series: vec![
            bars("adaptive", &of(ADAPTIVE)),
            bars("fixed", &of(FIXED)),
            bars(WITHOUT, &of([WITHOUT; 3])),
        ],
    }]
}
