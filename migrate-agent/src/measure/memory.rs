//! Looks at a guest's memory: how much of it is not zero, and which pages of a sample change.
//!
//! It blocks and reads a lot, so it has a thread of its own: with little claim on the CPU, and
//! with a rest after each stretch, so that the guest does not notice. One page costs about a
//! microsecond and a half: 256 MiB are looked at three times in a fifth of a second.

use std::time::Duration;

use lifeboat_protocol::units::PAGE_BYTES;
use xxhash_rust::xxh3::xxh3_64;

use super::estimate::{self, Changes};
use crate::clock;
use crate::qemu::ram::{Ram, RamError};

/// Pages whose changes are watched: the 95 % interval of a guest that changes 5 % of its pages in
/// the window is then +/- 5 % of its rate.
pub(super) const SAMPLE_PAGES: u64 = 32_768;
/// Larger guests are not read whole for their non-zero pages; the sample tells (1 Mi pages, 4 GiB).
const SCAN_PAGES_MAX: u64 = 1 << 20;
/// Pages read between two rests.
const STRETCH_PAGES: u64 = 256;
const REST: Duration = Duration::from_micros(250);
/// Of the measuring thread: the guest's own have 0.
const NICENESS: i32 = 10;
const PAGE: usize = PAGE_BYTES as usize;

/// What was seen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Seen {
    /// Pages that are not all zero.
    pub(super) non_zero_pages: u64,
    /// What changed.
    pub(super) changes: Changes,
    /// From the first look at a page to the last.
    pub(super) window: Duration,
}

/// Looks at `ram` for about `window`. It blocks for that long: call it on a thread of its own.
///
/// # Errors
/// When the process goes meanwhile.
pub(super) fn look(ram: &Ram, window: Duration, seed: u64) -> Result<Seen, RamError> {
    // Only this thread: on Linux a priority is a thread's. That it is refused is no reason to fail.
    if let Err(errno) = rustix::process::setpriority_process(None, NICENESS) {
        tracing::debug!(%errno, "the measuring thread keeps its priority");
    }
    let non_zero_scanned = match ram.pages() <= SCAN_PAGES_MAX {
        true => Some(scan(ram)?),
        false => None,
    };
    let pages = estimate::sample(ram.pages(), SAMPLE_PAGES, seed);
    let begun = clock::now();
    let first = hashes(ram, &pages)?;
    wait_until(begun + window / 2);
    let second = hashes(ram, &pages)?;
    wait_until(begun + window);
    // Every page is looked at as long after its first look as the first page after its own.
    let window = begun.elapsed();
    let third = hashes(ram, &pages)?;
    let zero = xxh3_64(&[0; PAGE]);
    let in_sample = third.iter().filter(|&&hash| hash != zero).count() as u64;
    let scaled = || in_sample * ram.pages() / (pages.len() as u64).max(1);
    Ok(Seen {
        non_zero_pages: non_zero_scanned.unwrap_or_else(scaled),
        changes: compare(&first, &second, &third),
        window,
    })
}

fn wait_until(time: std::time::Instant) {
    clock::pause_thread(time.saturating_duration_since(clock::now()));
}

fn compare(first: &[u64], second: &[u64], third: &[u64]) -> Changes {
    let mut changes = Changes { sampled: first.len() as u64, ..Changes::default() };
    for ((a, b), c) in first.iter().zip(second).zip(third) {
        changes.first += u64::from(a != b);
        changes.second += u64::from(b != c);
        changes.both += u64::from(a != b && b != c);
    }
    changes
}

fn scan(ram: &Ram) -> Result<u64, RamError> {
    let mut buffer = vec![0; PAGE * STRETCH_PAGES as usize];
    let mut non_zero = 0;
    let mut first = 0;
    while first < ram.pages() {
        let count = STRETCH_PAGES.min(ram.pages() - first);
        let populated = ram.populated(first, count)?;
        for stretch in stretches(&populated) {
            let bytes = &mut buffer[..stretch.len() * PAGE];
            ram.read(first + stretch.start as u64, bytes)?;
            let (pages, _) = bytes.as_chunks::<PAGE>();
            non_zero += pages.iter().filter(|page| !is_zero(page)).count() as u64;
        }
        if populated.contains(&true) {
            clock::pause_thread(REST);
        }
        first += count;
    }
    Ok(non_zero)
}

