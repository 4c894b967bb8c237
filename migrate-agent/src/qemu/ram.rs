//! A guest's memory, seen from outside: found in QEMU's mappings, read through `/proc`.
//!
//! Used by `measure/`, and by `source/` to serve the pages of a stopped guest. Reading does not populate pages: what `/proc/PID/pagemap` calls neither
//! present nor swapped is zero, and is not touched. The guest goes on meanwhile, so two reads
//! of one page may differ; that is what is measured. Writing is not here.
//!
//! Serving needs memory that lies nowhere else ([`Ram::find`]): what another process has put into a
//! shared file is not in QEMU's pagemap, and would be taken for zeroes. Measuring looks at any.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use lifeboat_protocol::units::{Bytes, PAGE_BYTES};

use super::procfs;

/// Bits of a pagemap entry (Documentation/admin-guide/mm/pagemap): present, swapped.
const POPULATED: u64 = 1 << 63 | 1 << 62;
const ENTRY_BYTES: u64 = 8;
/// How often mappings are read for one that is not among them.
const LOOKS_MOST: usize = 5;
/// `HUGETLBFS_MAGIC` of linux/magic.h, in statfs(2)'s `f_type`.
const HUGETLBFS: rustix::fs::FsWord = 0x9584_58f6;

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

/// What lies behind a guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behind {
    /// Nothing: it is QEMU's own.
    Nothing,
    /// A file, or memory that other processes may have too (memfd).
    File,
    /// Huge pages, each of so much.
    HugePages(Bytes),
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
    /// Finds the memory of the guest of process `pid`, by its size; QEMU's own memory only.
    ///
    /// # Errors
    /// When there is not exactly one such mapping, or it cannot be read.
    pub fn find(pid: u32, size: Bytes) -> Result<Self, RamError> {
        let found = looked(pid, |maps| only(pid, size, own(maps, size)))?;
        Self::open(pid, found)
    }

    /// As [`Self::find`]; where QEMU has no memory of its own of that size, memory that lies in a file
    /// or in huge pages.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub fn find_any(pid: u32, size: Bytes) -> Result<(Self, Behind), RamError> {
        let (range, behind) = looked(pid, |maps| {
            let own = own(maps, size);
            match own.is_empty() {
                true => only(pid, size, in_files(pid, maps, size)),
                false => Ok((only(pid, size, own)?, Behind::Nothing)),
            }
        })?;
        Ok((Self::open(pid, range)?, behind))
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

/// Looks at the mappings, and again where what is looked for is not among them. In about one of ten
/// guests that had been started half a second before, the memory was not there at the first look. Why is
/// not known; mappings are read piece by piece, and may change meanwhile (proc_pid_maps(5)).
fn looked<T>(
    pid: u32,
    find: impl Fn(&[procfs::Mapping]) -> Result<T, RamError>,
) -> Result<T, RamError> {
    let mut looks = 0;
    loop {
        let maps = procfs::maps(pid).map_err(|source| RamError::Read { pid, source })?;
        looks += 1;
        match find(&maps) {
            Err(RamError::NotFound { found: 0, .. }) if looks < LOOKS_MOST => {
                tracing::debug!(pid, looks, mappings = maps.len(), "memory not among the mappings");
            }
            found => return found,
        }
    }
}

fn own(maps: &[procfs::Mapping], size: Bytes) -> Vec<Range<u64>> {
    let fits = |m: &&procfs::Mapping| {
        m.writable && m.name.is_empty() && m.range.end - m.range.start == size.0
    };
    maps.iter().filter(fits).map(|m| m.range.clone()).collect()
}

fn only<T>(pid: u32, size: Bytes, mut found: Vec<T>) -> Result<T, RamError> {
    match (found.pop(), found.len()) {
        (Some(one), 0) => Ok(one),
        (last, others) => {
            let found = others + usize::from(last.is_some());
            Err(RamError::NotFound { pid, found, size })
        }
    }
}

/// Mappings of files that may be the guest's memory.
fn in_files(pid: u32, maps: &[procfs::Mapping], size: Bytes) -> Vec<(Range<u64>, Behind)> {
    let named = maps.iter().filter(|m| m.writable && !m.name.is_empty());
    let fits = |m: &procfs::Mapping| {
        let behind = behind(pid, &m.range)?;
        // A file of huge pages is of whole ones; the guest's memory need not be.
        let whole = match behind {
            Behind::HugePages(page) => size.0.next_multiple_of(page.0),
            Behind::File | Behind::Nothing => size.0,
        };
        let range = m.range.start..m.range.start + size.0;
        (m.range.end - m.range.start == whole).then_some((range, behind))
    };
    named.filter_map(fits).collect()
}

/// What a mapping with a name lies in; `None` for `[heap]` and the like, which are no files. The
/// kernel's own link to the file leads there even where its name has gone.
fn behind(pid: u32, range: &Range<u64>) -> Option<Behind> {
    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", range.start, range.end);
    let system = rustix::fs::statfs(link.as_str()).ok()?;
    Some(match system.f_type == HUGETLBFS {
        true => Behind::HugePages(Bytes(u64::try_from(system.f_bsize).ok()?)),
        false => Behind::File,
    })
}
