//! A page that a guest waits for, by three ways, in turn over the same links: out of a store, straight from the
//! source, and, as the paper has it, out of a store into which the source puts it for that request.
//!
//! ```text
//!   stored          h2 --GET of a slot--> i1                                     one round trip
//!   straight        h2 --FETCH--> h1 --PAGES--> h2                               one round trip
//!   through a store h2 --FETCH--> h1 --SET--> i1; h1 --PACK--> h2 --GET--> i1     three, in a row
//! ```
//!
//! All of it is what agents do: page links with both sides' certificates, packs that are sealed, the client
//! that stores are reached with, a store that an agent has started. Left out are QEMU and the ledger. The
//! paper's way has every advantage: a connection of its own to the store, a pack of one page, and the
//! destination is told at once. The source's side runs on threads in the source's namespace.
//!
//! With nothing else on the links, and while the source scatters as fast as its uplink takes it, which is
//! when a page that is asked for is still at the source.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use lifeboat_agent::link::{self, FrameReader, FrameWriter, Listener};
use lifeboat_agent::tls::TlsIdentity;
use lifeboat_protocol::agent::PageStore;
use lifeboat_protocol::ids::HostId;
use lifeboat_scatter_gather::link::Frame;
use lifeboat_scatter_gather::link::pages::{PackNote, PageRun};
use lifeboat_scatter_gather::pack::{Batch, Coder, Pack, PackBuilder, Reading, Width};
use lifeboat_scatter_gather::page::{PAGE_BYTES, PackId, PageAt};
use lifeboat_scatter_gather::redundancy::StoreId;
use lifeboat_scatter_gather::redundancy::directory::Protection;
use lifeboat_scatter_gather::seal::{KEY_BYTES, MigrationKey, MigrationTag, Sealer};
use lifeboat_scatter_gather::store::RedisStore;
use tokio::task::JoinSet;

use super::{ADDRESSES, HOSTS, PATIENCE, at, login, migration_id};
use crate::clock;
use crate::rig::network::Namespace;
use crate::rig::{RigError, stores};

/// How a page comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// It is in a store already.
    Stored,
    /// It is at the source, which is asked for it.
    Straight,
    /// It is at the source, which is asked to put it into a store: the paper's way.
    ThroughStore,
}

/// In the order of [`Ways::faults`].
pub(super) const WAYS: [Way; 3] = [Way::Stored, Way::Straight, Way::ThroughStore];

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::Stored => "in a store, from there",
            Self::Straight => "at the source, straight from it",
            Self::ThroughStore => "at the source, by way of a store",
        }
    }
}

/// What else is on the links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beside {
    Nothing,
    Scattering,
}

pub(super) const BESIDE: [Beside; 2] = [Beside::Nothing, Beside::Scattering];

/// A case's name in the record.
pub(super) fn case(way: Way, beside: Beside) -> String {
    match beside {
        Beside::Nothing => format!("a page {}, nothing beside it", way.name()),
        Beside::Scattering => format!("a page {}, while the source scatters", way.name()),
    }
}

pub(super) const HALF: &str = "page_wait_p50_us";
pub(super) const MOST: &str = "page_wait_p99_us";
pub(super) const NUMBER: &str = "pages_asked_for";

/// Where the destination listens for the source's lanes: beside its agent.
const PORT: u16 = 7460;
/// The source's memory: more than processors keep, and none of it compresses.
const PAGES: u32 = 4096;
/// So many in a row go one way before the next one has its turn.
const IN_A_ROW: usize = 20;
/// Packs that the source has under way while it scatters.
const UNDER_WAY: usize = 8;
const SECRET: [u8; KEY_BYTES] = [7; KEY_BYTES];
/// Who seals: the packs that are there at first, and those made for a request.
const LANES: u32 = 2;
/// Above every number of a pack that is there at first.
const FIRST_ASKED: PackId = PackId(1 << 32);

/// Both sides, the lanes between them, and a store with all of the source's memory.
pub(super) struct Ways {
    store: RedisStore,
    reading: Reading,
    memory: Arc<Vec<u8>>,
    /// Of [`Way::Straight`] and [`Way::ThroughStore`].
    lanes: [(FrameReader, FrameWriter); 2],
    serving: Vec<Serving>,
    packs: Arc<Vec<Pack>>,
    /// The source's, to start scattering with.
    source: Source,
    asked: usize,
}

/// A thread of the source's side: whether it got into its namespace, and what became of its work.
type Serving = JoinHandle<Result<Result<(), RigError>, RigError>>;

/// What the source's side is made of.
#[derive(Clone)]
struct Source {
    namespace: Namespace,
    identity: TlsIdentity,
    at: PageStore,
    migration: &'static str,
}

