//! LiveFS' rank of an image's segments, and the order in which blocks are sent (section III, phase 1).
//!
//! `send` asks at the end of the monitoring. The rank is the paper's equation (1):
//! `f = (w1 * reads + w2 * writes) / 2`, `w1 + w2 = 1`.
//!
//! # Which end first
//!
//! Where the VM moves before its disk is complete, hot segments go first: what is there needs no
//! fetching. Where the whole image goes first (pre-copy), the segments that are *written* most go last,
//! which is settled while they go (`heat`). Of what follows the VM those go last, too, that are written more
//! than read: a write to what is missing waits for nothing, and what it overwrites need not be sent.
//! Deliberately not here: who counts (`track::Activity`).

use crate::disk::track::Traffic;

/// How much a read counts beside a write; both together are one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weights {
    reads: f64,
}

impl Default for Weights {
    /// The paper's: half and half.
    fn default() -> Self {
        Self { reads: 0.5 }
    }
}

impl Weights {
    /// `reads` from 0 to 1 is w1; w2 is what is left. Values outside are moved to the nearest end.
    #[must_use]
    pub fn of_reads(reads: f64) -> Self {
        Self { reads: if reads.is_finite() { reads.clamp(0.0, 1.0) } else { 0.5 } }
    }

    /// w1.
    #[must_use]
    pub const fn reads(self) -> f64 {
        self.reads
    }

    /// The paper's equation (1).
    #[must_use]
    pub fn rank(self, traffic: Traffic) -> f64 {
        let (reads, writes) = (f64::from(traffic.reads), f64::from(traffic.writes));
        (self.reads * reads + (1.0 - self.reads) * writes) / 2.0
    }
}

/// When the VM moves, which decides what is sent first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Strategy {
    /// Everything is at the destination before the VM moves; which segment is next is [`Heat`]'s to say.
    ///
    /// [`Heat`]: super::heat::Heat
    Whole,
    /// What ranks at `threshold` or above is; the rest follows, on demand and by and by. Zero sends
    /// everything (pre-copy), infinity nothing (post-copy).
    Hot {
        /// The paper's migration threshold.
        threshold: f64,
    },
}

impl Strategy {
    /// Hot is what was touched, and ranks at least `times` as high as a segment of all `traffic` on average; with
    /// 0, everything.
    #[must_use]
    pub fn above_average(traffic: &[Traffic], weights: Weights, times: f64) -> Self {
        if times <= 0.0 {
            return Self::Hot { threshold: 0.0 };
        }
        let ranks = traffic.iter().map(|segment| weights.rank(*segment));
        let average = ranks.sum::<f64>() / traffic.len().max(1) as f64;
        // What nobody touched is never hot, also where nothing was touched at all.
        Self::Hot { threshold: (average * times).max(f64::MIN_POSITIVE) }
    }
}

/// The segments in the order in which they are sent, and how many of them go before the hand-over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentOrder {
    /// All segments' numbers.
    pub segments: Vec<u64>,
    /// The first so many go before.
    pub before: usize,
}

/// Orders all segments. Those that are equal keep their order on disk: that reads fastest.
#[must_use]
pub fn order(traffic: &[Traffic], weights: Weights, strategy: Strategy) -> SegmentOrder {
    let mut segments: Vec<u64> = (0..traffic.len() as u64).collect();
    let of = |segment: &u64| traffic[*segment as usize];
    match strategy {
        Strategy::Whole => SegmentOrder { before: segments.len(), segments },
        Strategy::Hot { threshold } => {
            let rank = |segment: &u64| weights.rank(of(segment));
            segments.sort_by(|a, b| rank(b).total_cmp(&rank(a)));
            let before = segments.iter().take_while(|s| rank(s) >= threshold).count();
            // By how far writes outnumber reads; where they do not, as before.
            segments[before..].sort_by_key(|segment| {
                let Traffic { reads, writes } = of(segment);
                writes.saturating_sub(reads)
            });
            SegmentOrder { segments, before }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRAFFIC: [Traffic; 4] = [
        Traffic { reads: 0, writes: 0 },
        Traffic { reads: 100, writes: 0 },
        Traffic { reads: 10, writes: 50 },
        Traffic { reads: 0, writes: 0 },
    ];

    #[test]
    fn the_rank_is_the_papers() {
        assert_eq!(Weights::default().rank(TRAFFIC[2]), 15.0);
        assert_eq!(Weights::of_reads(1.0).rank(TRAFFIC[2]), 5.0);
        assert_eq!(Weights::of_reads(7.0), Weights::of_reads(1.0));
        assert_eq!(Weights::of_reads(f64::NAN), Weights::default());
    }

    #[test]
    fn hot_segments_go_first_when_the_vm_moves_early() {
        let hot = order(&TRAFFIC, Weights::default(), Strategy::Hot { threshold: 15.0 });
        assert_eq!(hot, SegmentOrder { segments: vec![1, 2, 0, 3], before: 2 });
    }

    #[test]
    fn of_what_follows_that_goes_last_which_is_written_more_than_read() {
        let traffic = [
            Traffic { reads: 0, writes: 7 },
            Traffic { reads: 1, writes: 0 },
            Traffic { reads: 3, writes: 5 },
            Traffic { reads: 4, writes: 4 },
            Traffic { reads: 90, writes: 0 },
            Traffic { reads: 0, writes: 0 },
        ];
        let order = order(&traffic, Weights::default(), Strategy::Hot { threshold: 20.0 });
        assert_eq!(order, SegmentOrder { segments: vec![4, 3, 1, 5, 2, 0], before: 1 });
    }

    #[test]
    fn what_is_touched_more_than_the_average_is_hot_and_what_nobody_touched_never_is() {
        let times = |traffic: &[Traffic], times| {
            let weights = Weights::default();
            order(traffic, weights, Strategy::above_average(traffic, weights, times)).before
        };
        let before = |traffic: &[Traffic]| times(traffic, 1.0);
        assert_eq!(before(&TRAFFIC), 2);
        assert_eq!(before(&[TRAFFIC[1], TRAFFIC[0], TRAFFIC[0]]), 1);
        assert_eq!((before(&[TRAFFIC[0]; 3]), before(&[TRAFFIC[1]; 3]), before(&[])), (0, 3, 0));
        assert_eq!([0.0, 0.5, 2.0, 1e9].map(|many| times(&TRAFFIC, many)), [4, 2, 1, 0]);
        assert_eq!((times(&[TRAFFIC[0]; 3], 0.0), times(&[TRAFFIC[0]; 3], 1e9)), (3, 0));
    }

    #[test]
    fn everything_goes_first_in_an_order_that_is_not_settled_here() {
        let whole = order(&TRAFFIC, Weights::default(), Strategy::Whole);
        assert_eq!(whole, SegmentOrder { segments: vec![0, 1, 2, 3], before: 4 });
    }

    #[test]
    fn threshold_gives_pre_copy_and_post_copy_as_special_cases() {
        let before =
            |threshold| order(&TRAFFIC, Weights::default(), Strategy::Hot { threshold }).before;
        assert_eq!((before(0.0), before(f64::INFINITY)), (4, 0));
    }
}
