//! Disks of VMs between two other hosts that this one keeps (`--disk scatter`; role intermediary).
//!
//! ```text
//!   prepared   room found, recorded; the source is expected
//!   it comes   as a copy ahead does: blocks, compared where this agent has started anew, and a seal
//!   sealed     all of it is here, durably: a mover of our own brings the destination what that lacks, which
//!              tells it that its source may go
//!   released   by the controller, once the destination has all: mover ended, files and record gone
//! ```
//!
//! A store outlives this agent and this host's power: while the destination lacks something it is the only
//! copy beside the image that the source keeps. Deliberately not here: files and records (`disk::store`), who
//! may ask for one, and when it may go.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lifeboat_protocol::agent::{
    DiskStore, DiskStoreStatus, PrepareDestinationRequest, PrepareDiskStoreRequest,
    StartMigrationRequest,
};
use lifeboat_protocol::ids::{Generation, HostId, MigrationId, NameError, VmId};
use lifeboat_protocol::terms::DiskMode;
use lifeboat_protocol::units::{BitsPerSec, Bytes};
use lifeboat_scatter_gather::link::Hello;
use lifeboat_scatter_gather::link::frame::TOKEN_BYTES;
use tokio::task::JoinHandle;

use super::links::same;
use super::{Registry, RegistryError, random_token};
use crate::clock;
use crate::disk::local::{LocalDisk, written_disks};
use crate::disk::process::client::{ANSWER_LIMIT, MoverClientError};
use crate::disk::process::control::{Destination, Limits, Request, Stage};
use crate::disk::store::{DiskStoreError, Record, place};
use crate::disk::sync::receive::Received;
use crate::disk::track::{BLOCK, BlockSize};
use crate::handover::Record as Owned;
use crate::handover::storing::Storing;
use crate::source::Context;
use crate::tasks;

/// It is looked this often whether all has come.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A mover that brings it on is looked after this often, and one that cannot be had is tried again.
const TEND_EVERY: Duration = Duration::from_secs(1);

/// What a source is told that brings again what is here as a whole.
pub(crate) const ALL_HERE: &str = "all of these disks is here";

/// All that are kept here.
pub(super) type DiskStores = HashMap<MigrationId, Kept>;

/// One of them.
pub(super) struct Kept {
    record: Record,
    /// `None`: all of it had come before this agent began.
    received: Option<Arc<Received>>,
    keeping: Option<JoinHandle<()>>,
    /// What is written to the record after it was taken away would bring it back.
    written: Written,
}

/// Whether its record may still be written.
type Written = Arc<Mutex<bool>>;

impl Registry {
    fn disk_stores(&self) -> MutexGuard<'_, DiskStores> {
        self.disk_stores.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for a VM's disks; again is the same room.
    ///
    /// # Errors
    /// When there is none.
    pub async fn prepare_disk_store(
        &self,
        request: &PrepareDiskStoreRequest,
    ) -> Result<DiskStore, RegistryError> {
        let migration = MigrationId::new(request.migration.as_str())?;
        let missing = RegistryError::Invalid { field: "definition", problem: "is missing" };
        let definition = request.definition.as_ref().ok_or(missing)?;
        let vm = VmId::new(definition.name.as_str())?;
        self.must_be_idle(&vm)?;
        if let Some(kept) = self.disk_stores().get(&migration) {
            return Ok(self.told(&kept.record));
        }
        let disks = written_disks(definition, &self.context.rooms.directories).len();
        let (rooms, bytes) = (Arc::clone(&self.context.rooms), Bytes(request.bytes));
        let token = random_token().map_err(|error| crate::source::Failure::Socket(error.into()))?;
        let mut record = Record {
            migration,
            vm,
            source: HostId::new(request.source_host.as_str())?,
            destination: HostId::new(request.destination_host.as_str())?,
            page_address: request.destination_page_address.clone(),
            generation: Generation(request.generation).next(),
            token: token.to_vec(),
            images: Vec::new(),
            bytes,
            since_unix_ms: unix_ms(),
            onward: Some(BitsPerSec(request.onward_bits_per_sec).bytes_per_sec())
                .filter(|limit| limit.0 > 0),
            whole: false,
            block: BLOCK,
        };
        let record = tasks::blocking(move || {
            record.images = place(&rooms, (&record.vm, &record.migration), disks, bytes)?;
            record.write(&rooms.notes)?;
            Ok::<_, DiskStoreError>(record)
        });
        let record = record.await?;
        tracing::info!(migration = %record.migration, vm = %record.vm, %bytes, "room for disks prepared");
        let told = self.told(&record);
        self.keep(record, true);
        Ok(told)
    }

    fn told(&self, record: &Record) -> DiskStore {
        DiskStore {
            host: self.context.host.to_string(),
            page_address: self.page_address.to_string(),
            token: record.token.clone(),
            rate_bits_per_sec: 0,
        }
    }

