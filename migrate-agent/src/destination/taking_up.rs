//! A guest whose pages were still on their way when the agent before this one ended: its QEMU waits,
//! and is taken up by QMP's `migrate-recover`; out of band, by the monitor that was kept open
//! (`qemu::rescue`), where its main loop waits for one of the pages itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::agent::MigrationProgress;
use lifeboat_protocol::terms::Mode;
use lifeboat_scatter_gather::link::Frame;
use lifeboat_scatter_gather::link::pages::PageKey;
use lifeboat_scatter_gather::seal::KEY_BYTES;
use tokio::net::UnixStream;

use super::DestinationTask;
use super::gathering::index;
use super::gathering::journal::{Journal, JournalError};
use super::gathering::recover::{TakenUp, arrived_again, shake_hands};
use super::gathering::{Again, Gathering, Known, Reachable};
use crate::clock;
use crate::handover::destination::{Outcome, State};
use crate::handover::gathering as kept;
use crate::qemu::qmp::{MigrationStatus, Qmp};
use crate::qemu::stream::{RamBlock, RamLayout};
use crate::source::Failure;

/// How long QEMU may take to notice that its stream has ended.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);
/// A monitor that is silent is asked again after so long.
const SILENT_AGAIN: Duration = Duration::from_secs(1);

impl DestinationTask {
    /// Goes on with a guest that runs here and whose pages were still on their way.
    pub async fn take_up_running(mut self) -> MigrationProgress {
        self.follow_again();
        self.reach_qemu().await;
        if let Err(failure) = self.gather_again().await {
            let reason = failure.line();
            tracing::error!(reason, "the guest's pages cannot be taken up again");
            self.progress.update(|progress| progress.reason = reason);
        }
        let outcome = self.gather_on(Outcome::Running).await;
        let outcome = self.rest_on(outcome).await;
        self.report(outcome);
        self.progress.now()
    }

    /// Reaches the monitor of a QEMU that lives. One that is silent is not dead, and must not be taken
    /// for it: the guest would be called lost, and its pages be given up. QEMU is silent while a device
    /// waits for a page that only we can bring.
    pub(super) async fn reach_qemu(&mut self) {
        while self.context.guests.lives(&self.vm) {
            let (guests, vm) = (Arc::clone(&self.context.guests), self.vm.clone());
            match self.meanwhile(async move { guests.qmp(&vm).await }).await {
                Ok(qmp) => {
                    self.qmp = Some(qmp);
                    self.progress.update(|progress| progress.reason.clear());
                    return;
                }
                Err(error) => {
                    let (vm, host) = (&self.vm, &self.context.host);
                    tracing::warn!(%vm, %error, "its QEMU lives and its monitor is silent; asking on");
                    let reason = format!(
                        "the QEMU of {vm} lives at {host} and its monitor does not answer ({error}); it is asked on. \
                         If this stays, end that QEMU: what becomes of {vm} then is told here"
                    );
                    self.progress.update(|progress| progress.reason = reason);
                }
            }
            match self.gather_out_of_band().await {
                Ok(false) => {}
                Ok(true) => tracing::warn!("its pages are gathered on, past its main loop"),
                Err(failure) => {
                    tracing::warn!(reason = %failure.line(), "not past its main loop, either");
                }
            }
            self.wait_for_qemu().await;
        }
    }

    /// Takes the stream up of a QEMU whose main loop waits for one of the pages. Whether it has begun.
    async fn gather_out_of_band(&mut self) -> Result<bool, Failure> {
        if self.gathering.is_some() {
            return Ok(false);
        }
        let Some(kept) = self.context.store.gathering(&self.vm)? else { return Ok(false) };
        let path = self.fresh_socket()?;
        let uri = format!("unix:{}", path.display());
        self.context.guests.recover_by_kept_monitor(&self.vm, &uri).await?;
        self.take_stream_up(kept, &path).await?;
        Ok(true)
    }

