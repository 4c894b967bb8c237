//! [`Topology`]: built from configuration, kept current by what switches report, asked for ways.
//!
//! The controller owns one. Every link is two directed edges, so that capacity, use and
//! reservations are counted per direction. Deliberately not here: ageing (a report is true until
//! the next one) and discovery by LLDP.

use std::collections::{BTreeMap, BTreeSet};

use lifeboat_protocol::ids::{HostId, SwitchId};
use lifeboat_protocol::units::BitsPerSec;
use petgraph::graph::{DiGraph, EdgeIndex, NodeIndex};
use petgraph::visit::EdgeRef;

use crate::error::{CutLink, TopologyError};
use crate::names::{Attachment, DirectedLink, Direction, End, LinkId, LinkSpec};
use crate::way::{Egress, Hop, Way};
use crate::yen::{self, Passable};

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Host(HostId),
    Switch(SwitchId),
}

/// One direction of a link, or the inside of a host between it and its own bridge (`along` is
/// `None`).
#[derive(Debug, Clone)]
struct Edge {
    along: Option<DirectedLink>,
    egress: Option<Egress>,
    capacity: BitsPerSec,
    used: BitsPerSec,
    link_up: bool,
    port_up: bool,
    peer_port_up: bool,
}

impl Passable for Edge {
    fn is_up(&self) -> bool {
        self.link_up && self.port_up && self.peer_port_up
    }
    fn spare(&self) -> u64 {
        (self.capacity - self.used).0
    }
}

/// Hosts, switches and links, with what is up and what is used.
#[derive(Debug, Clone, Default)]
pub struct Topology {
    graph: DiGraph<Node, Edge>,
    hosts: BTreeMap<HostId, (NodeIndex, Attachment)>,
    switches: BTreeMap<SwitchId, NodeIndex>,
    /// Forward and backward edge of each link, by `LinkId`.
    links: Vec<(EdgeIndex, EdgeIndex)>,
    /// Which link ends at a port, and in which direction traffic leaves there.
    ports: BTreeMap<End, DirectedLink>,
}

impl Topology {
    /// A network of nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a switch without links.
    ///
    /// # Errors
    /// [`TopologyError::DuplicateSwitch`].
    pub fn add_switch(&mut self, switch: SwitchId) -> Result<(), TopologyError> {
        if self.switches.contains_key(&switch) {
            return Err(TopologyError::DuplicateSwitch { switch });
        }
        let node = self.graph.add_node(Node::Switch(switch.clone()));
        self.switches.insert(switch, node);
        Ok(())
    }

    /// Adds a host at a switch that is there already. Of a cable, the link number is returned.
    ///
    /// # Errors
    /// A duplicate host or port, an unknown switch, a capacity of zero.
    pub fn add_host(
        &mut self,
        host: HostId,
        attachment: Attachment,
    ) -> Result<Option<LinkId>, TopologyError> {
        if self.hosts.contains_key(&host) {
            return Err(TopologyError::DuplicateHost { host });
        }
        let link = match &attachment {
            Attachment::OwnBridge { bridge } => {
                let bridge = self.switch(bridge)?;
                let node = self.graph.add_node(Node::Host(host.clone()));
                self.graph.add_edge(node, bridge, inside_host());
                self.graph.add_edge(bridge, node, inside_host());
                self.hosts.insert(host, (node, attachment));
                return Ok(None);
            }
            Attachment::Cable { at, up, down } => {
                self.check_end(at, *down)?;
                self.check_capacity(at, *up)?;
                let switch = self.switch(&at.switch)?;
                let node = self.graph.add_node(Node::Host(host.clone()));
                let forward = (node, Egress::Card(host.clone()), *up);
                self.add_edges(forward, (switch, Egress::Port(at.clone()), *down))
            }
        };
        let node = self.graph.edge_endpoints(self.links[link.0 as usize].0).map(|ends| ends.0);
        self.hosts.insert(host, (node.expect("the cable was just added"), attachment));
        Ok(Some(link))
    }

    /// Adds a link between two switches that are there already.
    ///
    /// # Errors
    /// An unknown switch, a port that another link ends at, a loop, a capacity of zero.
    pub fn add_link(&mut self, spec: LinkSpec) -> Result<LinkId, TopologyError> {
        if spec.a.switch == spec.b.switch {
            return Err(TopologyError::Loop { end: spec.a });
        }
        self.check_end(&spec.a, spec.a_to_b)?;
        self.check_end(&spec.b, spec.b_to_a)?;
        let (a, b) = (self.switch(&spec.a.switch)?, self.switch(&spec.b.switch)?);
        let forward = (a, Egress::Port(spec.a), spec.a_to_b);
        Ok(self.add_edges(forward, (b, Egress::Port(spec.b), spec.b_to_a)))
    }

