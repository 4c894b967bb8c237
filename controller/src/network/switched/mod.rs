//! The network of real switches: Open vSwitch bridges over OVSDB and OpenFlow 1.3.
//!
//! The implementation of [`Network`] that runs wherever `openflow_listen` is set. A reservation is
//! made in this order, and taken back in the opposite one:
//!
//! ```text
//!  queue rows (OVSDB, installed) -> classifier (agent, userspace datapath only)
//!                                -> meter (where no queue can be), flows (OpenFlow) -> barrier -> Reserved
//! ```
//!
//! What should be is in the `ledger`; what is there is found by the marks of `mark`. Everything is
//! written so that doing it again does no harm, because switches restart, connections break and
//! controllers are killed at any point. One change at a time is on its way (`Inner::changing`):
//! they take milliseconds, and two that overtake each other on one port would cost more than they
//! gain.
//!
//! Deliberately not here: how much is wanted, for whom, and which way.

mod abilities;
mod bridge;
mod classifier;
mod connections;
mod counters;
mod discovery;
mod hold;
mod ledger;
mod leftovers;
mod mark;
mod poll;
mod queues;
mod release;
mod reroute;
mod reserve;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use futures_util::future::{BoxFuture, ready};
use lifeboat_ovs::Tls;
use lifeboat_ovs::openflow::{self, RequestError};
use lifeboat_policy::reserve::Floor;
use lifeboat_policy::saturation::SaturationParameters;
use lifeboat_protocol::ids::{EvacuationId, HostId, MigrationId, SwitchId};
use lifeboat_protocol::units::BitsPerSec;
use lifeboat_topology::Sightings;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::{
    Adjustment, FollowVm, Network, NetworkError, PendingRelease, PortRate, PortRef, ReleaseReport,
    ReservationRequest, Reserved, SwitchStatus,
};
use crate::agents::Agents;
use crate::config::Site;
use crate::{clock, tasks};

pub use classifier::{ClassifierError, Classifiers};
use connections::Connections;
use ledger::Ledger;
use poll::Counters;
use queues::WITHIN;
use release::{Debt, Owed};

/// How long a reservation outlives a controller that does not renew it: then whoever tidies the
/// switches knows that nobody needs it.
const LEASE_SECONDS: u64 = 600;

/// Probes that may wait to be looked at; more are lost, as any packet may be.
const PROBES: usize = 1024;

/// The switches of a site.
pub struct SwitchNetwork {
    inner: Arc<Inner>,
    tasks: Vec<JoinHandle<()>>,
}

/// A port of a configured link.
#[derive(Debug, Clone)]
struct LinkEnd {
    capacity: BitsPerSec,
    peer: String,
    to: PortRef,
}

/// Looks something up for a port.
type OfPort<T> = Box<dyn Fn(&PortRef) -> Option<T> + Send + Sync>;

