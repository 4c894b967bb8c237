//! Medians and their spread, without chance: the same samples give the same figures.
//!
//! Used by [`super::Check`]. The interval of a median comes from the binomial distribution of how
//! many samples lie below it (Conover, Practical Nonparametric Statistics, 3.2): it assumes nothing
//! about the samples' distribution, and unlike a bootstrap it needs no random numbers and is exact
//! for few samples. Deliberately not here: means, because one run in which the machine did something
//! else would move them.

use serde::Serialize;

/// The share of intervals that hold the true median.
const CONFIDENCE: f64 = 0.95;

/// Where the true median lies.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    /// Lower end, one of the samples.
    pub low: f64,
    /// Upper end, one of the samples.
    pub high: f64,
    /// The probability that it holds the median: at least 0.95, or less where there are fewer than
    /// 6 samples, and then the ends are the least and the greatest.
    pub confidence: f64,
}

/// The middle sample, or the mean of both middle ones. `None` without samples.
#[must_use]
pub fn median(samples: &[f64]) -> Option<f64> {
    let sorted = sorted(samples);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// The narrowest symmetric interval of order statistics with 95 % confidence. `None` without
/// samples.
#[must_use]
pub fn median_interval(samples: &[f64]) -> Option<Interval> {
    let sorted = sorted(samples);
    let count = sorted.len();
    if count == 0 {
        return None;
    }
    // Leaving `cut` samples out at either end: the median is outside when at most `cut` of them lie
    // on one side of it, and each side has probability 1/2 for each sample.
    let (mut cut, mut outside, mut confidence) = (0, coin(count, 0), 0.0);
    for next in 0..count.div_ceil(2) {
        if next > 0 {
            outside += coin(count, next);
        }
        let inside = 1.0 - 2.0 * outside;
        if next == 0 || inside >= CONFIDENCE {
            (cut, confidence) = (next, inside);
        } else {
            break;
        }
    }
    Some(Interval {
        low: sorted[cut],
        high: sorted[count - 1 - cut],
        confidence: confidence.max(0.0),
    })
}

/// The probability of `k` heads in `count` throws.
fn coin(count: usize, k: usize) -> f64 {
    let ways = (0..k).map(|i| ((count - i) as f64 / (i + 1) as f64).ln()).sum::<f64>();
    (ways - count as f64 * std::f64::consts::LN_2).exp()
}

/// `one / other`, pair by pair. Pairs with a zero below are left out: a ratio to nothing says nothing.
#[must_use]
pub fn ratios(pairs: &[(f64, f64)]) -> Vec<f64> {
    pairs.iter().filter(|(_, other)| *other != 0.0).map(|(one, other)| one / other).collect()
}

/// `one - other`, pair by pair.
#[must_use]
pub fn differences(pairs: &[(f64, f64)]) -> Vec<f64> {
    pairs.iter().map(|(one, other)| one - other).collect()
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted: Vec<f64> = samples.iter().copied().filter(|sample| !sample.is_nan()).collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_and_outliers_do_not_move_it() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0]), Some(5.0));
        assert_eq!(median(&[2.0, 1e9, 1.0]), Some(2.0));
        assert_eq!(median(&[f64::NAN, 2.0]), Some(2.0));
    }

    /// The table of order statistics for 95 %: 6 samples 1st to 6th, 10 samples 2nd to 9th, 20
    /// samples 6th to 15th.
    #[test]
    fn intervals_are_those_of_the_printed_table() {
        for (count, first, confidence) in [(6, 1, 0.969), (10, 2, 0.979), (20, 6, 0.959)] {
            let samples: Vec<f64> = (1..=count).map(f64::from).collect();
            let interval = median_interval(&samples).unwrap();
            assert_eq!(interval.low, f64::from(first), "{count} samples");
            assert_eq!(interval.high, f64::from(count + 1 - first), "{count} samples");
            assert!((interval.confidence - confidence).abs() < 0.001, "{interval:?}");
        }
    }

    #[test]
    fn few_samples_give_their_whole_range_and_say_how_little_that_is_worth() {
        let interval = median_interval(&[5.0, 1.0, 3.0]).unwrap();
        assert_eq!((interval.low, interval.high), (1.0, 5.0));
        assert!((interval.confidence - 0.75).abs() < 1e-9);
        assert_eq!(median_interval(&[7.0]).unwrap().confidence, 0.0);
        assert_eq!(median_interval(&[]), None);
    }

    #[test]
    fn many_samples_do_not_overflow() {
        let samples: Vec<f64> = (0..5000).map(f64::from).collect();
        let interval = median_interval(&samples).unwrap();
        assert!((interval.confidence - 0.95).abs() < 0.005, "{interval:?}");
        assert!(interval.high - interval.low < 150.0);
    }

    #[test]
    fn ratios_and_differences_go_pair_by_pair() {
        assert_eq!(ratios(&[(3.0, 2.0), (1.0, 0.0), (1.0, 4.0)]), [1.5, 0.25]);
        assert_eq!(differences(&[(3.0, 2.0), (1.0, 4.0)]), [1.0, -3.0]);
    }
}