impl Source {
    /// Does `work` on a thread of its own at the source, until it ends.
    fn starts<F>(&self, work: impl FnOnce(Self) -> F + Send + 'static) -> Result<Serving, RigError>
    where
        F: Future<Output = Result<(), RigError>>,
    {
        let own = self.clone();
        self.namespace.spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(RigError::io("cannot start the source's thread"))?;
            runtime.block_on(work(own))
        })
    }

    async fn store(&self) -> Result<RedisStore, RigError> {
        connect(&self.namespace, &self.identity, (&self.at, self.migration)).await
    }
}

async fn connect(
    from: &Namespace,
    identity: &TlsIdentity,
    (at, migration): (&PageStore, &str),
) -> Result<RedisStore, RigError> {
    let address: SocketAddr = at.address.parse().map_err(RigError::refused("a store's address"))?;
    stores::connect(from, address, &login(at, migration)?, identity).await
}

impl Ways {
    /// Fills the store and opens the lanes. `hosts` are source and destination.
    ///
    /// # Errors
    /// When a connection cannot be made, or the store refuses.
    pub(super) async fn raise(
        hosts: &[(Namespace, TlsIdentity); 2],
        at: PageStore,
        migration: &'static str,
    ) -> Result<Self, RigError> {
        let [(here, identity), (there, other)] = hosts;
        let tag = MigrationTag::new(&migration_id(migration)?);
        let mut sealers = MigrationKey::new(SECRET).into_sealers(tag, LANES);
        let mut sealer = || sealers.pop().ok_or_else(|| RigError::refused("a key")("spent"));
        let memory = Arc::new(memory());
        let packs = Arc::new(packed(tag, sealer()?, &memory)?);
        let store = connect(there, other, (&at, migration)).await?;
        for pack in packs.iter() {
            let put = store.put(&store.keys().pack(pack.id), &pack.bytes).await;
            put.map_err(RigError::refused("a pack"))?;
        }
        let opener = MigrationKey::new(SECRET).opener(tag);
        let reading = Reading { migration: tag, opener: Some(opener) };
        let listener = listener(there, other)?;
        let source = Source { namespace: here.clone(), identity: identity.clone(), at, migration };
        let content = Arc::clone(&memory);
        let straight = source.starts(move |own| serve_straight(own, content))?;
        let first = accepted(&listener).await?;
        let (content, coder) = (Arc::clone(&memory), Coder::Sealed(sealer()?));
        let builder = PackBuilder::new(tag, one_page()?, coder, FIRST_ASKED);
        let through = source.starts(move |own| serve_through(own, content, builder))?;
        let second = accepted(&listener).await?;
        let (lanes, serving) = ([first, second], vec![straight, through]);
        Ok(Self { store, reading, memory, lanes, serving, packs, source, asked: 0 })
    }

    /// What `number` pages wait by each way, one after the other and in turn.
    ///
    /// # Errors
    /// When a page does not come, or another one than was asked for.
    pub(super) async fn faults(
        &mut self,
        number: usize,
        beside: Beside,
    ) -> Result<[BTreeMap<&'static str, f64>; 3], RigError> {
        let scattering = match beside {
            Beside::Nothing => None,
            Beside::Scattering => Some(Scattering::start(&self.source, &self.packs)?),
        };
        let mut waits = WAYS.map(|_| Vec::with_capacity(number));
        while waits[WAYS.len() - 1].len() < number {
            let turn = IN_A_ROW.min(number - waits[WAYS.len() - 1].len());
            for (way, waits) in WAYS.into_iter().zip(&mut waits) {
                for _ in 0..turn {
                    waits.push(self.fault(way).await?);
                }
            }
        }
        scattering.map_or(Ok(()), Scattering::end)?;
        Ok(waits.map(|mut waits| {
            waits.sort_unstable();
            let number = waits.len() as f64;
            BTreeMap::from([(HALF, at(&waits, 50)), (MOST, at(&waits, 99)), (NUMBER, number)])
        }))
    }

    async fn fault(&mut self, way: Way) -> Result<Duration, RigError> {
        self.asked += 1;
        // All over the memory, none twice in a row.
        let page = (self.asked * 1543 % PAGES as usize) as u32;
        let begin = clock::now();
        let data = match way {
            Way::Stored => self.stored(page).await?,
            Way::Straight => self.straight(page).await?,
            Way::ThroughStore => self.through(page).await?,
        };
        let wait = begin.elapsed();
        match data == bytes_of(&self.memory, page) {
            true => Ok(wait),
            false => Err(RigError::refused("a page")(format!("page {page} has come wrong"))),
        }
    }

