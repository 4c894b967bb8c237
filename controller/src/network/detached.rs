//! The network of a controller that was told of no way to reach its switches (`openflow_listen` is
//! absent): nothing can be reserved, and it says so.
//!
//! An evacuation of urgency 0 asks for no share and goes on without; any other is refused before a
//! VM moves.

use futures_util::future::{BoxFuture, ready};
use lifeboat_protocol::ids::{EvacuationId, MigrationId};
use lifeboat_protocol::units::BitsPerSec;

use super::{
    Adjustment, FollowVm, Network, NetworkError, PortRate, ReleaseReport, ReservationRequest,
    Reserved, SwitchStatus,
};

/// No switches.
#[derive(Debug, Clone, Copy, Default)]
pub struct Detached;

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
                detail: "set controller.openflow_listen in the configuration, or evacuate with --urgency 0".to_owned(),
            }),
        };
        Box::pin(ready(answer))
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

    fn follow_vm(&self, _: FollowVm) -> BoxFuture<'_, Result<(), NetworkError>> {
        Box::pin(ready(Ok(())))
    }
}
