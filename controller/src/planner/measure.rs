//! Gathers what one host's plan is made from: its VMs measured now, every host's description, what
//! is promised elsewhere, which shared storage is proven where.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::join_all;
use lifeboat_policy::measured::MeasuredVm;
use lifeboat_policy::placement::{HostFacts, VmObstacle};
use lifeboat_policy::plan::{Inventory as PolicyInventory, PlannedVm};
use lifeboat_policy::predict::{ColdTimes, Experience};
use lifeboat_policy::reserve::Floor;
use lifeboat_policy::stop::StopCriteria;
use lifeboat_protocol::agent::{HostDescription, VmDefinition, VmMeasurement, VmState, VmStatus};
use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::terms::{DiskMode, Mode};
use lifeboat_protocol::units::{BitsPerSec, Bytes};

use super::{DiskPromise, MODES, Planner, PlannerError, Promised, Stays, facts};
use crate::clock;
use crate::evacuation::EvacuationOrder;
use crate::inventory::{HostEntry, name_of, owns};

/// Besides the measuring, between two migrations: choosing, reserving, preparing, releasing.
const SETTING_UP: Duration = Duration::from_millis(800);
/// What an agent takes when no window is asked for.
const AGENTS_WINDOW: Duration = Duration::from_secs(2);
/// A measurement that is no older is used again: an operator who reads a plan and says yes should
/// not wait for the same figures once more.
const FRESH: Duration = Duration::from_secs(10);

/// What a plan was made from, kept to explain it.
pub(super) struct Gathered {
    pub(super) inventory: PolicyInventory,
    promises: BTreeMap<VmId, DiskPromise>,
    statuses: BTreeMap<VmId, VmStatus>,
}

impl Planner {
    /// Everything about one host. VMs that cannot even be considered come back with their reason.
    pub(super) async fn gather(
        &self,
        order: &EvacuationOrder,
        source: &HostId,
        promised: &Promised,
        wanted: &(dyn Fn(&VmId) -> bool + Sync),
    ) -> Result<(Gathered, Vec<Stays>), PlannerError> {
        self.refresh().await;
        let hosts = self.inventory.hosts();
        let entry = hosts.get(source).cloned().unwrap_or_default();
        let Some(description) = entry.description.clone().filter(|_| entry.connected) else {
            return Err(PlannerError::SourceSilent { host: source.clone(), detail: entry.detail });
        };
        let (movable, mut stuck) = sort(order, source, &entry, &description, wanted);
        let begun = clock::now();
        let mut statuses: BTreeMap<VmId, VmStatus> = movable.iter().cloned().collect();
        let asked = movable.iter().map(|(vm, status)| self.measured(source, vm, status, promised));
        let (mut vms, mut promises) = (Vec::new(), BTreeMap::new());
        for ((vm, status), measured) in movable.iter().zip(join_all(asked).await) {
            let definition = status.definition.clone().unwrap_or_default();
            match measured {
                Ok(said) => {
                    let memory = Bytes(definition.memory_bytes);
                    let measured = facts::measured_vm(vm, memory, &said);
                    let outruns = facts::outruns(&measured, &definition, &criteria(order));
                    let obstacle = Some(said.post_copy_obstacle).filter(|why| !why.is_empty());
                    if let Some(why) = obstacle.or(outruns)
                        && let Some(reason) = told(order.mode, vm, &why, &mut statuses)
                    {
                        stuck.push(stays(source, vm, reason));
                        continue;
                    }
                    let needs = facts::vm_needs(vm, status, &definition, &description, &measured);
                    promises.insert(VmId::clone(vm), facts::disk_promise(&definition));
                    vms.push(PlannedVm { needs, measured });
                }
                Err(reason) => stuck.push(stays(source, vm, reason)),
            }
        }
        // The others will be measured again after each of them, as long as now.
        let measuring = Duration::from_millis(clock::now().since(begun));
        let proven = self.prove_storage(source, &vms, &hosts).await;
        let mut bases = self.base_obstacles(source, &movable, &hosts).await;
        let host_facts = hosts.iter().map(|(host, entry)| {
            let arriving = facts::arriving(host, &hosts, promised);
            let storage = proven.get(host).cloned().unwrap_or_default();
            let base_obstacles = bases.remove(host).unwrap_or_default();
            let known = facts::host_facts(host, entry, promised, arriving, storage);
            HostFacts { base_obstacles, ..known }
        });
        let inventory = PolicyInventory {
            vms,
            hosts: host_facts.collect(),
            modes: BTreeSet::from(MODES),
            overhead: facts::overhead(),
            floor: self.floor(),
            criteria: criteria(order),
            cold: ColdTimes::default(),
            experience: Experience::default(),
            between: SETTING_UP.saturating_add(measuring.max(self.window())),
        };
        Ok((Gathered { inventory, promises, statuses }, stuck))
    }

