//! Where the pages of scattered VMs wait: what `policy::intermediary` needs to know, and what an
//! operator should know of its answer.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lifeboat_policy::intermediary::{
    Candidate, ChosenStores, NoStoresError, Redundancy, Wish, choose,
};
use lifeboat_policy::measured::MeasuredVm;
use lifeboat_policy::predict::{ahead, eviction};
use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::terms::{Mode, Urgency};
use lifeboat_protocol::units::{BitsPerSec, Bytes, BytesPerSec};
use lifeboat_topology::Topology;

use super::measure::criteria;
use super::{FullPlan, Goes, Planner, Stays, millis};
use crate::evacuation::EvacuationOrder;
use crate::inventory::HostEntry;
use crate::network::{Hop, PortRef};

/// Packs have heads, the last one is not full, and the guest goes on writing until the hand-over.
const PACKED: f64 = 1.3;
const PACKED_LEAST: Bytes = Bytes::from_mib(32);

/// Why an intermediary is not taken again.
pub(super) const FAILED_BEFORE: &str = "an attempt to move this VM failed at it";

/// What others that leave will have taken of each host's room.
type Taken = BTreeMap<HostId, Bytes>;

/// The intermediaries that have failed each VM in this evacuation.
pub(super) type FailedStores = BTreeMap<VmId, Vec<HostId>>;

/// A VM whose pages might wait elsewhere.
pub(super) struct Leaver<'a> {
    pub(super) source: &'a HostId,
    pub(super) destination: &'a HostId,
    /// Intermediaries that have failed it.
    pub(super) failed: &'a [HostId],
    pub(super) figures: &'a MeasuredVm,
    /// What is to be reserved for it on its host's uplink.
    pub(super) reserved: BitsPerSec,
}

/// Each way with what goes over it: of a port no more is wanted than all ways over it take together.
fn narrowed(ways: Vec<(Vec<Hop>, BitsPerSec)>) -> Vec<Vec<Hop>> {
    let mut wanted: BTreeMap<PortRef, BitsPerSec> = BTreeMap::new();
    for (way, rate) in &ways {
        for hop in way {
            *wanted.entry(hop.at.clone()).or_default() += *rate;
        }
    }
    let narrow = |mut way: Vec<Hop>| {
        for hop in &mut way {
            hop.rate = hop.rate.min(wanted.get(&hop.at).copied().unwrap_or_default());
        }
        way
    };
    ways.into_iter().map(|(way, _)| narrow(way)).collect()
}

impl<'a> Leaver<'a> {
    fn of(goes: &'a Goes, failed: &'a FailedStores) -> Self {
        Self {
            failed: failed.get(&goes.step.vm).map_or(&[], Vec::as_slice),
            source: &goes.source,
            destination: &goes.step.destination,
            figures: &goes.figures,
            reserved: goes.hops.first().map_or(BitsPerSec::ZERO, |hop| hop.rate),
        }
    }
}

