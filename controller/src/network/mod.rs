//! The seam between what the controller decides and the switches that carry it out.
//!
//! The driver (`driver.rs`) speaks only through [`Network`]; behind it are the connections to every
//! OVSDB and OpenFlow switch. Here are the data that cross the seam and the errors that come back.
//! Deliberately not here: any socket, any queue number or cookie chosen by the caller, and any
//! decision on how much to reserve: that is `policy/`'s.
//!
//! What an implementation promises:
//! - **Urgency belongs to the evacuation**: on one port all migrations of an evacuation share one
//!   queue. `reserve` joins it (and makes it where it is the first), `release` of the last one
//!   takes it away.
//! - **Idempotent by id**: the same migration reserved twice holds one reservation; a release of
//!   what is not there is a success that released nothing. After a restart of the controller a
//!   release finds rows and flows by their marks, not by memory.
//! - **All or nothing**: a `reserve` that fails has undone what it had done.
//! - **An undo never stops at its first error**: `release` returns what it could not undo beside
//!   what it did.
//! - Foreign QoS rows and flows stay untouched.

mod ability;
mod detached;
mod switched;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use lifeboat_policy::saturation::Saturation;
use lifeboat_protocol::ids::{EvacuationId, HostId, MigrationId, SwitchId};
use lifeboat_protocol::terms::{ReservationKind, Urgency};
use lifeboat_protocol::units::BitsPerSec;
use lifeboat_topology::Sighting;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::agents::Agents;
use crate::clock::UnixMs;
use crate::config::Site;
use crate::tls::{TlsError, for_switches};

pub use ability::{Ability, PaceOnly, Shaping};
pub use detached::Detached;
pub use switched::{ClassifierError, Classifiers, SwitchNetwork};

/// A port of a switch by the names of the configuration. A host's own bridge is a switch too.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortRef {
    /// The switch.
    pub switch: SwitchId,
    /// The interface's name on it, as OVSDB has it.
    pub port: String,
}

impl fmt::Display for PortRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.switch, self.port)
    }
}

/// One egress port on a path, and what is wanted of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    /// The port that the pages leave by.
    pub at: PortRef,
    /// What the link carries in this direction, by configuration.
    pub capacity: BitsPerSec,
    /// What the evacuation is entitled to here: the queue's minimum.
    pub rate: BitsPerSec,
}

/// The packets that a reservation is for: what is sent one way on the TCP connections of one page link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageFlow {
    /// The source host's address on the data network.
    pub source: IpAddr,
    /// The destination's page listener.
    pub destination: SocketAddr,
    /// The listener is the one that sends: a store from which pages are gathered.
    #[serde(default)]
    pub served: bool,
}

/// A wish for a reservation along a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReservationRequest {
    /// The evacuation that owns (and shares) the queue.
    pub evacuation: EvacuationId,
    /// The migration whose packets are sent there.
    pub migration: MigrationId,
    /// The evacuation's urgency: who gives way when a link cannot hold everybody's wish.
    pub urgency: Urgency,
    /// Whether more than that can be had while nobody else needs it.
    pub kind: ReservationKind,
    /// From the source's uplink to the port that faces the destination, in order.
    pub hops: Vec<Hop>,
    /// Which packets.
    pub traffic: PageFlow,
}

/// What was reserved on one port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReservedHop {
    /// The port.
    pub at: PortRef,
    /// What the link carries.
    pub capacity: BitsPerSec,
    /// What is guaranteed to the evacuation, after admission; without a queue, what the source keeps
    /// to.
    pub rate: BitsPerSec,
    /// The number of its queue on this port; 0 where none can be, see [`Ability::PaceOnly`].
    pub queue: u32,
}

impl ReservedHop {
    /// Whether only the source keeps to the rate here.
    #[must_use]
    pub const fn is_paced(&self) -> bool {
        self.queue == 0
    }
}

/// A reservation that is installed on every port of its path (seen by a barrier and by `cur_cfg`).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Reserved {
    /// The ports in order of the path; those without a queue follow the others.
    pub hops: Vec<ReservedHop>,
}

impl Reserved {
    /// What is guaranteed from end to end, or kept to where no queue can be: the least of all ports;
    /// nothing without a port.
    #[must_use]
    pub fn rate(&self) -> BitsPerSec {
        self.hops.iter().map(|hop| hop.rate).min().unwrap_or(BitsPerSec::ZERO)
    }

    /// The least rate of the ports where only the source keeps to it; `None` without any.
    #[must_use]
    pub fn paced_rate(&self) -> Option<BitsPerSec> {
        self.hops.iter().filter(|hop| hop.is_paced()).map(|hop| hop.rate).min()
    }

    /// The same with these ports, where no queue can be.
    #[must_use]
    pub fn with_paced(mut self, paced: Vec<Hop>) -> Self {
        let paced = paced.into_iter();
        self.hops.extend(paced.map(|Hop { at, capacity, rate }| ReservedHop {
            at,
            capacity,
            rate,
            queue: 0,
        }));
        self
    }
}

