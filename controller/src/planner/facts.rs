//! From the agents' words to the policy's: hosts, VMs, and why one stays.
//!
//! Pure. What an agent says is checked here: a name that is no name, a version that is none.

use std::collections::{BTreeMap, BTreeSet};

use lifeboat_policy::measured::MeasuredVm;
use lifeboat_policy::placement::{
    Bridge, CpuNeed, DiskNeed, DiskRoom, HostFacts, HostState, LocalDisks, NicNeed, Overhead,
    QemuVersion, Unplaced, VmNeeds,
};
use lifeboat_policy::predict::is_absorbed;
use lifeboat_policy::stop::StopCriteria;
use lifeboat_protocol::agent::{self, HostDescription, VmDefinition, VmMeasurement, VmStatus};
use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::units::{BitsPerSec, Bytes, BytesPerSec, Pages, PagesPerSec};

use super::{DiskPromise, Promised, Stays};
use crate::inventory::{HostEntry, is};

/// `7.2.22` or `10.0.2 (Debian ...)` to its first two numbers; 0.0 for what is none, which is older
/// than anything and so accepts nothing.
pub(super) fn qemu_version(text: &str) -> QemuVersion {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
    let mut next = || numbers.next().and_then(|part| part.parse().ok()).unwrap_or(0);
    let major = next();
    QemuVersion { major, minor: next() }
}

/// What a host offers. One that has never been heard offers nothing and is unreachable.
pub(super) fn host_facts(
    host: &HostId,
    entry: &HostEntry,
    promised: &Promised,
    arriving: Vec<(Bytes, u32)>,
    storage: BTreeSet<String>,
) -> HostFacts {
    let silent = HostDescription::default();
    let said = entry.description.as_ref().unwrap_or(&silent);
    let state = match () {
        () if !entry.connected => HostState::Unreachable,
        () if promised.leaving.contains(host) => HostState::Evacuating,
        () if entry.cordoned => HostState::Cordoned,
        () => HostState::Ready,
    };
    let bridge = |bridge: &lifeboat_protocol::agent::BridgeDescription| {
        (bridge.name.clone(), Bridge { mtu: bridge.mtu, vlans: Vec::new() })
    };
    HostFacts {
        id: host.clone(),
        state,
        memory_total: Bytes(said.memory_total_bytes),
        memory_free: Bytes(said.memory_free_bytes),
        arrivals: arriving,
        spare_in: BitsPerSec(u64::MAX),
        qemu: qemu_version(&said.qemu_version),
        machine_types: set(&said.machine_types),
        cpu_models: set(&said.cpu_models),
        cpu_flags: set(&said.cpu_flags),
        devices: set(&said.devices),
        bridges: said.bridges.iter().map(bridge).collect(),
        storage,
        profiles: set(&said.profiles),
        disk_rooms: said.disk_rooms.iter().map(disk_room).collect(),
        seeds: said.seeds.iter().filter_map(seed).collect(),
        base_obstacles: BTreeMap::new(),
        fetch_obstacle: match said.modes().any(|mode| mode == agent::Mode::PostCopy) {
            true => said.post_copy_obstacle.clone(),
            false => "its agent is older than post-copy".to_owned(),
        },
    }
}

fn disk_room(said: &agent::DiskRoom) -> DiskRoom {
    DiskRoom { path: said.path.clone(), free: Bytes(said.free_bytes) }
}

fn set(names: &[String]) -> BTreeSet<String> {
    names.iter().cloned().collect()
}

/// Memory and CPUs of VMs that were promised to a host and of which its agent does not know yet.
pub(super) fn arriving(
    host: &HostId,
    hosts: &BTreeMap<HostId, HostEntry>,
    promised: &Promised,
) -> Vec<(Bytes, u32)> {
    let here = hosts.get(host);
    let unknown_here =
        |vm: &&VmId| here.is_none_or(|entry| !entry.vms.iter().any(|status| is(status, vm)));
    let coming = promised.arrivals.iter().filter(|(_, to)| to == host).map(|(vm, _)| vm);
    let definition = |vm: &VmId| {
        let all = hosts.values().flat_map(|entry| entry.vms.iter());
        let found = all.filter(|status| is(status, vm)).find_map(|s| s.definition.as_ref());
        found.map(|d| (Bytes(d.memory_bytes), d.vcpus))
    };
    coming.filter(unknown_here).filter_map(definition).collect()
}