    async fn stored(&self, page: u32) -> Result<Bytes, RigError> {
        let batch = u32::from(Batch::default().pages());
        let (pack, slot) = (PackId((page / batch).into()), (page % batch) as u16);
        let (start, length) = (Width::WHOLE.slot_offset(slot, true), Width::WHOLE.slot_bytes(true));
        let part = self.store.get_part(&self.store.keys().pack(pack), start, length).await;
        let part = part.map_err(RigError::refused("a page's slot"))?;
        let lane = LANES - 1;
        let opened = self.reading.slot(lane, (slot, Width::WHOLE), PageAt { block: 0, page }, part);
        Ok(opened.map_err(RigError::refused("a page's bytes"))?.data)
    }

    async fn straight(&mut self, page: u32) -> Result<Bytes, RigError> {
        match asked(&mut self.lanes[0], page).await? {
            Frame::Pages(pages) => {
                let found = pages.into_iter().find(|(at, _)| at.page == page);
                found.map(|(_, data)| data).ok_or_else(|| unexpected("another page"))
            }
            other => Err(unexpected(link::io::frame_name(&other))),
        }
    }

    async fn through(&mut self, page: u32) -> Result<Bytes, RigError> {
        let note = match asked(&mut self.lanes[1], page).await? {
            Frame::Pack(note) => note,
            other => return Err(unexpected(link::io::frame_name(&other))),
        };
        let found = self.store.get(&self.store.keys().pack(note.pack)).await;
        let bytes = found.map_err(RigError::refused("a pack of one page"))?;
        let contents = self.reading.pack(note.pack, bytes);
        let contents = contents.map_err(RigError::refused("a pack's bytes"))?;
        let found = contents.pages.into_iter().find(|open| open.at.page == page);
        found.map(|open| open.data).ok_or_else(|| unexpected("a pack without the page"))
    }

    /// Closes the lanes and waits for the source's side.
    ///
    /// # Errors
    /// What it failed with.
    pub(super) fn end(self) -> Result<(), RigError> {
        drop(self.lanes);
        self.serving.into_iter().try_for_each(ended)
    }
}

