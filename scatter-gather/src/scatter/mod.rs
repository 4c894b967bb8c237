//! Scattering at the source: where each pack goes, what is acknowledged, and when the source may
//! leave. Pure; driven by the source's agent.
//!
//! ```text
//!  Pack ---> Put pack ---> Acked ---> Announce          per stripe; its bytes are kept until
//!    '-----> Put parity -> Acked ---> Announce          everything of it is acknowledged
//!  Ended, everything acknowledged, every pack readable with the stores that are left ---> Evict
//! ```
//!
//! A store that is full takes nothing more; one that is lost has taken everything with it. What is
//! under way there goes to a store that its stripe does not use yet. Where there is none, what was on
//! its way to a lost store counts as acknowledged and lost at once: the rest of its stripe mends it, as
//! it would a moment later. What was on its way to a full one leaves its stripe without a member, so all of that
//! stripe is sent again in narrower ones, as is whatever redundancy can't mend: until Evict the source still
//! has every page. After Evict nothing is done here any more.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use thiserror::Error;

use crate::pack::Pack;
use crate::page::PackId;
use crate::redundancy::directory::{Directory, DirectoryError, Protection};
use crate::redundancy::parity::{ParityError, Stripe};
use crate::redundancy::placement::{PlacementError, Placer, StripePlaces};
use crate::redundancy::{Redundancy, StoreId, StoreSet};

/// Something that lies in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Object {
    /// A pack.
    Pack(PackId),
    /// The second copy of a pack, under the same name in another store.
    Copy(PackId),
    /// The parity of a stripe.
    Parity(u64),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A pack is full.
    Pack(Pack),
    /// No pack follows; after [`Action::Resend`] it is said again.
    Ended,
    /// A store has acknowledged an object.
    Acked(StoreId, Object),
    /// A store has no room for an object.
    Full(StoreId, Object),
    /// A store is gone, or was restarted.
    Lost(StoreId),
    /// The pages of a pack that was lost are in later packs.
    Resent(PackId),
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Put these bytes into this store.
    Put {
        /// The store.
        store: StoreId,
        /// What it is.
        object: Object,
        /// Its bytes.
        bytes: Bytes,
    },
    /// Tell the destination: this pack can be read there.
    AnnouncePack {
        /// The pack.
        pack: PackId,
        /// Its store.
        store: StoreId,
        /// What protects it.
        protection: Protection,
    },
    /// Tell the destination: the parity of this stripe can be read there.
    AnnounceParity {
        /// The stripe.
        stripe: u64,
        /// Its store.
        store: StoreId,
    },
    /// Send the pages of this pack again: no store has them any more.
    Resend(PackId),
    /// Everything is acknowledged where it will be read from: the source may go.
    Evict,
}

