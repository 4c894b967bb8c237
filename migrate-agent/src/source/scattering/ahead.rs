//! Pages into stores while their guest still runs here, where that empties its host sooner.
//!
//! ```text
//!  Live   pages that QEMU has sent are read once and packed; what is acknowledged is kept to be told
//!  Held   nothing new goes, so that the last of the stream finds an empty link
//!  Left   each of those pages is read again and compared: a slot that differs does not count, and its page goes
//!         with the rest. A pack is told when it is compared
//! ```
//!
//! What a page holds when its guest stands still decides, and no record of writes: under TCG such a record has
//! gaps (docs/decisions/0006). What QEMU sends again is not even compared. When it pays is decided by
//! `policy::predict::ahead`; docs/decisions/0055 says what it brings.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use lifeboat_scatter_gather::link::Frame;
use lifeboat_scatter_gather::link::pages::runs;
use lifeboat_scatter_gather::page::{PackId, PageAt};
use lifeboat_scatter_gather::redundancy::StoreId;
use lifeboat_scatter_gather::redundancy::directory::Protection;
use tokio::sync::watch;
use xxhash_rust::xxh3::xxh3_64;

use super::{Driver, Known, Stage, Stores, WINDOW_BYTES};
use crate::handover::gathering::StoreAt;
use crate::postcopy::contents::Contents;
use crate::source::{Failure, SourceTask, serving};

/// What is under way when the guest is about to stop takes so long at most: its last pages go the same way.
const UNDER_WAY: Duration = Duration::from_millis(20);
/// While there is no page to read, it is looked again.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What was done ahead.
pub(super) struct Ahead {
    stores: Stores,
    contents: Known,
    /// The page that is looked at next.
    next: u32,
    /// Whether the guest still runs here.
    live: bool,
    /// Packs whose pages are to be compared.
    compare: VecDeque<PackId>,
    /// Packs that are acknowledged and not compared: where they are.
    acknowledged: BTreeMap<PackId, (StoreId, Protection)>,
    /// What is told when the guest has left.
    later: Vec<Frame>,
}

impl Ahead {
    pub(super) fn new(stores: Stores, contents: Known) -> Self {
        let (compare, acknowledged, later) = (VecDeque::new(), BTreeMap::new(), Vec::new());
        Self { stores, contents, next: 0, live: true, compare, acknowledged, later }
    }

    /// Where a store is.
    pub(super) fn place(&self, store: StoreId) -> Option<&StoreAt> {
        self.stores.plan.stores.get(usize::from(store.0))
    }

    /// Whether every page that was read ahead has been compared.
    pub(super) fn is_compared(&self) -> bool {
        self.compare.is_empty()
    }

    pub(super) fn wait_for_comparison(&mut self, pack: PackId, store: StoreId, by: Protection) {
        self.acknowledged.insert(pack, (store, by));
    }

    pub(super) fn tell_later(&mut self, frame: Frame) {
        self.later.push(frame);
    }

    /// No store has these pages any more. Those that are to be sent again at once.
    pub(super) fn give_back(&mut self, pages: Vec<PageAt>) -> Vec<PageAt> {
        if let Some(contents) = self.contents.get() {
            pages.iter().for_each(|at| contents.give_back(at.page));
        }
        if self.live { Vec::new() } else { pages }
    }

    /// Pages that may be read now, in order.
    fn take(&mut self, most: usize) -> Vec<PageAt> {
        let Some(contents) = self.contents.get() else { return Vec::new() };
        let (mut taken, block) = (Vec::new(), contents.block());
        while taken.len() < most && self.next < contents.len() {
            // Behind what QEMU has sent nothing is known.
            if !contents.is_zero(self.next) && !contents.is_data(self.next) {
                break;
            }
            if contents.take_ahead(self.next) {
                taken.push(PageAt { block, page: self.next });
            }
            self.next += 1;
        }
        taken
    }

    /// Whether all of the guest fits beside what was read in vain.
    fn has_room(&self) -> bool {
        let Some(contents) = self.contents.get() else { return true };
        let pages = contents.data() + contents.stale();
        let packs = pages.div_ceil(self.stores.plan.batch.pages().into());
        // What the zeroes take in packs is little, and counted before the guest stops.
        self.stores.must_have_room(packs).is_ok()
    }
}

