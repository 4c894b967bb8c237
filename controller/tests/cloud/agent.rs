//! The agent of one host of the fake cloud.

use std::pin::Pin;

use futures_util::Stream;
use lifeboat_controller::tasks;
use lifeboat_protocol::agent::agent_server::Agent;
use lifeboat_protocol::agent::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Cloud, STEP};

pub(super) struct FakeAgent {
    pub(super) host: String,
    pub(super) cloud: Cloud,
}

type Reply<T> = Result<Response<T>, Status>;

impl FakeAgent {
    fn heed(&self, command: Option<&Command>) -> Result<(), Status> {
        let mut truth = self.cloud.truth();
        let term = command.map_or(0, |command| command.term);
        if term < truth.term {
            let highest = truth.term;
            truth.violations.push(format!("term {term} after {highest}"));
            return Err(Status::failed_precondition("a newer controller has been here"));
        }
        truth.term = term;
        Ok(())
    }

    fn known(&self, migration: &str) -> Result<MigrationProgress, Status> {
        let found = self.cloud.truth().migrations.get(migration).cloned();
        found
            .filter(|p| p.source_host == self.host || p.destination_host == self.host)
            .ok_or_else(|| Status::not_found(format!("no migration {migration} at {}", self.host)))
    }

    fn limited(&self, what: &'static str, request: SetLimitRequest) -> Reply<MigrationReply> {
        self.heed(request.command.as_ref())?;
        let progress = self.known(&request.migration)?;
        let limit = (what, request.migration, request.bytes_per_sec);
        self.cloud.truth().limits.push(limit);
        Ok(Response::new(MigrationReply { progress: Some(progress) }))
    }

    fn absent<T>(&self) -> Reply<T> {
        Err(Status::unimplemented("not part of this cloud"))
    }
}

fn definition(vm: &str) -> VmDefinition {
    VmDefinition {
        name: vm.to_owned(),
        memory_bytes: 256 << 20,
        vcpus: 1,
        machine: "pc-i440fx-7.2".to_owned(),
        cpu_model: "qemu64".to_owned(),
        nics: vec![Nic {
            bridge: "br0".to_owned(),
            mac: "52:54:00:00:00:01".to_owned(),
            ..Nic::default()
        }],
        ..VmDefinition::default()
    }
}

#[tonic::async_trait]
impl Agent for FakeAgent {
    async fn describe_host(&self, _: Request<DescribeHostRequest>) -> Reply<HostDescription> {
        let n = self.host.trim_start_matches('h');
        Ok(Response::new(HostDescription {
            host: self.host.clone(),
            qemu_version: "7.2.22".to_owned(),
            accelerator: "tcg".to_owned(),
            machine_types: vec!["pc-i440fx-7.2".to_owned()],
            cpu_models: vec!["qemu64".to_owned()],
            devices: vec!["virtio-net-pci".to_owned()],
            memory_total_bytes: 4 << 30,
            memory_free_bytes: 4 << 30,
            bridges: vec![BridgeDescription { name: "br0".to_owned(), mtu: 1500 }],
            page_address: format!("10.0.0.{n}:7000"),
            modes: [Mode::PreCopy, Mode::PostCopy, Mode::ScatterGather].map(i32::from).to_vec(),
            store_memory_free_bytes: self.cloud.truth().store_room_at(&self.host),
            cpu_cores: 2.0,
            ..HostDescription::default()
        }))
    }

    async fn list_vms(&self, _: Request<ListVmsRequest>) -> Reply<ListVmsResponse> {
        let truth = self.cloud.truth();
        let here = truth.at.iter().filter(|(_, at)| **at == self.host).map(|(vm, _)| VmStatus {
            definition: Some(definition(vm)),
            state: VmState::Running.into(),
            generation: 1,
            ..VmStatus::default()
        });
        Ok(Response::new(ListVmsResponse { vms: here.collect() }))
    }

