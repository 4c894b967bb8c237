//! Switches that only count: what is held, and by whom.

use std::collections::BTreeMap;
use std::sync::Mutex;

use futures_util::future::{BoxFuture, ready};
use lifeboat_controller::network::{
    Adjustment, FollowVm, Network, NetworkError, PendingRelease, PortRate, ReleaseReport,
    ReservationRequest, Reserved, ReservedHop, SwitchStatus,
};
use lifeboat_protocol::ids::{EvacuationId, MigrationId};
use tokio::sync::watch;

/// What the switches hold. Outlives controllers, as real ones do.
#[derive(Debug, Default)]
pub(crate) struct CountingNetwork {
    pub(crate) held: Mutex<BTreeMap<MigrationId, ReservationRequest>>,
    pub(crate) reserved: Mutex<Vec<ReservationRequest>>,
    pub(crate) followed: Mutex<Vec<FollowVm>>,
}

impl Network for CountingNetwork {
    fn reserve(
        &self,
        request: ReservationRequest,
    ) -> BoxFuture<'_, Result<Reserved, NetworkError>> {
        let hops = request.hops.iter().map(|hop| ReservedHop {
            at: hop.at.clone(),
            capacity: hop.capacity,
            rate: hop.rate,
            queue: 7,
        });
        let reserved = Reserved { hops: hops.collect() };
        self.reserved.lock().unwrap().push(request.clone());
        self.held.lock().unwrap().insert(request.migration.clone(), request);
        Box::pin(ready(Ok(reserved)))
    }

    fn reroute(
        &self,
        request: ReservationRequest,
    ) -> BoxFuture<'_, Result<Reserved, NetworkError>> {
        self.reserve(request)
    }

    fn link_news(&self) -> watch::Receiver<u64> {
        watch::channel(0).1
    }

    fn adjust(&self, _: Adjustment) -> BoxFuture<'_, Result<Reserved, NetworkError>> {
        Box::pin(ready(Ok(Reserved::default())))
    }

    fn release(
        &self,
        evacuation: EvacuationId,
        migration: Option<MigrationId>,
    ) -> BoxFuture<'_, ReleaseReport> {
        let mut held = self.held.lock().unwrap();
        held.retain(|id, request| {
            request.evacuation != evacuation || migration.as_ref().is_some_and(|m| m != id)
        });
        Box::pin(ready(ReleaseReport::default()))
    }

    fn release_leftovers(&self, keep: Vec<MigrationId>) -> BoxFuture<'_, ReleaseReport> {
        self.held.lock().unwrap().retain(|id, _| keep.contains(id));
        Box::pin(ready(ReleaseReport::default()))
    }

    fn switches(&self) -> BoxFuture<'_, Vec<SwitchStatus>> {
        Box::pin(ready(Vec::new()))
    }

    fn rates(&self) -> BoxFuture<'_, Vec<PortRate>> {
        Box::pin(ready(Vec::new()))
    }

    fn pending(&self) -> BoxFuture<'_, Vec<PendingRelease>> {
        Box::pin(ready(Vec::new()))
    }

    fn follow_vm(&self, follow: FollowVm) -> BoxFuture<'_, Result<(), NetworkError>> {
        self.followed.lock().unwrap().push(follow);
        Box::pin(ready(Ok(())))
    }
}
