//! The one place of this room that reads the clock.
//!
//! The driver asks here and hands the answer to the machines as a value. Wall-clock time, because
//! an evacuation outlives the controller's process and its journal must be read by the next one.

use serde::{Deserialize, Serialize};

/// Milliseconds since the Unix epoch.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct UnixMs(pub u64);

impl UnixMs {
    /// As time since 1970.
    #[must_use]
    pub const fn time(self) -> std::time::Duration {
        std::time::Duration::from_millis(self.0)
    }

    /// Milliseconds from `earlier` to here; zero when the clock was set back meanwhile.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Now, by the machine's clock.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the one place that reads the clock")]
pub fn now() -> UnixMs {
    let elapsed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    UnixMs(elapsed.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)))
}
