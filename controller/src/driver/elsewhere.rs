//! Stores at intermediaries, and the destination that gathers from them.
//!
//! Opens them before a leg's destination makes room, follows the gathering, and releases them when
//! the machine says that nobody needs them: until their hosts have said so, however long that takes.

use lifeboat_protocol::agent::{
    self, DiskStore, Phase, PrepareDiskStoreRequest, PrepareStoreRequest, ScatterPlan,
    VmDefinition, VmState, VmStatus,
};
use lifeboat_protocol::ids::{EvacuationId, HostId, MigrationId, VmId};
use lifeboat_protocol::units::BitsPerSec;

use super::hands::{Hands, Wiring};
use super::settle::Said;
use super::{lock, report};
use crate::evacuation::{EvacuationOrder, Event, Leg, gather_names};
use crate::inventory::is;
use crate::network::{Hop, NetworkError, PageFlow, ReservationRequest, Reserved};
use crate::reservations;

impl Hands {
    /// Opens every store of a leg; `None` for one that has none. An error comes with the host at which there
    /// was none.
    pub(super) async fn open_stores(
        &self,
        vm: &VmId,
        source: &HostId,
        leg: &Leg,
    ) -> Result<Option<ScatterPlan>, (String, Option<HostId>)> {
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
            let at_fault = |reason: String| (reason, Some(store.host.clone()));
            let reply =
                reply.map_err(|error| at_fault(format!("no store at {}: {error}", store.host)))?;
            let mut open =
                reply.store.ok_or_else(|| at_fault(format!("{} names no store", store.host)))?;
            open.rate_bits_per_sec = store.rate.0;
            stores.push(open);
        }
        let redundancy = agent::Redundancy::from(chosen.redundancy);
        let batch_pages = self.planner.site.config.policy.batch_pages;
        let while_live = chosen.ahead.is_some();
        let redundancy = redundancy.into();
        Ok(Some(ScatterPlan { stores, redundancy, batch_pages, while_live }))
    }

    /// Reserves the source's way to each of its stores, so that they take in together what it sends.
    /// Pages go there without it, too: what cannot be had is told, and nobody waits for it.
    pub(super) async fn reserve_store_ways(
        &self,
        wiring: &Wiring,
        id: &EvacuationId,
        source: &HostId,
        leg: &Leg,
        scatter: &ScatterPlan,
    ) {
        let (Some(order), Some(chosen)) = (Self::order(wiring, id), &leg.stores) else { return };
        let ways = self.planner.store_ways(source, chosen, order.urgency).await;
        let ways = leg.store_ways().into_iter().zip(ways);
        self.reserve_ways(id, &order, ways, scatter, (source, false)).await;
    }

    /// Reserves the ways from the stores to the destination, which together fill its link as far as the
    /// urgency goes. They are held until it has gathered; best effort, as the others.
    pub(super) async fn reserve_gather_ways(
        &self,
        wiring: &Wiring,
        id: &EvacuationId,
        leg: &Leg,
        scatter: &ScatterPlan,
    ) {
        let (Some(order), Some(chosen)) = (Self::order(wiring, id), &leg.stores) else { return };
        let ways = self.planner.gather_ways(chosen, &leg.destination, order.urgency).await;
        let ways = leg.gather_ways().into_iter().zip(ways);
        self.reserve_ways(id, &order, ways, scatter, (&leg.destination, true)).await;
    }

    /// A way for each store, between it and its client; with `served` it is the store that sends.
    async fn reserve_ways(
        &self,
        id: &EvacuationId,
        order: &EvacuationOrder,
        ways: impl Iterator<Item = (MigrationId, Vec<Hop>)>,
        scatter: &ScatterPlan,
        (client, served): (&HostId, bool),
    ) {
        let Some(source) = self.planner.site.host(client).map(|host| host.address) else { return };
        for ((name, hops), store) in ways.zip(&scatter.stores) {
            let Ok(destination) = store.address.parse() else {
                tracing::warn!(%name, store.address, "no address that a switch can match");
                continue;
            };
            let traffic = PageFlow { source, destination, served };
            if let Err(error) = self.reserve_beside(id, order, &name, hops, traffic).await {
                tracing::warn!(%name, store.host, %error, "nothing is reserved between it and a store");
            }
        }
    }

    /// A way beside the migration's own, as far as what is reserved there leaves it.
    async fn reserve_beside(
        &self,
        id: &EvacuationId,
        order: &EvacuationOrder,
        name: &MigrationId,
        hops: Vec<Hop>,
        traffic: PageFlow,
    ) -> Result<Reserved, NetworkError> {
        let rates = self.planner.network.rates().await;
        let request = ReservationRequest {
            evacuation: id.clone(),
            migration: name.clone(),
            urgency: order.urgency,
            kind: order.reservation,
            hops: reservations::beside(id, hops, &rates),
            traffic,
        };
        self.planner.network.reserve(request).await
    }

    /// Makes room at the intermediary that a leg's disks go on to, and reserves the ways there and on from
    /// there; `None` for a leg whose disks do not. They go without a reservation, too.
    pub(super) async fn open_disk_store(
        &self,
        wiring: &Wiring,
        id: &EvacuationId,
        (source, leg): (&HostId, &Leg),
        definition: &VmDefinition,
        generation: u64,
    ) -> Result<Option<DiskStore>, (String, Option<HostId>)> {
        let Some(chosen) = &leg.disk_store else { return Ok(None) };
        let gone = || ("the evacuation is gone".to_owned(), None);
        let order = Self::order(wiring, id).ok_or_else(gone)?;
        let there = self.planner.inventory.host(&leg.destination);
        let there = there.and_then(|entry| entry.description).unwrap_or_default();
        let (store, to) = (&chosen.host, &leg.destination);
        let ways = self.planner.disk_store_ways(source, store, to, order.urgency);
        let [to_store, on] = ways.await;
        let (first, second) = (leg.store_ways(), leg.gather_ways());
        let to_store = self.reserve_disk_way(id, &order, &first, (source, store), to_store).await;
        let on = self.reserve_disk_way(id, &order, &second, (store, to), on).await;
        let request = PrepareDiskStoreRequest {
            command: None,
            migration: leg.migration.to_string(),
            definition: Some(definition.clone()),
            bytes: chosen.bytes.0,
            generation,
            source_host: source.to_string(),
            destination_host: to.to_string(),
            destination_page_address: there.page_address,
            onward_bits_per_sec: on.0,
        };
        let reply = self.planner.agents.prepare_disk_store(store, request).await;
        let at_fault = |reason: String| (reason, Some(store.clone()));
        let reply = reply.map_err(|error| at_fault(format!("no room at {store}: {error}")))?;
        let open = reply.store.ok_or_else(|| at_fault(format!("{store} names no room")))?;
        Ok(Some(DiskStore { rate_bits_per_sec: to_store.0, ..open }))
    }

    /// What may be sent on it; without a reservation what the way carries.
    async fn reserve_disk_way(
        &self,
        id: &EvacuationId,
        order: &EvacuationOrder,
        names: &[MigrationId],
        (from, to): (&HostId, &HostId),
        hops: Vec<Hop>,
    ) -> BitsPerSec {
        let capacity = hops.iter().map(|hop| hop.capacity).min().unwrap_or_default();
        let Some(name) = names.first() else { return capacity };
        let reserved = async {
            let traffic = self.planner.page_flow(from, to).map_err(|error| error.to_string())?;
            let reserved = self.reserve_beside(id, order, name, hops, traffic).await;
            reserved.map_err(|error| error.to_string())
        };
        let reserved = reserved.await.unwrap_or_else(|error| {
            tracing::warn!(%name, %from, %to, error, "nothing is reserved for disks between them");
            Reserved::default()
        });
        reservations::sending_limit(order.reservation, &reserved, capacity)
    }

    /// What is reserved towards a migration's stores.
    pub(super) fn store_ways(
        wiring: &Wiring,
        id: &EvacuationId,
        migration: &MigrationId,
    ) -> Vec<MigrationId> {
        let fleet = lock(&wiring.fleet);
        let legs = fleet.get(id).into_iter().flat_map(|e| &e.vms).filter_map(|r| r.leg.as_ref());
        legs.filter(|leg| leg.migration == *migration).flat_map(Leg::store_ways).collect()
    }

    /// Asks the destination until it has all, or has lost the guest. Its silence proves nothing, and
    /// the stores stay: they hold the only copy.
    pub(super) async fn gather(
        &self,
        wiring: &Wiring,
        id: &EvacuationId,
        migration: MigrationId,
        vm: &VmId,
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
                    if let Some(lost) = self.forgotten(vm, destination).await {
                        tracing::info!(%migration, %destination, ?lost, "it was over before its agent started anew");
                        return Event::Gathered { migration, lost };
                    }
                }
                Said::Silent(why) => tracing::debug!(%migration, %destination, why, "gathering"),
            }
            tokio::time::sleep(self.patience.again / 2).await;
        }
    }

    /// An agent that does not know a migration has started anew after its end: one that is not over is
    /// taken up again before anybody is answered. What became of the guest is seen by its state;
    /// `None` while that cannot be told.
    async fn forgotten(&self, vm: &VmId, destination: &HostId) -> Option<Option<String>> {
        let (_, vms) = self.planner.agents.describe(destination).await.ok()?;
        let state = vms.iter().find(|status| is(status, vm)).map(VmStatus::state);
        match state {
            Some(VmState::Running | VmState::Paused) => Some(None),
            Some(VmState::Stopped | VmState::Crashed) | None => Some(Some(format!(
                "{destination} has forgotten the migration, and its guest does not run there: \
                 see the log of its agent"
            ))),
            Some(_) => None,
        }
    }

    pub(super) async fn release_stores(
        &self,
        id: &EvacuationId,
        migration: MigrationId,
        mut hosts: Vec<HostId>,
    ) -> Event {
        for name in gather_names(&migration, hosts.len()) {
            let report = self.planner.network.release(id.clone(), Some(name.clone())).await;
            for failure in report.failures {
                // Owed by the network from now on.
                tracing::warn!(%name, switch = %failure.switch, error = %failure.error, "not released yet");
            }
        }
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
