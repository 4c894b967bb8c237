//! A way from host to host: the ports that its traffic leaves through, in order.
//!
//! The controller reserves a queue at each hop; `policy/` takes the narrowest hop. How ways are
//! found is in `yen`.

use std::collections::BTreeSet;
use std::fmt;

use lifeboat_protocol::ids::HostId;
use lifeboat_protocol::units::BitsPerSec;
use serde::Serialize;

use crate::names::{DirectedLink, End};

/// Where traffic leaves towards the next link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Egress {
    /// The network card of a host without a bridge of its own: no switch can shape it, only the
    /// host.
    Card(HostId),
    /// A port of a switch: a queue can be set up there.
    Port(End),
}

impl fmt::Display for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Card(host) => write!(f, "host {host}"),
            Self::Port(end) => end.fmt(f),
        }
    }
}

/// One step of a way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hop {
    /// Where the traffic leaves.
    pub egress: Egress,
    /// The link that it enters, and in which direction.
    pub along: DirectedLink,
    /// What that direction carries, bit/s.
    pub capacity: BitsPerSec,
    /// What of it was unused when the way was asked for, bit/s.
    pub spare: BitsPerSec,
}

/// A way without loops from one host to another. It begins with the source's uplink and ends with
/// the port that faces the destination (its cable, or its own bridge's uplink); between two hosts
/// on one bridge it has no hops.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Way {
    /// Where it begins.
    pub from: HostId,
    /// Where it ends.
    pub to: HostId,
    /// The steps in order.
    pub hops: Vec<Hop>,
}

impl Way {
    /// The capacity of the narrowest hop; `None` when nothing between the hosts can be full.
    #[must_use]
    pub fn capacity(&self) -> Option<BitsPerSec> {
        self.hops.iter().map(|hop| hop.capacity).min()
    }

    /// The least spare capacity along the way; `None` when nothing between the hosts can be full.
    #[must_use]
    pub fn spare(&self) -> Option<BitsPerSec> {
        self.hops.iter().map(|hop| hop.spare).min()
    }

    /// The switch ports to set a queue up at, in order.
    pub fn ports(&self) -> impl Iterator<Item = &End> {
        self.hops.iter().filter_map(|hop| match &hop.egress {
            Egress::Port(end) => Some(end),
            Egress::Card(_) => None,
        })
    }

    /// The directions of links that both ways use: where their migrations would compete. Opposite
    /// directions of one link do not compete.
    #[must_use]
    pub fn shared_with(&self, other: &Self) -> Vec<DirectedLink> {
        let theirs: BTreeSet<DirectedLink> = other.hops.iter().map(|hop| hop.along).collect();
        self.hops.iter().map(|hop| hop.along).filter(|along| theirs.contains(along)).collect()
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.from)?;
        for end in self.ports() {
            write!(f, " > {}:{}", end.switch, end.port)?;
        }
        write!(f, " > {}", self.to)
    }
}
