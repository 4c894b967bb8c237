//! A store against what Redis itself can do, in turn in one run: packs put over one connection
//! against `redis-benchmark` with values of that size, and the wait for single pages on a connection
//! of their own while packs are put and fetched. `cargo bench -p lifeboat-scatter-gather --bench store`.
//!
//! redis-server and redis-benchmark have to be installed. Prints one line per measurement.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units::Bytes;
use lifeboat_scatter_gather::pack::{Batch, pack_bytes_most, slot_bytes, slot_offset};
use lifeboat_scatter_gather::page::PackId;
use lifeboat_scatter_gather::store::{
    KeySpace, Login, RedisStore, Secret, Settings, StoreServer, User,
};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

const PATIENCE: Duration = Duration::from_secs(30);
/// Packs of one run: 500 MB.
const PACKS: u64 = 2000;
/// Packs that are under way at once.
const UNDER_WAY: usize = 8;
const DEMANDS: u64 = 5000;

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn now() -> Instant {
    Instant::now()
}

async fn connect(settings: &Settings) -> RedisStore {
    let stream = UnixStream::connect(settings.socket()).await.expect("the store listens");
    let keys = settings.keys.clone();
    let login = Login { user: settings.owner.clone(), keys, patience: PATIENCE, expected: None };
    RedisStore::connect(stream, &login).await.expect("the owner may come in")
}

/// Puts or gets packs, several under way; returns packs per second.
async fn packs(store: &RedisStore, bytes: &Arc<Vec<u8>>, put: bool) -> f64 {
    let (start, mut under_way) = (now(), JoinSet::new());
    for number in 0..PACKS {
        if under_way.len() == UNDER_WAY {
            under_way.join_next().await;
        }
        let (store, bytes) = (store.clone(), Arc::clone(bytes));
        under_way.spawn(async move {
            let key = store.keys().pack(PackId(number));
            match put {
                true => store.put(&key, &bytes).await.expect("there is room"),
                false => drop(store.get(&key).await.expect("it was put")),
            }
        });
    }
    while under_way.join_next().await.is_some() {}
    PACKS as f64 / start.elapsed().as_secs_f64()
}

/// What redis-benchmark reaches with values of `bytes` bytes: sets per second.
fn benchmark(settings: &Settings, bytes: usize) -> Option<f64> {
    let output = Command::new("redis-benchmark")
        .arg("-s")
        .arg(settings.socket())
        .args(["--user", &settings.owner.name, "-a", settings.owner.secret.reveal()])
        .args(["-t", "set", "-c", "1", "-r", "1000000", "--csv"])
        .args(["-d", &bytes.to_string(), "-n", &PACKS.to_string()])
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find(|line| line.starts_with("\"SET\""))?;
    line.split(',').nth(1)?.trim_matches('"').parse().ok()
}

/// Fetches single pages one after the other; returns each wait, ascending.
async fn demands(store: &RedisStore) -> Vec<Duration> {
    let mut waits = Vec::new();
    for number in 0..DEMANDS {
        let key = store.keys().pack(PackId(number * 7919 % PACKS));
        let start = now();
        let part = store.get_part(&key, slot_offset(20, true), slot_bytes(true)).await;
        part.expect("it was put");
        waits.push(start.elapsed());
    }
    waits.sort_unstable();
    waits
}

fn show(name: &str, waits: &[Duration]) {
    let at = |share: usize| waits[(waits.len() - 1) * share / 100].as_secs_f64() * 1e6;
    println!("{name}: p50 {:.0} us, p99 {:.0} us, most {:.0} us", at(50), at(99), at(100));
}

async fn start(settings: &Settings) -> StoreServer {
    let server = StoreServer::start(Path::new("redis-server"), settings, PATIENCE).await;
    server.expect("redis-server is installed")
}

async fn stop(server: StoreServer) {
    server.stop(PATIENCE).await.expect("the store ends");
}

/// Both into a server whose memory nobody has touched yet, as in a migration.
async fn compare(settings: &Settings, bytes: &Arc<Vec<u8>>) {
    let server = start(settings).await;
    let bare = benchmark(settings, bytes.len());
    stop(server).await;
    let server = start(settings).await;
    let store = connect(settings).await;
    let empty = store.usage().await.expect("the owner may ask").used;
    let put = packs(&store, bytes, true).await;
    let used = store.usage().await.expect("the owner may ask").used - empty;
    let get = packs(&store, bytes, false).await;
    let mib = bytes.len() as f64 / f64::from(1 << 20);
    let beside = used.0 as f64 / (PACKS as f64 * bytes.len() as f64) - 1.0;
    println!("put {:.0} MiB/s, get {:.0} MiB/s", put * mib, get * mib);
    println!("memory beside the packs {:.2} %", beside * 100.0);
    match bare {
        Some(bare) => println!("redis-benchmark {:.0} MiB/s: {:.2}", bare * mib, put / bare),
        None => println!("redis-benchmark gave no figure"),
    }
    stop(server).await;
}

async fn wait_for_pages(settings: &Settings, bytes: &Arc<Vec<u8>>) {
    let server = start(settings).await;
    let (store, own) = (connect(settings).await, connect(settings).await);
    packs(&store, bytes, true).await;
    show("one page, nothing else", &demands(&own).await);
    let mut beside = JoinSet::new();
    beside.spawn(async move {
        loop {
            for number in 0..PACKS {
                let key = store.keys().pack(PackId(number));
                drop(store.get(&key).await.expect("it was put"));
            }
        }
    });
    show("one page beside the background, own connection", &demands(&own).await);
    beside.shutdown().await;
    stop(server).await;
}

fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    let user = |name: &str, byte| User { name: name.to_owned(), secret: Secret::new(&[byte; 32]) };
    let settings = Settings {
        folder: folder.path().to_owned(),
        room: Bytes::from_mib(1024),
        keys: KeySpace::new(&MigrationId::new("bench").expect("a short name")),
        owner: user("owner", 1),
        migration: user("bench", 2),
        tls: None,
    };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let bytes = Arc::new(vec![7; pack_bytes_most(Batch::default(), true)]);
    runtime.block_on(async {
        for _ in 0..3 {
            compare(&settings, &bytes).await;
        }
        wait_for_pages(&settings, &bytes).await;
    });
}
