//! The one place in this package that reads the clocks and lets time pass.
//!
//! Experiments measure time; tests wait for something to become true, with a limit, and never for
//! a time that ought to be enough.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Now, for time spans.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the one place that reads the monotonic clock")]
pub fn now() -> Instant {
    Instant::now()
}

/// Now, as time since the epoch.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
pub fn unix_now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Lets the calling thread rest: between two looks, or while traffic flows.
#[expect(clippy::disallowed_methods, reason = "the one place that lets time pass")]
pub fn rest(time: Duration) {
    std::thread::sleep(time);
}

/// Looks every 10 ms until `look` finds something, at most for `limit`.
pub fn wait_for<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = now() + limit;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if now() >= deadline {
            return None;
        }
        rest(Duration::from_millis(10));
    }
}
