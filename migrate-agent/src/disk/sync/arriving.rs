//! The hook in the destination's FUSE layer: a guest that runs before its disk is complete (LiveFS,
//! section III, phase 5).
//!
//! The destination's FUSE server calls it; it shares [`Received`] with the receiving streams. A read of
//! what is missing asks for it and is answered when it has arrived, off the threads that read requests;
//! a write goes into the image at once, noted as newer than what is to arrive, and what it overwrites as a
//! whole need not arrive; a read of what is just being written there waits for that; a flush makes the map
//! durable first.
//!
//! # A source that does not answer
//!
//! Then a read fails after its deadline. With `rerror=stop`, as the agent starts QEMU, that pauses the
//! guest instead of breaking it, and it goes on when the source is back. Deliberately not here: which
//! host has a block, and when the guest may be swapped to the native path (when nothing is missing).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use tokio::sync::Notify;

use super::incoming::Readiness;
use super::mirror::is_zeroing;
use super::receive::Received;
use crate::clock;
use crate::disk::fuse::{Expiry, Hook, Image, Op, Request};

/// How long a read waits for what is missing: below the half minute after which guests complain.
pub const READ_DEADLINE: Duration = Duration::from_secs(20);

/// The hook.
pub struct Arriving {
    received: Arc<Received>,
    deadline: Duration,
    waiting: Mutex<Vec<(u16, Request)>>,
    asked: Notify,
}

impl Arriving {
    /// For the images of `received`; a read waits at most `deadline`.
    #[must_use]
    pub fn new(received: Arc<Received>, deadline: Duration) -> Arc<Self> {
        let (waiting, asked) = (Mutex::default(), Notify::new());
        Arc::new(Self { received, deadline, waiting, asked })
    }

    /// Answers reads as their blocks arrive; runs as long as the guest is on this mount.
    pub async fn run(&self) {
        let mut arrivals = self.received.arrivals();
        loop {
            tokio::select! {
                changed = arrivals.changed() => {
                    if changed.is_err() { return; }
                }
                () = self.asked.notified() => {}
            }
            self.answer_ready();
        }
    }

    fn answer_ready(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let (still, ready): (Vec<_>, Vec<_>) =
            std::mem::take(&mut *waiting).into_iter().partition(|(disk, request)| {
                !request.is_answered() && !self.is_there(*disk, &request.op())
            });
        *waiting = still;
        drop(waiting);
        // Each is answered as it is dropped, outside the lock: it reads from the disk.
        drop(ready);
    }

    /// Whether all that a read touches is there; what is not is asked for.
    fn is_there(&self, disk: u16, op: &Op) -> bool {
        let Op::Read { offset, length } = *op else { return true };
        let range = offset..offset.saturating_add(length);
        matches!(self.received.readiness(disk, &range), Ok(Readiness::Ready))
    }
}

impl Hook for Arriving {
    fn arrived(&self, request: Request) {
        let Some(disk) = self.received.number_of(request.image().name()) else {
            return request.answer();
        };
        match request.op() {
            op @ Op::Read { .. } => {
                if self.is_there(disk, &op) {
                    return request.answer();
                }
                request.set_deadline(clock::now() + self.deadline);
                self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push((disk, request));
                // It may have arrived since we looked.
                self.asked.notify_one();
            }
            Op::Flush { .. } => match self.received.make_durable(disk) {
                Ok(()) => request.answer(),
                Err(error) => {
                    tracing::error!(%error, disk, "a guest's flush fails");
                    request.fail(Errno::IO);
                }
            },
            op => {
                let Some(range) = op.changes().filter(|_| changes_content(&op)) else {
                    return request.answer();
                };
                // Before it lands: a block that arrives in between must leave it alone.
                if self.received.wrote(disk, &range).is_err() {
                    return request.fail(Errno::IO);
                }
                let whole = landed_whole(&op, request.perform());
                // A disk that is not there has nothing missing.
                let _ = self.received.ended(disk, &range, whole);
                request.answer();
            }
        }
    }

    fn expired(&self, image: &Image, _: &Op) -> Expiry {
        tracing::warn!(image = ?image.name(), "the source does not send what a guest reads");
        self.received.ask_again();
        Expiry::Fail(Errno::IO)
    }
}

/// Space that is set aside has no content of its own: what is missing there still has to come.
fn changes_content(op: &Op) -> bool {
    match *op {
        Op::Allocate { mode, .. } => is_zeroing(mode),
        _ => true,
    }
}

/// Whether all of what a write or discard changes is as its guest wants it. Beyond a new length nothing is
/// to come.
fn landed_whole(op: &Op, outcome: Result<u64, Errno>) -> bool {
    match (*op, outcome) {
        (Op::Write { length, .. }, Ok(written)) => written == length,
        (Op::Allocate { .. }, Ok(_)) => true,
        _ => false,
    }
}
