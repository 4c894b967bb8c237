//! The destination's QEMU and everything that a guest's pages come from, held together: performs what
//! [`crate::postcopy`] decides. One task per guest, from END until QEMU has said that it has all.
//!
//! ```text
//!   QEMU --requests--> [Gather] --FETCH--> lanes to the source's agent --PAGES--+
//!    ^                    |  '---GET, GETRANGE--> stores -----------------------+
//!    '------ RAM parts, each page once <----------------------------------------'
//! ```
//!
//! Everything that QEMU has said is taken in before the background goes on, so a page that its guest
//! waits for is asked for at once; it comes on a connection on which nothing else does. A lane that
//! breaks leaves what was asked on it open: the source opens another, and it is asked again.
//!
//! Used by `destination.rs`, by way of [`Gathering`]. Who owns the guest is not known here.

pub(super) mod index;
pub(crate) mod journal;
mod lanes;
mod pace;
mod reachable;
pub(super) mod recover;
mod stores;
mod waits;
mod words;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use lifeboat_protocol::units::BytesPerSec;
use lifeboat_scatter_gather::ledger::Where;
use lifeboat_scatter_gather::link::{Frame, Purpose};
use lifeboat_scatter_gather::page::{PAGE_BYTES, PageAt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::arriving::Arrived;
use crate::clock;
use crate::link::{FrameReader, FrameWriter};
use crate::postcopy::phase::Phase;
use crate::postcopy::service::{Action, Batch};
use crate::postcopy::{Event, Gather, GatherError};
use crate::qemu::stream::return_path::{Message, ReturnReader};
use crate::qemu::stream::{
    Command, PING_IN_PACKAGE, PageRange, RamLayout, Record, StreamWriter, compose,
};
use crate::source::Failure;
use journal::Journal;
use lanes::Lane;
use pace::Pace;
pub(super) use reachable::Reachable;
use stores::{Came, Fetched, Stores};
pub(super) use waits::Waited;
use waits::Waits;

/// Pages that are asked of the source at once in the background.
pub(super) const BATCH_PAGES: usize = 128;
/// Bytes read at once from QEMU, which says little.
const READ_BYTES: usize = 64 << 10;

/// What the task is told.
pub(super) enum Order {
    /// The source has opened a connection.
    Lane(Purpose, FrameReader, FrameWriter),
    /// COMMIT is durable. The answer: whether the guest may run.
    Commit(oneshot::Sender<Result<(), GatherError>>),
    /// The guest has been seen to run: the background may begin.
    Runs,
    /// The background's pace from now on; `None`: as fast as it goes.
    Limit(Option<BytesPerSec>),
}

/// How far it is.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// QEMU has loaded the devices.
    pub(super) standing: bool,
    /// QEMU has everything and has said so.
    pub(super) done: bool,
    /// It cannot go on, and why.
    pub(super) failed: Option<String>,
    /// Pages that were elsewhere at the beginning, those that are here, those that wait in stores.
    pub(super) total: u64,
    pub(super) arrived: u64,
    pub(super) stored: u64,
    /// Pages that QEMU has asked for.
    pub(super) faults: u64,
    /// What it waited for those that were in stores.
    pub(super) waited: Waited,
    /// Bytes of pages that came, from wherever.
    pub(super) bytes: u64,
    /// Pages that the guest waits for and to which no way is left.
    pub(super) stuck: u64,
    /// Pages that no store can give, whether or not the guest waits for one.
    pub(super) missing: Missing,
    /// Nothing is wanted of the source any more: the rest is in stores.
    pub(super) released: bool,
}

/// Pages to which no way leads, once the source has told all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Missing {
    /// Some will come when a store answers again: so many, and the hosts of those that do not answer or are lost.
    pub(super) waiting: u64,
    pub(super) away: String,
    /// Some will never come: so many, and the hosts whose stores have nothing any more.
    pub(super) lost: u64,
    pub(super) emptied: String,
}