impl Driver {
    /// Until the guest is about to stop.
    pub(super) async fn go_ahead(
        &mut self,
        stage: &mut watch::Receiver<Stage>,
    ) -> Result<(), Failure> {
        let batch = usize::from(self.builder.batch().pages());
        while matches!(*stage.borrow(), Stage::Live) {
            while let Some(Ok(put)) = self.under_way.try_join_next() {
                self.take_answer(put).await?;
            }
            let pages = match self.scatter.kept() < self.window() && self.ahead.has_room() {
                true => self.ahead.take(batch),
                false => Vec::new(),
            };
            if !pages.is_empty() {
                // As in `scatter_all`.
                self.compress &= !self.under_way.is_empty() || self.packs.is_empty();
                self.pack_ahead(&pages).await?;
                continue;
            }
            self.compress |= !self.under_way.is_empty();
            tokio::select! {
                Some(Ok(put)) = self.under_way.join_next() => self.take_answer(put).await?,
                _ = stage.changed() => {}
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
        while let Some(Ok(put)) = self.under_way.join_next().await {
            self.take_answer(put).await?;
        }
        Ok(())
    }

    fn window(&self) -> u64 {
        let soon = self.pace.limit().map_or(WINDOW_BYTES, |limit| limit.over(UNDER_WAY).0);
        soon.clamp(1, WINDOW_BYTES)
    }

    async fn pack_ahead(&mut self, pages: &[PageAt]) -> Result<(), Failure> {
        self.builder.compress(self.compress);
        let mut actions = Vec::new();
        for (at, bytes) in serving::read(&self.memory, &runs(pages))? {
            while self.builder.is_full() {
                self.end_pack(&mut actions)?;
            }
            self.pack(at, &bytes, Some(xxh3_64(&bytes)))?;
        }
        self.perform(actions).await
    }

    /// The guest has left: what was not read ahead is to go, and what was is to be compared.
    pub(super) fn take_the_rest(&mut self, contents: &Arc<Contents>) {
        self.ahead.live = false;
        let is_ahead = |at: &PageAt| contents.is_ahead(at.page);
        self.pages = contents.all().filter(|(at, _)| !is_ahead(at)).collect();
        let hashed = self.packs.iter().filter(|(_, pack)| !pack.hashes.is_empty());
        self.ahead.compare = hashed.map(|(pack, _)| *pack).collect();
        if !self.ahead.compare.is_empty() {
            let (packs, stale) = (self.ahead.compare.len(), contents.stale());
            tracing::info!(packs, stale, "pages went to stores while the guest ran here");
        }
        for frame in std::mem::take(&mut self.ahead.later) {
            self.tell(frame);
        }
    }

    /// Compares the pages of one pack with what the guest left, and tells of it if it is acknowledged. Whether
    /// there was one.
    pub(super) fn compare_next(&mut self) -> Result<bool, Failure> {
        let Some(id) = self.ahead.compare.pop_front() else { return Ok(false) };
        let contents = self.ahead.contents.get();
        let (Some(pack), Some(contents)) = (self.packs.get_mut(&id), contents) else {
            return Ok(true);
        };
        let hashes = std::mem::take(&mut pack.hashes);
        let read_ahead = pack.pages.iter().take(hashes.len()).flatten();
        let still: Vec<PageAt> =
            read_ahead.copied().filter(|at| contents.is_ahead(at.page)).collect();
        let mut now = serving::read(&self.memory, &runs(&still))?.into_iter().peekable();
        for (slot, hash) in pack.pages.iter_mut().zip(hashes) {
            let Some((at, bytes)) = now.next_if(|(at, _)| Some(*at) == *slot) else {
                *slot = None;
                continue;
            };
            if xxh3_64(&bytes) == hash {
                pack.ahead += 1;
                continue;
            }
            contents.give_back(at.page);
            self.pages.push_back((at, false));
            *slot = None;
        }
        if let Some((store, protection)) = self.ahead.acknowledged.remove(&id) {
            self.announce(id, store, protection);
        }
        Ok(true)
    }
}

impl SourceTask {
    /// While QEMU copies: what goes ahead must go well, and ends with the first pass over all memory.
    pub(in crate::source) fn heed_scattering(&mut self, passes: u64) -> Result<(), Failure> {
        let Some(scattering) = &mut self.scattering else { return Ok(()) };
        if passes >= 2 {
            scattering.hold();
        }
        scattering.failure().map_or(Ok(()), Err)
    }

    /// Whether nothing of what goes ahead is on the link.
    pub(in crate::source) fn scattering_is_quiet(&self) -> bool {
        self.scattering.as_ref().is_none_or(super::Scattering::is_quiet)
    }
}