/// New shares for the ports on which an evacuation already holds a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adjustment {
    /// The evacuation that owns the queues.
    pub evacuation: EvacuationId,
    /// Each port and its new minimum.
    pub ports: Vec<(PortRef, BitsPerSec)>,
}

/// What a release did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReleaseReport {
    /// Ports from which a queue or a flow of ours was taken away.
    pub released: Vec<PortRef>,
    /// What could not be undone; it is tried again by the next release or leftover sweep.
    pub failures: Vec<ReleaseFailure>,
}

/// One step of an undo that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleaseFailure {
    /// The switch on which something of ours may remain.
    pub switch: SwitchId,
    /// Why.
    pub error: NetworkError,
}

/// What is known of a switch now.
#[derive(Debug, Clone, PartialEq)]
pub struct SwitchStatus {
    /// Its name in the configuration.
    pub name: SwitchId,
    /// The host whose own bridge it is; `None` for a switch of the fabric.
    pub host: Option<HostId>,
    /// Sixteen hex digits, as configured or as it said.
    pub datapath_id: String,
    /// Whether its OpenFlow 1.3 connection stands.
    pub openflow_connected: bool,
    /// Whether its OVSDB connection stands.
    pub ovsdb_connected: bool,
    /// `netdev` or `system`; empty while unknown.
    pub datapath: String,
    /// What the kernel of its machine can do with a port; `None` where no agent with the role switch
    /// has said.
    pub shaping: Option<Shaping>,
    /// For a person: why it is not connected, what was wrong last.
    pub detail: String,
    /// How full its fullest link is.
    pub saturation: Saturation,
    /// What migrations send through it; `None` while that is not known of every queue.
    pub migrations: Option<BitsPerSec>,
    /// What it has for migrations, by configuration; zero where that says nothing.
    pub migration_budget: BitsPerSec,
    /// Its ports, by number.
    pub ports: Vec<PortStatus>,
}

/// What is known of a port now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortStatus {
    /// The interface's name.
    pub name: String,
    /// Its OpenFlow number; 0 while unknown.
    pub number: u32,
    /// Who is at the other end, by configuration; empty where that says nothing.
    pub peer: String,
    /// What the link carries outwards, by configuration; zero where that says nothing.
    pub capacity: BitsPerSec,
    /// Sum of our queues' minimums.
    pub reserved: BitsPerSec,
    /// What left by it over about the last second; `None` before two samples.
    pub transmitted: Option<BitsPerSec>,
    /// Whether the port is up.
    pub up: bool,
    /// What LLDP knows of where it leads; `None` where nobody probes.
    pub sighting: Option<Sighting>,
    /// What a reservation can do there.
    pub ability: Ability,
}

impl PortStatus {
    /// Whether its link can be counted on.
    #[must_use]
    pub fn passes(&self) -> bool {
        self.up && self.sighting != Some(Sighting::Lost)
    }
}

/// What passes on a port, for the policy that adapts reservations.
#[derive(Debug, Clone, PartialEq)]
pub struct PortRate {
    /// The port.
    pub at: PortRef,
    /// Who is at the other end, by configuration.
    pub peer: String,
    /// Whether nothing says that the link is down: neither of its ports, nor LLDP.
    pub up: bool,
    /// What the link carries.
    pub capacity: BitsPerSec,
    /// How full it is, smoothed.
    pub saturation: Saturation,
    /// All that left by it over about the last second; `None` before two samples.
    pub transmitted: Option<BitsPerSec>,
    /// Per evacuation that holds a queue: its number, its minimum, and what left by it.
    pub queues: Vec<QueueRate>,
}

/// One evacuation's queue on a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueRate {
    /// Whose.
    pub evacuation: EvacuationId,
    /// Its urgency.
    pub urgency: Urgency,
    /// Whether more than its minimum can be had.
    pub kind: ReservationKind,
    /// Whose pages go there now.
    pub migrations: Vec<MigrationId>,
    /// The queue's number.
    pub queue: u32,
    /// Its minimum.
    pub reserved: BitsPerSec,
    /// What left by it over about the last second; `None` before two samples.
    pub transmitted: Option<BitsPerSec>,
}

/// A release that could not reach every switch; it is tried again until it is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingRelease {
    /// Whose reservation.
    pub evacuation: EvacuationId,
    /// Of which migration; `None` for all of the evacuation.
    pub migration: Option<MigrationId>,
    /// Where something of it may remain, and why.
    pub failures: Vec<ReleaseFailure>,
    /// Since when.
    pub since: UnixMs,
    /// How often it was tried.
    pub tries: u32,
}

/// A VM's network interface has moved to another host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FollowVm {
    /// Its MAC address, as `52:54:00:12:34:56`.
    pub mac: String,
    /// Its VLAN; 0 for none.
    pub vlan: u16,
    /// Where it runs now.
    pub to: HostId,
}