impl Planner {
    /// Names the stores of every VM that is to be scattered. One for which there are none stays.
    pub(super) async fn choose_stores(
        &self,
        order: &EvacuationOrder,
        full: &mut FullPlan,
        failed: &FailedStores,
    ) {
        if full.goes.iter().all(|goes| goes.step.mode != Mode::ScatterGather) {
            return;
        }
        let topology = self.fresh_topology().await;
        let (mut kept, mut taken) = (Vec::new(), Taken::new());
        for mut goes in std::mem::take(&mut full.goes) {
            if goes.step.mode != Mode::ScatterGather {
                kept.push(goes);
                continue;
            }
            // Beside the stores of those before it where there is room for both, or after them.
            let beside = self.stores_beside(order, &Leaver::of(&goes, failed), &topology, &taken);
            goes.after_stores = beside.is_err();
            match beside.or_else(|_| self.stores_for(order, &Leaver::of(&goes, failed), &topology))
            {
                Ok(mut chosen) => {
                    for store in &chosen.stores {
                        *taken.entry(store.host.clone()).or_default() += store.memory;
                    }
                    let sent = sent(&Leaver::of(&goes, failed), &chosen);
                    let (factor, criteria) = (factor(&chosen), criteria(order));
                    let direct = goes.step.predicted.bandwidth.bytes_per_sec();
                    let all = eviction(&goes.figures, direct, sent, factor, &criteria);
                    if self.site.config.policy.scatter_ahead {
                        chosen.ahead = ahead(&goes.figures, sent, factor);
                    }
                    let sooner = chosen.ahead.map_or(Duration::ZERO, |ahead| ahead.sooner);
                    // Without a reservation nobody knows how fast pages leave.
                    goes.eviction = (sent != BytesPerSec::ZERO).then(|| all.saturating_sub(sooner));
                    let ways = self.store_ways(&goes.source, &chosen, order.urgency).await;
                    goes.store_hops = ways.into_iter().flatten().collect();
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

    /// The stores that one VM would have.
    pub(super) fn stores_for(
        &self,
        order: &EvacuationOrder,
        leaver: &Leaver<'_>,
        topology: &Topology,
    ) -> Result<ChosenStores, NoStoresError> {
        self.stores_beside(order, leaver, topology, &Taken::new())
    }

    /// The same, where others have taken some of the room.
    fn stores_beside(
        &self,
        order: &EvacuationOrder,
        leaver: &Leaver<'_>,
        topology: &Topology,
        taken: &Taken,
    ) -> Result<ChosenStores, NoStoresError> {
        let mut candidates = self.candidates(order, leaver, topology);
        for one in &mut candidates {
            one.room = one.room - taken.get(&one.host).copied().unwrap_or_default();
        }
        choose(&candidates, &self.wish(order, leaver))
    }

    /// The best way to each store, with what is wanted on each port: what the stores behind it take
    /// in together, as far as the urgency goes. Empty for a store that no way leads to.
    pub async fn store_ways(
        &self,
        source: &HostId,
        chosen: &ChosenStores,
        urgency: Urgency,
    ) -> Vec<Vec<Hop>> {
        let pairs = chosen.stores.iter().map(|store| (source, &store.host));
        let ways = self.best_ways(pairs, urgency).await;
        let rates = chosen.stores.iter().map(|store| store.rate);
        narrowed(ways.into_iter().zip(rates).collect())
    }

    /// The best way from each store to the destination. It fetches one pack after the other, from one
    /// store at a time: so each way carries all that the destination's link is entitled to, and their
    /// common port no more than that. Empty for a store that no way leads from.
    pub async fn gather_ways(
        &self,
        chosen: &ChosenStores,
        destination: &HostId,
        urgency: Urgency,
    ) -> Vec<Vec<Hop>> {
        let pairs = chosen.stores.iter().map(|store| (&store.host, destination));
        let ways = self.best_ways(pairs, urgency).await;
        let narrow = |mut way: Vec<Hop>| {
            let least = way.iter().map(|hop| hop.rate).min().unwrap_or_default();
            way.iter_mut().for_each(|hop| hop.rate = least);
            way
        };
        ways.into_iter().map(narrow).collect()
    }

    pub(super) async fn best_ways<'a>(
        &self,
        pairs: impl Iterator<Item = (&'a HostId, &'a HostId)>,
        urgency: Urgency,
    ) -> Vec<Vec<Hop>> {
        let topology = self.fresh_topology().await;
        let way = |(from, to)| {
            let ways = topology.ways(from, to, 1).unwrap_or_default();
            ways.first().map(|way| self.hops(way, urgency)).unwrap_or_default()
        };
        pairs.map(way).collect()
    }

    fn wish(&self, order: &EvacuationOrder, leaver: &Leaver<'_>) -> Wish {
        let memory = leaver.figures.memory;
        let pages = leaver.figures.non_zero.bytes().scale(PACKED) + PACKED_LEAST;
        let source_rack = self.site.rack(leaver.source);
        let in_rack = self.site.config.hosts.iter().map(|host| &host.name);
        let in_rack: BTreeSet<&HostId> =
            in_rack.filter(|host| self.site.rack(host) == source_rack).collect();
        let whole_rack = in_rack.len() > 1 && in_rack.iter().all(|host| order.hosts.contains(host));
        Wish {
            pages: pages.min(memory.scale(PACKED) + PACKED_LEAST),
            rate: leaver.reserved,
            near_only: whole_rack && order.intermediaries.is_empty(),
            count: match order.intermediaries.len() {
                0 => order.intermediary_count as usize,
                // One that has failed is not waited for.
                _ => {
                    order.intermediaries.iter().filter(|host| !leaver.failed.contains(host)).count()
                }
            },
            redundancy: order.redundancy,
        }
    }

    fn candidates(
        &self,
        order: &EvacuationOrder,
        leaver: &Leaver<'_>,
        topology: &Topology,
    ) -> Vec<Candidate> {
        let hosts = self.inventory.hosts();
        let named =
            |host: &HostId| order.intermediaries.is_empty() || order.intermediaries.contains(host);
        let rack = self.site.rack(leaver.destination);
        let others = hosts.iter().filter(|(host, _)| named(host));
        let candidate = |(host, entry): (&HostId, &HostEntry)| {
            let said = entry.description.clone().unwrap_or_default();
            let obstacle = match () {
                () if host == leaver.source => "it is the source".to_owned(),
                () if host == leaver.destination => "it is the destination".to_owned(),
                () if !entry.connected => "its agent does not answer".to_owned(),
                () if order.hosts.contains(host) => "it is being evacuated itself".to_owned(),
                () if entry.cordoned => "it is cordoned".to_owned(),
                () if leaver.failed.contains(host) => FAILED_BEFORE.to_owned(),
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
                rate: way_rate(topology, leaver.source, host),
                obstacle,
                host: host.clone(),
            }
        };
        others.map(candidate).collect()
    }
}

/// What a source sends to all of its VM's stores together, bytes/s: what is reserved for it, and no
/// more than they take in.
pub(super) fn sent(leaver: &Leaver<'_>, chosen: &ChosenStores) -> BytesPerSec {
    let stores = chosen.stores.iter().map(|store| store.rate.0).fold(0, u64::saturating_add);
    leaver.reserved.min(BitsPerSec(stores)).bytes_per_sec()
}

/// How often each page goes.
pub(super) fn factor(chosen: &ChosenStores) -> f64 {
    chosen.redundancy.factor(chosen.stores.len())
}

/// What the best way between two hosts has to spare at its narrowest.
pub(super) fn way_rate(topology: &Topology, from: &HostId, to: &HostId) -> BitsPerSec {
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
    let begins = chosen.ahead.map_or_else(String::new, |ahead| {
        let (sooner, vain) = (millis(ahead.sooner), ahead.in_vain);
        format!(
            "; they begin to go while it still runs at {}: {sooner} ms sooner, {vain} in vain",
            goes.source
        )
    });
    let after = match goes.after_stores {
        true => {
            "; they have no room there beside those of the VMs before it, so it waits until theirs have been \
             gathered, which the forecast does not count"
        }
        false => "",
    };
    Some(format!(
        "{}'s pages wait at {} until {} has them; redundancy {}{risk}{begins}{after}",
        goes.step.vm,
        stores.collect::<Vec<_>>().join(", "),
        goes.step.destination,
        chosen.redundancy
    ))
}
