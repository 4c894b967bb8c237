//! What the room carries: a guest's pages, by block and number, and the numbers of the packs that
//! they wait in. Used by everything here and by the agent's reader of QEMU's stream.

use std::fmt;

/// Bytes of a page: QEMU's target page on x86.
pub const PAGE_BYTES: usize = 4096;

/// One page of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageAt {
    /// The RAM block's place in the stream's list, on which both sides agree.
    pub block: u16,
    /// The page's number in the block.
    pub page: u32,
}

impl PageAt {
    /// Bytes from the block's beginning.
    #[must_use]
    pub fn offset(self) -> u64 {
        u64::from(self.page) * PAGE_BYTES as u64
    }
}

impl fmt::Display for PageAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {} of block {}", self.page, self.block)
    }
}

/// Which of two copies of a page is newer: higher is. Unique within a lane, and so is its nonce.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u64);

/// The number of a pack, counted from 0 within a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackId(pub u64);

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pack {}", self.0)
    }
}