    /// Asks every connected agent at once: what the last poll said may be a second old, and a VM may
    /// have moved since.
    async fn refresh(&self) {
        let hosts = self.inventory.hosts();
        let connected = hosts.iter().filter(|(_, entry)| entry.connected).map(|(host, _)| host);
        let asked = connected.map(|host| async move { (host, self.agents.describe(host).await) });
        for (host, answer) in join_all(asked).await {
            match answer {
                Ok((description, vms)) if description.host == host.as_str() => {
                    self.inventory.heard(host, description, vms, clock::now());
                }
                // The poll finds out what is wrong with it.
                Ok(_) => {}
                Err(error) => {
                    self.inventory.silent(host, error.to_string(), clock::now());
                }
            }
        }
    }

    /// What stays for everybody else on each link.
    pub(super) fn floor(&self) -> Floor {
        let policy = &self.site.config.policy;
        Floor { share: policy.floor, at_least: policy.floor_at_least }
    }

    async fn measured(
        &self,
        source: &HostId,
        vm: &VmId,
        status: &VmStatus,
        promised: &Promised,
    ) -> Result<VmMeasurement, String> {
        if status.state() == VmState::Stopped {
            // Nothing runs: nothing is dirtied, nothing is sent.
            return Ok(VmMeasurement::default());
        }
        if let Some(fresh) = self.fresh(vm, promised) {
            return Ok(fresh);
        }
        let window = self.site.config.policy.measure_window_ms;
        match self.agents.measure(source, vm, window).await {
            Ok(said) => {
                self.inventory.measured(vm, said.clone(), clock::now());
                Ok(said)
            }
            Err(error) => Err(format!("it could not be measured: {error}")),
        }
    }

    /// What was measured a moment ago, if no migration has begun since: each one changes what the
    /// others can get.
    fn fresh(&self, vm: &VmId, promised: &Promised) -> Option<VmMeasurement> {
        let (at, said) = self.inventory.measurement(vm)?;
        let age = Duration::from_millis(clock::now().since(at));
        (age <= FRESH && promised.last_began.is_none_or(|began| began < at)).then_some(said)
    }

    fn window(&self) -> Duration {
        match self.site.config.policy.measure_window_ms {
            0 => AGENTS_WINDOW,
            ms => Duration::from_millis(ms.into()),
        }
    }
}

pub(super) fn criteria(order: &EvacuationOrder) -> StopCriteria {
    let downtime = Duration::from_millis(u64::from(order.downtime_limit_ms));
    StopCriteria::within(downtime)
}

fn stays(host: &HostId, vm: &VmId, reason: String) -> Stays {
    Stays { vm: vm.clone(), host: host.clone(), reason, refusals: Vec::new() }
}

/// The VMs that a plan can speak of, and those that stay whatever the plan is.
fn sort(
    order: &EvacuationOrder,
    source: &HostId,
    entry: &HostEntry,
    description: &HostDescription,
    wanted: &(dyn Fn(&VmId) -> bool + Sync),
) -> (Vec<(VmId, VmStatus)>, Vec<Stays>) {
    let (mut movable, mut stuck) = (Vec::new(), Vec::new());
    for status in entry.vms.iter().filter(|status| owns(status)) {
        let Ok(vm) = VmId::new(name_of(status)) else { continue };
        if !wanted(&vm) {
            continue;
        }
        match unmovable(order, status) {
            Some(reason) => stuck.push(stays(source, &vm, reason)),
            None => movable.push((vm, status.clone())),
        }
    }
    for foreign in &description.foreign_vms {
        let Ok(vm) = VmId::new(foreign.name.clone()) else { continue };
        if wanted(&vm) {
            let owner = foreign.owner.clone();
            stuck.push(stays(source, &vm, VmObstacle::ForeignOwner { owner }.to_string()));
        }
    }
    (movable, stuck)
}

