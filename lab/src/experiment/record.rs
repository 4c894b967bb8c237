//! What an experiment leaves: `lab/out/NAME.json`, and the table that a person sees.
//!
//! Written by the program `lifeboat-experiment`. Everything that a reader needs to judge or repeat
//! it: the question, what others show, the parameters, the machine, every raw sample, and the
//! checks. Deliberately not here: measuring, and writing the file.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;
use serde_json::Value;

use super::check::Check;
use super::statistics::{median, median_interval};

/// The machine that an experiment ran on, as far as it matters for its figures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// CPU model.
    pub cpu: String,
    /// CPUs.
    pub cpus: usize,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Kernel release.
    pub kernel: String,
    /// QEMU's version.
    pub qemu: String,
    /// Open vSwitch's version.
    pub open_vswitch: String,
    /// How many tasks wanted to run before the experiment began (the load average of one minute,
    /// times 100): a busy machine spoils figures.
    pub load_percent_before: u64,
}

/// One run: which case, which repetition, and what was measured, each figure with its unit in its
/// name.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sample {
    /// Which of the compared cases.
    pub case: String,
    /// Which repetition; runs of one number belong together as a pair.
    pub run: usize,
    /// The figures.
    pub figures: BTreeMap<&'static str, f64>,
}

/// All that one experiment has to say.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// What it asks.
    pub question: String,
    /// What the paper or the peer shows.
    pub others_show: String,
    /// True for a first look with few runs.
    pub quick: bool,
    /// When it began, in seconds since the epoch.
    pub began_unix: u64,
    /// On what it ran.
    pub machine: Machine,
    /// With what.
    pub parameters: Value,
    /// Every run, in the order in which they were made.
    pub samples: Vec<Sample>,
    /// What was held against what.
    pub checks: Vec<Check>,
}

impl Record {
    /// Whether every bound holds. Without a check nothing was shown.
    #[must_use]
    pub fn holds(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|check| check.holds)
    }

    /// The samples of one figure in one case, in their order.
    #[must_use]
    pub fn figures(&self, case: &str, figure: &str) -> Vec<f64> {
        let of_case = self.samples.iter().filter(|sample| sample.case == case);
        of_case.filter_map(|sample| sample.figures.get(figure).copied()).collect()
    }

    /// One figure in two cases, by runs that both have.
    #[must_use]
    pub fn pairs(&self, one: &str, other: &str, figure: &str) -> Vec<(f64, f64)> {
        let of = |case: &str| -> BTreeMap<usize, f64> {
            let of_case = self.samples.iter().filter(|sample| sample.case == case);
            of_case.filter_map(|s| Some((s.run, *s.figures.get(figure)?))).collect()
        };
        let others = of(other);
        of(one).into_iter().filter_map(|(run, one)| Some((one, *others.get(&run)?))).collect()
    }

    /// The table for a terminal.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "\n{}: {}\nothers show: {}\n",
            self.name, self.question, self.others_show
        );
        self.medians(&mut text);
        text.push('\n');
        for check in &self.checks {
            let _ = writeln!(text, "{}", line(check));
        }
        if self.quick {
            let _ =
                writeln!(text, "a first look: judged on few runs; without --quick there are more");
        }
        text
    }

    fn medians(&self, text: &mut String) {
        let mut cases: Vec<&str> = Vec::new();
        for sample in &self.samples {
            if !cases.contains(&sample.case.as_str()) {
                cases.push(&sample.case);
            }
        }
        for case in cases {
            let names =
                self.samples.iter().filter(|s| s.case == case).flat_map(|s| s.figures.keys());
            let mut names: Vec<&str> = names.copied().collect();
            names.sort_unstable();
            names.dedup();
            let _ = writeln!(text, "{case}");
            for name in names {
                let samples = self.figures(case, name);
                let (Some(middle), Some(interval)) = (median(&samples), median_interval(&samples))
                else {
                    continue;
                };
                let (low, high) = (figure(interval.low), figure(interval.high));
                let _ = writeln!(
                    text,
                    "  {name:<34} {:>10}   ({low} .. {high}; {} runs)",
                    figure(middle),
                    samples.len()
                );
            }
        }
    }
}

fn line(check: &Check) -> String {
    let word = if check.holds { "holds" } else { "BROKEN" };
    let measured = check.figure.map_or_else(|| "nothing measured".to_owned(), figure);
    let spread = check.interval.map_or_else(String::new, |interval| {
        let (low, high) = (figure(interval.low), figure(interval.high));
        format!(" ({low} .. {high}; {} samples)", check.samples)
    });
    format!("{word:<7} {}: {} {measured}{spread}, bound {}", check.claim, check.by, check.bound)
}

/// Four significant digits.
fn figure(value: f64) -> String {
    let digits = if value == 0.0 { 0 } else { 3 - value.abs().log10().floor() as i32 };
    format!("{value:.*}", digits.clamp(0, 6) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::Bound;

    fn record() -> Record {
        let sample = |case: &str, run, seconds| Sample {
            case: case.to_owned(),
            run,
            figures: BTreeMap::from([("seconds", seconds)]),
        };
        Record {
            name: "x".to_owned(),
            question: "is it quick?".to_owned(),
            others_show: "nothing".to_owned(),
            quick: true,
            began_unix: 1,
            machine: Machine {
                cpu: "c".to_owned(),
                cpus: 2,
                memory_bytes: 1,
                kernel: "k".to_owned(),
                qemu: "7.2".to_owned(),
                open_vswitch: "3.1".to_owned(),
                load_percent_before: 0,
            },
            parameters: Value::Null,
            samples: vec![sample("a", 0, 2.0), sample("b", 0, 1.0), sample("a", 1, 3.0)],
            checks: vec![],
        }
    }

    #[test]
    fn pairs_are_made_of_runs_that_both_cases_have() {
        assert_eq!(record().pairs("a", "b", "seconds"), [(2.0, 1.0)]);
        assert_eq!(record().figures("a", "seconds"), [2.0, 3.0]);
        assert!(record().pairs("a", "c", "seconds").is_empty());
    }

    #[test]
    fn nothing_checked_is_nothing_shown_and_one_broken_bound_is_enough() {
        let mut record = record();
        assert!(!record.holds());
        record.checks.push(Check::median("good", Bound::AtMost(3.0), &[2.0]));
        assert!(record.holds());
        record.checks.push(Check::median("bad", Bound::AtMost(1.0), &[2.0]));
        assert!(!record.holds());
    }

    #[test]
    fn the_table_says_what_holds_and_that_a_first_look_is_one() {
        let mut record = record();
        record.checks.push(Check::median("time in s", Bound::AtMost(3.0), &[2.0, 2.5]));
        record.checks.push(Check::median("nobody measured", Bound::AtMost(3.0), &[]));
        let table = record.table();
        assert!(
            table.contains("holds   time in s: median 2.250 (2.000 .. 2.500; 2 samples)"),
            "{table}"
        );
        assert!(table.contains("BROKEN  nobody measured: median nothing measured"), "{table}");
        assert!(table.contains("judged on few runs"), "{table}");
        assert!(table.contains("  seconds"), "{table}");
    }

    #[test]
    fn figures_have_four_digits() {
        for (value, text) in [
            (0.0, "0"),
            (12345.6, "12346"),
            (75.123, "75.12"),
            (0.01234, "0.01234"),
            (-3.0, "-3.000"),
        ] {
            assert_eq!(figure(value), text);
        }
    }
}
