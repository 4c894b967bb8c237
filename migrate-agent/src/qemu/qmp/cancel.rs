//! Ends a migration that is under way in QEMU, whatever it is doing.
//!
//! QEMU's `migrate_cancel` has a gap with `pause-before-switchover` (met with 7.2 about once in 20 times at that
//! moment; not with 10.0 in 300):
//!
//! ```text
//!  migration thread                                main loop
//!  stops the guest, holds the big lock             migrate_cancel waits for the lock
//!  no cancel yet: gives the lock up                active -> cancelling; nobody waits yet: wakes nobody
//!  active -> pre-switchover: it is not active
//!  waits to be woken                               `cancelling` for ever, the guest stands still
//! ```
//!
//! A `migrate-continue` that names the state `cancelling` wakes it. One that nobody waits for does no harm: QEMU
//! eats those that are left before it waits the next time.

use std::time::Duration;

use super::{MigrationStatus, Qmp, QmpError};
use crate::clock;

/// It is looked this often how far QEMU is.
const POLL: Duration = Duration::from_millis(5);
/// A cancelled migration that has not ended by then is woken, and again after as long.
const WAKE_AFTER: Duration = Duration::from_millis(50);

impl Qmp {
    /// Cancels the migration that is under way, if any, and waits for its end: `false` where it has not come
    /// within `limit`. A guest that QEMU has stopped for it is resumed by QEMU, a moment later.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn migrate_end(&self, limit: Duration) -> Result<bool, QmpError> {
        let (began, mut last) = (clock::now(), None);
        loop {
            let status = self.query_migrate().await?.status;
            match (status, last) {
                (MigrationStatus::Cancelling, Some(at)) if clock::now() > at + WAKE_AFTER => {
                    tracing::debug!("a cancelled migration that has not ended is woken");
                    // Refused where it has just ended.
                    let _ = self.migrate_wake_cancelled().await;
                    last = Some(clock::now());
                }
                // Whoever has cancelled it.
                (MigrationStatus::Cancelling, None) => last = Some(clock::now()),
                (MigrationStatus::Cancelling, Some(_)) => {}
                (
                    MigrationStatus::Setup
                    | MigrationStatus::Active
                    | MigrationStatus::PreSwitchover
                    | MigrationStatus::Device,
                    _,
                ) => {
                    if last.is_none() {
                        self.migrate_cancel().await?;
                        last = Some(clock::now());
                    }
                }
                _ => return Ok(true),
            }
            if began.elapsed() > limit {
                return Ok(false);
            }
            tokio::time::sleep(POLL).await;
        }
    }
}
