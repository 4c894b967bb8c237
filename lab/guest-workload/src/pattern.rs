//! The region of seeded pages by which a guest proves that its memory is unharmed.
//!
//! Used by the guest's loop. Pure: no clock, no I/O. Every page's content is a function of
//! (seed, page, version), and the version of every page follows from **one number**, the count
//! of writes made so far:
//!
//! ```text
//! positions 0 .. pages-1, walked round and round; page = position * stride mod pages
//! write n goes to position n mod pages and gives that page version n / pages + 1
//!
//!              writes % pages
//!                    v
//! position   0 1 2 3 4 5 6 7
//! version    3 3 3 3 2 2 2 2        (writes = 20, pages = 8)
//! ```
//!
//! So no table of versions lives in the memory under test: a page that a migration lost, took
//! from an earlier iteration or mixed up with another one is seen as soon as the check reaches
//! it. Only the loss of the count itself could hide it, and the client watches that count for
//! going backwards. A wrong page is reported once and then rewritten.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Bytes of a page: QEMU's target page on x86.
pub(crate) const PAGE_BYTES: usize = 4096;
const WORDS: usize = PAGE_BYTES / 8;

/// A page that does not hold what was written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "page {page} word {word}: found {found:#018x}, expected {expected:#018x} (version {version})"
)]
pub(crate) struct WrongPage {
    /// Index of the page in the region.
    pub(crate) page: u64,
    /// Index of the first wrong 8-byte word in the page.
    pub(crate) word: usize,
    /// What is there.
    pub(crate) found: u64,
    /// What was written.
    pub(crate) expected: u64,
    /// The version that was expected.
    pub(crate) version: u64,
}

/// The walk over pages: which is written or checked next, and what it holds then. The pages
/// themselves are elsewhere: in memory ([`Region`]), or on a disk ([`crate::disk`]).
#[derive(Debug)]
pub(crate) struct Walk {
    pages: u64,
    stride: u64,
    seed: u64,
    writes: u64,
    check_at: u64,
}

impl Walk {
    /// Over `bytes` rounded down to whole pages (at least one), of which none is written yet.
    pub(crate) fn new(bytes: u64, seed: u64) -> Self {
        Self::over(bytes / PAGE_BYTES as u64, seed)
    }

    /// Over `pages` (at least one) of any size: [`Self::fill`] fills what it is given.
    pub(crate) fn over(pages: u64, seed: u64) -> Self {
        let pages = pages.max(1);
        Self { pages, stride: coprime_stride(pages), seed, writes: 0, check_at: 0 }
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// How many pages were written since the start.
    pub(crate) fn writes(&self) -> u64 {
        self.writes
    }

    /// The page that is written next, and its new version.
    pub(crate) fn write_next(&mut self) -> (u64, u64) {
        let (position, version) = (self.writes % self.pages, self.writes / self.pages + 1);
        self.writes += 1;
        (self.page_at(position), version)
    }

    /// The page that is checked next, and the version that it has.
    pub(crate) fn check_next(&mut self) -> (u64, u64) {
        let position = self.check_at;
        self.check_at = (position + 1) % self.pages;
        (self.page_at(position), self.version_at(position))
    }

    /// Fills `bytes` with what `page` holds at `version`.
    pub(crate) fn fill(&self, page: u64, version: u64, bytes: &mut [u8]) {
        let base = page_base(self.seed, page, version);
        for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&page_word(base, i).to_le_bytes());
        }
    }

    /// The first 8-byte word of `bytes` that is not what `page` holds at `version`.
    pub(crate) fn first_wrong(&self, page: u64, version: u64, bytes: &[u8]) -> Option<usize> {
        let base = page_base(self.seed, page, version);
        let right = |(i, word): (usize, &[u8])| word == page_word(base, i).to_le_bytes();
        bytes.chunks_exact(8).enumerate().position(|word| !right(word))
    }

    fn version_at(&self, position: u64) -> u64 {
        self.writes / self.pages + u64::from(position < self.writes % self.pages)
    }

    fn page_at(&self, position: u64) -> u64 {
        (u128::from(position) * u128::from(self.stride) % u128::from(self.pages)) as u64
    }
}

/// A region of pages in memory that is rewritten by version and checked without end.
#[derive(Debug)]
pub(crate) struct Region {
    words: Vec<u64>,
    walk: Walk,
    checked: u64,
}