struct Inner {
    connections: Arc<Connections>,
    links: Arc<BTreeMap<PortRef, LinkEnd>>,
    /// A port's OpenFlow number, and the port at the other end of its link.
    numbers: OfPort<u32>,
    peers: OfPort<PortRef>,
    sightings: Mutex<Sightings>,
    ledger: Mutex<Ledger>,
    counters: Mutex<Counters>,
    saturation: SaturationParameters,
    /// What each switch has for migrations.
    budgets: BTreeMap<SwitchId, BitsPerSec>,
    /// Whose flows decide on each switch.
    pipelines: abilities::Pipelines,
    /// What the kernels of switches' machines can do, by agent.
    shapers: abilities::Shapers,
    /// Switches that may have our meter.
    meters: Mutex<BTreeSet<SwitchId>>,
    /// Releases that could not reach every switch.
    debts: Mutex<BTreeMap<Debt, Owed>>,
    /// Migrations that asked for nothing, and so have nothing to release anywhere.
    empty: Mutex<BTreeSet<MigrationId>>,
    classifiers: OnceLock<Arc<dyn Classifiers>>,
    changing: tokio::sync::Mutex<()>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SwitchNetwork {
    /// Begins to listen for switches and to connect to their databases. Inside tokio; without
    /// `openflow_listen` no switch can connect, and without `tls` none over TLS.
    #[must_use]
    pub fn start(site: &Site, tls: Option<Tls>) -> Self {
        let policy = &site.config.policy;
        let floor = Floor { share: policy.floor, at_least: policy.floor_at_least };
        let (found, arrived) = mpsc::channel(PROBES);
        let connections = Arc::new(Connections::start(site, found, tls.clone()));
        let links = Arc::new(links(site));
        let inner = Arc::new(Inner {
            connections: Arc::clone(&connections),
            numbers: Box::new({
                let connections = Arc::clone(&connections);
                move |at| connections.port_number(at)
            }),
            peers: Box::new({
                let links = Arc::clone(&links);
                move |at| links.get(at).map(|link| link.to.clone())
            }),
            sightings: Mutex::default(),
            links,
            ledger: Mutex::new(Ledger::new(floor)),
            counters: Mutex::default(),
            saturation: policy.saturation(),
            budgets: budgets(site),
            pipelines: abilities::Pipelines::default(),
            shapers: abilities::Shapers::default(),
            meters: Mutex::default(),
            debts: Mutex::default(),
            empty: Mutex::default(),
            classifiers: OnceLock::new(),
            changing: tokio::sync::Mutex::new(()),
        });
        let mut tasks = vec![
            tasks::spawn(poll::tend(Arc::clone(&inner))),
            tasks::spawn(poll::renew(Arc::clone(&inner))),
        ];
        if let Some(every) = site.config.controller.discovery_interval() {
            tasks.push(tasks::spawn(discovery::run(Arc::clone(&inner), arrived, every)));
        }
        let listeners = [
            site.config.controller.openflow_listen.map(|address| (address, None)),
            site.config.controller.openflow_tls_listen.zip(tls.map(Some)),
        ];
        for (address, tls) in listeners.into_iter().flatten() {
            let settings = openflow::Settings { tls, ..openflow::Settings::default() };
            let connections = Arc::clone(&connections);
            tasks.push(tasks::spawn(connections::accept(connections, address, settings)));
        }
        for database in connections.databases() {
            tasks.push(tasks::spawn(connections::follow(Arc::clone(&connections), database)));
        }
        Self { inner, tasks }
    }

    /// Says who installs classifiers; the first who is named stays.
    pub fn meet(&self, classifiers: Arc<dyn Classifiers>) {
        let _ = self.inner.classifiers.set(classifiers);
    }
}

impl Drop for SwitchNetwork {
    /// Ends the connections. What is reserved stays: whoever comes next finds it by its marks.
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn links(site: &Site) -> BTreeMap<PortRef, LinkEnd> {
    let port = |end: &lifeboat_topology::End| PortRef {
        switch: end.switch.clone(),
        port: end.port.to_string(),
    };
    let mut links = BTreeMap::new();
    for (link, (a, b)) in site.config.links.iter().zip(&site.ends) {
        let (there, back) = (link.capacity, link.capacity_back.unwrap_or(link.capacity));
        let (a, b) = (port(a), port(b));
        links.insert(a.clone(), LinkEnd { capacity: there, peer: b.to_string(), to: b.clone() });
        links.insert(b, LinkEnd { capacity: back, peer: a.to_string(), to: a });
    }
    links
}

fn budgets(site: &Site) -> BTreeMap<SwitchId, BitsPerSec> {
    let switches = site.config.switches.iter().map(|s| (Some(s.name.clone()), s.migration_budget));
    let bridges = site.config.hosts.iter().map(|host| (host.switch_id(), host.migration_budget));
    switches.chain(bridges).filter_map(|(name, budget)| Some((name?, budget?))).collect()
}

impl Inner {
    /// When a reservation that is made or renewed now expires, in seconds since 1970.
    fn expiry() -> u64 {
        clock::now().0 / 1000 + LEASE_SECONDS
    }

