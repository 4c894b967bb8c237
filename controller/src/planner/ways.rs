//! The network as it is now: the configured topology with what the switches report, and the wish
//! for each port of a way.

use lifeboat_policy::reserve::entitled;
use lifeboat_protocol::ids::HostId;
use lifeboat_protocol::terms::Urgency;
use lifeboat_protocol::units::BitsPerSec;
use lifeboat_topology::{Egress, End, PortName, Topology, Way};

use super::Planner;
use crate::network::{Hop, PortRef};

impl Planner {
    /// The topology with ports up or down and with what passes on each link. A switch that has not
    /// been heard leaves its links as the configuration has them: up and unused.
    pub(super) async fn fresh_topology(&self) -> Topology {
        let mut topology = self.site.topology.clone();
        for status in self.network.switches().await {
            for port in status.ports.iter().filter(|_| status.openflow_connected) {
                let end =
                    PortName::new(port.name.clone()).map(|p| End::new(status.name.clone(), p));
                // A port that no link ends at is none of ours.
                let _ = end.map(|end| topology.set_port_up(&end, port.up));
            }
        }
        for rate in self.network.rates().await {
            let end = PortName::new(rate.at.port.clone()).map(|p| End::new(rate.at.switch, p));
            let along = end.ok().and_then(|end| topology.leaving(&end));
            if let (Some(along), Some(used)) = (along, rate.transmitted) {
                let _ = topology.set_used(along, used);
            }
        }
        topology
    }

    /// What a host's link can still take in: the spare capacity of the port that faces its bridge.
    pub(super) fn spare_in(&self, topology: &Topology, host: &HostId) -> BitsPerSec {
        let Ok(Some(bridge)) = self.site.topology.own_bridge(host) else {
            return BitsPerSec(u64::MAX);
        };
        let facing = self.site.ends.iter().filter_map(|(a, b)| match () {
            () if a.switch == *bridge => Some(b),
            () if b.switch == *bridge => Some(a),
            () => None,
        });
        let spare = facing.filter_map(|end| topology.spare(topology.leaving(end)?).ok());
        spare.max().unwrap_or(BitsPerSec(u64::MAX))
    }

    /// What is wanted on each port of a way: the urgency's share, with the floor left to others.
    pub(super) fn hops(&self, way: &Way, urgency: Urgency) -> Vec<Hop> {
        let floor = self.floor();
        let hops = way.hops.iter().filter_map(|hop| {
            let Egress::Port(end) = &hop.egress else { return None };
            let most = hop.capacity - floor.of(hop.capacity);
            let rate = entitled(hop.capacity, urgency).min(most);
            let at = PortRef { switch: end.switch.clone(), port: end.port.to_string() };
            Some(Hop { at, capacity: hop.capacity, rate })
        });
        hops.collect()
    }
}
