//! The process in which the disks of a VM arrive that may follow it, as the agent sees it: started,
//! watched, started again when it has died, asked.
//!
//! `disk.rs` and `resting.rs` use it. Deliberately not here: what it does (`disk::process::arrival`),
//! and when QEMU is swapped.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::ids::VmId;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;

use crate::disk::local::LocalDisk;
use crate::disk::process::client::{ANSWER_LIMIT, Mover, MoverClientError, Movers};
use crate::disk::process::control::{Reply, Report, Request, Stage};
use crate::disk::rooms::DiskRooms;

/// It is asked so often how far it is, while a paused guest may wait for that, and later.
const LOOK_EVERY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(200));
/// From one attempt to start it again to the next.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Making a whole disk durable may take so long.
const SETTLE_LIMIT: Duration = Duration::from_secs(600);

/// What is known of it.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// What it said last.
    pub(super) report: Option<Report>,
    /// Why it does not answer, where it does not.
    pub(super) lost: Option<String>,
}

/// The process.
pub(super) struct Following {
    reach: Reach,
    maps: PathBuf,
    seen: watch::Receiver<Seen>,
    watching: JoinHandle<()>,
}

impl Drop for Following {
    fn drop(&mut self) {
        self.watching.abort();
    }
}

/// How it is reached, by one at a time: two would start it twice.
#[derive(Clone)]
struct Reach {
    movers: Movers,
    vm: VmId,
    alone: Arc<Mutex<()>>,
}

impl Reach {
    async fn mover(&self) -> Result<Mover, MoverClientError> {
        let _alone = self.alone.lock().await;
        let mover = self.movers.reach(&self.vm).await?;
        mover.ok_or_else(|| MoverClientError::Gone(self.vm.clone()))
    }
}

/// Where it is kept which blocks are missing.
pub(super) fn maps(rooms: &DiskRooms, vm: &VmId) -> PathBuf {
    rooms.notes.join("arriving").join(vm.as_str())
}

impl Following {
    /// Starts it for `disks`. What one before it left is of an arrival that did not come to its end.
    pub(super) async fn start(
        movers: &Movers,
        rooms: &DiskRooms,
        vm: &VmId,
        disks: &[LocalDisk],
    ) -> Result<Arc<Self>, MoverClientError> {
        let movers = movers.of_arrivals();
        movers.give_up(vm).await?;
        let maps = maps(rooms, vm);
        let _ = std::fs::remove_dir_all(&maps);
        let mover = movers.start_arriving(vm, disks, maps.clone()).await?;
        Ok(Self::watched(movers, vm, maps, Some(mover)))
    }

    /// The one that an agent before this one started; `None` where there is none.
    pub(super) fn found(movers: &Movers, vm: &VmId) -> Option<Arc<Self>> {
        let movers = movers.of_arrivals();
        let maps = movers.setting(vm)?.maps?;
        Some(Self::watched(movers, vm, maps, None))
    }

    fn watched(movers: Movers, vm: &VmId, maps: PathBuf, mover: Option<Mover>) -> Arc<Self> {
        let reach = Reach { movers, vm: vm.clone(), alone: Arc::default() };
        let (show, seen) = watch::channel(Seen::default());
        let watching = crate::tasks::spawn("arriving disks", watch(reach.clone(), mover, show));
        Arc::new(Self { reach, maps, seen, watching })
    }

    /// What is known of it now.
    pub(super) fn seen(&self) -> Seen {
        self.seen.borrow().clone()
    }

    /// Whether it has come so far.
    pub(super) fn is_at(&self, stage: Stage) -> bool {
        self.seen.borrow().report.as_ref().is_some_and(|report| report.stage >= stage)
    }

    /// Where QEMU opens the disks, by their numbers.
    pub(super) fn mounted(&self) -> BTreeMap<usize, PathBuf> {
        let setting = self.reach.movers.setting(&self.reach.vm);
        setting.map_or_else(BTreeMap::new, |setting| setting.mounted())
    }

    /// Where it takes connections of the source.
    pub(super) fn blocks(&self) -> PathBuf {
        self.reach.movers.blocks(&self.reach.vm)
    }

    /// From now on it takes in what is missing, and nothing else.
    pub(super) async fn own(&self) -> Result<(), MoverClientError> {
        self.ask(&Request::Own, ANSWER_LIMIT).await
    }

    /// Makes durable that nothing is missing.
    pub(super) async fn settle(&self) -> Result<(), MoverClientError> {
        self.ask(&Request::Settle, SETTLE_LIMIT).await
    }

    async fn ask(&self, request: &Request, limit: Duration) -> Result<(), MoverClientError> {
        let reply = self.reach.mover().await?.ask(request, limit).await?;
        debug_assert_eq!(reply, Reply::Done);
        Ok(())
    }

    /// Ends it: the VM will not run here.
    pub(super) async fn end(&self) -> Result<(), MoverClientError> {
        self.watching.abort();
        let _alone = self.reach.alone.lock().await;
        self.reach.movers.give_up(&self.reach.vm).await?;
        let _ = std::fs::remove_dir_all(&self.maps);
        Ok(())
    }
}

async fn watch(reach: Reach, mut mover: Option<Mover>, show: watch::Sender<Seen>) {
    loop {
        let report = match &mut mover {
            Some(mover) => mover.report().await,
            None => Err(MoverClientError::Gone(reach.vm.clone())),
        };
        let pause = match report {
            Ok(report) => {
                let later = report.stage >= Stage::Sealed;
                show.send_replace(Seen { report: Some(report), lost: None });
                if later { LOOK_EVERY.1 } else { LOOK_EVERY.0 }
            }
            Err(_) => match reach.mover().await {
                Ok(again) => {
                    mover = Some(again);
                    LOOK_EVERY.0
                }
                Err(error) => {
                    mover = None;
                    tracing::error!(vm = %reach.vm, %error, "its arriving disks are not served");
                    show.send_modify(|seen| seen.lost = Some(crate::vms::chain(&error)));
                    AGAIN_AFTER
                }
            },
        };
        tokio::time::sleep(pause).await;
    }
}
