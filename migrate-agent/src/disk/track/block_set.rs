//! A set of block numbers, one bit each: 2 KiB for a GiB in blocks of 64 KiB.
//!
//! `sync::incoming` keeps what is missing in it. For one owner; the map that several threads mark is
//! [`super::DirtyMap`].

use std::ops::Range;

/// A set of block numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockSet {
    words: Vec<u64>,
    count: u64,
}

impl BlockSet {
    /// Adds `block`. Its memory grows with the largest number: check that first.
    pub fn insert(&mut self, block: u64) {
        let word = usize::try_from(block / 64).unwrap_or(usize::MAX);
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        if !self.contains(block) {
            self.words[word] |= 1 << (block % 64);
            self.count += 1;
        }
    }

    /// Takes `block` out; whether it was in.
    pub fn remove(&mut self, block: u64) -> bool {
        let was = self.contains(block);
        if was {
            self.words[(block / 64) as usize] &= !(1 << (block % 64));
            self.count -= 1;
        }
        was
    }

    /// Whether `block` is in.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok().and_then(|index| self.words.get(index));
        word.is_some_and(|word| word & 1 << (block % 64) != 0)
    }

    /// Those of `range` that are in, in order.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let end = range.end.min(self.words.len() as u64 * 64);
        (range.start..end).filter(|block| self.contains(*block))
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Takes out everything from `end` on.
    pub fn truncate(&mut self, end: u64) {
        let beyond: Vec<u64> = self.within(end..u64::MAX).collect();
        beyond.into_iter().for_each(|block| {
            self.remove(block);
        });
    }

    /// Takes out everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// The bits, 64 blocks to a word, the first block the lowest bit.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// From [`Self::words`].
    #[must_use]
    pub fn from_words(words: Vec<u64>) -> Self {
        let count = words.iter().map(|word| u64::from(word.count_ones())).sum();
        Self { words, count }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_what_was_put_in_and_not_taken_out() {
        let mut set = BlockSet::default();
        [0, 63, 64, 1000, 64].into_iter().for_each(|block| set.insert(block));
        assert_eq!(set.count(), 4);
        assert_eq!(set.within(1..u64::MAX).collect::<Vec<_>>(), [63, 64, 1000]);
        assert!(set.remove(64) && !set.remove(64) && !set.remove(u64::MAX));
        set.truncate(63);
        assert_eq!(set.within(0..u64::MAX).collect::<Vec<_>>(), [0]);
        assert_eq!(BlockSet::from_words(set.words().to_vec()), set);
        set.clear();
        assert_eq!(set.count(), 0);
    }
}