/// Why it does not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ScatterError {
    /// No store takes anything more.
    #[error(transparent)]
    Place(#[from] PlacementError),
    /// A stripe cannot be made.
    #[error(transparent)]
    Parity(#[from] ParityError),
    /// The driver's numbers do not fit.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// An object that is under way finds no other place.
    #[error("no store is left for {0:?}")]
    NoPlace(Object),
    /// A pack after the end, or after the source was let go.
    #[error("{0} comes after the end")]
    AfterEnd(PackId),
}

/// An object that is not acknowledged yet.
#[derive(Debug, Clone)]
struct UnderWay {
    store: StoreId,
    stripe: u64,
    bytes: Bytes,
}

/// A stripe of which something is not acknowledged.
#[derive(Debug, Clone)]
struct OpenStripe {
    places: StripePlaces,
    parity: Option<Stripe>,
    packs: usize,
    /// Where its objects are, acknowledged or not.
    used: StoreSet,
    /// For a mirror: the stores that have acknowledged.
    acked: Vec<StoreId>,
}

impl OpenStripe {
    /// Where its objects are or will be: two of a stripe in one store would be lost together.
    fn used_or_promised(&self) -> StoreSet {
        let mut all = self.used;
        let promised = self.places.packs.iter().skip(self.packs).chain(&self.places.redundant);
        promised.for_each(|store| all.add(*store));
        all
    }
}

/// A source's pages on their way into stores.
#[derive(Debug)]
pub struct Scatter {
    redundancy: Redundancy,
    placer: Placer,
    directory: Directory,
    lost: StoreSet,
    stripes: BTreeMap<u64, OpenStripe>,
    /// The stripe that takes the next pack.
    filling: Option<u64>,
    next_stripe: u64,
    under_way: BTreeMap<Object, UnderWay>,
    missing: BTreeSet<PackId>,
    resent: BTreeSet<PackId>,
    pack_bytes: u64,
    ended: bool,
    evicted: bool,
}

impl Scatter {
    /// A scatter over the placer's stores. No pack or parity is longer than `pack_bytes`.
    #[must_use]
    pub fn new(redundancy: Redundancy, placer: Placer, pack_bytes: u64) -> Self {
        Self {
            redundancy,
            placer,
            directory: Directory::new(),
            lost: StoreSet::default(),
            stripes: BTreeMap::new(),
            filling: None,
            next_stripe: 0,
            under_way: BTreeMap::new(),
            missing: BTreeSet::new(),
            resent: BTreeSet::new(),
            pack_bytes,
            ended: false,
            evicted: false,
        }
    }

    /// Bytes that are kept because they are not acknowledged yet: bounds how far the source may run
    /// ahead of its stores.
    #[must_use]
    pub fn kept(&self) -> u64 {
        self.under_way.values().map(|object| object.bytes.len() as u64).sum()
    }

    /// May the source go?
    #[must_use]
    pub fn is_evicted(&self) -> bool {
        self.evicted
    }

    /// Takes an event in, and says what is to be done.
    ///
    /// # Errors
    /// [`ScatterError`]: the migration cannot go on this way. The source still has every page.
    pub fn apply(&mut self, event: Event, actions: &mut Vec<Action>) -> Result<(), ScatterError> {
        match event {
            Event::Pack(pack) => self.pack(pack, actions)?,
            Event::Ended => {
                self.ended = true;
                self.close_stripe(actions)?;
            }
            Event::Acked(store, object) => self.acked(store, object, actions)?,
            Event::Full(store, object) => {
                self.placer.fill(store);
                if self.under_way.get(&object).is_some_and(|under_way| under_way.store == store) {
                    self.elsewhere_or_lost(object, actions)?;
                }
            }
            Event::Lost(store) => self.lose(store, actions)?,
            Event::Resent(pack) => {
                self.missing.remove(&pack);
                self.resent.insert(pack);
            }
        }
        self.evict_when_all_is_safe(actions);
        Ok(())
    }

    fn pack(&mut self, pack: Pack, actions: &mut Vec<Action>) -> Result<(), ScatterError> {
        if self.ended || self.evicted {
            return Err(ScatterError::AfterEnd(pack.id));
        }
        let number = self.filling()?;
        let Some(stripe) = self.stripes.get_mut(&number) else {
            return Err(ScatterError::AfterEnd(pack.id));
        };
        if let Some(parity) = &mut stripe.parity {
            parity.add(pack.id, &pack.bytes)?;
        }
        let store = stripe.places.packs[stripe.packs];
        let copy = stripe.places.redundant.filter(|_| self.redundancy == Redundancy::Mirror);
        stripe.packs += 1;
        let full = stripe.packs == stripe.places.packs.len();
        self.put(Object::Pack(pack.id), store, number, pack.bytes.clone(), actions)?;
        if let Some(store) = copy {
            self.put(Object::Copy(pack.id), store, number, pack.bytes, actions)?;
        }
        if full {
            self.close_stripe(actions)?;
        }
        Ok(())
    }

    /// The stripe that takes the next pack; a new one where there is none.
    fn filling(&mut self) -> Result<u64, ScatterError> {
        if let Some(number) = self.filling {
            return Ok(number);
        }
        let places = self.placer.next(self.pack_bytes)?;
        let number = self.next_stripe;
        let parity = (self.redundancy == Redundancy::Parity).then(|| Stripe::new(number));
        let (used, acked) = (StoreSet::default(), Vec::new());
        self.stripes.insert(number, OpenStripe { places, parity, packs: 0, used, acked });
        self.next_stripe += 1;
        self.filling = Some(number);
        Ok(number)
    }

    /// No pack follows into the stripe that is being filled: its parity goes out.
    fn close_stripe(&mut self, actions: &mut Vec<Action>) -> Result<(), ScatterError> {
        let Some(number) = self.filling.take() else { return Ok(()) };
        let Some(stripe) = self.stripes.get_mut(&number) else { return Ok(()) };
        match (stripe.parity.take(), stripe.places.redundant) {
            (Some(parity), Some(store)) => {
                let bytes = parity.finish();
                self.put(Object::Parity(number), store, number, bytes, actions)
            }
            _ => Ok(()),
        }
    }

    /// Puts an object where it belongs, or elsewhere if that store is no longer open.
    fn put(
        &mut self,
        object: Object,
        store: StoreId,
        stripe: u64,
        bytes: Bytes,
        actions: &mut Vec<Action>,
    ) -> Result<(), ScatterError> {
        self.under_way.insert(object, UnderWay { store, stripe, bytes: bytes.clone() });
        // The placer has counted the place already, so there is room if the store is open at all.
        if !self.placer.is_open(store, 0) {
            return self.elsewhere_or_lost(object, actions);
        }
        self.use_store(stripe, store);
        actions.push(Action::Put { store, object, bytes });
        Ok(())
    }

    fn use_store(&mut self, stripe: u64, store: StoreId) {
        if let Some(stripe) = self.stripes.get_mut(&stripe) {
            stripe.used.add(store);
        }
    }

    /// Finds another store for an object whose store is lost or full. Where there is none, it counts as
    /// acknowledged and lost there, or its stripe is given up.
    fn elsewhere_or_lost(
        &mut self,
        object: Object,
        actions: &mut Vec<Action>,
    ) -> Result<(), ScatterError> {
        let Some(UnderWay { store, stripe, .. }) = self.under_way.get(&object) else {
            return Ok(());
        };
        let (store, stripe) = (*store, *stripe);
        match (self.elsewhere(object, actions), self.redundancy) {
            (Err(ScatterError::NoPlace(_)), Redundancy::Mirror | Redundancy::Parity)
                if self.lost.has(store) =>
            {
                self.acked(store, object, actions)
            }
            (Err(ScatterError::NoPlace(_)), Redundancy::Parity) => {
                self.give_up(stripe, actions);
                Ok(())
            }
            (other, _) => other,
        }
    }

    /// One of this stripe has no place, and without it nothing mends the others: all of them are sent again.
    fn give_up(&mut self, stripe: u64, actions: &mut Vec<Action>) {
        let of_stripe = |(object, under_way): (&Object, &UnderWay)| match object {
            Object::Pack(pack) if under_way.stripe == stripe => Some(*pack),
            _ => None,
        };
        let mut packs: Vec<PackId> = self.under_way.iter().filter_map(of_stripe).collect();
        packs.extend(self.directory.in_stripe(stripe));
        self.under_way.retain(|_, under_way| under_way.stripe != stripe);
        self.stripes.remove(&stripe);
        self.filling = self.filling.filter(|filling| *filling != stripe);
        self.send_again(packs, actions);
    }

    fn send_again(&mut self, packs: Vec<PackId>, actions: &mut Vec<Action>) {
        for pack in packs {
            if !self.resent.contains(&pack) && self.missing.insert(pack) {
                // Its pages come in packs of their own, and then the end again.
                self.ended = false;
                actions.push(Action::Resend(pack));
            }
        }
    }

    /// Finds another store for an object that is under way.
    fn elsewhere(&mut self, object: Object, actions: &mut Vec<Action>) -> Result<(), ScatterError> {
        let Some(under_way) = self.under_way.get_mut(&object) else { return Ok(()) };
        let used = self.stripes.get(&under_way.stripe).map(OpenStripe::used_or_promised);
        let found = self.placer.instead(under_way.bytes.len() as u64, used.unwrap_or_default());
        let store = found.ok_or(ScatterError::NoPlace(object))?;
        under_way.store = store;
        let (stripe, bytes) = (under_way.stripe, under_way.bytes.clone());
        self.use_store(stripe, store);
        actions.push(Action::Put { store, object, bytes });
        Ok(())
    }

    fn acked(
        &mut self,
        store: StoreId,
        object: Object,
        actions: &mut Vec<Action>,
    ) -> Result<(), ScatterError> {
        // An answer of a store that the object no longer goes to says nothing.
        let Some(under_way) = self.under_way.get(&object).filter(|found| found.store == store)
        else {
            return Ok(());
        };
        let number = under_way.stripe;
        self.under_way.remove(&object);
        match (object, self.redundancy) {
            (Object::Parity(stripe), _) => {
                self.directory.parity(stripe, store)?;
                actions.push(Action::AnnounceParity { stripe, store });
            }
            (Object::Pack(pack) | Object::Copy(pack), Redundancy::Mirror) => {
                self.mirrored(pack, number, store, actions)?;
            }
            (Object::Pack(pack) | Object::Copy(pack), redundancy) => {
                let protection = match redundancy {
                    Redundancy::Parity => Protection::Stripe(number),
                    _ => Protection::None,
                };
                self.announce(pack, store, protection, actions)?;
            }
        }
        if self.filling != Some(number) && !self.under_way.values().any(|o| o.stripe == number) {
            self.stripes.remove(&number);
        }
        Ok(())
    }

    /// A mirrored pack is announced when both copies are there.
    fn mirrored(
        &mut self,
        pack: PackId,
        number: u64,
        store: StoreId,
        actions: &mut Vec<Action>,
    ) -> Result<(), ScatterError> {
        let Some(stripe) = self.stripes.get_mut(&number) else { return Ok(()) };
        stripe.acked.push(store);
        match stripe.acked[..] {
            [first, second] => self.announce(pack, first, Protection::Mirror(second), actions),
            _ => Ok(()),
        }
    }

    fn announce(
        &mut self,
        pack: PackId,
        store: StoreId,
        protection: Protection,
        actions: &mut Vec<Action>,
    ) -> Result<(), ScatterError> {
        self.directory.pack(pack, store, protection)?;
        actions.push(Action::AnnouncePack { pack, store, protection });
        Ok(())
    }

    fn lose(&mut self, store: StoreId, actions: &mut Vec<Action>) -> Result<(), ScatterError> {
        if self.lost.has(store) || self.evicted {
            return Ok(());
        }
        self.lost.add(store);
        self.placer.lose(store);
        let there = self.under_way.iter().filter(|(_, object)| object.store == store);
        let there: Vec<Object> = there.map(|(object, _)| *object).collect();
        for object in there {
            self.elsewhere_or_lost(object, actions)?;
        }
        self.resend_what_is_gone(actions);
        Ok(())
    }

    /// Packs that no store has any more. A stripe whose parity is still to come is not judged yet:
    /// its parity mends it.
    fn resend_what_is_gone(&mut self, actions: &mut Vec<Action>) {
        let mut gone = self.directory.unreadable(self.lost);
        let mends = |pack, stripe: &u64| self.directory.is_in(pack, *stripe);
        gone.retain(|pack| !self.stripes.keys().any(|stripe| mends(*pack, stripe)));
        self.send_again(gone, actions);
    }

    fn evict_when_all_is_safe(&mut self, actions: &mut Vec<Action>) {
        let quiet = self.ended && self.under_way.is_empty() && self.missing.is_empty();
        if !quiet || self.evicted {
            return;
        }
        // A stripe that was open when a store went is judged now that all of it is known.
        self.resend_what_is_gone(actions);
        if self.missing.is_empty() {
            self.evicted = true;
            actions.push(Action::Evict);
        }
    }
}