/// Why the network did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// A connection that is needed does not stand.
    #[error(
        "the {protocol} connection to switch {switch} is down ({detail}); see `lifeboat switches`"
    )]
    NotConnected {
        /// The switch.
        switch: SwitchId,
        /// `OVSDB` or `OpenFlow`.
        protocol: &'static str,
        /// What the last try said.
        detail: String,
    },
    /// A switch that the configuration does not have.
    #[error("switch {switch} is not in the configuration")]
    UnknownSwitch {
        /// The name that was asked for.
        switch: SwitchId,
    },
    /// A port that its switch does not have.
    #[error("{at} does not exist on its switch; correct the [[link]] in the configuration")]
    UnknownPort {
        /// The port that was asked for.
        at: PortRef,
    },
    /// A port that carries QoS which is not ours and cannot be joined.
    #[error(
        "{at} already carries QoS that is not Lifeboat's ({detail}); remove it or leave this link out of the evacuation"
    )]
    ForeignQos {
        /// The port.
        at: PortRef,
        /// What is there.
        detail: String,
    },
    /// The link cannot hold the wish beside more urgent ones.
    #[error(
        "{at} has {free} of {capacity} left to promise and {asked} was asked; lower the urgency or wait for the other evacuation"
    )]
    NoRoom {
        /// The port.
        at: PortRef,
        /// What was wished.
        asked: BitsPerSec,
        /// What could be given.
        free: BitsPerSec,
        /// What the link carries.
        capacity: BitsPerSec,
    },
    /// The switch or its database said no.
    #[error("switch {switch} refused to {doing}: {answer}")]
    Refused {
        /// The switch.
        switch: SwitchId,
        /// What it was asked to do.
        doing: &'static str,
        /// Its words.
        answer: String,
    },
    /// No answer in time; what was done is undone or found by its mark later.
    #[error("switch {switch} did not {doing} within {after:?}")]
    Late {
        /// The switch.
        switch: SwitchId,
        /// What it was asked to do.
        doing: &'static str,
        /// The deadline that passed.
        after: Duration,
    },
    /// The switch cannot do it at all.
    #[error("switch {switch} cannot {doing}: {detail}")]
    Unable {
        /// The switch.
        switch: SwitchId,
        /// What was wanted.
        doing: &'static str,
        /// Why not, and what would help.
        detail: String,
    },
}

impl NetworkError {
    /// Whether the same wish may succeed a little later without anybody's doing.
    #[must_use]
    pub const fn may_retry(&self) -> bool {
        matches!(self, Self::NotConnected { .. } | Self::Late { .. } | Self::NoRoom { .. })
    }
}

/// The network that a site's configuration describes. Inside tokio.
///
/// # Errors
/// When the certificates for switches cannot be used.
pub fn connect(site: &Site) -> Result<Arc<dyn Network>, TlsError> {
    let controller = &site.config.controller;
    if controller.openflow_listen.is_none() && controller.openflow_tls_listen.is_none() {
        return Ok(Arc::new(Detached::new(
            "set controller.openflow_listen in the configuration, or evacuate with --urgency 0",
        )));
    }
    let tls = controller.switch_tls_dir.as_deref().map(for_switches).transpose()?;
    Ok(Arc::new(SwitchNetwork::start(site, tls)))
}

/// The switches, as the controller's driver sees them.
pub trait Network: Send + Sync + 'static {
    /// Told once who the agents are, before anything is reserved: those with the switch role make
    /// the queues of userspace datapaths reachable.
    fn meet_agents(&self, _agents: &Arc<Agents>) {}

    /// Reserves along a path and sends the migration's packets there. Idempotent by migration.
    fn reserve(&self, request: ReservationRequest)
    -> BoxFuture<'_, Result<Reserved, NetworkError>>;

    /// Moves a reservation to another way while its migration goes on. A way that cannot be
    /// installed leaves everything as it was.
    fn reroute(&self, request: ReservationRequest)
    -> BoxFuture<'_, Result<Reserved, NetworkError>>;

    /// Changes whenever a link may have come or gone.
    fn link_news(&self) -> watch::Receiver<u64>;

    /// Changes the minimum of queues that an evacuation holds. Ports on which it holds none are
    /// left alone.
    fn adjust(&self, adjustment: Adjustment) -> BoxFuture<'_, Result<Reserved, NetworkError>>;

    /// Takes away what `migration` holds; with `None` all that the evacuation holds.
    fn release(
        &self,
        evacuation: EvacuationId,
        migration: Option<MigrationId>,
    ) -> BoxFuture<'_, ReleaseReport>;

    /// Takes away all that carries our mark and belongs to none of `keep`: what a controller that
    /// was killed left behind. Called once after a start, when the switches are there.
    fn release_leftovers(&self, keep: Vec<MigrationId>) -> BoxFuture<'_, ReleaseReport>;

    /// Every configured switch, by name.
    fn switches(&self) -> BoxFuture<'_, Vec<SwitchStatus>>;

    /// What passes on every port of a configured link.
    fn rates(&self) -> BoxFuture<'_, Vec<PortRate>>;

    /// What could not be released yet.
    fn pending(&self) -> BoxFuture<'_, Vec<PendingRelease>>;

    /// Moves what flows we have for a VM's MAC to its new host. Without such flows (the usual case:
    /// the switches learn from the destination's announcement) it is a success that did nothing.
    fn follow_vm(&self, follow: FollowVm) -> BoxFuture<'_, Result<(), NetworkError>>;
}
