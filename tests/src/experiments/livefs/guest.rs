//! The guest of the LiveFS experiments: threads that read and write an image, and go on with it where
//! it moves to.
//!
//! Used by `rig`. What a thread does in a step is the experiment's to say. Deliberately not here: a
//! whole VM, whose memory would be in each time that is measured.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{RwLock, RwLockWriteGuard};

use crate::chance::Chance;
use crate::clock;
use crate::rig::RigError;

/// What a thread has in a step.
pub(super) struct Step<'a> {
    /// The thread's number.
    pub thread: usize,
    /// Since the guest began.
    pub elapsed: Duration,
    /// The image, wherever it is now.
    pub image: &'a File,
    /// The thread's own.
    pub chance: &'a mut Chance,
}

/// What the threads do, and how long they rest after it.
pub(super) type Load = Arc<dyn Fn(Step<'_>) -> io::Result<Duration> + Send + Sync>;

/// A step: when it ended, and how long it took.
pub(super) type Wait = (Instant, Duration);

struct Shared {
    image: RwLock<File>,
    stops: AtomicBool,
    waits: Mutex<Vec<Wait>>,
    failed: Mutex<Option<io::Error>>,
}

/// A guest that runs.
pub(super) struct Guest {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Guest {
    /// Starts so many threads over `image`.
    pub(super) fn start(image: File, threads: usize, load: &Load) -> Self {
        let (stops, waits, failed) = Default::default();
        let shared = Arc::new(Shared { image: RwLock::new(image), stops, waits, failed });
        let began = clock::now();
        let start = |thread| {
            let (shared, load) = (Arc::clone(&shared), Arc::clone(load));
            std::thread::spawn(move || shared.run(thread, began, &load))
        };
        Self { threads: (0..threads).map(start).collect(), shared }
    }

    /// Pauses it: what it has begun ends first. It goes on with what is put in the answer's place.
    pub(super) async fn pause(&self) -> RwLockWriteGuard<'_, File> {
        self.shared.image.write().await
    }

    /// Ends it, and gives each of its steps.
    ///
    /// # Errors
    /// When one of its requests has failed.
    pub(super) fn stop(mut self) -> Result<Vec<Wait>, RigError> {
        self.end();
        let failed = self.shared.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        match failed {
            Some(error) => Err(RigError::io("a request of the guest failed")(error)),
            None => Ok(std::mem::take(
                &mut self.shared.waits.lock().unwrap_or_else(PoisonError::into_inner),
            )),
        }
    }

    fn end(&mut self) {
        self.shared.stops.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

impl Drop for Guest {
    /// Also after an error: a request that is on its way when its server's process exits would keep
    /// the process.
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn run(&self, thread: usize, began: Instant, load: &Load) {
        let mut chance = Chance::from_seed(thread as u64 + 1);
        while !self.stops.load(Ordering::Relaxed) {
            let image = self.image.blocking_read();
            let begin = clock::now();
            let elapsed = begin.duration_since(began);
            let done = load(Step { thread, elapsed, image: &image, chance: &mut chance });
            let end = clock::now();
            drop(image);
            match done {
                Ok(pause) => {
                    let wait = (end, end.duration_since(begin));
                    self.waits.lock().unwrap_or_else(PoisonError::into_inner).push(wait);
                    clock::rest(pause);
                }
                Err(error) => {
                    *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return;
                }
            }
        }
    }
}
