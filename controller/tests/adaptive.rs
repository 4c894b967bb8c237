//! Algorithm 1 each second, over a real Open vSwitch with real HTB queues and counters: a migration
//! that sends nothing gives back what an application wants, and has it again when that is over.

#[allow(dead_code, unused_imports, reason = "counting switches are for other tests")]
mod cloud;
#[allow(dead_code, reason = "each test program uses a part of this")]
mod network_rig;

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Duration;

use cloud::Cloud;
use lifeboat_controller::daemon::Daemon;
use lifeboat_controller::driver::Patience;
use lifeboat_controller::network::{Classifiers, SwitchNetwork};
use lifeboat_controller::service::{Caller, Service};
use lifeboat_protocol::controller::{EvacuateRequest, EvacuationStatus};
use network_rig::{Recorder, Rig, connected, eventually, tool};

async fn status(service: &Service, id: &str) -> EvacuationStatus {
    service.status(id).await.unwrap().evacuations.into_iter().next().unwrap()
}

/// What is reserved on each port of the way, kbit/s.
async fn reserved(service: &Service, id: &str) -> Vec<u64> {
    let held = status(service, id).await.reservations;
    held.iter().map(|held| held.reserved_bits_per_sec / 1000).collect()
}

#[tokio::test]
async fn a_reservation_follows_what_passes_on_the_links() {
    let rig = Rig::start().await;
    let cloud = Cloud::new(2, &["vm1"]);
    cloud.truth().frozen = true;
    let folder = cloud.dir.path().display();
    let mut text = rig.text().replace("/nonexistent", &format!("{folder}/state"));
    for n in 1..=2 {
        let (tcp, unix) = (format!("127.0.0.1:700{n}"), format!("unix:{folder}/h{n}.sock"));
        text = text.replace(&tcp, &unix);
    }
    let text = text.replace("100 Mbit/s", "1 Mbit/s")
        + "[policy]\nfloor_at_least = \"1 kbit/s\"\nthreshold = 0.1\n";
    let site = Rig::read(&text);
    let network = SwitchNetwork::start(&site, None);
    network.meet(Arc::new(Recorder::default()) as Arc<dyn Classifiers>);
    connected(&network).await;
    let daemon = Daemon::start(site, Arc::new(network), Patience::default()).unwrap();
    let service = Arc::clone(&daemon.service);
    eventually("agents and links are known", async || {
        let links = service.links().await.links;
        service.inventory.hosts().values().all(|entry| entry.connected)
            && links.iter().all(|link| link.rate_known)
    })
    .await;

    let request = EvacuateRequest {
        hosts: vec!["h1".to_owned()],
        urgency: Some(30),
        ..EvacuateRequest::default()
    };
    let caller = Caller { name: "test".to_owned(), by: "test" };
    let id = service.evacuate(&request, &caller).await.unwrap().evacuation;
    // All but the floor of 5 % is available (lines 2-4), and so it stays while nobody wants it.
    eventually("it begins", async || {
        reserved(&service, &id).await == [950, 950]
            && tool("tc class show dev d2").contains("rate 950Kbit")
    })
    .await;

    // An application fills both links: what the migration does not use is given back (13-14).
    tool("ip address add 10.7.0.1/24 dev br-h1");
    tool("ip link set br-h1 up");
    tool("ip neighbour add 10.7.0.2 lladdr 02:00:00:00:00:02 dev br-h1 nud permanent");
    let application = UdpSocket::bind("10.7.0.1:0").unwrap();
    let mut given_back = false;
    for _ in 0..1500 {
        // 2,800 bytes each 10 ms: about twice what the links carry.
        for _ in 0..2 {
            application.send_to(&[0; 1400], "10.7.0.2:9").unwrap();
        }
        tokio::time::sleep(Duration::from_millis(9)).await;
        // What is reserved is known before the switch has set its queues to it, which takes it moments.
        if reserved(&service, &id).await == [10, 10]
            && tool("tc class show dev d2").contains("rate 990Kbit")
        {
            given_back = true;
            break;
        }
    }
    assert!(
        given_back,
        "{:?} {:?} {}",
        reserved(&service, &id).await,
        service.links().await.links,
        tool("tc class show dev d2")
    );

    // It is quiet again, and the reservation grows back (9-10).
    eventually("it has grown", async || reserved(&service, &id).await == [950, 950]).await;
    cloud.truth().frozen = false;
    eventually("it has ended", async || status(&service, &id).await.state == "done").await;
    assert!(!tool("tc class show dev d2").contains("htb"), "a queue remains");
}
