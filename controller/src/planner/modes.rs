//! The mode of each VM when the operator leaves it to us: what `policy::mode` needs to know.
//!
//! Used by the planner between two looks of `policy::plan`: the first one says where each VM goes
//! and what pre-copy takes there. Not here: the choice itself, and the stores (`elsewhere`).

use std::collections::BTreeMap;
use std::time::Duration;

use lifeboat_policy::intermediary::Redundancy;
use lifeboat_policy::measured::MeasuredVm;
use lifeboat_policy::mode::{ChosenMode, ModeFacts, choose};
use lifeboat_policy::plan::{Move, Plan};
use lifeboat_policy::predict::{eviction, post_copy};
use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::terms::Mode;
use lifeboat_protocol::units::BitsPerSec;
use lifeboat_topology::Topology;

use super::elsewhere::{Leaver, factor, sent};
use super::measure::Gathered;
use super::{Planner, Stays};
use crate::evacuation::EvacuationOrder;

impl Planner {
    /// The mode of every VM of a first plan.
    pub(super) fn choose_modes(
        &self,
        order: &EvacuationOrder,
        source: &HostId,
        facts: &Gathered,
        first: &Plan,
        topology: &Topology,
    ) -> BTreeMap<VmId, ChosenMode> {
        let known = |step: &Move| {
            let planned = facts.inventory.vms.iter().find(|vm| vm.needs.id == step.vm)?;
            let obstacle = |mode| mode_obstacle(facts, step, mode);
            let bandwidth = step.predicted.bandwidth.bytes_per_sec();
            let criteria = &facts.inventory.criteria;
            let by_post_copy = match obstacle(Mode::PostCopy) {
                None => Ok(post_copy(&planned.measured, bandwidth, criteria)),
                Some(why) => Err(why),
            };
            let scattered = match obstacle(Mode::ScatterGather) {
                None => {
                    let leaver = self.leaver(order, source, &planned.measured, step);
                    self.evicted(order, &leaver, facts, topology)
                }
                Some(why) => Err(why),
            };
            let known = ModeFacts {
                pre_copy: step.predicted.prediction.likely,
                post_copy: by_post_copy,
                eviction: scattered,
            };
            Some((step.vm.clone(), choose(&known)))
        };
        first.moves.iter().filter_map(known).collect()
    }

    /// The VMs of a first plan by scatter-gather for whose pages there is no place.
    pub(super) fn without_stores(
        &self,
        order: &EvacuationOrder,
        source: &HostId,
        facts: &Gathered,
        first: &Plan,
        topology: &Topology,
    ) -> Vec<Stays> {
        let stays = |step: &Move| {
            let planned = facts.inventory.vms.iter().find(|vm| vm.needs.id == step.vm)?;
            let leaver = self.leaver(order, source, &planned.measured, step);
            let error = self.stores_for(order, &leaver, topology).err()?;
            Some(Stays {
                vm: step.vm.clone(),
                host: source.clone(),
                reason: error.to_string(),
                refusals: Vec::new(),
            })
        };
        first.moves.iter().filter_map(stays).collect()
    }

    fn leaver<'a>(
        &self,
        order: &EvacuationOrder,
        source: &'a HostId,
        figures: &'a MeasuredVm,
        step: &'a Move,
    ) -> Leaver<'a> {
        let hops = self.hops(&step.way, order.urgency);
        let reserved = hops.first().map_or(BitsPerSec::ZERO, |hop| hop.rate);
        Leaver { source, destination: &step.destination, figures, reserved }
    }

    fn evicted(
        &self,
        order: &EvacuationOrder,
        leaver: &Leaver<'_>,
        facts: &Gathered,
        topology: &Topology,
    ) -> Result<Duration, String> {
        if leaver.reserved == BitsPerSec::ZERO {
            return Err(
                "nothing is reserved for it, so nobody knows how fast it would be".to_owned()
            );
        }
        let stores = self.stores_for(order, leaver, topology).map_err(|error| error.to_string())?;
        if stores.redundancy == Redundancy::None && order.redundancy.is_none() {
            return Err(
                "one store alone would hold the only copy: that has to be asked for".to_owned()
            );
        }
        let sent = sent(leaver, &stores).scale(facts.inventory.experience.share);
        Ok(eviction(leaver.figures, sent, factor(&stores), &facts.inventory.criteria))
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
