//! Pages that wait in stores: which way leads to them now, fetched, opened, and what is done when a
//! store does not answer. Used by the gather's driver.
//!
//! Each store is reached by two connections, one for demands and one for the background, so that a
//! demand never waits behind a pack. A store that fails is passed over at once, and tried again in the
//! background: its run tells whether it still holds what was put there. One that gave back something
//! else than was put there is not asked for that pack again; one that does so again and again for nothing any more.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use lifeboat_scatter_gather::ledger::Where;
use lifeboat_scatter_gather::link::pages::{PackNote, PageKey};
use lifeboat_scatter_gather::pack::{Contents, PackError, Reading, Width};
use lifeboat_scatter_gather::page::{PAGE_BYTES, PackId, PageAt};
use lifeboat_scatter_gather::redundancy::directory::Directory;
use lifeboat_scatter_gather::redundancy::parity::{Parity, ParityError, body_offset, restore};
use lifeboat_scatter_gather::redundancy::{StoreId, StoreSet};
use lifeboat_scatter_gather::seal::{MigrationKey, MigrationTag};
use lifeboat_scatter_gather::store::{Key, StoreError};
use tokio::sync::mpsc;

use super::reachable::{Open, OpenWay, Reachable, Reached, reach, set_of};
use super::{Batch, Driver, Missing};
use crate::postcopy::Event;
use crate::source::Failure;
use crate::stores::StoreLinkError;

/// How long a store may take to give a page or a pack: beyond it the redundant copy is quicker.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);
/// A store that failed is tried again this often.
const AGAIN_AFTER: Duration = Duration::from_millis(500);
/// A store that gave so many packs as they never were is broken, or an enemy's: every one of them costs a guest's wait.
const SPOILED_MOST: usize = 16;

/// What has come of a question to stores.
pub(super) enum Fetched {
    /// To a demand.
    Page(PageAt, Result<Bytes, Trouble>),
    /// To the background's batch.
    Pack(Result<CamePack, Trouble>),
    /// A store answers again.
    Back(StoreId, Reached),
    /// A store answers, and has nothing of what was put there.
    Emptied(StoreId),
}

/// A batch of the background.
pub(super) struct Came {
    pub(super) pages: Vec<(PageAt, Bytes)>,
    /// What it took on its way, bytes.
    pub(super) wire: u64,
}

/// A pack, opened.
pub(super) struct CamePack {
    /// Its pages, by slot.
    pages: Vec<(PageAt, Where, Bytes)>,
    wire: u64,
}

impl CamePack {
    fn of(pack: PackId, (contents, wire): (Contents, u64)) -> Self {
        let place = |slot| Where::InPack { pack, slot };
        let pages = contents.pages.into_iter().map(|page| (page.at, place(page.slot), page.data));
        Self { pages: pages.collect(), wire }
    }
}

