//! Making a reservation, and changing one.
//!
//! Used by [`super::SwitchNetwork`]. Everything that can be known before the first change is
//! checked before the first change; what fails later is undone by the same release that ends any
//! reservation.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use lifeboat_ovs::openflow::{Message, SwitchHandle};
use lifeboat_ovs::qos;
use lifeboat_policy::reserve::Terms;
use lifeboat_protocol::ids::{EvacuationId, SwitchId};
use lifeboat_protocol::units::BitsPerSec;

use super::abilities::Divided;
use super::ledger::Ground;
use super::mark::{self, Cookie, Kind, Link};
use super::{Inner, WITHIN, hold, locked, of_openflow, queues};
use crate::network::{
    Adjustment, Hop, NetworkError, PageFlow, PortRef, ReservationRequest, Reserved, ReservedHop,
};

impl Inner {
    /// See [`crate::network::Network::reserve`].
    pub(super) async fn reserve(
        &self,
        request: ReservationRequest,
    ) -> Result<Reserved, NetworkError> {
        let ReservationRequest { evacuation, migration, urgency, kind, mut hops, traffic } =
            request;
        hops.retain(|hop| hop.rate > BitsPerSec::ZERO);
        let _changing = self.changing.lock().await;
        let Divided { queued: hops, metered, paced } = self.divide(hops).await?;
        let Some(first) = hops.first().or(metered.first()) else {
            locked(&self.empty).insert(migration);
            return Ok(Reserved::default().with_paced(paced));
        };
        let link = Self::page_link(&traffic, &first.at.switch)?;
        self.check(&hops)?;
        let queue = self.choose_queue(&evacuation, &first.at.switch).await?;
        {
            let (mut ledger, terms) = (locked(&self.ledger), Terms { urgency, kind });
            ledger.hold(&evacuation, &migration, terms, queue, &hops, link);
            ledger.hold_back(&evacuation, &migration, &metered);
        }
        let switches = locked(&self.ledger).switches_of(&evacuation, &migration, &self.ground());
        match self.install(&evacuation, &hops, &switches).await {
            Ok(reserved) => {
                let reserved = self.with_metered(reserved, &evacuation, &metered).with_paced(paced);
                tracing::info!(%evacuation, %migration, queue, rate = %reserved.rate(), "reserved");
                Ok(reserved)
            }
            Err(error) => {
                let undone = self.release_locked(&evacuation, Some(&migration)).await;
                for failure in &undone.failures {
                    tracing::warn!(switch = %failure.switch, error = %failure.error, "not undone");
                }
                Err(error)
            }
        }
    }

    /// The same with the ports where others are held back.
    fn with_metered(
        &self,
        mut reserved: Reserved,
        evacuation: &EvacuationId,
        metered: &[Hop],
    ) -> Reserved {
        let given = metered.iter().map(|hop| {
            let shares = locked(&self.ledger).shares(&hop.at, BitsPerSec::ZERO);
            hold::reserved(hop, shares.as_ref(), evacuation.as_str())
        });
        reserved.hops.extend(given);
        reserved
    }

    pub(super) fn page_link(traffic: &PageFlow, first: &SwitchId) -> Result<Link, NetworkError> {
        Link::of(traffic).ok_or_else(|| NetworkError::Unable {
            switch: first.clone(),
            doing: "reserve for pages over IPv6",
            detail: "give both hosts an IPv4 address in page_listen, or evacuate with --urgency 0"
                .to_owned(),
        })
    }

