//! Links that go down, links that LLDP finds and loses, and releases that cannot reach a switch: on
//! real Open vSwitches of type `dummy`.
//!
//! ```text
//!  br-h1 u1 ═ a1 s1 a2 ═════ b2 s2 b1 ═ u2 br-h2
//!                a3 ═ c1 s3 c2 ═ b3
//! ```

mod dummies;

use std::time::{Duration, Instant};

use dummies::{Switches, connected, eventually, free_port, port, site};
use lifeboat_controller::network::{Hop, Network, PageFlow, ReservationRequest, SwitchNetwork};
use lifeboat_protocol::ids::{EvacuationId, MigrationId};
use lifeboat_protocol::terms::{ReservationKind, Urgency};
use lifeboat_protocol::units::BitsPerSec;
use lifeboat_topology::Sighting;

const LINKS: [(&str, &str); 5] = [
    ("h1:u1", "s1:a1"),
    ("h2:u2", "s2:b1"),
    ("s1:a2", "s2:b2"),
    ("s1:a3", "s3:c1"),
    ("s3:c2", "s2:b3"),
];

/// The picture above in one Open vSwitch, and a controller's network with `head` in its
/// configuration.
async fn diamond(head: &str) -> (Switches, SwitchNetwork) {
    let (switches, listen) = Switches::diamond(&LINKS).await;
    let database = switches.database();
    let fabric = [("s1", 1, &*database), ("s2", 2, &*database), ("s3", 3, &*database)];
    let head = format!("openflow_listen = \"127.0.0.1:{listen}\"\n{head}");
    let folder = tempfile::tempdir().unwrap();
    let site = site(&head, folder.path(), &database, &fabric, &LINKS, "100 Mbit/s");
    let network = SwitchNetwork::start(&site, None);
    connected(&network).await;
    (switches, network)
}

fn evacuation() -> EvacuationId {
    EvacuationId::new("e1").unwrap()
}

fn wish(way: &[(&str, &str)]) -> ReservationRequest {
    let hop = |(switch, name): &(&str, &str)| Hop {
        at: port(switch, name),
        capacity: BitsPerSec::from_mbit(100),
        rate: BitsPerSec::from_mbit(60),
    };
    ReservationRequest {
        evacuation: evacuation(),
        migration: MigrationId::new("e1-m1").unwrap(),
        urgency: Urgency::new(60).unwrap(),
        kind: ReservationKind::Borrow,
        hops: way.iter().map(hop).collect(),
        traffic: PageFlow {
            source: [10, 0, 0, 1].into(),
            destination: ([10, 0, 0, 2], 7445).into(),
            served: false,
        },
    }
}

const SHORT: [(&str, &str); 3] = [("h1.br-h1", "u1"), ("s1", "a2"), ("s2", "b1")];
const LONG: [(&str, &str); 4] = [("h1.br-h1", "u1"), ("s1", "a3"), ("s3", "c2"), ("s2", "b1")];

/// Everything of ours on all bridges.
fn ours(switches: &Switches) -> String {
    let flows = ["br-h1", "br-h2", "s1", "s2", "s3"].map(|bridge| switches.flows(bridge)).concat();
    flows.lines().filter(|flow| flow.contains("cookie=0x4c42")).collect::<Vec<_>>().join("\n")
}