/// Why a VM in its present state cannot move, if it cannot.
fn unmovable(order: &EvacuationOrder, status: &VmStatus) -> Option<String> {
    let state = status.state();
    let because = match status.detail.is_empty() {
        true => String::new(),
        false => format!(": {}", status.detail),
    };
    match state {
        VmState::Running | VmState::Paused => {
            unfetchable(order.mode, status).or_else(|| cannot_follow(order.disk, status))
        }
        VmState::Stopped if order.mode == Mode::Cold => None,
        VmState::Stopped => Some("it is stopped; start it, or move it with --mode cold".to_owned()),
        VmState::Sending => Some(format!("migration {} of it is under way", status.migration)),
        VmState::Crashed => Some(format!("its QEMU has gone{because}; start it or remove it")),
        VmState::Uncertain => {
            Some(format!("it is uncertain where it runs{because}; see `lifeboat claim`"))
        }
        VmState::Unspecified | VmState::Ceded | VmState::Incoming | VmState::InDoubt => {
            Some(format!("it is {} here{because}", state.words()))
        }
    }
}

/// Why a VM's pages cannot follow it in this mode, if they cannot.
fn unfetchable(mode: Mode, status: &VmStatus) -> Option<String> {
    let definition = status.definition.as_ref();
    let has = |of: fn(&VmDefinition) -> bool| definition.is_some_and(of);
    let elsewhere = matches!(mode, Mode::PostCopy | Mode::ScatterGather);
    match () {
        () if !elsewhere => None,
        () if has(|vm| vm.forbid_post_copy) => {
            Some(format!("its owner forbids {mode} (forbid_post_copy)"))
        }
        () if mode == Mode::ScatterGather && has(|vm| vm.forbid_intermediaries) => Some(
            "its owner forbids that its pages wait at other hosts (forbid_intermediaries)"
                .to_owned(),
        ),
        () if !status.post_copy_obstacle.is_empty() => {
            Some(format!("{mode} is not possible: {}", status.post_copy_obstacle))
        }
        () => None,
    }
}

/// Why a VM's disks cannot follow it, if they are to and cannot.
fn cannot_follow(disk: DiskMode, status: &VmStatus) -> Option<String> {
    let definition = status.definition.as_ref().filter(|_| disk.follows())?;
    let local = || definition.disks.iter().filter(|disk| disk.shared_storage.is_empty());
    let why = match () {
        () if local().next().is_none() => "it has no disk that only its host has",
        () if definition.forbid_post_copy => {
            "its owner forbids that it runs before all of it is there (forbid_post_copy)"
        }
        () if disk == DiskMode::Scatter && definition.forbid_intermediaries => {
            "its owner forbids that it waits at other hosts (forbid_intermediaries)"
        }
        () if local().any(|disk| disk.format != "raw") => "one of its disks is not raw",
        () if local().any(|disk| disk.nvram) => "its firmware's NVRAM has to be there at once",
        () if local().any(|disk| disk.read_only) => "one of its disks is read-only",
        () => return None,
    };
    Some(format!("its disks cannot follow it: {why}; use --disk copy"))
}

/// Notes why a VM's pages cannot follow it, which was found while it was measured and not in its
/// definition; why it cannot move in this mode, if that is why.
fn told(
    mode: Mode,
    vm: &VmId,
    obstacle: &str,
    statuses: &mut BTreeMap<VmId, VmStatus>,
) -> Option<String> {
    let status = statuses.get_mut(vm)?;
    obstacle.clone_into(&mut status.post_copy_obstacle);
    unfetchable(mode, status)
}

impl Gathered {
    /// Non-zero bytes and pages dirtied per second of a VM.
    pub(super) fn figures(&self, vm: &VmId) -> (u64, u64) {
        let found = self.inventory.vms.iter().find(|planned| planned.needs.id == *vm);
        found.map_or((0, 0), |planned| {
            (planned.measured.non_zero.bytes().0, planned.measured.dirty_rate.0)
        })
    }

    /// Whether a host has a copy of a VM's disks.
    pub(super) fn is_seeded(&self, host: &HostId, vm: &VmId) -> bool {
        let known = self.inventory.hosts.iter().find(|known| known.id == *host);
        known.is_some_and(|known| known.seeds.contains_key(vm))
    }

