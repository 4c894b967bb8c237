//! A guest's disk under load, by which it proves that no block of it was harmed.
//!
//! Used by the guest's loop, on a thread of its own: a write that waits for a throttled or mirrored
//! disk must not keep the heartbeat waiting. The content of every block follows from one number, as
//! in [`crate::pattern`]; that number is in the guest's memory and moves with it, so a destination
//! that runs with yesterday's disk and today's memory is found out by the next check.
//!
//! Blocks are written and read past the guest's page cache (O_DIRECT), or a check would only look at
//! memory. Deliberately not here: file systems.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use crate::clock::Clock;
use crate::pace::Pace;
use crate::pattern::Walk;
use crate::sys::{discard, wait};

/// Blocks between two flushes.
const FLUSH_EVERY: u64 = 64;
/// What O_DIRECT asks of memory, bytes.
const ALIGNMENT: usize = 4096;
/// What a part that is discarded in turn is filled with.
const FILLED: u8 = 0xa5;
const BURST: Duration = Duration::from_millis(200);
const IDLE: Duration = Duration::from_millis(10);
/// Between filling and discarding.
const TRIM_EVERY: Duration = Duration::from_secs(1);

/// What the thread has done so far.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) writes: AtomicU64,
    pub(crate) checks: AtomicU64,
    pub(crate) errors: AtomicU64,
}

/// What is done to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    /// So much of it is written, bytes.
    pub(crate) bytes: u64,
    /// With each write, bytes.
    pub(crate) block: u64,
    /// Writes per second.
    pub(crate) rate: u64,
    /// Blocks that are read back for 100 that are written.
    pub(crate) check_percent: u64,
    /// Behind what is written so: filled and discarded in turn, each second; bytes, of whole blocks.
    pub(crate) trim: u64,
}

/// A disk at work.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) counts: Arc<Counts>,
    wrong: Receiver<String>,
}

impl Disk {
    /// Begins to write to the begin of `device`, and to check what was written.
    pub(crate) fn start(device: &Path, plan: Plan, seed: u64) -> io::Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(device)?;
        let counts = Arc::new(Counts::default());
        let (tell, wrong) = channel();
        let mut load = Load::new(file, plan, seed, Arc::clone(&counts));
        std::thread::Builder::new().name("disk".to_owned()).spawn(move || load.run(&tell))?;
        Ok(Self { counts, wrong })
    }

    /// What was found wrong since the last question.
    pub(crate) fn wrong(&self) -> impl Iterator<Item = String> {
        self.wrong.try_iter()
    }
}