impl Missing {
    /// What a person is told.
    pub(super) fn sentence(&self, vm: &str) -> Option<String> {
        let Self { waiting, away, lost, emptied } = self;
        match (lost, waiting) {
            (0, 0) => None,
            (0, _) => Some(format!(
                "{waiting} pages of {vm} wait for stores that do not answer ({away}); it stands still where it touches one"
            )),
            _ => Some(format!(
                "{lost} pages of {vm} are lost: what stores held of them is gone ({emptied}). It stands still where it \
                 touches one; end it, and start it anew from its disk"
            )),
        }
    }
}

/// The task. Dropping it ends it.
pub(super) struct Gathering {
    to: mpsc::Sender<Order>,
    pub(super) seen: watch::Receiver<Seen>,
    task: JoinHandle<()>,
}

impl Drop for Gathering {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Gathering {
    /// Gives QEMU what is there of the guest, and begins to serve it.
    pub(super) fn start(
        arrived: Arrived,
        qemu: UnixStream,
        limit: Option<BytesPerSec>,
        reachable: Option<Reachable>,
        known: Known,
    ) -> Self {
        let (to, orders) = mpsc::channel(64);
        let standing = known.again.is_some();
        let first = Seen { total: arrived.elsewhere, standing, ..Seen::default() };
        let (show, seen) = watch::channel(first);
        let (from_qemu, to_qemu) = qemu.into_split();
        let (results, fetched) = mpsc::channel(64);
        let key = arrived.key.clone();
        let stores = reachable.zip(key).map(|(at, key)| Stores::new(at, key, results));
        let mut driver = Driver::new(arrived, to_qemu, show, limit, known);
        driver.stores = stores;
        let task = crate::tasks::spawn("gather", driver.run(from_qemu, orders, fetched));
        Self { to, seen, task }
    }

    /// Tells it something; nothing happens where it has ended.
    pub(super) async fn tell(&self, order: Order) {
        let _ = self.to.send(order).await;
    }

    /// COMMIT is durable: may the guest run?
    pub(super) async fn commit(&self) -> Result<(), Failure> {
        let (answer, answered) = oneshot::channel();
        self.tell(Order::Commit(answer)).await;
        match answered.await {
            Ok(may) => Ok(may?),
            Err(_) => Err(Failure::ArrivalEnded("before COMMIT")),
        }
    }
}

/// What is known from before: nothing, or what an agent before us was told.
pub(super) struct Known {
    pub(super) journal: Journal,
    /// Of a QEMU that was taken up again.
    pub(super) again: Option<Again>,
    /// COMMIT was durable before.
    pub(super) committed: bool,
}

/// Where an agent before us was with a QEMU that has been taken up again.
pub(super) struct Again {
    /// What it was told of the pages.
    pub(super) told: Vec<Frame>,
    /// QEMU's answers, as far as they have been read.
    pub(super) answers: ReturnReader,
    /// What the guest waits for.
    pub(super) wanted: Vec<PageAt>,
}

struct Driver {
    gather: Gather,
    known: Known,
    layout: RamLayout,
    devices: Bytes,
    writer: StreamWriter,
    to_qemu: OwnedWriteHalf,
    answers: ReturnReader,
    /// Of a QEMU that was taken up again: what was told of the pages, and those that it waits for.
    before: Option<(Vec<Frame>, Vec<PageAt>)>,
    show: watch::Sender<Seen>,
    /// Pages that have come and are not written yet.
    came: BTreeMap<PageAt, Bytes>,
    demands: Option<Lane>,
    background: Option<Lane>,
    /// What was asked of the source and has not come.
    asked: BTreeSet<PageAt>,
    /// The background's, in the order in which they come.
    batches: VecDeque<Batch>,
    pace: Pace,
    /// What `pace` counts from.
    began: Instant,
    /// Of scatter-gather.
    stores: Option<Stores>,
    /// Pages in stores of which none that answers has them.
    gone: BTreeSet<PageAt>,
    /// There was nothing to do in the background when it was last asked, or enough was under way.
    idle: bool,
    /// The guest runs. Until it does QEMU's devices touch their pages one after the other, and each would
    /// wait behind the batches that are on the link.
    runs: bool,
    waits: Waits,
    /// The same for pages that were at the source.
    source_waits: Waits,
}

impl Driver {
    fn new(
        arrived: Arrived,
        to_qemu: OwnedWriteHalf,
        show: watch::Sender<Seen>,
        limit: Option<BytesPerSec>,
        mut known: Known,
    ) -> Self {
        let again = known.again.take();
        let mut writer = StreamWriter::with_layout(arrived.layout.clone());
        if again.is_none() {
            compose::opening(&mut writer, &arrived.machine, &arrived.fields, &arrived.layout);
        }
        let (before, answers) = match again {
            Some(Again { told, answers, wanted }) => (Some((told, wanted)), answers),
            None => (None, ReturnReader::new(arrived.layout.clone())),
        };
        Self {
            known,
            before,
            answers,
            gather: arrived.gather,
            layout: arrived.layout,
            devices: arrived.devices,
            writer,
            to_qemu,
            show,
            came: arrived.in_hand,
            demands: None,
            background: None,
            asked: BTreeSet::new(),
            batches: VecDeque::new(),
            pace: Pace::new(limit),
            began: clock::now(),
            stores: None,
            gone: BTreeSet::new(),
            idle: false,
            runs: false,
            waits: Waits::default(),
            source_waits: Waits::default(),
        }
    }

