//! The memory that a FUSE server works in and leaves behind: request slots and the table of open
//! files, in a memory file that outlives the process.
//!
//! Used by `serve` (which reads requests into slots) and by `holder`'s clients (who take over).
//!
//! ```text
//!  0      header: magic, number of slots
//!  4 KiB  open files: 256 x {request that opened it, node, flags, -}
//!  16 KiB slot 0: control page { state, outcome, ... last 80 bytes: request } data 1 MiB
//!         slot 1: ...
//! ```
//!
//! # Why requests live in a file
//!
//! A guest's write that a FUSE server has read from `/dev/fuse` and not answered is lost to the
//! next server: kernels before 6.9 have no way to ask for it again, and the guest waits for ever. So
//! each request is read straight into shared memory, where it stays until it is answered. Whoever
//! takes over finds it there and does it (again). A change that was made is marked [`State::Done`]
//! *before* it is answered, so that an answered write is never made a second time, over a newer one.
//!
//! The header and `fuse_write_in` are 80 bytes, and a slot's request begins 80 bytes before a page:
//! a write's data is page-aligned as O_DIRECT wants it, and is never copied.
//!
//! # Why slots are in place before they are used
//!
//! The kernel copies a request into a slot while we may be killed. Were a page of the slot not mapped
//! just then, the dying process could not fault it in any more: the kernel would fail the request, and
//! the guest would see an I/O error. So each slot is mapped, and kept so, before it is first read into.
//!
//! Deliberately not here: what a request means.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::abi::BEFORE_WRITE_DATA;

/// The most bytes that one read or write carries: what the kernel caps it to.
pub const MAX_DATA: usize = 1 << 20;

const MAGIC: u64 = u64::from_le_bytes(*b"lifeboa1");
const PAGE: usize = 4096;
const FILES_AT: usize = PAGE;
const FILES: usize = 256;
const SLOTS_AT: usize = 4 * PAGE;
const SLOT: usize = PAGE + MAX_DATA;

/// Why a memory file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The system refuses.
    #[error("cannot map the FUSE server's memory")]
    System(#[from] Errno),
    /// It is another program's, or another version's.
    #[error("what was handed over is not the memory of a FUSE server of this version")]
    Foreign,
}

/// How far a slot's request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// No request in it.
    Free,
    /// A request may be in it, and is not done.
    Taken,
    /// Done and perhaps not answered: bytes, or a negative error number.
    Done(i64),
}

/// The mapping. Shared by all slots.
struct Map {
    start: NonNull<u8>,
    length: usize,
    file: OwnedFd,
}

// SAFETY: the mapping stays until `Map` is dropped; words are only touched as atomics, and the
// bytes of a slot only through its one `Slot`.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    fn new(file: OwnedFd, length: usize) -> Result<Self, MemoryError> {
        // SAFETY: a fresh mapping at an address that the kernel chooses; nothing else is there.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(MemoryError::Foreign)?;
        Ok(Self { start, length, file })
    }

    /// Maps the pages from `at` on and keeps them mapped. As far as the system lets us: without, a
    /// kill in the wrong instant may cost the guest an I/O error.
    fn put_in_place(&self, at: usize, length: usize) {
        assert!(at.is_multiple_of(PAGE) && at + length <= self.length, "pages of the memory");
        // SAFETY: inside the mapping; neither call changes what is in it.
        let done = unsafe {
            let start = self.start.as_ptr().add(at).cast();
            rustix::mm::madvise(start, length, Advice::LinuxPopulateWrite)
                .and(rustix::mm::mlock(start, length))
        };
        if let Err(errno) = done {
            tracing::debug!(%errno, "a slot's memory cannot be kept in place");
        }
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.length, "a word lies inside the memory");
        // SAFETY: in bounds and aligned; all uses of words are atomic, and slots' data has none.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(at).cast()) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// The slots that nobody uses, the one used last on top: its bytes are still in the CPU's cache.