    fn fresh_socket(&self) -> Result<PathBuf, Failure> {
        let path = self.stream_socket()?;
        let _ = std::fs::remove_file(&path);
        Ok(path)
    }

    /// A moment in which whoever comes is heard.
    async fn wait_for_qemu(&mut self) {
        if let Ok(input) = tokio::time::timeout(SILENT_AGAIN, self.inputs.recv()).await {
            self.take_input_meanwhile(input).await;
        }
    }

    /// Takes the stream to QEMU up again, where its guest's pages are on their way; nothing where
    /// they are not.
    pub(super) async fn gather_again(&mut self) -> Result<(), Failure> {
        if self.gathering.is_some() {
            // By the monitor that was kept open.
            return Ok(());
        }
        let Some(kept) = self.context.store.gathering(&self.vm)? else { return Ok(()) };
        let Some(qmp) = self.qmp.clone() else { return Err(Failure::GuestGone) };
        if until_paused(&qmp).await? == MigrationStatus::Completed {
            return Ok(self.context.store.end_gathering(&self.vm)?);
        }
        let path = self.fresh_socket()?;
        qmp.migrate_recover(&format!("unix:{}", path.display())).await?;
        self.take_stream_up(kept, &path).await
    }

    /// QEMU listens at `path` for what it lacks.
    async fn take_stream_up(&mut self, kept: kept::Gathering, path: &Path) -> Result<(), Failure> {
        self.mode = match kept.scattered {
            Some(_) => Mode::ScatterGather,
            None => Mode::PostCopy,
        };
        let mut qemu = UnixStream::connect(path).await.map_err(Failure::Socket)?;
        let layout = layout(&kept)?;
        let TakenUp { bitmaps, answers, wanted } = shake_hands(&mut qemu, &layout).await?;
        let (mut journal, mut told) = self.what_was_told()?;
        let key = kept.scattered.as_ref().and_then(key);
        let reachable = match &kept.scattered {
            None => None,
            Some(stores) => {
                let identity = self.context.identity.as_ref();
                let places = stores.stores.clone();
                Some(Reachable::reach_again(places, &kept.migration, identity).await)
            }
        };
        // The source, which would tell it again, may have gone.
        if let (true, Some(reachable), Some(key)) = (kept.released, &reachable, &key)
            && !told.contains(&Frame::Scattered)
        {
            told = index::rebuilt(reachable, key).await;
            journal = Journal::begin(&self.context.store.journal_path(&self.vm))
                .map_err(JournalError::from)?;
            for frame in &told {
                journal.add(frame).map_err(JournalError::from)?;
            }
        }
        let mut arrived = arrived_again(layout, kept.ram, &bitmaps, &told)?;
        arrived.key = key;
        let committed = matches!(self.machine.state(), State::Owning | State::Over(_));
        let known = Known { journal, again: Some(Again { told, answers, wanted }), committed };
        tracing::warn!(pages = arrived.elsewhere, "the guest's pages are gathered on");
        let limit = self.gather_limit;
        self.gathering = Some(Gathering::start(arrived, qemu, limit, reachable, known));
        for (purpose, reader, writer) in std::mem::take(&mut self.lanes) {
            self.take_lane(purpose, reader, writer).await;
        }
        Ok(())
    }

    /// What the source has told of the guest's pages. A journal that cannot be read is begun anew: it is told again,
    /// by the source or by the stores.
    fn what_was_told(&self) -> Result<(Journal, Vec<Frame>), Failure> {
        let path = self.context.store.journal_path(&self.vm);
        match Journal::go_on(&path) {
            Ok(found) => Ok(found),
            Err(error) => {
                let error = crate::vms::chain(&error);
                tracing::error!(vm = %self.vm, error, "it is asked for anew");
                Ok((Journal::begin(&path).map_err(JournalError::from)?, Vec::new()))
            }
        }
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