    async fn run(
        mut self,
        from_qemu: OwnedReadHalf,
        orders: mpsc::Receiver<Order>,
        fetched: mpsc::Receiver<Fetched>,
    ) {
        if let Err(failure) = self.serve(from_qemu, orders, fetched).await {
            let line = failure.line();
            tracing::error!(reason = line, "the guest's pages cannot be brought any more");
            self.show.send_modify(|seen| seen.failed = Some(line));
        }
    }

    async fn serve(
        &mut self,
        mut from_qemu: OwnedReadHalf,
        mut orders: mpsc::Receiver<Order>,
        mut fetched: mpsc::Receiver<Fetched>,
    ) -> Result<(), Failure> {
        match self.before.take() {
            None => self.load().await?,
            Some((told, wanted)) => self.go_on(told, wanted).await?,
        }
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        while self.gather.phase() != Phase::Done {
            buffer.reserve(READ_BYTES);
            let (may_turn, turn) = (self.may_turn(), self.began + self.pace.next());
            tokio::select! {
                biased;
                read = from_qemu.read_buf(&mut buffer) => match read.map_err(Failure::Socket)? {
                    0 => return Err(Failure::ArrivalEnded("it closed its stream")),
                    _ => self.hear(buffer.split().freeze()).await?,
                },
                word = lanes::word(&mut self.demands) => {
                    self.take_word(Purpose::ServeDemands, word).await?;
                }
                Some(result) = fetched.recv() => self.take_fetched(result).await?,
                order = orders.recv() => match order {
                    Some(order) => self.obey(order).await?,
                    // Whoever started it has gone.
                    None => return Ok(()),
                },
                word = lanes::word(&mut self.background) => {
                    self.take_word(Purpose::ServeBackground, word).await?;
                }
                () = tokio::time::sleep_until(turn.into()), if may_turn => {
                    self.turn().await?;
                }
            }
            self.show_counts();
        }
        let (of_stores, of_source) = (self.waits.waited(), self.source_waits.waited());
        tracing::info!(?of_stores, ?of_source, "what the guest waited for its pages");
        self.show.send_modify(|seen| seen.done = true);
        Ok(())
    }

    /// Everything up to PACKAGED, and the pages that came with the stream.
    async fn load(&mut self) -> Result<(), Failure> {
        self.apply(Event::Complete).await?;
        let here: Vec<PageAt> = self.came.keys().copied().collect();
        for at in here {
            self.apply(Event::Came(at)).await?;
        }
        Ok(())
    }