impl Region {
    /// A region of `bytes` rounded down to whole pages (at least one), every page at version 1.
    pub(crate) fn new(bytes: u64, seed: u64) -> Self {
        let walk = Walk::new(bytes, seed);
        let words = vec![0; usize::try_from(walk.pages()).unwrap_or(1) * WORDS];
        let mut region = Self { words, walk, checked: 0 };
        (0..region.pages()).for_each(|_| region.write_next());
        region
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> u64 {
        self.walk.pages()
    }

    /// How many pages were written since the start, the first filling included.
    pub(crate) fn writes(&self) -> u64 {
        self.walk.writes()
    }

    /// How many pages were checked since the start.
    pub(crate) fn checked(&self) -> u64 {
        self.checked
    }

    /// The highest version that any page has.
    pub(crate) fn version(&self) -> u64 {
        self.writes().div_ceil(self.pages())
    }

    /// Gives the next page its next version.
    pub(crate) fn write_next(&mut self) {
        let (page, version) = self.walk.write_next();
        let base = page_base(self.walk.seed, page, version);
        for (i, word) in self.page_mut(page).iter_mut().enumerate() {
            *word = page_word(base, i);
        }
    }

    /// Checks the next page of the walk; a wrong one is put right after it was found.
    pub(crate) fn check_next(&mut self) -> Result<(), WrongPage> {
        let (page, version) = self.walk.check_next();
        self.checked += 1;
        let base = page_base(self.walk.seed, page, version);
        let words = self.page_mut(page);
        let wrong = words.iter().enumerate().find(|(i, word)| **word != page_word(base, *i));
        let Some((word, &found)) = wrong else { return Ok(()) };
        words.iter_mut().enumerate().for_each(|(i, word)| *word = page_word(base, i));
        Err(WrongPage { page, word, found, expected: page_word(base, word), version })
    }

    /// Harms one word on purpose, so that a test can see that the check finds it.
    pub(crate) fn spoil(&mut self) {
        let middle = self.words.len() / 2;
        self.words[middle] ^= 1;
    }

    fn page_mut(&mut self, page: u64) -> &mut [u64] {
        let start = page as usize * WORDS;
        &mut self.words[start..start + WORDS]
    }
}

/// A stride near the golden section of `pages` and coprime to it: neighbours in the walk lie far
/// apart, as the random writes of SOLive's memory workload do, and a round meets every page once.
fn coprime_stride(pages: u64) -> u64 {
    let near = (pages as f64 * 0.618) as u64;
    (near.max(1)..).find(|stride| gcd(*stride, pages) == 1).unwrap_or(1)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn page_base(seed: u64, page: u64, version: u64) -> u64 {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&page.to_le_bytes());
    key[8..].copy_from_slice(&version.to_le_bytes());
    xxh3_64_with_seed(&key, seed)
}

/// One word of a page: a multiplicative mix, so that pages neither compress nor resemble each
/// other, at a few instructions per word (the guests run under emulation).
fn page_word(base: u64, index: usize) -> u64 {
    let x = base.wrapping_add((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_fresh_region_is_right_everywhere() {
        let mut region = Region::new(37 * 4096, 7);
        assert_eq!((region.pages(), region.writes(), region.version()), (37, 37, 1));
        (0..74).for_each(|_| region.check_next().unwrap());
    }

    #[test]
    fn one_flipped_bit_is_found_named_and_put_right() {
        let mut region = Region::new(16 * 4096, 7);
        region.words[5 * WORDS + 100] ^= 1;
        let wrong: Vec<_> = (0..16).filter_map(|_| region.check_next().err()).collect();
        assert_eq!(wrong.len(), 1);
        assert_eq!((wrong[0].page, wrong[0].word, wrong[0].version), (5, 100, 1));
        (0..16).for_each(|_| region.check_next().unwrap());
    }

    #[test]
    fn a_page_of_an_earlier_version_is_found() {
        // What a migration that lost the last iteration of one page would leave.
        let mut region = Region::new(8 * 4096, 3);
        let old = region.page_mut(2).to_vec();
        (0..8).for_each(|_| region.write_next());
        region.page_mut(2).copy_from_slice(&old);
        let wrong: Vec<_> = (0..8).filter_map(|_| region.check_next().err()).collect();
        assert_eq!(wrong.iter().map(|w| (w.page, w.version)).collect::<Vec<_>>(), [(2, 2)]);
    }

    #[test]
    fn two_pages_exchanged_are_both_found() {
        let mut region = Region::new(8 * 4096, 3);
        let (one, two) = (region.page_mut(1).to_vec(), region.page_mut(2).to_vec());
        region.page_mut(1).copy_from_slice(&two);
        region.page_mut(2).copy_from_slice(&one);
        assert_eq!((0..8).filter(|_| region.check_next().is_err()).count(), 2);
    }

    proptest! {
        #[test]
        fn any_mix_of_writes_and_checks_stays_right(
            pages in 1u64..60, steps in proptest::collection::vec(any::<bool>(), 0..300),
        ) {
            let mut region = Region::new(pages * 4096, 11);
            for write in steps {
                if write { region.write_next() } else { prop_assert!(region.check_next().is_ok()) }
            }
        }

        #[test]
        fn a_round_meets_every_page_once(pages in 1u64..500) {
            let region = Region::new(pages * 4096, 0);
            let mut met: Vec<u64> = (0..pages).map(|position| region.walk.page_at(position)).collect();
            met.sort_unstable();
            prop_assert!(met.into_iter().eq(0..pages));
        }
    }
}
