//! Which page comes next: what the guest waits for first, everything else in the background. Pure;
//! used by [`super::Gather`].
//!
//! A demand is fetched by itself, at once, whatever is under way; of the background there is never
//! more than one pack under way, so that a demand waits behind at most one. Of the source's batches
//! there are two: while one is on its way the next one is asked for, or the link would stand idle
//! for a round trip after each. The background goes where the guest was last seen: the rest of the
//! pack that the last demand came from is likely to be wanted soon. Pages of zeroes need no
//! fetching: on demand they are placed on the spot, in the background last.
//!
//! The bytes are the driver's: it fetches, says what came, and writes what [`Action`] tells it to.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use lifeboat_scatter_gather::ledger::{Ledger, LedgerError, Placing, Where};
use lifeboat_scatter_gather::link::pages::PageRun;
use lifeboat_scatter_gather::page::{PackId, PageAt};

/// So many batches of the source's are under way at once.
pub const SOURCE_AHEAD: usize = 2;
/// Before every other page.
const FIRST: PageAt = PageAt { block: 0, page: 0 };
/// Pages of zeroes that are placed in one turn: 36 KB of stream.
const ZEROES_MOST: usize = 4096;

/// Some pages that are fetched together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Batch {
    /// What waits in this pack.
    Pack(PackId),
    /// These pages, from the source's agent.
    Source(Vec<PageAt>),
}

impl Batch {
    /// Those that are asked for one by one.
    fn pages(&self) -> &[PageAt] {
        match self {
            Self::Source(pages) => pages,
            Self::Pack(_) => &[],
        }
    }
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Write discards for every page that is not loaded, and PACKAGED.
    Load,
    /// Let the guest run.
    Resume,
    /// Fetch this page before anything else.
    Fetch {
        /// The page.
        at: PageAt,
        /// Where it is.
        place: Where,
    },
    /// Fetch these pages at the background's pace.
    FetchBatch(Batch),
    /// Write this page, which has just come, to QEMU.
    Place(PageAt),
    /// Write these pages of zeroes to QEMU.
    Zeroes(Vec<PageAt>),
    /// Write RAM END and the end of the stream.
    Close,
    /// Everything is here: the stores can be freed.
    Finish,
}

/// Demands, the background, and the ledger that both are checked against.
#[derive(Debug)]
pub struct Service {
    ledger: Ledger,
    /// Demands under way, and where each is fetched from.
    wanted: BTreeMap<PageAt, Where>,
    /// Pages to which there is no way now.
    gone: BTreeSet<PageAt>,
    /// In the order in which they end: one pack, or batches of the source's.
    under_way: VecDeque<Batch>,
    batch: usize,
    /// The pack that the last demand came from.
    near: Option<PackId>,
    next_pack: PackId,
    next_page: PageAt,
    /// No page before this one is an unplaced page of zeroes: none becomes one while pages are
    /// placed.
    next_zero: PageAt,
}

impl Service {
    /// A service over a ledger; batches from the source have `batch` pages.
    #[must_use]
    pub fn new(ledger: Ledger, batch: usize) -> Self {
        Self {
            ledger,
            wanted: BTreeMap::new(),
            gone: BTreeSet::new(),
            under_way: VecDeque::new(),
            batch: batch.max(1),
            near: None,
            next_pack: PackId(0),
            next_page: FIRST,
            next_zero: FIRST,
        }
    }

    /// The ledger.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// How many pages have no way to them.
    #[must_use]
    pub fn gone(&self) -> usize {
        self.gone.len()
    }

    /// Notes a record; a demand that had no way is fetched from there.
    ///
    /// # Errors
    /// The ledger's.
    pub fn note(
        &mut self,
        at: PageAt,
        place: Where,
        actions: &mut Vec<Action>,
    ) -> Result<(), LedgerError> {
        self.ledger.note(at, place)?;
        if self.gone.remove(&at) && self.ledger.is_closed() {
            self.next_pack = PackId(0);
            self.fault(at, actions)?;
        }
        Ok(())
    }

    /// The same of many pages, before they are placed.
    ///
    /// # Errors
    /// The ledger's.
    pub fn note_run(&mut self, run: PageRun, place: Where) -> Result<(), LedgerError> {
        let pages = run.first..run.first.saturating_add(run.count);
        self.ledger.note_run(run.block, pages, place)
    }

    /// From now on pages are placed.
    ///
    /// # Errors
    /// The ledger's.
    pub fn close(&mut self) -> Result<(), LedgerError> {
        self.ledger.close()
    }

    /// The guest waits for a page.
    ///
    /// # Errors
    /// The ledger's: there is no such page.
    pub fn fault(&mut self, at: PageAt, actions: &mut Vec<Action>) -> Result<(), LedgerError> {
        let place = self.ledger.find(at)?;
        match place {
            // It is on its way to QEMU, which asks again when several of its threads wait.
            Where::Placed => {}
            Where::Zero => {
                self.ledger.place(at)?;
                actions.push(Action::Zeroes(vec![at]));
            }
            Where::InPack { pack, .. } => {
                self.near = Some(pack);
                self.fetch(at, place, actions);
            }
            Where::AtSource => self.fetch(at, place, actions),
            Where::Absent => return Err(LedgerError::NotNow(at, place)),
        }
        Ok(())
    }

    /// A page that was demanded has come.
    ///
    /// # Errors
    /// The ledger's.
    pub fn came(&mut self, at: PageAt, actions: &mut Vec<Action>) -> Result<(), LedgerError> {
        self.place(at, actions)
    }

    /// A page of the background's batch has come.
    ///
    /// # Errors
    /// The ledger's.
    pub fn batch_came(&mut self, at: PageAt, actions: &mut Vec<Action>) -> Result<(), LedgerError> {
        self.place(at, actions)
    }