/// Runs of populated pages.
fn stretches(populated: &[bool]) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = vec![];
    for (index, _) in populated.iter().enumerate().filter(|(_, there)| **there) {
        match runs.last_mut() {
            Some(run) if run.end == index => run.end += 1,
            _ => runs.push(index..index + 1),
        }
    }
    runs
}

fn is_zero(page: &[u8; PAGE]) -> bool {
    let (words, _) = page.as_chunks::<8>();
    words.iter().all(|word| u64::from_ne_bytes(*word) == 0)
}

fn hashes(ram: &Ram, pages: &[u64]) -> Result<Vec<u64>, RamError> {
    let zero = xxh3_64(&[0; PAGE]);
    let mut buffer = [0; PAGE];
    let mut hashes = Vec::with_capacity(pages.len());
    for (index, &page) in pages.iter().enumerate() {
        if index as u64 % STRETCH_PAGES == STRETCH_PAGES - 1 {
            clock::pause_thread(REST);
        }
        let hash = match ram.populated(page, 1)?.contains(&true) {
            false => zero,
            true => {
                ram.read(page, &mut buffer)?;
                xxh3_64(&buffer)
            }
        };
        hashes.push(hash);
    }
    Ok(hashes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    /// Memory of this process that behaves in a known way: `written` pages of `pages` are written
    /// all the time, `constant` are not zero, and the rest was never touched.
    struct Known {
        words: Vec<AtomicU64>,
        pages: usize,
    }

    const WORDS: usize = PAGE / 8;

    impl Known {
        fn new(pages: usize) -> Self {
            // Zeroed by the allocator without being touched, and aligned by hand.
            let layout = vec![0_u64; (pages + 1) * WORDS];
            // An AtomicU64 is a u64 in memory; collecting touches nothing that `vec!` did not.
            let words = layout.into_iter().map(AtomicU64::new).collect();
            Self { words, pages }
        }

        fn skip(&self) -> usize {
            let at = self.words.as_ptr() as usize;
            (at.next_multiple_of(PAGE) - at) / 8
        }

        fn range(&self) -> std::ops::Range<u64> {
            let start = (self.words.as_ptr() as usize + self.skip() * 8) as u64;
            start..start + (self.pages * PAGE) as u64
        }

        fn write(&self, page: usize, value: u64) {
            self.words[self.skip() + page * WORDS].store(value, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_process_of_known_behaviour_is_measured_as_it_behaves() {
        let known = Known::new(16_384);
        for page in 0..4000 {
            known.write(page * 3, 7);
        }
        let ram = Ram::open(std::process::id(), known.range()).unwrap();
        let stop = AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut value = 1;
                while !stop.load(Ordering::Relaxed) {
                    value += 1;
                    // Half of the written pages in odd rounds only.
                    (0..1000).for_each(|page| known.write(page * 3, value));
                    clock::pause_thread(Duration::from_millis(5));
                }
            });
            let seen = look(&ram, Duration::from_millis(400), 1).unwrap();
            stop.store(true, Ordering::Relaxed);
            seen
        });
        assert_eq!(seen.non_zero_pages, 4000);
        assert_eq!(
            seen.changes,
            Changes { sampled: 16_384, first: 1000, second: 1000, both: 1000 }
        );
        assert!(seen.window >= Duration::from_millis(400));
        assert_eq!(estimate::working_set(seen.changes, ram.pages()), 1000);
    }

    #[test]
    fn memory_that_was_never_touched_is_zero_and_stays_untouched() {
        let mapping = tempfile::tempfile().unwrap();
        mapping.set_len(1 << 20).unwrap();
        let runs = stretches(&[false, true, true, false, true]);
        assert_eq!(runs, [1..3, 4..5]);
        assert!(stretches(&[false; 4]).is_empty());
    }

    #[test]
    fn a_process_that_has_gone_is_an_error() {
        let missing = Ram::open(u32::MAX >> 2, 0..4096);
        assert!(matches!(missing, Err(RamError::Read { .. })));
    }
}
