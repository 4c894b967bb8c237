//! The plan of an evacuation: who goes where, which way, in which order, how long that takes, and
//! who stays and why.
//!
//! `lifeboat plan` prints it and stops; `lifeboat evacuate` carries it out, and asks again with
//! fresh figures for those that are left after each VM. Not here: the asking of agents and switches
//! that fills the [`Inventory`], and anything that would make the plan happen.
//!
//! ```text
//! ways (topology) -> placement -> modes -> order -> prediction
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::terms::{Mode, Urgency};
use lifeboat_protocol::units::BitsPerSec;
use lifeboat_topology::{Hop, Topology, TopologyError, Way};
use serde::Serialize;

use crate::measured::MeasuredVm;
use crate::order::{OrderParameters, Rule, order};
use crate::placement::{HostFacts, Overhead, Placement, Question, Unplaced, VmNeeds, place};
use crate::predict::{
    ColdTimes, Departure, Experience, HostPrediction, HostTerms, LinkUse, VmPrediction, available,
    predict_host,
};
use crate::reserve::Floor;
use crate::stop::StopCriteria;

/// What the operator asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanRequest {
    /// The host to be emptied.
    pub source: HostId,
    /// Only these of its VMs; empty: all of them.
    pub only: BTreeSet<VmId>,
    /// Only these hosts as destinations; empty: all.
    pub allowed: BTreeSet<HostId>,
    /// The share of each link that the evacuation is entitled to.
    pub urgency: Urgency,
    /// How the VMs shall move.
    pub mode: Mode,
    /// How those move of which more is known already (`mode::choose`).
    pub modes: BTreeMap<VmId, Mode>,
    /// How many at a time; 0 counts as 1, SOLive's way.
    pub parallel: usize,
}

/// One VM of the source.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedVm {
    /// What it needs.
    pub needs: VmNeeds,
    /// What was measured of it.
    pub measured: MeasuredVm,
}

/// Everything that is known when the plan is made.
#[derive(Debug, Clone)]
pub struct Inventory {
    /// The VMs of the source.
    pub vms: Vec<PlannedVm>,
    /// All hosts.
    pub hosts: Vec<HostFacts>,
    /// The modes that the agents can carry out.
    pub modes: BTreeSet<Mode>,
    /// What QEMU needs besides the guest's memory.
    pub overhead: Overhead,
    /// What everybody else keeps of a link.
    pub floor: Floor,
    /// When pre-copy stops.
    pub criteria: StopCriteria,
    /// What stopping and starting a guest takes.
    pub cold: ColdTimes,
    /// What earlier migrations made of their paths.
    pub experience: Experience,
    /// Between one VM's end and the next one's first page.
    pub between: Duration,
}

/// One VM that moves.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Move {
    /// The VM.
    pub vm: VmId,
    /// Where to.
    pub destination: HostId,
    /// How; never `Auto`.
    pub mode: Mode,
    /// Which way its pages take.
    pub way: Way,
    /// What it will take.
    pub predicted: VmPrediction,
}

/// A plan. Nothing has happened yet.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The host to be emptied.
    pub source: HostId,
    /// The share of each link that the evacuation is entitled to.
    pub urgency: Urgency,
    /// How many at a time, at least 1.
    pub parallel: usize,
    /// Who moves, in order.
    pub moves: Vec<Move>,
    /// Who stays, with reasons, by name.
    pub left_behind: Vec<Unplaced>,
    /// The whole of it; `vms` is in the order of `moves`.
    pub predicted: HostPrediction,
}

impl Plan {
    /// The VMs whose pre-copy is not expected to reach the wanted pause.
    pub fn not_converging(&self) -> impl Iterator<Item = &Move> {
        self.moves.iter().filter(|step| !step.predicted.prediction.likely.converges)
    }
}