fn ended(thread: Serving) -> Result<(), RigError> {
    match thread.join() {
        Ok(done) => done?,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

async fn asked(
    (reader, writer): &mut (FrameReader, FrameWriter),
    page: u32,
) -> Result<Frame, RigError> {
    let fetch = Frame::Fetch(vec![PageRun { block: 0, first: page, count: 1 }]);
    writer.send(&fetch).await.map_err(RigError::refused("a request"))?;
    reader.next_within(PATIENCE).await.map_err(RigError::refused("an answer"))
}

fn unexpected(what: &str) -> RigError {
    RigError::refused("an answer")(what.to_owned())
}

/// The destination's listener, made in its namespace.
fn listener(there: &Namespace, identity: &TlsIdentity) -> Result<Listener, RigError> {
    let made = there.within(|| {
        let socket = TcpListener::bind((ADDRESSES[1], PORT))?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    })?;
    let socket = made.and_then(tokio::net::TcpListener::from_std);
    let socket = socket.map_err(RigError::io("cannot listen for the source"))?;
    Ok(Listener::new(socket, Some(identity.clone())))
}

async fn accepted(listener: &Listener) -> Result<(FrameReader, FrameWriter), RigError> {
    let late = |_| RigError::TooLate { what: "a lane".to_owned(), seconds: PATIENCE.as_secs() };
    let accepted = tokio::time::timeout(PATIENCE, listener.accept()).await.map_err(late)?;
    let (socket, address) = accepted.map_err(RigError::refused("a lane's connection"))?;
    let lane = Listener::establish(listener.identity(), socket, address).await;
    let (reader, writer, _) = lane.map_err(RigError::refused("a lane"))?;
    Ok((reader, writer))
}

impl Source {
    async fn lane(&self) -> Result<(FrameReader, FrameWriter), RigError> {
        let host = HostId::new(HOSTS[1]).map_err(RigError::refused("a name"))?;
        let address = format!("{}:{PORT}", ADDRESSES[1]);
        let lane = link::connect(&address, &host, Some(&self.identity)).await;
        lane.map_err(RigError::refused("a lane to the destination"))
    }
}

/// The pages that the next request is about; `None` when there is no destination any more.
async fn wanted(reader: &mut FrameReader) -> Result<Option<Vec<PageAt>>, RigError> {
    match reader.next().await {
        Ok(Frame::Fetch(runs)) => Ok(Some(runs.into_iter().flat_map(PageRun::pages).collect())),
        Ok(other) => Err(unexpected(link::io::frame_name(&other))),
        Err(_) => Ok(None),
    }
}

/// As our source answers: with the pages.
async fn serve_straight(own: Source, memory: Arc<Vec<u8>>) -> Result<(), RigError> {
    let (mut reader, mut writer) = own.lane().await?;
    while let Some(pages) = wanted(&mut reader).await? {
        let with_bytes =
            pages.into_iter().map(|at| (at, Bytes::copy_from_slice(bytes_of(&memory, at.page))));
        let answer = Frame::Pages(with_bytes.collect());
        writer.send(&answer).await.map_err(RigError::refused("to answer"))?;
    }
    Ok(())
}

/// As the paper's source answers: it puts the page into a store, and says that it is there.
async fn serve_through(
    own: Source,
    memory: Arc<Vec<u8>>,
    mut builder: PackBuilder,
) -> Result<(), RigError> {
    let (mut reader, mut writer) = own.lane().await?;
    let store = own.store().await?;
    while let Some(pages) = wanted(&mut reader).await? {
        for at in pages {
            let added = builder.page(at, bytes_of(&memory, at.page));
            added.map_err(RigError::refused("a page"))?;
            let Some(pack) = builder.finish() else { continue };
            let put = store.put(&store.keys().pack(pack.id), &pack.bytes).await;
            put.map_err(RigError::refused("to put a page"))?;
            let note = Frame::Pack(PackNote {
                pack: pack.id,
                width: pack.width,
                store: StoreId(0),
                protection: Protection::None,
                pages: vec![Some(at)],
            });
            writer.send(&note).await.map_err(RigError::refused("to tell of a page"))?;
        }
    }
    Ok(())
}

/// The source puts packs into the store until this is ended, several under way.
struct Scattering {
    enough: Arc<AtomicBool>,
    thread: Serving,
}

impl Scattering {
    fn start(source: &Source, packs: &Arc<Vec<Pack>>) -> Result<Self, RigError> {
        let enough = Arc::new(AtomicBool::new(false));
        let (until, packs) = (Arc::clone(&enough), Arc::clone(packs));
        let thread = source.starts(move |own| scatter(own, packs, until))?;
        // Its connection is made, and the uplink is full.
        clock::rest(Duration::from_millis(500));
        Ok(Self { enough, thread })
    }

    fn end(self) -> Result<(), RigError> {
        self.enough.store(true, Ordering::Relaxed);
        ended(self.thread)
    }
}

async fn scatter(
    own: Source,
    packs: Arc<Vec<Pack>>,
    enough: Arc<AtomicBool>,
) -> Result<(), RigError> {
    let store = own.store().await?;
    let mut sending = JoinSet::new();
    // The same again and again: what a page costs does not depend on what lies there.
    for pack in packs.iter().cycle() {
        if enough.load(Ordering::Relaxed) {
            break;
        }
        if sending.len() == UNDER_WAY {
            joined(&mut sending).await?;
        }
        let (store, key, bytes) = (store.clone(), store.keys().pack(pack.id), pack.bytes.clone());
        sending.spawn(async move {
            store.put(&key, &bytes).await.map_err(RigError::refused("to scatter"))
        });
    }
    while !sending.is_empty() {
        joined(&mut sending).await?;
    }
    Ok(())
}

async fn joined(tasks: &mut JoinSet<Result<(), RigError>>) -> Result<(), RigError> {
    match tasks.join_next().await {
        Some(Ok(done)) => done,
        Some(Err(error)) => Err(RigError::refused("a task")(error)),
        None => Ok(()),
    }
}

fn one_page() -> Result<Batch, RigError> {
    Batch::new(1).ok_or_else(|| RigError::refused("a batch")("of one page"))
}

fn packed(tag: MigrationTag, sealer: Sealer, memory: &[u8]) -> Result<Vec<Pack>, RigError> {
    let mut builder = PackBuilder::new(tag, Batch::default(), Coder::Sealed(sealer), PackId(0));
    let mut packs = Vec::new();
    for page in 0..PAGES {
        let added = builder.page(PageAt { block: 0, page }, bytes_of(memory, page));
        added.map_err(RigError::refused("a page"))?;
        if builder.is_full() || page + 1 == PAGES {
            packs.extend(builder.finish());
        }
    }
    Ok(packs)
}

fn bytes_of(memory: &[u8], page: u32) -> &[u8] {
    let start = page as usize * PAGE_BYTES;
    &memory[start..start + PAGE_BYTES]
}

fn memory() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(PAGES as usize * PAGE_BYTES / 8).flatten().collect()
}