    /// A link's or port's state as one switch reports it: a link passes traffic only while both of
    /// its ports are up.
    ///
    /// # Errors
    /// [`TopologyError::UnknownPort`] when no link ends there: such a port is none of ours.
    pub fn set_port_up(&mut self, end: &End, up: bool) -> Result<(), TopologyError> {
        let leaving =
            *self.ports.get(end).ok_or_else(|| TopologyError::UnknownPort { end: end.clone() })?;
        let arriving = DirectedLink { direction: leaving.direction.opposite(), ..leaving };
        self.edge_mut(leaving)?.port_up = up;
        self.edge_mut(arriving)?.peer_port_up = up;
        Ok(())
    }

    /// Takes a link out of use in both directions, or brings it back.
    ///
    /// # Errors
    /// [`TopologyError::UnknownLink`].
    pub fn set_link_up(&mut self, link: LinkId, up: bool) -> Result<(), TopologyError> {
        for direction in [Direction::Forward, Direction::Backward] {
            self.edge_mut(DirectedLink { link, direction })?.link_up = up;
        }
        Ok(())
    }

    /// Records what passes along one direction of a link now (applications and migrations
    /// together), bit/s.
    ///
    /// # Errors
    /// [`TopologyError::UnknownLink`].
    pub fn set_used(&mut self, along: DirectedLink, used: BitsPerSec) -> Result<(), TopologyError> {
        self.edge_mut(along)?.used = used;
        Ok(())
    }

    /// What one direction of a link carries, bit/s.
    ///
    /// # Errors
    /// [`TopologyError::UnknownLink`].
    pub fn capacity(&self, along: DirectedLink) -> Result<BitsPerSec, TopologyError> {
        Ok(self.edge(along)?.capacity)
    }

    /// What of one direction of a link is unused, bit/s.
    ///
    /// # Errors
    /// [`TopologyError::UnknownLink`].
    pub fn spare(&self, along: DirectedLink) -> Result<BitsPerSec, TopologyError> {
        Ok(BitsPerSec(self.edge(along)?.spare()))
    }

    /// Whether traffic can pass: the link and both of its ports are up.
    ///
    /// # Errors
    /// [`TopologyError::UnknownLink`].
    pub fn is_up(&self, along: DirectedLink) -> Result<bool, TopologyError> {
        Ok(self.edge(along)?.is_up())
    }

    /// The direction in which traffic that leaves through `end` travels, if a link ends there.
    #[must_use]
    pub fn leaving(&self, end: &End) -> Option<DirectedLink> {
        self.ports.get(end).copied()
    }

    /// All hosts, by name.
    pub fn hosts(&self) -> impl Iterator<Item = &HostId> {
        self.hosts.keys()
    }

    /// All switches, by name.
    pub fn switches(&self) -> impl Iterator<Item = &SwitchId> {
        self.switches.keys()
    }

    /// All switch ports at which a link ends, with the direction in which traffic leaves there.
    pub fn ports(&self) -> impl Iterator<Item = (&End, DirectedLink)> {
        self.ports.iter().map(|(end, along)| (end, *along))
    }

    /// The host's own bridge, if it has one.
    ///
    /// # Errors
    /// [`TopologyError::UnknownHost`].
    pub fn own_bridge(&self, host: &HostId) -> Result<Option<&SwitchId>, TopologyError> {
        match &self.host(host)?.1 {
            Attachment::OwnBridge { bridge } => Ok(Some(bridge)),
            Attachment::Cable { .. } => Ok(None),
        }
    }

    /// The host's rack, named by its edge switch: the switch that its cable, or its own bridge's
    /// first uplink, leads to. A host whose bridge has no uplink is a rack of its own. Up or down
    /// makes no difference.
    ///
    /// # Errors
    /// [`TopologyError::UnknownHost`].
    pub fn rack(&self, host: &HostId) -> Result<&SwitchId, TopologyError> {
        let (_, attachment) = self.host(host)?;
        let bridge = match attachment {
            Attachment::Cable { at, .. } => return Ok(&at.switch),
            Attachment::OwnBridge { bridge } => bridge,
        };
        let uplink = self.graph.edges(self.switch(bridge)?).filter(|e| e.weight().along.is_some());
        let first = uplink.min_by_key(|edge| edge.weight().along);
        match first.map(|edge| &self.graph[edge.target()]) {
            Some(Node::Switch(edge_switch)) => Ok(edge_switch),
            _ => Ok(bridge),
        }
    }

    /// Up to `k` ways from one host to another over what is up now, shortest first; of two of the
    /// same length the one with more spare capacity at its narrowest hop. At least one, or an
    /// error.
    ///
    /// # Errors
    /// An unknown host, the same host twice, or [`TopologyError::NoWay`] with the links that cut
    /// it.
    pub fn ways(&self, from: &HostId, to: &HostId, k: usize) -> Result<Vec<Way>, TopologyError> {
        let (start, end) = (self.host(from)?.0, self.host(to)?.0);
        if from == to {
            return Err(TopologyError::SameHost { host: from.clone() });
        }
        let found = yen::shortest(&self.graph, start, end, k.max(1));
        if found.is_empty() {
            let cut = self.cut_around(start);
            return Err(TopologyError::NoWay { from_host: from.clone(), to_host: to.clone(), cut });
        }
        let way = |edges: Vec<EdgeIndex>| Way {
            from: from.clone(),
            to: to.clone(),
            hops: edges.into_iter().filter_map(|edge| hop(&self.graph[edge])).collect(),
        };
        Ok(found.into_iter().map(way).collect())
    }

