//! What it costs the controller to read the counters of 1,000 ports each second, on real Open
//! vSwitches of type `dummy`: 20 bridges with 50 ports each, all of them ends of links.
//!
//! ```text
//!  cargo bench -p lifeboat-controller --bench polling
//! ```
//!
//! Measured is the CPU time of this process, in which nothing but the controller's network half
//! runs, over half a minute: requests, decoding, rates, saturation. ovs-vswitchd's own is shown
//! beside it. Wanted: under 10 % of a core; more ends it with 1. No test: a machine that is busy
//! with others would fail it.

#[path = "../tests/dummies/mod.rs"]
mod dummies;

use std::process::ExitCode;
use std::time::Duration;

use dummies::{Switches, connected, eventually, free_port, site};
use lifeboat_controller::network::{Network, SwitchNetwork};
use rustix::time::{ClockId, clock_gettime};

const BRIDGES: usize = 20;
const PORTS: usize = 50;
const WINDOW: Duration = Duration::from_secs(30);
const MOST_PERCENT: f64 = 10.0;

fn main() -> ExitCode {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(polling())
}

async fn polling() -> ExitCode {
    let (switches, listen) = (Switches::start().await, free_port());
    switches.bridge("br-h1", 0xb1, &["u1"], listen);
    switches.bridge("br-h2", 0xb2, &["u2"], listen);
    let names: Vec<String> = (1..=BRIDGES).map(|n| format!("s{n}")).collect();
    let links = raise(&switches, &names, listen);
    let database = switches.database();
    let fabric: Vec<_> =
        names.iter().zip(1..).map(|(name, id)| (name.as_str(), id, &*database)).collect();
    let joined: Vec<_> = links.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let folder = tempfile::tempdir().expect("a folder");
    let head = format!("openflow_listen = \"127.0.0.1:{listen}\"");
    let site = site(&head, folder.path(), &database, &fabric, &joined, "1 Gbit/s");
    let network = SwitchNetwork::start(&site, None);
    connected(&network).await;
    eventually("all rates are known", async || {
        let switches = network.switches().await;
        let ports = switches.iter().flat_map(|switch| &switch.ports);
        ports.filter(|port| !port.peer.is_empty()).all(|port| port.transmitted.is_some())
    })
    .await;
    let percent = of_a_core(&switches).await;
    println!("{} ports each second: {percent:.2} % of a core", BRIDGES * PORTS);
    if percent < MOST_PERCENT { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Every port is an end of a link to the neighbour; the hosts have two of them.
fn raise(switches: &Switches, names: &[String], listen: u16) -> Vec<(String, String)> {
    let mut links = Vec::new();
    for (at, name) in names.iter().enumerate() {
        let ports: Vec<String> = (1..=PORTS).map(|port| format!("{name}p{port}")).collect();
        let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
        switches.bridge(name, at as u64 + 1, &ports, listen);
    }
    for pair in names.chunks_exact(2) {
        links.extend(
            (2..=PORTS).map(|n| (format!("{0}:{0}p{n}", pair[0]), format!("{0}:{0}p{n}", pair[1]))),
        );
    }
    // The first ports are for the hosts, and join pairs to a ring.
    links.push(("h1:u1".to_owned(), "s1:s1p1".to_owned()));
    links.push((format!("{0}:{0}p1", names[BRIDGES - 1]), "h2:u2".to_owned()));
    for pair in names[1..BRIDGES - 1].chunks_exact(2) {
        links.push((format!("{0}:{0}p1", pair[0]), format!("{0}:{0}p1", pair[1])));
    }
    links
}

async fn of_a_core(switches: &Switches) -> f64 {
    let (began, theirs) = (times(), switches.switch_cpu());
    tokio::time::sleep(WINDOW).await;
    let (ended, theirs) = (times(), switches.switch_cpu() - theirs);
    let wall = ended.0 - began.0;
    println!("ovs-vswitchd meanwhile: {:.2} % of a core", theirs / wall * 100.0);
    (ended.1 - began.1) / wall * 100.0
}

/// Time that has passed, and CPU time of this process, in seconds.
fn times() -> (f64, f64) {
    let seconds = |clock| {
        let time = clock_gettime(clock);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    };
    (seconds(ClockId::Monotonic), seconds(ClockId::ProcessCPUTime))
}
