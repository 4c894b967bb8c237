//! Fills packs: pages in, bytes for a store out. Used by the source.
//!
//! A page is copied once, to its place in the pack, and is encrypted and checked there.

use bytes::{BufMut, Bytes, BytesMut};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

use super::{
    Batch, CHECKED_BYTES, FORMAT, HEADER_BYTES, MAGIC, PackError, RUN_BYTES, RUNS_MOST,
    SLOT_CHECKED_BYTES, SLOT_HEAD_BYTES, ZeroRun, pack_bytes_most, slot_bytes,
};
use crate::page::{PAGE_BYTES, PackId, PageAt, Version};
use crate::seal::{MigrationTag, SealError, Sealer, TAG_BYTES};

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
    /// What is to be stored.
    pub bytes: Bytes,
}

/// Collects pages until a pack is full.
#[derive(Debug)]
pub struct PackBuilder {
    migration: MigrationTag,
    batch: Batch,
    coder: Coder,
    id: PackId,
    slots: u16,
    open: BytesMut,
    runs: Vec<ZeroRun>,
}

impl PackBuilder {
    /// A builder whose first pack has the number `first`.
    #[must_use]
    pub fn new(migration: MigrationTag, batch: Batch, coder: Coder, first: PackId) -> Self {
        let open = BytesMut::new();
        Self { migration, batch, coder, id: first, slots: 0, open, runs: Vec::new() }
    }

    /// Adds a page. Ask [`Self::is_full`] before.
    ///
    /// # Errors
    /// [`PackError::Length`] for what is not a page, [`PackError::Seal`] when versions ran out.
    ///
    /// # Panics
    /// If the pack is full.
    pub fn page(&mut self, at: PageAt, page: &[u8]) -> Result<Slot, PackError> {
        assert!(!self.is_full(), "a full pack is finished before more is added");
        if page.len() != PAGE_BYTES {
            return Err(PackError::Length { found: page.len(), wanted: PAGE_BYTES });
        }
        self.begin();
        let start = self.open.len();
        self.open.put_u16(at.block);
        self.open.put_u16(0);
        self.open.put_u32(at.page);
        self.open.put_bytes(0, SLOT_HEAD_BYTES - 8);
        self.open.put_slice(page);
        let version = match &mut self.coder {
            Coder::Plain(_) => self.coder.version()?,
            Coder::Sealed(sealer) => {
                let (version, tag) = sealer.seal(at, &mut self.open[start + SLOT_HEAD_BYTES..])?;
                self.open.put_slice(&tag);
                version
            }
        };
        write_check(&mut self.open[start..], version);
        let slot = Slot { pack: self.id, slot: self.slots, version };
        self.slots += 1;
        Ok(slot)
    }

    /// Notes a page of zeroes. Pages in a row become one run, which has the version of its last.
    ///
    /// # Errors
    /// [`PackError::Seal`] when versions ran out.
    ///
    /// # Panics
    /// If the pack is full.
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

    /// Whether the pack has to be finished before anything is added.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.slots == self.batch.pages() || self.runs.len() == RUNS_MOST
    }

    /// Ends the pack and begins the next; `None` when nothing was added.
    pub fn finish(&mut self) -> Option<Pack> {
        if self.slots == 0 && self.runs.is_empty() {
            return None;
        }
        self.begin();
        let body = self.open.len();
        for run in self.runs.drain(..) {
            run.encode(&mut self.open);
        }
        self.write_header(body);
        let (id, slots) = (self.id, self.slots);
        (self.id, self.slots) = (PackId(id.0 + 1), 0);
        Some(Pack { id, slots, bytes: self.open.split().freeze() })
    }

    /// Leaves room for the header; memory for a whole pack is taken at once.
    fn begin(&mut self) {
        if self.open.is_empty() {
            self.open.reserve(pack_bytes_most(self.batch, self.coder.is_sealed()));
            self.open.put_bytes(0, HEADER_BYTES);
        }
    }

    fn write_header(&mut self, body: usize) {
        let runs = (self.open.len() - body) / RUN_BYTES;
        debug_assert_eq!(
            body,
            HEADER_BYTES + usize::from(self.slots) * slot_bytes(self.coder.is_sealed())
        );
        let mut header = &mut self.open[..CHECKED_BYTES];
        header.put_slice(&MAGIC);
        header.put_u8(FORMAT);
        header.put_u8(self.coder.is_sealed().into());
        header.put_u16(self.slots);
        header.put_u16(runs as u16);
        header.put_u16(0);
        header.put_u32(self.coder.lane());
        header.put_u64(self.id.0);
        header.put_slice(&self.migration.0);
        let check = header_check(&self.open[..CHECKED_BYTES], &self.open[body..]);
        self.open[CHECKED_BYTES..HEADER_BYTES].copy_from_slice(&check.to_be_bytes());
    }
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

/// Bytes that a slot has behind its head.
pub(super) fn payload_bytes(sealed: bool) -> usize {
    PAGE_BYTES + if sealed { TAG_BYTES } else { 0 }
}
