//! The agent's gRPC service (`protocol/proto/agent.proto`).
//!
//! ```text
//!   listen --> role check --> term --> once per operation id --> vms/, registry, measure/, switch/, intermediary/
//! ```
//!
//! Used by `main.rs`. It checks what comes in, calls the room that knows, and turns what comes out
//! into messages; it decides nothing. Who may speak is checked in `listen`; a command's term in
//! `terms`, its id in `operations`; statuses are chosen in `status`. Pages never travel here.

mod bases;
pub mod listen;
mod migrations;
mod operations;
mod queries;
mod seeds;
mod status;
mod storage;
mod stores;
mod terms;
mod watch;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::agent::agent_server::Agent;
use lifeboat_protocol::agent::{
    ClaimVmRequest, ClassifierReply, ClassifierRequest, Command, CommandOnMigration,
    CompletionReply, DescribeHostRequest, ForgetSeedReply, ForgetSeedRequest, HashBasesReply,
    HashBasesRequest, HostDescription, ListMigrationsRequest, ListMigrationsResponse,
    ListVmsRequest, ListVmsResponse, MeasureVmRequest, MigrationProgress, MigrationReply,
    PrepareDestinationReply, PrepareDestinationRequest, PrepareDiskStoreReply,
    PrepareDiskStoreRequest, PrepareStoreReply, PrepareStoreRequest, ProbeShapingReply,
    ProbeShapingRequest, ProbeStorageReply, ProbeStorageRequest, QueryMigrationRequest,
    ReceiveSeedReply, ReceiveSeedRequest, ReleaseStoreReply, ReleaseStoreRequest, SeedProgress,
    SendSeedRequest, SetLimitRequest, StartMigrationRequest, StartVmRequest, StopVmRequest,
    VmMeasurement, VmReply,
};
use lifeboat_protocol::ids::{HostId, OperationId, Term, VmId};
use prost::Message;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::config::AgentRole;
use crate::handover::store::Store;
use crate::host::HostFacts;
use crate::intermediary::Intermediary;
use crate::measure;
use crate::registry::Registry;
use crate::switch;
use crate::tasks;
use crate::vms::Vms;
use crate::vms::bases::Bases;
use operations::Operations;
pub use terms::{TermError, Terms};
use watch::Watch;

/// Longest grace that a StopVm may ask for.
const GRACE_MAX: Duration = Duration::from_secs(600);
/// How many measurements may run at once: each reads all of a guest's memory.
const MEASUREMENTS_MAX: usize = 2;

/// What the service speaks for.
pub struct Rooms {
    /// This host.
    pub host: HostId,
    /// What this agent does.
    pub roles: Vec<AgentRole>,
    /// What stays the same until its next boot.
    pub facts: HostFacts,
    /// Where other agents bring pages.
    pub page_address: String,
    /// Its VMs.
    pub vms: Vms,
    /// Its stores, where it has that role.
    pub intermediary: Option<Intermediary>,
    /// Its migrations.
    pub registry: Registry,
    /// Its ownership records.
    pub store: Store,
    /// The controllers' terms.
    pub terms: Terms,
}

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    rooms: Arc<Rooms>,
    operations: Operations,
    watch: Arc<Watch>,
    measurements: Arc<tokio::sync::Semaphore>,
    bases: Arc<tokio::sync::Mutex<Bases>>,
}

impl Service {
    /// The service of these rooms.
    #[must_use]
    pub fn new(rooms: Rooms) -> Self {
        Self {
            rooms: Arc::new(rooms),
            operations: Operations::default(),
            watch: Arc::default(),
            measurements: Arc::new(tokio::sync::Semaphore::new(MEASUREMENTS_MAX)),
            bases: Arc::default(),
        }
    }

    /// A command: its term is obeyed, and its work done once.
    async fn command<R, T, W, F>(&self, mut request: R, work: W) -> Result<Response<T>, Status>
    where
        R: Commanded,
        T: Message + Default,
        W: FnOnce(Self, R) -> F,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let command = request.take_command();
        let command = command.ok_or_else(|| Status::invalid_argument("`command` is missing"))?;
        self.rooms.terms.admit(Term(command.term)).map_err(|e| status::of_term(&e))?;
        let id = OperationId::new(command.operation_id).map_err(|e| status::of_name(&e))?;
        // Without the command: a new controller repeats an operation under its own term.
        let asked = [R::NAME.as_bytes(), &request.encode_to_vec()].concat();
        let work = work(self.clone(), request);
        self.operations.once(id, &asked, work).await.map(Response::new)
    }

    fn must_be(&self, role: AgentRole) -> Result<(), Status> {
        if self.rooms.roles.contains(&role) {
            return Ok(());
        }
        Err(Status::failed_precondition(format!(
            "{} does not have the role `{}`; add it to `roles` in its agent.toml",
            self.rooms.host,
            role.as_str()
        )))
    }
}

