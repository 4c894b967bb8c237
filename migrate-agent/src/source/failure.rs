//! Why a migration does not come to COMMIT, on either side.
//!
//! The drivers `source` and `destination` meet everything that can go wrong, so this names it all;
//! whatever it is, it ends with the guest running at its source. Deliberately not here: who says so to
//! whom.

use std::time::Duration;

use lifeboat_protocol::units::Bytes;

use super::disk::DiskFailure;
use super::scattering::ScatteringError;
use crate::destination::JournalError;
use crate::disk::rooms::RoomError;
use crate::guests::GuestError;
use crate::handover::store::StoreError;
use crate::link::LinkError;
use crate::postcopy::GatherError;
use crate::postcopy::absorb::AbsorbError;
use crate::qemu::qmp::{MigrationStatus, QmpError};
use crate::qemu::ram::RamError;
use crate::qemu::stream::{PageAt, StreamError};
use crate::stores::StoreLinkError;

/// Why a migration did not come to COMMIT.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The link.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// QEMU.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The guest.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The disk with the ownership records.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A local socket.
    #[error("cannot take QEMU's stream")]
    Socket(#[source] std::io::Error),
    /// QEMU gave up.
    #[error("QEMU ended the migration as `{status:?}`{}", .detail.as_ref().map(|d| format!(": {d}")).unwrap_or_default())]
    Qemu {
        /// Its migration status.
        status: MigrationStatus,
        /// What it said.
        detail: Option<String>,
    },
    /// The destination's QEMU did not come up in time, with the disks there.
    #[error("the destination did not bring its QEMU up within {} s; see the log of its agent", .0.as_secs())]
    NoArrival(Duration),
    /// QEMU did not do something in time.
    #[error("QEMU did not {what} within {} ms", .limit.as_millis())]
    Slow {
        /// What it should have done.
        what: &'static str,
        /// The time it had.
        limit: Duration,
    },
    /// Somebody stopped it.
    #[error("cancelled: {0}")]
    Cancelled(String),
    /// The destination stopped it.
    #[error("the destination refused: {0}")]
    Refused(String),
    /// It would not have come to an end.
    #[error(
        "pre-copy does not converge: {0}; retry with less load in the guest, more bandwidth, or `--mode cold`"
    )]
    NotConverging(lifeboat_policy::stop::GiveUpReason),
    /// Its own host does not follow it.
    #[error(
        "the guest writes its memory faster than its host takes it in{}; retry with less load in the guest, or `--mode cold`",
        if *.slowed { ", also slowed down" } else { ", and its owner forbids to slow it down (forbid_throttling)" }
    )]
    Outrun {
        /// Whether it was slowed down.
        slowed: bool,
    },
    /// The disks that leave.
    #[error(transparent)]
    Disk(#[from] DiskFailure),
    /// The disks that arrive.
    #[error(transparent)]
    Arrival(#[from] RoomError),
    /// The last of the disks.
    #[error("the rest of the disks did not come within {} s after the guest stopped", .0.as_secs())]
    Unsealed(Duration),
    /// The guest went away by itself.
    #[error("the guest's QEMU has gone")]
    GuestGone,
    /// The stores.
    #[error(transparent)]
    Scatter(#[from] ScatteringError),
    /// A store that the destination cannot reach.
    #[error("the destination cannot gather from its stores")]
    Stores(#[from] StoreLinkError),
    /// The stream cannot be carried page by page.
    #[error(transparent)]
    Absorb(#[from] AbsorbError),
    /// The guest's memory cannot be read from outside.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The link does not take what cannot wait at the source.
    #[error(
        "{queued} of the guest's devices wait for the link, more than the {budget} set aside; use pre-copy, or give more"
    )]
    Budget {
        /// What waits.
        queued: Bytes,
        /// What may wait.
        budget: Bytes,
    },
    /// The destination asks for what the guest does not have.
    #[error("{0} is asked for, which the guest does not have")]
    NoSuchPage(PageAt),
    /// The stream at the destination.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// What the destination was told does not fit together.
    #[error(transparent)]
    Gather(#[from] GatherError),
    /// What was told of the guest's pages.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// QEMU cannot take a guest in whose memory follows later.
    #[error(
        "QEMU cannot fetch pages on demand on this host (its user needs userfaultfd: `sysctl vm.unprivileged_userfaultfd=1`, or from QEMU 8.0 on access to /dev/userfaultfd)"
    )]
    NoPostCopy(#[source] QmpError),
    /// QEMU gave up what it was given page by page.
    #[error("QEMU has ended the guest's arrival: {0}")]
    ArrivalEnded(&'static str),
}

impl Failure {
    /// The intermediary at which it failed; empty where it was none.
    #[must_use]
    pub fn store_host(&self) -> &str {
        match self {
            Self::Stores(error) | Self::Scatter(ScatteringError::Link(error)) => error.host(),
            _ => "",
        }
    }

    /// The whole chain of causes in one line, for reports.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let text = error.to_string();
            if !line.contains(&text) {
                line.push_str(": ");
                line.push_str(&text);
            }
            cause = error.source();
        }
        line
    }
}
