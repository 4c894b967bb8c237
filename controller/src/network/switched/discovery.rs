//! Finds out by LLDP which ports face each other, and notices links that carry nothing any more.
//!
//! One of the tasks of [`super::SwitchNetwork`], where the configuration asks for it
//! (`discovery_interval_ms`): probes need a flow on every switch that hands them up, and on other
//! people's switches nothing of ours lies about that nobody asked for. That flow is a lease: it
//! goes by itself when no controller renews it.
//!
//! ```text
//!   each interval, to each switch:  flow "LLDP to the controller", hard timeout 3 intervals
//!                                   packet-out: a probe with a fresh token, for each port
//!   packet-in ──> decode ──> Sightings (topology/) ──> seen, lost, elsewhere
//! ```
//!
//! On a host's own bridge only the ports of configured links are probed and listened at: behind the
//! others are guests. Deliberately not here: what is done about a lost link, and capacities.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use lifeboat_ovs::lldp::{self, Frame, Id, Own};
use lifeboat_ovs::openflow::packet::PacketOut;
use lifeboat_ovs::openflow::{Message, PortNo, RequestError};
use lifeboat_protocol::ids::SwitchId;
use lifeboat_topology::{End, PortName, Sighting};
use tokio::sync::mpsc;

use super::{Inner, locked, mark};
use crate::chance;
use crate::network::PortRef;

/// Whose TLV carries the token: a locally administered organization (IEEE 802c), as we have none
/// of our own.
const ORGANIZATION: [u8; 3] = [0x02, 0x4c, 0x42];
const TOKEN: u8 = 1;
/// From here on a database's port numbers stand for something else: a bridge's own port is 65534.
const RESERVED_PORTS: u32 = 0xff00;

/// A frame that a switch has handed up.
#[derive(Debug)]
pub(super) struct Arrived {
    /// The switch.
    pub(super) datapath_id: u64,
    /// Where it came in.
    pub(super) port: u32,
    /// From its Ethernet header on.
    pub(super) data: Bytes,
}

/// Probes for ever, once `every`.
pub(super) async fn run(inner: Arc<Inner>, mut arrived: mpsc::Receiver<Arrived>, every: Duration) {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut lost = BTreeSet::new();
    loop {
        tokio::select! {
            Some(frame) = arrived.recv() => inner.arrived(&frame),
            _ = ticks.tick() => {
                // An answer that waits is looked at before its token is drawn anew.
                for _ in 0..arrived.len() {
                    arrived.try_recv().iter().for_each(|frame| inner.arrived(frame));
                }
                inner.probe(every).await;
                let now = inner.lost();
                if now != lost {
                    let names: Vec<String> = now.iter().map(ToString::to_string).collect();
                    tracing::warn!(?names, "links that LLDP has lost");
                    lost = now;
                    inner.connections.links_changed();
                }
            }
        }
    }
}

fn end(at: &PortRef) -> Option<End> {
    Some(End::new(at.switch.clone(), PortName::new(at.port.clone()).ok()?))
}

impl Inner {
    /// Sends a probe out of every port that may be probed.
    async fn probe(&self, every: Duration) {
        let switches = self.connections.switches().map(|(switch, _)| switch);
        join_all(switches.map(|switch| self.probe_switch(switch, every))).await;
    }

    async fn probe_switch(&self, switch: &SwitchId, every: Duration) {
        let gone = || locked(&self.sightings).forget(|from| from.switch == *switch);
        let Ok(handle) = self.connections.openflow(switch) else { return gone() };
        if self.is_foreign(switch).await {
            // Its controller knows its links, and a flow of ours would be in its pipeline.
            return gone();
        }
        let ports = self.probed_ports(switch);
        let mut changes: Vec<Message> =
            self.probe_flows(switch, &ports, every).into_iter().map(Message::FlowMod).collect();
        for (at, number) in &ports {
            let Some((from, token)) = end(at).zip(chance::token()) else { continue };
            let Some(frame) = self.frame(switch, *number, token, every) else { continue };
            changes.push(Message::PacketOut(PacketOut::to_port(PortNo(*number), frame)));
            // Before it is sent: the answer may overtake the barrier.
            locked(&self.sightings).sent(from, token);
        }
        match handle.change(changes, every.max(Duration::from_secs(1))).await {
            Ok(()) => {}
            // A port that has just gone; the others are probed all the same.
            Err(error @ RequestError::Refused { .. }) => {
                tracing::debug!(%switch, %error, "a port was not probed");
            }
            Err(error) => {
                tracing::debug!(%switch, %error, "not probed");
                gone();
            }
        }
    }

