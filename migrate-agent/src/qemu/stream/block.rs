//! The guest's memory as QEMU names it: RAM blocks and pages in them. Used by everything that
//! speaks of pages of a stream.
//!
//! "RAM" includes video memory and firmware. A block's index is its place in the stream's list,
//! so both sides of a migration agree on it.

use lifeboat_scatter_gather::page::PageAt;

use super::error::StreamError;
use super::wire::{BLOCKS_MOST, PAGE_BITS, PAGE_BYTES};

/// One RAM block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name, such as `pc.ram`: printable ASCII of at most 255 bytes.
    pub name: String,
    /// Target pages of 4 KiB that are used.
    pub pages: u32,
}

/// All RAM blocks of a guest, in the order in which the stream announces them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RamLayout {
    blocks: Vec<RamBlock>,
}

/// Some pages in a row of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRange {
    /// The first page.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl RamLayout {
    /// A layout of these blocks.
    ///
    /// # Errors
    /// A name twice, or more blocks than any machine has. `at` is where the list began.
    pub fn new(blocks: Vec<RamBlock>, at: u64) -> Result<Self, StreamError> {
        if blocks.len() > BLOCKS_MOST {
            return Err(StreamError::Field {
                what: "a list of blocks",
                value: blocks.len() as u64,
                at,
            });
        }
        let mut names: Vec<&str> = blocks.iter().map(|block| block.name.as_str()).collect();
        names.sort_unstable();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(StreamError::OutOfPlace { what: "a second block of one name", at });
        }
        Ok(Self { blocks })
    }

    /// The blocks, by index.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// All pages of all blocks.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.blocks.iter().map(|block| u64::from(block.pages)).sum()
    }

    /// The index of the block of this name.
    #[must_use]
    pub fn find(&self, name: &[u8]) -> Option<u16> {
        let found = self.blocks.iter().position(|block| block.name.as_bytes() == name)?;
        u16::try_from(found).ok()
    }

    /// The page that `offset` (bytes, a multiple of a page) is in block `block`.
    pub(super) fn page(&self, block: u16, offset: u64, at: u64) -> Result<PageAt, StreamError> {
        let range = self.range(block, offset, PAGE_BYTES as u64, at)?;
        Ok(PageAt { block, page: range.first })
    }

    /// The pages that `length` bytes from `offset` on are in block `block`.
    pub(super) fn range(
        &self,
        block: u16,
        offset: u64,
        length: u64,
        at: u64,
    ) -> Result<PageRange, StreamError> {
        let Some(inside) = self.blocks.get(usize::from(block)) else {
            return Err(StreamError::Field { what: "a block's index", value: block.into(), at });
        };
        for (what, value) in [("an offset", offset), ("a length", length)] {
            if !value.is_multiple_of(PAGE_BYTES as u64) {
                return Err(StreamError::Field { what, value, at });
            }
        }
        let outside = |page| StreamError::OutsideBlock {
            block: inside.name.clone(),
            page,
            pages: inside.pages,
            at,
        };
        let (first, count) = (offset >> PAGE_BITS, length >> PAGE_BITS);
        match (u32::try_from(first), u32::try_from(count)) {
            (Ok(start), Ok(pages)) if first + count <= u64::from(inside.pages) => {
                Ok(PageRange { first: start, count: pages })
            }
            _ => Err(outside(first.max(inside.pages.into()))),
        }
    }
}
