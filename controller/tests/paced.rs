//! Ports that can carry no queue: of another controller's bridge, and of links too fast to shape. On
//! real Open vSwitches of type `dummy`.
//!
//! ```text
//!  br-h1 u1 ═ a1 s1 a2 ═ u2 br-h2          (a2 may be a bond)
//! ```

mod dummies;

use dummies::{Switches, connected, eventually, free_port, port, site};
use lifeboat_controller::network::{
    Ability, Hop, Network, PaceOnly, PageFlow, ReservationRequest, SwitchNetwork,
};
use lifeboat_protocol::ids::{EvacuationId, MigrationId};
use lifeboat_protocol::terms::{ReservationKind, Urgency};
use lifeboat_protocol::units::BitsPerSec;

const LINKS: [(&str, &str); 2] = [("h1:u1", "s1:a1"), ("s1:a2", "h2:u2")];

/// The picture above; what a switch has before its controller comes is up to `prepare`.
async fn chain(
    capacity: &str,
    head: &str,
    prepare: impl Fn(&Switches),
) -> (Switches, SwitchNetwork) {
    let (switches, listen) = (Switches::start().await, free_port());
    switches.bridge("br-h1", 0xb1, &["u1"], listen);
    switches.bridge("br-h2", 0xb2, &["u2"], listen);
    switches.bridge("s1", 1, &["a1", "a2"], listen);
    prepare(&switches);
    let database = switches.database();
    let head = format!("openflow_listen = \"127.0.0.1:{listen}\"\n{head}");
    let folder = tempfile::tempdir().unwrap();
    let fabric = [("s1", 1, &*database)];
    let site = site(&head, folder.path(), &database, &fabric, &LINKS, capacity);
    let network = SwitchNetwork::start(&site, None);
    connected(&network).await;
    (switches, network)
}

fn evacuation() -> EvacuationId {
    EvacuationId::new("e1").unwrap()
}

fn wish(capacity: u64) -> ReservationRequest {
    let hop = |(switch, name): &(&str, &str)| Hop {
        at: port(switch, name),
        capacity: BitsPerSec::from_mbit(capacity),
        rate: BitsPerSec::from_mbit(capacity / 2),
    };
    ReservationRequest {
        evacuation: evacuation(),
        migration: MigrationId::new("e1-m1").unwrap(),
        urgency: Urgency::new(50).unwrap(),
        kind: ReservationKind::Borrow,
        hops: [("h1.br-h1", "u1"), ("s1", "a2")].iter().map(hop).collect(),
        traffic: PageFlow {
            source: [10, 0, 0, 1].into(),
            destination: ([10, 0, 0, 2], 7445).into(),
            served: false,
        },
    }
}

async fn ability(network: &SwitchNetwork, switch: &str, name: &str) -> Ability {
    let switches = network.switches().await;
    let switch = switches.iter().find(|status| status.name.as_str() == switch).unwrap();
    switch.ports.iter().find(|port| port.name == name).unwrap().ability.clone()
}

#[tokio::test]
async fn nothing_is_installed_in_another_controller_s_pipeline() {
    let pipeline = |switches: &Switches| {
        drop(switches.ofctl("s1", "add-flow", "table=0,priority=100,ip,actions=resubmit(,1)"));
        drop(switches.ofctl("s1", "add-flow", "table=1,priority=1,actions=output:2"));
    };
    // With discovery, whose probes would be flows too.
    let head = "discovery_interval_ms = 100";
    let (switches, network) = chain("100 Mbit/s", head, pipeline).await;
    let (before, rows) = (switches.flows("s1"), switches.queues());
    assert!(before.contains("resubmit"), "{before}");

    let reserved = network.reserve(wish(100)).await.unwrap();
    let paced: Vec<bool> = reserved.hops.iter().map(|hop| hop.is_paced()).collect();
    assert_eq!(paced, [false, true]);
    assert_eq!(reserved.paced_rate(), Some(BitsPerSec::from_mbit(50)));
    assert_eq!(switches.flows("s1"), before);
    assert!(switches.flows("br-h1").contains("set_queue"));
    assert_eq!(switches.vsctl("get port a2 qos").trim(), "[]");
    assert_eq!(ability(&network, "h1.br-h1", "u1").await, Ability::Queue);
    let shown = ability(&network, "s1", "a2").await;
    assert!(matches!(shown.pace_only(), Some(PaceOnly::ForeignPipeline { .. })), "{shown}");
    assert!(shown.to_string().starts_with("pacing only: another controller's flow"), "{shown}");

    let released = network.release(evacuation(), None).await;
    assert!(released.failures.is_empty(), "{:?}", released.failures);
    assert_eq!((switches.flows("s1"), switches.queues()), (before, rows));
}

#[tokio::test]
async fn a_link_too_fast_to_shape_is_only_paced() {
    let (switches, network) = chain("25 Gbit/s", "", |_| ()).await;
    let (flows, rows) = (switches.flows("br-h1"), switches.queues());
    let reserved = network.reserve(wish(25_000)).await.unwrap();
    assert_eq!(reserved.hops.len(), 2);
    assert!(reserved.hops.iter().all(|hop| hop.is_paced()));
    assert_eq!((switches.flows("br-h1"), switches.queues()), (flows, rows));
    assert_eq!(ability(&network, "s1", "a1").await, Ability::PaceOnly(PaceOnly::TooFast));
    let released = network.release(evacuation(), None).await;
    assert!(released.failures.is_empty(), "{:?}", released.failures);
}

#[tokio::test]
async fn of_a_bond_a_stream_takes_one_member_and_is_paced_to_it() {
    let bond = |switches: &Switches| {
        switches.vsctl("del-port s1 a2");
        drop(switches.vsctl(
            "add-bond s1 a2 m1 m2 -- set interface m1 type=dummy -- set interface m2 type=dummy",
        ));
    };
    let (switches, network) = chain("100 Mbit/s", "", bond).await;
    let reserved = network.reserve(wish(100)).await.unwrap();
    let paced: Vec<bool> = reserved.hops.iter().map(|hop| hop.is_paced()).collect();
    assert_eq!(paced, [false, true]);
    assert_eq!(ability(&network, "s1", "a2").await, Ability::PaceOnly(PaceOnly::Bond));
    assert_eq!(switches.vsctl("get port a2 qos").trim(), "[]");
    network.release(evacuation(), None).await;
}

#[tokio::test]
async fn marks_of_an_application_are_no_pipeline() {
    let marks = |switches: &Switches| {
        let marking = "priority=9,ip,nw_src=10.0.0.9,actions=set_queue:2,NORMAL";
        drop(switches.ofctl("s1", "add-flow", marking));
    };
    let (switches, network) = chain("100 Mbit/s", "", marks).await;
    let reserved = network.reserve(wish(100)).await.unwrap();
    assert!(reserved.hops.iter().all(|hop| !hop.is_paced()));
    eventually("all switches have been looked at", async || {
        ability(&network, "s1", "a1").await == Ability::Queue
    })
    .await;
    network.release(evacuation(), None).await;
    assert!(switches.flows("s1").contains("nw_src=10.0.0.9"));
}
