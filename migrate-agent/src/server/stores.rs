//! The calls of the role intermediary, and what its stores are to the host's description.

use lifeboat_protocol::agent::{
    PrepareDiskStoreReply, PrepareDiskStoreRequest, PrepareStoreReply, PrepareStoreRequest,
    ReleaseStoreReply, ReleaseStoreRequest, StoreStatus,
};
use tonic::Status;

use super::{Service, status};
use crate::config::AgentRole;

/// What the description says of stores.
#[derive(Default)]
pub(super) struct Stores {
    pub(super) kept: Vec<StoreStatus>,
    pub(super) free: u64,
    pub(super) obstacle: String,
}

impl Service {
    pub(super) async fn store_prepared(
        &self,
        request: PrepareStoreRequest,
    ) -> Result<PrepareStoreReply, Status> {
        self.must_be(AgentRole::Intermediary)?;
        let Some(stores) = &self.rooms.intermediary else { return Err(no_role()) };
        let store = stores.prepare(&request).await;
        let store = store.map_err(|error| status::of_intermediary(&error))?;
        Ok(PrepareStoreReply { store: Some(store) })
    }

    pub(super) async fn disk_store_prepared(
        &self,
        request: PrepareDiskStoreRequest,
    ) -> Result<PrepareDiskStoreReply, Status> {
        self.must_be(AgentRole::Intermediary)?;
        let store = self.rooms.registry.prepare_disk_store(&request).await;
        let store = store.map_err(|error| status::of_registry(&error))?;
        Ok(PrepareDiskStoreReply { store: Some(store) })
    }

    /// Also where the role was taken away meanwhile: then there are no pages to release.
    pub(super) async fn store_released(
        &self,
        request: ReleaseStoreRequest,
    ) -> Result<ReleaseStoreReply, Status> {
        let held_disks = self.rooms.registry.release_disk_store(&request.migration).await;
        let held_disks = held_disks.map_err(|error| status::of_registry(&error))?;
        let Some(stores) = &self.rooms.intermediary else {
            return Ok(ReleaseStoreReply { held_pages: false, held_disks });
        };
        let held_pages = stores.release(&request.migration).await;
        let held_pages = held_pages.map_err(|error| status::of_intermediary(&error))?;
        Ok(ReleaseStoreReply { held_pages, held_disks })
    }

    pub(super) fn stores(&self) -> Stores {
        let Some(stores) = &self.rooms.intermediary else {
            let obstacle = "its agent does not have the role intermediary".to_owned();
            return Stores { obstacle, ..Stores::default() };
        };
        let (free, obstacle) = stores.free();
        Stores { kept: stores.statuses(), free: free.0, obstacle }
    }
}

fn no_role() -> Status {
    Status::internal("the stores of this host were not opened; look at the agent's log")
}
