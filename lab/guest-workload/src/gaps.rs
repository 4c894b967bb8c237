//! Gap accounting: when did a guest not answer, and for how long.
//!
//! The client keeps one `Gaps` per guest. A gap is the time between two answers that follow each
//! other; every gap over the threshold is kept with its start, so that each can be held against
//! what happened then (a switchover, a failed agent). The time before the first answer is the
//! guest's boot and no gap. Pure: `now` is passed in.

use std::time::Duration;

/// Gaps that are kept one by one; further ones are only counted, so that a guest that
/// stutters for hours cannot fill the client's memory.
const KEPT: usize = 10_000;

/// One stretch without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gap {
    /// The last answer before it, on the client's monotonic clock.
    pub(crate) start: Duration,
    /// From that answer to the next one (or to the end of the watch).
    pub(crate) length: Duration,
}

/// The gaps of one guest.
#[derive(Debug)]
pub(crate) struct Gaps {
    threshold: Duration,
    last: Option<Duration>,
    longest: Duration,
    kept: Vec<Gap>,
    count: u64,
}

impl Gaps {
    /// Keeps gaps longer than `threshold`.
    pub(crate) fn new(threshold: Duration) -> Self {
        Self { threshold, last: None, longest: Duration::ZERO, kept: Vec::new(), count: 0 }
    }

    /// An answer came.
    pub(crate) fn answered(&mut self, now: Duration) {
        if let Some(start) = self.last {
            self.close(start, now);
        }
        self.last = Some(now);
    }

    /// The watch ends: a guest that is silent now has an open gap, which counts.
    pub(crate) fn finish(&mut self, now: Duration) {
        if let Some(start) = self.last.take() {
            self.close(start, now);
        }
    }

    fn close(&mut self, start: Duration, end: Duration) {
        let length = end.saturating_sub(start);
        self.longest = self.longest.max(length);
        if length > self.threshold {
            self.count += 1;
            if self.kept.len() < KEPT {
                self.kept.push(Gap { start, length });
            }
        }
    }

    /// How long the guest has been silent, or `None` before its first answer.
    pub(crate) fn silent_for(&self, now: Duration) -> Option<Duration> {
        self.last.map(|last| now.saturating_sub(last))
    }

    /// The longest time between two answers, whether over the threshold or not.
    pub(crate) fn longest(&self) -> Duration {
        self.longest
    }

    /// The gaps over the threshold, in order.
    pub(crate) fn kept(&self) -> &[Gap] {
        &self.kept
    }

    /// How many gaps were over the threshold, kept or not.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn watch(answers: &[u64]) -> Gaps {
        let mut gaps = Gaps::new(ms(50));
        answers.iter().for_each(|at| gaps.answered(ms(*at)));
        gaps
    }

    #[test]
    fn the_time_before_the_first_answer_is_no_gap() {
        let mut gaps = watch(&[5000, 5010]);
        gaps.finish(ms(5020));
        assert_eq!((gaps.count(), gaps.longest()), (0, ms(10)));
    }

    #[test]
    fn a_gap_is_kept_with_its_start_and_length() {
        let gaps = watch(&[0, 10, 210, 220]);
        assert_eq!(gaps.kept(), [Gap { start: ms(10), length: ms(200) }]);
    }

    #[test]
    fn exactly_the_threshold_is_no_gap() {
        assert_eq!(watch(&[0, 50, 101]).kept(), [Gap { start: ms(50), length: ms(51) }]);
    }

    #[test]
    fn a_guest_that_never_comes_back_has_an_open_gap() {
        let mut gaps = watch(&[0, 10]);
        assert_eq!(gaps.silent_for(ms(500)), Some(ms(490)));
        gaps.finish(ms(1010));
        assert_eq!(gaps.kept(), [Gap { start: ms(10), length: ms(1000) }]);
        gaps.finish(ms(9000));
        assert_eq!(gaps.count(), 1, "finishing twice counts once");
    }

    #[test]
    fn a_guest_that_never_answered_has_no_gaps_and_no_silence() {
        let mut gaps = watch(&[]);
        gaps.finish(ms(1000));
        assert_eq!((gaps.count(), gaps.silent_for(ms(1000))), (0, None));
    }

    #[test]
    fn memory_stays_bounded_and_the_count_goes_on() {
        let mut gaps = Gaps::new(ms(50));
        (0..KEPT as u64 + 10).for_each(|n| gaps.answered(ms(n * 100)));
        assert_eq!((gaps.kept().len(), gaps.count()), (KEPT, KEPT as u64 + 9));
    }
}
