//! Pages of a stopped guest, for a destination that runs it: two connections to the destination, one
//! for what its guest waits for and one for the background, opened again whenever they break.
//!
//! ```text
//!  HELLO {serve ..} -> WELCOME <- | FETCH {pages} <- ; pages read from the stopped QEMU ; PAGES ->
//!                                 | PACK, PARITY, SCATTERED -> (what `scattering.rs` has to tell)
//!                                 ' PING -> where nothing else is said
//! ```
//!
//! It keeps nothing of what it sends: the guest's memory is the stopped QEMU's, and which pages are
//! still wanted is known at the destination. So a broken connection, or an agent that comes back,
//! costs nothing but time. Used by `source.rs`; when the pages may be given up is not decided here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use lifeboat_policy::pace::Pacer;
use lifeboat_protocol::ids::HostId;
use lifeboat_protocol::units::{self, BytesPerSec};
use lifeboat_scatter_gather::link::pages::{PageRun, compressed};
use lifeboat_scatter_gather::link::{Frame, Hello, Purpose};
use lifeboat_scatter_gather::page::{PAGE_BYTES, PageAt};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Failure;
use crate::clock;
use crate::link::io::frame_name;
use crate::link::{FrameReader, FrameWriter, LinkError};
use crate::qemu::ram::{Ram, RamError};
use crate::tls::TlsIdentity;

/// Between two attempts to reach the destination.
const AGAIN_AFTER: Duration = Duration::from_millis(300);
/// How long WELCOME may take.
const WELCOME_LIMIT: Duration = Duration::from_secs(10);
/// Something is said this often, so that a connection that died silently is noticed.
const PING_EVERY: Duration = Duration::from_secs(1);
/// The other side answers within this time, or the connection is opened anew.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);
/// Below this rate compressing the background's pages costs less time than it saves: one core
/// compresses about twice as fast.
const COMPRESS_BELOW: BytesPerSec = BytesPerSec(300_000_000);

/// The background goes in pieces that take so long on the way, and not by whole batches: what a guest waits
/// for comes over the same links, and has to wait behind what stands in their queues.
const PIECE: Duration = Duration::from_millis(2);
/// Smaller pieces cost more than they are worth.
const PIECE_LEAST: usize = 16 << 10;

/// Everything that the source sends of one migration, at one pace.
#[derive(Debug)]
pub(super) struct Pace {
    state: Mutex<(Option<BytesPerSec>, Pacer)>,
    began: Instant,
    sent: AtomicU64,
}

impl Pace {
    pub(super) fn new(limit: Option<BytesPerSec>) -> Self {
        let pacer = Pacer::new(limit.unwrap_or(BytesPerSec::ZERO));
        let began = clock::now();
        Self { state: Mutex::new((limit, pacer)), began, sent: AtomicU64::new(0) }
    }

    pub(super) fn set_limit(&self, limit: Option<BytesPerSec>) {
        let now = self.began.elapsed();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = limit;
        if let Some(rate) = limit {
            state.1.set_rate(now, rate);
        }
    }

    /// What may be sent.
    pub(super) fn limit(&self) -> Option<BytesPerSec> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Books so many bytes; how long they should wait. A demand does not wait, but what it takes is
    /// missing to the background.
    pub(super) fn book(&self, bytes: usize) -> Duration {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
        let now = self.began.elapsed();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.0 {
            None => Duration::ZERO,
            Some(_) => {
                let at = state.1.ready_at(now, units::Bytes(bytes as u64)).unwrap_or(now);
                at.saturating_sub(now)
            }
        }
    }

    /// Bytes that were sent so far.
    pub(super) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

/// What the background's connection tells besides pages: the source's stores, in order, from the
/// beginning on every new connection.
type Told = watch::Receiver<Arc<Mutex<Vec<Frame>>>>;

/// Where the destination is and what is said to it.
#[derive(Clone)]
pub(super) struct Calling {
    pub(super) address: String,
    pub(super) destination: HostId,
    pub(super) identity: Option<TlsIdentity>,
    pub(super) hello: Hello,
}

/// The two connections. Dropping it ends both.
pub(super) struct Serving {
    memory: watch::Sender<Option<Arc<Ram>>>,
    tell: watch::Sender<Arc<Mutex<Vec<Frame>>>>,
    pub(super) pace: Arc<Pace>,
    lanes: [JoinHandle<()>; 2],
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.lanes.iter().for_each(JoinHandle::abort);
    }
}

