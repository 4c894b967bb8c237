//! In step every change of a guest goes over the link at once: it makes no more of them than the link takes.
//!
//! Without this a guest that writes more than its migration may send passes that limit, and blocks and memory get
//! nothing meanwhile. Used by the mover. Deliberately not here: how much that is (`policy::pace::writes_in_step`), and
//! what a VM may write at any time (`fuse::limit`).

use std::sync::{Arc, Mutex, PoisonError};

use lifeboat_protocol::units::BytesPerSec;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::mirror::Mirror;
use crate::disk::fuse::DiskLimit;
use crate::tasks;

/// Keeps a guest within the link, as long as this lives.
pub struct Within {
    held: Arc<Held>,
    task: JoinHandle<()>,
}

/// `None` once nobody is to be held any more.
struct Held(Mutex<Option<DiskLimit>>);

impl Held {
    fn keep_within(&self, network: Option<BytesPerSec>) {
        let limit = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        limit.iter().for_each(|limit| limit.keep_within(network));
    }

    fn let_go(&self) {
        let limit = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        limit.iter().for_each(|limit| limit.keep_within(None));
    }
}

impl Within {
    /// What `limit` lets pass goes by `mirror`, over a link that takes `rate`; `None` in it is no limit.
    #[must_use]
    pub fn keep(
        limit: DiskLimit,
        mirror: &Mirror,
        mut rate: watch::Receiver<Option<BytesPerSec>>,
    ) -> Self {
        let held = Arc::new(Held(Mutex::new(Some(limit))));
        let mut mirroring = mirror.mirroring();
        let task = tasks::spawn("within the link", {
            let held = Arc::clone(&held);
            async move {
                loop {
                    let in_step = *mirroring.borrow_and_update();
                    held.keep_within(rate.borrow_and_update().filter(|_| in_step));
                    let changed = tokio::select! {
                        changed = mirroring.changed() => changed,
                        changed = rate.changed() => changed,
                    };
                    // Nobody sends any more.
                    if changed.is_err() {
                        return held.let_go();
                    }
                }
            }
        });
        Self { held, task }
    }
}

impl Drop for Within {
    fn drop(&mut self) {
        self.task.abort();
        self.held.let_go();
    }
}
