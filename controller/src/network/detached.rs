//! The network of a controller without connections to its switches: nothing can be reserved, and it
//! says so.
//!
//! An evacuation of urgency 0 asks for no share and goes on without; any other is refused before a
//! VM moves.

use futures_util::future::{BoxFuture, ready};
use lifeboat_protocol::ids::{EvacuationId, MigrationId};
use lifeboat_protocol::units::BitsPerSec;
use tokio::sync::watch;

use super::{
    Adjustment, FollowVm, Network, NetworkError, PendingRelease, PortRate, ReleaseReport,
    ReservationRequest, Reserved, SwitchStatus,
};

/// No switches, and why.
#[derive(Debug, Clone, Copy)]
pub struct Detached {
    why: &'static str,
}

impl Detached {
    /// A network that cannot be reached; `why` ends the sentence that operators read, and says what
    /// to do.
    #[must_use]
    pub const fn new(why: &'static str) -> Self {
        Self { why }
    }
}

impl Network for Detached {
    fn reserve(
        &self,
        request: ReservationRequest,
    ) -> BoxFuture<'_, Result<Reserved, NetworkError>> {
        let wanted = request.hops.iter().find(|hop| hop.rate > BitsPerSec::ZERO);
        let answer = match wanted {
            None => Ok(Reserved::default()),
            Some(hop) => Err(NetworkError::Unable {
                switch: hop.at.switch.clone(),
                doing: "reserve",
                detail: self.why.to_owned(),
            }),
        };
        Box::pin(ready(answer))
    }

    fn reroute(
        &self,
        request: ReservationRequest,
    ) -> BoxFuture<'_, Result<Reserved, NetworkError>> {
        self.reserve(request)
    }

    /// Nothing will ever be told: the sender is gone.
    fn link_news(&self) -> watch::Receiver<u64> {
        watch::channel(0).1
    }

    fn adjust(&self, _: Adjustment) -> BoxFuture<'_, Result<Reserved, NetworkError>> {
        Box::pin(ready(Ok(Reserved::default())))
    }

    fn release(&self, _: EvacuationId, _: Option<MigrationId>) -> BoxFuture<'_, ReleaseReport> {
        Box::pin(ready(ReleaseReport::default()))
    }

    fn release_leftovers(&self, _: Vec<MigrationId>) -> BoxFuture<'_, ReleaseReport> {
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

    fn follow_vm(&self, _: FollowVm) -> BoxFuture<'_, Result<(), NetworkError>> {
        Box::pin(ready(Ok(())))
    }
}