    /// What was told to an agent before us holds for QEMU as it is now.
    async fn go_on(&mut self, told: Vec<Frame>, wanted: Vec<PageAt>) -> Result<(), Failure> {
        for frame in told {
            self.take_told(frame).await?;
        }
        if self.known.committed {
            self.apply(Event::Committed).await?;
        }
        for at in wanted {
            self.apply(Event::Fault(at)).await?;
        }
        // What came with the last answer is read without waiting for more.
        self.hear(Bytes::new()).await
    }

    async fn hear(&mut self, bytes: Bytes) -> Result<(), Failure> {
        let now = clock::now();
        self.answers.feed(bytes);
        while let Some(message) = self.answers.read()? {
            match message {
                Message::RequestPages { block, range } => {
                    self.show.send_modify(|seen| seen.faults += u64::from(range.count));
                    for page in range.first..range.first + range.count {
                        let at = PageAt { block, page };
                        match self.gather.ledger().find(at) {
                            Ok(Where::InPack { .. }) => self.waits.asked(at, now),
                            Ok(Where::AtSource) => self.source_waits.asked(at, now),
                            _ => {}
                        }
                        self.apply(Event::Fault(at)).await?;
                    }
                }
                Message::Pong(PING_IN_PACKAGE) => {
                    self.apply(Event::Loaded).await?;
                    self.show.send_modify(|seen| seen.standing = true);
                }
                Message::Shut(0) => self.apply(Event::Shut).await?,
                Message::Shut(_) => return Err(Failure::ArrivalEnded("it reports an error")),
                _ => {}
            }
        }
        Ok(())
    }

    async fn obey(&mut self, order: Order) -> Result<(), Failure> {
        match order {
            Order::Lane(purpose, reader, writer) => {
                self.take_lane(purpose, reader, writer).await;
                Ok(())
            }
            Order::Commit(answer) => {
                let mut actions = Vec::new();
                let may = match self.gather.phase() {
                    // Told again.
                    Phase::Running | Phase::Closing | Phase::Done => Ok(()),
                    _ => self.gather.apply(Event::Committed, &mut actions),
                };
                let committed = may.is_ok();
                let _ = answer.send(may);
                if committed { self.perform(actions).await } else { Ok(()) }
            }
            Order::Runs => {
                self.runs = true;
                Ok(())
            }
            Order::Limit(limit) => {
                self.pace.set(self.began.elapsed(), limit);
                Ok(())
            }
        }
    }

    fn may_turn(&self) -> bool {
        let counts = self.gather.counts();
        // While the source scatters, its pages are not fetched from it in the background: it is to
        // be empty first.
        let scatters = self.stores.as_ref().is_some_and(|stores| !stores.given_up);
        let something = counts.in_pack > 0 || counts.at_source == 0 || !scatters;
        self.runs && self.gather.phase() == Phase::Running && !self.idle && something
    }

    async fn turn(&mut self) -> Result<(), Failure> {
        let mut actions = Vec::new();
        self.gather.apply(Event::Turn, &mut actions)?;
        self.idle = actions.is_empty();
        self.perform(actions).await
    }

    async fn apply(&mut self, event: Event) -> Result<(), Failure> {
        let mut actions = Vec::new();
        self.gather.apply(event, &mut actions)?;
        self.perform(actions).await
    }

    async fn perform(&mut self, actions: Vec<Action>) -> Result<(), Failure> {
        let mut placed = Vec::new();
        for action in actions {
            match action {
                Action::Load => self.write_package(),
                // The hand-over's driver lets the guest run; what is left to do here is to serve it.
                Action::Resume | Action::Finish => {}
                Action::Fetch { at, place } => self.fetch(at, place).await,
                Action::FetchBatch(batch) => self.fetch_batch(batch).await,
                Action::Place(at) => {
                    self.write_page(at);
                    placed.push(at);
                }
                Action::Zeroes(pages) => compose::part(&mut self.writer, |writer| {
                    pages.into_iter().for_each(|at| writer.zero(at));
                }),
                Action::Close => compose::closing(&mut self.writer),
            }
        }
        self.flush().await?;
        if self.waits.any() || self.source_waits.any() {
            let now = clock::now();
            for at in placed {
                self.waits.written(at, now);
                self.source_waits.written(at, now);
            }
        }
        Ok(())
    }