    /// The links that are down and lead out of what `start` still reaches.
    fn cut_around(&self, start: NodeIndex) -> Vec<CutLink> {
        let mut reached = BTreeSet::from([start]);
        let mut frontier = vec![start];
        while let Some(node) = frontier.pop() {
            for edge in self.graph.edges(node).filter(|edge| edge.weight().is_up()) {
                if reached.insert(edge.target()) {
                    frontier.push(edge.target());
                }
            }
        }
        let leaving = |edge: EdgeIndex| {
            self.graph
                .edge_endpoints(edge)
                .is_some_and(|(a, b)| reached.contains(&a) && !reached.contains(&b))
        };
        let numbered = (0u32..).map(LinkId).zip(&self.links);
        let cut =
            numbered.filter(|(_, (forward, backward))| leaving(*forward) || leaving(*backward));
        cut.map(|(link, ends)| CutLink { link, between: self.between(*ends) }).collect()
    }

    fn between(&self, (forward, backward): (EdgeIndex, EdgeIndex)) -> String {
        let end = |edge: EdgeIndex| self.graph[edge].egress.as_ref().map(ToString::to_string);
        format!("{} - {}", end(forward).unwrap_or_default(), end(backward).unwrap_or_default())
    }

    fn add_edges(
        &mut self,
        (a, a_egress, a_to_b): (NodeIndex, Egress, BitsPerSec),
        (b, b_egress, b_to_a): (NodeIndex, Egress, BitsPerSec),
    ) -> LinkId {
        let link = LinkId(u32::try_from(self.links.len()).unwrap_or(u32::MAX));
        let mut edge = |direction, egress: Egress, capacity, (from, to)| {
            let along = DirectedLink { link, direction };
            if let Egress::Port(end) = &egress {
                self.ports.insert(end.clone(), along);
            }
            self.graph.add_edge(
                from,
                to,
                Edge { egress: Some(egress), capacity, ..link_edge(along) },
            )
        };
        let forward = edge(Direction::Forward, a_egress, a_to_b, (a, b));
        let backward = edge(Direction::Backward, b_egress, b_to_a, (b, a));
        self.links.push((forward, backward));
        link
    }

    fn check_end(&self, end: &End, capacity: BitsPerSec) -> Result<(), TopologyError> {
        self.switch(&end.switch)?;
        if self.ports.contains_key(end) {
            return Err(TopologyError::DuplicatePort { end: end.clone() });
        }
        self.check_capacity(end, capacity)
    }

    fn check_capacity(&self, end: &End, capacity: BitsPerSec) -> Result<(), TopologyError> {
        if capacity == BitsPerSec::ZERO {
            return Err(TopologyError::ZeroCapacity { end: end.clone() });
        }
        Ok(())
    }

    fn switch(&self, switch: &SwitchId) -> Result<NodeIndex, TopologyError> {
        let node = self.switches.get(switch).copied();
        node.ok_or_else(|| TopologyError::UnknownSwitch { switch: switch.clone() })
    }

    fn host(&self, host: &HostId) -> Result<&(NodeIndex, Attachment), TopologyError> {
        self.hosts.get(host).ok_or_else(|| TopologyError::UnknownHost { host: host.clone() })
    }

    fn edge_index(&self, along: DirectedLink) -> Result<EdgeIndex, TopologyError> {
        let ends = self.links.get(along.link.0 as usize);
        let (forward, backward) = ends.ok_or(TopologyError::UnknownLink { link: along.link })?;
        Ok(if along.direction == Direction::Forward { *forward } else { *backward })
    }

    fn edge(&self, along: DirectedLink) -> Result<&Edge, TopologyError> {
        Ok(&self.graph[self.edge_index(along)?])
    }

    fn edge_mut(&mut self, along: DirectedLink) -> Result<&mut Edge, TopologyError> {
        let index = self.edge_index(along)?;
        Ok(&mut self.graph[index])
    }
}

fn inside_host() -> Edge {
    Edge {
        along: None,
        ..link_edge(DirectedLink { link: LinkId(0), direction: Direction::Forward })
    }
}

fn link_edge(along: DirectedLink) -> Edge {
    Edge {
        along: Some(along),
        egress: None,
        capacity: BitsPerSec(u64::MAX),
        used: BitsPerSec::ZERO,
        link_up: true,
        port_up: true,
        peer_port_up: true,
    }
}

/// The step that an edge is, unless it stays inside a host.
fn hop(edge: &Edge) -> Option<Hop> {
    Some(Hop {
        egress: edge.egress.clone()?,
        along: edge.along?,
        capacity: edge.capacity,
        spare: BitsPerSec(edge.spare()),
    })
}

#[cfg(test)]
mod tests;