impl Serving {
    /// Opens the connections. Nothing is served, and nothing heard, before [`Self::open`].
    pub(super) fn start(calling: Calling, limit: Option<BytesPerSec>) -> Self {
        let (memory, seen) = watch::channel(None);
        let (tell, told) = watch::channel(Arc::<Mutex<Vec<Frame>>>::default());
        let pace = Arc::new(Pace::new(limit));
        let lane = |purpose| {
            let mut calling = calling.clone();
            calling.hello.purpose = purpose;
            let lane =
                Lane { calling, memory: seen.clone(), told: told.clone(), pace: Arc::clone(&pace) };
            crate::tasks::spawn("page server", lane.run())
        };
        let lanes = [lane(Purpose::ServeDemands), lane(Purpose::ServeBackground)];
        Self { memory, tell, pace, lanes }
    }

    /// The guest stands still: its memory may be read.
    pub(super) fn open(&self, memory: Arc<Ram>) {
        self.memory.send_replace(Some(memory));
    }

    /// Who tells on the background's connection.
    pub(super) fn teller(&self) -> Teller {
        Teller(self.tell.clone())
    }
}

/// Tells on the background's connection, and on every one that takes its place.
#[derive(Clone)]
pub(super) struct Teller(watch::Sender<Arc<Mutex<Vec<Frame>>>>);

impl Teller {
    /// Adds to what is told.
    pub(super) fn tell(&self, frame: Frame) {
        self.0.send_modify(|all| {
            all.lock().unwrap_or_else(PoisonError::into_inner).push(frame);
        });
    }
}

struct Lane {
    calling: Calling,
    memory: watch::Receiver<Option<Arc<Ram>>>,
    told: Told,
    pace: Arc<Pace>,
}

impl Lane {
    async fn run(mut self) {
        loop {
            match self.serve_once().await {
                Ok(never) => match never {},
                // A process that has gone has no memory any more, and its migration knows.
                Err(Failure::Ram(error)) => {
                    return tracing::error!(%error, "the guest's memory cannot be served");
                }
                // As it does at the end, which this side hears of on the link of the hand-over.
                Err(Failure::Link(LinkError::Closed)) => {
                    tracing::info!("the destination closed a connection for pages");
                    tokio::time::sleep(AGAIN_AFTER).await;
                }
                Err(failure) => {
                    tracing::warn!(reason = %failure.line(), "pages wait for a new connection");
                    tokio::time::sleep(AGAIN_AFTER).await;
                }
            }
        }
    }

    async fn serve_once(&mut self) -> Result<std::convert::Infallible, Failure> {
        let Calling { address, destination, identity, hello } = &self.calling;
        let (mut reader, mut writer) =
            crate::link::connect(address, destination, identity.as_ref()).await?;
        writer.send(&Frame::Hello(hello.clone())).await?;
        match reader.next_within(WELCOME_LIMIT).await? {
            Frame::Welcome => {}
            Frame::Refused(reason) => return Err(Failure::Refused(reason)),
            other => return Err(unexpected(&other, "WELCOME")),
        }
        let mut talk = Talk { heard_at: clock::now(), told: 0, compress: false, reader, writer };
        loop {
            let ping = tokio::time::sleep(PING_EVERY);
            tokio::select! {
                frame = talk.reader.next() => match frame? {
                    Frame::Fetch(runs) => self.answer(&mut talk, &runs).await?,
                    Frame::Pong(_) => {}
                    other => return Err(unexpected(&other, "FETCH")),
                },
                () = self.more_to_tell(talk.told) => {
                    self.send_told(&mut talk).await?;
                    continue;
                }
                () = ping => {
                    if self.memory.borrow().is_none() {
                        // Nobody over there has a reason to say anything yet.
                        talk.heard_at = clock::now();
                    }
                    if talk.heard_at.elapsed() > SILENCE_LIMIT {
                        return Err(LinkError::Silent(SILENCE_LIMIT).into());
                    }
                    talk.writer.send(&Frame::Ping(0)).await?;
                    continue;
                }
            }
            talk.heard_at = clock::now();
        }
    }

