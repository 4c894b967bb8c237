//! Stores for real: redis-server is started, filled, killed and restarted. It has to be installed.
//!
//! Each test has servers of its own in folders of its own, on Unix sockets, and ends them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use bytes::{Bytes as Slice, BytesMut};
use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units::{Bytes, BytesPerSec};
use lifeboat_scatter_gather::ledger::{Ledger, Placing, Where};
use lifeboat_scatter_gather::pack::{Batch, Coder, Pack, PackBuilder, Reading, Width};
use lifeboat_scatter_gather::page::{PAGE_BYTES, PackId, PageAt};
use lifeboat_scatter_gather::redundancy::directory::{Directory, Protection, Way};
use lifeboat_scatter_gather::redundancy::parity::{Parity, Stripe, body_offset, restore};
use lifeboat_scatter_gather::redundancy::placement::{Offer, Placer};
use lifeboat_scatter_gather::redundancy::{Redundancy, StoreId, StoreSet};
use lifeboat_scatter_gather::seal::{KEY_BYTES, MigrationKey, MigrationTag};
use lifeboat_scatter_gather::store::{
    KeySpace, Login, RedisStore, RunId, Secret, ServerError, Settings, StoreError, StoreServer,
    User,
};
use tempfile::TempDir;
use tokio::net::UnixStream;

const PATIENCE: Duration = Duration::from_secs(20);
const PROGRAM: &str = "redis-server";

struct Host {
    /// Held until the host is gone.
    _folder: TempDir,
    settings: Settings,
    server: Option<StoreServer>,
}

fn migration() -> MigrationId {
    MigrationId::new("m1").unwrap()
}

fn user(name: &str, byte: u8) -> User {
    User { name: name.to_owned(), secret: Secret::new(&[byte; 32]) }
}

/// A test that fails leaves no server behind.
impl Drop for Host {
    fn drop(&mut self) {
        if let Some(server) = &self.server {
            kill(server.process());
        }
    }
}

fn kill(process: u32) {
    let done = std::process::Command::new("kill").args(["-9", &process.to_string()]).status();
    assert!(done.is_ok_and(|status| status.success()), "process {process} cannot be ended");
}

impl Host {
    async fn start(room: Bytes) -> Self {
        let folder = TempDir::new().unwrap();
        let settings = Settings {
            folder: folder.path().to_owned(),
            room,
            keys: KeySpace::new(&migration()),
            owner: user("owner", 1),
            migration: user("m1", 2),
            tls: None,
        };
        let server = StoreServer::start(Path::new(PROGRAM), &settings, PATIENCE).await;
        Self { _folder: folder, settings, server: Some(server.expect("redis-server is installed")) }
    }

    async fn again(&mut self) {
        let server = StoreServer::start(Path::new(PROGRAM), &self.settings, PATIENCE).await;
        self.server = Some(server.unwrap());
    }

    async fn try_connect(
        &self,
        user: &User,
        expected: Option<RunId>,
    ) -> Result<RedisStore, StoreError> {
        let stream = UnixStream::connect(self.settings.socket()).await.unwrap();
        let keys = self.settings.keys.clone();
        let login = Login { user: user.clone(), keys, patience: PATIENCE, expected };
        RedisStore::connect(stream, &login).await
    }

    async fn connect(&self) -> RedisStore {
        self.try_connect(&self.settings.migration, None).await.unwrap()
    }

    /// As a host loses power: no goodbye.
    async fn kill(&mut self) {
        let mut server = self.server.take().unwrap();
        let status =
            std::process::Command::new("kill").args(["-9", &server.process().to_string()]).status();
        assert!(status.unwrap().success());
        server.ended().await;
    }

    async fn end(mut self) {
        if let Some(server) = self.server.take() {
            server.stop(PATIENCE).await.unwrap();
        }
    }
}

#[tokio::test]
async fn what_a_store_acknowledged_comes_back_whole_and_in_parts() {
    let host = Host::start(Bytes::from_mib(64)).await;
    let store = host.connect().await;
    let key = store.keys().pack(PackId(1));
    assert!(matches!(store.get(&key).await, Err(StoreError::Missing(_))));
    assert!(matches!(store.get_part(&key, 0, 9).await, Err(StoreError::Missing(_))));
    let bytes: Vec<u8> = (0..200_000_u32).map(|n| n as u8).collect();
    store.put(&key, &bytes).await.unwrap();
    assert_eq!(store.get(&key).await.unwrap(), bytes);
    assert_eq!(store.get_part(&key, 1000, 50).await.unwrap(), bytes[1000..1050]);
    store.put(&store.keys().parity(0), b"x").await.unwrap();
    assert_eq!(store.packs().await.unwrap(), [PackId(1)]);
    store.remove(&[key.clone(), store.keys().pack(PackId(9))]).await.unwrap();
    assert!(store.get(&key).await.unwrap_err().is_loss());
    host.end().await;
}

