//! Performs one action each and reports what came of it.
//!
//! Every action that the machine waits for is answered, whatever happens: an error is an event too.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lifeboat_protocol::agent::{
    DiskMode, PrepareDestinationRequest, StartMigrationRequest, VmDefinition,
};
use lifeboat_protocol::ids::{EvacuationId, HostId, MigrationId, VmId};
use tokio::sync::mpsc;

use super::{Input, lock, report};
use crate::bases;
use crate::clock;
use crate::evacuation::{
    Action, EvacuationOrder, Event, Fleet, Leg, PageTicket, VmRecord, Waiting,
};
use crate::network::{FollowVm, Hop, NetworkError, ReservationRequest, Reserved};
use crate::planner::{Planner, Promised};
use crate::reservations;

/// How long the driver waits for what may come back by itself.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For a source's agent, before its VMs cannot be chosen.
    pub connect: Duration,
    /// For a source's agent that has gone silent during a migration.
    pub watch: Duration,
    /// For the agents' word on a migration in doubt, before it is called uncertain.
    pub settle: Duration,
    /// Between two tries of anything.
    pub again: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(30),
            watch: Duration::from_secs(30),
            settle: Duration::from_secs(120),
            again: Duration::from_secs(1),
        }
    }
}

/// Why nothing is prepared at an agent that knows no disks that follow.
const OLDER: &str = "its agent is older than disks that follow their VM in this way; upgrade it, or use --disk copy";
/// Tries of a release before it is left to the next start's sweep.
const RELEASE_TRIES: u32 = 5;

/// What an action is performed with.
pub struct Hands {
    pub(super) planner: Planner,
    pub(super) patience: Patience,
    pub(super) wiring: Option<Wiring>,
}

/// The way back into the loop.
pub(super) struct Wiring {
    pub(super) inputs: mpsc::Sender<Input>,
    pub(super) fleet: Arc<Mutex<Fleet>>,
}

impl Hands {
    /// Hands that plan, call and reserve through `planner`'s connections.
    #[must_use]
    pub fn new(planner: Planner, patience: Patience) -> Self {
        Self { planner, patience, wiring: None }
    }

    pub(super) fn wired(mut self, inputs: mpsc::Sender<Input>, fleet: Arc<Mutex<Fleet>>) -> Self {
        self.wiring = Some(Wiring { inputs, fleet });
        self
    }

    pub(super) async fn perform(&self, id: EvacuationId, action: Action) {
        let Some(wiring) = &self.wiring else { return };
        let event = match action {
            Action::Plan => Some(self.plan(wiring, &id).await),
            Action::Choose { waiting } => self.choose(wiring, &id, &waiting).await,
            Action::Reserve { source, leg, .. } => {
                Some(self.reserve(wiring, &id, &source, &leg).await)
            }
            Action::Prepare { vm, source, leg } => {
                Some(self.prepare(wiring, &id, &vm, &source, &leg).await)
            }
            Action::Start { vm, source, leg, ticket } => {
                Some(self.start(wiring, &id, &vm, &source, &leg, ticket).await)
            }
            Action::Watch { migration, source, destination } => {
                Some(self.watch(wiring, &id, &migration, &source, &destination).await)
            }
            Action::Cancel { migration, source } => {
                self.cancel(&migration, &source).await;
                None
            }
            Action::Settle { migration, source, destination, because, committed, .. } => {
                let ends = (&source, &destination);
                Some(self.settle(migration, ends, &because, committed).await)
            }
            Action::Gather { migration, vm, destination } => {
                Some(self.gather(wiring, &id, migration, &vm, &destination).await)
            }
            Action::ReleaseStores { migration, hosts } => {
                Some(self.release_stores(&id, migration, hosts).await)
            }
            Action::Follow { vm, to } => {
                self.follow(&vm, &to).await;
                None
            }
            Action::Release { migration } => Some(self.release(wiring, &id, migration).await),
            Action::Finished { evacuation } => {
                tracing::info!(%evacuation, "evacuation ended; see its report");
                None
            }
        };
        if let Some(event) = event {
            report(&wiring.inputs, &id, event).await;
        }
    }