    /// What pinned flows need to know of the network.
    pub(super) fn ground(&self) -> Ground<'_> {
        Ground { number: &*self.numbers, peer: &*self.peers }
    }

    /// That every switch of the path is there and has the port, and somebody to classify.
    pub(super) fn check(&self, hops: &[Hop]) -> Result<(), NetworkError> {
        for hop in hops {
            let switch = &hop.at.switch;
            self.connections.database(switch)?;
            let bridge = self.connections.bridge(switch).ok_or_else(|| {
                let bridge = self.connections.known(switch).map(|known| known.bridge.clone());
                let bridge = bridge.unwrap_or_default();
                let detail = format!("its database has not shown a bridge `{bridge}`");
                NetworkError::NotConnected { switch: switch.clone(), protocol: "OVSDB", detail }
            })?;
            if bridge.ports.get(&hop.at.port).is_none_or(|port| port.number == 0) {
                return Err(NetworkError::UnknownPort { at: hop.at.clone() });
            }
            self.connections.openflow(switch)?;
            if bridge.needs_classifier() {
                self.classifier(switch)?;
            }
        }
        Ok(())
    }

    /// The evacuation's number: the one that it has, by the ledger or by a mark that a controller
    /// before this one left; else one that no queue of any switch has.
    pub(super) async fn choose_queue(
        &self,
        evacuation: &EvacuationId,
        switch: &SwitchId,
    ) -> Result<u32, NetworkError> {
        if let Some(queue) = locked(&self.ledger).queue(evacuation) {
            return Ok(queue);
        }
        let mut taken = BTreeSet::new();
        for database in self.connections.databases() {
            // A switch that is away keeps its queues; on the path there is none such.
            let Ok(snapshot) = qos::read(&database.client, WITHIN).await else { continue };
            let mut held = queues::held(&snapshot).into_iter();
            if let Some((_, found)) = held.find(|((whose, _), _)| whose == evacuation) {
                return Ok(found.number);
            }
            taken.extend(queues::taken(&snapshot));
        }
        locked(&self.ledger).free_queue(&taken).ok_or_else(|| NetworkError::Unable {
            switch: switch.clone(),
            doing: "mark one more evacuation",
            detail: "sixteen reserve already, or foreign queues have the numbers 3, 7, .. 63; wait for one to end".to_owned(),
        })
    }

    /// Queues on the ports of a way, then flows on `switches`.
    pub(super) async fn install(
        &self,
        evacuation: &EvacuationId,
        hops: &[Hop],
        switches: &BTreeSet<SwitchId>,
    ) -> Result<Reserved, NetworkError> {
        let mut reserved = Reserved::default();
        for hop in hops {
            reserved.hops.extend(self.apply_queues(evacuation, &hop.at).await?);
        }
        let mut by_switch: BTreeMap<&SwitchId, Vec<String>> = BTreeMap::new();
        for hop in hops {
            by_switch.entry(&hop.at.switch).or_default().push(hop.at.port.clone());
        }
        let classify = by_switch.iter().map(|(switch, ports)| self.classify(switch, ports.clone()));
        join_all(classify).await.into_iter().collect::<Result<(), _>>()?;
        let flows = switches.iter().map(|switch| self.install_flows(switch));
        join_all(flows).await.into_iter().collect::<Result<(), _>>()?;
        Ok(reserved)
    }

    /// Makes a port's queues agree with the ledger. Answers the evacuation's part of it.
    pub(super) async fn apply_queues(
        &self,
        evacuation: &EvacuationId,
        at: &PortRef,
    ) -> Result<Option<ReservedHop>, NetworkError> {
        let client = self.connections.database(&at.switch)?;
        let divide = |foreign| locked(&self.ledger).shares(at, foreign);
        let shares = queues::apply(&client, at, Self::expiry(), divide).await?;
        Ok(shares.and_then(|shares| {
            let capacity = shares.capacity;
            let share = shares.queues.into_iter().find(|share| share.evacuation == *evacuation)?;
            Some(ReservedHop { at: at.clone(), capacity, rate: share.rate, queue: share.queue })
        }))
    }

    /// Makes a switch's queues reachable where its datapath does not do that itself.
    pub(super) async fn classify(
        &self,
        switch: &SwitchId,
        ports: Vec<String>,
    ) -> Result<(), NetworkError> {
        let bridge = self.connections.bridge(switch);
        if ports.is_empty() || !bridge.is_some_and(|bridge| bridge.needs_classifier()) {
            return Ok(());
        }
        let (installer, agent) = self.classifier(switch)?;
        let ensured = installer.ensure(&agent, ports).await;
        ensured.map_err(|error| Self::unclassified(switch, &error))
    }

    /// Sends all flows that a switch should have; those that it has are replaced by the same.
    pub(super) async fn install_flows(&self, switch: &SwitchId) -> Result<(), NetworkError> {
        let flows = locked(&self.ledger).flows_on(switch, &self.ground());
        if flows.is_empty() {
            return Ok(());
        }
        let handle = self.connections.openflow(switch)?;
        let mut changes = Vec::new();
        if let Some((_, shares)) = locked(&self.ledger).metered_on(switch) {
            locked(&self.meters).insert(switch.clone());
            changes.extend(hold::renewed(&shares));
        }
        changes.extend(flows.into_iter().map(Message::FlowMod));
        if self.would_drop(switch, &handle).await? {
            tracing::warn!(%switch, "the switch drops everything; a flow lets it forward");
            changes.push(Message::FlowMod(mark::forward_flow()));
        }
        let done = handle.change(changes, WITHIN).await;
        done.map_err(|error| of_openflow(switch, "install flows", error))
    }

    /// Whether a switch forwards nothing but our pages: in secure mode, without a flow of anybody.
    async fn would_drop(
        &self,
        switch: &SwitchId,
        handle: &SwitchHandle,
    ) -> Result<bool, NetworkError> {
        if !self.connections.bridge(switch).is_some_and(|bridge| bridge.secure) {
            return Ok(false);
        }
        let flows = handle.flow_stats(0, 0, WITHIN).await;
        let flows = flows.map_err(|error| of_openflow(switch, "list its flows", error))?;
        let forwards = |cookie| Cookie::from_bits(cookie).is_none_or(|c| c.kind == Kind::Forward);
        Ok(!flows.iter().any(|flow| forwards(flow.cookie)))
    }

    /// See [`crate::network::Network::adjust`].
    pub(super) async fn adjust(&self, adjustment: Adjustment) -> Result<Reserved, NetworkError> {
        let Adjustment { evacuation, ports } = adjustment;
        let _changing = self.changing.lock().await;
        let mut reserved = Reserved::default();
        for (at, rate) in ports {
            let held = locked(&self.ledger).want(&evacuation, &at, rate);
            if locked(&self.ledger).is_metered(&at) {
                self.change_meter(&at).await?;
            } else if held {
                reserved.hops.extend(self.apply_queues(&evacuation, &at).await?);
            }
        }
        Ok(reserved)
    }
}