    /// Who installs classifiers on a switch's ports; an error says what is missing.
    fn classifier(
        &self,
        switch: &SwitchId,
    ) -> Result<(&Arc<dyn Classifiers>, HostId), NetworkError> {
        let unable = |detail: &str| NetworkError::Unable {
            switch: switch.clone(),
            doing: "tell queues apart on its userspace datapath",
            detail: detail.to_owned(),
        };
        let agent = self.connections.known(switch)?.agent.clone();
        let agent = agent.ok_or_else(|| {
            unable("set agent in its [[switch]]: the address of an agent with the role switch on its machine")
        })?;
        let installer = self.classifiers.get();
        Ok((installer.ok_or_else(|| unable("no agent is connected yet"))?, agent))
    }

    /// A classifier's error, as one of the switch.
    fn unclassified(switch: &SwitchId, error: &ClassifierError) -> NetworkError {
        NetworkError::Unable {
            switch: switch.clone(),
            doing: "tell queues apart on its userspace datapath",
            detail: error.to_string(),
        }
    }
}

/// An OpenFlow error, as one of the switch.
fn of_openflow(switch: &SwitchId, doing: &'static str, error: RequestError) -> NetworkError {
    let switch = switch.clone();
    match error {
        RequestError::TimedOut { within } => NetworkError::Late { switch, doing, after: within },
        RequestError::Disconnected => {
            NetworkError::NotConnected { switch, protocol: "OpenFlow", detail: error.to_string() }
        }
        other => NetworkError::Refused { switch, doing, answer: other.to_string() },
    }
}

impl Network for SwitchNetwork {
    fn meet_agents(&self, agents: &Arc<Agents>) {
        self.meet(Arc::clone(agents) as Arc<dyn Classifiers>);
    }

    fn reserve(
        &self,
        request: ReservationRequest,
    ) -> BoxFuture<'_, Result<Reserved, NetworkError>> {
        Box::pin(self.inner.reserve(request))
    }

    fn reroute(
        &self,
        request: ReservationRequest,
    ) -> BoxFuture<'_, Result<Reserved, NetworkError>> {
        Box::pin(self.inner.reroute(request))
    }

    fn link_news(&self) -> watch::Receiver<u64> {
        self.inner.connections.link_news()
    }

    fn adjust(&self, adjustment: Adjustment) -> BoxFuture<'_, Result<Reserved, NetworkError>> {
        Box::pin(self.inner.adjust(adjustment))
    }

    fn release(
        &self,
        evacuation: EvacuationId,
        migration: Option<MigrationId>,
    ) -> BoxFuture<'_, ReleaseReport> {
        Box::pin(self.inner.release(evacuation, migration))
    }

    fn release_leftovers(&self, keep: Vec<MigrationId>) -> BoxFuture<'_, ReleaseReport> {
        Box::pin(self.inner.release_leftovers(keep))
    }

    fn switches(&self) -> BoxFuture<'_, Vec<SwitchStatus>> {
        Box::pin(ready(self.inner.status()))
    }

    fn rates(&self) -> BoxFuture<'_, Vec<PortRate>> {
        Box::pin(ready(self.inner.rates()))
    }

    fn pending(&self) -> BoxFuture<'_, Vec<PendingRelease>> {
        Box::pin(ready(self.inner.pending()))
    }

    /// None of our flows names a MAC: page flows match addresses of hosts, and everything else
    /// follows the destination's announcement by learning (NORMAL). So there is nothing to move.
    fn follow_vm(&self, follow: FollowVm) -> BoxFuture<'_, Result<(), NetworkError>> {
        tracing::debug!(mac = follow.mac, vlan = follow.vlan, to = %follow.to, "no flows to move");
        Box::pin(ready(Ok(())))
    }
}