    pub(super) fn order(wiring: &Wiring, id: &EvacuationId) -> Option<EvacuationOrder> {
        lock(&wiring.fleet).get(id).map(|evacuation| evacuation.order.clone())
    }

    async fn plan(&self, wiring: &Wiring, id: &EvacuationId) -> Event {
        let Some(order) = Self::order(wiring, id) else {
            return Event::Planned { vms: Vec::new() };
        };
        for host in &order.hosts {
            self.await_agent(host).await;
        }
        let promised = Promised::by(&lock(&wiring.fleet));
        let vms = match self.planner.plan(&order, &promised).await {
            Ok(plan) => plan.records(),
            Err(error) => {
                // Without a plan nobody moves; the VMs that are known say why.
                let hosts = self.planner.inventory.hosts();
                let known = order.hosts.iter().flat_map(|host| {
                    let entry = hosts.get(host).cloned().unwrap_or_default();
                    let names = entry.vms.into_iter().filter(crate::inventory::owns);
                    names.map(move |status| (host.clone(), status))
                });
                let stays = known.filter_map(|(host, status)| {
                    let vm = VmId::new(crate::inventory::name_of(&status)).ok()?;
                    Some(VmRecord::left_behind(vm, host, error.to_string()))
                });
                stays.collect()
            }
        };
        Event::Planned { vms }
    }

    async fn choose(
        &self,
        wiring: &Wiring,
        id: &EvacuationId,
        waiting: &[Waiting],
    ) -> Option<Event> {
        let order = Self::order(wiring, id)?;
        let begun = clock::now();
        loop {
            for host in &order.hosts {
                self.await_agent(host).await;
            }
            let promised = Promised::by(&lock(&wiring.fleet));
            let (choice, no_place) = self.planner.choose(&order, &promised, waiting).await;
            // An agent that went away while it was asked is no reason to leave its VMs behind.
            let gone = |host: &HostId| !self.is_connected(host);
            let again = choice.is_none() && order.hosts.iter().any(gone);
            if !again || elapsed(begun) >= self.patience.connect {
                return Some(Event::Chosen { choice, no_place });
            }
        }
    }

    /// Waits until an agent answers, or patience ends: one that restarts is back in seconds.
    async fn await_agent(&self, host: &HostId) {
        let begun = clock::now();
        while !self.is_connected(host) && elapsed(begun) < self.patience.connect {
            tokio::time::sleep(self.patience.again).await;
        }
    }

    fn is_connected(&self, host: &HostId) -> bool {
        self.planner.inventory.host(host).is_some_and(|entry| entry.connected)
    }

    async fn reserve(
        &self,
        wiring: &Wiring,
        id: &EvacuationId,
        source: &HostId,
        leg: &Leg,
    ) -> Event {
        let migration = leg.migration.clone();
        match self.try_reserve(wiring, id, source, leg).await {
            Ok(reserved) => Event::Reserved { migration, reserved },
            Err(reason) => Event::ReserveFailed { migration, reason },
        }
    }

