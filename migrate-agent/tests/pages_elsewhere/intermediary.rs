//! A store of a test's own: a real redis-server, whom the test may kill, stop, fill and spoil.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use lifeboat_protocol::agent::PageStore;
use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units::Bytes;
use lifeboat_scatter_gather::page::PackId;
use lifeboat_scatter_gather::store::{
    Key, KeySpace, Launch, RedisStore, Secret, Settings, StoreError, StoreServer, User,
};
use tempfile::TempDir;

use super::PATIENCE;

/// A store on a host of its own, as far as the agents can see.
pub(crate) struct Intermediary {
    server: StoreServer,
    settings: Settings,
    address: SocketAddr,
    pub(crate) store: PageStore,
    _folder: TempDir,
}

impl Intermediary {
    pub(crate) async fn start(number: u8, room: Bytes) -> Self {
        let folder = TempDir::new().unwrap();
        let user =
            |name: &str, byte: u8| User { name: name.to_owned(), secret: Secret::new(&[byte; 32]) };
        let settings = Settings {
            folder: folder.path().to_owned(),
            room,
            keys: KeySpace::new(&MigrationId::new("m1").unwrap()),
            owner: user("owner", 1),
            migration: user("m1", 2),
            tls: None,
        };
        let address: SocketAddr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let server = launched(&settings, address).await;
        let store = PageStore {
            host: format!("i{number}"),
            address: address.to_string(),
            user: "m1".to_owned(),
            secret: settings.migration.secret.reveal().to_owned(),
            memory_bytes: room.0,
            plain: true,
            ..PageStore::default()
        };
        Self { server, settings, address, store, _folder: folder }
    }

    /// Another server in its place, which has nothing.
    pub(crate) async fn start_anew(&mut self) {
        self.server.ended().await;
        self.server = launched(&self.settings, self.address).await;
    }

    pub(crate) fn signal(&self, signal: &str) {
        let process = self.server.process().to_string();
        let done = std::process::Command::new("kill").args([signal, &process]).status();
        assert!(done.is_ok_and(|status| status.success()), "process {process}");
    }

    pub(crate) fn kill(&self) {
        self.signal("-9");
    }

    fn owner(&self) -> &RedisStore {
        self.server.owner()
    }

    /// The migration's packs that lie here.
    pub(crate) async fn packs(&self) -> Vec<PackId> {
        self.owner().packs().await.unwrap()
    }

    fn pack(&self, pack: PackId) -> Key {
        self.settings.keys.pack(pack)
    }

    /// Bytes of packs that lie here, and of parities of stripes before this one.
    pub(crate) async fn bytes(&self, stripes: u64) -> (u64, u64) {
        let (mut packs, mut parities) = (0, 0);
        for pack in self.packs().await {
            packs += self.owner().get(&self.pack(pack)).await.unwrap().len() as u64;
        }
        for stripe in 0..stripes {
            match self.owner().get(&self.settings.keys.parity(stripe)).await {
                Ok(parity) => parities += parity.len() as u64,
                Err(StoreError::Missing(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
        (packs, parities)
    }

    /// Changes one byte of one pack: the one at this part of them.
    pub(crate) async fn spoil(&self, part: usize) {
        let packs = self.packs().await;
        let key = self.pack(packs[packs.len() / part]);
        let mut value = self.owner().get(&key).await.unwrap();
        let middle = value.len() / 2;
        value[middle] ^= 1;
        self.owner().put(&key, &value).await.unwrap();
    }

    /// Somebody else fills the server up to the last byte.
    pub(crate) async fn fill(&self) {
        let (others, value) =
            (KeySpace::new(&MigrationId::new("other").unwrap()), vec![7; 1 << 20]);
        for number in 0.. {
            match self.owner().put(&others.pack(PackId(number)), &value).await {
                Ok(()) => {}
                Err(StoreError::Full(_)) => return,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

async fn launched(settings: &Settings, address: SocketAddr) -> StoreServer {
    let program = Path::new("redis-server");
    let launch = Launch { program, user: None, plain: Some(address) };
    let server = StoreServer::launch(launch, settings, PATIENCE).await;
    server.expect("redis-server is installed")
}

impl Drop for Intermediary {
    fn drop(&mut self) {
        let process = self.server.process().to_string();
        let _ = std::process::Command::new("kill").args(["-9", &process]).status();
    }
}