    /// The ports of a switch that probes leave by: those that are up, face no guest, and whose
    /// configured other end could answer.
    fn probed_ports(&self, switch: &SwitchId) -> Vec<(PortRef, u32)> {
        let Some(bridge) = self.connections.bridge(switch) else { return Vec::new() };
        let is_host = self.connections.known(switch).is_ok_and(|known| known.host.is_some());
        let real = |number| (1..RESERVED_PORTS).contains(&number);
        let up = bridge.ports.into_iter().filter(|(_, port)| port.up && real(port.number));
        let at = |port| PortRef { switch: switch.clone(), port };
        up.map(|(name, port)| (at(name), port.number))
            .filter(|(at, _)| match self.links.get(at) {
                Some(link) => self.connections.openflow(&link.to.switch).is_ok(),
                None => !is_host,
            })
            .collect()
    }

    /// The flows that hand probes up: of a fabric's switch from all ports, of a host's bridge from
    /// those of its links.
    fn probe_flows(
        &self,
        switch: &SwitchId,
        ports: &[(PortRef, u32)],
        every: Duration,
    ) -> Vec<lifeboat_ovs::openflow::flow::FlowMod> {
        let seconds = every.as_millis().saturating_mul(3).div_ceil(1000).max(2);
        let lease = u16::try_from(seconds).unwrap_or(u16::MAX);
        match self.connections.known(switch).is_ok_and(|known| known.host.is_some()) {
            false => vec![mark::probe_flow(None, lease)],
            true => ports.iter().map(|(_, n)| mark::probe_flow(Some(PortNo(*n)), lease)).collect(),
        }
    }

    fn frame(
        &self,
        switch: &SwitchId,
        number: u32,
        token: [u8; 16],
        every: Duration,
    ) -> Option<Bytes> {
        let id = self.connections.datapath_id(switch)?;
        let [_, _, _, _, _, _, low @ ..] = id.to_be_bytes();
        let [a, b] = u16::try_from(number).unwrap_or(u16::MAX).to_be_bytes();
        let frame = Frame {
            // Locally administered and no group: the switch and the port, for whoever looks.
            source: [0x02, 0x4c, low[0], low[1], a, b],
            chassis: Id::local(format!("{id:016x}")),
            port: Id::local(number.to_string()),
            ttl: u16::try_from(every.as_secs().saturating_mul(3).max(2)).unwrap_or(u16::MAX),
            own: vec![Own {
                organization: ORGANIZATION,
                subtype: TOKEN,
                value: Bytes::copy_from_slice(&token),
            }],
        };
        lldp::encode(&frame).ok()
    }

    fn arrived(&self, arrived: &Arrived) {
        let Ok(frame) = lldp::decode(&arrived.data) else { return };
        let Some((from, token)) = self.told(&frame) else { return };
        let at = self.connections.port_at(arrived.datapath_id, arrived.port);
        let Some(at) = at.as_ref().and_then(end) else { return };
        if !locked(&self.sightings).arrived(&from, token, at) {
            tracing::debug!(%from, "a probe that nobody sent like this");
        }
    }

    /// Which port a frame says it left by, and the token that proves it; `None` for a frame that is
    /// no probe of ours.
    fn told(&self, frame: &Frame) -> Option<(End, [u8; 16])> {
        let is_token = |own: &&Own| own.organization == ORGANIZATION && own.subtype == TOKEN;
        let token = frame.own.iter().find(is_token)?.value[..].try_into().ok()?;
        let text = |id: &Id| String::from_utf8(id.value.to_vec()).ok();
        let id = u64::from_str_radix(&text(&frame.chassis)?, 16).ok()?;
        let number = text(&frame.port)?.parse().ok()?;
        Some((end(&self.connections.port_at(id, number)?)?, token))
    }

    /// What is known of where a port leads; `None` where nobody probes.
    pub(super) fn sighting(&self, at: &PortRef) -> Option<Sighting> {
        let (sightings, from) = (locked(&self.sightings), end(at)?);
        match self.links.get(at).and_then(|link| end(&link.to)) {
            Some(to) => sightings.is_probed(&from).then(|| sightings.of(&from, &to)),
            None => Some(Sighting::Elsewhere { at: sightings.leads_to(&from)?.clone() }),
        }
    }

    /// Ports of configured links whose probes do not arrive any more.
    fn lost(&self) -> BTreeSet<PortRef> {
        let lost = self.links.keys().filter(|at| self.sighting(at) == Some(Sighting::Lost));
        lost.cloned().collect()
    }
}