/// Why there is no plan at all. That a single VM has no place is not an error: it is in
/// `left_behind`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The source is not among the hosts.
    #[error("host {host} is not known; `lifeboat hosts` lists those that are")]
    UnknownSource {
        /// The host.
        host: HostId,
    },
    /// `--to` names a host that is not known.
    #[error("--to names host {host}, which is not known; `lifeboat hosts` lists those that are")]
    UnknownDestination {
        /// The host.
        host: HostId,
    },
    /// `--to` names the source.
    #[error("--to names {host}, the host that is to be evacuated; name another one")]
    DestinationIsSource {
        /// The host.
        host: HostId,
    },
    /// A VM that is not at the source.
    #[error("VM {vm} is not at host {host}; `lifeboat vms` says where it is")]
    UnknownVm {
        /// The VM.
        vm: VmId,
        /// The source.
        host: HostId,
    },
    /// The agents cannot do this mode.
    #[error("{mode} is not built yet; the agents can do {}", modes(.available))]
    ModeUnavailable {
        /// What was asked for.
        mode: Mode,
        /// What there is.
        available: BTreeSet<Mode>,
    },
    /// The network does not know a host that the inventory knows.
    #[error("the network's description does not fit the hosts")]
    Network(#[from] TopologyError),
}

fn modes(available: &BTreeSet<Mode>) -> String {
    available.iter().map(|mode| mode.as_str()).collect::<Vec<_>>().join(", ")
}

/// Makes the plan. The same request, inventory and network give the same plan.
///
/// # Errors
/// When the request itself cannot be met: see [`PlanError`].
pub fn plan(
    request: &PlanRequest,
    inventory: &Inventory,
    network: &Topology,
) -> Result<Plan, PlanError> {
    check(request, inventory)?;
    let mode = choose_mode(request.mode, &inventory.modes)?;
    let (ways, cut_off) = ways(request, inventory, network)?;
    let placement = places(request, inventory, &cut_off, mode);
    let source = source_link(&ways);
    let leaving = in_order(mode, source, inventory, &placement.places);
    let departures: Vec<Departure<'_>> = leaving
        .into_iter()
        .filter_map(|vm| departure(vm, mode, &placement.places, &ways, request, inventory))
        .collect();
    let terms = HostTerms {
        urgency: request.urgency,
        floor: inventory.floor,
        criteria: inventory.criteria,
        cold: inventory.cold,
        parallel: request.parallel.max(1),
        experience: inventory.experience,
        between: inventory.between,
    };
    let predicted = predict_host(&departures, source, &destination_links(&ways), &terms);
    let step = |(departure, predicted): (&Departure<'_>, &VmPrediction)| Move {
        vm: departure.vm.id.clone(),
        destination: departure.destination.clone(),
        mode: departure.mode,
        way: ways[departure.destination].clone(),
        predicted: predicted.clone(),
    };
    Ok(Plan {
        source: request.source.clone(),
        urgency: request.urgency,
        parallel: terms.parallel,
        moves: departures.iter().zip(&predicted.vms).map(step).collect(),
        left_behind: placement.unplaced,
        predicted,
    })
}

fn places(
    request: &PlanRequest,
    inventory: &Inventory,
    cut_off: &BTreeMap<HostId, String>,
    mode: Mode,
) -> Placement {
    let wanted = |vm: &&PlannedVm| request.only.is_empty() || request.only.contains(&vm.needs.id);
    let vms: Vec<VmNeeds> =
        inventory.vms.iter().filter(wanted).map(|vm| vm.needs.clone()).collect();
    place(&Question {
        source: &request.source,
        vms: &vms,
        hosts: &inventory.hosts,
        allowed: &request.allowed,
        cut_off,
        overhead: inventory.overhead,
        fetches: matches!(mode, Mode::PostCopy | Mode::ScatterGather),
    })
}

/// The VMs that have a place, in the order in which they leave.
fn in_order<'a>(
    mode: Mode,
    source: LinkUse,
    inventory: &'a Inventory,
    places: &BTreeMap<VmId, HostId>,
) -> Vec<&'a MeasuredVm> {
    let all = || inventory.vms.iter().map(|vm| &vm.measured);
    let leaving: Vec<MeasuredVm> =
        all().filter(|vm| places.contains_key(&vm.id)).cloned().collect();
    let stops = order(rule(mode), &leaving, OrderParameters::new(source.capacity));
    stops.iter().filter_map(|id| all().find(|vm| vm.id == *id)).collect()
}

