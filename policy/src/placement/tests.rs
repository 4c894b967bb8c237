//! Tests of the placement: every obstacle once, the choice, and what must hold for any hosts and
//! VMs.

use super::*;
use proptest::prelude::*;

pub(crate) fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

pub(crate) fn host_id(name: &str) -> HostId {
    HostId::new(name).unwrap()
}

const QEMU: QemuVersion = QemuVersion { major: 7, minor: 2 };

pub(crate) fn needs(name: &str, mib: u64) -> VmNeeds {
    VmNeeds {
        id: VmId::new(name).unwrap(),
        memory: Bytes::from_mib(mib),
        vcpus: 1,
        network_in: BitsPerSec::ZERO,
        qemu: QEMU,
        machine_type: "pc-q35-7.2".to_owned(),
        cpu: CpuNeed::Named("qemu64".to_owned()),
        devices: set(&["virtio-net-pci"]),
        nics: vec![NicNeed { bridge: "br0".to_owned(), mtu: 1500, vlan: Some(7) }],
        disk: DiskNeed::None,
        local_disks: LocalDisks::default(),
        profile: None,
        foreign_owner: None,
    }
}

pub(crate) fn facts(name: &str, free_mib: u64) -> HostFacts {
    let bridge = Bridge { mtu: 1500, vlans: vec![VlanRange { first: 1, last: 9 }] };
    HostFacts {
        id: host_id(name),
        state: HostState::Ready,
        memory_total: Bytes::from_mib(4096),
        memory_free: Bytes::from_mib(free_mib),
        arrivals: Vec::new(),
        spare_in: BitsPerSec::from_mbit(200),
        qemu: QEMU,
        machine_types: set(&["pc-q35-7.2"]),
        cpu_models: set(&["qemu64"]),
        cpu_flags: set(&["sse2"]),
        devices: set(&["virtio-net-pci", "virtio-blk-pci"]),
        bridges: BTreeMap::from([("br0".to_owned(), bridge)]),
        profiles: set(&["fast-net"]),
        storage: set(&["nfs1"]),
        seeds: BTreeMap::new(),
        disk_rooms: vec![DiskRoom { path: "/disks".to_owned(), free: Bytes::from_mib(100) }],
        fetch_obstacle: String::new(),
        base_obstacles: BTreeMap::new(),
    }
}

fn ask(vms: &[VmNeeds], hosts: &[HostFacts], allowed: &[&str]) -> Placement {
    let (source, allowed) = (host_id("h1"), allowed.iter().map(|name| host_id(name)).collect());
    let (overhead, cut_off) = (Overhead::default(), BTreeMap::new());
    place(&Question {
        source: &source,
        vms,
        hosts,
        allowed: &allowed,
        cut_off: &cut_off,
        overhead,
        fetches: false,
    })
}

/// What speaks against host h2, with the host and the VM changed by the two functions.
fn against(change: impl Fn(&mut HostFacts, &mut VmNeeds)) -> Vec<Obstacle> {
    let (mut host, mut vm) = (facts("h2", 1000), needs("a", 256));
    change(&mut host, &mut vm);
    let placement = ask(&[vm], &[host], &[]);
    placement.unplaced.into_iter().flat_map(|one| one.hosts.into_values().flatten()).collect()
}

#[test]
fn a_host_that_fits_is_taken() {
    assert_eq!(against(|_, _| ()), []);
}

