//! Fills packs: pages in, bytes for a store out. Used by the source.
//!
//! A page is copied or compressed once, to its place in the pack, and is encrypted and checked there.

use bytes::{BufMut, Bytes, BytesMut};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

use super::width::Squeezer;
use super::{
    Batch, CHECKED_BYTES, FORMAT, HEADER_BYTES, MAGIC, PackError, RUN_BYTES, RUNS_MOST,
    SLOT_CHECKED_BYTES, SLOT_HEAD_BYTES, Width, ZeroRun, pack_bytes_most,
};
use crate::page::{PAGE_BYTES, PackId, PageAt, Version};
use crate::seal::{MigrationTag, SealError, Sealer};

/// How pages are written into a pack.
#[derive(Debug)]
pub enum Coder {
    /// As they are. Versions are counted from this one on.
    Plain(Version),
    /// Encrypted.
    Sealed(Sealer),
}

impl Coder {
    fn lane(&self) -> u32 {
        match self {
            Self::Plain(_) => 0,
            Self::Sealed(sealer) => sealer.lane(),
        }
    }

    fn is_sealed(&self) -> bool {
        matches!(self, Self::Sealed(_))
    }

    fn version(&mut self) -> Result<Version, SealError> {
        match self {
            Self::Plain(next) => {
                let version = *next;
                next.0 = next.0.checked_add(1).ok_or(SealError::Spent)?;
                Ok(version)
            }
            Self::Sealed(sealer) => sealer.version(),
        }
    }
}

/// Where a page was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// The pack.
    pub pack: PackId,
    /// How wide the pack's slots are.
    pub width: Width,
    /// Its place in the pack.
    pub slot: u16,
    /// Its version.
    pub version: Version,
}

/// A finished pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pack {
    /// Its number.
    pub id: PackId,
    /// How many slots it has.
    pub slots: u16,
    /// How wide they are.
    pub width: Width,
    /// What is to be stored.
    pub bytes: Bytes,
}

/// A pack that is being filled.
struct Open {
    id: PackId,
    slots: u16,
    bytes: BytesMut,
}

/// Collects pages until a pack is full. While pages are compressed, one pack of each width is open.
pub struct PackBuilder {
    migration: MigrationTag,
    batch: Batch,
    coder: Coder,
    next: PackId,
    open: [Option<Open>; Width::NUMBER],
    runs: Vec<ZeroRun>,
    squeezer: Option<Squeezer>,
}

impl PackBuilder {
    /// A builder whose first pack has the number `first`. It compresses nothing.
    #[must_use]
    pub fn new(migration: MigrationTag, batch: Batch, coder: Coder, first: PackId) -> Self {
        let (open, runs, squeezer) = (Default::default(), Vec::new(), None);
        Self { migration, batch, coder, next: first, open, runs, squeezer }
    }

    /// Whether the pages to come are compressed where that makes them fit a narrower slot. It takes about
    /// as long as a page needs at 5 Gbit/s.
    pub fn compress(&mut self, compress: bool) {
        match compress {
            true => drop(self.squeezer.get_or_insert_with(Squeezer::new)),
            false => self.squeezer = None,
        }
    }

    /// Adds a page. Ask [`Self::is_full`] before.
    ///
    /// # Errors
    /// [`PackError::Length`] for what is not a page, [`PackError::Seal`] when versions ran out.
    ///
    /// # Panics
    /// If a pack is full.
    pub fn page(&mut self, at: PageAt, page: &[u8]) -> Result<Slot, PackError> {
        assert!(!self.is_full(), "a full pack is finished before more is added");
        if page.len() != PAGE_BYTES {
            return Err(PackError::Length { found: page.len(), wanted: PAGE_BYTES });
        }
        let (width, body) = match &mut self.squeezer {
            Some(squeezer) => squeezer.squeeze(page),
            None => (Width::WHOLE, page),
        };
        let open = self.open[place(width)].get_or_insert_with(|| {
            begun(&mut self.next, pack_bytes_most(self.batch, self.coder.is_sealed()))
        });
        let start = open.bytes.len();
        open.bytes.put_u16(at.block);
        open.bytes.put_u16(0);
        open.bytes.put_u32(at.page);
        open.bytes.put_bytes(0, SLOT_HEAD_BYTES - 8);
        open.bytes.put_slice(body);
        open.bytes.put_bytes(0, width.body_bytes() - body.len());
        let version = match &mut self.coder {
            Coder::Plain(_) => self.coder.version()?,
            Coder::Sealed(sealer) => {
                let (version, tag) = sealer.seal(at, &mut open.bytes[start + SLOT_HEAD_BYTES..])?;
                open.bytes.put_slice(&tag);
                version
            }
        };
        write_check(&mut open.bytes[start..], version);
        let slot = Slot { pack: open.id, width, slot: open.slots, version };
        open.slots += 1;
        Ok(slot)
    }

