//! Stores at intermediaries, and the destination that gathers from them.
//!
//! Opens them before a leg's destination makes room, follows the gathering, and releases them when
//! the machine says that nobody needs them: until their hosts have said so, however long that takes.

use lifeboat_protocol::agent::{self, Phase, PrepareStoreRequest, ScatterPlan};
use lifeboat_protocol::ids::{EvacuationId, HostId, MigrationId, VmId};

use super::hands::{Hands, Wiring};
use super::report;
use super::settle::Said;
use crate::evacuation::{Event, Leg};

impl Hands {
    /// Opens every store of a leg; `None` for one that has none.
    pub(super) async fn open_stores(
        &self,
        vm: &VmId,
        source: &HostId,
        leg: &Leg,
    ) -> Result<Option<ScatterPlan>, String> {
        let Some(chosen) = &leg.stores else { return Ok(None) };
        let mut stores = Vec::new();
        for store in &chosen.stores {
            let request = PrepareStoreRequest {
                command: None,
                migration: leg.migration.to_string(),
                vm: vm.to_string(),
                memory_bytes: store.memory.0,
                source_host: source.to_string(),
                destination_host: leg.destination.to_string(),
            };
            let reply = self.planner.agents.prepare_store(&store.host, request).await;
            let reply = reply.map_err(|error| format!("no store at {}: {error}", store.host))?;
            let mut open = reply.store.ok_or_else(|| format!("{} names no store", store.host))?;
            open.rate_bits_per_sec = store.rate.0;
            stores.push(open);
        }
        let redundancy = agent::Redundancy::from(chosen.redundancy);
        Ok(Some(ScatterPlan { stores, redundancy: redundancy.into(), batch_pages: 0 }))
    }

    /// Asks the destination until it has all, or has lost the guest. Its silence proves nothing, and
    /// the stores stay: they hold the only copy.
    pub(super) async fn gather(
        &self,
        wiring: &Wiring,
        id: &EvacuationId,
        migration: MigrationId,
        destination: &HostId,
    ) -> Event {
        loop {
            match self.ask(destination, &migration).await {
                Said::Progress(progress) => match progress.phase() {
                    Phase::Completed => return Event::Gathered { migration, lost: None },
                    Phase::Lost => {
                        let lost = Some(progress.reason.clone());
                        return Event::Gathered { migration, lost };
                    }
                    _ => {
                        let mut progress = progress;
                        progress.migration = migration.to_string();
                        report(&wiring.inputs, id, Event::Gathering(progress)).await;
                    }
                },
                Said::NotKnown => {
                    tracing::warn!(%migration, %destination, "it gathers, and does not know of it");
                }
                Said::Silent(why) => tracing::debug!(%migration, %destination, why, "gathering"),
            }
            tokio::time::sleep(self.patience.again / 2).await;
        }
    }

    pub(super) async fn release_stores(
        &self,
        migration: MigrationId,
        mut hosts: Vec<HostId>,
    ) -> Event {
        loop {
            let mut left = Vec::new();
            for host in hosts {
                match self.planner.agents.release_store(&host, &migration).await {
                    Ok(_) => tracing::info!(%migration, %host, "store released"),
                    Err(error) => {
                        tracing::warn!(%migration, %host, %error, "store is owed; it is tried again");
                        left.push(host);
                    }
                }
            }
            if left.is_empty() {
                return Event::StoresReleased { migration };
            }
            hosts = left;
            tokio::time::sleep(self.patience.again * 5).await;
        }
    }
}