/// A request that is a command.
trait Commanded: Message {
    /// Tells commands of one operation id apart.
    const NAME: &'static str;
    fn take_command(&mut self) -> Option<Command>;
}

macro_rules! commanded {
    ($($t:ident),* $(,)?) => {$(
        impl Commanded for $t {
            const NAME: &'static str = stringify!($t);
            fn take_command(&mut self) -> Option<Command> {
                self.command.take()
            }
        }
    )*};
}
commanded!(
    StartVmRequest,
    StopVmRequest,
    PrepareDestinationRequest,
    StartMigrationRequest,
    SetLimitRequest,
    CommandOnMigration,
    ClaimVmRequest,
    ClassifierRequest,
    PrepareStoreRequest,
    PrepareDiskStoreRequest,
    ReleaseStoreRequest,
    ForgetSeedRequest,
);

fn vm_named(name: String) -> Result<VmId, Status> {
    VmId::new(name).map_err(|error| status::of_name(&error))
}

#[tonic::async_trait]
impl Agent for Service {
    type WatchMigrationStream = ReceiverStream<Result<MigrationProgress, Status>>;
    type ReceiveSeedStream = ReceiverStream<Result<ReceiveSeedReply, Status>>;
    type SendSeedStream = ReceiverStream<Result<SeedProgress, Status>>;

    async fn describe_host(
        &self,
        _: Request<DescribeHostRequest>,
    ) -> Result<Response<HostDescription>, Status> {
        Ok(Response::new(self.description().await))
    }

    async fn list_vms(
        &self,
        _: Request<ListVmsRequest>,
    ) -> Result<Response<ListVmsResponse>, Status> {
        Ok(Response::new(ListVmsResponse { vms: self.statuses()? }))
    }

    async fn measure_vm(
        &self,
        request: Request<MeasureVmRequest>,
    ) -> Result<Response<VmMeasurement>, Status> {
        let request = request.into_inner();
        let vm = vm_named(request.vm)?;
        let busy = |_| Status::internal("the measurements have been shut down");
        let _turn = self.measurements.acquire().await.map_err(busy)?;
        let measured = measure::measure(&self.rooms.vms, &vm, request.window_ms).await;
        measured.map(Response::new).map_err(|error| status::of_measure(&error))
    }

    async fn start_vm(
        &self,
        request: Request<StartVmRequest>,
    ) -> Result<Response<VmReply>, Status> {
        self.command(request.into_inner(), |this, request| async move {
            this.must_be(AgentRole::Hypervisor)?;
            let vm = vm_named(request.vm)?;
            this.rooms.vms.start(&vm).await.map_err(|error| status::of_vm(&error))?;
            this.reply(&vm)
        })
        .await
    }

    async fn stop_vm(&self, request: Request<StopVmRequest>) -> Result<Response<VmReply>, Status> {
        self.command(request.into_inner(), |this, request| async move {
            let vm = vm_named(request.vm)?;
            this.must_not_move(&vm)?;
            let grace = Duration::from_millis(request.grace_ms.into()).min(GRACE_MAX);
            this.rooms.vms.stop(&vm, grace).await.map_err(|error| status::of_vm(&error))?;
            this.reply(&vm)
        })
        .await
    }

    async fn prepare_destination(
        &self,
        request: Request<PrepareDestinationRequest>,
    ) -> Result<Response<PrepareDestinationReply>, Status> {
        self.command(request.into_inner(), |this, request| async move {
            this.must_be(AgentRole::Hypervisor)?;
            this.prepared(request).await
        })
        .await
    }

    async fn start_migration(
        &self,
        request: Request<StartMigrationRequest>,
    ) -> Result<Response<MigrationReply>, Status> {
        self.command(
            request.into_inner(),
            |this, request| async move { this.started(request).await },
        )
        .await
    }

    async fn set_network_limit(
        &self,
        request: Request<SetLimitRequest>,
    ) -> Result<Response<MigrationReply>, Status> {
        self.command(
            request.into_inner(),
            |this, request| async move { this.limited(request).await },
        )
        .await
    }

    async fn set_disk_limit(
        &self,
        request: Request<SetLimitRequest>,
    ) -> Result<Response<MigrationReply>, Status> {
        self.command(request.into_inner(), |this, request| async move {
            this.disk_limited(request).await
        })
        .await
    }

    async fn query_progress(
        &self,
        request: Request<QueryMigrationRequest>,
    ) -> Result<Response<MigrationProgress>, Status> {
        self.progress(&request.into_inner().migration).map(Response::new)
    }

