//! From counters at two moments to a rate. Pure; the time is passed in.
//!
//! Used by the poll. A rate that is not known is `None`: nobody may take it for an idle port.

use lifeboat_protocol::units::BitsPerSec;

use crate::clock::UnixMs;

/// Below this two samples say more about the poll than about the port.
const LEAST_MS: u64 = 200;
/// Beyond this the two samples are not about "now" (and a clock that was set is caught, too).
const MOST_MS: u64 = 10_000;
/// A rate this old is not known any more.
const STALE_MS: u64 = 4_000;

/// A counter of bytes, followed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counter {
    last: Option<(UnixMs, u64)>,
    rate: Option<BitsPerSec>,
}

impl Counter {
    /// Takes the counter as it is at `now`.
    pub(super) fn sample(&mut self, now: UnixMs, bytes: u64) {
        if let Some((then, before)) = self.last {
            let elapsed = now.since(then);
            if elapsed < LEAST_MS && now >= then {
                return;
            }
            // A counter that went back was started again with its port or queue.
            let sent = bytes.checked_sub(before).filter(|_| elapsed <= MOST_MS && elapsed > 0);
            self.rate = sent.map(|sent| per_second(sent, elapsed));
        }
        self.last = Some((now, bytes));
    }

    /// What passed between the last two samples, if that is not long ago.
    pub(super) fn rate(&self, now: UnixMs) -> Option<BitsPerSec> {
        let (then, _) = self.last?;
        self.rate.filter(|_| now.since(then) <= STALE_MS)
    }
}

impl Counter {
    /// The rate, if its last sample was taken just at `now`.
    pub(super) fn fresh_rate(&self, now: UnixMs) -> Option<BitsPerSec> {
        self.last.filter(|(then, _)| *then == now).and(self.rate)
    }
}

fn per_second(bytes: u64, elapsed_ms: u64) -> BitsPerSec {
    let bits = u128::from(bytes) * 8 * 1000 / u128::from(elapsed_ms.max(1));
    BitsPerSec(u64::try_from(bits).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_needs_two_samples_and_goes_stale() {
        let mut counter = Counter::default();
        assert_eq!(counter.rate(UnixMs(0)), None);
        counter.sample(UnixMs(1000), 0);
        assert_eq!(counter.rate(UnixMs(1000)), None);
        counter.sample(UnixMs(2000), 125_000);
        assert_eq!(counter.rate(UnixMs(2500)), Some(BitsPerSec::from_mbit(1)));
        assert_eq!(counter.rate(UnixMs(6001)), None);
    }

    #[test]
    fn a_counter_that_starts_again_and_a_long_gap_are_unknown() {
        let mut counter = Counter::default();
        counter.sample(UnixMs(1000), 500);
        counter.sample(UnixMs(2000), 20);
        assert_eq!(counter.rate(UnixMs(2000)), None);
        counter.sample(UnixMs(3000), 145);
        assert_eq!(counter.rate(UnixMs(3000)), Some(BitsPerSec(1000)));
        counter.sample(UnixMs(30_000), 1_000_000);
        assert_eq!(counter.rate(UnixMs(30_000)), None);
    }

    #[test]
    fn samples_too_close_together_and_a_clock_set_back_give_no_wild_rate() {
        let mut counter = Counter::default();
        counter.sample(UnixMs(1000), 0);
        counter.sample(UnixMs(1001), 1_000_000);
        assert_eq!(counter.rate(UnixMs(1001)), None);
        counter.sample(UnixMs(500), 2_000_000);
        assert_eq!(counter.rate(UnixMs(500)), None);
    }
}
