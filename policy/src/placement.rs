//! Where each VM can go, where it shall go, and, if nowhere, what stands in the way at each host.
//!
//! `plan` asks before anything moves (as XAPI lets its users ask which VMs prevent an evacuation);
//! the controller asks again when a destination is lost. Not here: the way through the network
//! ([`crate::plan`] adds it) and the asking of hosts.
//!
//! The choice is deterministic. Large VMs are placed first, each at the host that keeps the largest
//! share of its memory free (spread to the least loaded; ties: more link room, then the name).
//! Where spreading leaves somebody out, everything is placed once more as tightly as possible, and
//! that is taken if it leaves fewer behind.

mod compatible;
mod facts;
mod obstacle;

pub use compatible::incompatibilities;
pub use facts::{
    Bridge, CpuNeed, DiskNeed, DiskRoom, HostFacts, HostState, LocalDisks, NicNeed, Overhead,
    QemuVersion, QemuVersionError, VlanRange, VmNeeds,
};
pub use obstacle::{Obstacle, VmObstacle};

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::units::{BitsPerSec, Bytes};
use serde::Serialize;

/// Why one VM stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unplaced {
    /// The VM.
    pub vm: VmId,
    /// What forbids moving it at all; if there is something, no host was asked.
    pub vm_obstacles: Vec<VmObstacle>,
    /// What stands in the way at each host, all of it, so that an operator need not ask twice.
    pub hosts: BTreeMap<HostId, Vec<Obstacle>>,
}

/// Who goes where, and who stays.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Placement {
    /// VM to destination.
    pub places: BTreeMap<VmId, HostId>,
    /// The others, by name.
    pub unplaced: Vec<Unplaced>,
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// Where the VMs are; never a destination.
    pub source: &'a HostId,
    /// The VMs.
    pub vms: &'a [VmNeeds],
    /// Every host that is known.
    pub hosts: &'a [HostFacts],
    /// Only these may be destinations (`--to`); empty: all may.
    pub allowed: &'a BTreeSet<HostId>,
    /// Hosts that no way leads to, and what `topology/` says of each.
    pub cut_off: &'a BTreeMap<HostId, String>,
    /// What QEMU needs besides the guest's memory.
    pub overhead: Overhead,
    /// Whether guests run there before all their pages are there.
    pub fetches: bool,
}

/// How a host is chosen among those that fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taste {
    Spread,
    Tight,
}

/// Answers `question`.
#[must_use]
pub fn place(question: &Question<'_>) -> Placement {
    let spread = place_with(question, Taste::Spread);
    if spread.unplaced.is_empty() {
        return spread;
    }
    let tight = place_with(question, Taste::Tight);
    if tight.unplaced.len() < spread.unplaced.len() { tight } else { spread }
}

/// What a host has left while VMs are given to it.
struct Room<'a> {
    facts: &'a HostFacts,
    memory: Bytes,
    link_in: BitsPerSec,
    disks: Vec<DiskRoom>,
}

impl Room<'_> {
    /// A plain name is looked up in a host's first room, as the agents do.
    fn disk_room(&self, path: &str) -> Option<&DiskRoom> {
        match path.starts_with('/') {
            true => self.disks.iter().find(|room| room.holds(path)),
            false => self.disks.first(),
        }
    }

    /// Rooms may share a file system: what is given away counts in each.
    /// What a copy of a VM's disks has taken already.
    fn seeded(&self, vm: &VmId) -> Bytes {
        self.facts.seeds.get(vm).copied().unwrap_or_default()
    }

    fn take_disks(&mut self, taken: Bytes) {
        for room in &mut self.disks {
            room.free = room.free - taken;
        }
    }
}

fn place_with(question: &Question<'_>, taste: Taste) -> Placement {
    let mut rooms: Vec<Room<'_>> =
        question.hosts.iter().map(|facts| room(facts, question)).collect();
    let mut large_first: Vec<&VmNeeds> = question.vms.iter().collect();
    large_first.sort_by_key(|vm| (Reverse(vm.memory), &vm.id));
    let mut placement = Placement::default();
    for vm in large_first {
        if let Some(unplaced) = give(vm, &mut rooms, question, taste, &mut placement.places) {
            placement.unplaced.push(unplaced);
        }
    }
    placement.unplaced.sort_by(|a, b| a.vm.cmp(&b.vm));
    placement
}

/// Memory free less what is already on its way.
fn room<'a>(facts: &'a HostFacts, question: &Question<'_>) -> Room<'a> {
    let arriving =
        facts.arrivals.iter().map(|(memory, vcpus)| question.overhead.total(*memory, *vcpus));
    let (memory, disks) = (facts.memory_free - arriving.sum(), facts.disk_rooms.clone());
    Room { facts, memory, link_in: facts.spare_in, disks }
}