    async fn query_completion(
        &self,
        request: Request<QueryMigrationRequest>,
    ) -> Result<Response<CompletionReply>, Status> {
        self.completion(&request.into_inner().migration).map(Response::new)
    }

    async fn watch_migration(
        &self,
        request: Request<QueryMigrationRequest>,
    ) -> Result<Response<Self::WatchMigrationStream>, Status> {
        self.watched(&request.into_inner().migration).map(Response::new)
    }

    async fn list_migrations(
        &self,
        _: Request<ListMigrationsRequest>,
    ) -> Result<Response<ListMigrationsResponse>, Status> {
        Ok(Response::new(ListMigrationsResponse { migrations: self.rooms.registry.list() }))
    }

    async fn cancel_migration(
        &self,
        request: Request<CommandOnMigration>,
    ) -> Result<Response<MigrationReply>, Status> {
        self.command(
            request.into_inner(),
            |this, request| async move { this.cancelled(request).await },
        )
        .await
    }

    async fn claim_vm(
        &self,
        request: Request<ClaimVmRequest>,
    ) -> Result<Response<VmReply>, Status> {
        self.command(
            request.into_inner(),
            |this, request| async move { this.claimed(request).await },
        )
        .await
    }

    async fn ensure_classifier(
        &self,
        request: Request<ClassifierRequest>,
    ) -> Result<Response<ClassifierReply>, Status> {
        self.command(request.into_inner(), |this, request| async move {
            this.must_be(AgentRole::Switch)?;
            let ports = switch::ensure(&request.ports).await;
            Ok(ClassifierReply { ports: ports.into_iter().map(Into::into).collect() })
        })
        .await
    }

    async fn remove_classifier(
        &self,
        request: Request<ClassifierRequest>,
    ) -> Result<Response<ClassifierReply>, Status> {
        self.command(request.into_inner(), |this, request| async move {
            this.must_be(AgentRole::Switch)?;
            let ports = switch::remove(&request.ports).await;
            Ok(ClassifierReply { ports: ports.into_iter().map(Into::into).collect() })
        })
        .await
    }

    async fn probe_shaping(
        &self,
        _: Request<ProbeShapingRequest>,
    ) -> Result<Response<ProbeShapingReply>, Status> {
        self.must_be(AgentRole::Switch)?;
        let found = switch::probe::probe().await;
        found.map(Response::new).map_err(|error| Status::unavailable(crate::vms::chain(&error)))
    }

    async fn probe_storage(
        &self,
        request: Request<ProbeStorageRequest>,
    ) -> Result<Response<ProbeStorageReply>, Status> {
        let request = request.into_inner();
        let storages = self.rooms.vms.settings().storages.clone();
        let probed = tasks::blocking(move || storage::probe(&storages, &request)).await;
        probed.map(Response::new).map_err(|error| status::of_storage(&error))
    }

    async fn hash_bases(
        &self,
        request: Request<HashBasesRequest>,
    ) -> Result<Response<HashBasesReply>, Status> {
        self.bases_hashed(request.into_inner()).await.map(Response::new)
    }

    async fn receive_seed(
        &self,
        request: Request<ReceiveSeedRequest>,
    ) -> Result<Response<Self::ReceiveSeedStream>, Status> {
        self.must_be(AgentRole::Hypervisor)?;
        self.seed_received(request.into_inner()).await.map(Response::new)
    }

    async fn send_seed(
        &self,
        request: Request<SendSeedRequest>,
    ) -> Result<Response<Self::SendSeedStream>, Status> {
        self.seed_sent(request.into_inner()).map(Response::new)
    }

    async fn forget_seed(
        &self,
        request: Request<ForgetSeedRequest>,
    ) -> Result<Response<ForgetSeedReply>, Status> {
        self.command(request.into_inner(), |this, request| async move {
            this.seed_forgotten(request).await
        })
        .await
    }

    async fn prepare_store(
        &self,
        request: Request<PrepareStoreRequest>,
    ) -> Result<Response<PrepareStoreReply>, Status> {
        self.command(request.into_inner(), |this, request| async move {
            this.store_prepared(request).await
        })
        .await
    }

    async fn prepare_disk_store(
        &self,
        request: Request<PrepareDiskStoreRequest>,
    ) -> Result<Response<PrepareDiskStoreReply>, Status> {
        self.command(request.into_inner(), |this, request| async move {
            this.disk_store_prepared(request).await
        })
        .await
    }

    async fn release_store(
        &self,
        request: Request<ReleaseStoreRequest>,
    ) -> Result<Response<ReleaseStoreReply>, Status> {
        self.command(request.into_inner(), |this, request| async move {
            this.store_released(request).await
        })
        .await
    }
}
