//! How long do guests of the lab's cloud stand still, by the mode in which they move?
//!
//! ```text
//!   db:    h1 <-> h2, pages at h3, h4, h5     web:  h1 <-> h3, pages at h4, h5
//!                                                            (lab/scenarios/two-guests.toml)
//!   build: h1 <-> h2, pages at h3, h4, h5     log:  h1 <-> h3, pages at h4, h5
//!                                                      (lab/scenarios/two-other-guests.toml)
//! ```
//!
//! The guests are the demo's four, two in a cloud at once: `db` writes memory and its local disk, which moves
//! with it, `web` sends to the client, `build` computes and has two NICs, `log` receives, in a VLAN. Each moves to and fro by pre-copy, post-copy and scatter-gather in turn, through the
//! controller, with the reservations of urgency 90. The downtime is the source's: from its QEMU's STOP to
//! the word that the guest runs at the destination. A guest that runs may still wait for pages; what it
//! waits for those that are in stores is a figure of `faults`.
//!
//! What others show: SOLive (V-B) promises that post-copy and scatter-gather have the downtime of
//! pre-copy or less, and states none.

use std::collections::BTreeMap;
use std::time::Duration;

use lifeboat_lab::experiment::statistics::differences;
use lifeboat_lab::experiment::{Bound, Check, Record, Sample};
use serde_json::{Value, json};

use super::Setting;
use super::machine::machine;
use super::solive::carried_out;
use crate::clock;
use crate::rig::RigError;
use crate::rig::cloud::Cloud;
use crate::rig::userfaultfd::Allowed;

/// Its name.
pub const NAME: &str = "downtime";

const SCATTERED: &str = "scatter-gather";
const MODES: [&str; 3] = ["pre-copy", "post-copy", SCATTERED];
/// More than any migration takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);
const REST: Duration = Duration::from_secs(2);
const DOWNTIME: &str = "downtime_ms";
const WRONG: &str = "wrong_bytes_reported";
/// How much longer than by pre-copy a guest may stand, in milliseconds.
const MORE_AT_MOST: f64 = 20.0;

/// A guest, the two hosts that it moves between, and those where its pages wait. They are named, because
/// a host without an idle CPU is not chosen, and all of these share this machine's few.
struct Guest {
    name: &'static str,
    hosts: [&'static str; 2],
    intermediaries: &'static str,
}

/// The clouds, one after the other, and who is in each: this machine's few CPUs carry two guests without
/// keeping them waiting, and not four.
const CLOUDS: [(&str, [Guest; 2]); 2] = [
    (
        "two-guests",
        [
            Guest { name: "db", hosts: ["h1", "h2"], intermediaries: "h3,h4,h5" },
            Guest { name: "web", hosts: ["h1", "h3"], intermediaries: "h4,h5" },
        ],
    ),
    (
        "two-other-guests",
        [
            Guest { name: "build", hosts: ["h1", "h2"], intermediaries: "h3,h4,h5" },
            Guest { name: "log", hosts: ["h1", "h3"], intermediaries: "h4,h5" },
        ],
    ),
];

fn case(guest: &Guest, mode: &str) -> String {
    format!("{}, {mode}", guest.name)
}

/// Raises the clouds, moves the guests in turn, judges.
///
/// # Errors
/// When a cloud cannot be raised, or a migration fails.
pub fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let rounds = setting.runs.unwrap_or(if setting.quick { 1 } else { 9 });
    let mut record = blank(&setting, rounds);
    let _allowed = Allowed::now()?;
    for (number, (scenario, guests)) in CLOUDS.iter().enumerate() {
        let wanted = |guest: &Guest| MODES.iter().any(|mode| setting.wants(&case(guest, mode)));
        if guests.iter().any(wanted) {
            let rounds = (number * rounds, rounds, CLOUDS.len() * rounds);
            in_cloud(&setting, &mut record, (scenario, guests), rounds)?;
        }
    }
    record.checks = checks(&record);
    Ok(record)
}

/// So many rounds of moves in one cloud; `before` rounds of `of` have been.
fn in_cloud(
    setting: &Setting<'_>,
    record: &mut Record,
    (scenario, guests): (&str, &[Guest; 2]),
    (before, rounds, of): (usize, usize, usize),
) -> Result<(), RigError> {
    let lab = setting.images.parent().unwrap_or(setting.images);
    let cloud = Cloud::raise(lab, scenario, &setting.folder.join(format!("{scenario}.log")))?;
    let seconds = setting.minutes.map(|minutes| minutes * 60 / CLOUDS.len() as u64);
    let end = seconds.map(|seconds| clock::now() + Duration::from_secs(seconds));
    clock::rest(REST * 2);
    // Where each is: every migration takes it to its other host.
    let mut at = guests.each_ref().map(|_| 0);
    for round in 0..rounds {
        for turn in 0..MODES.len() {
            for (guest, at) in guests.iter().zip(&mut at) {
                // Who begins differs from round to round.
                let mode = MODES[(turn + round) % MODES.len()];
                if !setting.wants(&case(guest, mode)) {
                    continue;
                }
                if end.is_some_and(|end| clock::now() > end) {
                    return Ok(());
                }
                let to = 1 - *at;
                let figures = moved(&cloud, guest, (guest.hosts[*at], guest.hosts[to]), mode)?;
                *at = to;
                record.samples.push(Sample { case: case(guest, mode), run: round, figures });
                clock::rest(REST);
            }
        }
        setting.keep(record, before + round + 1, of);
    }
    Ok(())
}

