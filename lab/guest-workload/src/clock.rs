//! The clock: the one file of this program that reads time.
//!
//! The drivers (`guest`, `client`) take a reading here and hand it on as a value, so that every
//! core (pattern, stream, pace, gaps) is tested without sleeping. No sleeping here either: the
//! drivers wait in `poll`.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A monotonic clock that counts from the program's start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    /// Starts counting now.
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the monotonic clock")]
    pub(crate) fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Time since the start, never going backwards.
    pub(crate) fn now(&self) -> Duration {
        self.start.elapsed()
    }
}

/// Wall-clock time since the Unix epoch, for reports that are read beside other programs' logs.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
pub(crate) fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
