//! The connections to every switch: one OVSDB client per database, one OpenFlow session per bridge
//! that has connected, and which of them belong to which switch of the configuration.
//!
//! Used by the rest of `switched`. A bridge is recognised by its datapath id: the configured one,
//! else the one that its database tells. Not here: what is asked of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lifeboat_ovs::openflow::switch::PortReason;
use lifeboat_ovs::openflow::{self, Message, SwitchEvent, SwitchHandle, WhatHappened};
use lifeboat_ovs::ovsdb::{self, Client, Status};
use lifeboat_ovs::{Endpoint, EndpointError, Tls};
use lifeboat_protocol::ids::{HostId, SwitchId};
use tokio::sync::{Notify, mpsc, watch};

use super::bridge::{Bridge, MONITORED};
use super::discovery::Arrived;
use crate::config::{Config, Site};
use crate::network::{NetworkError, PortRef};

/// Between two tries of what may come back by itself.
const AGAIN: Duration = Duration::from_secs(1);
/// Bridges that may be connected at once beyond those of the configuration.
const STRANGERS: usize = 64;

/// What the configuration says of a switch.
#[derive(Debug)]
pub(super) struct Known {
    /// The host whose own bridge it is.
    pub(super) host: Option<HostId>,
    /// Whose agent has the switch role for its ports.
    pub(super) agent: Option<HostId>,
    /// The name of its bridge in its database.
    pub(super) bridge: String,
    /// Where its database is, and the client; or why it has none.
    database: Result<(Endpoint, Client), EndpointError>,
    datapath_id: Option<u64>,
}

#[derive(Debug)]
struct Session {
    handle: SwitchHandle,
    peer: String,
}

#[derive(Debug, Default)]
struct State {
    sessions: BTreeMap<u64, Session>,
    bridges: BTreeMap<SwitchId, Bridge>,
    fresh: BTreeSet<u64>,
    /// Ports that a switch has said are down; its database says so a little later.
    down: BTreeSet<(u64, String)>,
    /// Where we do not listen, and why.
    deaf: BTreeMap<SocketAddr, String>,
    /// The last connection that ended before its switch had said who it is, and why.
    refused: Option<String>,
}

/// All connections.
#[derive(Debug)]
pub(super) struct Connections {
    known: BTreeMap<SwitchId, Known>,
    state: Mutex<State>,
    /// Woken when a switch has connected or its bridge has changed.
    pub(super) news: Notify,
    /// Counts what has happened to links.
    links: watch::Sender<u64>,
    /// Where frames go that switches hand up.
    found: mpsc::Sender<Arrived>,
}

/// A database and the switches that it describes.
#[derive(Debug, Clone)]
pub(super) struct Database {
    /// The client.
    pub(super) client: Client,
    /// Its switches.
    pub(super) switches: Vec<SwitchId>,
}

fn known(config: &Config, tls: Option<&Tls>) -> BTreeMap<SwitchId, Known> {
    let mut clients: BTreeMap<String, Client> = BTreeMap::new();
    let mut client = |text: &str| {
        let endpoint: Endpoint = text.parse()?;
        let settings = ovsdb::Settings { tls: tls.cloned(), ..ovsdb::Settings::default() };
        let start = || Client::start(endpoint.clone(), settings);
        let client = clients.entry(endpoint.to_string()).or_insert_with(start).clone();
        Ok((endpoint, client))
    };
    let mut known = BTreeMap::new();
    for host in &config.hosts {
        let Some(id) = host.switch_id() else { continue };
        let (name, bridge) = (Some(host.name.clone()), host.bridge.clone());
        let (database, datapath_id) = (client(&host.ovsdb), host.datapath_id.map(|id| id.0));
        known.insert(id, Known { host: name.clone(), agent: name, bridge, database, datapath_id });
    }
    for switch in &config.switches {
        let (bridge, database) = (switch.bridge_name().to_owned(), client(&switch.ovsdb));
        let (agent, datapath_id) = (switch.agent_id(), Some(switch.datapath_id.0));
        known.insert(
            switch.name.clone(),
            Known { host: None, agent, bridge, database, datapath_id },
        );
    }
    known
}

impl Connections {
    /// Begins to connect to every database. Inside tokio.
    pub(super) fn start(site: &Site, found: mpsc::Sender<Arrived>, tls: Option<Tls>) -> Self {
        let (known, state) = (known(&site.config, tls.as_ref()), Mutex::default());
        let (links, _) = watch::channel(0);
        Self { known, state, news: Notify::new(), links, found }
    }

    /// Changes whenever a link may have come or gone.
    pub(super) fn link_news(&self) -> watch::Receiver<u64> {
        self.links.subscribe()
    }

