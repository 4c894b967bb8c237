//! A guest's memory, seen from outside: found in QEMU's mappings, read through `/proc`.
//!
//! Used by `measure/`, and by `source/` to serve the pages of a stopped guest. Reading does not populate pages: what `/proc/PID/pagemap` calls neither
//! present nor swapped is zero, and is not touched. The guest goes on meanwhile, so two reads
//! of one page may differ; that is what is measured. Writing is not here.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use lifeboat_protocol::units::{Bytes, PAGE_BYTES};

use super::procfs;

/// Bits of a pagemap entry (Documentation/admin-guide/mm/pagemap): present, swapped.
const POPULATED: u64 = 1 << 63 | 1 << 62;
const ENTRY_BYTES: u64 = 8;

/// Why a guest's memory cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// No mapping of that size, or several.
    #[error(
        "process {pid} has {found} mappings of {size}: the guest's memory cannot be told from them"
    )]
    NotFound {
        /// QEMU.
        pid: u32,
        /// How many there are.
        found: usize,
        /// The guest's memory.
        size: Bytes,
    },
    /// The process has gone, or may not be looked into.
    #[error("the memory of process {pid} cannot be read")]
    Read {
        /// QEMU.
        pid: u32,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The memory of a guest.
#[derive(Debug)]
pub struct Ram {
    pid: u32,
    range: Range<u64>,
    memory: File,
    pagemap: File,
}

impl Ram {
    /// Finds the memory of the guest of process `pid`, by its size.
    ///
    /// # Errors
    /// When there is not exactly one such mapping, or it cannot be read.
    pub fn find(pid: u32, size: Bytes) -> Result<Self, RamError> {
        let maps = procfs::maps(pid).map_err(|source| RamError::Read { pid, source })?;
        let fits = |m: &&procfs::Mapping| {
            m.writable && m.name.is_empty() && m.range.end - m.range.start == size.0
        };
        let mut found: Vec<_> = maps.iter().filter(fits).map(|m| m.range.clone()).collect();
        match (found.pop(), found.len()) {
            (Some(range), 0) => Self::open(pid, range),
            (last, others) => {
                let found = others + usize::from(last.is_some());
                Err(RamError::NotFound { pid, found, size })
            }
        }
    }

    /// The memory of process `pid` at `range`, which is of whole pages.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(pid: u32, range: Range<u64>) -> Result<Self, RamError> {
        let open = |file| {
            File::open(format!("/proc/{pid}/{file}"))
                .map_err(|source| RamError::Read { pid, source })
        };
        Ok(Self { pid, range, memory: open("mem")?, pagemap: open("pagemap")? })
    }

    /// Its pages.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        (self.range.end - self.range.start) / PAGE_BYTES
    }

    /// Whether each of the pages `first..first + count` holds anything at all.
    ///
    /// # Errors
    /// When the process has gone.
    pub fn populated(&self, first: u64, count: u64) -> Result<Vec<bool>, RamError> {
        let mut bytes = vec![0; usize::try_from(count * ENTRY_BYTES).unwrap_or(0)];
        let at = (self.range.start / PAGE_BYTES + first) * ENTRY_BYTES;
        self.pagemap.read_exact_at(&mut bytes, at).map_err(|source| self.failed(source))?;
        let entry = |bytes: &[u8; 8]| u64::from_ne_bytes(*bytes) & POPULATED != 0;
        let (entries, _) = bytes.as_chunks::<8>();
        Ok(entries.iter().map(entry).collect())
    }

    /// Reads pages from `first` on into `buffer`, whose length is of whole pages.
    ///
    /// # Errors
    /// When the process has gone.
    pub fn read(&self, first: u64, buffer: &mut [u8]) -> Result<(), RamError> {
        let at = self.range.start + first * PAGE_BYTES;
        self.memory.read_exact_at(buffer, at).map_err(|source| self.failed(source))
    }

    const fn failed(&self, source: io::Error) -> RamError {
        RamError::Read { pid: self.pid, source }
    }
}
