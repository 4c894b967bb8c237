//! Where every page of a guest is, from the destination's point of view, and that it is placed at
//! most once. Used by post-copy and scatter-gather; pure.
//!
//! ```text
//!            note                       close (every page is known)           place
//!  Absent ---------> AtSource | InPack | Zero ------------------------------> Placed
//!            <-----   ^  the newest record counts       |  AtSource -> InPack: scattered after all
//!            note     '---------------------------------'
//! ```
//!
//! Before [`Ledger::close`] records follow the stream and the last one counts. After it the guest may
//! run: from then on a page can be placed once and never again, because QEMU ends itself over a page
//! that it is given twice, and a page can no longer become unknown. A page that waits in two answers
//! at once (a demand overtook the background) is placed by whichever comes first; the ledger tells the
//! other that it is too late.
//!
//! A page costs eight bytes. Fetching, timing and stores are its user's.

#[cfg(test)]
mod tests;

use std::ops::Range;

use thiserror::Error;

use crate::page::{PackId, PageAt};

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// Nothing is known of it yet, or its newest version is still to come.
    Absent,
    /// It holds nothing but zeroes.
    Zero,
    /// At the source, which can be asked for it.
    AtSource,
    /// In a pack that is acknowledged.
    InPack {
        /// The pack.
        pack: PackId,
        /// Its place in the pack.
        slot: u16,
    },
    /// In the guest's memory.
    Placed,
}

/// What [`Ledger::place`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placing {
    /// Place it now; it was here before.
    Now(Where),
    /// It is placed already: drop what came.
    Late,
}

/// How many pages are where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Not known.
    pub absent: u64,
    /// Zeroes that are not placed.
    pub zero: u64,
    /// At the source.
    pub at_source: u64,
    /// In packs.
    pub in_pack: u64,
    /// Placed.
    pub placed: u64,
}

/// Why the ledger refuses something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum LedgerError {
    /// More memory than this VM was said to have.
    #[error("{pages} pages are announced and {most} were expected at most")]
    TooMany {
        /// What was announced.
        pages: u64,
        /// What its user allows.
        most: u64,
    },
    /// A page that the guest does not have.
    #[error("there is no {0}")]
    NoSuchPage(PageAt),
    /// A pack whose number or slot is too large to be noted.
    #[error("slot {slot} of {pack} is beyond what can be noted")]
    TooFar {
        /// The pack.
        pack: PackId,
        /// The slot.
        slot: u16,
    },
    /// The guest can't run: pages are missing.
    #[error("{missing} pages never came; the first is {first}")]
    Incomplete {
        /// How many.
        missing: u64,
        /// The first of them.
        first: PageAt,
    },
    /// Something that is possible only before the guest runs, or only after.
    #[error("{0} cannot be noted as {1:?} now")]
    NotNow(PageAt, Where),
}

/// The ledger disagrees with itself: a mistake in this file.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Discrepancy {
    /// The counts are not those of the pages.
    #[error("counted {counted:?}, noted {noted:?}")]
    Counts {
        /// By looking at every page.
        counted: Counts,
        /// As kept.
        noted: Counts,
    },
    /// A pack's pages are not those that wait in it.
    #[error("{pack} has {counted} waiting pages and {noted} noted")]
    Live {
        /// The pack.
        pack: PackId,
        /// By looking at every page.
        counted: u32,
        /// As kept.
        noted: u32,
    },
    /// A page is unknown although the guest may run.
    #[error("the guest may run and {0} pages are unknown")]
    Open(u64),
}

/// A page's place in eight bytes: three bits of kind, 49 of pack, 12 of slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cell(u64);

const KIND_SHIFT: u32 = 61;
const SLOT_BITS: u32 = 12;
const PACK_MOST: u64 = (1 << (KIND_SHIFT - SLOT_BITS)) - 1;
/// Packs are counted one by one; more than this many beside four for each page is nonsense, and must
/// not make the ledger grow.
const PACKS_SPARE: u64 = 1024;

impl Cell {
    fn of(place: Where) -> Self {
        let kind = |kind: u64| kind << KIND_SHIFT;
        Self(match place {
            Where::Absent => kind(0),
            Where::Zero => kind(1),
            Where::AtSource => kind(2),
            Where::InPack { pack, slot } => kind(3) | pack.0 << SLOT_BITS | u64::from(slot),
            Where::Placed => kind(4),
        })
    }