    /// A link has come or gone.
    pub(super) fn links_changed(&self) {
        self.links.send_modify(|count| *count = count.wrapping_add(1));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The switches of the configuration.
    pub(super) fn switches(&self) -> impl Iterator<Item = (&SwitchId, &Known)> {
        self.known.iter()
    }

    /// A switch of the configuration.
    pub(super) fn known(&self, switch: &SwitchId) -> Result<&Known, NetworkError> {
        let unknown = || NetworkError::UnknownSwitch { switch: switch.clone() };
        self.known.get(switch).ok_or_else(unknown)
    }

    /// A switch's bridge, as far as it has been told.
    pub(super) fn bridge(&self, switch: &SwitchId) -> Option<Bridge> {
        let id = self.datapath_id(switch);
        let state = self.state();
        let mut bridge = state.bridges.get(switch)?.clone();
        for (name, port) in &mut bridge.ports {
            port.up &= !id.is_some_and(|id| state.down.contains(&(id, name.clone())));
        }
        Some(bridge)
    }

    /// A switch's datapath id.
    pub(super) fn datapath_id(&self, switch: &SwitchId) -> Option<u64> {
        let told = || self.state().bridges.get(switch)?.datapath_id;
        self.known.get(switch)?.datapath_id.or_else(told)
    }

    /// The OpenFlow session of a switch.
    pub(super) fn openflow(&self, switch: &SwitchId) -> Result<SwitchHandle, NetworkError> {
        self.known(switch)?;
        let id = self.datapath_id(switch);
        let handle = id.and_then(|id| Some(self.state().sessions.get(&id)?.handle.clone()));
        handle.ok_or_else(|| NetworkError::NotConnected {
            switch: switch.clone(),
            protocol: "OpenFlow",
            detail: self.why_no_openflow(switch),
        })
    }

    /// The database of a switch.
    pub(super) fn database(&self, switch: &SwitchId) -> Result<Client, NetworkError> {
        let down = |detail| NetworkError::NotConnected {
            switch: switch.clone(),
            protocol: "OVSDB",
            detail,
        };
        match &self.known(switch)?.database {
            Err(error) => Err(down(error.to_string())),
            Ok((endpoint, client)) => match &*client.status().borrow() {
                Status::Connected => Ok(client.clone()),
                Status::Disconnected(why) => {
                    let why = why.as_deref().unwrap_or("not yet connected");
                    Err(down(format!("{endpoint}: {why}")))
                }
            },
        }
    }

    /// Every database once, connected or not.
    pub(super) fn databases(&self) -> Vec<Database> {
        let mut found: BTreeMap<String, Database> = BTreeMap::new();
        for (switch, known) in &self.known {
            let Ok((endpoint, client)) = &known.database else { continue };
            let new = || Database { client: client.clone(), switches: Vec::new() };
            found.entry(endpoint.to_string()).or_insert_with(new).switches.push(switch.clone());
        }
        found.into_values().collect()
    }

    /// The OpenFlow number of a port.
    pub(super) fn port_number(&self, at: &PortRef) -> Option<u32> {
        let state = self.state();
        let port = state.bridges.get(&at.switch)?.ports.get(&at.port)?;
        (port.number > 0).then_some(port.number)
    }

    /// Whether a port is known to be down. One that nobody has spoken of is not.
    pub(super) fn is_down(&self, at: &PortRef) -> bool {
        let id = self.datapath_id(&at.switch);
        let state = self.state();
        let Some(bridge) = state.bridges.get(&at.switch) else { return false };
        let told = id.is_some_and(|id| state.down.contains(&(id, at.port.clone())));
        told || bridge.ports.get(&at.port).is_none_or(|port| !port.up)
    }

    /// The port with this number of the switch with this datapath id.
    pub(super) fn port_at(&self, datapath_id: u64, number: u32) -> Option<PortRef> {
        let switch = self.known.keys().find(|id| self.datapath_id(id) == Some(datapath_id))?;
        let state = self.state();
        let mut ports = state.bridges.get(switch)?.ports.iter();
        let (port, _) = ports.find(|(_, port)| port.number == number && number > 0)?;
        Some(PortRef { switch: switch.clone(), port: port.clone() })
    }

    /// For a person: why a switch's OpenFlow session does not stand.
    pub(super) fn why_no_openflow(&self, switch: &SwitchId) -> String {
        let state = self.state();
        if let Some(why) = state.deaf.values().next() {
            return why.clone();
        }
        let obstacle = state.bridges.get(switch).and_then(Bridge::obstacle);
        let refused = || state.refused.clone();
        obstacle.or_else(refused).unwrap_or_else(|| "it has not connected".to_owned())
    }

    /// The switches that have connected since the last call.
    pub(super) fn take_fresh(&self) -> Vec<SwitchId> {
        let ids: BTreeMap<u64, &SwitchId> = self
            .known
            .keys()
            .filter_map(|switch| Some((self.datapath_id(switch)?, switch)))
            .collect();
        let mut state = self.state();
        let fresh: Vec<u64> =
            state.fresh.iter().copied().filter(|id| ids.contains_key(id)).collect();
        // Who is not recognised yet may be, once its database has told its id.
        state.fresh.retain(|id| !ids.contains_key(id));
        fresh.iter().filter_map(|id| ids.get(id).map(|switch| (*switch).clone())).collect()
    }

    /// Has a switch that could not be put right tried again.
    pub(super) fn not_mended(&self, switch: &SwitchId) {
        if let Some(id) = self.datapath_id(switch) {
            self.state().fresh.insert(id);
        }
    }

    fn take(&self, event: SwitchEvent) {
        let SwitchEvent { peer, datapath_id, what } = event;
        let mut state = self.state();
        match what {
            WhatHappened::Connected { handle, features } => {
                let id = features.datapath_id;
                let room = state.sessions.len() < self.known.len() + STRANGERS;
                if room || state.sessions.contains_key(&id) {
                    tracing::info!(peer, datapath_id = format!("{id:016x}"), "switch connected");
                    state.sessions.insert(id, Session { handle, peer });
                    state.fresh.insert(id);
                    state.down.retain(|(switch, _)| *switch != id);
                    state.refused = None;
                }
            }
            WhatHappened::Disconnected(why) => {
                let why = why.map_or_else(|| "it closed the connection".to_owned(), |e| chain(&e));
                let Some(id) = datapath_id else {
                    tracing::warn!(peer, why, "switch refused");
                    state.refused = Some(format!("{peer}: {why}"));
                    return;
                };
                // A switch that came back before its old connection was given up has a new one.
                if state.sessions.get(&id).is_some_and(|session| session.peer == peer) {
                    tracing::warn!(peer, datapath_id = format!("{id:016x}"), why, "switch gone");
                    state.sessions.remove(&id);
                    state.fresh.remove(&id);
                }
            }
            WhatHappened::Message(Message::PortStatus(status)) => {
                let Some(id) = datapath_id else { return };
                let port = (id, status.port.name.to_string());
                let changed = match status.port.is_up() && status.reason != PortReason::Delete {
                    true => state.down.remove(&port),
                    false => state.down.insert(port),
                };
                drop(state);
                if changed {
                    self.links_changed();
                }
                return;
            }
            WhatHappened::Message(Message::PacketIn(packet)) => {
                let Some((datapath_id, port)) = datapath_id.zip(packet.in_port()) else { return };
                let arrived = Arrived { datapath_id, port: port.0, data: packet.data };
                // A probe that nobody has time for is lost, as any packet may be.
                let _ = self.found.try_send(arrived);
                return;
            }
            WhatHappened::Message(_) => return,
        }
        drop(state);
        self.news.notify_one();
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = error.source();
    }
    text
}

/// Accepts switches for ever. An address that cannot be listened on (yet) is tried again, and named
/// by every switch that waits for it.
pub(super) async fn accept(
    connections: Arc<Connections>,
    address: SocketAddr,
    settings: openflow::Settings,
) {
    loop {
        match openflow::listen(address, settings.clone()).await {
            Ok((_listener, mut switches)) => {
                tracing::info!(%address, "waiting for switches");
                connections.state().deaf.remove(&address);
                while let Some(event) = switches.recv().await {
                    connections.take(event);
                }
            }
            Err(error) => {
                let why = format!("the controller cannot listen on {address}: {error}");
                let before = connections.state().deaf.insert(address, why.clone());
                if before.as_ref() != Some(&why) {
                    tracing::error!(%address, %error, "switches cannot connect");
                }
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Follows the bridges of one database for ever.
pub(super) async fn follow(connections: Arc<Connections>, database: Database) {
    loop {
        // An error means that it is not there yet; the client connects by itself.
        if let Ok(mut monitor) = database.client.monitor(&MONITORED, AGAIN * 5).await {
            while monitor.changes().await.is_some() {
                let rows = monitor.rows();
                for switch in &database.switches {
                    let Some(known) = connections.known.get(switch) else { continue };
                    let bridge = Bridge::of(&rows, &known.bridge);
                    let mut state = connections.state();
                    match bridge {
                        Some(bridge) => drop(state.bridges.insert(switch.clone(), bridge)),
                        None => drop(state.bridges.remove(switch)),
                    }
                }
                connections.links_changed();
                connections.news.notify_one();
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}