struct Free {
    slots: Vec<usize>,
    /// Threads that wait for one. Rust's `Condvar` enters the kernel even to wake nobody, which
    /// every request would pay for.
    waiting: usize,
}

/// A FUSE server's memory; a handle that can be cloned.
#[derive(Clone)]
pub(crate) struct Memory {
    map: Arc<Map>,
    free: Arc<(Mutex<Free>, Condvar)>,
    /// Which slots this process has mapped.
    in_place: Arc<[AtomicBool]>,
    /// Held while a free entry of the table of open files is looked for.
    opening: Arc<Mutex<()>>,
}

/// An open file, as the table keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OpenFile {
    /// Its node.
    pub node: u64,
    /// The flags of open(2).
    pub flags: u32,
}

impl Memory {
    /// Fresh memory for `slots` requests at a time, 1 to 1024.
    ///
    /// # Errors
    /// When the system has none.
    pub(crate) fn create(slots: usize) -> Result<Self, MemoryError> {
        let slots = slots.clamp(1, 1024);
        let file = rustix::fs::memfd_create("lifeboat-disk", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, (SLOTS_AT + slots * SLOT) as u64)?;
        let map = Map::new(file, SLOTS_AT + slots * SLOT)?;
        map.word(8).store(slots as u64, Ordering::Relaxed);
        map.word(0).store(MAGIC, Ordering::Release);
        Ok(Self::of(map, slots, (0..slots).collect()))
    }

    /// The memory that another server left, and the slots with requests that it had not answered.
    /// Nobody else may be using it.
    ///
    /// # Errors
    /// When it cannot be mapped or is none of ours.
    pub(crate) fn attach(file: OwnedFd) -> Result<(Self, Vec<Slot>), MemoryError> {
        let length = usize::try_from(rustix::fs::fstat(&file)?.st_size).unwrap_or(0);
        if length < SLOTS_AT + SLOT {
            return Err(MemoryError::Foreign);
        }
        let map = Map::new(file, length)?;
        let slots = map.word(8).load(Ordering::Acquire);
        let expected = usize::try_from(slots).ok().and_then(|n| n.checked_mul(SLOT));
        if map.word(0).load(Ordering::Acquire) != MAGIC || expected != Some(length - SLOTS_AT) {
            return Err(MemoryError::Foreign);
        }
        let slots = slots as usize;
        let memory = Self::of(map, slots, Vec::new());
        let (busy, free): (Vec<_>, Vec<_>) =
            (0..slots).map(|i| memory.slot(i)).partition(Slot::has_request);
        drop(free);
        Ok((memory, busy))
    }

    fn of(map: Map, slots: usize, free: Vec<usize>) -> Self {
        Self {
            map: Arc::new(map),
            in_place: (0..slots).map(|_| AtomicBool::new(false)).collect(),
            free: Arc::new((Mutex::new(Free { slots: free, waiting: 0 }), Condvar::new())),
            opening: Arc::default(),
        }
    }