    /// Notes a page of zeroes. Pages in a row become one run, which has the version of its last.
    ///
    /// # Errors
    /// [`PackError::Seal`] when versions ran out.
    ///
    /// # Panics
    /// If a pack is full.
    pub fn zero(&mut self, at: PageAt) -> Result<Version, PackError> {
        assert!(!self.is_full(), "a full pack is finished before more is added");
        let version = self.coder.version()?;
        // A run goes on only while no page came between, so that its version is true for all of it.
        let last = self.runs.last_mut().filter(|run| {
            run.block == at.block
                && run.first.checked_add(run.count) == Some(at.page)
                && run.version.0 + 1 == version.0
        });
        match last {
            Some(run) => (run.count, run.version) = (run.count + 1, version),
            None => self.runs.push(ZeroRun { block: at.block, first: at.page, count: 1, version }),
        }
        Ok(version)
    }

    /// How many pages its packs hold.
    #[must_use]
    pub fn batch(&self) -> Batch {
        self.batch
    }

    /// Whether a pack has to be finished before anything is added.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.runs.len() == RUNS_MOST || self.full().is_some()
    }

    /// The width whose pack is full.
    fn full(&self) -> Option<Width> {
        let sealed = self.coder.is_sealed();
        Width::all().find(|width| {
            let open = self.open[place(*width)].as_ref();
            open.is_some_and(|open| open.slots == width.slots_most(self.batch, sealed))
        })
    }

    /// Ends a pack, the full one if there is one; `None` when nothing is left. Zero runs go with
    /// whichever pack ends.
    pub fn finish(&mut self) -> Option<Pack> {
        let is_open = |width: &Width| self.open[place(*width)].is_some();
        let width = self.full().or_else(|| Width::all().find(is_open));
        if width.is_none() && self.runs.is_empty() {
            return None;
        }
        let width = width.unwrap_or_default();
        let open = self.open[place(width)].take();
        let Open { id, slots, mut bytes } = open
            .unwrap_or_else(|| begun(&mut self.next, HEADER_BYTES + self.runs.len() * RUN_BYTES));
        let body = bytes.len();
        for run in self.runs.drain(..) {
            run.encode(&mut bytes);
        }
        self.write_header((id, slots, width), &mut bytes, body);
        Some(Pack { id, slots, width, bytes: bytes.freeze() })
    }

    fn write_header(
        &self,
        (id, slots, width): (PackId, u16, Width),
        bytes: &mut BytesMut,
        body: usize,
    ) {
        let runs = (bytes.len() - body) / RUN_BYTES;
        debug_assert_eq!(body, width.slot_offset(slots, self.coder.is_sealed()));
        let mut header = &mut bytes[..CHECKED_BYTES];
        header.put_slice(&MAGIC);
        header.put_u8(FORMAT);
        header.put_u8(self.coder.is_sealed().into());
        header.put_u16(slots);
        header.put_u16(runs as u16);
        header.put_u16(width.number().into());
        header.put_u32(self.coder.lane());
        header.put_u64(id.0);
        header.put_slice(&self.migration.0);
        let check = header_check(&bytes[..CHECKED_BYTES], &bytes[body..]);
        bytes[CHECKED_BYTES..HEADER_BYTES].copy_from_slice(&check.to_be_bytes());
    }
}

/// Which open pack has slots of this width.
fn place(width: Width) -> usize {
    usize::from(width.number()) - 1
}

/// The next pack, with memory for so many bytes and room for its header.
fn begun(next: &mut PackId, most: usize) -> Open {
    let mut bytes = BytesMut::with_capacity(most);
    bytes.put_bytes(0, HEADER_BYTES);
    let id = *next;
    next.0 += 1;
    Open { id, slots: 0, bytes }
}

/// Writes a slot's version and check; its page, and its tag if it has one, are there already.
fn write_check(slot: &mut [u8], version: Version) {
    slot[8..SLOT_CHECKED_BYTES].copy_from_slice(&version.0.to_be_bytes());
    let check = slot_check(slot);
    slot[SLOT_CHECKED_BYTES..SLOT_HEAD_BYTES].copy_from_slice(&check.to_be_bytes());
}

/// The check of a slot: its head is hashed first and seeds the hash of the rest, in one pass each.
pub(super) fn slot_check(slot: &[u8]) -> u64 {
    let seed = xxh3_64(&slot[..SLOT_CHECKED_BYTES]);
    xxhash_rust::xxh3::xxh3_64_with_seed(&slot[SLOT_HEAD_BYTES..], seed)
}

/// The check of a pack's header and its zero runs.
pub(super) fn header_check(header: &[u8], runs: &[u8]) -> u64 {
    let mut hash = Xxh3Default::new();
    hash.update(header);
    hash.update(runs);
    hash.digest()
}
