//! A stopped guest's pages into stores, so that this host is empty before the destination is ready.
//!
//! ```text
//!  pages of the stopped QEMU -> packs, sealed -> [Scatter]: which store -> PUT, some at once
//!                                                   '-- acknowledged --> told to the destination
//! ```
//!
//! Begun after COMMIT, at the migration's pace. Every page that is not zero goes into a pack, also one
//! that the guest has asked for meanwhile: what is in stores is then all of the guest, whatever becomes
//! of the destination's agent. Where stores fail so that redundancy cannot help, the destination is told
//! to fetch the rest from here.
//!
//! While the stores or the pace are slower than this task, pages are compressed where that makes them fit
//! a narrower slot; a task that is itself what holds things up has no time for it.
//!
//! Used by `source.rs`; what goes where is decided by `lifeboat_scatter_gather::scatter`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units::{Bytes, BytesPerSec};
use lifeboat_scatter_gather::link::Frame;
use lifeboat_scatter_gather::link::pages::{PackNote, PageKey, runs};
use lifeboat_scatter_gather::pack::{
    Batch, Coder, PackBuilder, PackError, RUNS_MOST, Width, pack_bytes_most,
};
use lifeboat_scatter_gather::page::{PackId, PageAt};
use lifeboat_scatter_gather::redundancy::placement::{PlacementError, Placer};
use lifeboat_scatter_gather::redundancy::{Redundancy, StoreId};
use lifeboat_scatter_gather::scatter::{Action, Event, Object, Scatter, ScatterError};
use lifeboat_scatter_gather::seal::{KEY_BYTES, MigrationKey, MigrationTag};
use lifeboat_scatter_gather::store::{RedisStore, StoreError};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::serving::{self, Pace, Teller};
use super::{Failure, SourceTask};
use crate::postcopy::absorb::Absorbed;
use crate::qemu::ram::Ram;
use crate::stores::{self, Plan, StoreLinkError};
use crate::tls::TlsIdentity;

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

/// A migration's stores, reached, with what seals its pages.
pub(super) struct Stores {
    plan: Plan,
    open: Vec<RedisStore>,
    key: [u8; KEY_BYTES],
}

impl Stores {
    /// Reaches every store. Before the guest is touched: a store that is not there costs nothing.
    pub(super) async fn reach(
        plan: Plan,
        migration: &MigrationId,
        identity: Option<&TlsIdentity>,
    ) -> Result<Self, ScatteringError> {
        let mut open = Vec::new();
        for at in &plan.stores {
            open.push(stores::connect(at, migration, identity, None, PATIENCE).await?);
        }
        let key =
            crate::registry::random_token().map_err(|errno| ScatteringError::Key(errno.into()))?;
        Ok(Self { plan, open, key })
    }

    /// The key, for the destination.
    pub(super) fn key(&self) -> PageKey {
        PageKey(self.key)
    }

    /// Whether the guest fits.
    pub(super) fn must_fit(&self, absorbed: &Absorbed) -> Result<(), ScatteringError> {
        // Where pages are compressed, packs of all widths are open at the end.
        let open = Width::NUMBER as u64 - 1;
        let packs = packs_of(absorbed.all(), self.plan.batch).saturating_add(open);
        let packs = packs.saturating_mul(self.pack_bytes());
        let stores = self.plan.stores.len() as u64;
        let needed = match self.plan.redundancy {
            Redundancy::None => packs,
            Redundancy::Mirror => packs.saturating_mul(2),
            // As if stripes were as narrow as they can become while all stores take part.
            Redundancy::Parity => packs.saturating_add(packs.div_ceil((stores - 1).max(1))),
        };
        let room: Bytes = self.plan.offers.iter().map(|offer| offer.room).sum();
        match needed <= room.0 {
            true => Ok(()),
            false => Err(ScatteringError::Room { needed: Bytes(needed), room }),
        }
    }

    fn pack_bytes(&self) -> u64 {
        pack_bytes_most(self.plan.batch, true) as u64
    }

    /// `limit`: what the source may send.
    fn scatter(&self, limit: Option<BytesPerSec>) -> Result<Scatter, ScatteringError> {
        let all: BytesPerSec = self.plan.offers.iter().map(|offer| offer.rate).sum();
        let source = limit.map_or(all, |limit| limit.min(all));
        let placer = Placer::new(&self.plan.offers, self.plan.redundancy, source)?;
        Ok(Scatter::new(self.plan.redundancy, placer, self.pack_bytes()))
    }
}

/// How many packs a guest makes: a pack ends when it is full of pages, or of runs of zeroes.
fn packs_of(pages: impl Iterator<Item = (PageAt, bool)>, batch: Batch) -> u64 {
    let (mut packs, mut slots, mut zero_runs, mut after_zero) = (0, 0, 0, false);
    for (_, zero) in pages {
        if slots == batch.pages() || zero_runs == RUNS_MOST {
            (packs, slots, zero_runs, after_zero) = (packs + 1, 0, 0, false);
        }
        slots += u16::from(!zero);
        zero_runs += usize::from(zero && !after_zero);
        after_zero = zero;
    }
    packs + u64::from(slots > 0 || zero_runs > 0)
}

/// The task that scatters. Dropping it ends it.
pub(super) struct Scattering {
    /// Pages that are in stores.
    pub(super) stored: watch::Receiver<u64>,
    task: JoinHandle<()>,
}