    async fn measure_vm(&self, request: Request<MeasureVmRequest>) -> Reply<VmMeasurement> {
        Ok(Response::new(VmMeasurement {
            vm: request.into_inner().vm,
            memory_pages: 65_536,
            non_zero_pages: 40_000,
            dirty_pages_per_sec: 100,
            working_set_pages: 1_000,
            dirty_rate_error: 0.1,
            ..VmMeasurement::default()
        }))
    }

    async fn prepare_destination(
        &self,
        request: Request<PrepareDestinationRequest>,
    ) -> Reply<PrepareDestinationReply> {
        self.heed(request.get_ref().command.as_ref())?;
        if self.cloud.truth().refusing.contains(&self.host) {
            return Err(Status::failed_precondition("no room after all"));
        }
        let page_address = "10.0.0.9:7000".to_owned();
        Ok(Response::new(PrepareDestinationReply {
            page_address,
            token: vec![1; 32],
            ..PrepareDestinationReply::default()
        }))
    }

    async fn start_migration(
        &self,
        request: Request<StartMigrationRequest>,
    ) -> Reply<MigrationReply> {
        let request = request.into_inner();
        self.heed(request.command.as_ref())?;
        let mut truth = self.cloud.truth();
        let live = |p: &&MigrationProgress| p.vm == request.vm && !p.phase().is_final();
        if let Some(other) = truth.migrations.values().find(live).cloned() {
            truth.violations.push(format!("{} twice: {}", request.vm, other.migration));
        }
        if truth.at.get(&request.vm) != Some(&self.host) {
            truth.violations.push(format!("{} is not at {}", request.vm, self.host));
        }
        let progress = MigrationProgress {
            migration: request.migration.clone(),
            vm: request.vm,
            phase: Phase::MemoryCopy.into(),
            source_host: self.host.clone(),
            destination_host: request.destination_host,
            limit_bits_per_sec: request.network_limit_bits_per_sec,
            iteration: 1,
            bytes_total: 256 << 20,
            bytes_remaining: 256 << 20,
            ..MigrationProgress::default()
        };
        truth.migrations.insert(request.migration.clone(), progress.clone());
        drop(truth);
        self.cloud.run(&request.migration);
        Ok(Response::new(MigrationReply { progress: Some(progress) }))
    }

    async fn query_progress(
        &self,
        request: Request<QueryMigrationRequest>,
    ) -> Reply<MigrationProgress> {
        let mut progress = self.known(&request.into_inner().migration)?;
        let there = progress.destination_host == self.host;
        if there && progress.phase() == Phase::Completed && self.cloud.truth().gathers_on {
            progress.set_phase(Phase::Gather);
        }
        Ok(Response::new(progress))
    }

    async fn query_completion(
        &self,
        request: Request<QueryMigrationRequest>,
    ) -> Reply<CompletionReply> {
        let found = self.known(&request.into_inner().migration)?;
        let completed = found.phase() == Phase::Completed;
        Ok(Response::new(CompletionReply { completed, phase: found.phase }))
    }

    type WatchMigrationStream =
        Pin<Box<dyn Stream<Item = Result<MigrationProgress, Status>> + Send>>;

    async fn watch_migration(
        &self,
        request: Request<QueryMigrationRequest>,
    ) -> Reply<Self::WatchMigrationStream> {
        let migration = request.into_inner().migration;
        self.known(&migration)?;
        let (feed, news) = mpsc::channel(4);
        let cloud = self.cloud.clone();
        tasks::spawn(async move {
            loop {
                let progress = cloud.truth().migrations[&migration].clone();
                let over = progress.phase().is_final();
                if feed.send(Ok(progress)).await.is_err() || over {
                    return;
                }
                tokio::time::sleep(STEP / 2).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(news))))
    }

    async fn list_migrations(
        &self,
        _: Request<ListMigrationsRequest>,
    ) -> Reply<ListMigrationsResponse> {
        let truth = self.cloud.truth();
        let here = truth.migrations.values().filter(|p| p.source_host == self.host);
        Ok(Response::new(ListMigrationsResponse { migrations: here.cloned().collect() }))
    }