/// A block's worth of memory where O_DIRECT wants it.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    fn new(length: usize) -> Self {
        let bytes = vec![0; length + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        Self { bytes, start, length }
    }

    fn block(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

struct Load {
    file: File,
    plan: Plan,
    walk: Walk,
    buffer: Aligned,
    /// Hundredths of a check that are due.
    checks_due: u64,
    /// What all of the part that is discarded in turn has to be now.
    trimmed_to: u8,
    counts: Arc<Counts>,
}

impl Load {
    fn new(file: File, plan: Plan, seed: u64, counts: Arc<Counts>) -> Self {
        let walk = Walk::over(plan.bytes / plan.block, seed);
        let buffer = Aligned::new(usize::try_from(plan.block).unwrap_or(ALIGNMENT));
        Self { file, plan, walk, buffer, checks_due: 0, trimmed_to: 0, counts }
    }

    fn run(&mut self, tell: &Sender<String>) {
        let counts = Arc::clone(&self.counts);
        let say = |error: io::Error, doing: &str| {
            count_error(&counts);
            // Nobody listens only when the guest ends.
            let _ = tell.send(format!("disk: cannot {doing}: {error}"));
        };
        for _ in 0..self.walk.pages() {
            if let Err(error) = self.write_next() {
                return say(error, "fill it");
            }
        }
        let clock = Clock::start();
        let mut pace = Pace::new(self.plan.rate, BURST, 1, clock.now());
        let mut trim_at = clock.now() + TRIM_EVERY;
        let found = |wrong: Option<String>| {
            if let Some(wrong) = wrong {
                count_error(&counts);
                let _ = tell.send(wrong);
            }
        };
        loop {
            if self.plan.trim > 0 && clock.now() >= trim_at {
                trim_at = clock.now() + TRIM_EVERY;
                match self.trim_next() {
                    Ok(wrong) => found(wrong),
                    Err(error) => return say(error, "discard"),
                }
            }
            let due = pace.due(clock.now());
            pace.took(due);
            for _ in 0..due {
                if let Err(error) = self.write_next() {
                    return say(error, "write");
                }
                self.checks_due += self.plan.check_percent;
                while self.checks_due >= 100 {
                    self.checks_due -= 100;
                    match self.check_next() {
                        Ok(wrong) => found(wrong),
                        Err(error) => return say(error, "read"),
                    }
                }
            }
            // An interrupted wait is a shorter one.
            let _ = wait(&[], IDLE);
        }
    }

    fn write_next(&mut self) -> io::Result<()> {
        let (page, version) = self.walk.write_next();
        let block = self.buffer.block();
        self.walk.fill(page, version, block);
        self.file.write_all_at(block, page * self.plan.block)?;
        if self.walk.writes().is_multiple_of(FLUSH_EVERY) {
            self.file.sync_data()?;
        }
        self.counts.writes.store(self.walk.writes(), Ordering::Relaxed);
        Ok(())
    }

    /// Looks at what was filled or discarded the last time, and does the other; says where it is wrong.
    fn trim_next(&mut self) -> io::Result<Option<String>> {
        let (begin, end) = (self.plan.bytes, self.plan.bytes + self.plan.trim);
        let places = || (begin..end).step_by(usize::try_from(self.plan.block).unwrap_or(ALIGNMENT));
        for at in places() {
            let block = self.buffer.block();
            self.file.read_exact_at(block, at)?;
            if let Some(found) = block.iter().find(|byte| **byte != self.trimmed_to) {
                let expected = self.trimmed_to;
                let what = format!("disk byte {at} and on: {found} for {expected} (discarded: 0)");
                return Ok(Some(what));
            }
        }
        self.trimmed_to ^= FILLED;
        if self.trimmed_to == 0 {
            return discard(&self.file, begin, self.plan.trim).map(|()| None);
        }
        for at in places() {
            let block = self.buffer.block();
            block.fill(FILLED);
            self.file.write_all_at(block, at)?;
        }
        Ok(None)
    }

    fn check_next(&mut self) -> io::Result<Option<String>> {
        let (page, version) = self.walk.check_next();
        let block = self.buffer.block();
        self.file.read_exact_at(block, page * self.plan.block)?;
        self.counts.checks.fetch_add(1, Ordering::Relaxed);
        let wrong = self.walk.first_wrong(page, version, block);
        Ok(wrong.map(|word| format!("disk block {page} word {word}: version {version} expected")))
    }
}

fn count_error(counts: &Counts) {
    counts.errors.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_is_not_what_was_written_is_found() {
        let path = std::env::temp_dir().join(format!("disk-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.unwrap();
        const BLOCK: u64 = 8192;
        let (bytes, block, trim) = (8 * BLOCK, BLOCK, 0);
        let plan = Plan { bytes, block, rate: 1, check_percent: 200, trim };
        let mut load = Load::new(file, plan, 5, Arc::default());
        (0..11).for_each(|_| load.write_next().unwrap());
        assert!((0..8).all(|_| load.check_next().unwrap().is_none()));
        // The block of an earlier version, as a migration that lost an update would leave it.
        let (mut old, at) = (vec![0; BLOCK as usize], 3 * BLOCK);
        load.file.read_exact_at(&mut old, at).unwrap();
        (0..8).for_each(|_| load.write_next().unwrap());
        load.file.write_all_at(&old, at).unwrap();
        let wrong: Vec<String> = (0..8).filter_map(|_| load.check_next().unwrap()).collect();
        assert_eq!(wrong.len(), 1, "{wrong:?}");
        assert!(wrong[0].contains("block 3"), "{wrong:?}");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_was_filled_and_is_not_so_any_more_is_found() {
        let path = std::env::temp_dir().join(format!("trimmed-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let (file, bytes, block, trim) = (file.unwrap(), 8192, 4096, 8192);
        file.set_len(bytes + trim).unwrap();
        let plan = Plan { bytes, block, rate: 1, check_percent: 200, trim };
        let mut load = Load::new(file, plan, 5, Arc::default());
        assert_eq!(load.trim_next().unwrap(), None);
        load.file.write_all_at(&[0], bytes + 5000).unwrap();
        let wrong = load.trim_next().unwrap().unwrap();
        assert!(wrong.contains("byte 12288 and on: 0 for 165"), "{wrong}");
        std::fs::remove_file(path).unwrap();
    }
}