impl Drop for Scattering {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Scattering {
    /// Begins; what is acknowledged is told by way of `teller`.
    pub(super) fn start(
        stores: Stores,
        migration: &MigrationId,
        (memory, absorbed): (Arc<Ram>, Arc<Absorbed>),
        (pace, teller): (Arc<Pace>, Teller),
    ) -> Result<Self, ScatteringError> {
        let tag = MigrationTag::new(migration);
        let scatter = stores.scatter(pace.limit())?;
        let mut sealers = MigrationKey::new(stores.key).into_sealers(tag, 1);
        let coder = Coder::Sealed(sealers.remove(0));
        let builder = PackBuilder::new(tag, stores.plan.batch, coder, PackId(0));
        let (show, stored) = watch::channel(0);
        let driver = Driver {
            pages: absorbed.all().collect(),
            stores: stores.open,
            memory,
            builder,
            scatter,
            pace,
            teller,
            show,
            contents: BTreeMap::new(),
            resending: Vec::new(),
            compress: true,
            under_way: JoinSet::new(),
            ended: false,
        };
        let task = crate::tasks::spawn("scatter", driver.run());
        Ok(Self { stored, task })
    }
}

type Put = (StoreId, Object, Result<(), StoreError>);

struct Driver {
    /// What is still to be packed, in order, and whether it is zero.
    pages: VecDeque<(PageAt, bool)>,
    stores: Vec<RedisStore>,
    memory: Arc<Ram>,
    builder: PackBuilder,
    scatter: Scatter,
    pace: Arc<Pace>,
    teller: Teller,
    show: watch::Sender<u64>,
    /// How wide each pack's slots are, and its pages, by slot.
    contents: BTreeMap<PackId, (Width, Vec<PageAt>)>,
    /// Packs that no store has any more and whose pages are on their way again.
    resending: Vec<PackId>,
    /// Stores or pace are slower than this task.
    compress: bool,
    under_way: JoinSet<Put>,
    ended: bool,
}

impl Driver {
    async fn run(mut self) {
        match self.scatter_all().await {
            Ok(()) => tracing::info!("every page is in a store"),
            Err(failure) => {
                let reason = failure.line();
                tracing::error!(reason, "scattering ends; the destination fetches what is left");
                self.teller.tell(Frame::Abort(reason));
            }
        }
    }

    async fn scatter_all(&mut self) -> Result<(), Failure> {
        while !self.scatter.is_evicted() {
            while let Some(Ok(put)) = self.under_way.try_join_next() {
                self.take_answer(put).await?;
            }
            if self.scatter.kept() < WINDOW_BYTES && !self.ended {
                // All that was put has been acknowledged while this task was busy.
                self.compress &= !self.under_way.is_empty() || self.contents.is_empty();
                self.next_pack().await?;
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
        if chosen.is_empty() {
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
                let slot = self.builder.page(at, &bytes).map_err(ScatteringError::from)?;
                let (width, pages) = self.contents.entry(slot.pack).or_default();
                *width = slot.width;
                pages.push(at);
            }
        }
        self.perform(actions).await
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
        let event = match answer {
            Ok(()) => Event::Acked(store, object),
            Err(StoreError::Full(_)) => Event::Full(store, object),
            Err(error) => {
                tracing::warn!(store = store.0, %error, "a store is lost");
                Event::Lost(store)
            }
        };
        let mut actions = Vec::new();
        self.apply(event, &mut actions)?;
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
                    let (width, pages) = self.contents.get(&pack).cloned().unwrap_or_default();
                    self.show.send_modify(|stored| *stored += pages.len() as u64);
                    let note = PackNote { pack, width, store, protection, pages };
                    self.teller.tell(Frame::Pack(note));
                }
                Action::AnnounceParity { stripe, store } => {
                    self.teller.tell(Frame::Parity { stripe, store });
                }
                Action::Resend(pack) => {
                    let pages = self.contents.get(&pack).into_iter().flat_map(|(_, pages)| pages);
                    self.pages.extend(pages.map(|at| (*at, false)));
                    self.resending.push(pack);
                    self.ended = false;
                }
                Action::Evict => self.teller.tell(Frame::Scattered),
            }
        }
        Ok(())
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
    /// RUNNING has come: the pages go into stores.
    pub(super) fn begin_scattering(&mut self) {
        let (Some(stores), Some(serving)) = (self.stores.take(), &self.serving) else { return };
        let (Some(memory), Some(absorbed)) = (self.memory.clone(), self.absorbed.clone()) else {
            return;
        };
        let teller = serving.teller();
        let outlets = (Arc::clone(&serving.pace), teller.clone());
        match Scattering::start(stores, &self.order.migration, (memory, absorbed), outlets) {
            Ok(scattering) => self.scattering = Some(scattering),
            Err(error) => teller.tell(Frame::Abort(Failure::from(error).line())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat_scatter_gather::page::Version;

    #[test]
    fn as_many_packs_are_counted_as_are_made() {
        let batch = Batch::new(5).unwrap();
        for (every, pages) in [(1, 40), (2, 400), (3, 41), (50, 300), (1000, 17)] {
            let all: Vec<_> =
                (0..pages).map(|page| (PageAt { block: 0, page }, page % every != 0)).collect();
            let tag = MigrationTag::new(&MigrationId::new("m1").unwrap());
            let coder = Coder::Plain(Version(0));
            let mut builder = PackBuilder::new(tag, batch, coder, PackId(0));
            let mut made = 0;
            for (at, zero) in &all {
                if builder.is_full() {
                    made += u64::from(builder.finish().is_some());
                }
                match zero {
                    true => drop(builder.zero(*at).unwrap()),
                    false => drop(builder.page(*at, &[7; 4096]).unwrap()),
                }
            }
            made += u64::from(builder.finish().is_some());
            assert_eq!(packs_of(all.into_iter(), batch), made, "{every} of {pages}");
        }
    }
}
