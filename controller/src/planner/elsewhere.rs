//! Where the pages of scattered VMs wait: what `policy::intermediary` needs to know, and what an
//! operator should know of its answer.

use std::collections::BTreeSet;

use lifeboat_policy::intermediary::{Candidate, Redundancy, Wish, choose};
use lifeboat_protocol::ids::HostId;
use lifeboat_protocol::terms::Mode;
use lifeboat_protocol::units::{BitsPerSec, Bytes};
use lifeboat_topology::Topology;

use super::{FullPlan, Goes, Planner, Stays};
use crate::evacuation::EvacuationOrder;
use crate::inventory::HostEntry;

/// Packs have heads, the last one is not full, and the guest goes on writing until the hand-over.
const PACKED: f64 = 1.3;
const PACKED_LEAST: Bytes = Bytes::from_mib(32);

impl Planner {
    /// Names the stores of every VM that is to be scattered. One for which there are none stays.
    pub(super) async fn choose_stores(&self, order: &EvacuationOrder, full: &mut FullPlan) {
        if full.goes.iter().all(|goes| goes.step.mode != Mode::ScatterGather) {
            return;
        }
        let topology = self.fresh_topology().await;
        let mut kept = Vec::new();
        for mut goes in std::mem::take(&mut full.goes) {
            if goes.step.mode != Mode::ScatterGather {
                kept.push(goes);
                continue;
            }
            match choose(&self.candidates(order, &goes, &topology), &self.wish(order, &goes)) {
                Ok(chosen) => {
                    goes.stores = Some(chosen);
                    kept.push(goes);
                }
                Err(error) => full.stays.push(Stays {
                    vm: goes.step.vm.clone(),
                    host: goes.source.clone(),
                    reason: error.to_string(),
                    refusals: Vec::new(),
                }),
            }
        }
        full.goes = kept;
    }

    fn wish(&self, order: &EvacuationOrder, goes: &Goes) -> Wish {
        let memory = goes.figures.memory;
        let pages = goes.figures.non_zero.bytes().scale(PACKED) + PACKED_LEAST;
        let first = goes.hops.first().map_or(BitsPerSec::ZERO, |hop| hop.rate);
        let source_rack = self.site.rack(&goes.source);
        let in_rack = self.site.config.hosts.iter().map(|host| &host.name);
        let in_rack: BTreeSet<&HostId> =
            in_rack.filter(|host| self.site.rack(host) == source_rack).collect();
        let whole_rack = in_rack.len() > 1 && in_rack.iter().all(|host| order.hosts.contains(host));
        Wish {
            pages: pages.min(memory.scale(PACKED) + PACKED_LEAST),
            rate: first,
            near_only: whole_rack && order.intermediaries.is_empty(),
            count: match order.intermediaries.len() {
                0 => order.intermediary_count as usize,
                named => named,
            },
            redundancy: order.redundancy,
        }
    }

    fn candidates(
        &self,
        order: &EvacuationOrder,
        goes: &Goes,
        topology: &Topology,
    ) -> Vec<Candidate> {
        let hosts = self.inventory.hosts();
        let named =
            |host: &HostId| order.intermediaries.is_empty() || order.intermediaries.contains(host);
        let rack = self.site.rack(&goes.step.destination);
        let others = hosts.iter().filter(|(host, _)| named(host));
        let candidate = |(host, entry): (&HostId, &HostEntry)| {
            let said = entry.description.clone().unwrap_or_default();
            let obstacle = match () {
                () if *host == goes.source => "it is the source".to_owned(),
                () if *host == goes.step.destination => "it is the destination".to_owned(),
                () if !entry.connected => "its agent does not answer".to_owned(),
                () if order.hosts.contains(host) => "it is being evacuated itself".to_owned(),
                () if entry.cordoned => "it is cordoned".to_owned(),
                () => said.store_obstacle.clone(),
            };
            Candidate {
                near: self.site.rack(host) == rack,
                room: Bytes(said.store_memory_free_bytes),
                // Whom the operator names is taken, however busy.
                cores: match order.intermediaries.is_empty() {
                    true => said.cpu_cores - said.cpu_load,
                    false => f64::INFINITY,
                },
                rate: way_rate(topology, &goes.source, host),
                obstacle,
                host: host.clone(),
            }
        };
        others.map(candidate).collect()
    }
}

/// What the best way between two hosts has to spare at its narrowest.
fn way_rate(topology: &Topology, from: &HostId, to: &HostId) -> BitsPerSec {
    let Ok(ways) = topology.ways(from, to, 1) else { return BitsPerSec::ZERO };
    let Some(way) = ways.first() else { return BitsPerSec::ZERO };
    way.hops.iter().map(|hop| hop.spare).min().unwrap_or(BitsPerSec(u64::MAX))
}

/// What is known of a VM's stores, for the plan.
pub(super) fn note(goes: &Goes) -> Option<String> {
    let chosen = goes.stores.as_ref()?;
    let stores = chosen.stores.iter().map(|store| format!("{} ({})", store.host, store.memory));
    let risk = match chosen.redundancy {
        Redundancy::None => "; the loss of a store before all is gathered is the loss of the VM",
        Redundancy::Mirror | Redundancy::Parity => "",
    };
    Some(format!(
        "{}'s pages wait at {} until {} has them; redundancy {}{risk}",
        goes.step.vm,
        stores.collect::<Vec<_>>().join(", "),
        goes.step.destination,
        chosen.redundancy
    ))
}
