//! The whole of scatter-gather without the agents around it: a captured guest is scattered over three
//! real redis-servers, the source is let go, a store is lost, and a real QEMU gathers the guest from
//! what is left while it runs. redis-server has to be installed.

mod converted;

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use converted::{Absorbed, Pages, absorb, convert, moves};
use lifeboat_agent::postcopy::service::Batch as Wanted;
use lifeboat_agent::qemu::stream::PageAt;
use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units;
use lifeboat_scatter_gather::ledger::Where;
use lifeboat_scatter_gather::pack::{Batch, Coder, PackBuilder, Reading, Width, pack_bytes_most};
use lifeboat_scatter_gather::page::PackId;
use lifeboat_scatter_gather::redundancy::directory::{Directory, Way};
use lifeboat_scatter_gather::redundancy::parity::{Parity, body_offset, restore};
use lifeboat_scatter_gather::redundancy::placement::{Offer, Placer};
use lifeboat_scatter_gather::redundancy::{Redundancy, StoreId, StoreSet};
use lifeboat_scatter_gather::scatter::{Action, Event, Object, Scatter};
use lifeboat_scatter_gather::seal::{KEY_BYTES, MigrationKey, MigrationTag};
use lifeboat_scatter_gather::store::{
    Key, KeySpace, Login, RedisStore, Secret, Settings, StoreServer, User,
};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

const PATIENCE: Duration = Duration::from_secs(20);
const STORES: usize = 3;

fn migration() -> MigrationId {
    MigrationId::new("m1").unwrap()
}

fn user(name: &str, byte: u8) -> User {
    User { name: name.to_owned(), secret: Secret::new(&[byte; 32]) }
}

/// A store on a host of its own.
struct Intermediary {
    server: Option<StoreServer>,
    store: RedisStore,
    _folder: TempDir,
}

async fn intermediary() -> Intermediary {
    let folder = TempDir::new().unwrap();
    let settings = Settings {
        folder: folder.path().to_owned(),
        room: units::Bytes::from_mib(16),
        keys: KeySpace::new(&migration()),
        owner: user("owner", 1),
        migration: user("m1", 2),
        tls: None,
    };
    let server = StoreServer::start(Path::new("redis-server"), &settings, PATIENCE).await;
    let server = server.expect("redis-server is installed");
    let stream = UnixStream::connect(settings.socket()).await.unwrap();
    let (user, keys) = (settings.migration.clone(), settings.keys.clone());
    let login = Login { user, keys, patience: PATIENCE, expected: None };
    let store = RedisStore::connect(stream, &login).await.unwrap();
    Intermediary { server: Some(server), store, _folder: folder }
}

impl Drop for Intermediary {
    fn drop(&mut self) {
        if let Some(server) = &self.server {
            kill(server);
        }
    }
}

fn kill(server: &StoreServer) {
    let process = server.process().to_string();
    let done = std::process::Command::new("kill").args(["-9", &process]).status();
    assert!(done.is_ok_and(|status| status.success()), "process {process} cannot be ended");
}

/// A guest in stores, seen from the destination.
struct Scattered {
    runtime: Runtime,
    hosts: Vec<Intermediary>,
    lost: StoreSet,
    directory: Directory,
    places: HashMap<PageAt, Where>,
    reading: Reading,
    /// Pages that had to be computed.
    rebuilt: usize,
}

impl Scattered {
    /// Scatters the guest; returns when the source may go.
    fn new(absorbed: &Absorbed) -> Self {
        let runtime = Runtime::new().unwrap();
        let hosts = (0..STORES).map(|_| runtime.block_on(intermediary())).collect();
        let tag = MigrationTag::new(&migration());
        let key = MigrationKey::new([9; KEY_BYTES]);
        let reading = Reading { migration: tag, opener: Some(key.opener(tag)) };
        let (directory, places, lost) = (Directory::new(), HashMap::new(), StoreSet::default());
        let mut all = Self { runtime, hosts, lost, directory, places, reading, rebuilt: 0 };
        let coder = Coder::Sealed(key.into_sealers(tag, 1).remove(0));
        all.scatter(absorbed, coder, tag);
        all
    }

    fn scatter(&mut self, absorbed: &Absorbed, coder: Coder, tag: MigrationTag) {
        let batch = Batch::new(3).unwrap();
        let offer = Offer { room: units::Bytes::from_mib(16), rate: units::BytesPerSec(1_000_000) };
        let source = units::BytesPerSec(3_000_000);
        let placer = Placer::new(&[offer; STORES], Redundancy::Parity, source).unwrap();
        let most = pack_bytes_most(batch, true) as u64;
        let mut scatter = Scatter::new(Redundancy::Parity, placer, most);
        let mut builder = PackBuilder::new(tag, batch, coder, PackId(0));
        let mut events = Vec::new();
        for (at, data) in &absorbed.pages {
            if builder.is_full() {
                events.extend(builder.finish().map(Event::Pack));
            }
            let place = match data {
                None => builder.zero(*at).map(|_| Where::Zero).unwrap(),
                Some(data) => {
                    let slot = builder.page(*at, data).unwrap();
                    Where::InPack { pack: slot.pack, slot: slot.slot }
                }
            };
            self.places.insert(*at, place);
        }
        events.extend(builder.finish().map(Event::Pack));
        events.push(Event::Ended);
        let mut gone = false;
        while !events.is_empty() {
            let mut actions = Vec::new();
            scatter.apply(events.remove(0), &mut actions).unwrap();
            for action in actions {
                match action {
                    Action::Put { store, object, bytes } => {
                        self.put(store, object, &bytes);
                        events.push(Event::Acked(store, object));
                    }
                    Action::AnnouncePack { pack, store, protection } => {
                        self.directory.pack(pack, store, protection).unwrap();
                    }
                    Action::AnnounceParity { stripe, store } => {
                        self.directory.parity(stripe, store).unwrap();
                    }
                    Action::Resend(pack) => panic!("{pack} was lost"),
                    Action::Evict => gone = true,
                }
            }
        }
        assert!(gone, "the source was never let go");
    }