#[test]
fn every_obstacle_is_named() {
    let mib = Bytes::from_mib;
    assert_eq!(against(|h, _| h.id = host_id("h1")), [Obstacle::Source]);
    assert_eq!(against(|h, _| h.state = HostState::Cordoned), [Obstacle::Cordoned]);
    assert_eq!(against(|h, _| h.state = HostState::Evacuating), [Obstacle::Evacuating]);
    assert_eq!(against(|h, _| h.state = HostState::Unreachable), [Obstacle::Unreachable]);
    // 256 MiB and 96 + 16 + 4 of overhead.
    assert_eq!(against(|h, _| h.memory_free = mib(372)), []);
    let short = Obstacle::Memory { needed: mib(372), free: mib(371) };
    assert_eq!(against(|h, _| h.memory_free = mib(371)), [short]);
    let promised = Obstacle::Memory { needed: mib(372), free: mib(256) };
    assert_eq!(
        against(|h, _| (h.memory_free, h.arrivals) = (mib(628), vec![(mib(256), 1)])),
        [promised]
    );
    let (needed, spare) = (BitsPerSec(200_000_001), BitsPerSec(200_000_000));
    assert_eq!(against(|_, v| v.network_in = needed), [Obstacle::LinkRoom { needed, spare }]);
    let newer = QemuVersion { major: 10, minor: 0 };
    assert_eq!(against(|h, _| h.qemu = newer), [], "to a newer QEMU is fine");
    assert_eq!(against(|_, v| v.qemu = newer), [Obstacle::QemuOlder { vm: newer, host: QEMU }]);
    let wanted = "pc-q35-9.0".to_owned();
    assert_eq!(
        against(|_, v| v.machine_type = "pc-q35-9.0".to_owned()),
        [Obstacle::MachineType { wanted }]
    );
    let wanted = "EPYC".to_owned();
    assert_eq!(
        against(|_, v| v.cpu = CpuNeed::Named("EPYC".to_owned())),
        [Obstacle::CpuModel { wanted }]
    );
    let like = |flags: &[&str]| CpuNeed::HostLike { model: "host".to_owned(), flags: set(flags) };
    assert_eq!(against(|_, v| v.cpu = like(&["sse2"])), []);
    let missing = Obstacle::CpuFlags { missing: set(&["avx", "avx2"]) };
    assert_eq!(against(|_, v| v.cpu = like(&["avx2", "sse2", "avx"])), [missing]);
    let missing = Obstacle::Devices { missing: set(&["vfio-pci"]) };
    assert_eq!(against(|_, v| v.devices = set(&["virtio-net-pci", "vfio-pci"])), [missing]);
    assert_eq!(against(|_, v| v.profile = Some("fast-net".to_owned())), []);
    let wanted = "gpu".to_owned();
    assert_eq!(against(|_, v| v.profile = Some("gpu".to_owned())), [Obstacle::Profile { wanted }]);
    let bridge = || "br0".to_owned();
    assert_eq!(against(|h, _| h.bridges.clear()), [Obstacle::Bridge { bridge: bridge() }]);
    let mtu = Obstacle::Mtu { bridge: bridge(), wanted: 9000, has: 1500 };
    assert_eq!(against(|_, v| v.nics[0].mtu = 9000), [mtu]);
    let vlan = Obstacle::Vlan { bridge: bridge(), vlan: 10 };
    assert_eq!(against(|_, v| v.nics[0].vlan = Some(10)), [vlan]);
    assert_eq!(against(|_, v| v.disk = DiskNeed::Shared(set(&["nfs1"]))), []);
    let missing = Obstacle::Storage { missing: set(&["nfs2"]) };
    assert_eq!(against(|_, v| v.disk = DiskNeed::Shared(set(&["nfs1", "nfs2"]))), [missing]);
}

#[test]
fn an_overlay_goes_only_where_its_base_is_the_same() {
    let why = || "/d/base differs".to_owned();
    let differs = |vm: &str| BTreeMap::from([(VmId::new(vm).unwrap(), why())]);
    assert_eq!(against(|h, _| h.base_obstacles = differs("a")), [Obstacle::Base { why: why() }]);
    assert_eq!(against(|h, _| h.base_obstacles = differs("another")), []);
}

fn with_disk(name: &str, path: &str, mib: u64) -> VmNeeds {
    let local_disks = LocalDisks { paths: set(&[path]), bytes: Bytes::from_mib(mib) };
    VmNeeds { local_disks, ..needs(name, 256) }
}

#[test]
fn disks_go_where_there_is_a_place_and_room_for_them() {
    let said = |path: &str, mib| against(|_, v| *v = with_disk("a", path, mib));
    assert_eq!(said("/disks/a", 100), []);
    assert_eq!(said("a", 100), []);
    let free = Bytes::from_mib(100);
    let (needed, room) = (Bytes::from_mib(101), "/disks".to_owned());
    assert_eq!(said("/disks/a", 101), [Obstacle::DiskRoom { needed, free, room }]);
    let path = || "/disks2/a".to_owned();
    assert_eq!(said("/disks2/a", 1), [Obstacle::DiskPlace { path: path() }]);
    // What the first one gets is gone for the second.
    let vms = [with_disk("a", "/disks/a", 60), with_disk("b", "/disks/b", 60)];
    let placement = ask(&vms, &[facts("h2", 2000)], &[]);
    assert_eq!((placement.places.len(), placement.unplaced.len()), (1, 1));
}