#[tokio::test]
async fn a_full_store_says_so_and_keeps_what_it_has() {
    let host = Host::start(Bytes::from_mib(8)).await;
    let store = host.connect().await;
    let bytes = vec![7; 1 << 20];
    let mut put = 0;
    let full = loop {
        match store.put(&store.keys().pack(PackId(put)), &bytes).await {
            Ok(()) => put += 1,
            Err(error) => break error,
        }
        assert!(put < 1000, "the store has no limit");
    };
    assert!(matches!(full, StoreError::Full(_)), "{full}");
    assert!(put >= 8, "only {put} MiB fit into a store of 8");
    for pack in 0..put {
        let found = store.get(&store.keys().pack(PackId(pack))).await.unwrap();
        assert_eq!(found.len(), bytes.len());
    }
    host.end().await;
}

#[tokio::test]
async fn a_restarted_store_is_a_lost_one() {
    let mut host = Host::start(Bytes::from_mib(8)).await;
    let store = host.connect().await;
    let run = store.run().clone();
    let key = store.keys().pack(PackId(0));
    store.put(&key, b"pages").await.unwrap();
    host.kill().await;
    let broken = store.get(&key).await.unwrap_err();
    assert!(matches!(broken, StoreError::Broken(_)), "{broken}");
    host.again().await;
    let refused = host.try_connect(&host.settings.migration, Some(run.clone())).await.unwrap_err();
    assert!(matches!(&refused, StoreError::Restarted { expected, .. } if *expected == run));
    assert!(refused.is_loss());
    host.end().await;
}

#[tokio::test]
async fn nobody_comes_in_without_the_password_or_reaches_beyond_its_names() {
    let host = Host::start(Bytes::from_mib(8)).await;
    for wrong in [user("m1", 9), user("default", 2), user("m2", 2)] {
        let refused = host.try_connect(&wrong, None).await.unwrap_err();
        assert!(matches!(refused, StoreError::Refused(_)), "{refused}");
    }
    let store = host.connect().await;
    let other = KeySpace::new(&MigrationId::new("m2").unwrap());
    let refused = store.put(&other.pack(PackId(0)), b"x").await.unwrap_err();
    assert!(matches!(refused, StoreError::Refused(_)), "{refused}");
    host.end().await;
}