/// What a VM needs of its destination.
pub(super) fn vm_needs(
    vm: &VmId,
    status: &VmStatus,
    definition: &VmDefinition,
    source: &HostDescription,
    measured: &MeasuredVm,
) -> VmNeeds {
    let mtu_of = |name: &str| source.bridges.iter().find(|b| b.name == name).map_or(0, |b| b.mtu);
    let nics = definition.nics.iter().map(|nic| NicNeed {
        bridge: nic.bridge.clone(),
        mtu: if nic.mtu == 0 { mtu_of(&nic.bridge) } else { nic.mtu },
        vlan: u16::try_from(nic.vlan_tag).ok().filter(|tag| *tag > 0),
    });
    let running = Some(&status.qemu_version).filter(|version| !version.is_empty());
    VmNeeds {
        id: vm.clone(),
        memory: Bytes(definition.memory_bytes),
        vcpus: definition.vcpus,
        network_in: measured.network_in,
        qemu: qemu_version(running.unwrap_or(&source.qemu_version)),
        machine_type: definition.machine.clone(),
        cpu: cpu_need(&definition.cpu_model, source),
        devices: devices(definition),
        nics: nics.collect(),
        disk: disk_need(definition),
        local_disks: local_disks(definition, measured.disk),
        foreign_owner: None,
        profile: Some(definition.profile.clone()).filter(|name| !name.is_empty()),
    }
}

fn cpu_need(model: &str, source: &HostDescription) -> CpuNeed {
    // A model may carry switches: `max,-x2apic`.
    let name = model.split(',').next().unwrap_or_default().to_owned();
    match name.as_str() {
        "host" | "max" => CpuNeed::HostLike { model: name, flags: set(&source.cpu_flags) },
        _ => CpuNeed::Named(name),
    }
}

/// The device models that the agents give to a VM: see the launcher's argument list.
fn devices(definition: &VmDefinition) -> BTreeSet<String> {
    let nic = (!definition.nics.is_empty()).then_some("virtio-net-pci");
    // The firmware's own is part of the machine.
    let disks = definition.disks.iter().filter(|disk| !disk.nvram);
    let disks = disks.map(|disk| if disk.cdrom { "ide-cd" } else { "virtio-blk-pci" });
    nic.into_iter().chain(disks).map(str::to_owned).collect()
}

fn disk_need(definition: &VmDefinition) -> DiskNeed {
    let storages = definition.disks.iter().map(|disk| disk.shared_storage.clone());
    let shared: BTreeSet<String> = storages.filter(|name| !name.is_empty()).collect();
    if shared.is_empty() { DiskNeed::None } else { DiskNeed::Shared(shared) }
}

/// What its owner was promised for its disks.
pub(super) fn disk_promise(definition: &VmDefinition) -> DiskPromise {
    let rate = BytesPerSec(definition.promised_disk_bytes_per_sec);
    DiskPromise { rate, unthrottled: definition.forbid_throttling }
}

/// Why a VM's pages cannot follow it that writes faster than its own host takes it in, and may not be slowed
/// down.
pub(super) fn outruns(
    vm: &MeasuredVm,
    definition: &VmDefinition,
    criteria: &StopCriteria,
) -> Option<String> {
    let outruns = definition.forbid_throttling && !is_absorbed(vm, criteria);
    outruns.then(|| {
        format!(
            "it dirties {}, faster than its own host takes its memory in, and its owner forbids to slow it down \
             (forbid_throttling)",
            vm.dirty_rate
        )
    })
}

fn seed(said: &agent::Seed) -> Option<(VmId, Bytes)> {
    Some((VmId::new(said.vm.clone()).ok()?, Bytes(said.bytes)))
}

/// The disks that go along, which take so many `bytes` together. Where those may lie that nobody writes
/// to is their hosts' to say: they may be there already, anywhere.
fn local_disks(definition: &VmDefinition, bytes: Bytes) -> LocalDisks {
    let local = definition.disks.iter();
    let local = local.filter(|disk| disk.shared_storage.is_empty() && !disk.read_only);
    LocalDisks { paths: local.map(|disk| disk.path.clone()).collect(), bytes }
}

/// The agent's figures in the policy's units.
pub(super) fn measured_vm(vm: &VmId, memory: Bytes, said: &VmMeasurement) -> MeasuredVm {
    let error = said.dirty_rate_error;
    MeasuredVm {
        id: vm.clone(),
        memory,
        non_zero: Pages(said.non_zero_pages).min(memory.pages()),
        dirty_rate: PagesPerSec(said.dirty_pages_per_sec),
        working_set: Pages(said.working_set_pages).min(memory.pages()),
        network_out: BitsPerSec(said.network_out_bits_per_sec),
        network_in: BitsPerSec(said.network_in_bits_per_sec),
        disk: Bytes(said.disk_bytes),
        disk_writes: BytesPerSec(said.disk_write_bytes_per_sec),
        error: if error.is_finite() { error.clamp(0.0, 1.0) } else { 1.0 },
    }
}