    /// All that was measured of a VM, and what its owner was promised for its disks.
    pub(super) fn of(&self, vm: &VmId) -> Option<(MeasuredVm, DiskPromise)> {
        let planned = self.inventory.vms.iter().find(|planned| planned.needs.id == *vm)?;
        let promise = self.promises.get(vm).copied().unwrap_or_default();
        Some((planned.measured.clone(), promise))
    }

    /// Why a VM cannot move by such a mode, if it cannot.
    pub(super) fn unfetchable(&self, vm: &VmId, mode: Mode) -> Option<String> {
        unfetchable(mode, self.statuses.get(vm)?)
    }

    /// Why this destination: what it has free.
    pub(super) fn why_here(&self, host: &HostId) -> String {
        let found = self.inventory.hosts.iter().find(|facts| facts.id == *host);
        found.map_or_else(String::new, |facts| {
            format!("fits; {} of {} are free", facts.memory_free, facts.memory_total)
        })
    }

    /// Why at this place in the order: what its departure does to the source's link (SOLive IV-C).
    pub(super) fn why_now(&self, vm: &VmId, capacity: Option<BitsPerSec>) -> String {
        let found = self.inventory.vms.iter().find(|planned| planned.needs.id == *vm);
        let Some(planned) = found else { return String::new() };
        let (out, into) = (planned.measured.network_out, planned.measured.network_in);
        let about_same = capacity.unwrap_or(out.max(into)).scale(0.05);
        if out > into + about_same {
            format!("sends {out}: its departure frees the uplink")
        } else if into > out + about_same {
            format!("receives {into}: it leaves last")
        } else {
            format!("in and out about the same, dirties {}", planned.measured.dirty_rate)
        }
    }
}

#[cfg(test)]
mod tests {
    use lifeboat_protocol::agent::Disk;

    use super::*;

    fn status(change: impl FnOnce(&mut VmDefinition)) -> VmStatus {
        let mut definition = VmDefinition::default();
        change(&mut definition);
        VmStatus { definition: Some(definition), ..VmStatus::default() }
    }

    const ALL: [Mode; 4] = [Mode::PreCopy, Mode::Cold, Mode::PostCopy, Mode::ScatterGather];

    #[test]
    fn an_owners_word_keeps_a_vm_from_these_modes_and_no_other() {
        let refused = |status: &VmStatus| ALL.map(|mode| unfetchable(mode, status));
        assert_eq!(refused(&status(|_| ())), [None, None, None, None]);
        let [pre_copy, cold, post_copy, scattered] =
            refused(&status(|vm| vm.forbid_post_copy = true));
        assert_eq!((pre_copy, cold), (None, None));
        assert!(post_copy.unwrap().contains("owner forbids post-copy (forbid_post_copy)"));
        assert!(scattered.unwrap().contains("owner forbids scatter-gather (forbid_post_copy)"));
        let [.., post_copy, scattered] = refused(&status(|vm| vm.forbid_intermediaries = true));
        assert_eq!(post_copy, None);
        assert!(scattered.unwrap().contains("at other hosts (forbid_intermediaries)"));
    }

    #[test]
    fn an_owners_word_keeps_disks_from_following_and_from_other_hosts() {
        let with_a_disk = |change: fn(&mut VmDefinition)| {
            status(|vm| {
                vm.disks = vec![Disk { format: "raw".to_owned(), ..Disk::default() }];
                change(vm);
            })
        };
        let all = [DiskMode::Copy, DiskMode::OnDemand, DiskMode::Scatter];
        let refused = |status: &VmStatus| all.map(|disk| cannot_follow(disk, status));
        assert_eq!(refused(&with_a_disk(|_| ())), [None, None, None]);
        let [copy, on_demand, scatter] = refused(&with_a_disk(|vm| vm.forbid_post_copy = true));
        assert_eq!(copy, None);
        assert!(on_demand.unwrap().contains("(forbid_post_copy); use --disk copy"));
        assert!(scatter.unwrap().contains("(forbid_post_copy)"));
        let [.., on_demand, scatter] = refused(&with_a_disk(|vm| vm.forbid_intermediaries = true));
        assert_eq!(on_demand, None);
        assert!(scatter.unwrap().contains("(forbid_intermediaries)"));
    }
}