    fn place(self) -> Where {
        match self.0 >> KIND_SHIFT {
            0 => Where::Absent,
            1 => Where::Zero,
            2 => Where::AtSource,
            3 => Where::InPack {
                pack: PackId(self.0 >> SLOT_BITS & PACK_MOST),
                slot: (self.0 & ((1 << SLOT_BITS) - 1)) as u16,
            },
            _ => Where::Placed,
        }
    }
}

impl Counts {
    fn of(&mut self, place: Where) -> &mut u64 {
        match place {
            Where::Absent => &mut self.absent,
            Where::Zero => &mut self.zero,
            Where::AtSource => &mut self.at_source,
            Where::InPack { .. } => &mut self.in_pack,
            Where::Placed => &mut self.placed,
        }
    }

    /// Pages that are not in the guest's memory yet.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.absent + self.zero + self.at_source + self.in_pack
    }
}

/// The pages of one guest.
#[derive(Debug, Clone)]
pub struct Ledger {
    blocks: Vec<Vec<Cell>>,
    counts: Counts,
    /// Pages that wait in each pack.
    live: Vec<u32>,
    /// Numbers of packs are below this.
    packs_most: u64,
    closed: bool,
}

impl Ledger {
    /// A ledger in which every page is absent. `blocks` are pages per RAM block, as the stream
    /// announces them; `most` is what this VM may have, from its definition.
    ///
    /// # Errors
    /// [`LedgerError::TooMany`]: nothing is allocated then.
    pub fn new(blocks: &[u32], most: u64) -> Result<Self, LedgerError> {
        let pages = blocks.iter().map(|pages| u64::from(*pages)).sum();
        if pages > most {
            return Err(LedgerError::TooMany { pages, most });
        }
        let block = |pages: &u32| vec![Cell::of(Where::Absent); *pages as usize];
        let counts = Counts { absent: pages, ..Counts::default() };
        let blocks = blocks.iter().map(block).collect();
        let packs_most = pages.saturating_mul(4).saturating_add(PACKS_SPARE);
        Ok(Self { blocks, counts, live: Vec::new(), packs_most, closed: false })
    }

    /// Where the page is.
    ///
    /// # Errors
    /// [`LedgerError::NoSuchPage`].
    pub fn find(&self, at: PageAt) -> Result<Where, LedgerError> {
        let block = self.blocks.get(usize::from(at.block));
        let cell = block.and_then(|block| block.get(at.page as usize));
        cell.map(|cell| cell.place()).ok_or(LedgerError::NoSuchPage(at))
    }

    /// Notes where the newest version of a page is. Before [`Self::close`] anything but `Placed`
    /// goes. After it a page that is not placed may move into a pack, and a late record of one that
    /// is placed changes nothing.
    ///
    /// # Errors
    /// [`LedgerError::NoSuchPage`], [`LedgerError::TooFar`], [`LedgerError::NotNow`].
    pub fn note(&mut self, at: PageAt, place: Where) -> Result<(), LedgerError> {
        let before = self.find(at)?;
        if let Where::InPack { pack, slot } = place
            && (pack.0 >= self.packs_most || slot >> SLOT_BITS != 0)
        {
            return Err(LedgerError::TooFar { pack, slot });
        }
        let allowed = match place {
            Where::Placed => false,
            Where::InPack { .. } => true,
            Where::Absent | Where::Zero | Where::AtSource => !self.closed,
        };
        match (allowed, before) {
            (false, _) => Err(LedgerError::NotNow(at, place)),
            (true, Where::Placed) => Ok(()),
            (true, _) => {
                self.set(at, before, place);
                Ok(())
            }
        }
    }

    /// Notes the same of many pages, `Zero` or `AtSource`, before [`Self::close`]. A guest of 64 GiB has 16
    /// million pages, of which all is noted while it stands still.
    ///
    /// # Errors
    /// As [`Self::note`]; nothing is noted then.
    pub fn note_run(
        &mut self,
        block: u16,
        pages: Range<u32>,
        place: Where,
    ) -> Result<(), LedgerError> {
        if self.closed || !matches!(place, Where::Zero | Where::AtSource) {
            return Err(LedgerError::NotNow(PageAt { block, page: pages.start }, place));
        }
        let last = PageAt { block, page: pages.end.saturating_sub(1) };
        let range = pages.start as usize..pages.end as usize;
        let cells = self.blocks.get_mut(usize::from(block));
        let cells = cells.and_then(|cells| cells.get_mut(range));
        for cell in cells.ok_or(LedgerError::NoSuchPage(last))? {
            let before = cell.place();
            *self.counts.of(before) -= 1;
            *self.counts.of(place) += 1;
            if let Where::InPack { pack, .. } = before {
                self.live[pack.0 as usize] -= 1;
            }
            *cell = Cell::of(place);
        }
        Ok(())
    }