    /// The memory's file, to be kept by whoever outlives this process.
    #[must_use]
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.map.file.as_fd()
    }

    /// A slot of one's own; waits while all are in use, and so does the kernel then.
    #[must_use]
    pub(crate) fn claim(&self) -> Slot {
        let (free, freed) = &*self.free;
        let mut list = free.lock().unwrap_or_else(PoisonError::into_inner);
        let index = loop {
            if let Some(index) = list.slots.pop() {
                break index;
            }
            list.waiting += 1;
            list = freed.wait(list).unwrap_or_else(PoisonError::into_inner);
            list.waiting -= 1;
        };
        drop(list);
        let slot = self.slot(index);
        if !self.in_place[index].swap(true, Ordering::Relaxed) {
            self.map.put_in_place(slot.at(), SLOT);
        }
        slot.clear();
        slot.set_state(State::Taken);
        slot
    }

    fn slot(&self, index: usize) -> Slot {
        Slot { memory: self.clone(), index }
    }

    fn file_word(&self, handle: u64, word: usize) -> Option<&AtomicU64> {
        let index = usize::try_from(handle).ok()?.checked_sub(1).filter(|i| *i < FILES)?;
        Some(self.map.word(FILES_AT + index * 32 + word * 8))
    }

    /// Enters a file that request `unique` opens and returns its handle. The same request made
    /// again gets the same one. `None`: too many files are open.
    #[must_use]
    pub(crate) fn open(&self, unique: u64, file: OpenFile) -> Option<u64> {
        let _alone = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        let held_by =
            |owner: u64| (1..=FILES as u64).find(|h| self.opener(*h).is_some_and(|o| o == owner));
        let handle = held_by(unique).or_else(|| held_by(0))?;
        self.file_word(handle, 1)?.store(file.node, Ordering::Relaxed);
        self.file_word(handle, 2)?.store(file.flags.into(), Ordering::Relaxed);
        self.file_word(handle, 0)?.store(unique, Ordering::Release);
        Some(handle)
    }

    fn opener(&self, handle: u64) -> Option<u64> {
        self.file_word(handle, 0).map(|word| word.load(Ordering::Acquire))
    }

    /// What `handle` stands for.
    #[must_use]
    pub(crate) fn file_of(&self, handle: u64) -> Option<OpenFile> {
        self.opener(handle).filter(|opener| *opener != 0)?;
        let node = self.file_word(handle, 1)?.load(Ordering::Relaxed);
        let flags = self.file_word(handle, 2)?.load(Ordering::Relaxed);
        Some(OpenFile { node, flags: flags as u32 })
    }

    /// Forgets `handle`.
    pub(crate) fn close(&self, handle: u64) {
        if let Some(opener) = self.file_word(handle, 0) {
            opener.store(0, Ordering::Release);
        }
    }

    /// All open files.
    #[must_use]
    pub(crate) fn open_files(&self) -> Vec<OpenFile> {
        (1..=FILES as u64).filter_map(|handle| self.file_of(handle)).collect()
    }
}

/// One slot, owned: nobody else touches its bytes. Dropping it frees it, so it is dropped only when
/// its request is answered.
pub(crate) struct Slot {
    memory: Memory,
    index: usize,
}

impl Slot {
    fn at(&self) -> usize {
        SLOTS_AT + self.index * SLOT
    }

    /// How far its request is.
    #[must_use]
    pub(crate) fn state(&self) -> State {
        match self.memory.map.word(self.at()).load(Ordering::Acquire) {
            0 => State::Free,
            2 => {
                let outcome = self.memory.map.word(self.at() + 8).load(Ordering::Relaxed);
                State::Done(outcome.cast_signed())
            }
            _ => State::Taken,
        }
    }

    /// Notes how far it is.
    pub(crate) fn set_state(&self, state: State) {
        let number = match state {
            State::Free => 0,
            State::Taken => 1,
            State::Done(outcome) => {
                let word = self.memory.map.word(self.at() + 8);
                word.store(outcome.cast_unsigned(), Ordering::Relaxed);
                2
            }
        };
        self.memory.map.word(self.at()).store(number, Ordering::Release);
    }

    /// Whether a request was read into it and not answered.
    fn has_request(&self) -> bool {
        self.state() != State::Free && self.request().iter().take(4).any(|byte| *byte != 0)
    }

    /// Makes the request's length zero: an interrupted read leaves no request behind.
    fn clear(&self) {
        self.memory.map.word(self.at() + PAGE - BEFORE_WRITE_DATA).store(0, Ordering::Relaxed);
    }

    /// The request and what follows it.
    #[must_use]
    pub(crate) fn request(&self) -> &[u8] {
        // SAFETY: inside this slot, which `self` alone owns; nothing writes while it is borrowed.
        unsafe { std::slice::from_raw_parts(self.request_start(), BEFORE_WRITE_DATA + MAX_DATA) }
    }

