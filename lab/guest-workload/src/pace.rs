//! Pacing: how many units (bytes, pages, nanoseconds of work) are due at a given moment.
//!
//! Used for everything that a guest or the client does "at a rate". Pure; `now` is passed in.
//! What could not be done in time is kept only up to a cap: a guest that stood still during a
//! switchover must not make up for it with a burst.

use std::time::Duration;

/// Credit that grows at a rate.
#[derive(Debug)]
pub(crate) struct Pace {
    per_second: u64,
    cap: u64,
    /// Units x 10^9, so that slow rates lose nothing between two calls.
    credit: u128,
    last: Duration,
}

const NANOS: u128 = 1_000_000_000;

impl Pace {
    /// A pace of `per_second` units that keeps at most `burst` of time's worth of them (and at
    /// least `least` units, or nothing larger than that could ever be taken).
    pub(crate) fn new(per_second: u64, burst: Duration, least: u64, now: Duration) -> Self {
        let burst = u128::from(per_second) * burst.as_nanos() / NANOS;
        let cap = u64::try_from(burst).unwrap_or(u64::MAX).max(least);
        Self { per_second, cap, credit: 0, last: now }
    }

    /// How many units are due now.
    pub(crate) fn due(&mut self, now: Duration) -> u64 {
        let passed = now.saturating_sub(self.last).as_nanos();
        self.last = self.last.max(now);
        let cap = u128::from(self.cap) * NANOS;
        let grown = passed.saturating_mul(u128::from(self.per_second));
        self.credit = self.credit.saturating_add(grown).min(cap);
        u64::try_from(self.credit / NANOS).unwrap_or(u64::MAX)
    }

    /// Takes what was done off the credit.
    pub(crate) fn took(&mut self, units: u64) {
        self.credit = self.credit.saturating_sub(u128::from(units) * NANOS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_rate_is_kept_over_many_small_steps() {
        let mut pace = Pace::new(333, Duration::from_millis(100), 1, Duration::ZERO);
        let mut done = 0;
        for step in 1..=10_000 {
            let due = pace.due(MS * step);
            pace.took(due);
            done += due;
        }
        assert_eq!(done, 3330);
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let mut pace = Pace::new(1000, Duration::from_millis(50), 1, Duration::ZERO);
        assert_eq!(pace.due(Duration::from_secs(60)), 50);
    }

    #[test]
    fn a_clock_that_stands_or_jumps_back_gives_nothing() {
        let mut pace = Pace::new(1000, Duration::from_secs(1), 1, Duration::from_secs(5));
        assert_eq!(pace.due(Duration::from_secs(4)), 0);
        assert_eq!(pace.due(Duration::from_secs(5)), 0);
    }

    proptest! {
        #[test]
        fn never_more_than_the_rate_allows(
            rate in 0u64..1_000_000_000, steps in proptest::collection::vec(0u64..200_000_000, 0..50),
        ) {
            let mut pace = Pace::new(rate, Duration::from_millis(100), 1, Duration::ZERO);
            let (mut now, mut done) = (Duration::ZERO, 0u128);
            for step in steps {
                now += Duration::from_nanos(step);
                let due = pace.due(now);
                pace.took(due);
                done += u128::from(due);
            }
            prop_assert!(done * NANOS <= u128::from(rate) * now.as_nanos());
        }
    }
}
