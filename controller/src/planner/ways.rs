//! The network as it is now: the configured topology with what the switches report, and the wish
//! for each port of a way.

use std::collections::BTreeSet;

use lifeboat_policy::reserve::entitled;
use lifeboat_protocol::ids::HostId;
use lifeboat_protocol::terms::Urgency;
use lifeboat_protocol::units::BitsPerSec;
use lifeboat_topology::{Egress, End, PortName, Topology, TopologyError, Way};

use super::{FullPlan, Planner};
use crate::network::{Ability, Hop, PageFlow, PortRef};

/// Why a migration's packets cannot be told from others.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageFlowError {
    /// The source is not in the configuration.
    #[error("the source {host} is not configured")]
    Source {
        /// The host.
        host: HostId,
    },
    /// The destination's agent has said nothing yet.
    #[error("the agent of {host} has not described its host")]
    Silent {
        /// The host.
        host: HostId,
    },
    /// Its page address is none.
    #[error("the agent of {host} gives no page address that a switch can match")]
    Address {
        /// The host.
        host: HostId,
    },
}

impl Planner {
    /// What the narrowest link between two hosts carries; 0 where there is no way.
    pub async fn narrowest(&self, from: &HostId, to: &HostId) -> BitsPerSec {
        let topology = self.fresh_topology().await;
        let ways = topology.ways(from, to, 1).unwrap_or_default();
        ways.first().and_then(Way::capacity).unwrap_or_default()
    }

    /// The topology with ports up or down and with what passes on each link. A switch that has not
    /// been heard leaves its links as the configuration has them: up and unused.
    pub(super) async fn fresh_topology(&self) -> Topology {
        let mut topology = self.site.topology.clone();
        for status in self.network.switches().await {
            for port in status.ports.iter().filter(|_| status.openflow_connected) {
                let end =
                    PortName::new(port.name.clone()).map(|p| End::new(status.name.clone(), p));
                // A port that no link ends at is none of ours.
                let _ = end.map(|end| topology.set_port_up(&end, port.passes()));
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

    /// The best way that is up now, with the wish for each port of it.
    ///
    /// # Errors
    /// Where there is none, with the links that cut it.
    pub async fn way_now(
        &self,
        source: &HostId,
        destination: &HostId,
        urgency: Urgency,
    ) -> Result<Vec<Hop>, TopologyError> {
        let ways = self.fresh_topology().await.ways(source, destination, 1)?;
        Ok(ways.first().map(|way| self.hops(way, urgency)).unwrap_or_default())
    }

    /// The packets of a migration's page link.
    ///
    /// # Errors
    /// When one of the ends is not known well enough to be matched, in one sentence.
    pub fn page_flow(
        &self,
        source: &HostId,
        destination: &HostId,
    ) -> Result<PageFlow, PageFlowError> {
        let unconfigured = || PageFlowError::Source { host: source.clone() };
        let from = self.site.host(source).ok_or_else(unconfigured)?;
        let entry = self.inventory.host(destination);
        let said = entry.and_then(|entry| entry.description);
        let said = said.ok_or_else(|| PageFlowError::Silent { host: destination.clone() })?;
        let address = said.page_address.parse();
        let address = address.map_err(|_| PageFlowError::Address { host: destination.clone() })?;
        Ok(PageFlow { source: from.address, destination: address, served: false })
    }

    /// Where a plan's pages leave by ports that can carry no queue: a sentence for each.
    pub(super) async fn paced_notes(&self, full: &FullPlan) -> Vec<String> {
        let wanted = full.goes.iter().flat_map(|goes| goes.hops.iter().chain(&goes.store_hops));
        let wanted = wanted.filter(|hop| hop.rate > BitsPerSec::ZERO).map(|hop| &hop.at);
        let ports: BTreeSet<&PortRef> = wanted.collect();
        let switches = self.network.switches().await;
        let why = |at: &PortRef| {
            let status = switches.iter().find(|status| status.name == at.switch)?;
            let port = status.ports.iter().find(|port| port.name == at.port)?;
            let kept = match &port.ability {
                Ability::Metered(_) => {
                    "a meter holds everything else that leaves the host to what is not reserved, \
                     also between its own VMs, and the source paces its pages"
                }
                _ => "the source paces its pages instead, and nothing is guaranteed there",
            };
            Some((port.ability.no_queue()?.to_string(), kept))
        };
        let note = |at: &&PortRef| {
            let (why, kept) = why(at)?;
            Some(format!("{at} gets no queue ({why}): {kept}"))
        };
        ports.iter().filter_map(note).collect()
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