    /// Where a request is read into.
    pub(crate) fn request_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `request`, borrowed exclusively.
        unsafe {
            std::slice::from_raw_parts_mut(self.request_start(), BEFORE_WRITE_DATA + MAX_DATA)
        }
    }

    fn request_start(&self) -> *mut u8 {
        // SAFETY: the offset lies inside the mapping, which has `slots * SLOT` bytes from SLOTS_AT.
        unsafe { self.memory.map.start.as_ptr().add(self.at() + PAGE - BEFORE_WRITE_DATA) }
    }

    /// A write's data, or what a read has filled; begins at a page.
    #[must_use]
    pub(crate) fn data(&self) -> &[u8] {
        &self.request()[BEFORE_WRITE_DATA..]
    }

    /// Where a read's answer goes.
    pub(crate) fn data_mut(&mut self) -> &mut [u8] {
        &mut self.request_mut()[BEFORE_WRITE_DATA..]
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.clear();
        self.set_state(State::Free);
        let (free, freed) = &*self.memory.free;
        let mut list = free.lock().unwrap_or_else(PoisonError::into_inner);
        list.slots.push(self.index);
        let waited_for = list.waiting > 0;
        drop(list);
        if waited_for {
            freed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_length(slot: &mut Slot, length: u32) {
        slot.request_mut()[..4].copy_from_slice(&length.to_ne_bytes());
    }

    fn copy_of(memory: &Memory) -> OwnedFd {
        memory.file().try_clone_to_owned().unwrap()
    }

    #[test]
    fn what_was_not_answered_is_found_by_the_next_server() {
        let memory = Memory::create(4).unwrap();
        let mut taken = memory.claim();
        write_length(&mut taken, 48);
        taken.data_mut()[..5].copy_from_slice(b"hello");
        let mut done = memory.claim();
        write_length(&mut done, 80);
        done.set_state(State::Done(-5));
        let waiting = memory.claim();
        let mut answered = memory.claim();
        write_length(&mut answered, 48);
        drop(answered);
        let (next, found) = Memory::attach(copy_of(&memory)).unwrap();
        let states: Vec<State> = found.iter().map(Slot::state).collect();
        assert_eq!(states.len(), 2);
        assert!(states.contains(&State::Taken) && states.contains(&State::Done(-5)));
        assert!(found.iter().any(|slot| slot.data().starts_with(b"hello")));
        std::mem::forget((taken, done, waiting));
        drop(found);
        assert!((0..4).map(|_| next.claim()).all(|slot| slot.state() == State::Taken));
    }

    #[test]
    fn a_repeated_open_gets_the_same_handle_and_a_closed_one_is_used_again() {
        let memory = Memory::create(1).unwrap();
        let file = OpenFile { node: 7, flags: 2 };
        let first = memory.open(100, file).unwrap();
        assert_eq!(memory.open(100, file), Some(first));
        let second = memory.open(101, OpenFile { node: 8, flags: 0 }).unwrap();
        assert_ne!(first, second);
        assert_eq!(memory.file_of(first), Some(file));
        memory.close(first);
        assert_eq!(memory.file_of(first), None);
        assert_eq!(memory.open_files(), [OpenFile { node: 8, flags: 0 }]);
        assert_eq!(memory.file_of(0), None);
        assert_eq!(memory.file_of(u64::MAX), None);
    }

    #[test]
    fn more_files_than_the_table_holds_are_refused() {
        let memory = Memory::create(1).unwrap();
        for unique in 1..=FILES as u64 {
            assert!(memory.open(unique, OpenFile { node: 1, flags: 0 }).is_some());
        }
        assert_eq!(memory.open(1000, OpenFile { node: 1, flags: 0 }), None);
    }

    #[test]
    fn foreign_memory_is_refused() {
        let other = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&other, (SLOTS_AT + SLOT) as u64).unwrap();
        assert!(matches!(Memory::attach(other), Err(MemoryError::Foreign)));
    }
}