    async fn cancel_migration(
        &self,
        request: Request<CommandOnMigration>,
    ) -> Reply<MigrationReply> {
        let request = request.into_inner();
        self.heed(request.command.as_ref())?;
        let mut progress = self.known(&request.migration)?;
        match progress.phase() {
            Phase::MemoryCopy => {
                progress.set_phase(Phase::Cancelled);
                progress.reason = request.reason;
                self.cloud.truth().migrations.insert(request.migration, progress.clone());
                Ok(Response::new(MigrationReply { progress: Some(progress) }))
            }
            _ => Err(Status::failed_precondition("past the point of no return, or over")),
        }
    }

    async fn start_vm(&self, _: Request<StartVmRequest>) -> Reply<VmReply> {
        self.absent()
    }

    async fn stop_vm(&self, _: Request<StopVmRequest>) -> Reply<VmReply> {
        self.absent()
    }

    async fn set_network_limit(&self, request: Request<SetLimitRequest>) -> Reply<MigrationReply> {
        self.limited("network", request.into_inner())
    }

    async fn set_disk_limit(&self, request: Request<SetLimitRequest>) -> Reply<MigrationReply> {
        self.limited("disk", request.into_inner())
    }

    async fn claim_vm(&self, _: Request<ClaimVmRequest>) -> Reply<VmReply> {
        self.absent()
    }

    async fn ensure_classifier(&self, _: Request<ClassifierRequest>) -> Reply<ClassifierReply> {
        self.absent()
    }

    async fn remove_classifier(&self, _: Request<ClassifierRequest>) -> Reply<ClassifierReply> {
        self.absent()
    }

    async fn probe_shaping(&self, _: Request<ProbeShapingRequest>) -> Reply<ProbeShapingReply> {
        self.absent()
    }

    async fn probe_storage(&self, _: Request<ProbeStorageRequest>) -> Reply<ProbeStorageReply> {
        self.absent()
    }

    type ReceiveSeedStream = ReceiverStream<Result<ReceiveSeedReply, Status>>;
    type SendSeedStream = ReceiverStream<Result<SeedProgress, Status>>;

    async fn receive_seed(&self, _: Request<ReceiveSeedRequest>) -> Reply<Self::ReceiveSeedStream> {
        self.absent()
    }

    async fn send_seed(&self, _: Request<SendSeedRequest>) -> Reply<Self::SendSeedStream> {
        self.absent()
    }

    async fn forget_seed(&self, _: Request<ForgetSeedRequest>) -> Reply<ForgetSeedReply> {
        self.absent()
    }

    async fn hash_bases(&self, _: Request<HashBasesRequest>) -> Reply<HashBasesReply> {
        self.absent()
    }

    async fn prepare_store(
        &self,
        request: Request<PrepareStoreRequest>,
    ) -> Reply<PrepareStoreReply> {
        let request = request.into_inner();
        self.heed(request.command.as_ref())?;
        let mut truth = self.cloud.truth();
        if truth.store_room_at(&self.host) < request.memory_bytes {
            return Err(Status::resource_exhausted("no room for such a store"));
        }
        truth.stores.insert((self.host.clone(), request.migration), request.memory_bytes);
        drop(truth);
        let n = self.host.trim_start_matches('h');
        let store = PageStore {
            host: self.host.clone(),
            address: format!("10.0.0.{n}:7100"),
            memory_bytes: request.memory_bytes,
            ..PageStore::default()
        };
        Ok(Response::new(PrepareStoreReply { store: Some(store) }))
    }

    async fn prepare_disk_store(
        &self,
        _: Request<PrepareDiskStoreRequest>,
    ) -> Reply<PrepareDiskStoreReply> {
        Err(Status::unimplemented("the fake cloud's VMs have no disks"))
    }

    async fn release_store(
        &self,
        request: Request<ReleaseStoreRequest>,
    ) -> Reply<ReleaseStoreReply> {
        let request = request.into_inner();
        self.heed(request.command.as_ref())?;
        let store = (self.host.clone(), request.migration);
        let held_pages = self.cloud.truth().stores.remove(&store).is_some();
        Ok(Response::new(ReleaseStoreReply { held_pages, held_disks: false }))
    }
}