#[tokio::test]
async fn a_port_that_goes_down_is_told_at_once_and_the_reservation_moves_to_the_other_way() {
    let (switches, network) = diamond("").await;
    network.reserve(wish(&SHORT)).await.unwrap();
    let mut news = network.link_news();
    news.mark_unchanged();
    #[expect(clippy::disallowed_methods, reason = "the time itself is what is measured")]
    let begun = Instant::now();
    switches.set_port("a2", "down");
    loop {
        tokio::time::timeout(Duration::from_secs(5), news.changed()).await.unwrap().unwrap();
        let rates = network.rates().await;
        let of = |switch, name| rates.iter().find(|rate| rate.at == port(switch, name)).unwrap().up;
        if !of("s1", "a2") {
            // The other end of a cable knows nothing yet, and is down all the same.
            assert!(!of("s2", "b2") && of("s1", "a3"));
            break;
        }
    }
    let moved = network.reroute(wish(&LONG)).await.unwrap();
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(moved.hops.len(), 4);

    let out = |name| format!("set_field:3->ip_dscp,output:{}", switches.number(name));
    for (bridge, name) in [("br-h1", "u1"), ("s1", "a3"), ("s3", "c2"), ("s2", "b1")] {
        let flows = switches.flows(bridge);
        assert!(flows.contains(&out(name)), "{bridge}: {flows}");
    }
    let back = "nw_src=10.0.0.2,nw_dst=10.0.0.1,tp_src=7445 actions=output:";
    for (bridge, name) in [("br-h2", "u2"), ("s2", "b3"), ("s3", "c1"), ("s1", "a1")] {
        let flows = switches.flows(bridge);
        assert!(flows.contains(&format!("{back}{}", switches.number(name))), "{bridge}: {flows}");
    }
    let queues = switches.queues();
    assert!(queues.contains("e1 s1:a3") && queues.contains("e1 s3:c2"), "{queues}");
    assert!(!queues.contains("e1 s1:a2"), "{queues}");

    // A controller that comes after takes it over as it is.
    let released = network.release(evacuation(), None).await;
    assert_eq!(released.failures, vec![]);
    assert_eq!((ours(&switches), switches.queues()), (String::new(), String::new()));
}

#[tokio::test]
async fn a_new_way_that_cannot_be_installed_leaves_the_old_one() {
    let (switches, network) = diamond("").await;
    network.reserve(wish(&SHORT)).await.unwrap();
    // Somebody else's QoS, which cannot be joined.
    switches.vsctl(
        "set port c2 qos=@q -- --id=@q create qos type=linux-noop external_ids:whose=theirs",
    );
    let before = (ours(&switches), switches.queues());
    let refused = network.reroute(wish(&LONG)).await.unwrap_err();
    assert!(refused.to_string().contains("s3:c2 already carries QoS"), "{refused}");
    assert_eq!(ours(&switches), before.0);
    assert!(!switches.queues().contains("e1 s1:a3"), "{}", switches.queues());
    let rates = network.rates().await;
    let held = rates.iter().filter(|rate| !rate.queues.is_empty()).count();
    assert_eq!(held, 3);
}

#[tokio::test]
async fn links_are_found_by_lldp_lost_after_three_probes_and_leave_no_flow() {
    let (switches, network) = diamond("discovery_interval_ms = 200").await;
    let sighting = async |switch: &str, name: &str| {
        let all = network.switches().await;
        let switch = all.into_iter().find(|s| s.name.as_str() == switch).unwrap();
        switch.ports.into_iter().find(|port| port.name == name).unwrap().sighting
    };
    eventually("every link is seen", async || {
        let all = network.switches().await;
        let mut linked = all.iter().flat_map(|s| &s.ports).filter(|port| !port.peer.is_empty());
        linked.all(|port| port.sighting == Some(Sighting::Seen))
    })
    .await;
    assert!(network.rates().await.iter().all(|rate| rate.up));
    let flows = switches.flows("s1");
    assert!(flows.contains("dl_dst=01:80:c2:00:00:0e,dl_type=0x88cc"), "{flows}");
    assert!(flows.contains("hard_timeout=2"), "{flows}");

    // A cable is pulled out and no port tells: b2 listens to nobody any more.
    let mut news = network.link_news();
    news.mark_unchanged();
    #[expect(clippy::disallowed_methods, reason = "the time itself is what is measured")]
    let begun = Instant::now();
    switches.unplug("b2");
    eventually("the link is lost", async || sighting("s1", "a2").await == Some(Sighting::Lost))
        .await;
    // Three intervals of 200 ms, and the one that had just begun; the rest is for a busy machine.
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    eventually("its ways are closed", async || {
        let rates = network.rates().await;
        rates.iter().any(|rate| rate.at == port("s1", "a2") && !rate.up)
    })
    .await;
    // It is told once it is so: whoever asks in between sees it earlier.
    eventually("it is told", async || news.has_changed().unwrap()).await;
    assert_eq!(sighting("s1", "a3").await, Some(Sighting::Seen));

    // The flow that hands probes up is a lease: it goes with the controller that renewed it.
    drop(network);
    eventually("no flow of ours remains", async || ours(&switches).is_empty()).await;
}