fn give(
    vm: &VmNeeds,
    rooms: &mut [Room<'_>],
    question: &Question<'_>,
    taste: Taste,
    places: &mut BTreeMap<VmId, HostId>,
) -> Option<Unplaced> {
    let vm_obstacles = vm_obstacles(vm);
    let mut unplaced = Unplaced { vm: vm.id.clone(), vm_obstacles, hosts: BTreeMap::new() };
    if !unplaced.vm_obstacles.is_empty() {
        return Some(unplaced);
    }
    let needed = question.overhead.total(vm.memory, vm.vcpus);
    let mut fitting: Vec<&mut Room<'_>> = Vec::new();
    for room in rooms.iter_mut() {
        let obstacles = obstacles(vm, needed, room, question);
        if obstacles.is_empty() {
            fitting.push(room);
        } else {
            unplaced.hosts.insert(room.facts.id.clone(), obstacles);
        }
    }
    let Some(best) = fitting.into_iter().min_by_key(|room| preference(room, needed, taste)) else {
        return Some(unplaced);
    };
    best.memory = best.memory - needed;
    best.link_in = best.link_in - vm.network_in;
    best.take_disks(vm.local_disks.bytes - best.seeded(&vm.id));
    places.insert(vm.id.clone(), best.facts.id.clone());
    None
}

/// The smaller the better.
fn preference(room: &Room<'_>, needed: Bytes, taste: Taste) -> (u64, Reverse<BitsPerSec>, HostId) {
    let left = (room.memory - needed).0;
    let first = match taste {
        // Millionths of the host's memory that would stay free, so that small hosts are not filled
        // first.
        Taste::Spread => {
            let share = u128::from(left) * 1_000_000 / u128::from(room.facts.memory_total.0.max(1));
            u64::MAX - u64::try_from(share).unwrap_or(u64::MAX)
        }
        Taste::Tight => left,
    };
    (first, Reverse(room.link_in), room.facts.id.clone())
}

fn vm_obstacles(vm: &VmNeeds) -> Vec<VmObstacle> {
    let mut obstacles = Vec::new();
    if let Some(owner) = &vm.foreign_owner {
        obstacles.push(VmObstacle::ForeignOwner { owner: owner.clone() });
    }
    obstacles
}

fn obstacles(
    vm: &VmNeeds,
    needed: Bytes,
    room: &Room<'_>,
    question: &Question<'_>,
) -> Vec<Obstacle> {
    let host = room.facts;
    if host.id == *question.source {
        return vec![Obstacle::Source];
    }
    let mut found = Vec::new();
    if question.fetches && !host.fetch_obstacle.is_empty() {
        found.push(Obstacle::Fetching { why: host.fetch_obstacle.clone() });
    }
    if !question.allowed.is_empty() && !question.allowed.contains(&host.id) {
        found.push(Obstacle::NotAllowed);
    }
    match host.state {
        HostState::Ready => {}
        HostState::Cordoned => found.push(Obstacle::Cordoned),
        HostState::Evacuating => found.push(Obstacle::Evacuating),
        // Nothing else that is known of it is true now.
        HostState::Unreachable => return [found, vec![Obstacle::Unreachable]].concat(),
    }
    if let Some(sentence) = question.cut_off.get(&host.id) {
        found.push(Obstacle::NoWay { sentence: sentence.clone() });
    }
    if needed > room.memory {
        found.push(Obstacle::Memory { needed, free: room.memory });
    }
    if vm.network_in > room.link_in {
        found.push(Obstacle::LinkRoom { needed: vm.network_in, spare: room.link_in });
    }
    found.extend(disk_obstacles(vm, room));
    found.extend(incompatibilities(vm, host));
    found
}

fn disk_obstacles(vm: &VmNeeds, room: &Room<'_>) -> Vec<Obstacle> {
    let (disks, mut found) = (&vm.local_disks, Vec::new());
    let needed = disks.bytes - room.seeded(&vm.id);
    for path in &disks.paths {
        let obstacle = match room.disk_room(path) {
            None => Obstacle::DiskPlace { path: path.clone() },
            Some(room) if needed > room.free => {
                Obstacle::DiskRoom { needed, free: room.free, room: room.path.clone() }
            }
            Some(_) => continue,
        };
        if !found.contains(&obstacle) {
            found.push(obstacle);
        }
    }
    found
}

#[cfg(test)]
mod tests;
