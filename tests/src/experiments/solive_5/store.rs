//! One store behind a switch, and pages that go there and come back.
//!
//! Used by its experiment. The packs are what a migration makes: sealed, checked, opened again.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lifeboat_agent::tls::TlsIdentity;
use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units::Bytes;
use lifeboat_scatter_gather::pack::{Batch, Coder, Pack, PackBuilder, Reading, Width};
use lifeboat_scatter_gather::page::{PAGE_BYTES, PackId, PageAt};
use lifeboat_scatter_gather::seal::{KEY_BYTES, MigrationKey, MigrationTag};
use lifeboat_scatter_gather::store::{
    Key, KeySpace, Login, RedisStore, Secret, Settings, StoreServer, TlsListen, User,
};
use tokio::task::JoinSet;

use crate::clock;
use crate::rig::network::{self, Namespace};
use crate::rig::program::run;
use crate::rig::switch::Switch;
use crate::rig::{RigError, agents, private, stores};

const PATIENCE: Duration = Duration::from_secs(30);
const SOURCE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const INTERMEDIARY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const PORT: u16 = 7446;
/// Room for the pages of a run, many times over.
const ROOM: Bytes = Bytes::from_mib(1024);

/// How many pages, and how many of them are a pack.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pages {
    pub(super) count: u32,
    pub(super) batch: Batch,
}

impl Pages {
    fn packs(self) -> u64 {
        u64::from(self.count.div_ceil(self.batch.pages().into()))
    }

    /// The pack, place and name of a page.
    fn place(self, page: u32) -> (PackId, u16, PageAt) {
        let batch = u32::from(self.batch.pages());
        let slot = u16::try_from(page % batch).unwrap_or(u16::MAX);
        (PackId((page / batch).into()), slot, PageAt { block: 0, page })
    }
}

/// The store and two connections to it: packs never stand before a single page.
pub(super) struct Rig {
    server: StoreServer,
    packs: RedisStore,
    singles: RedisStore,
    reading: Arc<Reading>,
    _switch: Switch,
}

fn tag() -> MigrationTag {
    MigrationTag::new(&migration())
}

fn migration() -> MigrationId {
    MigrationId::new("solive-5").expect("a short name")
}

const SECRET: [u8; KEY_BYTES] = [7; KEY_BYTES];

impl Rig {
    pub(super) async fn raise(folder: &Path) -> Result<Self, RigError> {
        let here = Namespace::own();
        let (source, intermediary) = (Namespace::make("source")?, Namespace::make("store")?);
        network::plug(&source, SOURCE, &here, "p1")?;
        network::plug(&intermediary, INTERMEDIARY, &here, "p2")?;
        let switch = Switch::start(&here, folder)?;
        switch.bridge("br0", &["p1", "p2"]).await?;
        run(&mut source.command(&format!("ping -q -c2 -i0.2 -W2 {INTERMEDIARY}")))?;
        private::switches_are_up()?;
        agents::make_certificates(folder, &[("h1", SOURCE), ("h2", INTERMEDIARY)])?;
        let settings = settings(folder)?;
        let program = starter(folder, &intermediary)?;
        let started = StoreServer::start(&program, &settings, PATIENCE).await;
        let server = started.map_err(RigError::refused("a store"))?;
        let identity = TlsIdentity::load(&folder.join("certs/agent-h1"))
            .map_err(RigError::refused("the certificates"))?;
        let (user, keys) = (settings.migration.clone(), settings.keys.clone());
        let login = Login { user, keys, patience: PATIENCE, expected: None };
        let at = SocketAddr::from((INTERMEDIARY, PORT));
        let packs = stores::connect(&source, at, &login, &identity).await?;
        let singles = stores::connect(&source, at, &login, &identity).await?;
        let opener = MigrationKey::new(SECRET).opener(tag());
        let reading = Arc::new(Reading { migration: tag(), opener: Some(opener) });
        Ok(Self { server, packs, singles, reading, _switch: switch })
    }

    pub(super) async fn end(self) -> Result<(), RigError> {
        self.server.stop(PATIENCE).await.map_err(RigError::refused("the store's end"))
    }

    /// Packs, seals and puts all pages, with so many packs under way; how long it took.
    pub(super) async fn put(&self, pages: Pages, under_way: usize) -> Result<Duration, RigError> {
        let memory = memory();
        let mut sealers = MigrationKey::new(SECRET).into_sealers(tag(), 1);
        let coder = Coder::Sealed(sealers.remove(0));
        let mut builder = PackBuilder::new(tag(), pages.batch, coder, PackId(0));
        let (begin, mut sending) = (clock::now(), JoinSet::new());
        for page in 0..pages.count {
            let start = page as usize * PAGE_BYTES % memory.len();
            let data = &memory[start..start + PAGE_BYTES];
            let added = builder.page(PageAt { block: 0, page }, data);
            added.map_err(RigError::refused("a page"))?;
            if builder.is_full() || page + 1 == pages.count {
                if sending.len() == under_way {
                    joined(&mut sending).await?;
                }
                if let Some(pack) = builder.finish() {
                    sending.spawn(self.sent(pack));
                }
            }
        }
        while !sending.is_empty() {
            joined(&mut sending).await?;
        }
        Ok(begin.elapsed())
    }

