//! A stopped guest's pages into stores, so that this host is empty before the destination is ready.
//!
//! ```text
//!  pages of the stopped QEMU -> packs, sealed -> [Scatter]: which store -> PUT, some at once
//!                                                   '-- acknowledged --> told to the destination
//! ```
//!
//! Begun after COMMIT, at the migration's pace; where it pays (`policy::predict::ahead`) part of it while the guest
//! still runs here ([`ahead`]). Every page that is not zero goes into a pack, also one
//! that the guest has asked for meanwhile: what is in stores is then all of the guest, whatever becomes
//! of the destination's agent. Where stores fail so that redundancy cannot help, the destination is told
//! to fetch the rest from here.
//!
//! While the stores or the pace are slower than this task, pages are compressed where that makes them fit
//! a narrower slot; a task that is itself what holds things up has no time for it.
//!
//! Used by `source.rs`; what goes where is decided by `lifeboat_scatter_gather::scatter`.

mod ahead;
mod reached;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units::Bytes;
use lifeboat_scatter_gather::link::Frame;
use lifeboat_scatter_gather::link::pages::{PackNote, runs};
use lifeboat_scatter_gather::pack::{Coder, PackBuilder, PackError, Width};
use lifeboat_scatter_gather::page::{PackId, PageAt};
use lifeboat_scatter_gather::redundancy::StoreId;
use lifeboat_scatter_gather::redundancy::directory::Protection;
use lifeboat_scatter_gather::redundancy::placement::PlacementError;
use lifeboat_scatter_gather::scatter::{Action, Event, Object, Scatter, ScatterError};
use lifeboat_scatter_gather::seal::{MigrationKey, MigrationTag};
use lifeboat_scatter_gather::store::{RedisStore, StoreError};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

pub(super) use self::reached::Stores;
use super::serving::{self, Pace, Teller};
use super::{Failure, SourceTask};
use crate::postcopy::absorb::Absorbed;
use crate::postcopy::contents::Contents;
use crate::qemu::ram::Ram;
use crate::stores::StoreLinkError;