#[tokio::test]
async fn a_cable_in_the_wrong_port_is_named() {
    let (switches, network) = diamond("discovery_interval_ms = 200").await;
    // The two cables at s2 are exchanged.
    switches.unplug("b2");
    switches.unplug("b3");
    switches.vsctl("remove interface c2 options pstream");
    switches.vsctl("remove interface a2 options pstream");
    switches.join("a2", "b3");
    switches.join("c2", "b2");
    eventually("it is seen where it is", async || {
        let all = network.switches().await;
        let ports = all.iter().flat_map(|s| &s.ports);
        let elsewhere = ports.filter_map(|port| match &port.sighting {
            Some(Sighting::Elsewhere { at }) => Some(at.port.to_string()),
            _ => None,
        });
        let mut elsewhere: Vec<String> = elsewhere.collect();
        elsewhere.sort();
        elsewhere == ["a2", "b2", "b3", "c2"]
    })
    .await;
}

#[tokio::test]
async fn a_release_that_cannot_reach_a_database_is_pending_until_it_can() {
    let (hosts, mut fabric, listen) =
        (Switches::start().await, Switches::start().await, free_port());
    hosts.bridge("br-h1", 0xb1, &["u1"], listen);
    hosts.bridge("br-h2", 0xb2, &["u2"], listen);
    fabric.bridge("s1", 1, &["a1", "a2"], listen);
    let database = fabric.database();
    let folder = tempfile::tempdir().unwrap();
    let head = format!("openflow_listen = \"127.0.0.1:{listen}\"");
    let links = [("h1:u1", "s1:a1"), ("h2:u2", "s1:a2")];
    let fabric_config = [("s1", 1, &*database)];
    let carries = "100 Mbit/s";
    let site = site(&head, folder.path(), &hosts.database(), &fabric_config, &links, carries);
    let network = SwitchNetwork::start(&site, None);
    connected(&network).await;
    network.reserve(wish(&[("h1.br-h1", "u1"), ("s1", "a2")])).await.unwrap();
    assert!(hosts.queues().contains("e1 h1.br-h1:u1") && fabric.queues().contains("e1 s1:a2"));

    fabric.kill_server();
    eventually("it is missed", async || {
        network.switches().await.iter().any(|switch| !switch.ovsdb_connected)
    })
    .await;
    let migration = MigrationId::new("e1-m1").unwrap();
    let report = network.release(evacuation(), Some(migration.clone())).await;
    // A daemon without its database listens to nobody, so that OpenFlow may fail, too.
    assert!(!report.failures.is_empty(), "{report:?}");
    assert!(report.failures.iter().all(|failure| failure.switch.as_str() == "s1"), "{report:?}");
    // What could be reached is released already.
    assert_eq!(hosts.queues(), "");
    let pending = network.pending().await;
    assert_eq!((pending.len(), pending[0].tries), (1, 1));
    assert_eq!(pending[0].migration, Some(migration));
    let failures: Vec<String> = pending[0].failures.iter().map(|f| f.error.to_string()).collect();
    assert!(failures.join("; ").contains("OVSDB connection to switch s1"), "{failures:?}");
    eventually("it is tried again", async || network.pending().await[0].tries > 1).await;

    fabric.start_server().await;
    eventually("nothing is pending", async || network.pending().await.is_empty()).await;
    assert_eq!(fabric.queues(), "");
}
