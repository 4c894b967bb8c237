//! From counts to rates, with their error. Pure.
//!
//! A sample of the guest's pages is hashed three times, at the beginning, the middle and the end
//! of a window. What changed in a half gives the dirty rate; how much the two halves have in
//! common gives the working set.

/// What three looks at a sample of pages showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Changes {
    /// Pages looked at.
    pub(super) sampled: u64,
    /// Of these, changed in the first half of the window.
    pub(super) first: u64,
    /// Changed in the second half.
    pub(super) second: u64,
    /// Changed in both.
    pub(super) both: u64,
}

/// A rate of distinct dirty pages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct DirtyRate {
    /// Distinct pages changed within the window, divided by the window.
    pub(super) pages_per_sec: f64,
    /// Half-width of the 95 % interval, as a share of the rate. 1 where no change was seen: then
    /// the rate is known to be small, and nothing more.
    pub(super) error: f64,
}

/// 97.5 % quantile of the normal distribution: half of a 95 % interval.
const QUANTILE: f64 = 1.96;

/// The unique dirty rate of `pages` pages, of which some were sampled over `window_secs`.
///
/// The error is that of a proportion, with the correction for a finite population: a sample of all
/// pages has none. That a page may change and change back between two looks is not seen.
#[must_use]
pub(super) fn dirty_rate(changes: Changes, pages: u64, window_secs: f64) -> DirtyRate {
    let changed = distinct(changes);
    if changes.sampled == 0 || changed == 0 || window_secs <= 0.0 {
        return DirtyRate { pages_per_sec: 0.0, error: 1.0 };
    }
    let (sampled, all) = (changes.sampled as f64, pages as f64);
    let share = changed as f64 / sampled;
    let unseen = ((all - sampled) / (all - 1.0).max(1.0)).max(0.0);
    let deviation = (share * (1.0 - share) / sampled * unseen).sqrt();
    DirtyRate {
        pages_per_sec: share * all / window_secs,
        error: (QUANTILE * deviation / share).min(1.0),
    }
}

/// The pages that the guest writes at all, as far as two halves of a window can tell: as many as
/// would make their overlap likely (Chapman's estimator of capture and recapture). Never less than
/// what was seen, nor more than there are.
#[must_use]
pub(super) fn working_set(changes: Changes, pages: u64) -> u64 {
    if changes.sampled == 0 || distinct(changes) == 0 {
        return 0;
    }
    let (first, second, both) = (changes.first as f64, changes.second as f64, changes.both as f64);
    let estimate = (first + 1.0) * (second + 1.0) / (both + 1.0) - 1.0;
    let in_sample = estimate.max(distinct(changes) as f64);
    let scaled = in_sample * pages as f64 / changes.sampled as f64;
    (scaled.round() as u64).min(pages)
}

const fn distinct(changes: Changes) -> u64 {
    (changes.first + changes.second).saturating_sub(changes.both)
}

/// A counter's growth over the window, per second. A counter that went back was reset: zero.
#[must_use]
pub(super) fn per_sec(before: u64, after: u64, window_secs: f64) -> u64 {
    match window_secs > 0.0 {
        true => (after.saturating_sub(before) as f64 / window_secs).round() as u64,
        false => 0,
    }
}

/// `count` of `of` pages, one from each of as many equal stretches, at a place that `seed` decides:
/// spread like a grid, yet without its blindness for what repeats. All of them if there are no more.
#[must_use]
pub(super) fn sample(of: u64, count: u64, seed: u64) -> Vec<u64> {
    if count >= of {
        return (0..of).collect();
    }
    let mut state = seed;
    let bound = |i: u64| (u128::from(i) * u128::from(of) / u128::from(count)) as u64;
    (0..count)
        .map(|i| {
            let (from, to) = (bound(i), bound(i + 1));
            from + split_mix(&mut state) % (to - from).max(1)
        })
        .collect()
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, and good enough to choose pages.
const fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn all_pages_looked_at_leave_no_error() {
        let changes = Changes { sampled: 1000, first: 100, second: 100, both: 50 };
        let rate = dirty_rate(changes, 1000, 2.0);
        assert_eq!(rate.pages_per_sec, 75.0);
        assert_eq!(rate.error, 0.0);
    }

    #[test]
    fn a_sample_is_scaled_and_states_its_error() {
        let changes = Changes { sampled: 10_000, first: 500, second: 500, both: 0 };
        let rate = dirty_rate(changes, 1_000_000, 1.0);
        assert_eq!(rate.pages_per_sec, 100_000.0);
        // 1.96 * sqrt(0.1 * 0.9 / 10000 * 0.99) / 0.1
        assert!((rate.error - 0.0585).abs() < 0.0005, "{}", rate.error);
        let none = dirty_rate(Changes { sampled: 10, ..Changes::default() }, 100, 1.0);
        assert_eq!(none, DirtyRate { pages_per_sec: 0.0, error: 1.0 });
    }

    #[test]
    fn the_working_set_is_what_makes_the_overlap_likely() {
        // 200 pages written at random, half of them in each half of the window.
        let changes = Changes { sampled: 1000, first: 100, second: 100, both: 50 };
        assert_eq!(working_set(changes, 1000), 199);
        // The same pages again and again.
        let changes = Changes { sampled: 1000, first: 100, second: 100, both: 100 };
        assert_eq!(working_set(changes, 1000), 100);
        assert_eq!(working_set(Changes::default(), 1000), 0);
    }

    #[test]
    fn a_counter_that_was_reset_is_not_a_rate() {
        assert_eq!(per_sec(100, 300, 2.0), 100);
        assert_eq!(per_sec(300, 100, 2.0), 0);
        assert_eq!(per_sec(0, 100, 0.0), 0);
    }

    proptest! {
        #[test]
        fn a_sample_is_in_order_distinct_and_in_range(of in 1..5000_u64, count in 1..5000_u64, seed: u64) {
            let pages = sample(of, count, seed);
            prop_assert_eq!(pages.len() as u64, count.min(of));
            prop_assert!(pages.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!(pages.iter().all(|&page| page < of));
        }

        #[test]
        fn a_working_set_is_at_least_what_was_seen_and_at_most_all(
            first in 0..500_u64, second in 0..500_u64, both in 0..500_u64,
        ) {
            let both = both.min(first).min(second);
            let changes = Changes { sampled: 1000, first, second, both };
            let set = working_set(changes, 10_000);
            prop_assert!(set >= (first + second - both) * 10 && set <= 10_000);
        }
    }
}
