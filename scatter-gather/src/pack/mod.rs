//! Packs: pages in batches, as they wait in a store. Bytes to pages and back; pure. Used by
//! whoever scatters and gathers.
//!
//! ```text
//!  pack:   header 48 | slot x slots | zero run x runs
//!
//!  header: "LBPK" | format 2 | sealed u8 | slots be16 | runs be16 | width be16 | lane be32 | pack be64
//!          migration 16 | check be64 over the header before it and all zero runs
//!  slot:   block be16 | 0 be16 | page be32 | version be64 | check be64 | body | [tag 16]
//!  run:    block be16 | 0 be16 | first be32 | count be32 | 0 be32 | version be64
//! ```
//!
//! The body is the page, or the page compressed; the width is in eighths of a page ([`Width`]).
//! All slots of a pack are equally long: one page is fetched by its slot's place alone, without its
//! pack, and says itself what it is and whether it is whole (xxh3; sealed pages have a tag, too). A
//! pack says everything that an index needs, so that a lost index is rebuilt from the packs alone:
//! also which pages are zero, for a page that became zero must not come back as what it was before.
//! Zero pages have no slot: their bytes never travel.
//!
//! How many pages a pack holds is a parameter, [`Batch`]. Its default fills Redis' allocator class
//! of 256 KiB almost to the end: one page more would cost 64 KiB (docs/decisions/0011).

mod builder;
mod index;
mod reader;
mod width;

#[cfg(test)]
mod tests;

use std::num::NonZeroU16;

use thiserror::Error;

use crate::page::{PackId, PageAt};
use crate::seal::SealError;

pub use builder::{Coder, Pack, PackBuilder, Slot};
pub use index::Index;
pub use reader::{Contents, OpenPage, Reading, ZeroRun};
pub use width::Width;

const MAGIC: [u8; 4] = *b"LBPK";
const FORMAT: u8 = 2;
const HEADER_BYTES: usize = 48;
/// The header's bytes that its check covers.
const CHECKED_BYTES: usize = HEADER_BYTES - 8;
const SLOT_HEAD_BYTES: usize = 24;
/// A slot's bytes that its check covers, before the check itself.
const SLOT_CHECKED_BYTES: usize = 16;
const RUN_BYTES: usize = 24;
/// The most zero runs of one pack: they fit behind the slots of a pack of the default size.
pub const RUNS_MOST: usize = 48;

/// How many whole pages a pack holds at most; of compressed ones as many as are no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch(NonZeroU16);

impl Batch {
    /// The most: 16 MiB, far beyond where larger packs are any faster.
    pub const MOST: u16 = 4000;

    /// A batch of `pages` pages; `None` for 0 and for more than [`Self::MOST`].
    #[must_use]
    pub fn new(pages: u16) -> Option<Self> {
        NonZeroU16::new(pages).filter(|pages| pages.get() <= Self::MOST).map(Self)
    }

    /// Its pages.
    #[must_use]
    pub fn pages(self) -> u16 {
        self.0.get()
    }
}

impl Default for Batch {
    /// 63 pages: 260 KB, just below 256 KiB.
    fn default() -> Self {
        Self(NonZeroU16::new(63).expect("63 is not 0"))
    }
}

/// The most bytes that a pack of this batch has.
#[must_use]
pub fn pack_bytes_most(batch: Batch, sealed: bool) -> usize {
    Width::WHOLE.slot_offset(batch.pages(), sealed) + RUNS_MOST * RUN_BYTES
}

/// Why bytes from a store are not what was put there. All of it means: read another copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PackError {
    /// Shorter or longer than it says.
    #[error("a pack or page of {found} bytes where {wanted} belong")]
    Length {
        /// What is there.
        found: usize,
        /// What belongs there.
        wanted: usize,
    },
    /// Not a pack, or one of another format.
    #[error("bytes that are no pack of format {FORMAT}")]
    NotAPack,
    /// A pack of another migration, another number or another kind than was asked for.
    #[error("another pack than {0}")]
    Other(PackId),
    /// The header's check is wrong.
    #[error("the header of {0} was changed where it waited")]
    Header(PackId),
    /// The check of a page is wrong.
    #[error("{0} was changed where it waited")]
    Page(PageAt),
    /// What is in a slot is not a compressed page.
    #[error("{0} is compressed in a way that gives no page")]
    Compressed(PageAt),
    /// A slot that holds another page than the index says.
    #[error("{found} where {wanted} belongs")]
    OtherPage {
        /// What the slot says.
        found: PageAt,
        /// What was asked for.
        wanted: PageAt,
    },
    /// Encryption.
    #[error(transparent)]
    Seal(#[from] SealError),
}
