//! Disks that go on to an intermediary once their VM runs elsewhere (`--disk scatter`), so that this host is
//! rid of it before the destination has all of them.
//!
//! ```text
//!   remember_store    before the hand-over: an agent after this one goes on
//!   go_on_to_store    RUNNING was heard: all of the images goes, beside what the destination asks for
//!   (the intermediary has all, durably, and says so to the destination, which says RELEASED)
//!   end_storing       it is over, whichever way
//! ```
//!
//! The images do not change any more, so they are sent as a copy ahead of a migration is (`seeding`), by a
//! mover of its own, and sealed. All of them go, also what the destination has by now: it may lose what it has
//! not flushed, and ask again (docs/decisions/0049). Deliberately not here: who has the rest (`resting`).

use std::time::Duration;

use lifeboat_scatter_gather::link::frame::TOKEN_BYTES;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::disk::DiskFailure;
use super::seeding::{self, Told};
use super::{Context, Failure, SourceTask};
use crate::disk::local::LocalDisk;
use crate::registry::disk_stores::ALL_HERE;
use crate::tasks;

/// From an attempt that failed to the next: first, and at most.
const AGAIN_AFTER: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// From when all of it was there to the next look.
const LOOK_AFTER: Duration = Duration::from_secs(10);

/// How far it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ToStore {
    /// Bytes that have still to go; all there can be while that is not known.
    pub(super) left: u64,
    /// Bytes that went.
    pub(super) sent: u64,
    /// Bit/s.
    pub(super) rate: u64,
    /// What went wrong with the last attempt; empty while it goes.
    pub(super) failed: String,
}

impl Default for ToStore {
    fn default() -> Self {
        Self { left: u64::MAX, sent: 0, rate: 0, failed: String::new() }
    }
}

/// Who sends them.
pub(super) struct GoingOn {
    seen: watch::Receiver<ToStore>,
    task: JoinHandle<()>,
}

impl Drop for GoingOn {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl SourceTask {
    /// Where the disks go on to, before they do.
    pub(super) async fn remember_store(&self) -> Result<(), Failure> {
        let Some(storing) = self.order.disk_store.clone() else { return Ok(()) };
        let (store, vm) = (self.context.store.clone(), self.order.vm.clone());
        Ok(tasks::blocking(move || store.write_storing(&vm, &storing)).await?)
    }

    /// Has them go on, and says how far that is; nothing where they stay.
    pub(super) fn go_on_to_store(&mut self) -> ToStore {
        if self.going_on.is_none()
            && let Some(order) = self.store_order()
        {
            let (show, seen) = watch::channel(ToStore::default());
            let going = go_on(self.context.clone(), order, self.local_disks(), show);
            self.going_on =
                Some(GoingOn { seen, task: tasks::spawn("disks to their store", going) });
        }
        self.going_on.as_ref().map_or_else(ToStore::default, |going| going.seen.borrow().clone())
    }

    fn store_order(&self) -> Option<seeding::Order> {
        let storing = self.order.disk_store.as_ref()?;
        Some(seeding::Order {
            seed: storing.migration.clone(),
            vm: self.order.vm.clone(),
            destination: storing.host.clone(),
            page_address: storing.page_address.clone(),
            token: <[u8; TOKEN_BYTES]>::try_from(storing.token.as_slice()).ok()?,
            limit: storing.limit,
            generation: self.machine.next_generation(),
            compares: self.taken_up,
        })
    }

    /// The source is rid of the VM, or keeps it.
    pub(super) async fn end_storing(&mut self) {
        if self.order.disk_store.is_none() {
            return;
        }
        if let Some(mut going) = self.going_on.take() {
            going.task.abort();
            // An aborted task ends with an error, which says just that.
            let _ = (&mut going.task).await;
        }
        let vm = &self.order.vm;
        if let Err(error) = self.context.movers.of_stores().give_up(vm).await {
            tracing::error!(%vm, %error, "what sent its disks to their store stays");
        }
        let (store, vm) = (self.context.store.clone(), vm.clone());
        let forgotten = tasks::blocking(move || store.end_storing(&vm)).await;
        if let Err(error) = forgotten {
            tracing::error!(%error, "it stays written where the disks went");
        }
    }
}

/// Sends them, and goes on looking until this is ended: what is there is known to be kept only once the
/// destination says RELEASED.
async fn go_on(
    context: Context,
    mut order: seeding::Order,
    disks: Vec<LocalDisk>,
    show: watch::Sender<ToStore>,
) {
    let mut again = AGAIN_AFTER.0;
    loop {
        let (told, hears) = mpsc::channel(4);
        let listening = tasks::spawn("how far disks are", listen(hears, show.clone()));
        let sent = seeding::send_whole(&context, &order, &disks, &told).await;
        drop(told);
        let _ = listening.await;
        match sent {
            Ok(()) => {
                tracing::info!(vm = %order.vm, host = %order.destination, "all of its disks is there");
                again = LOOK_AFTER;
            }
            Err(DiskFailure::Transfer(why)) if why == ALL_HERE => {
                show.send_modify(|to| (to.left, to.rate, to.failed) = (0, 0, String::new()));
                again = LOOK_AFTER;
            }
            Err(error) => {
                let error = crate::vms::chain(&error);
                tracing::warn!(vm = %order.vm, host = %order.destination, error, "its disks do not go on");
                let failed = format!("its disks do not go on to {}: {error}", order.destination);
                show.send_modify(|to| (to.left, to.rate, to.failed) = (u64::MAX, 0, failed));
                again = (again * 2).min(AGAIN_AFTER.1);
            }
        }
        // Whatever is there by now, and whoever keeps it.
        order.compares = true;
        tokio::time::sleep(again).await;
    }
}

async fn listen(mut hears: mpsc::Receiver<Told>, show: watch::Sender<ToStore>) {
    while let Some(told) = hears.recv().await {
        let left = if told.comparing { u64::MAX } else { told.left };
        let (sent, rate) = (told.sent, told.rate);
        show.send_replace(ToStore { left, sent, rate, failed: String::new() });
    }
}