/// All of them.
fn guests() -> impl Iterator<Item = &'static Guest> {
    CLOUDS.iter().flat_map(|(_, guests)| guests)
}

fn blank(setting: &Setting<'_>, rounds: usize) -> Record {
    Record {
        name: NAME.to_owned(),
        question: "how long do guests stand still, by the mode in which they move?".to_owned(),
        others_show: "SOLive (V-B) promises the downtime of pre-copy or less, and states none"
            .to_owned(),
        quick: setting.quick,
        began_unix: clock::unix_now().as_secs(),
        machine: machine(),
        parameters: json!({
            "rounds": rounds,
            "scenarios": CLOUDS.each_ref().map(|(scenario, _)| scenario),
            "guests": guests()
                .map(|guest| json!({"vm": guest.name, "between": guest.hosts}))
                .collect::<Vec<_>>(),
            "urgency": 90,
        }),
        samples: Vec::new(),
        checks: Vec::new(),
    }
}

fn moved(
    cloud: &Cloud,
    guest: &Guest,
    (from, to): (&str, &str),
    mode: &str,
) -> Result<BTreeMap<&'static str, f64>, RigError> {
    let listener = cloud.listen(from, guest.name)?;
    let mut order = vec!["migrate", guest.name, "--to", to, "--mode", mode, "--urgency", "90"];
    if mode == SCATTERED {
        order.extend(["--intermediaries", guest.intermediaries]);
    }
    let report = carried_out(cloud, &order, LIMIT, &mut |_| ())?;
    let mut figures = reported(&report)?;
    // It has had time to find what is wrong with its memory.
    clock::rest(REST);
    let said = listener.heard(&cloud.serial(to, guest.name))?;
    figures.insert(WRONG, said.matches("LIFEBOAT-CORRUPT").count() as f64);
    Ok(figures)
}

/// What the controller reports of its one VM.
fn reported(report: &Value) -> Result<BTreeMap<&'static str, f64>, RigError> {
    let vm = &report["vms"][0];
    if vm["outcome"] != "moved" {
        return Err(RigError::refused("a migration")(report.to_string()));
    }
    let of = |key: &str| vm[key].as_u64().unwrap_or_default() as f64;
    Ok(BTreeMap::from([
        (DOWNTIME, of("downtime_us") / 1e3),
        ("eviction_seconds", of("eviction_ms") / 1e3),
        ("total_seconds", of("total_ms") / 1e3),
    ]))
}

fn checks(record: &Record) -> Vec<Check> {
    let mut checks = Vec::new();
    for guest in guests() {
        for mode in &MODES[1..] {
            if record.figures(&case(guest, mode), DOWNTIME).is_empty() {
                continue;
            }
            let pairs = record.pairs(&case(guest, mode), &case(guest, MODES[0]), DOWNTIME);
            let claim = format!("{}: downtime, ms more than by pre-copy", case(guest, mode));
            checks.push(Check::median(&claim, Bound::AtMost(MORE_AT_MOST), &differences(&pairs)));
        }
    }
    let wrong: Vec<f64> =
        record.samples.iter().filter_map(|sample| sample.figures.get(WRONG)).copied().collect();
    checks.push(Check::worst("wrong bytes reported by a guest", Bound::AtMost(0.0), &wrong));
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_guest_that_moved_has_figures() {
        let report = |outcome: &str| {
            json!({"vms": [{"outcome": outcome, "eviction_ms": 8000, "total_ms": 9000,
                            "downtime_us": 120_000}]})
        };
        let figures = reported(&report("moved")).unwrap();
        assert_eq!((figures[DOWNTIME], figures["total_seconds"]), (120.0, 9.0));
        assert!(reported(&report("left-behind")).is_err());
    }

    #[test]
    fn a_mode_is_compared_with_pre_copy_of_the_same_guest_and_round() {
        let mut record = blank_record();
        for (round, more) in [(0, 5.0), (1, 25.0), (2, 30.0)] {
            for (mode, downtime) in [("pre-copy", 100.0), ("post-copy", 100.0 + more)] {
                let figures = BTreeMap::from([(DOWNTIME, downtime), (WRONG, 0.0)]);
                let case = case(&CLOUDS[0].1[0], mode);
                record.samples.push(Sample { case, run: round, figures });
            }
        }
        let checks = checks(&record);
        assert!(!checks[0].holds, "{:?}", checks[0]);
        assert!(checks.last().is_some_and(|check| check.holds));
    }

    fn blank_record() -> Record {
        Record {
            name: NAME.to_owned(),
            question: String::new(),
            others_show: String::new(),
            quick: true,
            began_unix: 0,
            machine: machine(),
            parameters: Value::Null,
            samples: Vec::new(),
            checks: Vec::new(),
        }
    }
}
