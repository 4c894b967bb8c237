//! A bound, the figure that is held against it, and the samples that the figure came from.
//!
//! Made by the experiments, kept in [`super::Record`]. Pure.

use std::fmt;

use serde::Serialize;

use super::statistics::{Interval, median, median_interval};

/// What a figure must satisfy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// No less than this.
    AtLeast(f64),
    /// No more than this.
    AtMost(f64),
    /// From the first to the second, both included.
    Within(f64, f64),
}

impl Bound {
    /// Whether `figure` satisfies it. What is not a number never does.
    #[must_use]
    pub fn holds(self, figure: f64) -> bool {
        match self {
            Self::AtLeast(least) => figure >= least,
            Self::AtMost(most) => figure <= most,
            Self::Within(least, most) => (least..=most).contains(&figure),
        }
    }

    /// How far `figure` is from breaking it; negative when it does.
    fn margin(self, figure: f64) -> f64 {
        match self {
            Self::AtLeast(least) => figure - least,
            Self::AtMost(most) => most - figure,
            Self::Within(least, most) => (figure - least).min(most - figure),
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(least) => write!(f, ">= {least}"),
            Self::AtMost(most) => write!(f, "<= {most}"),
            Self::Within(least, most) => write!(f, "{least} .. {most}"),
        }
    }
}

/// One claim, held against what was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// The claim, with the unit of its figure.
    pub claim: String,
    /// What the figure must satisfy.
    pub bound: Bound,
    /// What was measured; absent when there was no sample, and then the check fails.
    pub figure: Option<f64>,
    /// `median` or `worst`: how the figure came from the samples.
    pub by: &'static str,
    /// Where the median lies.
    pub interval: Option<Interval>,
    /// How many samples there were.
    pub samples: usize,
    /// Whether the figure satisfies the bound.
    pub holds: bool,
}

impl Check {
    /// Holds when the median of `samples` satisfies `bound`.
    #[must_use]
    pub fn median(claim: &str, bound: Bound, samples: &[f64]) -> Self {
        Self::new(claim, bound, samples, "median", median(samples))
    }

    /// Holds when every sample satisfies `bound`; the figure is the one that comes closest to
    /// breaking it, or breaks it most.
    #[must_use]
    pub fn worst(claim: &str, bound: Bound, samples: &[f64]) -> Self {
        let margin = |sample: &f64| if sample.is_nan() { f64::MIN } else { bound.margin(*sample) };
        let worst = samples.iter().min_by(|a, b| margin(a).total_cmp(&margin(b)));
        Self::new(claim, bound, samples, "worst", worst.copied())
    }

    fn new(
        claim: &str,
        bound: Bound,
        samples: &[f64],
        by: &'static str,
        figure: Option<f64>,
    ) -> Self {
        Self {
            claim: claim.to_owned(),
            bound,
            figure,
            by,
            interval: median_interval(samples),
            samples: samples.len(),
            holds: figure.is_some_and(|figure| bound.holds(figure)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_include_their_ends_and_refuse_what_is_no_number() {
        assert!(Bound::AtLeast(0.7).holds(0.7) && !Bound::AtLeast(0.7).holds(0.69));
        assert!(Bound::AtMost(10.0).holds(10.0) && !Bound::AtMost(10.0).holds(10.1));
        assert!(Bound::Within(72.0, 78.0).holds(78.0) && !Bound::Within(72.0, 78.0).holds(71.9));
        for bound in [Bound::AtLeast(0.0), Bound::AtMost(0.0), Bound::Within(0.0, 1.0)] {
            assert!(!bound.holds(f64::NAN), "{bound}");
        }
    }

    #[test]
    fn a_median_check_forgives_one_bad_run_and_a_worst_check_does_not() {
        let samples = [75.0, 74.0, 60.0, 76.0, 75.5];
        assert!(Check::median("share", Bound::Within(72.0, 78.0), &samples).holds);
        let worst = Check::worst("share", Bound::Within(72.0, 78.0), &samples);
        assert_eq!((worst.figure, worst.holds), (Some(60.0), false));
        assert_eq!(Check::worst("x", Bound::AtMost(9.0), &[1.0, 8.0]).figure, Some(8.0));
    }

    #[test]
    fn no_samples_prove_nothing() {
        assert!(!Check::median("x", Bound::AtLeast(0.0), &[]).holds);
        assert!(!Check::worst("x", Bound::AtLeast(0.0), &[f64::NAN]).holds);
    }
}
