//! A guest whose pages were still on their way when the agent before this one ended: its QEMU waits,
//! and is taken up by QMP's `migrate-recover`.

use std::time::Duration;

use lifeboat_protocol::agent::MigrationProgress;
use lifeboat_protocol::terms::Mode;
use lifeboat_scatter_gather::link::pages::PageKey;
use lifeboat_scatter_gather::seal::KEY_BYTES;
use tokio::net::UnixStream;

use super::DestinationTask;
use super::gathering::journal::Journal;
use super::gathering::recover::{arrived_again, shake_hands};
use super::gathering::{Gathering, Known, Reachable};
use crate::clock;
use crate::handover::destination::{Outcome, State};
use crate::handover::gathering as kept;
use crate::qemu::qmp::{MigrationStatus, Qmp};
use crate::qemu::stream::{RamBlock, RamLayout};
use crate::source::Failure;

/// How long QEMU may take to notice that its stream has ended.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

impl DestinationTask {
    /// Goes on with a guest that runs here and whose pages were still on their way.
    pub async fn take_up_running(mut self) -> MigrationProgress {
        match self.context.guests.qmp(&self.vm).await {
            Ok(qmp) => self.qmp = Some(qmp),
            Err(error) => tracing::error!(%error, "QMP of a guest without all of its memory"),
        }
        if let Err(failure) = self.gather_again().await {
            let reason = failure.line();
            tracing::error!(reason, "the guest's pages cannot be taken up again");
            self.progress.update(|progress| progress.reason = reason);
        }
        let outcome = self.gather_on(Outcome::Running).await;
        self.report(outcome);
        self.progress.now()
    }

    /// Takes the stream to QEMU up again, where its guest's pages are on their way; nothing where
    /// they are not.
    pub(super) async fn gather_again(&mut self) -> Result<(), Failure> {
        let Some(kept) = self.context.store.gathering(&self.vm)? else { return Ok(()) };
        let Some(qmp) = self.qmp.clone() else { return Err(Failure::GuestGone) };
        self.mode = match kept.scattered {
            Some(_) => Mode::ScatterGather,
            None => Mode::PostCopy,
        };
        if until_paused(&qmp).await? == MigrationStatus::Completed {
            return Ok(self.context.store.end_gathering(&self.vm)?);
        }
        let path = self.stream_socket()?;
        let _ = std::fs::remove_file(&path);
        qmp.migrate_recover(&format!("unix:{}", path.display())).await?;
        let mut qemu = UnixStream::connect(&path).await.map_err(Failure::Socket)?;
        let layout = layout(&kept)?;
        let bitmaps = shake_hands(&mut qemu, &layout).await?;
        let journal = self.context.store.journal_path(&self.vm);
        let (journal, told) = Journal::go_on(&journal)?;
        let mut arrived = arrived_again(layout, kept.ram, &bitmaps, &told)?;
        let reachable = match &kept.scattered {
            None => None,
            Some(stores) => {
                arrived.key = key(stores);
                let identity = self.context.identity.as_ref();
                let places = stores.stores.clone();
                Some(Reachable::reach_again(places, &kept.migration, identity).await)
            }
        };
        let committed = matches!(self.machine.state(), State::Owning | State::Over(_));
        let known = Known { journal, told: Some(told), committed };
        tracing::warn!(pages = arrived.elsewhere, "the guest's pages are gathered on");
        let limit = self.gather_limit;
        self.gathering = Some(Gathering::start(arrived, qemu, limit, reachable, known));
        Ok(())
    }

    /// COMMIT is durable: may the guest run, as far as its pages go?
    pub(super) async fn commit_gathering(&self) -> Result<(), Failure> {
        match &self.gathering {
            Some(gathering) => gathering.commit().await,
            None if self.context.store.gathering(&self.vm)?.is_none() => Ok(()),
            None => Err(Failure::ArrivalEnded("its pages cannot be brought")),
        }
    }
}

async fn until_paused(qmp: &Qmp) -> Result<MigrationStatus, Failure> {
    let deadline = clock::now() + PAUSE_LIMIT;
    loop {
        let status = qmp.query_migrate().await?.status;
        match status {
            MigrationStatus::PostcopyPaused | MigrationStatus::Completed => return Ok(status),
            MigrationStatus::Failed => return Err(Failure::Qemu { status, detail: None }),
            _ if clock::now() > deadline => {
                let what = "notice that its stream has ended";
                return Err(Failure::Slow { what, limit: PAUSE_LIMIT });
            }
            _ => tokio::time::sleep(POLL).await,
        }
    }
}

fn layout(kept: &kept::Gathering) -> Result<RamLayout, Failure> {
    let block = |block: &kept::Block| RamBlock { name: block.name.clone(), pages: block.pages };
    Ok(RamLayout::new(kept.layout.iter().map(block).collect(), 0)?)
}

fn key(stores: &kept::InStores) -> Option<PageKey> {
    let mut key = [0; KEY_BYTES];
    for (at, byte) in key.iter_mut().enumerate() {
        *byte = u8::from_str_radix(stores.key.get(at * 2..at * 2 + 2)?, 16).ok()?;
    }
    Some(PageKey(key))
}