#[test]
fn all_obstacles_are_named_at_once() {
    let found = against(|h, _| {
        h.state = HostState::Cordoned;
        h.memory_free = Bytes::ZERO;
        h.machine_types.clear();
    });
    assert_eq!(found.len(), 3, "{found:?}");
}

#[test]
fn a_vm_that_must_not_move_says_why_and_asks_no_host() {
    let mut foreign = needs("a", 1);
    foreign.foreign_owner = Some("libvirt".to_owned());
    let placement = ask(&[foreign], &[facts("h2", 1000)], &[]);
    let unplaced = &placement.unplaced[0];
    assert!(unplaced.hosts.is_empty());
    let owner = "libvirt".to_owned();
    assert_eq!(unplaced.vm_obstacles, [VmObstacle::ForeignOwner { owner }]);
}

#[test]
fn vms_are_spread_to_the_least_loaded_and_to_names_in_order() {
    let vms = [needs("a", 256), needs("b", 256), needs("c", 256)];
    let hosts = [facts("h2", 2000), facts("h3", 2000), facts("h4", 1000)];
    let places = ask(&vms, &hosts, &[]).places;
    let at = |name: &str| places[&VmId::new(name).unwrap()].as_str();
    assert_eq!([at("a"), at("b"), at("c")], ["h2", "h3", "h2"]);
    let only = ask(&vms, &hosts, &["h4"]);
    assert_eq!(only.places.len(), 2, "the third does not fit: {only:?}");
    assert_eq!(only.unplaced[0].hosts[&host_id("h2")], [Obstacle::NotAllowed]);
}

#[test]
fn where_spreading_leaves_one_out_tight_packing_is_tried() {
    // With overhead 716, 416 and 416 MiB. Spread gives the large one to h3, and then only one small
    // one fits.
    let vms = [needs("a", 300), needs("b", 300), needs("c", 600)];
    let hosts = [facts("h2", 720), facts("h3", 840)];
    let placement = ask(&vms, &hosts, &[]);
    assert!(placement.unplaced.is_empty(), "{placement:?}");
    assert_eq!(placement.places[&VmId::new("c").unwrap()], host_id("h2"));
}

proptest! {
    #[test]
    fn no_host_is_given_more_than_it_has_and_everyone_is_answered(
        sizes in prop::collection::vec(1u64..2048, 0..12),
        free in prop::collection::vec((0u64..4096, 0u8..6), 0..6),
    ) {
        let vms: Vec<VmNeeds> =
            sizes.iter().enumerate().map(|(i, mib)| needs(&format!("v{i}"), *mib)).collect();
        let states = [HostState::Cordoned, HostState::Evacuating, HostState::Unreachable];
        let hosts: Vec<HostFacts> = free
            .iter()
            .enumerate()
            .map(|(i, (mib, state))| HostFacts {
                state: states.get(usize::from(*state)).copied().unwrap_or(HostState::Ready),
                ..facts(&format!("h{i}"), *mib)
            })
            .collect();
        let placement = ask(&vms, &hosts, &[]);
        prop_assert_eq!(placement.places.len() + placement.unplaced.len(), vms.len());
        for host in &hosts {
            let here = vms.iter().filter(|vm| placement.places.get(&vm.id) == Some(&host.id));
            let taken: Bytes = here.map(|vm| Overhead::default().total(vm.memory, vm.vcpus)).sum();
            prop_assert!(taken <= host.memory_free);
            prop_assert!(taken == Bytes::ZERO || host.state == HostState::Ready && host.id.as_str() != "h1");
        }
        for unplaced in &placement.unplaced {
            prop_assert_eq!(unplaced.hosts.len(), hosts.len(), "a reason for each host");
        }
        let mut turned: Vec<HostFacts> = hosts.clone();
        turned.reverse();
        prop_assert_eq!(ask(&vms, &turned, &[]), placement);
    }
}