    fn write_package(&mut self) {
        // Nothing is loaded yet, so all of it is named.
        for (block, named) in (0_u16..).zip(self.layout.blocks()) {
            let ranges = vec![PageRange { first: 0, count: named.pages }];
            self.writer.write(&Record::Command(Command::RamDiscard { block, ranges }));
        }
        compose::package(&mut self.writer, &self.devices);
    }

    fn write_page(&mut self, at: PageAt) {
        if let Some(data) = self.came.remove(&at) {
            compose::part(&mut self.writer, |writer| writer.page(at, data));
        }
    }

    async fn flush(&mut self) -> Result<(), Failure> {
        for slice in self.writer.take() {
            self.to_qemu.write_all(&slice).await.map_err(Failure::Socket)?;
        }
        Ok(())
    }

    async fn fetch(&mut self, at: PageAt, place: Where) {
        match (place, &self.stores) {
            (Where::InPack { pack, slot }, Some(stores)) => stores.fetch(at, pack, slot),
            _ => {
                self.asked.insert(at);
                self.ask(&[at]).await;
            }
        }
    }

    async fn fetch_batch(&mut self, batch: Batch) {
        if let (Batch::Pack(pack), Some(stores)) = (&batch, &self.stores) {
            stores.fetch_pack(*pack);
        }
        self.pace.asks(self.began.elapsed(), &batch);
        self.ask_batch(&batch).await;
        self.batches.push_back(batch);
    }

    /// Pages have come that the guest waits for.
    async fn take_demanded(&mut self, pages: Vec<(PageAt, Bytes)>) -> Result<(), Failure> {
        self.show.send_modify(|seen| seen.bytes += (pages.len() * PAGE_BYTES) as u64);
        for (at, data) in pages {
            self.asked.remove(&at);
            self.came.insert(at, data);
            self.arrive(at, Event::Came(at)).await?;
        }
        Ok(())
    }

    /// The background's batch has come from the source.
    async fn take_batch(&mut self, Came { pages, wire }: Came) -> Result<(), Failure> {
        let bytes = (pages.len() * PAGE_BYTES) as u64;
        self.show.send_modify(|seen| seen.bytes += bytes);
        for (at, data) in pages {
            self.came.insert(at, data);
            self.arrive(at, Event::BatchCame(at)).await?;
        }
        self.end_batch();
        self.pace.came(bytes, wire);
        self.apply(Event::BatchEnded).await
    }

    /// The batch that was asked for first is over.
    fn end_batch(&mut self) -> Option<Batch> {
        self.waits.batch_ends();
        // What it leaves may be asked for again.
        self.idle = false;
        self.batches.pop_front()
    }

    /// A page has come: it is written, unless it was here already, or what came does not count.
    async fn arrive(&mut self, at: PageAt, event: Event) -> Result<(), Failure> {
        self.apply(event).await?;
        self.came.remove(&at);
        if self.gather.ledger().find(at) == Ok(Where::Placed) {
            self.gone.remove(&at);
        }
        Ok(())
    }

    fn show_counts(&mut self) {
        let counts = self.gather.counts();
        let told = self.stores.as_ref().is_some_and(|stores| stores.complete);
        let released = told && counts.at_source == 0 && counts.absent == 0;
        let stuck = self.gather.stuck() as u64;
        let waits = &mut self.waits;
        self.show.send_if_modified(|seen| {
            if seen.waited.served != waits.served() {
                seen.waited = waits.waited();
            }
            let arrived = seen.total.saturating_sub(counts.at_source + counts.in_pack);
            let now = (arrived, counts.in_pack, stuck, released);
            let changed = (seen.arrived, seen.stored, seen.stuck, seen.released) != now;
            (seen.arrived, seen.stored, seen.stuck, seen.released) = now;
            changed
        });
    }
}