    fn sent(&self, pack: Pack) -> impl Future<Output = Result<(), RigError>> + Send + 'static {
        let store = self.packs.clone();
        async move {
            let put = store.put(&store.keys().pack(pack.id), &pack.bytes).await;
            put.map_err(RigError::refused("a pack"))
        }
    }

    /// Fetches and opens all packs, with so many under way, while single pages are asked for; how
    /// long the packs took, and each page's wait, ascending.
    pub(super) async fn get_with_demands(
        &self,
        pages: Pages,
        under_way: usize,
        demands: usize,
    ) -> Result<(Duration, Vec<Duration>), RigError> {
        let mut waits = Vec::with_capacity(demands);
        let mut took = None;
        // The packs are fetched as often as it takes to have every demand beside them.
        while waits.len() < demands {
            let left = demands - waits.len();
            let fetched = self.get(pages, under_way);
            tokio::pin!(fetched);
            let asked = self.ask_until(pages, left, &mut fetched);
            let (time, some) = asked.await?;
            took.get_or_insert(time);
            waits.extend(some);
        }
        waits.sort_unstable();
        Ok((took.unwrap_or_default(), waits))
    }

    /// Asks for pages until `fetched` is done, for `most` at most.
    async fn ask_until(
        &self,
        pages: Pages,
        most: usize,
        fetched: &mut (impl Future<Output = Result<Duration, RigError>> + Unpin),
    ) -> Result<(Duration, Vec<Duration>), RigError> {
        let mut waits = Vec::new();
        loop {
            if waits.len() == most {
                return Ok((fetched.await?, waits));
            }
            let page = pick(waits.len(), pages);
            tokio::select! {
                done = &mut *fetched => return Ok((done?, waits)),
                wait = self.single_page(pages, page) => waits.push(wait?),
            }
        }
    }

    async fn get(&self, pages: Pages, under_way: usize) -> Result<Duration, RigError> {
        let (begin, mut coming) = (clock::now(), JoinSet::new());
        for number in 0..pages.packs() {
            if coming.len() == under_way {
                joined(&mut coming).await?;
            }
            let (store, reading) = (self.packs.clone(), Arc::clone(&self.reading));
            coming.spawn(async move {
                let key = store.keys().pack(PackId(number));
                let bytes = store.get(&key).await.map_err(RigError::refused("a pack"))?;
                let opened = reading.pack(PackId(number), bytes);
                opened.map(drop).map_err(RigError::refused("a pack's pages"))
            });
        }
        while !coming.is_empty() {
            joined(&mut coming).await?;
        }
        Ok(begin.elapsed())
    }

    /// What single pages wait while nothing else is asked for, ascending.
    pub(super) async fn single_pages(
        &self,
        pages: Pages,
        demands: usize,
    ) -> Result<Vec<Duration>, RigError> {
        let mut waits = Vec::with_capacity(demands);
        for number in 0..demands {
            waits.push(self.single_page(pages, pick(number, pages)).await?);
        }
        waits.sort_unstable();
        Ok(waits)
    }

    async fn single_page(&self, pages: Pages, page: u32) -> Result<Duration, RigError> {
        let (pack, slot, at) = pages.place(page);
        let begin = clock::now();
        let key = self.singles.keys().pack(pack);
        let part = self
            .singles
            .get_part(&key, Width::WHOLE.slot_offset(slot, true), Width::WHOLE.slot_bytes(true))
            .await;
        let part = part.map_err(RigError::refused("a page"))?;
        let opened = self.reading.slot(0, (slot, Width::WHOLE), at, part);
        opened.map_err(RigError::refused("a page's bytes"))?;
        Ok(begin.elapsed())
    }

    /// Removes every pack.
    pub(super) async fn clear(&self, pages: Pages) -> Result<(), RigError> {
        let keys: Vec<Key> =
            (0..pages.packs()).map(|number| self.packs.keys().pack(PackId(number))).collect();
        for some in keys.chunks(256) {
            self.packs.remove(some).await.map_err(RigError::refused("removing packs"))?;
        }
        Ok(())
    }
}

/// Pages all over the memory, none twice in a row.
fn pick(number: usize, pages: Pages) -> u32 {
    u32::try_from(number * 7919 % pages.count as usize).unwrap_or_default()
}

/// 16 MiB that neither compress nor are zero.
fn memory() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(2 << 20).flatten().collect()
}

async fn joined(tasks: &mut JoinSet<Result<(), RigError>>) -> Result<(), RigError> {
    match tasks.join_next().await {
        Some(Ok(done)) => done,
        Some(Err(error)) => Err(RigError::refused("a task")(error)),
        None => Ok(()),
    }
}

fn settings(folder: &Path) -> Result<Settings, RigError> {
    let own = folder.join("store");
    fs::create_dir(&own).map_err(RigError::io("cannot make the store's folder"))?;
    let certificates = folder.join("certs/agent-h2");
    let user = |name: &str, byte| User { name: name.to_owned(), secret: Secret::new(&[byte; 32]) };
    Ok(Settings {
        folder: own,
        room: ROOM,
        keys: KeySpace::new(&migration()),
        owner: user("owner", 1),
        migration: user("migration", 2),
        tls: Some(TlsListen {
            address: SocketAddr::from((INTERMEDIARY, PORT)),
            certificate: certificates.join("cert.pem"),
            key: certificates.join("key.pem"),
            authority: certificates.join("ca.pem"),
        }),
    })
}

/// A program that is redis-server in `namespace`.
fn starter(folder: &Path, namespace: &Namespace) -> Result<PathBuf, RigError> {
    let command = namespace.command("redis-server");
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    let program = folder.join("redis-server-there");
    let text = format!("#!/bin/sh\nexec {} \"$@\"\n", words.join(" "));
    let written = fs::write(&program, text)
        .and_then(|()| fs::set_permissions(&program, fs::Permissions::from_mode(0o755)));
    written.map_err(RigError::io("cannot write the store's starter"))?;
    Ok(program)
}
