//! How many of a server's threads wait for the kernel's next request, and which ones rest.
//!
//! Used by `server`'s threads. As many requests are with the disk at once as there are threads, so
//! there have to be as many as a guest's queue is deep. But the kernel wakes those that wait for
//! requests in turn, and each has a slot of its own to read into: were all of them to wait there, a
//! guest that writes one block after the other would find another cold megabyte each time.
//!
//! ```text
//!            enter: too many wait already          leave: too few wait
//!   working ------------------------------> resting --------------> waiting --> working
//!      '----------------- enter -------------------------------------^
//! ```
//!
//! So few wait as long as little is asked, more while much is; who rests has no slot. One always
//! waits, unless every thread is working.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Counts {
    waiting: usize,
    working: usize,
    resting: usize,
    ended: bool,
}

impl Counts {
    /// So many may wait: two, so that one is there while the other works, and more for a deep queue,
    /// whose requests come in bursts.
    fn most(&self) -> usize {
        2 + self.working / 4
    }

    /// So many have to.
    fn least(&self) -> usize {
        self.most() / 2
    }
}

/// The threads of one server.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    counts: Mutex<Counts>,
    needed: Condvar,
}

impl Readers {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before a thread waits for a request: rests as long as enough others do. `false`: the mount is
    /// gone.
    #[must_use]
    pub(crate) fn enter(&self) -> bool {
        let mut counts = self.counts();
        while !counts.ended && counts.waiting >= counts.most() {
            counts.resting += 1;
            counts = self.needed.wait(counts).unwrap_or_else(PoisonError::into_inner);
            counts.resting -= 1;
        }
        counts.waiting += 1;
        !counts.ended
    }

    /// It waits no longer: it has a request to work on.
    pub(crate) fn leave(&self) {
        let mut counts = self.counts();
        counts.waiting -= 1;
        counts.working += 1;
        let wakes = counts.resting > 0 && counts.waiting < counts.least();
        drop(counts);
        if wakes {
            self.needed.notify_one();
        }
    }

    /// It has done its work.
    pub(crate) fn done(&self) {
        self.counts().working -= 1;
    }

    /// The mount is gone: nobody rests or waits any more.
    pub(crate) fn end(&self) {
        self.counts().ended = true;
        self.needed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    /// Threads that take their requests from a channel, and are held at work by another.
    fn at_work(requests: usize, threads: usize) -> (usize, usize) {
        let readers = Readers::default();
        let most_waiting = AtomicUsize::new(0);
        let (ask, asked) = mpsc::channel::<()>();
        let asked = Mutex::new(asked);
        let (begin, begun) = mpsc::channel();
        let (hold, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let work = || {
            while readers.enter() {
                most_waiting.fetch_max(readers.counts().waiting, Ordering::SeqCst);
                let request = asked.lock().unwrap().recv();
                if request.is_err() {
                    readers.end();
                    return;
                }
                readers.leave();
                begin.send(()).unwrap();
                // Ends when the other end is dropped.
                let _ = held.lock().unwrap().recv();
                readers.done();
            }
        };
        let together = std::thread::scope(|scope| {
            (0..threads).for_each(|_| drop(scope.spawn(work)));
            (0..requests).for_each(|_| ask.send(()).unwrap());
            // All of them have to be begun while none is done.
            let together = begun.iter().take(requests).count();
            drop((ask, hold));
            together
        });
        (together, most_waiting.load(Ordering::SeqCst))
    }

    #[test]
    fn as_many_requests_are_worked_on_as_there_are_threads() {
        assert_eq!(at_work(20, 20).0, 20);
    }

    #[test]
    fn few_wait_while_little_is_asked() {
        let (together, waited) = at_work(1, 20);
        // One, where the others begin too late on a busy machine.
        assert!(together == 1 && waited <= 2, "{waited}");
    }
}
