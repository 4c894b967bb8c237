//! A whole controller over real Open vSwitches of type `dummy`, with agents that only play: what a
//! running migration's reservation begins with, what it does when links go down, and what is told
//! of it.
//!
//! ```text
//!  h1 br-h1 u1 ═ a1 s1 a2 ═════ b2 s2 b1 ═ u2 br-h2 h2
//!                   a3 ═ c1 s3 c2 ═ b3
//! ```

#[allow(dead_code, unused_imports, reason = "counting switches are for other tests")]
mod cloud;
mod dummies;

use std::sync::Arc;
use std::time::{Duration, Instant};

use cloud::Cloud;
use dummies::{Switches, connected, eventually, free_port, site};
use lifeboat_controller::daemon::Daemon;
use lifeboat_controller::driver::Patience;
use lifeboat_controller::network::{Network, SwitchNetwork};
use lifeboat_controller::service::{Caller, Service};
use lifeboat_controller::{metrics, tasks};
use lifeboat_protocol::controller::{EvacuateRequest, EvacuationStatus};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const LINKS: [(&str, &str); 5] = [
    ("h1:u1", "s1:a1"),
    ("h2:u2", "s2:b1"),
    ("s1:a2", "s2:b2"),
    ("s1:a3", "s3:c1"),
    ("s3:c2", "s2:b3"),
];

struct World {
    switches: Switches,
    cloud: Cloud,
    service: Arc<Service>,
    _daemon: Daemon,
}

impl World {
    /// Two hosts, one VM at h1, all links of `capacity`.
    async fn start(capacity: &str, policy: &str) -> Self {
        let (switches, listen) = Switches::diamond(&LINKS).await;
        let cloud = Cloud::new(2, &["vm1"]);
        cloud.truth().frozen = true;
        let database = switches.database();
        let fabric = [("s1", 1, &*database), ("s2", 2, &*database), ("s3", 3, &*database)];
        let head = format!("openflow_listen = \"127.0.0.1:{listen}\"\n[policy]\n{policy}");
        let site = site(&head, cloud.dir.path(), &database, &fabric, &LINKS, capacity);
        let network: Arc<dyn Network> = Arc::new(SwitchNetwork::start(&site, None));
        connected(&*network).await;
        let daemon = Daemon::start(site, network, Patience::default()).unwrap();
        let service = Arc::clone(&daemon.service);
        eventually("both agents are connected", async || {
            service.inventory.hosts().values().all(|entry| entry.connected)
        })
        .await;
        Self { switches, cloud, service, _daemon: daemon }
    }

    /// Begins to empty h1 and waits until pages are sent.
    async fn evacuate(&self, request: EvacuateRequest) -> String {
        let request =
            EvacuateRequest { hosts: vec!["h1".to_owned()], urgency: Some(30), ..request };
        let caller = Caller { name: "test".to_owned(), by: "test" };
        let id = self.service.evacuate(&request, &caller).await.unwrap().evacuation;
        eventually("pages are sent", async || {
            self.status(&id).await.migrations[0].phase == "memory-copy"
                || self.status(&id).await.migrations[0].bytes_total > 0
        })
        .await;
        id
    }

    async fn status(&self, id: &str) -> EvacuationStatus {
        let reply = self.service.status(id).await.unwrap();
        reply.evacuations.into_iter().next().unwrap()
    }

    /// The ports on which something is reserved, and how much (kbit/s) of the first.
    async fn reserved(&self, id: &str) -> (String, u64) {
        let held = self.status(id).await.reservations;
        let ports: Vec<&str> = held.iter().map(|held| held.port.as_str()).collect();
        let rate = held.first().map_or(0, |held| held.reserved_bits_per_sec / 1000);
        (ports.join(" "), rate)
    }

