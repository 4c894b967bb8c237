//! The calls about migrations: handed to the registry, which owns them.

use std::time::Duration;

use lifeboat_protocol::agent::{
    ClaimVmRequest, CommandOnMigration, CompletionReply, MigrationProgress, MigrationReply, Phase,
    PrepareDestinationReply, PrepareDestinationRequest, SetLimitRequest, StartMigrationRequest,
    VmReply,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Service, status, vm_named};
use crate::tasks;

/// Progress is told at most this often.
const TELL_EVERY: Duration = Duration::from_millis(200);

fn moved(progress: MigrationProgress) -> MigrationReply {
    MigrationReply { progress: Some(progress) }
}

impl Service {
    pub(super) async fn prepared(
        &self,
        request: PrepareDestinationRequest,
    ) -> Result<PrepareDestinationReply, Status> {
        let prepared = self.rooms.registry.prepare_destination(&request).await;
        prepared.map_err(|error| status::of_registry(&error))
    }

    pub(super) async fn started(
        &self,
        request: StartMigrationRequest,
    ) -> Result<MigrationReply, Status> {
        let vm = vm_named(request.vm.clone())?;
        self.rooms.vms.view(&vm).map_err(|error| status::of_vm(&error))?;
        let started = self.rooms.registry.start_migration(&request).await;
        started.map(moved).map_err(|error| status::of_registry(&error))
    }

    pub(super) async fn limited(&self, request: SetLimitRequest) -> Result<MigrationReply, Status> {
        let registry = &self.rooms.registry;
        let limited = registry.set_network_limit(&request.migration, request.bytes_per_sec).await;
        limited.map(moved).map_err(|error| status::of_registry(&error))
    }

    pub(super) async fn disk_limited(
        &self,
        request: SetLimitRequest,
    ) -> Result<MigrationReply, Status> {
        let registry = &self.rooms.registry;
        let limited = registry.set_disk_limit(&request.migration, request.bytes_per_sec).await;
        limited.map(moved).map_err(|error| status::of_registry(&error))
    }

    pub(super) async fn cancelled(
        &self,
        request: CommandOnMigration,
    ) -> Result<MigrationReply, Status> {
        let cancelled = self.rooms.registry.cancel(&request.migration, &request.reason).await;
        cancelled.map(moved).map_err(|error| status::of_registry(&error))
    }

    pub(super) async fn claimed(&self, request: ClaimVmRequest) -> Result<VmReply, Status> {
        let vm = vm_named(request.vm)?;
        let claimed = self.rooms.registry.claim(&vm, request.fenced).await;
        claimed.map_err(|error| status::of_registry(&error))?;
        self.reply(&vm)
    }

    pub(super) fn progress(&self, migration: &str) -> Result<MigrationProgress, Status> {
        let progress = self.rooms.registry.progress(migration);
        progress.map(|p| p.borrow().clone()).map_err(|error| status::of_registry(&error))
    }

    pub(super) fn completion(&self, migration: &str) -> Result<CompletionReply, Status> {
        let phase = self.progress(migration)?.phase();
        Ok(CompletionReply { completed: phase == Phase::Completed, phase: phase.into() })
    }

    pub(super) fn watched(
        &self,
        migration: &str,
    ) -> Result<ReceiverStream<Result<MigrationProgress, Status>>, Status> {
        let progress = self.rooms.registry.progress(migration);
        let mut progress = progress.map_err(|error| status::of_registry(&error))?;
        let (tell, told) = mpsc::channel(4);
        tasks::spawn("migration watch", async move {
            loop {
                let now = progress.borrow_and_update().clone();
                let is_final = now.phase().is_final();
                // An error means that nobody watches any more.
                if tell.send(Ok(now)).await.is_err() || is_final {
                    return;
                }
                tokio::time::sleep(TELL_EVERY).await;
                let changed = tokio::select! {
                    changed = progress.changed() => changed,
                    () = tell.closed() => return,
                };
                if changed.is_err() {
                    return;
                }
            }
        });
        Ok(ReceiverStream::new(told))
    }
}
