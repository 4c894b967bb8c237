//! How busy each segment of an image is: LiveFS' monitoring table (section III, phase 1).
//!
//! The request threads count, `sync::rank` reads. Two counters of four bytes per segment of 64 MiB:
//! 128 bytes for a GiB. A request that touches several segments counts in each.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{PoisonError, RwLock};

use super::dirty::GeometryError;

/// LiveFS' segment, bytes: "segments of 64MB size present good performance".
pub const SEGMENT: u64 = 64 << 20;

/// The bytes of a segment: a power of two, at least 1 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentSize(u64);

impl Default for SegmentSize {
    fn default() -> Self {
        Self(SEGMENT)
    }
}

impl SegmentSize {
    /// Checks `bytes`.
    ///
    /// # Errors
    /// When it is no power of two or too small.
    pub fn new(bytes: u64) -> Result<Self, GeometryError> {
        let fits = bytes.is_power_of_two() && bytes >= 1 << 20;
        if fits { Ok(Self(bytes)) } else { Err(GeometryError::Segment { bytes }) }
    }

    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

/// What a segment has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Reads that touched it.
    pub reads: u32,
    /// Changes that touched it.
    pub writes: u32,
}

/// The counters of one image.
#[derive(Debug, Default)]
pub struct Activity {
    segment: SegmentSize,
    counters: RwLock<Vec<[AtomicU32; 2]>>,
}

impl Activity {
    /// Nothing seen yet of an image of `length` bytes.
    #[must_use]
    pub fn new(segment: SegmentSize, length: u64) -> Self {
        let activity = Self { segment, ..Self::default() };
        activity.grow(length);
        activity
    }

    /// Whether each of the first `length` bytes of the image is in a segment that is counted.
    #[must_use]
    pub fn reaches(&self, length: u64) -> bool {
        self.segments() >= length.div_ceil(self.segment.0)
    }

    /// The image is at least `length` bytes long now.
    pub fn grow(&self, length: u64) {
        if self.reaches(length) {
            return;
        }
        let segments = usize::try_from(length.div_ceil(self.segment.0)).unwrap_or(usize::MAX);
        let mut counters = self.counters.write().unwrap_or_else(PoisonError::into_inner);
        if counters.len() < segments {
            counters.resize_with(segments, Default::default);
        }
    }

    /// Counts a read of `range`.
    pub fn read(&self, range: &Range<u64>) {
        self.count(range, 0);
    }

    /// Counts a change of `range`.
    pub fn write(&self, range: &Range<u64>) {
        self.count(range, 1);
    }

    fn count(&self, range: &Range<u64>, which: usize) {
        if range.is_empty() {
            return;
        }
        let counters = self.counters.read().unwrap_or_else(PoisonError::into_inner);
        let segment = |at: u64| usize::try_from(at / self.segment.0).unwrap_or(usize::MAX);
        let end = segment(range.end - 1).saturating_add(1).min(counters.len());
        for counter in counters.get(segment(range.start)..end).unwrap_or_default() {
            // At its largest value it stays: a rank that wrapped round would call the hottest cold.
            let _ = counter[which]
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_add(1));
        }
    }

    /// How many segments the image has.
    #[must_use]
    pub fn segments(&self) -> u64 {
        self.counters.read().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    /// The memory that the counters take, bytes.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.segments() as usize * size_of::<[AtomicU32; 2]>()
    }

    /// What each segment has seen so far, by position.
    #[must_use]
    pub fn traffic(&self) -> Vec<Traffic> {
        let counters = self.counters.read().unwrap_or_else(PoisonError::into_inner);
        let load = |counter: &AtomicU32| counter.load(Ordering::Relaxed);
        let seen =
            |[reads, writes]: &[AtomicU32; 2]| Traffic { reads: load(reads), writes: load(writes) };
        counters.iter().map(seen).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_in_each_segment_that_it_touches() {
        let activity = Activity::new(SegmentSize::default(), 3 * SEGMENT);
        activity.write(&(SEGMENT - 1..SEGMENT + 1));
        activity.read(&(0..1));
        activity.read(&(7..7));
        activity.write(&(2 * SEGMENT..u64::MAX));
        let seen: Vec<_> = activity.traffic().iter().map(|t| (t.reads, t.writes)).collect();
        assert_eq!(seen, [(1, 1), (0, 1), (0, 1)]);
    }

    #[test]
    fn beyond_the_end_nothing_counts_until_the_image_grows() {
        let activity = Activity::new(SegmentSize::default(), SEGMENT);
        activity.read(&(5 * SEGMENT..6 * SEGMENT));
        assert!(activity.reaches(SEGMENT) && !activity.reaches(SEGMENT + 1));
        activity.grow(6 * SEGMENT);
        activity.read(&(5 * SEGMENT..6 * SEGMENT));
        assert_eq!(activity.traffic().len(), 6);
        assert_eq!(activity.traffic()[5].reads, 1);
    }
}
