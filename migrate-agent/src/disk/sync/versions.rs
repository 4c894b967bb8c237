//! An older update never overwrites a newer one, however late it arrives.
//!
//! `image` (the destination) asks before it applies an update. Updates travel over several streams and
//! overtake each other: the copy of a block that was read before a write may come after that write. So
//! each update carries a version, given at the source in the order in which the content came to be
//! there, and the newest version of each range is remembered.
//!
//! # How long
//!
//! Only while something older can still be on its way. The source says with each update below which
//! version everything is acknowledged; such ranges are forgotten. What is kept is thus bounded by
//! what is in flight, not by the image: a few hundred bytes instead of 16 KiB for each GiB.
//!
//! Ranges, not blocks: a guest's 4 KiB write is newer than the block around it, which must still be
//! applied on both sides of it.

use std::collections::BTreeMap;
use std::ops::Range;

/// The number of an update; greater is newer. The source's first is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Version(pub u64);

/// The newest updates of one image.
#[derive(Debug, Clone, Default)]
pub struct Versions {
    /// Start -> end and version. Never overlapping, never empty.
    newest: BTreeMap<u64, (u64, Version)>,
    settled: Version,
}

impl Versions {
    /// Notes an update of `range` and returns the parts of it that may be applied, in order: those
    /// that nothing newer has changed. An update at or below what is settled is a repetition.
    pub fn admit(&mut self, range: Range<u64>, version: Version) -> Vec<Range<u64>> {
        let parts = self.open(&range, version);
        for part in &parts {
            self.cut(part);
            self.newest.insert(part.start, (part.end, version));
        }
        parts
    }

    /// The same parts, and nothing is noted.
    #[must_use]
    pub fn open(&self, range: &Range<u64>, version: Version) -> Vec<Range<u64>> {
        if self.is_repetition(version) || range.is_empty() {
            return Vec::new();
        }
        let mut parts = vec![];
        let mut from = range.start;
        for (start, (end, _)) in self.newer_within(range, version) {
            if from < start {
                parts.push(from..start.min(range.end));
            }
            from = from.max(end);
        }
        if from < range.end {
            parts.push(from..range.end);
        }
        parts
    }

    /// What within `range` has at least `version`, in order.
    fn newer_within(&self, range: &Range<u64>, version: Version) -> Vec<(u64, (u64, Version))> {
        let before = self.newest.range(..range.start).next_back();
        let inside = self.newest.range(range.start..range.end);
        before
            .into_iter()
            .chain(inside)
            .filter(|(_, (end, newest))| *end > range.start && *newest >= version)
            .map(|(start, rest)| (*start, *rest))
            .collect()
    }

    /// Takes `range` out of what is noted; what lies around it stays.
    fn cut(&mut self, range: &Range<u64>) {
        let before = self.newest.range(..range.start).next_back();
        let from = before.filter(|(_, (end, _))| *end > range.start).map_or(range.start, |b| *b.0);
        let hit: Vec<u64> = self.newest.range(from..range.end).map(|(start, _)| *start).collect();
        for start in hit {
            let Some((end, version)) = self.newest.remove(&start) else { continue };
            if start < range.start {
                self.newest.insert(start, (range.start, version));
            }
            if end > range.end {
                self.newest.insert(range.end, (end, version));
            }
        }
    }

    /// Every update up to `version` has arrived: nothing older will come.
    pub fn settle(&mut self, version: Version) {
        if version > self.settled {
            self.settled = version;
            self.newest.retain(|_, (_, newest)| *newest > version);
        }
    }

    /// Whether an update of this version has been applied, whatever its range.
    #[must_use]
    pub fn is_repetition(&self, version: Version) -> bool {
        version <= self.settled
    }

    /// Ranges that are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.newest.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.newest.is_empty()
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a list of ranges that has one")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_block_that_was_read_before_a_write_is_applied_around_it() {
        let mut versions = Versions::default();
        assert_eq!(versions.admit(100..104, Version(9)), [100..104]);
        assert_eq!(versions.admit(0..512, Version(8)), [0..100, 104..512]);
        assert_eq!(versions.admit(0..512, Version(8)), [] as [Range<u64>; 0]);
        assert_eq!(versions.admit(50..200, Version(10)), [50..200]);
    }

    #[test]
    fn what_is_settled_is_forgotten_and_not_applied_again() {
        let mut versions = Versions::default();
        versions.admit(0..10, Version(1));
        versions.admit(20..30, Version(2));
        versions.settle(Version(1));
        assert_eq!(versions.len(), 1);
        assert!(versions.admit(0..10, Version(1)).is_empty());
        versions.settle(Version(2));
        assert!(versions.is_empty());
    }

    proptest! {
        /// Any updates in any order of arrival, repeated as it pleases: each byte ends up as the
        /// newest update left it.
        #[test]
        fn each_byte_is_the_newest_ones_in_any_order_of_arrival(
            updates in prop::collection::vec((0_u64..60, 1_u64..30), 1..30),
            arrival in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
        ) {
            let mut expected = [0; 100];
            for (number, (start, length)) in updates.iter().enumerate() {
                expected[*start as usize..(start + length) as usize].fill(number + 1);
            }
            let mut order: Vec<usize> = arrival.iter().map(|i| i.index(updates.len())).collect();
            order.extend(0..updates.len());
            let mut versions = Versions::default();
            let mut found = [0; 100];
            let mut arrived = vec![false; updates.len()];
            for number in order {
                let (start, length) = updates[number];
                let version = Version(number as u64 + 1);
                for part in versions.admit(start..start + length, version) {
                    found[part.start as usize..part.end as usize].fill(number + 1);
                }
                arrived[number] = true;
                let settled = arrived.iter().take_while(|a| **a).count();
                versions.settle(Version(settled as u64));
            }
            prop_assert_eq!(found, expected);
            prop_assert!(versions.is_empty());
        }
    }
}