    /// Returns when there is something new to tell.
    async fn more_to_tell(&self, so_far: usize) {
        let mut told = self.told.clone();
        let background = self.calling.hello.purpose == Purpose::ServeBackground;
        let is_more = |all: &Arc<Mutex<Vec<Frame>>>| {
            background && all.lock().unwrap_or_else(PoisonError::into_inner).len() > so_far
        };
        let more = told.wait_for(is_more).await.is_ok();
        if !more {
            std::future::pending::<()>().await;
        }
    }

    async fn send_told(&self, talk: &mut Talk) -> Result<(), Failure> {
        let all = Arc::clone(&self.told.borrow());
        let next =
            |told: usize| all.lock().unwrap_or_else(PoisonError::into_inner).get(told).cloned();
        while let Some(frame) = next(talk.told) {
            talk.writer.send(&frame).await?;
            talk.told += 1;
        }
        Ok(())
    }

    async fn answer(&mut self, talk: &mut Talk, runs: &[PageRun]) -> Result<(), Failure> {
        let memory = match self.memory.wait_for(Option::is_some).await {
            Ok(memory) => memory.clone(),
            Err(_) => None,
        };
        let memory = memory.ok_or(Failure::GuestGone)?;
        let pages = read(&memory, runs)?;
        if self.calling.hello.purpose == Purpose::ServeBackground {
            return self.answer_in_time(talk, pages).await;
        }
        self.pace.book(pages.len() * PAGE_BYTES);
        Ok(talk.writer.send(&Frame::Pages(pages)).await?)
    }

    /// Sends the background's pages when their time has come, compressed where sending is slow.
    async fn answer_in_time(
        &self,
        talk: &mut Talk,
        pages: Vec<(PageAt, Bytes)>,
    ) -> Result<(), Failure> {
        let began = clock::now();
        let shorter = talk.compress.then(|| compressed(&pages)).flatten();
        let plain = pages.len() * PAGE_BYTES;
        let frame = shorter.map_or_else(|| Frame::Pages(pages), Frame::Compressed);
        let piece = self.pace.limit().map_or(usize::MAX, piece_at);
        talk.writer.send_in_pieces(&frame, piece, |bytes| self.pace.book(bytes)).await?;
        talk.compress = COMPRESS_BELOW.over(began.elapsed()).0 > plain as u64;
        Ok(())
    }
}

/// One connection, once it has been welcomed.
struct Talk {
    reader: FrameReader,
    writer: FrameWriter,
    heard_at: Instant,
    /// How many of the things to tell were told on this connection.
    told: usize,
    /// The last answer was slow to go.
    compress: bool,
}

/// What of the background may go at once.
fn piece_at(limit: BytesPerSec) -> usize {
    usize::try_from(limit.over(PIECE).0).unwrap_or(usize::MAX).max(PIECE_LEAST)
}

fn unexpected(frame: &Frame, wanted: &'static str) -> Failure {
    LinkError::Unexpected { got: frame_name(frame), wanted }.into()
}

/// Reads pages in one go per run.
pub(super) fn read(memory: &Ram, runs: &[PageRun]) -> Result<Vec<(PageAt, Bytes)>, Failure> {
    let mut pages = Vec::new();
    for run in runs {
        let (first, count) = (u64::from(run.first), u64::from(run.count));
        if first + count > memory.pages() {
            let page = run.first.saturating_add(run.count);
            return Err(Failure::NoSuchPage(PageAt { block: run.block, page }));
        }
        let mut buffer = BytesMut::zeroed(run.count as usize * PAGE_BYTES);
        memory.read(first, &mut buffer).map_err(|error: RamError| Failure::Ram(error))?;
        let mut buffer = buffer.freeze();
        pages.extend(run.pages().map(|at| (at, buffer.split_to(PAGE_BYTES))));
    }
    Ok(pages)
}
