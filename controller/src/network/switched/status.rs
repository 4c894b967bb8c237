//! What is known of switches and ports now, for operators and for the policy.
//!
//! Used by [`super::SwitchNetwork`]. Reads what the tasks have gathered; asks nobody.

use lifeboat_policy::saturation::{Saturation, of_switch};
use lifeboat_protocol::ids::SwitchId;
use lifeboat_protocol::units::BitsPerSec;
use lifeboat_topology::Sighting;

use super::connections::Known;
use super::ledger::Shares;
use super::{Inner, locked};
use crate::clock::{self, UnixMs};
use crate::network::{PortRate, PortRef, PortStatus, QueueRate, SwitchStatus};

impl Inner {
    /// See [`crate::network::Network::switches`].
    pub(super) fn status(&self) -> Vec<SwitchStatus> {
        let now = clock::now();
        self.connections.switches().map(|(name, known)| self.switch(name, known, now)).collect()
    }

    fn switch(&self, name: &SwitchId, known: &Known, now: UnixMs) -> SwitchStatus {
        let bridge = self.connections.bridge(name);
        let openflow_connected = self.connections.openflow(name).is_ok();
        let database = self.connections.database(name);
        let mut detail = Vec::new();
        if let Err(error) = &database {
            detail.push(error.to_string());
        } else if bridge.is_none() {
            detail.push(format!("its database has no bridge `{}`", known.bridge));
        }
        if !openflow_connected {
            detail.push(format!("no OpenFlow: {}", self.connections.why_no_openflow(name)));
        }
        let id = self.connections.datapath_id(name);
        let told = bridge.as_ref().and_then(|bridge| bridge.datapath_id);
        if let (Some(wanted), Some(told)) = (id, told)
            && wanted != told
        {
            detail.push(format!("its datapath id is {told:016x}, configured is {wanted:016x}"));
        }
        detail.extend(self.owed_on(name));
        let rates = self.rates_where(now, |at| at.switch == *name);
        let ports = bridge.iter().flat_map(|bridge| &bridge.ports);
        let ports = ports.map(|(port, found)| {
            let at = PortRef { switch: name.clone(), port: port.clone() };
            self.port(at, found.number, found.up, now)
        });
        let mut ports: Vec<PortStatus> = ports.collect();
        ports.sort_by_key(|port| port.number);
        SwitchStatus {
            name: name.clone(),
            host: known.host.clone(),
            datapath_id: id.map(|id| format!("{id:016x}")).unwrap_or_default(),
            openflow_connected,
            ovsdb_connected: database.is_ok(),
            datapath: bridge.map(|bridge| bridge.datapath).unwrap_or_default(),
            shaping: self.shaping(name),
            detail: detail.join("; "),
            saturation: of_switch(rates.iter().map(|rate| rate.saturation)),
            migrations: migrations(&rates),
            migration_budget: self.budgets.get(name).copied().unwrap_or_default(),
            ports,
        }
    }

    fn port(&self, at: PortRef, number: u32, up: bool, now: UnixMs) -> PortStatus {
        let link = self.links.get(&at);
        let shares = self.shares(&at);
        PortStatus {
            number,
            peer: link.map(|link| link.peer.clone()).unwrap_or_default(),
            capacity: link.map_or(BitsPerSec::ZERO, |link| link.capacity),
            reserved: shares.into_iter().flat_map(|shares| shares.queues).map(|q| q.rate).sum(),
            transmitted: self.transmitted(&at.switch, number, now),
            sighting: self.sighting(&at),
            ability: self.ability(&at),
            name: at.port,
            up,
        }
    }

    fn shares(&self, at: &PortRef) -> Option<Shares> {
        locked(&self.ledger).shares(at, BitsPerSec::ZERO)
    }

    fn transmitted(&self, switch: &SwitchId, number: u32, now: UnixMs) -> Option<BitsPerSec> {
        locked(&self.counters).ports.get(&(switch.clone(), number))?.rate(now)
    }

    /// See [`crate::network::Network::rates`].
    pub(super) fn rates(&self) -> Vec<PortRate> {
        self.rates_where(clock::now(), |_| true)
    }

    fn rates_where(&self, now: UnixMs, wanted: impl Fn(&PortRef) -> bool) -> Vec<PortRate> {
        let rate = |(at, link): (&PortRef, &super::LinkEnd)| {
            let number = self.connections.port_number(at);
            let transmitted = number.and_then(|n| self.transmitted(&at.switch, n, now));
            // Where others are held back there is no queue whose counters could be followed.
            let shares = self.shares(at).filter(|_| !locked(&self.ledger).is_metered(at));
            let shares = shares.into_iter().flat_map(|shares| shares.queues);
            let queues = shares.map(|share| {
                let key = number.map(|number| (at.switch.clone(), number, share.queue));
                let counters = locked(&self.counters);
                let counter = key.and_then(|key| counters.queues.get(&key));
                QueueRate {
                    migrations: locked(&self.ledger).migrations_at(&share.evacuation, at),
                    evacuation: share.evacuation,
                    urgency: share.terms.urgency,
                    kind: share.terms.kind,
                    queue: share.queue,
                    reserved: share.rate,
                    transmitted: counter.and_then(|counter| counter.rate(now)),
                }
            });
            PortRate {
                at: at.clone(),
                peer: link.peer.clone(),
                up: self.passes(at, &link.to),
                capacity: link.capacity,
                saturation: self.saturation_of(at, now),
                transmitted,
                queues: queues.collect(),
            }
        };
        self.links.iter().filter(|(at, _)| wanted(at)).map(rate).collect()
    }

    /// For a person: what is still to be released on a switch.
    fn owed_on(&self, switch: &SwitchId) -> Option<String> {
        let mut owed = self.pending();
        owed.retain(|owed| owed.failures.iter().any(|failure| failure.switch == *switch));
        let whose = owed.iter().map(|owed| match &owed.migration {
            Some(migration) => migration.to_string(),
            None => owed.evacuation.to_string(),
        });
        let whose: Vec<String> = whose.collect();
        (!whose.is_empty()).then(|| format!("to be released when it answers: {}", whose.join(", ")))
    }

    /// Whether nothing says that a link carries nothing.
    fn passes(&self, at: &PortRef, to: &PortRef) -> bool {
        let down = self.connections.is_down(at) || self.connections.is_down(to);
        !down && self.sighting(at) != Some(Sighting::Lost)
    }

    fn saturation_of(&self, at: &PortRef, now: UnixMs) -> Saturation {
        let gauge = locked(&self.counters).gauges.get(at).copied().unwrap_or_default();
        gauge.read(&self.saturation, now.time())
    }
}

/// What migrations send by all of a switch's links together. Each passes a switch once.
fn migrations(rates: &[PortRate]) -> Option<BitsPerSec> {
    rates.iter().flat_map(|rate| &rate.queues).map(|queue| queue.transmitted).sum()
}
