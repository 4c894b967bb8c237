//! Whether a host's QEMU, processor, bridges and storage can carry on a VM that was started
//! elsewhere.
//!
//! Compared before anything moves: QEMU itself finds most of these only when the stream is loaded,
//! after minutes of copying.

use std::collections::BTreeSet;

use super::facts::{CpuNeed, DiskNeed, HostFacts, NicNeed, VmNeeds};
use super::obstacle::Obstacle;

/// Everything about `host` that does not fit `vm`, in a fixed order; empty if it fits.
#[must_use]
pub fn incompatibilities(vm: &VmNeeds, host: &HostFacts) -> Vec<Obstacle> {
    let mut found = Vec::new();
    if host.qemu < vm.qemu {
        found.push(Obstacle::QemuOlder { vm: vm.qemu, host: host.qemu });
    }
    if !host.machine_types.contains(&vm.machine_type) {
        found.push(Obstacle::MachineType { wanted: vm.machine_type.clone() });
    }
    found.extend(cpu(&vm.cpu, host));
    let devices = missing(&vm.devices, &host.devices);
    if !devices.is_empty() {
        found.push(Obstacle::Devices { missing: devices });
    }
    if let Some(profile) = vm.profile.as_ref().filter(|name| !host.profiles.contains(*name)) {
        found.push(Obstacle::Profile { wanted: profile.clone() });
    }
    found.extend(vm.nics.iter().flat_map(|nic| network(nic, host)));
    if let DiskNeed::Shared(storage) = &vm.disk {
        let storage = missing(storage, &host.storage);
        if !storage.is_empty() {
            found.push(Obstacle::Storage { missing: storage });
        }
    }
    if let Some(why) = host.base_obstacles.get(&vm.id) {
        found.push(Obstacle::Base { why: why.clone() });
    }
    found
}

fn cpu(need: &CpuNeed, host: &HostFacts) -> Option<Obstacle> {
    match need {
        CpuNeed::Named(model) => {
            (!host.cpu_models.contains(model)).then(|| Obstacle::CpuModel { wanted: model.clone() })
        }
        CpuNeed::HostLike { flags, .. } => {
            let missing = missing(flags, &host.cpu_flags);
            (!missing.is_empty()).then_some(Obstacle::CpuFlags { missing })
        }
    }
}

fn network(nic: &NicNeed, host: &HostFacts) -> Vec<Obstacle> {
    let Some(bridge) = host.bridges.get(&nic.bridge) else {
        return vec![Obstacle::Bridge { bridge: nic.bridge.clone() }];
    };
    let mut found = Vec::new();
    if bridge.mtu < nic.mtu {
        found.push(Obstacle::Mtu { bridge: nic.bridge.clone(), wanted: nic.mtu, has: bridge.mtu });
    }
    if let Some(vlan) = nic.vlan {
        let carried = bridge.vlans.iter().any(|range| (range.first..=range.last).contains(&vlan));
        if !bridge.vlans.is_empty() && !carried {
            found.push(Obstacle::Vlan { bridge: nic.bridge.clone(), vlan });
        }
    }
    found
}

fn missing(wanted: &BTreeSet<String>, offered: &BTreeSet<String>) -> BTreeSet<String> {
    wanted.difference(offered).cloned().collect()
}
