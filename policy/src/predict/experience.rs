//! What earlier migrations taught: how much of a path's bandwidth a migration really gets.
//!
//! A path's counters say what is free. What a migration makes of it depends on what no counter
//! shows: the processors of both hosts and of software switches, and the guest's pages themselves.
//! The plan scales its bandwidths by this, and says so. Used by `plan`; the controller draws the
//! samples from its journal. Not here: the model of one migration (`predict`).

use serde::Serialize;

/// Samples that count: the newest ones, because machines and loads change.
pub(super) const SAMPLES: usize = 8;
/// The least share that is believed: below it something else was wrong than the machine's speed.
const LEAST: f64 = 0.05;
/// Relative error of a bandwidth that is computed from counters of the last second.
const COUNTERS_ERROR: f64 = 0.1;
/// Above this an error says no more than "anything".
const ERROR_MOST: f64 = 0.5;

/// What is known of the speed of migrations.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Experience {
    /// What a migration got of the bandwidth that its path had for it, 0.05 to 1.
    pub share: f64,
    /// Relative error of the bandwidth that follows from it.
    pub error: f64,
    /// How many migrations say so.
    pub migrations: usize,
}

impl Default for Experience {
    /// None yet: what the path has is what a migration gets.
    fn default() -> Self {
        Self { share: 1.0, error: COUNTERS_ERROR, migrations: 0 }
    }
}

impl Experience {
    /// The median of the newest eight of `shares`, newest first, each a migration's measured
    /// rate divided by the bandwidth that its path had; the error is what half of them stay within.
    #[must_use]
    pub fn of(shares: impl IntoIterator<Item = f64>) -> Self {
        let believable = shares.into_iter().filter(|share| share.is_finite() && *share > 0.0);
        let mut newest: Vec<f64> =
            believable.map(|share| share.clamp(LEAST, 1.0)).take(SAMPLES).collect();
        if newest.is_empty() {
            return Self::default();
        }
        let share = median(&mut newest);
        let mut off: Vec<f64> = newest.iter().map(|one| (one / share - 1.0).abs()).collect();
        let error = median(&mut off).clamp(COUNTERS_ERROR, ERROR_MOST);
        Self { share, error, migrations: newest.len() }
    }
}

/// The middle one, the greater of two. Of at least one value, none of them NaN.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_migration_the_counters_are_believed() {
        assert_eq!(Experience::of([]), Experience::default());
        assert_eq!(Experience::of([f64::NAN, 0.0, -1.0]), Experience::default());
    }

    #[test]
    fn one_odd_migration_among_several_changes_little() {
        let experience = Experience::of([0.7, 0.72, 0.1, 0.71]);
        assert!((experience.share - 0.71).abs() < 1e-9);
        assert_eq!((experience.error, experience.migrations), (0.1, 4));
    }

    #[test]
    fn only_the_newest_count_and_no_share_exceeds_the_path() {
        let shares = std::iter::repeat_n(1.3, SAMPLES).chain(std::iter::repeat_n(0.2, 40));
        assert_eq!(Experience::of(shares).share, 1.0);
    }

    #[test]
    fn what_scatters_says_so() {
        assert!(Experience::of([0.4, 0.9, 0.5, 0.8]).error > 0.2);
    }
}