/// Why a page did not come, and whose fault that was.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub(super) struct Trouble {
    store: Option<StoreId>,
    /// What it gave for this is not what was put there.
    spoiled: Option<PackId>,
    error: TroubleError,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum TroubleError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Pack(#[from] PackError),
    #[error(transparent)]
    Parity(#[from] ParityError),
    #[error("no store that answers has {0}, and too little of its stripe is left")]
    NoWay(PackId),
}

/// The stores as the gather sees them.
pub(super) struct Stores {
    reachable: Reachable,
    directory: Directory,
    /// Of packs whose slots are not [`Width::WHOLE`].
    narrow: HashMap<PackId, Width>,
    reading: Arc<Reading>,
    /// Do not answer, or lie.
    lost: Vec<bool>,
    /// Of those: have nothing any more, or lie.
    for_ever: Vec<bool>,
    /// Everything is told: what is not in stores never will be.
    pub(super) complete: bool,
    /// The source scatters no more: what is left is fetched from it.
    pub(super) given_up: bool,
    results: mpsc::Sender<Fetched>,
}

impl Stores {
    pub(super) fn new(reachable: Reachable, key: PageKey, results: mpsc::Sender<Fetched>) -> Self {
        let tag = MigrationTag::new(&reachable.migration);
        let opener = Some(MigrationKey::new(key.0).opener(tag));
        let lost: Vec<bool> = reachable.reached.iter().map(Option::is_none).collect();
        let away = (0_u8..).zip(lost.clone()).filter(|(_, lost)| *lost);
        let stores = Self {
            reachable,
            directory: Directory::new(),
            narrow: HashMap::new(),
            reading: Arc::new(Reading { migration: tag, opener }),
            for_ever: vec![false; lost.len()],
            lost,
            complete: false,
            given_up: false,
            results,
        };
        away.for_each(|(store, _)| stores.try_again(StoreId(store)));
        stores
    }

    fn lost(&self) -> StoreSet {
        set_of(&self.lost)
    }

    /// What cannot be read of it now, and what never will be; the source has said that all is told.
    fn without_way(&self) -> WithoutWay {
        if !self.complete {
            return WithoutWay::default();
        }
        let packs = |stores| self.directory.unreadable(set_of(stores)).into_iter().collect();
        let hosts = |is: &dyn Fn(StoreId) -> bool| {
            let named = (0_u8..).zip(&self.reachable.places).filter(|(at, _)| is(StoreId(*at)));
            named.map(|(_, at)| at.host.as_str()).collect::<Vec<_>>().join(", ")
        };
        let (away, for_ever) = (self.lost(), set_of(&self.for_ever));
        let (waiting, lost) = (packs(&self.lost), packs(&self.for_ever));
        let away = hosts(&|store| away.has(store));
        let emptied = hosts(&|store| for_ever.has(store) || self.directory.has_spoiled(store));
        WithoutWay { waiting, away, lost, emptied }
    }

    /// Where to read a pack now, with the connections to do it.
    fn way(&self, pack: PackId, background: bool) -> Result<OpenWay, TroubleError> {
        self.reachable.way(pack, self.directory.way(pack, self.lost()), background)
    }

    /// Fetches one page, which waits in this slot.
    pub(super) fn fetch(&self, at: PageAt, pack: PackId, slot: u16) {
        let (way, reading) = (self.way(pack, false), Arc::clone(&self.reading));
        let width = self.narrow.get(&pack).copied().unwrap_or_default();
        let results = self.results.clone();
        crate::tasks::spawn("page from a store", async move {
            let page = match way {
                Ok(way) => page(way, pack, (slot, width), at, &reading).await,
                Err(error) => Err(Trouble::nobodys(error)),
            };
            // A gather that has ended needs no page.
            let _ = results.send(Fetched::Page(at, page)).await;
        });
    }

    /// Fetches a pack.
    pub(super) fn fetch_pack(&self, pack: PackId) {
        let (way, reading) = (self.way(pack, true), Arc::clone(&self.reading));
        let results = self.results.clone();
        crate::tasks::spawn("pack from a store", async move {
            let came = match way {
                Ok(way) => whole(way, pack, &reading).await.map(|came| CamePack::of(pack, came)),
                Err(error) => Err(Trouble::nobodys(error)),
            };
            let _ = results.send(Fetched::Pack(came)).await;
        });
    }

    /// What a store gave for a pack is not what was put there.
    fn distrust(&mut self, store: StoreId, pack: PackId, error: &TroubleError) {
        if self.directory.spoil(pack, store) >= SPOILED_MOST {
            return self.lose(store, error);
        }
        let host = self.reachable.places.get(usize::from(store.0)).map(|at| at.host.as_str());
        tracing::error!(store = store.0, host, %pack, %error, "a pack is not as it was put there");
    }

    /// Passes a store over, and tries it again unless it lied.
    fn lose(&mut self, store: StoreId, error: &TroubleError) {
        let index = usize::from(store.0);
        let Some(lost) = self.lost.get_mut(index) else { return };
        if std::mem::replace(lost, true) {
            return;
        }
        let host = &self.reachable.places[index].host;
        tracing::error!(store = store.0, host, %error, "a store is passed over");
        let for_ever = match error {
            TroubleError::Store(error) => error.is_loss(),
            _ => true,
        };
        match for_ever {
            true => self.for_ever[index] = true,
            false => self.try_again(store),
        }
    }

    fn try_again(&self, store: StoreId) {
        let index = usize::from(store.0);
        let at = self.reachable.places[index].clone();
        let before = self.reachable.reached[index].clone();
        let migration = self.reachable.migration.clone();
        let (identity, results) = (self.reachable.identity.clone(), self.results.clone());
        crate::tasks::spawn("a store again", async move {
            while !results.is_closed() {
                tokio::time::sleep(AGAIN_AFTER).await;
                match reach(&at, &migration, identity.as_ref(), before.as_ref()).await {
                    Ok(reached) => {
                        let _ = results.send(Fetched::Back(store, reached)).await;
                        return;
                    }
                    Err(StoreLinkError::Store { source, .. }) if source.is_loss() => {
                        tracing::error!(store = store.0, %source, "its pages are lost");
                        let _ = results.send(Fetched::Emptied(store)).await;
                        return;
                    }
                    Err(error) => tracing::debug!(%error, "a store is still away"),
                }
            }
        });
    }
}

/// Packs to which no way leads now, those to which none will, and the hosts whose stores that is for.
#[derive(Default)]
struct WithoutWay {
    waiting: HashSet<PackId>,
    away: String,
    lost: HashSet<PackId>,
    emptied: String,
}

impl Trouble {
    fn nobodys(error: impl Into<TroubleError>) -> Self {
        Self { store: None, spoiled: None, error: error.into() }
    }

    /// What was read does not open: the fault of the store that gave it, if it is one's alone.
    fn does_not_open(from: Option<StoreId>, pack: PackId, error: PackError) -> Self {
        Self { store: from, spoiled: from.map(|_| pack), error: error.into() }
    }
}

fn trouble<E: Into<TroubleError>>(store: StoreId) -> impl Fn(E) -> Trouble {
    move |error| Trouble { store: Some(store), spoiled: None, error: error.into() }
}

/// Some bytes of a value. What lies behind the end of a shorter member of a stripe counts as zeroes.
async fn part(
    (store, open): &Open,
    key: &Key,
    start: usize,
    length: usize,
) -> Result<Bytes, Trouble> {
    match open.get_part(key, start, length).await {
        Ok(bytes) => Ok(bytes.freeze()),
        Err(StoreError::Missing(_)) => Ok(Bytes::new()),
        Err(error) => Err(trouble(*store)(error)),
    }
}

async fn page(
    way: OpenWay,
    pack: PackId,
    (slot, width): (u16, Width),
    at: PageAt,
    reading: &Reading,
) -> Result<Bytes, Trouble> {
    let (start, length) = (width.slot_offset(slot, true), width.slot_bytes(true));
    let (from, bytes) = match way {
        OpenWay::From(open) => {
            let key = open.1.keys().pack(pack);
            let got = open.1.get_part(&key, start, length).await;
            (Some(open.0), got.map_err(trouble(open.0))?)
        }
        OpenWay::Rebuild { stripe, parity, others } => {
            let body = body_offset(others.len() + 1) + start;
            let key = parity.1.keys().parity(stripe);
            let parity = part(&parity, &key, body, length);
            let others = others.iter().map(|(other, open)| async move {
                part(open, &open.1.keys().pack(*other), start, length).await
            });
            let others = futures_util::future::try_join_all(others);
            let (parity, others) = tokio::try_join!(parity, others)?;
            (None, restore(&parity, &others))
        }
    };
    let opened = reading.slot(0, (slot, width), at, bytes);
    opened.map(|page| page.data).map_err(|error| Trouble::does_not_open(from, pack, error))
}

/// Fetches a pack and opens it; what it took on its way, bytes.
pub(super) async fn whole(
    way: OpenWay,
    pack: PackId,
    reading: &Reading,
) -> Result<(Contents, u64), Trouble> {
    let get = async |open: &Open, key: Key| -> Result<BytesMut, Trouble> {
        open.1.get(&key).await.map_err(trouble(open.0))
    };
    let (from, bytes) = match way {
        OpenWay::From(open) => (Some(open.0), get(&open, open.1.keys().pack(pack)).await?),
        OpenWay::Rebuild { stripe, parity, others } => {
            let store = parity.0;
            let parity = get(&parity, parity.1.keys().parity(stripe)).await?.freeze();
            let mut packs = Vec::new();
            for (other, open) in &others {
                packs.push(get(open, open.1.keys().pack(*other)).await?.freeze());
            }
            let parity = Parity::decode(stripe, &parity).map_err(trouble(store))?;
            let made = parity.rebuild(stripe, pack, &packs);
            (None, made.map_err(Trouble::nobodys)?)
        }
    };
    let wire = bytes.len() as u64;
    let contents = reading.pack(pack, bytes);
    let contents = contents.map_err(|error| Trouble::does_not_open(from, pack, error))?;
    Ok((contents, wire))
}

impl Driver {
    /// A store has acknowledged a pack, and the source tells what is in it.
    pub(super) async fn take_pack(&mut self, note: PackNote) -> Result<(), Failure> {
        let Some(stores) = &mut self.stores else { return Ok(()) };
        // On a new connection everything is told again.
        if stores.directory.pack(note.pack, note.store, note.protection).is_err() {
            return Ok(());
        }
        if note.width != Width::WHOLE {
            stores.narrow.insert(note.pack, note.width);
        }
        self.idle = false;
        let counting = (0_u16..).zip(note.pages).filter_map(|(slot, at)| Some((slot, at?)));
        for (slot, at) in counting {
            self.apply(Event::Noted(at, Where::InPack { pack: note.pack, slot })).await?;
            // Asked of a source that is not there now: it is in a store.
            if self.demands.is_none() && self.asked.remove(&at) {
                self.apply(Event::Failed(at)).await?;
            }
        }
        Ok(())
    }

    /// What was asked of the source and is in stores by now is asked of them: the source may be gone
    /// before it answers. Whichever answer comes first is the one that counts.
    pub(super) async fn ask_stores(&mut self) -> Result<(), Failure> {
        let ledger = self.gather.ledger();
        let is_stored = |at: &PageAt| matches!(ledger.find(*at), Ok(Where::InPack { .. }));
        let stored: Vec<PageAt> = self.asked.iter().copied().filter(is_stored).collect();
        for at in stored {
            self.asked.remove(&at);
            self.apply(Event::Failed(at)).await?;
        }
        Ok(())
    }

    pub(super) fn take_parity(&mut self, stripe: u64, store: StoreId) {
        if let Some(stores) = &mut self.stores {
            // Told again on a new connection.
            let _ = stores.directory.parity(stripe, store);
        }
    }

    pub(super) async fn take_fetched(&mut self, fetched: Fetched) -> Result<(), Failure> {
        match fetched {
            Fetched::Page(at, Ok(data)) => {
                self.show.send_modify(|seen| seen.bytes += PAGE_BYTES as u64);
                self.came.insert(at, data);
                self.arrive(at, Event::Came(at)).await
            }
            Fetched::Page(at, Err(trouble)) => {
                let no_way = self.note_trouble(&trouble);
                self.find_again(at, no_way).await
            }
            Fetched::Pack(Ok(came)) => self.take_came_pack(came).await,
            Fetched::Pack(Err(trouble)) => {
                let no_way = self.note_trouble(&trouble);
                if let (Some(Batch::Pack(pack)), true) = (self.end_batch(), no_way) {
                    self.ask_source_for(pack).await;
                }
                self.pace.rest(self.began.elapsed());
                self.apply(Event::BatchEnded).await
            }
            Fetched::Back(store, reached) => self.take_back(store, reached).await,
            Fetched::Emptied(store) => {
                if let Some(stores) = &mut self.stores {
                    stores.for_ever[usize::from(store.0)] = true;
                }
                self.show_what_is_missing();
                Ok(())
            }
        }
    }

    async fn take_came_pack(&mut self, CamePack { pages, wire }: CamePack) -> Result<(), Failure> {
        self.show.send_modify(|seen| seen.bytes += (pages.len() * PAGE_BYTES) as u64);
        for (at, place, data) in pages {
            self.came.insert(at, data);
            self.arrive(at, Event::PackCame(at, place)).await?;
        }
        self.end_batch();
        self.pace.took(self.began.elapsed(), wire);
        self.apply(Event::BatchEnded).await
    }

    /// Counts the pages that no store can give, whether or not the guest waits for one: whoever watches is to know
    /// before it does.
    pub(super) fn show_what_is_missing(&mut self) {
        let Some(stores) = &self.stores else { return };
        let without = stores.without_way();
        let (ledger, mut missing) = (self.gather.ledger(), Missing::default());
        let is_there = |place: Where| matches!(place, Where::InPack { pack, .. } if without.waiting.contains(&pack));
        let mut from = PageAt { block: 0, page: 0 };
        // Most of the time there is nothing to look for.
        while !without.waiting.is_empty()
            && let Some(at) = ledger.next_page(from, is_there)
        {
            match ledger.find(at) {
                Ok(Where::InPack { pack, .. }) if without.lost.contains(&pack) => missing.lost += 1,
                _ => missing.waiting += 1,
            }
            from = PageAt { block: at.block, page: at.page.saturating_add(1) };
        }
        (missing.away, missing.emptied) = (without.away, without.emptied);
        self.show.send_if_modified(|seen| {
            let changed = seen.missing != missing;
            seen.missing = missing;
            changed
        });
    }

    /// Whether no way is left.
    fn note_trouble(&mut self, trouble: &Trouble) -> bool {
        if let (Some(stores), Some(store)) = (&mut self.stores, trouble.store) {
            match trouble.spoiled {
                Some(pack) => stores.distrust(store, pack, &trouble.error),
                None => stores.lose(store, &trouble.error),
            }
            self.show_what_is_missing();
        } else {
            tracing::debug!(error = %trouble.error, "a page did not come");
        }
        trouble.store.is_none()
    }

    /// What no store can give of a pack, of a source that scatters no more: what would have mended the
    /// pack may never have been sent. Before that, what mends it is still on its way.
    async fn ask_source_for(&mut self, pack: PackId) {
        if !self.stores.as_ref().is_some_and(|stores| stores.given_up) {
            return;
        }
        let is_there = |place: Where| matches!(place, Where::InPack { pack: p, .. } if p == pack);
        let (ledger, mut pages) = (self.gather.ledger(), Vec::new());
        let mut from = PageAt { block: 0, page: 0 };
        while let Some(at) = ledger.next_page(from, is_there) {
            pages.push(at);
            // Behind the last page of a block there is none: the search goes on in the next block.
            from = PageAt { block: at.block, page: at.page.saturating_add(1) };
        }
        pages.retain(|at| self.asked.insert(*at));
        tracing::info!(%pack, pages = pages.len(), "no store has it; the source is asked");
        self.ask(&pages).await;
    }

    /// Another way to a page that a store did not give: another store, or the source where it is
    /// still there; without one it waits.
    async fn find_again(&mut self, at: PageAt, no_way: bool) -> Result<(), Failure> {
        if !no_way {
            return self.apply(Event::Failed(at)).await;
        }
        if self.demands.is_some() {
            self.asked.insert(at);
            self.ask(&[at]).await;
            return Ok(());
        }
        self.apply(Event::Gone(at)).await?;
        self.gone.insert(at);
        Ok(())
    }

    async fn take_back(&mut self, store: StoreId, reached: Reached) -> Result<(), Failure> {
        let Some(stores) = &mut self.stores else { return Ok(()) };
        if let Some(place) = stores.reachable.reached.get_mut(usize::from(store.0)) {
            *place = Some(reached);
            stores.lost[usize::from(store.0)] = false;
            tracing::info!(store = store.0, "a store answers again, and has what was put there");
        }
        self.show_what_is_missing();
        self.seek_the_gone().await
    }

    /// Pages without a way are looked for once more.
    pub(super) async fn seek_the_gone(&mut self) -> Result<(), Failure> {
        self.idle = false;
        for at in std::mem::take(&mut self.gone) {
            let place =
                self.gather.ledger().find(at).map_err(crate::postcopy::GatherError::from)?;
            if matches!(place, Where::InPack { .. }) {
                self.apply(Event::Noted(at, place)).await?;
            }
        }
        Ok(())
    }
}
