//! A store against what Redis itself can do, in turn in one run: pages put over one connection of the
//! loopback interface, in sealed packs, against `redis-benchmark` with values of that size; and the wait
//! for single pages on a connection of their own while packs are fetched.
//! `cargo bench -p lifeboat-scatter-gather --bench store`.
//!
//! redis-server and redis-benchmark have to be installed. Prints one line per measurement, ends with
//! a line for each bound that is promised, and with 1 where one is broken.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units::Bytes;
use lifeboat_scatter_gather::pack::{Batch, Coder, PackBuilder, Width, pack_bytes_most};
use lifeboat_scatter_gather::page::{PAGE_BYTES, PackId, PageAt};
use lifeboat_scatter_gather::seal::{KEY_BYTES, MigrationKey, MigrationTag};
use lifeboat_scatter_gather::store::{
    KeySpace, Launch, Login, RedisStore, Secret, Settings, StoreServer, User,
};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const PATIENCE: Duration = Duration::from_secs(30);
/// Packs of one run: 500 MB.
const PACKS: u64 = 2000;
/// Packs that are under way at once.
const UNDER_WAY: usize = 8;
const DEMANDS: u64 = 5000;
/// How often each has its turn.
const TURNS: usize = 5;
/// What share of `redis-benchmark`'s rate pages have to go in at.
const LEAST: f64 = 0.8;

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn now() -> Instant {
    Instant::now()
}

/// A store to be: its settings, and where it is reached.
struct Rig {
    settings: Settings,
    address: SocketAddr,
}

async fn connect(Rig { settings, address }: &Rig) -> RedisStore {
    let stream = TcpStream::connect(address).await.expect("the store listens");
    stream.set_nodelay(true).expect("a TCP socket");
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

/// Puts pages: packs are filled and sealed here while those before are under way. Packs per second.
async fn pages(store: &RedisStore, memory: &[u8]) -> f64 {
    let tag = MigrationTag::new(&MigrationId::new("bench").expect("a short name"));
    let sealer = MigrationKey::new([7; KEY_BYTES]).into_sealers(tag, 1).remove(0);
    let mut builder = PackBuilder::new(tag, Batch::default(), Coder::Sealed(sealer), PackId(0));
    let (start, mut under_way, mut put) = (now(), JoinSet::new(), 0);
    let pages = (0..).zip(memory.chunks_exact(PAGE_BYTES)).cycle();
    for (page, data) in pages {
        builder.page(PageAt { block: 0, page }, data).expect("a page");
        let Some(pack) = builder.is_full().then(|| builder.finish()).flatten() else { continue };
        if under_way.len() == UNDER_WAY {
            under_way.join_next().await;
        }
        let store = store.clone();
        under_way.spawn(async move {
            let key = store.keys().pack(pack.id);
            store.put(&key, &pack.bytes).await.expect("there is room");
        });
        put += 1;
        if put == PACKS {
            break;
        }
    }
    while under_way.join_next().await.is_some() {}
    PACKS as f64 / start.elapsed().as_secs_f64()
}

/// What redis-benchmark reaches with values of `bytes` bytes: sets per second.
fn benchmark(Rig { settings, address }: &Rig, bytes: usize) -> Option<f64> {
    let output = Command::new("redis-benchmark")
        .args(["-h", &address.ip().to_string(), "-p", &address.port().to_string()])
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
        let part = store
            .get_part(&key, Width::WHOLE.slot_offset(20, true), Width::WHOLE.slot_bytes(true))
            .await;
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

async fn start(Rig { settings, address }: &Rig) -> StoreServer {
    let launch = Launch { program: Path::new("redis-server"), user: None, plain: Some(*address) };
    let server = StoreServer::launch(launch, settings, PATIENCE).await;
    server.expect("redis-server is installed")
}

async fn stop(server: StoreServer) {
    server.stop(PATIENCE).await.expect("the store ends");
}

/// Rates of one turn by redis-benchmark's.
struct Shares {
    pages: f64,
    packs: f64,
}

/// All of them into a server whose memory nobody has touched yet, as in a migration.
async fn compare(rig: &Rig, bytes: &Arc<Vec<u8>>, memory: &[u8]) -> Shares {
    let server = start(rig).await;
    let bare = benchmark(rig, bytes.len()).expect("redis-benchmark is installed");
    stop(server).await;
    let server = start(rig).await;
    let whole = pages(&connect(rig).await, memory).await;
    stop(server).await;
    let server = start(rig).await;
    let store = connect(rig).await;
    let empty = store.usage().await.expect("the owner may ask").used;
    let put = packs(&store, bytes, true).await;
    let used = store.usage().await.expect("the owner may ask").used - empty;
    let get = packs(&store, bytes, false).await;
    let mib = bytes.len() as f64 / f64::from(1 << 20);
    let beside = used.0 as f64 / (PACKS as f64 * bytes.len() as f64) - 1.0;
    println!("redis-benchmark sets {:.0} MiB/s", bare * mib);
    println!("pages, sealed and put {:.0} MiB/s: {:.2}", whole * mib, whole / bare);
    println!("packs that are ready, put {:.0} MiB/s: {:.2}", put * mib, put / bare);
    println!("packs fetched {:.0} MiB/s", get * mib);
    println!("memory beside the packs {:.2} %", beside * 100.0);
    stop(server).await;
    Shares { pages: whole / bare, packs: put / bare }
}

async fn wait_for_pages(rig: &Rig, bytes: &Arc<Vec<u8>>) {
    let server = start(rig).await;
    let (store, own) = (connect(rig).await, connect(rig).await);
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

/// A bound on the median of the turns, and whether it holds.
fn judge(what: &str, turns: &[Shares], share: fn(&Shares) -> f64) -> bool {
    let mut shares: Vec<f64> = turns.iter().map(share).collect();
    shares.sort_by(f64::total_cmp);
    let median = shares[shares.len() / 2];
    let verdict = if median >= LEAST { "holds" } else { "broken" };
    println!(
        "bound {what}: at least {LEAST:.2} of redis-benchmark's rate, measured {median:.2}: {verdict}"
    );
    median >= LEAST
}

/// 16 MiB that are not zero.
fn memory() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..2 << 20).flat_map(|_| next()).collect()
}

fn main() -> ExitCode {
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
    let free = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
    let rig = Rig { settings, address: free.expect("the loopback interface is up") };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let bytes = Arc::new(vec![7; pack_bytes_most(Batch::default(), true)]);
    let memory = memory();
    let mut turns = Vec::new();
    runtime.block_on(async {
        for _ in 0..TURNS {
            turns.push(compare(&rig, &bytes, &memory).await);
        }
        wait_for_pages(&rig, &bytes).await;
    });
    let hold = [
        judge("pages, sealed and put", &turns, |turn| turn.pages),
        judge("packs that are ready, put", &turns, |turn| turn.packs),
    ];
    match hold.iter().all(|holds| *holds) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