    /// From now on the guest may run.
    ///
    /// # Errors
    /// [`LedgerError::Incomplete`]: a page is absent, and nobody could ever give it.
    pub fn close(&mut self) -> Result<(), LedgerError> {
        if self.counts.absent > 0 {
            let missing = self.counts.absent;
            let first = self.first_absent().unwrap_or(PageAt { block: 0, page: 0 });
            return Err(LedgerError::Incomplete { missing, first });
        }
        self.closed = true;
        Ok(())
    }

    /// Is the ledger closed?
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// A page has come and shall be placed.
    ///
    /// # Errors
    /// [`LedgerError::NoSuchPage`]; [`LedgerError::NotNow`] before [`Self::close`].
    pub fn place(&mut self, at: PageAt) -> Result<Placing, LedgerError> {
        let before = self.find(at)?;
        if !self.closed {
            return Err(LedgerError::NotNow(at, Where::Placed));
        }
        if before == Where::Placed {
            return Ok(Placing::Late);
        }
        self.set(at, before, Where::Placed);
        Ok(Placing::Now(before))
    }

    /// How many pages are where.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// How many pages wait in a pack: with none left it need not be fetched, and can be freed.
    #[must_use]
    pub fn live(&self, pack: PackId) -> u32 {
        let at = usize::try_from(pack.0).unwrap_or(usize::MAX);
        self.live.get(at).copied().unwrap_or(0)
    }

    /// The first pack from `from` on in which pages wait.
    #[must_use]
    pub fn next_pack(&self, from: PackId) -> Option<PackId> {
        let start = usize::try_from(from.0).ok()?;
        let found = self.live.get(start..)?.iter().position(|live| *live > 0)?;
        Some(PackId((start + found) as u64))
    }

    /// The first page from `from` on that is at the place that `wanted` says, in the order of blocks
    /// and pages.
    #[must_use]
    pub fn next_page(&self, from: PageAt, wanted: impl Fn(Where) -> bool) -> Option<PageAt> {
        let mut start = from.page as usize;
        for (number, block) in self.blocks.iter().enumerate().skip(from.block.into()) {
            let rest = block.get(start..).unwrap_or(&[]);
            if let Some(found) = rest.iter().position(|cell| wanted(cell.place())) {
                return Some(PageAt { block: number as u16, page: (start + found) as u32 });
            }
            start = 0;
        }
        None
    }

    /// Looks at every page and compares. Slow; for tests and after recovery.
    ///
    /// # Errors
    /// [`Discrepancy`].
    pub fn self_check(&self) -> Result<(), Discrepancy> {
        let mut counted = Counts::default();
        let mut live = vec![0_u32; self.live.len()];
        for cell in self.blocks.iter().flatten() {
            *counted.of(cell.place()) += 1;
            if let Where::InPack { pack, .. } = cell.place() {
                live[pack.0 as usize] += 1;
            }
        }
        if counted != self.counts {
            return Err(Discrepancy::Counts { counted, noted: self.counts });
        }
        let differs = live.iter().zip(&self.live).position(|(counted, noted)| counted != noted);
        if let Some(at) = differs {
            let (counted, noted) = (live[at], self.live[at]);
            return Err(Discrepancy::Live { pack: PackId(at as u64), counted, noted });
        }
        match self.closed && counted.absent > 0 {
            true => Err(Discrepancy::Open(counted.absent)),
            false => Ok(()),
        }
    }

    fn first_absent(&self) -> Option<PageAt> {
        self.next_page(PageAt { block: 0, page: 0 }, |place| place == Where::Absent)
    }

    /// Moves a page that exists from one place to another.
    fn set(&mut self, at: PageAt, before: Where, after: Where) {
        *self.counts.of(before) -= 1;
        *self.counts.of(after) += 1;
        if let Where::InPack { pack, .. } = before {
            self.live[pack.0 as usize] -= 1;
        }
        if let Where::InPack { pack, .. } = after {
            let pack = pack.0 as usize;
            if self.live.len() <= pack {
                self.live.resize(pack + 1, 0);
            }
            self.live[pack] += 1;
        }
        self.blocks[usize::from(at.block)][at.page as usize] = Cell::of(after);
    }
}
