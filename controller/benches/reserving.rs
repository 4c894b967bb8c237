//! How long a reservation over a path of N switches takes, from request to the last barrier's reply,
//! and how long a change of its rate does; on real Open vSwitches of type `dummy`.
//!
//! ```text
//!  cargo bench -p lifeboat-controller --bench reserving
//!
//!  br-h1 u1 ═ l1 s1 r1 ═ l2 s2 r2 ═ .. ═ lN sN rN ═ u2 br-h2
//! ```
//!
//! Each answer is waited for as in an evacuation: queue rows until `cur_cfg` has caught up, then
//! flows, then a barrier. A dummy's queues are rows only: the milliseconds that `tc` takes for each
//! on a real port are not in it. Wanted at five switches:
//! under 100 ms, and under 20 ms for a change.

#[path = "../tests/dummies/mod.rs"]
mod dummies;

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use dummies::{Switches, connected, free_port, port, site};
use lifeboat_controller::network::{
    Adjustment, Hop, Network, PageFlow, ReservationRequest, SwitchNetwork,
};
use lifeboat_protocol::ids::{EvacuationId, MigrationId};
use lifeboat_protocol::terms::{ReservationKind, Urgency};
use lifeboat_protocol::units::BitsPerSec;
use tokio::runtime::Runtime;

const SWITCHES: [usize; 4] = [1, 5, 20, 50];

struct Chain {
    network: SwitchNetwork,
    /// In the order of the path: the source's uplink, then each switch's way on.
    ports: Vec<(String, String)>,
    _switches: Switches,
}

impl Chain {
    async fn raise(length: usize) -> Self {
        let (switches, listen) = (Switches::start().await, free_port());
        switches.bridge("br-h1", 0xb1, &["u1"], listen);
        switches.bridge("br-h2", 0xb2, &["u2"], listen);
        let database = switches.database();
        let names: Vec<String> = (1..=length).map(|n| format!("s{n}")).collect();
        let mut links = vec![("h1:u1".to_owned(), "s1:l1".to_owned())];
        for n in 1..=length {
            let (left, right) = (format!("l{n}"), format!("r{n}"));
            switches.bridge(&names[n - 1], n as u64, &[&left, &right], listen);
            let far = if n == length { "h2:u2".to_owned() } else { format!("s{0}:l{0}", n + 1) };
            links.push((format!("s{n}:{right}"), far));
        }
        let fabric: Vec<_> =
            names.iter().zip(1..).map(|(name, id)| (name.as_str(), id, &*database)).collect();
        let joined: Vec<_> = links.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        let folder = tempfile::tempdir().unwrap();
        let head = format!("openflow_listen = \"127.0.0.1:{listen}\"");
        let site = site(&head, folder.path(), &database, &fabric, &joined, "100 Mbit/s");
        let network = SwitchNetwork::start(&site, None);
        connected(&network).await;
        let on = (1..=length).map(|n| (format!("s{n}"), format!("r{n}")));
        let ports = std::iter::once(("h1.br-h1".to_owned(), "u1".to_owned())).chain(on).collect();
        Self { network, ports, _switches: switches }
    }

    fn wish(&self) -> ReservationRequest {
        let hop = |(switch, name): &(String, String)| Hop {
            at: port(switch, name),
            capacity: BitsPerSec::from_mbit(100),
            rate: BitsPerSec::from_mbit(60),
        };
        ReservationRequest {
            evacuation: evacuation(),
            migration: MigrationId::new("e1-m1").unwrap(),
            urgency: Urgency::new(60).unwrap(),
            kind: ReservationKind::Borrow,
            hops: self.ports.iter().map(hop).collect(),
            traffic: PageFlow {
                source: [10, 0, 0, 1].into(),
                destination: ([10, 0, 0, 2], 7445).into(),
                served: false,
            },
        }
    }

    async fn reserve(&self) -> Duration {
        let begun = now();
        self.network.reserve(self.wish()).await.unwrap();
        let took = begun.elapsed();
        let released = self.network.release(evacuation(), None).await;
        assert!(released.failures.is_empty(), "{:?}", released.failures);
        took
    }

    async fn adjust(&self, mbit: u64) -> Duration {
        let rate = BitsPerSec::from_mbit(mbit);
        let ports = self.ports.iter().map(|(switch, name)| (port(switch, name), rate)).collect();
        let begun = now();
        self.network.adjust(Adjustment { evacuation: evacuation(), ports }).await.unwrap();
        begun.elapsed()
    }
}

fn evacuation() -> EvacuationId {
    EvacuationId::new("e1").unwrap()
}

#[expect(clippy::disallowed_methods, reason = "the time itself is what is measured")]
fn now() -> Instant {
    Instant::now()
}

fn reserving(criterion: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    for length in SWITCHES {
        let chain = runtime.block_on(Chain::raise(length));
        let mut group = criterion.benchmark_group("reservation");
        group.sample_size(20).measurement_time(Duration::from_secs(5));
        group.bench_function(BenchmarkId::new("set up, switches", length), |bencher| {
            bencher.iter_custom(|times| {
                runtime.block_on(async {
                    let mut all = Duration::ZERO;
                    for _ in 0..times {
                        all += chain.reserve().await;
                    }
                    all
                })
            });
        });
        runtime.block_on(chain.network.reserve(chain.wish())).unwrap();
        group.bench_function(BenchmarkId::new("change rate, switches", length), |bencher| {
            bencher.iter_custom(|times| {
                runtime.block_on(async {
                    let mut all = Duration::ZERO;
                    for turn in 0..times {
                        // Never twice the same: a rate that is there already is not written.
                        all += chain.adjust(20 + turn % 2 * 30).await;
                    }
                    all
                })
            });
        });
        group.finish();
    }
}

criterion_group!(benches, reserving);
criterion_main!(benches);
