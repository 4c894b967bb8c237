//! Tests of the plan on a small network: two destinations behind one switch, SOLive's four roles at
//! the source.

use lifeboat_protocol::ids::SwitchId;
use lifeboat_protocol::units::{Bytes, BytesPerSec, Pages, PagesPerSec};
use lifeboat_topology::{Attachment, End, LinkSpec, PortName};

use super::*;
use crate::placement::{
    Bridge, CpuNeed, DiskNeed, HostState, LocalDisks, Obstacle, QemuVersion, VmObstacle,
};

fn host(name: &str) -> HostId {
    HostId::new(name).unwrap()
}

fn vm_id(name: &str) -> VmId {
    VmId::new(name).unwrap()
}

fn mbit(rate: u64) -> BitsPerSec {
    BitsPerSec::from_mbit(rate)
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn end(switch: &str, port: &str) -> End {
    End::new(SwitchId::new(switch).unwrap(), PortName::new(port).unwrap())
}

/// h1, h2, h3, each with its own bridge and 200 Mbit/s to s1; 100 Mbit/s leave h1 now.
fn network() -> Topology {
    let mut network = Topology::new();
    network.add_switch(SwitchId::new("s1").unwrap()).unwrap();
    for name in ["h1", "h2", "h3"] {
        let bridge = SwitchId::new(format!("br-{name}")).unwrap();
        network.add_switch(bridge.clone()).unwrap();
        network.add_host(host(name), Attachment::OwnBridge { bridge: bridge.clone() }).unwrap();
        let uplink = end(bridge.as_str(), "up");
        let link = LinkSpec::symmetric(uplink.clone(), end("s1", name), mbit(200));
        network.add_link(link).unwrap();
        if name == "h1" {
            network.set_used(network.leaving(&uplink).unwrap(), mbit(100)).unwrap();
        }
    }
    network
}

fn planned(name: &str, dirty: u64, out: u64, into: u64) -> PlannedVm {
    let memory = Bytes::from_mib(256);
    let qemu = QemuVersion { major: 7, minor: 2 };
    let needs = VmNeeds {
        id: vm_id(name),
        memory,
        vcpus: 1,
        network_in: mbit(into),
        qemu,
        machine_type: "pc-q35-7.2".to_owned(),
        cpu: CpuNeed::Named("qemu64".to_owned()),
        devices: set(&[]),
        nics: Vec::new(),
        disk: DiskNeed::None,
        local_disks: LocalDisks::default(),
        profile: None,
        foreign_owner: None,
    };
    let measured = MeasuredVm {
        id: vm_id(name),
        memory,
        non_zero: Pages(20_000),
        dirty_rate: PagesPerSec(dirty),
        working_set: Pages(5_000),
        network_out: mbit(out),
        network_in: mbit(into),
        disk: Bytes::ZERO,
        disk_writes: BytesPerSec::ZERO,
        error: 0.1,
    };
    PlannedVm { needs, measured }
}

fn facts(name: &str) -> HostFacts {
    HostFacts {
        id: host(name),
        state: HostState::Ready,
        memory_total: Bytes::from_mib(2048),
        memory_free: Bytes::from_mib(1024),
        arrivals: Vec::new(),
        spare_in: mbit(200),
        qemu: QemuVersion { major: 7, minor: 2 },
        machine_types: set(&["pc-q35-7.2"]),
        cpu_models: set(&["qemu64"]),
        cpu_flags: set(&[]),
        devices: set(&[]),
        bridges: BTreeMap::<String, Bridge>::new(),
        profiles: set(&[]),
        storage: set(&[]),
        seeds: BTreeMap::new(),
        disk_rooms: Vec::new(),
        fetch_obstacle: String::new(),
        base_obstacles: BTreeMap::new(),
    }
}

fn inventory() -> Inventory {
    Inventory {
        vms: vec![
            planned("ni", 10, 0, 60),
            planned("c", 100, 0, 0),
            planned("m", 3_000, 0, 0),
            planned("no", 10, 100, 0),
        ],
        hosts: vec![facts("h1"), facts("h2"), facts("h3")],
        modes: BTreeSet::from([Mode::PreCopy, Mode::Cold]),
        overhead: Overhead::default(),
        floor: Floor::default(),
        criteria: StopCriteria::default(),
        cold: ColdTimes::default(),
        experience: Experience::default(),
        between: std::time::Duration::ZERO,
    }
}

fn request() -> PlanRequest {
    PlanRequest {
        source: host("h1"),
        only: BTreeSet::new(),
        allowed: BTreeSet::new(),
        urgency: Urgency::new(30).unwrap(),
        mode: Mode::Auto,
        modes: BTreeMap::new(),
        parallel: 1,
    }
}

#[test]
fn the_four_roles_leave_in_solive_s_order_and_are_spread() {
    let plan = plan(&request(), &inventory(), &network()).unwrap();
    let names: Vec<&str> = plan.moves.iter().map(|step| step.vm.as_str()).collect();
    assert_eq!(names, ["no", "m", "c", "ni"]);
    assert!(plan.left_behind.is_empty());
    let at_h2 = plan.moves.iter().filter(|step| step.destination == host("h2")).count();
    assert_eq!(at_h2, 2);
    assert!(plan.moves.iter().all(|step| step.mode == Mode::PreCopy));
    // The first has what the sender leaves free, those after it the link less the floor.
    assert_eq!(plan.moves[0].predicted.bandwidth, mbit(100));
    assert_eq!(plan.moves[1].predicted.bandwidth, mbit(190));
    assert!(plan.predicted.total_time.low <= plan.predicted.total_time.likely);
    assert!(plan.predicted.total_time.likely <= plan.predicted.total_time.high);
    let last = &plan.moves[3].predicted;
    assert_eq!(
        plan.predicted.total_time.likely,
        last.starts.likely + last.prediction.likely.total_time
    );
}

#[test]
fn a_mode_that_was_chosen_for_one_vm_is_its_own() {
    let modes = BTreeMap::from([(vm_id("m"), Mode::PostCopy)]);
    let mixed = plan(&PlanRequest { modes, ..request() }, &inventory(), &network()).unwrap();
    let pure = plan(&request(), &inventory(), &network()).unwrap();
    for (step, before) in mixed.moves.iter().zip(&pure.moves) {
        assert_eq!((&step.vm, &step.destination), (&before.vm, &before.destination));
        let own = if step.vm == vm_id("m") { Mode::PostCopy } else { Mode::PreCopy };
        assert_eq!(step.mode, own);
    }
    assert!(mixed.predicted.bytes.likely < pure.predicted.bytes.likely);
}

#[test]
fn the_way_of_each_move_begins_at_the_source_and_ends_at_its_destination() {
    let plan = plan(&request(), &inventory(), &network()).unwrap();
    for step in &plan.moves {
        let wanted = format!("h1 > br-h1:up > s1:{0} > {0}", step.destination);
        assert_eq!(step.way.to_string(), wanted);
    }
}

#[test]
fn a_destination_that_no_way_leads_to_is_left_out_with_the_cut_named() {
    let mut network = network();
    network.set_port_up(&end("s1", "h2"), false).unwrap();
    let mut inventory = inventory();
    inventory.hosts[2].memory_free = Bytes::from_mib(500);
    let plan = plan(&request(), &inventory, &network).unwrap();
    assert_eq!((plan.moves.len(), plan.left_behind.len()), (1, 3));
    assert_eq!(plan.moves[0].destination, host("h3"));
    let reasons = &plan.left_behind[0].hosts[&host("h2")];
    let [Obstacle::NoWay { sentence }] = reasons.as_slice() else { panic!("{reasons:?}") };
    assert!(sentence.contains("s1 port h2"), "{sentence}");
}

#[test]
fn a_vm_that_cannot_move_does_not_stop_the_others() {
    let mut inventory = inventory();
    let owner = "libvirt".to_owned();
    inventory.vms[0].needs.foreign_owner = Some(owner.clone());
    let plan = plan(&request(), &inventory, &network()).unwrap();
    assert_eq!(plan.moves.len(), 3);
    assert_eq!(plan.left_behind[0].vm_obstacles, [VmObstacle::ForeignOwner { owner }]);
}

#[test]
fn what_cannot_be_asked_for_is_refused_by_name() {
    let with = |change: &dyn Fn(&mut PlanRequest)| {
        let mut request = request();
        change(&mut request);
        plan(&request, &inventory(), &network()).unwrap_err().to_string()
    };
    let error = with(&|r| r.source = host("h9"));
    assert!(error.contains("host h9 is not known"), "{error}");
    let error = with(&|r| r.allowed = BTreeSet::from([host("h8")]));
    assert!(error.contains("--to names host h8"), "{error}");
    let error = with(&|r| r.allowed = BTreeSet::from([host("h1")]));
    assert!(error.contains("the host that is to be evacuated"), "{error}");
    let error = with(&|r| r.only = BTreeSet::from([vm_id("x")]));
    assert!(error.contains("VM x is not at host h1"), "{error}");
    let error = with(&|r| r.mode = Mode::PostCopy);
    assert_eq!(error, "post-copy is not built yet; the agents can do pre-copy, cold");
}

#[test]
fn auto_never_chooses_what_stops_a_guest() {
    let mut inventory = inventory();
    inventory.modes = BTreeSet::from([Mode::Cold]);
    let error = plan(&request(), &inventory, &network()).unwrap_err();
    assert!(matches!(error, PlanError::ModeUnavailable { mode: Mode::PreCopy, .. }));
    let cold = PlanRequest { mode: Mode::Cold, ..request() };
    let plan = plan(&cold, &inventory, &network()).unwrap();
    assert_eq!(plan.predicted.bytes.likely, Bytes::ZERO);
}

#[test]
fn a_vm_that_outruns_the_link_is_pointed_out() {
    let mut inventory = inventory();
    inventory.vms[2].measured.working_set = Pages(60_000);
    inventory.vms[2].measured.dirty_rate = PagesPerSec(30_000);
    let plan = plan(&request(), &inventory, &network()).unwrap();
    let names: Vec<&VmId> = plan.not_converging().map(|step| &step.vm).collect();
    assert_eq!(names, [&vm_id("m")]);
}

#[test]
fn an_empty_host_needs_no_time() {
    let inventory = Inventory { vms: Vec::new(), ..inventory() };
    let plan = plan(&request(), &inventory, &network()).unwrap();
    assert!(plan.moves.is_empty() && plan.predicted.total_time.high.is_zero());
}

#[test]
fn only_the_vms_that_were_named_move_and_the_plan_is_the_same_each_time() {
    let one = PlanRequest { only: BTreeSet::from([vm_id("c")]), parallel: 2, ..request() };
    let first = plan(&one, &inventory(), &network()).unwrap();
    assert_eq!(first.moves.len(), 1);
    let mut turned = inventory();
    turned.vms.reverse();
    turned.hosts.reverse();
    assert_eq!(plan(&one, &turned, &network()).unwrap(), first);
}
