//! What is made of a first plan before the second: the mode of each VM when the operator leaves it to
//! us, and who stays because there is no place for its pages.
//!
//! The first plan says where each VM goes and what pre-copy takes there. Not here: the choice of a
//! mode (`policy::mode`), and the stores themselves (`elsewhere`).

use std::collections::BTreeMap;
use std::time::Duration;

use lifeboat_policy::intermediary::Redundancy;
use lifeboat_policy::mode::{ChosenMode, ModeFacts, choose};
use lifeboat_policy::plan::{Move, Plan, PlannedVm};
use lifeboat_policy::predict::{eviction, post_copy};
use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::terms::Mode;
use lifeboat_protocol::units::{BitsPerSec, BytesPerSec};
use lifeboat_topology::Topology;

use super::elsewhere::{FailedStores, Leaver, factor, sent};
use super::measure::Gathered;
use super::{Planner, Stays};
use crate::evacuation::EvacuationOrder;

/// A first plan with all that it was made from.
pub(super) struct First<'a> {
    pub(super) planner: &'a Planner,
    pub(super) order: &'a EvacuationOrder,
    pub(super) failed: &'a FailedStores,
    pub(super) source: &'a HostId,
    pub(super) facts: &'a Gathered,
    pub(super) plan: &'a Plan,
    pub(super) topology: &'a Topology,
}

impl First<'_> {
    /// The mode of every VM.
    pub(super) fn modes(&self) -> BTreeMap<VmId, ChosenMode> {
        let known = |step: &Move| {
            let vm = self.vm(step)?;
            let bandwidth = step.predicted.bandwidth.bytes_per_sec();
            let by_post_copy = match mode_obstacle(self.facts, step, Mode::PostCopy) {
                None => Ok(post_copy(&vm.measured, bandwidth, &self.facts.inventory.criteria)),
                Some(why) => Err(why),
            };
            let scattered = match mode_obstacle(self.facts, step, Mode::ScatterGather) {
                None => self.evicted(&self.leaver(vm, step), bandwidth),
                Some(why) => Err(why),
            };
            let known = ModeFacts {
                pre_copy: step.predicted.prediction.likely,
                post_copy: by_post_copy,
                eviction: scattered,
            };
            Some((step.vm.clone(), choose(&known)))
        };
        self.plan.moves.iter().filter_map(known).collect()
    }

    /// The VMs for whose pages there is no place, when all are to be scattered.
    pub(super) fn without_stores(&self) -> Vec<Stays> {
        let stays = |step: &Move| {
            let leaver = self.leaver(self.vm(step)?, step);
            let error = self.planner.stores_for(self.order, &leaver, self.topology).err()?;
            Some(Stays {
                vm: step.vm.clone(),
                host: self.source.clone(),
                reason: error.to_string(),
                refusals: Vec::new(),
            })
        };
        self.plan.moves.iter().filter_map(stays).collect()
    }

    fn vm(&self, step: &Move) -> Option<&PlannedVm> {
        self.facts.inventory.vms.iter().find(|vm| vm.needs.id == step.vm)
    }

    fn leaver<'a>(&'a self, vm: &'a PlannedVm, step: &'a Move) -> Leaver<'a> {
        let hops = self.planner.hops(&step.way, self.order.urgency);
        Leaver {
            source: self.source,
            destination: &step.destination,
            failed: self.failed.get(&step.vm).map_or(&[], Vec::as_slice),
            figures: &vm.measured,
            reserved: hops.first().map_or(BitsPerSec::ZERO, |hop| hop.rate),
        }
    }

    fn evicted(&self, leaver: &Leaver<'_>, direct: BytesPerSec) -> Result<Duration, String> {
        let refused = |why: &str| Err(why.to_owned());
        if leaver.reserved == BitsPerSec::ZERO {
            return refused("nothing is reserved for it, so nobody knows how fast it would be");
        }
        let stores = self.planner.stores_for(self.order, leaver, self.topology);
        let stores = stores.map_err(|error| error.to_string())?;
        if stores.redundancy == Redundancy::None && self.order.redundancy.is_none() {
            return refused("one store alone would hold the only copy: that has to be asked for");
        }
        let sent = sent(leaver, &stores).scale(self.facts.inventory.experience.share);
        let criteria = &self.facts.inventory.criteria;
        Ok(eviction(leaver.figures, direct, sent, factor(&stores), criteria))
    }
}

/// Why a VM does not move to its destination by such a mode, if it cannot.
fn mode_obstacle(facts: &Gathered, step: &Move, mode: Mode) -> Option<String> {
    let there = facts.inventory.hosts.iter().find(|host| host.id == step.destination);
    let fetches = there.map_or("", |host| host.fetch_obstacle.as_str());
    facts.unfetchable(&step.vm, mode).or_else(|| {
        (!fetches.is_empty()).then(|| format!("{} cannot fetch: {fetches}", step.destination))
    })
}
