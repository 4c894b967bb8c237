//! The one place in the agent that reads the clocks of this machine.
//!
//! Everything else takes a time as a value, so that it can be tested without waiting.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Now, by the monotonic clock: for deadlines and for time spans.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the monotonic clock")]
#[must_use]
pub fn now() -> Instant {
    Instant::now()
}

/// Now, as time since the Unix epoch: for what is compared with QEMU's time stamps or written
/// down. A clock before the epoch counts as the epoch.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
#[must_use]
pub fn unix_now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Blocks the calling thread. Only for threads of our own (`measure/`), never inside a task.
#[expect(clippy::disallowed_methods, reason = "paces the measuring thread, which may block")]
pub fn pause_thread(time: Duration) {
    std::thread::sleep(time);
}