    fn store(&self, store: StoreId) -> &RedisStore {
        &self.hosts[usize::from(store.0)].store
    }

    fn put(&self, store: StoreId, object: Object, bytes: &[u8]) {
        let store = self.store(store);
        let key = match object {
            Object::Pack(pack) | Object::Copy(pack) => store.keys().pack(pack),
            Object::Parity(stripe) => store.keys().parity(stripe),
        };
        self.runtime.block_on(store.put(&key, bytes)).unwrap();
    }

    fn get(&self, store: StoreId, key: &Key) -> BytesMut {
        self.runtime.block_on(self.store(store).get(key)).unwrap()
    }

    fn get_part(&self, store: StoreId, key: &Key, start: usize, length: usize) -> BytesMut {
        // A shorter pack of a stripe has nothing there, which counts as zeroes.
        self.runtime.block_on(self.store(store).get_part(key, start, length)).unwrap_or_default()
    }

    fn lose(&mut self, victim: StoreId) {
        self.lost.add(victim);
        if let Some(server) = self.hosts[usize::from(victim.0)].server.take() {
            kill(&server);
        }
    }
}

impl Pages for Scattered {
    fn place(&self, at: PageAt) -> Where {
        self.places[&at]
    }

    fn fetch(&mut self, at: PageAt, place: Where) -> Bytes {
        let Where::InPack { pack, slot } = place else { panic!("{at} is in no pack") };
        let (start, length) = (Width::WHOLE.slot_offset(slot, true), Width::WHOLE.slot_bytes(true));
        let keys = KeySpace::new(&migration());
        let bytes = match self.directory.way(pack, self.lost).unwrap() {
            Way::From(store) => self.get_part(store, &keys.pack(pack), start, length),
            Way::Rebuild { stripe, parity, others } => {
                self.rebuilt += 1;
                let body = body_offset(others.len() + 1) + start;
                let parity = self.get_part(parity, &keys.parity(stripe), body, length);
                let other = |(pack, store): (PackId, StoreId)| {
                    self.get_part(store, &keys.pack(pack), start, length).freeze()
                };
                restore(&parity, &others.into_iter().map(other).collect::<Vec<_>>())
            }
            Way::Lost => panic!("{pack} is lost"),
        };
        self.reading.slot(0, (slot, Width::WHOLE), at, bytes).unwrap().data
    }

    fn fetch_batch(&mut self, batch: Wanted) -> Vec<(PageAt, Bytes)> {
        let Wanted::Pack(pack) = batch else { panic!("the source has gone") };
        let keys = KeySpace::new(&migration());
        let bytes = match self.directory.way(pack, self.lost).unwrap() {
            Way::From(store) => self.get(store, &keys.pack(pack)),
            Way::Rebuild { stripe, parity, others } => {
                self.rebuilt += 1;
                let parity = self.get(parity, &keys.parity(stripe)).freeze();
                let other = |(pack, store)| self.get(store, &keys.pack(pack)).freeze();
                let others: Vec<Bytes> = others.into_iter().map(other).collect();
                Parity::decode(stripe, &parity).unwrap().rebuild(stripe, pack, &others).unwrap()
            }
            Way::Lost => panic!("{pack} is lost"),
        };
        let contents = self.reading.pack(pack, bytes).unwrap();
        contents.pages.into_iter().map(|page| (page.at, page.data)).collect()
    }
}

impl Pages for &mut Scattered {
    fn place(&self, at: PageAt) -> Where {
        (**self).place(at)
    }

    fn fetch(&mut self, at: PageAt, place: Where) -> Bytes {
        (**self).fetch(at, place)
    }

    fn fetch_batch(&mut self, batch: Wanted) -> Vec<(PageAt, Bytes)> {
        (**self).fetch_batch(batch)
    }
}

#[test]
fn a_guest_is_gathered_by_a_real_qemu_though_a_store_is_lost() {
    for (stream, qemu) in moves() {
        let absorbed = absorb(stream);
        let mut rebuilt = 0;
        for victim in 0..STORES as u8 {
            let mut scattered = Scattered::new(&absorbed);
            scattered.lose(StoreId(victim));
            convert(&qemu, &absorbed, &mut scattered);
            rebuilt += scattered.rebuilt;
        }
        assert!(rebuilt > 0, "no page was ever computed");
    }
}