/// Bytes that may be under way to stores: enough for several of them on a fast network, and little
/// enough to be through within [`PATIENCE`] on a slow one.
const WINDOW_BYTES: u64 = 6 << 20;
/// How long a store may take to acknowledge: all that is under way may be on its way to it.
const PATIENCE: Duration = Duration::from_secs(20);
/// Before the end is said once more.
const AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Why pages cannot be scattered. Before COMMIT the guest stays; after it the destination fetches
/// what is not in stores from here.
#[derive(Debug, thiserror::Error)]
pub enum ScatteringError {
    /// A store cannot be used.
    #[error(transparent)]
    Link(#[from] StoreLinkError),
    /// The stores do not fit the redundancy.
    #[error(transparent)]
    Place(#[from] PlacementError),
    /// There is too little room for the guest.
    #[error(
        "the guest has {needed} to scatter, redundancy included, and its stores have room for {room}"
    )]
    Room {
        /// What has to go there.
        needed: Bytes,
        /// What fits.
        room: Bytes,
    },
    /// No random numbers for the key.
    #[error("the kernel gives no random bytes for the key of the pages")]
    Key(#[source] std::io::Error),
    /// Scattering cannot go on.
    #[error(transparent)]
    Scatter(#[from] ScatterError),
    /// A page could not be packed.
    #[error(transparent)]
    Pack(#[from] PackError),
}

/// What is known of the pages of a guest whose stream is absorbed; nothing before that has begun.
pub(super) type Known = Arc<OnceLock<Arc<Contents>>>;

/// Pages that are in stores and told.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Stored {
    /// All.
    pub(super) pages: u64,
    /// Those that went there while the guest ran here.
    pub(super) ahead: u64,
}

/// How far the guest is.
enum Stage {
    /// It runs here.
    Live,
    /// It is about to stop: nothing may stand on the link before the last of its stream.
    Held,
    /// It runs at the destination.
    Left(Arc<Absorbed>, Teller),
}

/// The task that scatters. Dropping it ends it.
pub(super) struct Scattering {
    /// What is in stores and told.
    pub(super) stored: watch::Receiver<Stored>,
    stage: watch::Sender<Stage>,
    /// Nothing is under way, and will not be before the guest has left.
    quiet: watch::Receiver<bool>,
    failed: mpsc::Receiver<Failure>,
    task: JoinHandle<()>,
}

impl Drop for Scattering {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Scattering {
    /// Begins at a stage. `contents`: what is known of the pages, for while the guest runs.
    fn start(
        (stores, stage): (Stores, Stage),
        migration: &MigrationId,
        (memory, contents): (Arc<Ram>, Known),
        pace: Arc<Pace>,
    ) -> Result<Self, ScatteringError> {
        let tag = MigrationTag::new(migration);
        let scatter = stores.scatter(pace.limit())?;
        let mut sealers = MigrationKey::new(stores.key).into_sealers(tag, 1);
        let coder = Coder::Sealed(sealers.remove(0));
        let builder = PackBuilder::new(tag, stores.plan.batch, coder, PackId(0));
        let (show, stored) = watch::channel(Stored::default());
        let (stage, now) = watch::channel(stage);
        let (show_quiet, quiet) = watch::channel(false);
        let (fail, failed) = mpsc::channel(1);
        let driver = Driver {
            pages: VecDeque::new(),
            stores: stores.open.clone(),
            memory,
            builder,
            scatter,
            pace,
            teller: None,
            show,
            packs: BTreeMap::new(),
            resending: Vec::new(),
            compress: true,
            under_way: JoinSet::new(),
            ended: false,
            ahead: ahead::Ahead::new(stores, contents),
        };
        let task = crate::tasks::spawn("scatter", driver.run(now, show_quiet, fail));
        Ok(Self { stored, stage, quiet, failed, task })
    }

    /// The guest is about to stop.
    pub(super) fn hold(&self) {
        self.stage.send_if_modified(|stage| {
            let live = matches!(stage, Stage::Live);
            if live {
                *stage = Stage::Held;
            }
            live
        });
    }

    /// Whether it has heard so, and nothing is under way.
    pub(super) fn is_quiet(&self) -> bool {
        *self.quiet.borrow()
    }

    /// The guest has left: the rest of its pages goes, and what is in stores is told.
    fn go_on(&self, absorbed: Arc<Absorbed>, teller: Teller) {
        self.stage.send_replace(Stage::Left(absorbed, teller));
    }

    /// Before the guest has left: why it cannot go on.
    pub(super) fn failure(&mut self) -> Option<Failure> {
        self.failed.try_recv().ok()
    }
}

type Put = (StoreId, Object, Result<(), StoreError>);

/// What is in a pack.
#[derive(Default)]
struct InPack {
    /// How wide its slots are.
    width: Width,
    /// Its pages, by slot; `None` for one that does not count any more.
    pages: Vec<Option<PageAt>>,
    /// Of its first pages, which were read while the guest ran: what was read. Empty once they are known
    /// to hold still what they held.
    hashes: Vec<u64>,
    /// How many of those did.
    ahead: u64,
    /// Its part of what is shown; none before it is told.
    shown: Stored,
}

struct Driver {
    /// What is still to be packed, in order, and whether it is zero.
    pages: VecDeque<(PageAt, bool)>,
    stores: Vec<RedisStore>,
    memory: Arc<Ram>,
    builder: PackBuilder,
    scatter: Scatter,
    pace: Arc<Pace>,
    /// Once the guest has left.
    teller: Option<Teller>,
    show: watch::Sender<Stored>,
    packs: BTreeMap<PackId, InPack>,
    /// Packs that no store has any more and whose pages are on their way again.
    resending: Vec<PackId>,
    /// Stores or pace are slower than this task.
    compress: bool,
    under_way: JoinSet<Put>,
    ended: bool,
    ahead: ahead::Ahead,
}

impl Driver {
    async fn run(
        mut self,
        mut stage: watch::Receiver<Stage>,
        quiet: watch::Sender<bool>,
        fail: mpsc::Sender<Failure>,
    ) {
        let before = self.go_ahead(&mut stage).await;
        let failed = before.err().map(|failure| {
            let reason = failure.line();
            // Nobody asks any more once the guest has left.
            let _ = fail.try_send(failure);
            reason
        });
        // Not before: who sees it quiet has the guest leave.
        quiet.send_replace(true);
        let (absorbed, teller) = match stage.wait_for(|now| matches!(now, Stage::Left(..))).await {
            Ok(now) => match &*now {
                Stage::Left(absorbed, teller) => (Arc::clone(absorbed), teller.clone()),
                Stage::Live | Stage::Held => return,
            },
            Err(_) => return,
        };
        self.teller = Some(teller.clone());
        let ended = match failed {
            Some(reason) => Err(reason),
            None => {
                self.take_the_rest(absorbed.contents());
                self.scatter_all().await.map_err(|failure| failure.line())
            }
        };
        match ended {
            Ok(()) => tracing::info!("every page is in a store"),
            Err(reason) => {
                tracing::error!(reason, "scattering ends; the destination fetches what is left");
                teller.tell(Frame::Abort(reason));
            }
        }
    }

    async fn scatter_all(&mut self) -> Result<(), Failure> {
        while !self.scatter.is_evicted() {
            while let Some(Ok(put)) = self.under_way.try_join_next() {
                self.take_answer(put).await?;
            }
            let compared = self.compare_next()?;
            if self.scatter.kept() < WINDOW_BYTES && !self.ended {
                // All that was put has been acknowledged while this task was busy.
                self.compress &= !self.under_way.is_empty() || self.packs.is_empty();
                self.next_pack().await?;
                continue;
            }
            if compared {
                continue;
            }
            // From here on it waits.
            self.compress = true;
            match self.under_way.join_next().await {
                Some(Ok(put)) => self.take_answer(put).await?,
                // Nothing is under way and something is missing: the end is said once more.
                Some(Err(_)) | None => {
                    self.ended = false;
                    tokio::time::sleep(AGAIN_AFTER).await;
                }
            }
        }
        Ok(())
    }

    /// Fills one pack and sends it; says when there is nothing left.
    async fn next_pack(&mut self) -> Result<(), Failure> {
        let mut data = Vec::new();
        let mut chosen = Vec::new();
        while chosen.len() < usize::from(self.builder.batch().pages()) {
            let Some((at, zero)) = self.pages.pop_front() else { break };
            if !zero {
                data.push(at);
            }
            chosen.push((at, zero));
        }
        if chosen.is_empty() && self.ahead.is_compared() {
            let mut actions = Vec::new();
            while self.end_pack(&mut actions)? {}
            for pack in std::mem::take(&mut self.resending) {
                self.apply(Event::Resent(pack), &mut actions)?;
            }
            self.apply(Event::Ended, &mut actions)?;
            self.ended = true;
            return self.perform(actions).await;
        }
        self.builder.compress(self.compress);
        let mut read = serving::read(&self.memory, &runs(&data))?.into_iter();
        let mut actions = Vec::new();
        for (at, zero) in chosen {
            while self.builder.is_full() {
                self.end_pack(&mut actions)?;
            }
            if zero {
                self.builder.zero(at).map_err(ScatteringError::from)?;
            } else if let Some((_, bytes)) = read.next() {
                self.pack(at, &bytes, None)?;
            }
        }
        self.perform(actions).await
    }

    /// Puts a page into the open pack; `hash` of one that the guest may still write to.
    fn pack(&mut self, at: PageAt, bytes: &[u8], hash: Option<u64>) -> Result<(), Failure> {
        let slot = self.builder.page(at, bytes).map_err(ScatteringError::from)?;
        let pack = self.packs.entry(slot.pack).or_default();
        pack.width = slot.width;
        pack.pages.push(Some(at));
        pack.hashes.extend(hash);
        Ok(())
    }

    /// Ends a pack, if one is open.
    fn end_pack(&mut self, actions: &mut Vec<Action>) -> Result<bool, Failure> {
        let Some(pack) = self.builder.finish() else { return Ok(false) };
        self.apply(Event::Pack(pack), actions)?;
        Ok(true)
    }

    fn apply(&mut self, event: Event, actions: &mut Vec<Action>) -> Result<(), Failure> {
        Ok(self.scatter.apply(event, actions).map_err(ScatteringError::from)?)
    }

    async fn take_answer(&mut self, (store, object, answer): Put) -> Result<(), Failure> {
        let mut actions = Vec::new();
        let event = match &answer {
            Ok(()) => Event::Acked(store, object),
            Err(StoreError::Full(_)) => Event::Full(store, object),
            Err(error) => {
                tracing::warn!(store = store.0, %error, "a store is lost");
                Event::Lost(store)
            }
        };
        match (self.apply(event, &mut actions), answer) {
            (Ok(()), _) => {}
            (Err(failure), Ok(())) => return Err(failure),
            // Whoever looks for another way has to know whose fault it was.
            (Err(failure), Err(error)) => {
                let at = self.ahead.place(store);
                return Err(at.map_or(failure, |at| StoreLinkError::of(at, error).into()));
            }
        }
        self.perform(actions).await
    }

    async fn perform(&mut self, actions: Vec<Action>) -> Result<(), Failure> {
        for action in actions {
            match action {
                Action::Put { store, object, bytes } => {
                    let wait = self.pace.book(bytes.len());
                    if !wait.is_zero() {
                        self.compress = true;
                        tokio::time::sleep(wait).await;
                    }
                    self.put(store, object, bytes);
                }
                Action::AnnouncePack { pack, store, protection } => {
                    self.announce(pack, store, protection);
                }
                Action::AnnounceParity { stripe, store } => {
                    self.tell(Frame::Parity { stripe, store });
                }
                Action::Resend(pack) => self.resend(pack),
                Action::Evict => self.tell(Frame::Scattered),
            }
        }
        Ok(())
    }

    /// Tells that a pack is acknowledged, once what is in it is known to count.
    fn announce(&mut self, pack: PackId, store: StoreId, protection: Protection) {
        let Some(told) = self.packs.get_mut(&pack) else { return };
        if !told.hashes.is_empty() {
            return self.ahead.wait_for_comparison(pack, store, protection);
        }
        let (width, pages) = (told.width, told.pages.clone());
        let note = PackNote { pack, width, store, protection, pages };
        let pages = note.pages.iter().flatten().count() as u64;
        let shown = Stored { pages, ahead: told.ahead };
        told.shown = shown;
        self.show.send_modify(|stored| {
            stored.pages += shown.pages;
            stored.ahead += shown.ahead;
        });
        self.tell(Frame::Pack(note));
    }

    fn tell(&mut self, frame: Frame) {
        match &self.teller {
            Some(teller) => teller.tell(frame),
            None => self.ahead.tell_later(frame),
        }
    }

    fn resend(&mut self, pack: PackId) {
        let Some(again) = self.packs.get_mut(&pack) else { return };
        let pages: Vec<PageAt> = again.pages.iter().flatten().copied().collect();
        let shown = std::mem::take(&mut again.shown);
        self.show.send_modify(|stored| {
            stored.pages -= shown.pages;
            stored.ahead -= shown.ahead;
        });
        // Before the guest has left they only count as not read.
        let again = self.ahead.give_back(pages);
        self.pages.extend(again.into_iter().map(|at| (at, false)));
        self.resending.push(pack);
        self.ended = false;
    }

    fn put(&mut self, store: StoreId, object: Object, bytes: bytes::Bytes) {
        let Some(open) = self.stores.get(usize::from(store.0)).cloned() else { return };
        self.under_way.spawn(async move {
            let key = match object {
                Object::Pack(pack) | Object::Copy(pack) => open.keys().pack(pack),
                Object::Parity(stripe) => open.keys().parity(stripe),
            };
            let answer = open.put(&key, &bytes).await;
            (store, object, answer)
        });
    }
}

impl SourceTask {
    /// QEMU's stream begins: where it pays, pages go into stores from now on.
    pub(super) fn scatter_ahead(&mut self, contents: Known) -> Result<(), ScatteringError> {
        if let Some(stores) = self.stores.clone().filter(Stores::are_for_a_live_guest) {
            self.scattering = self.scatter(stores, Stage::Live, contents)?;
        }
        Ok(())
    }

    fn scatter(
        &self,
        stores: Stores,
        stage: Stage,
        contents: Known,
    ) -> Result<Option<Scattering>, ScatteringError> {
        let (Some(serving), Some(memory)) = (&self.serving, &self.memory) else { return Ok(None) };
        let pace = Arc::clone(&serving.pace);
        let of_guest = (Arc::clone(memory), contents);
        Scattering::start((stores, stage), &self.order.migration, of_guest, pace).map(Some)
    }

    /// RUNNING has come: the pages go into stores.
    pub(super) fn begin_scattering(&mut self) {
        let (Some(stores), Some(serving)) = (self.stores.take(), &self.serving) else { return };
        let (Some(absorbed), teller) = (self.absorbed.clone(), serving.teller()) else { return };
        if let Some(scattering) = &self.scattering {
            return scattering.go_on(absorbed, teller);
        }
        let stage = Stage::Left(absorbed, teller.clone());
        match self.scatter(stores, stage, Known::default()) {
            Ok(scattering) => self.scattering = scattering,
            Err(error) => teller.tell(Frame::Abort(Failure::from(error).line())),
        }
    }
}
