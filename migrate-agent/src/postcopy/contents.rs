//! What each page of a guest's RAM holds, as far as QEMU's stream has said. Shared by who absorbs the stream
//! and who scatters pages while the guest still runs.
//!
//! ```text
//!              note                       take_ahead                    note
//!  unknown ----------> zero | data   data -----------> data, ahead ------------> zero | data
//!                                                          |  give_back            (it was too early)
//!                                                          '---------> data
//! ```
//!
//! A byte per page. "Ahead" is marked before the page is read, so that a write after the reading is noticed:
//! QEMU sends the page once more, and the note takes the mark away. Where that is not enough (TCG,
//! docs/decisions/0006) the reader compares once more when the guest stands still.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use lifeboat_scatter_gather::page::PageAt;

const UNKNOWN: u8 = 0;
const ZERO: u8 = 1;
const DATA: u8 = 2;
/// Has been read while the guest ran.
const AHEAD: u8 = 4;

/// The pages of the block that is RAM.
#[derive(Debug)]
pub struct Contents {
    block: u16,
    pages: Box<[AtomicU8]>,
    known: AtomicU64,
    zeroes: AtomicU64,
    stale: AtomicU64,
}

impl Contents {
    /// Of a block of so many pages nothing is known.
    #[must_use]
    pub fn new(block: u16, pages: u32) -> Self {
        let pages = (0..pages).map(|_| AtomicU8::new(UNKNOWN)).collect();
        let none = || AtomicU64::new(0);
        Self { block, pages, known: none(), zeroes: none(), stale: none() }
    }

    /// The block.
    #[must_use]
    pub fn block(&self) -> u16 {
        self.block
    }

    /// How many pages it has.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.pages.len() as u32
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// QEMU has sent this page; what was read of it before counts no more. No page of the block: nothing.
    pub fn note(&self, page: u32, zero: bool) {
        let Some(cell) = self.pages.get(page as usize) else { return };
        let before = cell.swap(if zero { ZERO } else { DATA }, Ordering::AcqRel);
        if before == UNKNOWN {
            self.known.fetch_add(1, Ordering::Relaxed);
        }
        match (before & !AHEAD == ZERO, zero) {
            (false, true) => drop(self.zeroes.fetch_add(1, Ordering::Relaxed)),
            (true, false) => drop(self.zeroes.fetch_sub(1, Ordering::Relaxed)),
            _ => {}
        }
        if before & AHEAD != 0 {
            self.stale.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Marks a page as read ahead, before it is read. `false`: it is not known to hold data, or was read already.
    #[must_use]
    pub fn take_ahead(&self, page: u32) -> bool {
        let Some(cell) = self.pages.get(page as usize) else { return false };
        cell.compare_exchange(DATA, DATA | AHEAD, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// What was read of it ahead is of no use.
    pub fn give_back(&self, page: u32) {
        if let Some(cell) = self.pages.get(page as usize)
            && cell.fetch_and(!AHEAD, Ordering::AcqRel) & AHEAD != 0
        {
            self.stale.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether what was read of it ahead may still be what it holds.
    #[must_use]
    pub fn is_ahead(&self, page: u32) -> bool {
        self.get(page) & AHEAD != 0
    }

    /// Whether it holds nothing but zeroes.
    #[must_use]
    pub fn is_zero(&self, page: u32) -> bool {
        self.get(page) & !AHEAD == ZERO
    }

    /// Whether it is not zero. `false` for what is not known.
    #[must_use]
    pub fn is_data(&self, page: u32) -> bool {
        self.get(page) & !AHEAD == DATA
    }

    fn get(&self, page: u32) -> u8 {
        self.pages.get(page as usize).map_or(UNKNOWN, |cell| cell.load(Ordering::Acquire))
    }

    /// How many pages were never in the stream.
    #[must_use]
    pub fn unknown(&self) -> u64 {
        u64::from(self.len()) - self.known.load(Ordering::Relaxed)
    }

    /// How many pages are known to hold something.
    #[must_use]
    pub fn data(&self) -> u64 {
        let (known, zeroes) = (&self.known, &self.zeroes);
        known.load(Ordering::Relaxed).saturating_sub(zeroes.load(Ordering::Relaxed))
    }

    /// How many pages were read ahead in vain.
    #[must_use]
    pub fn stale(&self) -> u64 {
        self.stale.load(Ordering::Relaxed)
    }

    /// All pages, in order, and whether each is zero.
    pub fn all(&self) -> impl Iterator<Item = (PageAt, bool)> {
        let block = self.block;
        (0..self.len()).map(move |page| (PageAt { block, page }, self.is_zero(page)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_written_after_it_was_read_counts_as_not_read() {
        let contents = Contents::new(1, 4);
        assert!(!contents.take_ahead(0), "nothing is known of it");
        contents.note(0, false);
        contents.note(1, true);
        assert!(contents.take_ahead(0) && !contents.take_ahead(0) && !contents.take_ahead(1));
        assert!(contents.is_ahead(0) && contents.is_data(0));
        contents.note(0, false);
        assert!(!contents.is_ahead(0) && contents.is_data(0));
        assert!(contents.take_ahead(0));
        contents.note(0, true);
        assert!(contents.is_zero(0) && !contents.take_ahead(0));
        assert_eq!((contents.stale(), contents.data(), contents.unknown()), (2, 0, 2));
        contents.note(1, false);
        assert!(contents.take_ahead(1));
        contents.give_back(1);
        contents.give_back(1);
        assert_eq!((contents.stale(), contents.data(), contents.is_ahead(1)), (3, 1, false));
    }

    #[test]
    fn a_page_that_the_block_does_not_have_changes_nothing() {
        let contents = Contents::new(0, 1);
        contents.note(7, true);
        contents.give_back(7);
        assert!(!contents.take_ahead(7) && !contents.is_ahead(7));
        assert_eq!((contents.unknown(), contents.stale(), contents.len()), (1, 0, 1));
    }
}
