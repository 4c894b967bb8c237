//! Every migration on this host: starts their tasks, finds them again, answers for them.
//!
//! The gRPC server's migration calls end here, and so do the page links that other agents open.
//! It is the composition of `source.rs` and `destination.rs`; it decides nothing about ownership
//! itself: it asks the records.

mod answer;
pub(crate) mod disk_stores;
mod links;
mod recover;
mod seeds;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lifeboat_protocol::agent::{
    DiskRoom, MigrationProgress, Phase, PrepareDestinationReply, PrepareDestinationRequest,
    ScatterPlan, Side, StartMigrationRequest,
};
use lifeboat_protocol::ids::{Generation, HostId, MigrationId, NameError, VmId};
use lifeboat_protocol::terms::{DiskMode, Mode};
use lifeboat_protocol::units::{BitsPerSec, BytesPerSec};
use lifeboat_scatter_gather::link::frame::TOKEN_BYTES;
use tokio::sync::{mpsc, oneshot, watch};

use crate::destination::disk::TakenBy;
use crate::destination::{self, DestinationTask};
use crate::disk::rooms::Room;
use crate::disk::store::DiskStoreError;
use crate::handover::Record;
use crate::handover::destination::Destination;
use crate::handover::store::StoreError;
use crate::progress::Progress;
use crate::source::{self, Context, Failure, Order, SourceTask};
use crate::stores::{Plan, PlanError};

pub use answer::VmStanding;

/// What the pause should not exceed where the order does not say.
const DOWNTIME_DEFAULT: Duration = Duration::from_millis(300);
/// So long it is watched which segments of a disk are busy where the order does not say; and at most:
/// the destination waits for the source meanwhile.
const WATCH_DEFAULT: Duration = Duration::from_secs(3);
const WATCH_LONGEST: Duration = Duration::from_secs(30);
/// Ended migrations that are still told about.
const ENDED_MAX: usize = 256;