    /// A page has come with its whole pack. What is in a pack counts only where the ledger has the page there: one
    /// that was written to after it had been packed is in another place.
    ///
    /// # Errors
    /// The ledger's.
    pub fn pack_came(
        &mut self,
        at: PageAt,
        place: Where,
        actions: &mut Vec<Action>,
    ) -> Result<(), LedgerError> {
        if self.ledger.find(at)? != place {
            return Ok(());
        }
        self.place(at, actions)
    }

    /// A demand failed: it is fetched again, from where the page is by now. Which way leads there
    /// with a store less is the driver's.
    ///
    /// # Errors
    /// The ledger's.
    pub fn failed(&mut self, at: PageAt, actions: &mut Vec<Action>) -> Result<(), LedgerError> {
        self.wanted.remove(&at);
        self.fault(at, actions)
    }

    /// No way leads to this page any more.
    ///
    /// # Errors
    /// The ledger's: there is no such page.
    pub fn lose(&mut self, at: PageAt) -> Result<(), LedgerError> {
        if self.ledger.find(at)? != Where::Placed {
            self.wanted.remove(&at);
            self.gone.insert(at);
        }
        Ok(())
    }

    /// The background's batch that was asked for first is over.
    pub fn batch_ended(&mut self) {
        self.under_way.pop_front();
    }

    /// The background may go on: one batch, unless enough is under way.
    pub fn turn(&mut self, actions: &mut Vec<Action>) {
        let batch = match self.under_way.back() {
            None => self.next_batch(),
            Some(_) => self.batch_ahead(),
        };
        if let Some(batch) = batch {
            self.under_way.push_back(batch.clone());
            actions.push(Action::FetchBatch(batch));
        }
        if !self.under_way.is_empty() {
            return;
        }
        let zeroes = self.zeroes();
        if !zeroes.is_empty() {
            actions.push(Action::Zeroes(zeroes));
        }
    }

    fn fetch(&mut self, at: PageAt, place: Where, actions: &mut Vec<Action>) {
        // Once is enough, unless the page has moved since.
        if !self.gone.contains(&at) && self.wanted.insert(at, place) != Some(place) {
            actions.push(Action::Fetch { at, place });
        }
    }

    fn place(&mut self, at: PageAt, actions: &mut Vec<Action>) -> Result<(), LedgerError> {
        self.wanted.remove(&at);
        self.gone.remove(&at);
        if let Placing::Now(_) = self.ledger.place(at)? {
            actions.push(Action::Place(at));
        }
        Ok(())
    }

    /// Near the last demand, then packs in their order, then what is at the source.
    fn next_batch(&mut self) -> Option<Batch> {
        let near = self.near.take().filter(|pack| self.ledger.live(*pack) > 0);
        let pack = near.or_else(|| self.pack_in_turn());
        if let Some(pack) = pack {
            return Some(Batch::Pack(pack));
        }
        let pages = self.at_source();
        (!pages.is_empty()).then_some(Batch::Source(pages))
    }

    /// Each pack once around: one that did not come is tried again after all others.
    fn pack_in_turn(&mut self) -> Option<PackId> {
        let found =
            self.ledger.next_pack(self.next_pack).or_else(|| self.ledger.next_pack(PackId(0)));
        if let Some(pack) = found {
            self.next_pack = PackId(pack.0 + 1);
        }
        found
    }

    /// Another batch of the source's, behind one that is on its way. Packs wait for their turn.
    fn batch_ahead(&mut self) -> Option<Batch> {
        let is_source = |batch: &Batch| matches!(batch, Batch::Source(_));
        let free = self.under_way.len() < SOURCE_AHEAD && self.under_way.iter().all(is_source);
        if !free || self.ledger.next_pack(PackId(0)).is_some() {
            return None;
        }
        let pages = self.at_source();
        (!pages.is_empty()).then_some(Batch::Source(pages))
    }

    fn at_source(&mut self) -> Vec<PageAt> {
        if self.ledger.counts().at_source == 0 {
            return Vec::new();
        }
        let mut pages = self.at_source_from(self.next_page);
        if pages.is_empty() {
            pages = self.at_source_from(FIRST);
        }
        // The next batch goes on behind this one; at the end it begins again.
        let last = pages.last().filter(|_| pages.len() == self.batch);
        self.next_page = last.and_then(|last| after(*last)).unwrap_or(FIRST);
        pages
    }

    /// What is at the source and not on its way already, from a page on.
    fn at_source_from(&self, start: PageAt) -> Vec<PageAt> {
        let asked: BTreeSet<PageAt> =
            self.under_way.iter().flat_map(Batch::pages).copied().collect();
        let (mut pages, mut from) = (Vec::new(), Some(start));
        while let Some(at) =
            from.and_then(|from| self.ledger.next_page(from, |p| p == Where::AtSource))
        {
            if !asked.contains(&at) {
                pages.push(at);
            }
            if pages.len() == self.batch {
                break;
            }
            from = after(at);
        }
        pages
    }

    fn zeroes(&mut self) -> Vec<PageAt> {
        let mut pages = Vec::new();
        while self.ledger.counts().zero > 0 && pages.len() < ZEROES_MOST {
            let Some(at) = self.ledger.next_page(self.next_zero, |p| p == Where::Zero) else {
                break;
            };
            self.next_zero = at;
            if self.ledger.place(at).is_err() {
                break;
            }
            pages.push(at);
        }
        pages
    }
}

/// Where to look on behind a page; `None` behind the last that can be named.
fn after(at: PageAt) -> Option<PageAt> {
    Some(PageAt { block: at.block, page: at.page.checked_add(1)? })
}
