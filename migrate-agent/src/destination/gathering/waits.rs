//! How long a guest waits for a page that is in a store, or at the source: from its request, read off QEMU,
//! to the page, written to QEMU. Kept by the gather's driver, told in a migration's progress.
//!
//! Times are counted in steps of a sixteenth of an octave (4.4 %), so that a guest's many thousands of
//! waits take one small table. A percentile is the upper edge of its step. Pure: who calls has a clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lifeboat_scatter_gather::page::PageAt;

/// Steps of an octave.
const STEPS: f64 = 16.0;
/// Up to 2^36 us, which is 19 hours.
const STEPS_MOST: usize = 36 * 16;

/// What was seen so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::destination) struct Waited {
    /// Pages that were there when the guest asked for them, and have come.
    pub(in crate::destination) served: u64,
    /// What half of them waited at most.
    pub(in crate::destination) p50_us: u64,
    /// What 99 % of them waited at most.
    pub(in crate::destination) p99_us: u64,
    /// The most batches of the background that ended while a page was waited for, the one that was under
    /// way when it was asked for among them.
    pub(in crate::destination) overtaken: u64,
}

/// A page that the guest waits for.
struct Waiting {
    since: Instant,
    /// Batches that had ended by then.
    ended: u64,
}

/// The waits of one guest.
pub(super) struct Waits {
    waiting: BTreeMap<PageAt, Waiting>,
    counts: Vec<u64>,
    /// Batches of the background that have ended.
    ended: u64,
    waited: Waited,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            waiting: BTreeMap::new(),
            counts: vec![0; STEPS_MOST],
            ended: 0,
            waited: Waited::default(),
        }
    }
}

impl Waits {
    /// The guest waits for this page. It may say so more than once.
    pub(super) fn asked(&mut self, at: PageAt, now: Instant) {
        let ended = self.ended;
        self.waiting.entry(at).or_insert(Waiting { since: now, ended });
    }

    /// A batch of the background has ended, whether it came or not.
    pub(super) fn batch_ends(&mut self) {
        self.ended += 1;
    }

    /// Whether the guest waits for any page.
    pub(super) fn any(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// This page has been written to QEMU.
    pub(super) fn written(&mut self, at: PageAt, now: Instant) {
        let Some(Waiting { since, ended }) = self.waiting.remove(&at) else { return };
        self.counts[step(now.saturating_duration_since(since))] += 1;
        self.waited.served += 1;
        self.waited.overtaken = self.waited.overtaken.max(self.ended.saturating_sub(ended));
    }

    /// What was seen so far.
    pub(super) fn waited(&mut self) -> Waited {
        self.waited.p50_us = self.at_most(50);
        self.waited.p99_us = self.at_most(99);
        self.waited
    }

    /// How many have come.
    pub(super) fn served(&self) -> u64 {
        self.waited.served
    }

    /// What `percent` of them waited at most, in microseconds; 0 without any.
    fn at_most(&self, percent: u64) -> u64 {
        let wanted = (self.waited.served * percent).div_ceil(100);
        let mut counted = 0;
        for (step, count) in self.counts.iter().enumerate() {
            counted += count;
            if counted >= wanted && counted > 0 {
                return upper_us(step);
            }
        }
        0
    }
}

fn step(wait: Duration) -> usize {
    let step = (wait.as_secs_f64() * 1e6 + 1.0).log2() * STEPS;
    (step as usize).min(STEPS_MOST - 1)
}

/// The upper edge of a step.
fn upper_us(step: usize) -> u64 {
    ((((step + 1) as f64 / STEPS).exp2() - 1.0).ceil()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(page: u32) -> PageAt {
        PageAt { block: 0, page }
    }

    #[test]
    fn percentiles_are_within_a_step_of_what_was_waited() {
        let (mut waits, zero) = (Waits::default(), crate::clock::now());
        assert_eq!(waits.waited(), Waited::default());
        for number in 1..=200_u32 {
            waits.asked(at(number), zero);
            waits.asked(at(number), zero + Duration::from_secs(9));
            waits.written(at(number), zero + Duration::from_micros(u64::from(number) * 10));
            // Written by the background, too: the guest waits no more.
            waits.written(at(number), zero + Duration::from_secs(9));
        }
        let waited = waits.waited();
        assert_eq!(waited.served, 200);
        assert!((1000..1060).contains(&waited.p50_us), "{waited:?}");
        assert!((1980..2090).contains(&waited.p99_us), "{waited:?}");
        let endless = Duration::from_secs(1 << 40);
        assert_eq!((step(Duration::ZERO), step(endless)), (0, STEPS_MOST - 1));
    }

    #[test]
    fn every_batch_that_ends_while_a_page_is_waited_for_stands_before_it() {
        let (mut waits, now) = (Waits::default(), crate::clock::now());
        waits.batch_ends();
        waits.asked(at(1), now);
        waits.written(at(1), now);
        assert_eq!(waits.waited().overtaken, 0);
        // One that was under way when the page was asked for.
        waits.asked(at(2), now);
        waits.batch_ends();
        waits.written(at(2), now);
        assert_eq!(waits.waited().overtaken, 1);
        // That one, and one that began afterwards.
        waits.asked(at(3), now);
        waits.batch_ends();
        waits.batch_ends();
        waits.written(at(3), now);
        assert_eq!(waits.waited().overtaken, 2);
    }
}