    async fn try_reserve(
        &self,
        wiring: &Wiring,
        id: &EvacuationId,
        source: &HostId,
        leg: &Leg,
    ) -> Result<Reserved, String> {
        let order = Self::order(wiring, id).ok_or("the evacuation is gone")?;
        let traffic = self.planner.page_flow(source, &leg.destination);
        let traffic = traffic.map_err(|error| error.to_string())?;
        let request = ReservationRequest {
            evacuation: id.clone(),
            migration: leg.migration.clone(),
            urgency: order.urgency,
            kind: order.reservation,
            hops: self.opening(id, &order, leg).await,
            traffic,
        };
        let begun = clock::now();
        loop {
            match self.planner.network.reserve(request.clone()).await {
                Ok(reserved) => return Ok(reserved),
                Err(error) if may_wait(&error) && elapsed(begun) < self.patience.connect => {
                    tracing::debug!(%error, "reserve again");
                    tokio::time::sleep(self.patience.again).await;
                }
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    /// What to ask of each port at the beginning; of a fixed order, what was planned.
    async fn opening(&self, id: &EvacuationId, order: &EvacuationOrder, leg: &Leg) -> Vec<Hop> {
        if order.fixed {
            return leg.hops.clone();
        }
        let rules = self.planner.site.config.policy.rules();
        let rates = self.planner.network.rates().await;
        reservations::opening(&rules, id, reservations::terms(order), &leg.hops, &rates)
    }

    async fn prepare(
        &self,
        wiring: &Wiring,
        id: &EvacuationId,
        vm: &VmId,
        source: &HostId,
        leg: &Leg,
    ) -> Event {
        let migration = leg.migration.clone();
        let found = self.planner.inventory.host(source).and_then(|entry| {
            let is = |status: &&_| crate::inventory::is(status, vm);
            entry.vms.iter().find(is).cloned()
        });
        let Some(status) = found else {
            let reason = format!("{source} does not know the VM any more");
            return Event::PrepareFailed { migration, reason, store: None };
        };
        let mut definition = status.definition.unwrap_or_default();
        let disks_there = self.disks_there(vm, source, leg, &mut definition).await;
        let scatter = match self.open_stores(vm, source, leg).await {
            Ok(scatter) => scatter,
            Err((reason, store)) => return Event::PrepareFailed { migration, reason, store },
        };
        if let Some(scatter) = &scatter {
            self.reserve_store_ways(wiring, id, source, leg, scatter).await;
            self.reserve_gather_ways(wiring, id, leg, scatter).await;
        }
        let from = (source, leg);
        let opened = self.open_disk_store(wiring, id, from, &definition, status.generation).await;
        let disk_store = match opened {
            Ok(store) => store,
            Err((reason, store)) => return Event::PrepareFailed { migration, reason, store },
        };
        let source_entry = self.planner.inventory.host(source);
        let disk = Self::order(wiring, id).map_or(DiskMode::Copy, |order| order.disk.into());
        let request = PrepareDestinationRequest {
            source_page_address: source_entry
                .and_then(|entry| entry.description)
                .map_or_else(String::new, |description| description.page_address),
            command: None,
            migration: migration.to_string(),
            definition: Some(definition),
            mode: lifeboat_protocol::agent::Mode::from(leg.mode).into(),
            generation: status.generation,
            source_host: source.to_string(),
            scatter: scatter.clone(),
            disk: disk.into(),
            disk_store_host: disk_store.as_ref().map_or_else(String::new, |s| s.host.clone()),
            ..PrepareDestinationRequest::default()
        };
        match self.planner.agents.prepare(&leg.destination, request).await {
            // It would take a disk for whole of which a part is to follow.
            Ok(reply) if disk != DiskMode::Copy && reply.disk() != disk => {
                let _ = self.planner.agents.cancel(&leg.destination, &migration, OLDER).await;
                Event::PrepareFailed { migration, reason: OLDER.to_owned(), store: None }
            }
            Ok(reply) => {
                let (address, token, seeded) = (reply.page_address, reply.token, reply.seeded);
                let ticket =
                    PageTicket { address, token, seeded, disks_there, scatter, disk_store };
                Event::Prepared { migration, ticket }
            }
            Err(error) => {
                let (reason, store) = (error.to_string(), error.failed_store());
                Event::PrepareFailed { migration, reason, store }
            }
        }
    }

    /// Marks the disks that nobody writes to and that the destination has: neither side counts them among
    /// those that move. Their places.
    async fn disks_there(
        &self,
        vm: &VmId,
        source: &HostId,
        leg: &Leg,
        definition: &mut VmDefinition,
    ) -> Vec<u32> {
        let (agents, to) = (&self.planner.agents, &leg.destination);
        let there = bases::there_already(agents, source, vm, to, definition).await;
        let there = there.unwrap_or_else(|error| {
            tracing::warn!(%vm, %error, "what the destination has already is not known");
            vec![]
        });
        for (disk, number) in definition.disks.iter_mut().zip(0..) {
            disk.is_there = there.contains(&number);
        }
        there
    }

    async fn start(
        &self,
        wiring: &Wiring,
        id: &EvacuationId,
        vm: &VmId,
        source: &HostId,
        leg: &Leg,
        ticket: PageTicket,
    ) -> Event {
        let migration = leg.migration.clone();
        let order = Self::order(wiring, id);
        let left = order.as_ref().and_then(|order| order.deadline);
        let disk = order.as_ref().map_or_else(Default::default, |order| order.disk);
        let kind = order.as_ref().map_or_else(Default::default, |order| order.reservation);
        let limit = reservations::sending_limit(kind, &leg.reserved_for_sending(), leg.narrowest());
        let request = StartMigrationRequest {
            command: None,
            migration: migration.to_string(),
            vm: vm.to_string(),
            mode: lifeboat_protocol::agent::Mode::from(leg.mode).into(),
            destination_host: leg.destination.to_string(),
            page_address: ticket.address,
            token: ticket.token,
            scatter: ticket.scatter,
            compare_disks: ticket.seeded,
            disks_there: ticket.disks_there,
            disk: DiskMode::from(disk).into(),
            disk_store: ticket.disk_store,
            handover_size_bytes: order.as_ref().map_or(0, |order| order.handover_size),
            disk_watch_ms: order.as_ref().map_or(0, |order| order.disk_watch_ms),
            network_limit_bits_per_sec: limit.0,
            downtime_limit_ms: order.map_or(0, |order| order.downtime_limit_ms),
            iterations_max: 0,
            disk_limit_bytes_per_sec: leg
                .disk_date
                .and_then(|date| date.limit)
                .map_or(0, |limit| limit.0),
            // A date that has passed is still one: the least that a guest can be held to.
            disk_window_ms: leg
                .disk_date
                .map_or(0, |date| date.in_step_by.since(clock::now()).max(1)),
            deadline_ms: left.map_or(0, |deadline| deadline.since(clock::now())),
            ..StartMigrationRequest::default()
        };
        match self.planner.agents.start(source, request).await {
            Ok(()) => Event::Started { migration },
            Err(error) => Event::StartFailed { migration, reason: error.to_string() },
        }
    }

    /// Told to the source only: it takes its destination back with it. What comes of it is heard by
    /// the watch.
    async fn cancel(&self, migration: &MigrationId, source: &HostId) {
        let reason = "cancelled by the operator";
        for _ in 0..RELEASE_TRIES {
            match self.planner.agents.cancel(source, migration, reason).await {
                Err(error) if error.is_silence() => tokio::time::sleep(self.patience.again).await,
                Err(error) => {
                    tracing::info!(%migration, %error, "not cancelled");
                    return;
                }
                Ok(_) => return,
            }
        }
    }

    async fn follow(&self, vm: &VmId, to: &HostId) {
        let hosts = self.planner.inventory.hosts();
        let all = hosts.values().flat_map(|entry| entry.vms.iter());
        let known = all.filter(|status| crate::inventory::is(status, vm));
        let Some(definition) = known.filter_map(|status| status.definition.clone()).next() else {
            return;
        };
        for nic in definition.nics {
            let vlan = u16::try_from(nic.vlan_tag).unwrap_or(0);
            let follow = FollowVm { mac: nic.mac, vlan, to: to.clone() };
            if let Err(error) = self.planner.network.follow_vm(follow).await {
                // The destination's announcement moves the traffic all the same.
                tracing::warn!(%vm, %to, %error, "flows not moved");
            }
        }
    }

    async fn release(&self, wiring: &Wiring, id: &EvacuationId, migration: MigrationId) -> Event {
        let mut failures = Vec::new();
        let ways = Self::store_ways(wiring, id, &migration);
        for _ in 0..RELEASE_TRIES {
            failures.clear();
            for name in ways.iter().chain([&migration]) {
                let report = self.planner.network.release(id.clone(), Some(name.clone())).await;
                failures.extend(report.failures.iter().map(|failure| failure.error.to_string()));
            }
            if failures.is_empty() {
                break;
            }
            tracing::warn!(%migration, ?failures, "release again");
            tokio::time::sleep(self.patience.again).await;
        }
        Event::Released { migration, failures }
    }
}

const fn may_wait(error: &NetworkError) -> bool {
    matches!(error, NetworkError::NotConnected { .. } | NetworkError::Late { .. })
}

pub(super) fn elapsed(since: clock::UnixMs) -> Duration {
    Duration::from_millis(clock::now().since(since))
}