    fn keep(&self, record: Record, anew: bool) {
        let images = || record.images.clone();
        let received = (!record.whole).then(|| match anew {
            true => Received::new(images()),
            // Something of it may be here: the source compares.
            false => Received::going_on(images()),
        });
        let written: Written = Arc::new(Mutex::new(true));
        let noted = Arc::clone(&written);
        let keeping = keep(self.context.clone(), record.clone(), received.clone(), noted);
        let keeping = Some(tasks::spawn("disks of others", keeping));
        let migration = record.migration.clone();
        self.disk_stores().insert(migration, Kept { record, received, keeping, written });
    }

    /// What an agent before this one kept, or sent to one who keeps it.
    pub(super) fn recover_disk_stores(&self, owned: &BTreeMap<VmId, Owned>) {
        let records = Record::read_all(&self.context.rooms.notes);
        let movers = self.context.movers.of_stores();
        // A hand-over that is taken up goes on with it.
        let goes_on = |vm: &VmId| {
            matches!(
                owned.get(vm),
                Some(Owned::Sending { .. } | Owned::Ceded { confirmed: false, .. })
            )
        };
        for vm in owned.keys().filter(|vm| !goes_on(vm)) {
            if let Err(error) = self.context.store.end_storing(vm) {
                tracing::error!(%vm, %error, "it stays written where its disks went");
            }
        }
        for vm in movers.all() {
            if goes_on(&vm) || records.iter().any(|record| key(record) == vm) {
                continue;
            }
            let movers = movers.clone();
            tasks::spawn("what brought disks on", async move {
                if let Err(error) = movers.give_up(&vm).await {
                    tracing::error!(%vm, %error, "a process for the disks of a VM stays");
                }
            });
        }
        for record in records {
            tracing::info!(?record, "disks of a VM between two hosts are kept on");
            self.keep(record, false);
        }
    }

    /// Who takes in what a source brings; `Some(None)`: all of it is here.
    pub(super) fn expected_disk_store(&self, hello: &Hello) -> Option<Option<Arc<Received>>> {
        let stores = self.disk_stores();
        let Kept { record, received, .. } = stores.get(&hello.migration)?;
        let is_it = record.source == hello.host
            && record.vm == hello.vm
            && record.generation == hello.generation
            && same(&record.token, &hello.token);
        is_it.then(|| received.clone().filter(|received| !received.is_closed()))
    }

    /// Deletes what is kept of a migration, whatever it is; whether anything was.
    ///
    /// # Errors
    /// When something of it stays; ask again.
    pub async fn release_disk_store(&self, migration: &str) -> Result<bool, RegistryError> {
        let migration = MigrationId::new(migration)?;
        let (record, written, keeping) = {
            let mut stores = self.disk_stores();
            let Some(kept) = stores.get_mut(&migration) else { return Ok(false) };
            kept.received.iter().for_each(|received| received.close());
            (kept.record.clone(), Arc::clone(&kept.written), kept.keeping.take())
        };
        if let Some(keeping) = keeping {
            keeping.abort();
            // An aborted task ends with an error, which says just that.
            let _ = keeping.await;
        }
        let movers = self.context.movers.of_stores();
        movers
            .give_up(&key(&record))
            .await
            .map_err(crate::source::disk::DiskFailure::from)
            .map_err(crate::source::Failure::from)?;
        let rooms = Arc::clone(&self.context.rooms);
        let held = tasks::blocking(move || {
            *written.lock().unwrap_or_else(PoisonError::into_inner) = false;
            let held = record.taken() > Bytes::ZERO;
            record.remove(&rooms.notes).map(|()| held)
        });
        let held = held.await?;
        self.disk_stores().remove(&migration);
        tracing::info!(%migration, held_disks = held, "room for disks released");
        Ok(held)
    }

    /// All of them, for the host's description.
    #[must_use]
    pub fn kept_disks(&self) -> Vec<DiskStoreStatus> {
        let now = unix_ms();
        let told = |record: Record| DiskStoreStatus {
            migration: record.migration.to_string(),
            vm: record.vm.to_string(),
            bytes: record.taken().0,
            whole: record.whole,
            age_ms: now.saturating_sub(record.since_unix_ms),
        };
        Record::read_all(&self.context.rooms.notes).into_iter().map(told).collect()
    }
}

/// Who brings what its destination lacks of its disks, once it has all.
pub(super) fn keeper(
    disk: DiskMode,
    request: &PrepareDestinationRequest,
) -> Result<Option<HostId>, NameError> {
    match disk {
        DiskMode::Scatter => HostId::new(request.disk_store_host.as_str()).map(Some),
        DiskMode::Copy | DiskMode::OnDemand => Ok(None),
    }
}

