//! Work at a later time, on threads of its own: deadlines of replies, and writes that a limit holds
//! back, so that no thread that reads requests ever waits for either.
//!
//! Used by `request` and `limit`. Deliberately not here: repeated work, and order among jobs that
//! are due at the same time.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use crate::clock;

type Job = Box<dyn FnOnce() + Send>;

/// Names a job that was handed in, so that it can be called off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket {
    due: Instant,
    number: u64,
}

#[derive(Default)]
struct Jobs {
    waiting: BTreeMap<Ticket, Job>,
    count: u64,
    ended: bool,
}

/// The jobs; a handle that can be cloned. The threads end with [`Self::end`].
#[derive(Clone, Default)]
pub(crate) struct Later {
    shared: Arc<(Mutex<Jobs>, Condvar)>,
}

impl Later {
    /// Starts `threads` of them.
    ///
    /// # Errors
    /// When the system has no more threads.
    pub(crate) fn start(threads: usize) -> io::Result<Self> {
        let later = Self::default();
        for number in 0..threads {
            let own = later.clone();
            let name = format!("fuse-later-{number}");
            std::thread::Builder::new().name(name).spawn(move || own.run())?;
        }
        Ok(later)
    }

    fn jobs(&self) -> std::sync::MutexGuard<'_, Jobs> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `job` at `due`, or as soon after as a thread is free. After the end, never: then the job
    /// is dropped.
    pub(crate) fn at(&self, due: Instant, job: impl FnOnce() + Send + 'static) -> Ticket {
        let mut jobs = self.jobs();
        jobs.count += 1;
        let ticket = Ticket { due, number: jobs.count };
        if !jobs.ended {
            jobs.waiting.insert(ticket, Box::new(job));
            drop(jobs);
            self.shared.1.notify_one();
        }
        ticket
    }

    /// Calls a job off, unless it has begun.
    pub(crate) fn cancel(&self, ticket: Ticket) {
        let job = self.jobs().waiting.remove(&ticket);
        // Outside the lock: what a job owns may hand in work when it is dropped.
        drop(job);
    }

    /// Ends the threads once they are idle; jobs that are not due yet are dropped.
    pub(crate) fn end(&self) {
        let mut jobs = self.jobs();
        jobs.ended = true;
        let waiting = std::mem::take(&mut jobs.waiting);
        drop(jobs);
        drop(waiting);
        self.shared.1.notify_all();
    }

    fn run(&self) {
        while let Some(job) = self.next() {
            job();
        }
    }

    /// Waits for the next job that is due; `None` after the end.
    fn next(&self) -> Option<Job> {
        let mut jobs = self.jobs();
        loop {
            if jobs.ended {
                return None;
            }
            let now = clock::now();
            let first = jobs.waiting.first_key_value().map(|(ticket, _)| ticket.due);
            jobs = match first {
                Some(due) if due <= now => return jobs.waiting.pop_first().map(|(_, job)| job),
                Some(due) => {
                    let waited = self.shared.1.wait_timeout(jobs, due - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.shared.1.wait(jobs).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn jobs_are_done_when_they_are_due_and_not_when_called_off() {
        let later = Later::start(1).unwrap();
        let (done, doing) = mpsc::channel();
        let now = clock::now();
        let say = |what: &'static str| {
            let done = done.clone();
            move || done.send(what).unwrap()
        };
        later.at(now + Duration::from_millis(40), say("second"));
        let ticket = later.at(now + Duration::from_millis(30), say("never"));
        later.at(now, say("first"));
        later.cancel(ticket);
        assert_eq!(doing.recv().unwrap(), "first");
        assert_eq!(doing.recv().unwrap(), "second");
        assert!(clock::now() >= now + Duration::from_millis(40));
        later.end();
        later.at(now, say("after the end"));
        drop(done);
        assert!(doing.recv_timeout(Duration::from_secs(5)).is_err());
    }
}