/// Why a VM has no place, one refusal per host that was looked at.
pub(super) fn stays(host: &HostId, left: &Unplaced) -> Stays {
    let obstacles: Vec<String> = left.vm_obstacles.iter().map(ToString::to_string).collect();
    let reason = match obstacles.is_empty() {
        true => "no host can take it".to_owned(),
        false => obstacles.join("; "),
    };
    let refusal = |(at, why): (&HostId, &Vec<_>)| {
        let why: Vec<String> = why.iter().map(ToString::to_string).collect();
        format!("{at}: {}", why.join(", "))
    };
    let others = left.hosts.iter().filter(|(at, _)| *at != host);
    let refusals = others.map(refusal).collect();
    Stays { vm: left.vm.clone(), host: host.clone(), reason, refusals }
}

/// QEMU's overhead as the policy counts it when nobody has said otherwise.
pub(super) fn overhead() -> Overhead {
    Overhead::default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat_protocol::agent::Disk;

    #[test]
    fn a_version_is_read_from_what_qemu_prints() {
        let version = |text| {
            let found = qemu_version(text);
            (found.major, found.minor)
        };
        assert_eq!(version("7.2.22"), (7, 2));
        assert_eq!(version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)"), (10, 0));
        assert_eq!(version("none"), (0, 0));
    }

    #[test]
    fn who_outruns_its_host_and_may_not_be_slowed_keeps_its_pages() {
        let pages = 1 << 19;
        let said = VmMeasurement {
            memory_pages: pages,
            non_zero_pages: pages,
            working_set_pages: pages,
            dirty_pages_per_sec: 1 << 20,
            ..VmMeasurement::default()
        };
        let vm = VmId::new("db").unwrap();
        let fast = measured_vm(&vm, Pages(pages).bytes(), &said);
        let why = |vm: &MeasuredVm, forbid_throttling| {
            let definition = VmDefinition { forbid_throttling, ..VmDefinition::default() };
            outruns(vm, &definition, &StopCriteria::default())
        };
        assert!(why(&fast, true).is_some_and(|why| why.contains("forbid_throttling")));
        assert_eq!(why(&fast, false), None);
        let slow = MeasuredVm { dirty_rate: PagesPerSec(1000), ..fast };
        assert_eq!(why(&slow, true), None);
    }

    #[test]
    fn a_disk_stays_on_storage_that_both_reach_or_goes_along() {
        let disk = |path: &str, storage: &str| Disk {
            path: path.to_owned(),
            shared_storage: storage.to_owned(),
            ..Disk::default()
        };
        let definition = |disks| VmDefinition { disks, ..VmDefinition::default() };
        assert_eq!(disk_need(&definition(vec![])), DiskNeed::None);
        let both = definition(vec![disk("/san/a", "nfs"), disk("/d/b", "")]);
        assert_eq!(disk_need(&both), DiskNeed::Shared(BTreeSet::from(["nfs".to_owned()])));
        let local = local_disks(&both, Bytes(7));
        assert_eq!((local.paths, local.bytes), (BTreeSet::from(["/d/b".to_owned()]), Bytes(7)));
    }

    #[test]
    fn a_cd_needs_a_drive_and_what_firmware_writes_needs_no_device() {
        let disks = vec![
            Disk { nvram: true, ..Disk::default() },
            Disk { cdrom: true, read_only: true, path: "/iso/a".to_owned(), ..Disk::default() },
        ];
        let definition = VmDefinition { disks, ..VmDefinition::default() };
        assert_eq!(devices(&definition), BTreeSet::from(["ide-cd".to_owned()]));
        let paths = local_disks(&definition, Bytes(7)).paths;
        assert!(!paths.contains("/iso/a") && paths.len() == 1);
    }

    #[test]
    fn an_agent_that_measures_nonsense_does_no_harm() {
        let vm = VmId::new("a").unwrap();
        let said = VmMeasurement {
            non_zero_pages: u64::MAX,
            dirty_rate_error: f64::NAN,
            ..VmMeasurement::default()
        };
        let measured = measured_vm(&vm, Bytes::from_mib(1), &said);
        assert_eq!((measured.non_zero, measured.error), (Pages(256), 1.0));
    }
}