#[tokio::test]
async fn a_store_outlives_the_agent_that_started_it() {
    let mut host = Host::start(Bytes::from_mib(8)).await;
    let store = host.connect().await;
    let key = store.keys().pack(PackId(0));
    store.put(&key, b"pages").await.unwrap();
    let second = StoreServer::start(Path::new(PROGRAM), &host.settings, PATIENCE).await;
    assert!(matches!(second, Err(ServerError::Occupied(_))), "{second:?}");
    let process = host.server.take().map(|server| server.process());
    let adopted = StoreServer::adopt(&host.settings, Some(store.run().clone()), PATIENCE).await;
    let adopted = adopted.unwrap();
    assert_eq!(Some(adopted.process()), process);
    assert_eq!(host.connect().await.get(&key).await.unwrap(), b"pages"[..]);
    adopted.stop(PATIENCE).await.unwrap();
    let gone = StoreServer::adopt(&host.settings, None, PATIENCE).await;
    assert!(matches!(gone, Err(ServerError::Folder { .. })), "{gone:?}");
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why() {
    let folder = TempDir::new().unwrap();
    let mut settings = Settings {
        folder: folder.path().to_owned(),
        room: Bytes::from_mib(8),
        keys: KeySpace::new(&migration()),
        owner: user("owner", 1),
        migration: user("m1", 2),
        tls: None,
    };
    let program = Path::new("/nonexistent/redis-server");
    let missing = StoreServer::start(program, &settings, PATIENCE).await.unwrap_err();
    assert!(missing.to_string().contains("is redis-server installed?"), "{missing}");
    settings.folder = folder.path().join("missing");
    let refused = StoreServer::start(Path::new(PROGRAM), &settings, PATIENCE).await.unwrap_err();
    assert!(matches!(refused, ServerError::Ended { .. }), "{refused}");
}

/// The memory of a small guest: page n is filled with what n hashes to, every third is zero.
fn content(page: u32) -> Option<Vec<u8>> {
    (page % 3 != 2).then(|| vec![(page.wrapping_mul(2_654_435_761) >> 24) as u8 | 1; PAGE_BYTES])
}

const PAGES: u32 = 1000;

struct Scattered {
    directory: Directory,
    ledger: Ledger,
    reading: Reading,
    stores: Vec<RedisStore>,
}

/// Scatters a guest's memory over `hosts`, as a source would.
async fn scatter(hosts: &[Host], redundancy: Redundancy) -> Scattered {
    let tag = MigrationTag::new(&migration());
    let key = MigrationKey::new([5; KEY_BYTES]);
    let reading = Reading { migration: tag, opener: Some(key.opener(tag)) };
    let coder = Coder::Sealed(key.into_sealers(tag, 1).remove(0));
    let mut builder = PackBuilder::new(tag, Batch::new(16).unwrap(), coder, PackId(0));
    let mut ledger = Ledger::new(&[PAGES], PAGES.into()).unwrap();
    let mut packs = Vec::new();
    for page in 0..PAGES {
        let at = PageAt { block: 0, page };
        if builder.is_full() {
            packs.extend(builder.finish());
        }
        let place = match content(page) {
            None => builder.zero(at).map(|_| Where::Zero).unwrap(),
            Some(data) => {
                let slot = builder.page(at, &data).unwrap();
                Where::InPack { pack: slot.pack, slot: slot.slot }
            }
        };
        ledger.note(at, place).unwrap();
    }
    packs.extend(builder.finish());
    ledger.close().unwrap();
    let mut stores = Vec::new();
    for host in hosts {
        stores.push(host.connect().await);
    }
    let directory = place(&packs, redundancy, &stores).await;
    Scattered { directory, ledger, reading, stores }
}

/// Puts packs where they belong, and notes them once they are acknowledged.
async fn place(packs: &[Pack], redundancy: Redundancy, stores: &[RedisStore]) -> Directory {
    let offer = Offer { room: Bytes::from_mib(64), rate: BytesPerSec(100) };
    let offers = vec![offer; stores.len()];
    let mut placer = Placer::new(&offers, redundancy, BytesPerSec(1000)).unwrap();
    let at = |store: StoreId| &stores[usize::from(store.0)];
    let mut directory = Directory::new();
    let (mut rest, mut number) = (packs, 0);
    while !rest.is_empty() {
        let places = placer.next(100_000).unwrap();
        let (now, later) = rest.split_at(places.packs.len().min(rest.len()));
        let mut stripe = Stripe::new(number);
        for (pack, store) in now.iter().zip(&places.packs) {
            let key = at(*store).keys().pack(pack.id);
            at(*store).put(&key, &pack.bytes).await.unwrap();
            stripe.add(pack.id, &pack.bytes).unwrap();
            let protection = match (redundancy, places.redundant) {
                (Redundancy::Mirror, Some(other)) => {
                    at(other).put(&key, &pack.bytes).await.unwrap();
                    Protection::Mirror(other)
                }
                (Redundancy::Parity, _) => Protection::Stripe(number),
                _ => Protection::None,
            };
            directory.pack(pack.id, *store, protection).unwrap();
        }
        if let (Redundancy::Parity, Some(store)) = (redundancy, places.redundant) {
            let key = at(store).keys().parity(number);
            at(store).put(&key, &stripe.finish()).await.unwrap();
            directory.parity(number, store).unwrap();
        }
        (rest, number) = (later, number + 1);
    }
    directory
}

impl Scattered {
    fn at(&self, store: StoreId) -> &RedisStore {
        &self.stores[usize::from(store.0)]
    }

    /// A pack, from wherever it can be had.
    async fn pack(&self, pack: PackId, lost: StoreSet) -> BytesMut {
        match self.directory.way(pack, lost).unwrap() {
            Way::From(store) => {
                self.at(store).get(&self.stores[0].keys().pack(pack)).await.unwrap()
            }
            Way::Rebuild { stripe, parity, others } => {
                let key = self.stores[0].keys().parity(stripe);
                let parity = self.at(parity).get(&key).await.unwrap().freeze();
                let mut rest = Vec::new();
                for (other, store) in others {
                    let key = self.stores[0].keys().pack(other);
                    rest.push(self.at(store).get(&key).await.unwrap().freeze());
                }
                Parity::decode(stripe, &parity).unwrap().rebuild(stripe, pack, &rest).unwrap()
            }
            Way::Lost => panic!("{pack} is lost"),
        }
    }

    /// One page, as a demand would have it: the same bytes of everything, and no whole pack.
    async fn demand(&self, at: PageAt, pack: PackId, slot: u16, lost: StoreSet) -> Slice {
        let (start, length) = (Width::WHOLE.slot_offset(slot, true), Width::WHOLE.slot_bytes(true));
        let keys = self.stores[0].keys();
        let bytes = match self.directory.way(pack, lost).unwrap() {
            Way::From(store) => {
                self.at(store).get_part(&keys.pack(pack), start, length).await.unwrap()
            }
            Way::Rebuild { stripe, parity, others } => {
                let offset = body_offset(others.len() + 1) + start;
                let key = keys.parity(stripe);
                let parity = self.at(parity).get_part(&key, offset, length).await.unwrap();
                let mut rest = Vec::new();
                for (other, store) in others {
                    let part = self.at(store).get_part(&keys.pack(other), start, length).await;
                    // A shorter pack has nothing there, which counts as zeroes.
                    rest.push(part.unwrap_or_default().freeze());
                }
                restore(&parity, &rest)
            }
            Way::Lost => panic!("{pack} is lost"),
        };
        self.reading.slot(0, (slot, Width::WHOLE), at, bytes).unwrap().data
    }

    /// Gathers everything, some pages on demand, and gives the guest's memory.
    async fn gather(&mut self, lost: StoreSet) -> BTreeMap<u32, Option<Slice>> {
        let mut memory = BTreeMap::new();
        for page in (0..PAGES).step_by(37) {
            let at = PageAt { block: 0, page };
            let Where::InPack { pack, slot } = self.ledger.find(at).unwrap() else { continue };
            let data = self.demand(at, pack, slot, lost).await;
            assert!(matches!(self.ledger.place(at).unwrap(), Placing::Now(_)));
            memory.insert(page, Some(data));
        }
        let mut from = PackId(0);
        while let Some(pack) = self.ledger.next_pack(from) {
            let contents = self.reading.pack(pack, self.pack(pack, lost).await).unwrap();
            for page in contents.pages {
                let here = Where::InPack { pack, slot: page.slot };
                if self.ledger.find(page.at).unwrap() == here {
                    self.ledger.place(page.at).unwrap();
                    assert!(memory.insert(page.at.page, Some(page.data)).is_none());
                }
            }
            assert_eq!(self.ledger.live(pack), 0);
            from = pack;
        }
        let start = PageAt { block: 0, page: 0 };
        while let Some(at) = self.ledger.next_page(start, |place| place == Where::Zero) {
            self.ledger.place(at).unwrap();
            memory.insert(at.page, None);
        }
        memory
    }
}

/// Scatters over so many hosts, loses one of them, and gathers everything.
async fn survives(count: u8, redundancy: Redundancy, victim: u8) {
    let mut hosts = Vec::new();
    for _ in 0..count {
        hosts.push(Host::start(Bytes::from_mib(64)).await);
    }
    let mut scattered = scatter(&hosts, redundancy).await;
    hosts[usize::from(victim)].kill().await;
    let mut lost = StoreSet::default();
    lost.add(StoreId(victim));
    assert_eq!(scattered.directory.unreadable(lost), []);
    let memory = scattered.gather(lost).await;
    assert_eq!(memory.len(), PAGES as usize);
    for (page, data) in memory {
        assert_eq!(data.as_deref(), content(page).as_deref(), "page {page}");
    }
    assert_eq!(scattered.ledger.counts().waiting(), 0);
    scattered.ledger.self_check().unwrap();
    for host in hosts {
        host.end().await;
    }
}

#[tokio::test]
async fn under_parity_any_one_of_three_stores_may_be_lost() {
    for victim in 0..3 {
        survives(3, Redundancy::Parity, victim).await;
    }
}

#[tokio::test]
async fn under_mirror_any_one_of_two_stores_may_be_lost() {
    for victim in 0..2 {
        survives(2, Redundancy::Mirror, victim).await;
    }
}
