//! The dirty map: one bit for each block that has changed since it was last read for sending.
//!
//! # When a bit is set
//!
//! After the write has landed and before it is answered. A pass clears the bit *before* it reads
//! the block. So either its read sees the write, or the bit is set after it was cleared, and the
//! block is sent again; an answered write is never forgotten. (Set before the write, a pass could
//! clear the bit and read the old content.)
//!
//! 2 KiB for each GiB of image at the default block of 64 KiB. MigrateFS (section 4) has 512 KiB, which
//! here are what is sent at once (`sync::passes`): a write of 4 KiB or 64 KiB would make eight times as
//! much dirty as it need, and what is dirty is sent again.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

/// What is sent again when a byte of it changes, bytes: as fine as QEMU's mirror.
pub const BLOCK: u64 = 64 << 10;

/// A size that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Not a power of two, or out of bounds.
    #[error("a block of {bytes} bytes: blocks are powers of two from 4 KiB to 1 MiB")]
    Block {
        /// What was asked for.
        bytes: u64,
    },
    /// As above, for segments.
    #[error("a segment of {bytes} bytes: segments are powers of two, at least 1 MiB")]
    Segment {
        /// What was asked for.
        bytes: u64,
    },
}

/// The bytes of a transfer block: a power of two, 4 KiB to 1 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSize(u64);

impl Default for BlockSize {
    fn default() -> Self {
        Self(BLOCK)
    }
}

impl BlockSize {
    /// Checks `bytes`.
    ///
    /// # Errors
    /// When it is out of bounds.
    pub fn new(bytes: u64) -> Result<Self, GeometryError> {
        let fits = bytes.is_power_of_two() && (4096..=1 << 20).contains(&bytes);
        if fits { Ok(Self(bytes)) } else { Err(GeometryError::Block { bytes }) }
    }

    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// How many blocks an image of `length` bytes has; the last one may be shorter.
    #[must_use]
    pub const fn count(self, length: u64) -> u64 {
        length.div_ceil(self.0)
    }

    /// The blocks that a range of bytes touches.
    #[must_use]
    pub const fn touched(self, range: &Range<u64>) -> Range<u64> {
        if range.start >= range.end {
            return 0..0;
        }
        range.start / self.0..range.end.div_ceil(self.0)
    }

    /// The bytes of block `index` in an image of `length` bytes; empty beyond its end.
    #[must_use]
    pub fn range(self, index: u64, length: u64) -> Range<u64> {
        let start = index.saturating_mul(self.0).min(length);
        start..start.saturating_add(self.0).min(length)
    }
}

/// The dirty blocks of one image.
#[derive(Debug, Default)]
pub struct DirtyMap {
    block: BlockSize,
    /// Grows with the image, hence the lock; marking only reads it.
    words: RwLock<Vec<AtomicU64>>,
    count: AtomicU64,
}

impl DirtyMap {
    /// Nothing is dirty in an image of `length` bytes.
    #[must_use]
    pub fn new(block: BlockSize, length: u64) -> Self {
        let map = Self { block, ..Self::default() };
        map.grow(length);
        map
    }

    /// The size of its blocks.
    #[must_use]
    pub fn block(&self) -> BlockSize {
        self.block
    }

    fn words_for(&self, length: u64) -> usize {
        usize::try_from(self.block.count(length).div_ceil(64)).unwrap_or(usize::MAX)
    }

    /// Whether each of the first `length` bytes of the image has a block that can be marked.
    #[must_use]
    pub fn reaches(&self, length: u64) -> bool {
        self.words.read().unwrap_or_else(PoisonError::into_inner).len() >= self.words_for(length)
    }

    /// The image is at least `length` bytes long now; a shorter one keeps its bits.
    pub fn grow(&self, length: u64) {
        // Changes that come side by side must not wait for each other here.
        if self.reaches(length) {
            return;
        }
        let words = self.words_for(length);
        let mut own = self.words.write().unwrap_or_else(PoisonError::into_inner);
        if own.len() < words {
            own.resize_with(words, AtomicU64::default);
        }
    }

    /// Marks the blocks that `range` touches; beyond the image, nothing.
    pub fn mark(&self, range: &Range<u64>) {
        let words = self.words.read().unwrap_or_else(PoisonError::into_inner);
        let blocks = self.block.touched(range);
        for block in blocks.start..blocks.end.min(words.len() as u64 * 64) {
            let bit = 1 << (block % 64);
            let word = &words[(block / 64) as usize];
            // Most writes hit a block that is dirty already: reading is cheaper than writing.
            if word.load(Ordering::Acquire) & bit == 0
                && word.fetch_or(bit, Ordering::AcqRel) & bit == 0
            {
                self.count.fetch_add(1, Ordering::AcqRel);
            }
        }
    }