fn departure<'a>(
    vm: &'a MeasuredVm,
    mode: Mode,
    places: &'a BTreeMap<VmId, HostId>,
    ways: &BTreeMap<HostId, Way>,
    request: &PlanRequest,
    inventory: &Inventory,
) -> Option<Departure<'a>> {
    let destination = places.get(&vm.id)?;
    let between = between(ways.get(destination)?, request.urgency, inventory.floor);
    let mode = request.modes.get(&vm.id).copied().unwrap_or(mode);
    Some(Departure { vm, mode, destination, between })
}

fn check(request: &PlanRequest, inventory: &Inventory) -> Result<(), PlanError> {
    let known = |host: &HostId| inventory.hosts.iter().any(|facts| facts.id == *host);
    if !known(&request.source) {
        return Err(PlanError::UnknownSource { host: request.source.clone() });
    }
    for host in &request.allowed {
        if *host == request.source {
            return Err(PlanError::DestinationIsSource { host: host.clone() });
        }
        if !known(host) {
            return Err(PlanError::UnknownDestination { host: host.clone() });
        }
    }
    let here = |vm: &VmId| inventory.vms.iter().any(|planned| planned.needs.id == *vm);
    match request.only.iter().find(|vm| !here(vm)) {
        Some(vm) => Err(PlanError::UnknownVm { vm: vm.clone(), host: request.source.clone() }),
        None => Ok(()),
    }
}

/// `Auto` is pre-copy until more is known of each VM: the only mode that loses nothing when anything
/// fails before the hand-over.
fn choose_mode(wanted: Mode, available: &BTreeSet<Mode>) -> Result<Mode, PlanError> {
    let mode = if wanted == Mode::Auto { Mode::PreCopy } else { wanted };
    if available.contains(&mode) {
        return Ok(mode);
    }
    Err(PlanError::ModeUnavailable { mode, available: available.clone() })
}

const fn rule(mode: Mode) -> Rule {
    match mode {
        Mode::Auto | Mode::PreCopy => Rule::PreCopy,
        // What sends each page once, or none: only the network that a VM releases counts.
        Mode::PostCopy | Mode::ScatterGather | Mode::Cold => Rule::PostCopy,
    }
}

/// The best way to each destination there is one to, and what cuts the others off.
type Ways = (BTreeMap<HostId, Way>, BTreeMap<HostId, String>);

fn ways(
    request: &PlanRequest,
    inventory: &Inventory,
    network: &Topology,
) -> Result<Ways, PlanError> {
    let (mut ways, mut cut_off) = (BTreeMap::new(), BTreeMap::new());
    for host in inventory.hosts.iter().map(|facts| &facts.id).filter(|id| **id != request.source) {
        match network.ways(&request.source, host, 1) {
            Ok(best) => {
                ways.extend(best.into_iter().next().map(|way| (host.clone(), way)));
            }
            Err(error @ TopologyError::NoWay { .. }) => {
                cut_off.insert(host.clone(), error.to_string());
            }
            Err(other) => return Err(other.into()),
        }
    }
    Ok((ways, cut_off))
}

fn link_use(hop: &Hop) -> LinkUse {
    LinkUse { capacity: hop.capacity, used: hop.capacity - hop.spare }
}

/// Between hosts that nothing lies between, nothing is ever full.
const BOUNDLESS: LinkUse = LinkUse { capacity: BitsPerSec(u64::MAX), used: BitsPerSec::ZERO };

/// The source's uplink; of several, the one that a way to the first host by name begins with.
fn source_link(ways: &BTreeMap<HostId, Way>) -> LinkUse {
    ways.values().find_map(|way| way.hops.first()).map_or(BOUNDLESS, link_use)
}

fn destination_links(ways: &BTreeMap<HostId, Way>) -> BTreeMap<HostId, LinkUse> {
    let last = |way: &Way| way.hops.last().map_or(BOUNDLESS, link_use);
    ways.iter().map(|(host, way)| (host.clone(), last(way))).collect()
}

/// What the hops between the two hosts' own links can give.
fn between(way: &Way, urgency: Urgency, floor: Floor) -> Option<BitsPerSec> {
    let inner = way.hops.get(1..way.hops.len().saturating_sub(1)).unwrap_or_default();
    inner.iter().map(|hop| available(link_use(hop), urgency, floor)).min()
}

#[cfg(test)]
mod tests;