    /// Lets the migration go on, and sees that nothing remains.
    async fn to_the_end(&self, id: &str) {
        self.cloud.truth().frozen = false;
        eventually("it has ended", async || self.status(id).await.state == "done").await;
        assert_eq!(self.switches.queues(), "");
        for bridge in ["br-h1", "br-h2", "s1", "s2", "s3"] {
            let flows = self.switches.flows(bridge);
            assert!(!flows.contains("cookie=0x4c42"), "{bridge}: {flows}");
        }
        assert_eq!(self.cloud.truth().violations, Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_whose_link_goes_down_takes_another_way_within_a_second_or_says_what_cuts_it() {
    let world = World::start("100 Mbit/s", "").await;
    let id =
        world.evacuate(EvacuateRequest { fixed: Some(true), ..EvacuateRequest::default() }).await;
    assert_eq!(world.reserved(&id).await, ("u1 a2 b1".to_owned(), 30_000));

    #[expect(clippy::disallowed_methods, reason = "the time itself is what is measured")]
    let begun = Instant::now();
    world.switches.set_port("a2", "down");
    eventually("it is on the other way", async || world.reserved(&id).await.0 == "u1 a3 b1 c2")
        .await;
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    let flows = world.switches.flows("s1");
    assert!(flows.contains(&format!("output:{}", world.switches.number("a3"))), "{flows}");

    world.switches.set_port("c1", "down");
    eventually("it says what cuts it", async || {
        let reason = world.status(&id).await.migrations[0].reason.clone();
        reason.contains("there is no other") && reason.contains("s1 port a2")
    })
    .await;
    world.switches.set_port("a2", "up");
    eventually("it is on the first way again", async || world.reserved(&id).await.0 == "u1 a2 b1")
        .await;
    assert_eq!(world.status(&id).await.migrations[0].reason, "");
    world.to_the_end(&id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adaptive_reservation_begins_with_all_that_is_available_but_the_floor() {
    let world = World::start("100 kbit/s", "floor_at_least = \"1 kbit/s\"").await;
    eventually("all links are known", async || {
        world.service.links().await.links.iter().all(|link| link.rate_known)
    })
    .await;
    let id = world.evacuate(EvacuateRequest::default()).await;
    // Nothing else passes: all but the floor is available (lines 2-4).
    assert_eq!(world.reserved(&id).await, ("u1 a2 b1".to_owned(), 95));
    let links = world.service.links().await.links;
    let a2 = links.iter().find(|link| link.port == "a2").unwrap();
    assert_eq!((a2.queues[0].urgency, a2.queues[0].kind.as_str()), (30, "borrow"));
    assert_eq!(a2.queues[0].migrations, [format!("{id}-m1")]);

    world.to_the_end(&id).await;
}

/// A request's whole answer, over a connection of its own.
async fn ask(port: u16, request: &str) -> String {
    let request = format!("{request}\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    for _ in 0..100 {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        return answer;
    }
    panic!("nobody listens on {port}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prometheus_reads_what_operators_see_and_nothing_else_is_served() {
    let world = World::start("100 Mbit/s", "").await;
    let port = free_port();
    let serving = metrics::serve(Arc::clone(&world.service), ([127, 0, 0, 1], port).into());
    let serving = tasks::spawn(serving);
    let id = world.evacuate(EvacuateRequest::default()).await;
    let answer = ask(port, "GET /metrics HTTP/1.1").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    assert!(answer.contains("text/plain; version=0.0.4"), "{answer}");
    let up = r#"lifeboat_link_up{switch="s1",port="a2",peer="s2:b2"} 1"#;
    assert!(answer.contains(up), "{answer}");
    let reserved = format!(
        "lifeboat_reservation_bits_per_second{{evacuation=\"{id}\",switch=\"s1\",port=\"a2\"}}"
    );
    assert!(answer.contains(&reserved), "{answer}");
    assert!(answer.contains(r#"lifeboat_switch_connected{switch="s3",protocol="ovsdb"} 1"#));
    assert!(ask(port, "GET / HTTP/1.1").await.starts_with("HTTP/1.1 404"));
    assert!(ask(port, "POST /metrics HTTP/1.1").await.starts_with("HTTP/1.1 405"));
    assert!(ask(port, "nonsense").await.starts_with("HTTP/1.1 400"));
    serving.abort();
    world.to_the_end(&id).await;
}
