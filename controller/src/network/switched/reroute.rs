//! Moving a reservation to another way while its migration goes on.
//!
//! Used by [`super::SwitchNetwork`] when a port of the way went down. On the new way the migration's
//! flows are *pinned*: they name the port that pages leave by, because the network's own forwarding
//! may still believe in the old way, or in a third one; and flows in the other direction bring the
//! acknowledgements back. The queues and flows of the old way go as soon as the new ones stand.
//!
//! A new way that cannot be installed leaves the ledger as it was: the old way is still there, and
//! works again should its port come back. Deliberately not here: which way.

use std::collections::BTreeSet;

use lifeboat_policy::reserve::Terms;
use lifeboat_protocol::ids::{EvacuationId, MigrationId, SwitchId};
use lifeboat_protocol::units::BitsPerSec;

use super::abilities::Divided;
use super::{Inner, locked};
use crate::network::{
    Ability, Hop, NetworkError, PortRef, ReleaseReport, ReservationRequest, Reserved,
};

impl Inner {
    /// See [`crate::network::Network::reroute`].
    pub(super) async fn reroute(
        &self,
        request: ReservationRequest,
    ) -> Result<Reserved, NetworkError> {
        let ReservationRequest { evacuation, migration, urgency, kind, mut hops, traffic } =
            request;
        hops.retain(|hop| hop.rate > BitsPerSec::ZERO);
        let Some(first) = hops.first() else { return Ok(Reserved::default()) };
        let (link, first) = (Self::page_link(&traffic, &first.at.switch)?, first.at.switch.clone());
        let _changing = self.changing.lock().await;
        let Divided { queued: hops, metered, paced } = self.divide(hops).await?;
        if let Some(hop) = metered.first().or(paced.first()) {
            return Err(Self::unpinnable(hop, &self.ability(&hop.at)));
        }
        self.check(&hops)?;
        let queue = self.choose_queue(&evacuation, &first).await?;
        let before = locked(&self.ledger).clone();
        let terms = Terms { urgency, kind };
        {
            let mut ledger = locked(&self.ledger);
            ledger.hold(&evacuation, &migration, terms, queue, &hops, link);
            ledger.pin(&evacuation, &migration);
        }
        let new = locked(&self.ledger).switches_of(&evacuation, &migration, &self.ground());
        match self.install(&evacuation, &hops, &new).await {
            Ok(reserved) => {
                let old = before.switches_of(&evacuation, &migration, &self.ground());
                self.tidy(&evacuation, &migration, old).await;
                tracing::info!(%evacuation, %migration, rate = %reserved.rate(), "rerouted");
                Ok(reserved)
            }
            Err(error) => {
                *locked(&self.ledger) = before;
                self.tidy(&evacuation, &migration, new).await;
                Err(error)
            }
        }
    }

    /// On a way that is not the network's own, flows must lead the pages from port to port.
    fn unpinnable(hop: &Hop, ability: &Ability) -> NetworkError {
        NetworkError::Unable {
            switch: hop.at.switch.clone(),
            doing: "lead pages another way",
            detail: format!("{} can do {ability}; its own controller has to reroute", hop.at.port),
        }
    }

    /// Takes away what these switches have of a migration, and of its evacuation's queues, beyond
    /// what the ledger says, and gives them back what it says.
    async fn tidy(
        &self,
        evacuation: &EvacuationId,
        migration: &MigrationId,
        switches: BTreeSet<SwitchId>,
    ) {
        let kept = locked(&self.ledger).switches_of(evacuation, migration, &self.ground());
        let mut report = ReleaseReport::default();
        for switch in &switches {
            let tidied = match kept.contains(switch) {
                true => self.install_flows(switch).await,
                false => self.delete_flows(switch, evacuation, Some(migration), false).await,
            };
            if let Err(error) = tidied {
                // The end of the migration looks everywhere, because its flows are pinned.
                tracing::debug!(%switch, %migration, %error, "old flows not deleted yet");
            }
        }
        for database in self.connections.databases() {
            if database.switches.iter().any(|switch| switches.contains(switch)) {
                let doomed = |whose: &EvacuationId, at: &PortRef| {
                    whose == evacuation && !locked(&self.ledger).ports_of(evacuation).contains(at)
                };
                self.remove_queues(&database, doomed, &mut report).await;
            }
        }
        for failure in report.failures {
            tracing::debug!(switch = %failure.switch, error = %failure.error, "old queues remain");
        }
    }
}