/// Why a command about a migration was not taken.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A name that is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A field that is missing or cannot be.
    #[error("{field} {problem}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Nobody here knows it.
    #[error("migration `{0}` is not known on this host; `lifeboat status` lists those that are")]
    UnknownMigration(MigrationId),
    /// Nobody here knows it.
    #[error("VM `{0}` is not on this host; `lifeboat vms` shows where it is")]
    UnknownVm(VmId),
    /// The VM is being moved already.
    #[error("VM `{vm}` is already in migration `{migration}`; wait for it, or cancel it first")]
    Busy {
        /// The VM.
        vm: VmId,
        /// The migration that it is in.
        migration: MigrationId,
    },
    /// This host's record says no.
    #[error("VM `{vm}`: {why}")]
    Record {
        /// The VM.
        vm: VmId,
        /// What the record says.
        why: String,
    },
    /// It can no longer be stopped.
    #[error("migration `{0}` has passed COMMIT and cannot be cancelled; it goes on to its end")]
    TooLate(MigrationId),
    /// There is nothing to claim.
    #[error("VM `{vm}` cannot be claimed here: {why}")]
    NotClaimable {
        /// The VM.
        vm: VmId,
        /// Why not.
        why: &'static str,
    },
    /// The stores do not make a plan.
    #[error("pages cannot be scattered as asked: {0}")]
    Plan(#[from] PlanError),
    /// It could not be begun.
    #[error("{}", .0.line())]
    Failed(Failure),
    /// Disks of a VM between two other hosts.
    #[error(transparent)]
    DiskStore(#[from] DiskStoreError),
    /// The records.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<Failure> for RegistryError {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

enum Task {
    Source(mpsc::Sender<source::Input>),
    Destination {
        inputs: mpsc::Sender<destination::Input>,
        token: [u8; TOKEN_BYTES],
        generation: Generation,
        /// Handed the link once; a second one is turned away.
        linked: bool,
        /// Who takes connections about its disks.
        disks: Option<TakenBy>,
        /// The intermediary that may bring what is missing of them.
        disk_store: Option<HostId>,
    },
}

const RECEIVED_HERE: RegistryError = RegistryError::Invalid {
    field: "migration",
    problem: "is received here; limits are set at its source",
};

/// Who takes a limit.
enum Limited {
    Source(mpsc::Sender<source::Input>),
    Destination(mpsc::Sender<destination::Input>),
}

fn gathers(progress: &MigrationProgress) -> bool {
    matches!(progress.mode().known(), Some(Mode::PostCopy | Mode::ScatterGather))
}

fn gather_limit(bits_per_sec: u64) -> Option<BytesPerSec> {
    Some(BitsPerSec(bits_per_sec).bytes_per_sec()).filter(|limit| limit.0 > 0)
}

struct Entry {
    vm: VmId,
    progress: watch::Receiver<MigrationProgress>,
    task: Task,
}

impl Entry {
    fn phase(&self) -> Phase {
        self.progress.borrow().phase()
    }

    fn is_open(&self) -> bool {
        !self.phase().is_final() && self.progress.has_changed().is_ok()
    }
}

#[derive(Default)]
struct Entries {
    by_id: HashMap<MigrationId, Entry>,
    /// In the order of their beginning, for forgetting the oldest.
    order: Vec<MigrationId>,
}

/// Every migration on this host. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    context: Context,
    page_address: Arc<str>,
    entries: Arc<Mutex<Entries>>,
    seeds: Arc<Mutex<seeds::Seeds>>,
    disk_stores: Arc<Mutex<disk_stores::DiskStores>>,
}

impl Registry {
    /// No migrations yet. `page_address`: where other agents reach this host's page listener.
    #[must_use]
    pub fn new(context: Context, page_address: &str) -> Self {
        Self {
            context,
            page_address: page_address.into(),
            entries: Arc::default(),
            seeds: Arc::default(),
            disk_stores: Arc::default(),
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enlist(&self, migration: MigrationId, entry: Entry) {
        let mut entries = self.entries();
        entries.order.retain(|known| *known != migration);
        entries.order.push(migration.clone());
        entries.by_id.insert(migration, entry);
        while entries.order.len() > ENDED_MAX {
            let Entries { by_id, order } = &mut *entries;
            let Some(at) =
                order.iter().position(|id| by_id.get(id).is_none_or(|entry| !entry.is_open()))
            else {
                return;
            };
            let oldest = order.remove(at);
            by_id.remove(&oldest);
        }
    }

    /// The open migration of a VM, if it is in one.
    #[must_use]
    pub fn open_migration_of(&self, vm: &VmId) -> Option<MigrationId> {
        let entries = self.entries();
        let open = entries.by_id.iter().find(|(_, entry)| entry.vm == *vm && entry.is_open());
        open.map(|(migration, _)| migration.clone())
    }

    fn must_be_idle(&self, vm: &VmId) -> Result<(), RegistryError> {
        match self.open_migration_of(vm) {
            Some(migration) => Err(RegistryError::Busy { vm: vm.clone(), migration }),
            None => Ok(()),
        }
    }

    /// Makes room for a VM and starts its QEMU, paused.
    ///
    /// # Errors
    /// When this host cannot or may not take it; nothing is left behind.
    pub async fn prepare_destination(
        &self,
        request: &PrepareDestinationRequest,
    ) -> Result<PrepareDestinationReply, RegistryError> {
        let migration = MigrationId::new(request.migration.as_str())?;
        let from = HostId::new(request.source_host.as_str())?;
        let missing = |field| RegistryError::Invalid { field, problem: "is missing or not known" };
        let definition = request.definition.clone().ok_or_else(|| missing("definition"))?;
        let vm = VmId::new(definition.name.as_str())?;
        let mode = request.mode().known().ok_or_else(|| missing("mode"))?;
        let disk = disk_mode(request.disk, mode)?;
        let disk_store = disk_stores::keeper(disk, request)?;
        self.must_be_idle(&vm)?;
        self.end_seeds_of(&vm).await;
        let plan = scatter_plan(mode, request.scatter.as_ref())?;
        let generation = Generation(request.generation).next();
        let lives = self.context.guests.lives(&vm);
        may_receive(&vm, self.context.store.read(&vm)?.as_ref(), generation, lives)?;

        let machine = Destination::begin(
            generation,
            migration.clone(),
            from.clone(),
            request.source_page_address.clone(),
        );
        let first = MigrationProgress {
            migration: migration.to_string(),
            vm: vm.to_string(),
            side: Side::Destination.into(),
            mode: request.mode,
            source_host: from.to_string(),
            destination_host: self.context.host.to_string(),
            generation: generation.0,
            bytes_total: definition.memory_bytes,
            ..MigrationProgress::default()
        };
        let (progress, watching) = Progress::new(first);
        let (to, inputs) = mpsc::channel(16);
        let mut task = DestinationTask::new(
            self.context.clone(),
            vm.clone(),
            definition,
            mode,
            inputs,
            progress,
            machine,
        )
        .gather_from(plan)
        .gather_at(gather_limit(request.gather_limit_bits_per_sec))
        .let_disks_follow(disk.follows())
        .by_way_of(disk_store.clone());
        task.prepare().await?;
        let (disks, seeded) = (task.disks_taken_by(), task.has_seeds());
        let token = random_token().map_err(|error| Failure::Socket(error.into()))?;
        let (inputs, linked) = (to, false);
        let task_entry = Task::Destination { inputs, token, generation, linked, disks, disk_store };
        let entry = Entry { vm, progress: watching, task: task_entry };
        self.enlist(migration, entry);
        crate::tasks::spawn("migration, destination", async move { task.run().await });
        Ok(PrepareDestinationReply {
            page_address: self.page_address.to_string(),
            token: token.to_vec(),
            seeded,
            disk: lifeboat_protocol::agent::DiskMode::from(disk).into(),
        })
    }

    /// Begins to send a VM.
    ///
    /// # Errors
    /// When it is not here, not this host's, or already moving.
    pub async fn start_migration(
        &self,
        request: &StartMigrationRequest,
    ) -> Result<MigrationProgress, RegistryError> {
        let order = self.order(request)?;
        self.must_be_idle(&order.vm)?;
        self.end_seeds_of(&order.vm).await;
        if !self.context.guests.lives(&order.vm) {
            let why = "has no running QEMU here; start it first".to_owned();
            return Err(RegistryError::Record { vm: order.vm, why });
        }
        let first = MigrationProgress {
            migration: order.migration.to_string(),
            vm: order.vm.to_string(),
            side: Side::Source.into(),
            mode: request.mode,
            source_host: self.context.host.to_string(),
            destination_host: order.destination.to_string(),
            generation: order.generation.next().0,
            limit_bits_per_sec: request.network_limit_bits_per_sec,
            ..MigrationProgress::default()
        };
        let (progress, watching) = Progress::new(first);
        let (to, inputs) = mpsc::channel(16);
        let (migration, vm) = (order.migration.clone(), order.vm.clone());
        let (task, actions) = SourceTask::begin(self.context.clone(), order, inputs, progress);
        let now = watching.borrow().clone();
        self.enlist(migration, Entry { vm, progress: watching, task: Task::Source(to) });
        crate::tasks::spawn("migration, source", async move { task.run(actions).await });
        Ok(now)
    }

    fn order(&self, request: &StartMigrationRequest) -> Result<Order, RegistryError> {
        let invalid = |field, problem| RegistryError::Invalid { field, problem };
        let vm = VmId::new(request.vm.as_str())?;
        let mode = request.mode().known().ok_or(invalid("mode", "is missing or not known"))?;
        let token = <[u8; TOKEN_BYTES]>::try_from(request.token.as_slice())
            .map_err(|_| invalid("token", "is not 32 bytes long"))?;
        let generation = match self.context.store.read(&vm)? {
            Some(Record::Owner { generation, .. }) => generation,
            Some(record) => {
                return Err(RegistryError::Record { why: answer::words(&record), vm });
            }
            None => return Err(RegistryError::UnknownVm(vm)),
        };
        let limit = BitsPerSec(request.network_limit_bits_per_sec).bytes_per_sec();
        let disk = disk_mode(request.disk, mode)?;
        let watch = Duration::from_millis(request.disk_watch_ms.into());
        Ok(Order {
            migration: MigrationId::new(request.migration.as_str())?,
            vm,
            mode,
            destination: HostId::new(request.destination_host.as_str())?,
            page_address: request.page_address.clone(),
            token,
            limit: (limit.0 > 0).then_some(limit),
            disk_limit: (request.disk_limit_bytes_per_sec > 0)
                .then_some(BytesPerSec(request.disk_limit_bytes_per_sec)),
            compare_disks: request.compare_disks,
            disks_there: request.disks_there.clone(),
            disk_window: (request.disk_window_ms > 0)
                .then(|| Duration::from_millis(request.disk_window_ms)),
            downtime_limit: match request.downtime_limit_ms {
                0 => DOWNTIME_DEFAULT,
                ms => Duration::from_millis(ms.into()),
            },
            iterations_max: (request.iterations_max > 0).then_some(request.iterations_max),
            scatter: scatter_plan(mode, request.scatter.as_ref())?,
            absorb_budget: lifeboat_protocol::units::Bytes(request.absorb_budget_bytes),
            deadline: (request.deadline_ms > 0).then(|| Duration::from_millis(request.deadline_ms)),
            generation,
            disks_follow: disk.follows(),
            disk_store: disk_stores::ordered(disk, request)?,
            handover_size: lifeboat_protocol::units::Bytes(request.handover_size_bytes),
            disk_watch: if watch.is_zero() { WATCH_DEFAULT } else { watch.min(WATCH_LONGEST) },
        })
    }

    /// Changes what a migration may send (bytes/s; 0: no limit).
    ///
    /// # Errors
    /// When it is not known here, or this is not its source.
    pub async fn set_network_limit(
        &self,
        migration: &str,
        bytes_per_sec: u64,
    ) -> Result<MigrationProgress, RegistryError> {
        let migration = MigrationId::new(migration)?;
        let limit = (bytes_per_sec > 0).then_some(BytesPerSec(bytes_per_sec));
        let (to, progress) = self.limited(&migration)?;
        // A migration that has just ended no longer needs a limit.
        match to {
            Limited::Source(inputs) => {
                let _ = inputs.send(source::Input::Limit(limit)).await;
            }
            Limited::Destination(inputs) => {
                let _ = inputs.send(destination::Input::Limit(limit)).await;
            }
        }
        Ok(progress.borrow().clone())
    }

    /// Changes what a migrating VM may change on its disks (bytes/s; 0: no limit).
    ///
    /// # Errors
    /// As [`Self::set_network_limit`].
    pub async fn set_disk_limit(
        &self,
        migration: &str,
        bytes_per_sec: u64,
    ) -> Result<MigrationProgress, RegistryError> {
        let migration = MigrationId::new(migration)?;
        let limit = (bytes_per_sec > 0).then_some(BytesPerSec(bytes_per_sec));
        let (to, progress) = self.limited(&migration)?;
        let Limited::Source(inputs) = to else {
            return Err(RECEIVED_HERE);
        };
        // One that has just ended holds its guest back no more.
        let _ = inputs.send(source::Input::DiskLimit(limit)).await;
        Ok(progress.borrow().clone())
    }

    /// Whom a limit is for. At a destination it is the pace at which pages are gathered.
    fn limited(
        &self,
        migration: &MigrationId,
    ) -> Result<(Limited, watch::Receiver<MigrationProgress>), RegistryError> {
        let entries = self.entries();
        let Some(entry) = entries.by_id.get(migration) else {
            return Err(RegistryError::UnknownMigration(migration.clone()));
        };
        let to = match &entry.task {
            Task::Source(inputs) => Limited::Source(inputs.clone()),
            Task::Destination { inputs, .. } if gathers(&entry.progress.borrow()) => {
                Limited::Destination(inputs.clone())
            }
            Task::Destination { .. } => return Err(RECEIVED_HERE),
        };
        Ok((to, entry.progress.clone()))
    }

    /// How much the directories can take in which disks arrive.
    #[must_use]
    pub fn disk_rooms(&self) -> Vec<DiskRoom> {
        let told = |room: Room| DiskRoom {
            path: room.path.display().to_string(),
            free_bytes: room.free.0,
            total_bytes: room.total.0,
        };
        self.context.rooms.space().into_iter().map(told).collect()
    }

    /// A migration's progress, to read or to watch.
    ///
    /// # Errors
    /// When it is not known here.
    pub fn progress(
        &self,
        migration: &str,
    ) -> Result<watch::Receiver<MigrationProgress>, RegistryError> {
        let migration = MigrationId::new(migration)?;
        let entries = self.entries();
        match entries.by_id.get(&migration) {
            Some(entry) => Ok(entry.progress.clone()),
            None => Err(RegistryError::UnknownMigration(migration)),
        }
    }

    /// Every migration that is remembered, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<MigrationProgress> {
        let entries = self.entries();
        let known = entries.order.iter().filter_map(|id| entries.by_id.get(id));
        known.map(|entry| entry.progress.borrow().clone()).collect()
    }

    /// Stops a migration that has not passed its point of no return.
    ///
    /// # Errors
    /// When it is not known here, or has passed it.
    pub async fn cancel(
        &self,
        migration: &str,
        reason: &str,
    ) -> Result<MigrationProgress, RegistryError> {
        let migration = MigrationId::new(migration)?;
        let reason = if reason.is_empty() { "by the operator" } else { reason }.to_owned();
        let (answer, answered) = oneshot::channel();
        let mut progress = {
            let entries = self.entries();
            let Some(entry) = entries.by_id.get(&migration) else {
                return Err(RegistryError::UnknownMigration(migration));
            };
            if !entry.is_open() {
                return Ok(entry.progress.borrow().clone());
            }
            // A full queue means that the task is busy ending; then it is too late.
            let _ = match &entry.task {
                Task::Source(inputs) => {
                    inputs.try_send(source::Input::Cancel { reason, answer }).is_ok()
                }
                Task::Destination { inputs, .. } => {
                    inputs.try_send(destination::Input::Cancel { reason, answer }).is_ok()
                }
            };
            entry.progress.clone()
        };
        if !answered.await.unwrap_or(false) && !progress.borrow().phase().is_final() {
            return Err(RegistryError::TooLate(migration));
        }
        // Until it is over, so that whoever cancelled can count on where the guest is.
        let _ = progress.wait_for(|progress| progress.phase().is_final()).await;
        Ok(progress.borrow().clone())
    }
}

/// How its disks move. A controller that is older does not say.
fn disk_mode(asked: i32, mode: Mode) -> Result<DiskMode, RegistryError> {
    let invalid = |problem| RegistryError::Invalid { field: "disk", problem };
    let asked = lifeboat_protocol::agent::DiskMode::try_from(asked);
    match asked.map_err(|_| invalid("is a way to move that this agent does not know"))?.known() {
        Some(disk) if disk.follows() && mode != Mode::PreCopy => {
            Err(invalid("is on-demand or scatter, which go with pre-copy of the memory only"))
        }
        disk => Ok(disk.unwrap_or(DiskMode::Copy)),
    }
}

/// The stores of a migration that scatters.
fn scatter_plan(mode: Mode, plan: Option<&ScatterPlan>) -> Result<Option<Plan>, RegistryError> {
    match mode {
        Mode::ScatterGather => {
            let none = ScatterPlan::default();
            Ok(Some(Plan::new(plan.unwrap_or(&none))?))
        }
        Mode::PreCopy | Mode::PostCopy | Mode::Cold => Ok(None),
        Mode::Auto => Err(RegistryError::Invalid {
            field: "mode",
            problem: "is auto, which the controller decides before it asks an agent",
        }),
    }
}

/// Whether this host's record lets it receive the VM as `generation`.
fn may_receive(
    vm: &VmId,
    record: Option<&Record>,
    generation: Generation,
    lives: bool,
) -> Result<(), RegistryError> {
    let Some(record) = record else { return Ok(()) };
    let open = match record {
        Record::Refused { .. } | Record::Ceded { confirmed: true, .. } => false,
        // Owned once, and lost with its guest when the host went down; since then somebody else has
        // claimed it and owns it by a later generation. Nothing runs here that could be a second.
        Record::Owner { generation: owned, .. } if owned.next() < generation && !lives => false,
        Record::Owner { .. }
        | Record::Sending { .. }
        | Record::Loaded { .. }
        | Record::Ceded { confirmed: false, .. } => true,
    };
    // What was refused as g2 may come again as g2: the refusal names its migration.
    let stale = record.generation() > generation;
    if open || stale {
        return Err(RegistryError::Record { vm: vm.clone(), why: answer::words(record) });
    }
    Ok(())
}

/// The one place in the agent that draws random numbers.
pub(crate) fn random_token() -> rustix::io::Result<[u8; TOKEN_BYTES]> {
    let mut token = [0; TOKEN_BYTES];
    let mut filled = 0;
    while filled < TOKEN_BYTES {
        filled +=
            rustix::rand::getrandom(&mut token[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ownership_that_somebody_else_has_overtaken_is_no_obstacle_once_the_guest_is_gone() {
        let vm = VmId::new("db").unwrap();
        let owner =
            Record::Owner { generation: Generation(19), via: None, from: None, resumed: true };
        let may =
            |asked: u64, lives| may_receive(&vm, Some(&owner), Generation(asked), lives).is_ok();
        // The source owns g20, g21, ..: ours is over. One that owns g19 as well cannot be.
        assert!(may(21, false) && may(30, false));
        assert!(!may(20, false) && !may(19, false) && !may(5, false));
        assert!(!may(21, true), "the guest is here");
    }
}
