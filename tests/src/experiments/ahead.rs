//! How much sooner is a host rid of a guest whose pages go to stores while it still runs there?
//!
//! The hosts, the guest and the store are those of `faults`. The guest is moved to and fro, in turn with its
//! pages from COMMIT on and with them from the first pass over its memory on, at several rates of the source:
//! what there is to win is what goes while the agent takes the memory in, and that takes as long at any rate.
//! The choice itself is `lifeboat_policy::predict::ahead`; here it is made by the experiment, also where
//! that would say no.
//!
//! What others show: SOLive (V-B) scatters while its guest runs, by rounds of pre-copy, and does not compare.

use lifeboat_lab::experiment::statistics::ratios;
use lifeboat_lab::experiment::{Bound, Check, Record, Sample};
use lifeboat_protocol::units::BitsPerSec;
use serde_json::json;

use super::Setting;
use super::faults::{self, Asked, EVICTED, WRONG};
use super::machine::machine;
use crate::clock;
use crate::rig::RigError;
use crate::rig::userfaultfd::Allowed;

/// Its name.
pub const NAME: &str = "ahead";

/// The source's rates, with words for them.
const RATES: [(BitsPerSec, &str); 3] = [
    (BitsPerSec(1_000_000_000), "1 Gbit/s"),
    (BitsPerSec(500_000_000), "500 Mbit/s"),
    (BitsPerSec(200_000_000), "200 Mbit/s"),
];
const DOWNTIME: &str = faults::DOWNTIME_MS;
const AHEAD: &str = faults::AHEAD;

fn case(rate: &str, ahead: bool) -> String {
    format!("{rate}, {}", if ahead { "from the first pass on" } else { "from COMMIT on" })
}

/// Raises three hosts, moves the guest to and fro, judges.
///
/// # Errors
/// When the rig cannot be raised, or a migration fails.
pub async fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let runs = setting.runs.unwrap_or(if setting.quick { 2 } else { 15 });
    let mut record = blank(&setting, runs);
    let _allowed = Allowed::now()?;
    let mut rig = faults::Rig::raise(&setting).await?;
    let mut moves = 0;
    for run in 0..runs {
        for (limit, rate) in RATES {
            // In turn, and each of them first every other time.
            for ahead in [run % 2 == 0, run % 2 != 0] {
                let asked = Asked { ahead, limit: Some(limit), ..Asked::default() };
                let figures = rig.measure(moves, asked).await?;
                record.samples.push(Sample { case: case(rate, ahead), run, figures });
                moves += 1;
            }
        }
        setting.keep(&record, run + 1, runs);
    }
    record.checks = checks(&record);
    Ok(record)
}

fn blank(setting: &Setting<'_>, runs: usize) -> Record {
    Record {
        name: NAME.to_owned(),
        question:
            "how much sooner is a host rid of a guest whose pages go to stores while it runs?"
                .to_owned(),
        others_show: "SOLive (V-B) scatters while its guest runs, and does not compare".to_owned(),
        quick: setting.quick,
        began_unix: clock::unix_now().as_secs(),
        machine: machine(),
        parameters: json!({ "runs": runs, "guest": faults::guest() }),
        samples: Vec::new(),
        checks: Vec::new(),
    }
}

fn checks(record: &Record) -> Vec<Check> {
    let mut checks = Vec::new();
    for (_, rate) in RATES {
        let of = |figure: &str| -> Vec<(f64, f64)> {
            let figures = |ahead| record.figures(&case(rate, ahead), figure);
            figures(true).into_iter().zip(figures(false)).collect()
        };
        // On two cores nothing is to be won by it, and nothing to be lost.
        let claim = format!("{rate}: eviction with pages that go ahead, by that without");
        checks.push(Check::median(&claim, Bound::AtMost(1.1), &ratios(&of(EVICTED))));
        let longer: Vec<f64> = of(DOWNTIME).iter().map(|(ahead, after)| ahead - after).collect();
        let claim = format!("{rate}: ms that the guest stands still longer");
        checks.push(Check::median(&claim, Bound::AtMost(20.0), &longer));
    }
    let ahead: Vec<f64> =
        RATES.iter().flat_map(|(_, rate)| record.figures(&case(rate, true), AHEAD)).collect();
    checks.push(Check::worst("pages that went ahead", Bound::AtLeast(1.0), &ahead));
    let wrong = |sample: &Sample| sample.figures.get(WRONG).copied();
    let wrong: Vec<f64> = record.samples.iter().filter_map(wrong).collect();
    checks.push(Check::worst("wrong bytes reported by a guest", Bound::AtMost(0.0), &wrong));
    checks
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_round_is_compared_within_itself() {
        let mut record = Record {
            name: NAME.to_owned(),
            question: String::new(),
            others_show: String::new(),
            quick: true,
            began_unix: 0,
            machine: machine(),
            parameters: json!({}),
            samples: Vec::new(),
            checks: Vec::new(),
        };
        for (_, rate) in RATES {
            for (ahead, seconds, pages) in [(true, 1.0, 9.0), (false, 2.0, 0.0)] {
                let figures = BTreeMap::from([
                    (EVICTED, seconds),
                    (DOWNTIME, 30.0),
                    (AHEAD, pages),
                    (WRONG, 0.0),
                ]);
                record.samples.push(Sample { case: case(rate, ahead), run: 0, figures });
            }
        }
        let checks = checks(&record);
        assert!(checks.iter().all(|check| check.holds), "{checks:?}");
        assert_eq!((checks[0].figure, checks[1].figure), (Some(0.5), Some(0.0)));
    }
}
