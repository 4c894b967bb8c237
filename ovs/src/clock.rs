//! The one place of this crate that reads a clock; sessions are handed `now`.

use std::time::Instant;

#[expect(clippy::disallowed_methods, reason = "the drivers' clock, read nowhere else")]
pub(crate) fn now() -> Instant {
    Instant::now()
}