/// Where its disks go on to.
pub(super) fn ordered(
    disk: DiskMode,
    request: &StartMigrationRequest,
) -> Result<Option<Storing>, RegistryError> {
    if disk != DiskMode::Scatter {
        return Ok(None);
    }
    let invalid = |problem| RegistryError::Invalid { field: "disk_store", problem };
    let store = request.disk_store.as_ref().ok_or(invalid("is missing"))?;
    if store.token.len() != TOKEN_BYTES {
        return Err(invalid("has a token that is not 32 bytes long"));
    }
    let limit = BitsPerSec(store.rate_bits_per_sec).bytes_per_sec();
    Ok(Some(Storing {
        migration: MigrationId::new(request.migration.as_str())?,
        host: HostId::new(store.host.as_str())?,
        page_address: store.page_address.clone(),
        token: store.token.clone(),
        limit: Some(limit).filter(|limit| limit.0 > 0),
    }))
}

fn unix_ms() -> u64 {
    u64::try_from(clock::unix_now().as_millis()).unwrap_or(u64::MAX)
}

/// Keeps one until it is released, which ends this.
async fn keep(
    context: Context,
    mut record: Record,
    received: Option<Arc<Received>>,
    written: Written,
) {
    if let Some(received) = received {
        while !received.is_sealed() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        received.close();
        record.whole = true;
        record.block = received.block().unwrap_or_default().bytes();
        while let Err(error) = note(&context, &record, &written).await {
            tracing::error!(%error, "the source has to wait until this is on the disk");
            tokio::time::sleep(TEND_EVERY).await;
        }
        tracing::info!(vm = %record.vm, "all of its disks is here: brought on from here from now on");
    }
    loop {
        if is_deleted(&record) {
            return forget(&context, &record).await;
        }
        if let Err(error) = bring_on(&context, &record).await {
            let error = crate::vms::chain(&error);
            tracing::warn!(vm = %record.vm, error, "its disks are not brought on; tried again");
        }
        tokio::time::sleep(TEND_EVERY).await;
    }
}

async fn note(context: &Context, record: &Record, written: &Written) -> Result<(), DiskStoreError> {
    let (rooms, record, written) =
        (Arc::clone(&context.rooms), record.clone(), Arc::clone(written));
    tasks::blocking(move || {
        let may = written.lock().unwrap_or_else(PoisonError::into_inner);
        if *may { record.write(&rooms.notes) } else { Ok(()) }
    })
    .await
}

/// Under which name its mover runs: two migrations of one VM may be kept, if one of them was given up.
fn key(record: &Record) -> VmId {
    VmId::new(record.migration.as_str()).unwrap_or_else(|_| record.vm.clone())
}

/// Sees to it that a mover brings the destination what that lacks, whenever it can be reached.
async fn bring_on(context: &Context, record: &Record) -> Result<(), MoverClientError> {
    let movers = context.movers.of_stores();
    let name = key(record);
    let mut mover = match movers.reach(&name).await? {
        Some(mover) => mover,
        None => {
            let block = BlockSize::new(record.block).unwrap_or_default();
            movers.in_blocks_of(block).start(&name, &disks(record)).await?
        }
    };
    loop {
        if is_deleted(record) {
            return Ok(());
        }
        if mover.report().await?.stage == Stage::Idle {
            let limits =
                Limits { network: record.onward.map(|limit| limit.0), ..Limits::default() };
            mover.ask(&Request::Limit(limits), ANSWER_LIMIT).await?;
            mover.ask(&Request::Send(goes(context, record)), ANSWER_LIMIT).await?;
        }
        tokio::time::sleep(TEND_EVERY).await;
    }
}

/// Whether somebody has deleted the files of a whole one.
fn is_deleted(record: &Record) -> bool {
    !record.images.iter().any(|image| image.exists())
}

async fn forget(context: &Context, record: &Record) {
    tracing::warn!(?record, "the files of a VM's disks that were kept here have been deleted");
    if let Err(error) = context.movers.of_stores().give_up(&key(record)).await {
        tracing::error!(%error, "what brought them on stays");
    }
    if let Err(error) = record.remove(&context.rooms.notes) {
        tracing::error!(%error, "it stays written that they are kept");
    }
}

fn disks(record: &Record) -> Vec<LocalDisk> {
    let disk = |(number, path): (usize, &std::path::PathBuf)| LocalDisk {
        number,
        path: path.clone(),
        format: "raw".to_owned(),
        read_only: false,
    };
    record.images.iter().enumerate().map(disk).collect()
}

fn goes(context: &Context, record: &Record) -> Destination {
    Destination {
        page_address: record.page_address.clone(),
        host: record.destination.clone(),
        own_host: context.host.clone(),
        migration: record.migration.clone(),
        vm: record.vm.clone(),
        generation: record.generation,
        // Who we are is what our certificate says; the destination gave its token to the source.
        token: vec![0; TOKEN_BYTES],
        compares: false,
        handover_size: 0,
        rests: true,
    }
}