    /// Clears the first dirty block at or after `from` and returns it. Read it after, never before.
    pub fn take(&self, from: u64) -> Option<u64> {
        let words = self.words.read().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(from / 64).ok()?;
        for (index, word) in words.iter().enumerate().skip(start) {
            let mask = if index == start { u64::MAX << (from % 64) } else { u64::MAX };
            loop {
                let found = word.load(Ordering::Acquire) & mask;
                if found == 0 {
                    break;
                }
                let bit = 1 << found.trailing_zeros();
                if word.fetch_and(!bit, Ordering::AcqRel) & bit != 0 {
                    self.count.fetch_sub(1, Ordering::AcqRel);
                    return Some(index as u64 * 64 + u64::from(found.trailing_zeros()));
                }
            }
        }
        None
    }

    /// Clears `block`; whether it was dirty.
    pub fn take_one(&self, block: u64) -> bool {
        let words = self.words.read().unwrap_or_else(PoisonError::into_inner);
        let word = usize::try_from(block / 64).ok().and_then(|index| words.get(index));
        let bit = 1 << (block % 64);
        let was = word.is_some_and(|word| word.fetch_and(!bit, Ordering::AcqRel) & bit != 0);
        if was {
            self.count.fetch_sub(1, Ordering::AcqRel);
        }
        was
    }

    /// Whether every block that `range` touches is dirty; of an empty range, it is not.
    #[must_use]
    pub fn is_dirty(&self, range: &Range<u64>) -> bool {
        let mut blocks = self.block.touched(range);
        !blocks.is_empty() && blocks.all(|block| self.holds(block))
    }

    /// Whether `block` is dirty.
    #[must_use]
    pub fn holds(&self, block: u64) -> bool {
        let words = self.words.read().unwrap_or_else(PoisonError::into_inner);
        let word = usize::try_from(block / 64).ok().and_then(|index| words.get(index));
        word.is_some_and(|word| word.load(Ordering::Acquire) & 1 << (block % 64) != 0)
    }

    /// How many of these blocks are dirty.
    #[must_use]
    pub fn count_within(&self, blocks: Range<u64>) -> u64 {
        blocks.filter(|block| self.holds(*block)).count() as u64
    }

    /// How many are dirty.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// The bytes that this map takes.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.words.read().unwrap_or_else(PoisonError::into_inner).len() * 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_write_across_a_border_dirties_both_blocks() {
        let map = DirtyMap::new(BlockSize::default(), 10 * BLOCK);
        map.mark(&(BLOCK - 1..BLOCK + 1));
        map.mark(&(5..5));
        assert_eq!(map.count(), 2);
        assert_eq!((map.take(0), map.take(0), map.take(0)), (Some(0), Some(1), None));
    }

    #[test]
    fn a_block_that_is_written_after_it_was_taken_is_dirty_again() {
        let map = DirtyMap::new(BlockSize::default(), 10 * BLOCK);
        map.mark(&(0..1));
        assert_eq!(map.take(0), Some(0));
        map.mark(&(0..1));
        assert!(map.take_one(0) && !map.take_one(0) && !map.take_one(1 << 40));
    }

    #[test]
    fn beyond_the_end_nothing_is_marked_until_the_image_grows() {
        let map = DirtyMap::new(BlockSize::default(), 64 * BLOCK);
        map.mark(&(64 * BLOCK..u64::MAX));
        assert_eq!(map.count(), 0);
        assert!(map.reaches(64 * BLOCK) && !map.reaches(64 * BLOCK + 1));
        assert!(!map.reaches(u64::MAX));
        map.grow(65 * BLOCK);
        map.mark(&(64 * BLOCK..64 * BLOCK + 1));
        assert_eq!(map.take(10), Some(64));
    }

    #[test]
    fn an_image_of_a_gibibyte_takes_256_bytes() {
        assert_eq!(DirtyMap::new(BlockSize::default(), 1 << 30).memory(), 2048);
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused() {
        assert!(BlockSize::new(0).is_err() && BlockSize::new(4097).is_err());
        assert!(BlockSize::new(2 << 20).is_err() && BlockSize::new(4096).is_ok());
        assert_eq!(BlockSize::default().range(1, BLOCK + 5), BLOCK..BLOCK + 5);
        assert_eq!(BlockSize::default().range(9, BLOCK), BLOCK..BLOCK);
    }

    proptest! {
        #[test]
        fn it_is_a_set_of_blocks(steps in prop::collection::vec((0_u64..4000, 0_u64..300, any::<bool>()), 0..200)) {
            let map = DirtyMap::new(BlockSize::new(4096).unwrap(), 4000 * 4096);
            let mut model = BTreeSet::new();
            for (block, more, marks) in steps {
                if marks {
                    map.mark(&(block * 4096..(block + more) * 4096));
                    model.extend((block..block + more).filter(|b| *b < 4032));
                } else {
                    let expected = model.range(block..).next().copied();
                    prop_assert_eq!(map.take(block), expected);
                    expected.map(|b| model.remove(&b));
                }
                prop_assert_eq!(map.count(), model.len() as u64);
            }
        }
    }
}
