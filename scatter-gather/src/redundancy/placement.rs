//! Which store takes which pack. Used by the source, stripe by stripe; pure.
//!
//! A stripe's members lie in different stores, so that the loss of one store costs at most one of
//! them. Stores differ in bandwidth and room: each stripe takes the stores that would be done first,
//! which spreads packs in proportion to bandwidth as long as there is room.
//!
//! The width of a stripe decides how fast pages leave. With width w, rates r and t stripes per
//! second each store takes at most one member per stripe, so t can be as high as
//! sum(min(r, t)) >= w t allows, and no higher than what the source sends divided by w. Pages leave
//! at (w - 1) t: wide stripes waste less, narrow ones are not held up by a slow store.

use lifeboat_protocol::units::{Bytes, BytesPerSec};
use thiserror::Error;

use super::parity::MEMBERS_MOST;
use super::{Redundancy, StoreId, StoreSet};

/// What a store offers to a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// How much it takes in all.
    pub room: Bytes,
    /// How fast, as reserved for it.
    pub rate: BytesPerSec,
}

/// Where the packs of one stripe go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StripePlaces {
    /// A store for each pack: one for [`Redundancy::None`] and [`Redundancy::Mirror`].
    pub packs: Vec<StoreId>,
    /// The store of the second copy, or of the parity.
    pub redundant: Option<StoreId>,
}

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PlacementError {
    /// Fewer stores than the redundancy needs; more than can be counted are no use either.
    #[error("{redundancy:?} needs {least} to 64 stores with a rate and there are {found}")]
    Stores {
        /// What was wanted.
        redundancy: Redundancy,
        /// The fewest.
        least: usize,
        /// How many there are.
        found: usize,
    },
    /// Too few stores have room left.
    #[error("{with_room} stores have room for {bytes} more bytes, and {least} are needed")]
    Full {
        /// Bytes of one pack.
        bytes: u64,
        /// How many could take them.
        with_room: usize,
        /// How many have to.
        least: usize,
    },
}

#[derive(Debug, Clone, Copy)]
struct Store {
    room: u64,
    rate: u64,
    given: u64,
}

/// Deals packs out to stores.
#[derive(Debug, Clone)]
pub struct Placer {
    stores: Vec<Store>,
    lost: StoreSet,
    redundancy: Redundancy,
    width: usize,
    stripes: usize,
}

impl Placer {
    /// A placer over these stores, for a source that sends at `source` in all.
    ///
    /// # Errors
    /// [`PlacementError::Stores`].
    pub fn new(
        offers: &[Offer],
        redundancy: Redundancy,
        source: BytesPerSec,
    ) -> Result<Self, PlacementError> {
        let rates: Vec<u64> = offers.iter().map(|offer| offer.rate.0).collect();
        let least = redundancy.stores_least();
        let found = rates.iter().filter(|rate| **rate > 0).count();
        if found < least || rates.len() > StoreSet::MOST {
            return Err(PlacementError::Stores { redundancy, least, found });
        }
        let store = |offer: &Offer| Store { room: offer.room.0, rate: offer.rate.0, given: 0 };
        let width = match redundancy {
            Redundancy::None => 1,
            Redundancy::Mirror => 2,
            Redundancy::Parity => best_width(&rates, source.0),
        };
        let stores = offers.iter().map(store).collect();
        Ok(Self { stores, lost: StoreSet::default(), redundancy, width, stripes: 0 })
    }

    /// Stores per stripe, the redundant one included.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Nothing goes to this store any more.
    pub fn lose(&mut self, store: StoreId) {
        self.lost.add(store);
    }

    /// Places for the next stripe, of packs of at most `bytes` bytes each. Where stores are full or
    /// lost, stripes become narrower before there is no place at all.
    ///
    /// # Errors
    /// [`PlacementError::Full`]; nothing is given away then.
    pub fn next(&mut self, bytes: u64) -> Result<StripePlaces, PlacementError> {
        let mut open: Vec<usize> =
            (0..self.stores.len()).filter(|at| self.takes(*at, bytes)).collect();
        let least = self.redundancy.stores_least();
        if open.len() < least {
            return Err(PlacementError::Full { bytes, with_room: open.len(), least });
        }
        open.sort_by_key(|at| (self.done(*at, bytes), *at));
        open.truncate(self.width);
        for at in &open {
            self.stores[*at].given += bytes;
        }
        let mut chosen: Vec<StoreId> = open.into_iter().map(|at| StoreId(at as u8)).collect();
        // Faults are read from packs and not from parity: every store gets its share of both.
        let redundant = (self.redundancy != Redundancy::None)
            .then(|| chosen.swap_remove(self.stripes % chosen.len()));
        self.stripes += 1;
        Ok(StripePlaces { packs: chosen, redundant })
    }

    /// Has refused: nothing more goes there, and what is there stays.
    pub fn fill(&mut self, store: StoreId) {
        if let Some(store) = self.stores.get_mut(usize::from(store.0)) {
            store.room = store.given.min(store.room);
        }
    }

    /// Whether this store takes so many bytes more.
    #[must_use]
    pub fn is_open(&self, store: StoreId, bytes: u64) -> bool {
        usize::from(store.0) < self.stores.len() && self.takes(store.0.into(), bytes)
    }

    /// Another place for one object whose store was lost or full, never in a store of its stripe:
    /// two of a stripe in one store would be lost together.
    pub fn instead(&mut self, bytes: u64, stripe: StoreSet) -> Option<StoreId> {
        let open = (0..self.stores.len()).filter(|at| self.takes(*at, bytes));
        let open = open.filter(|at| !stripe.has(StoreId(*at as u8)));
        let best = open.min_by_key(|at| (self.done(*at, bytes), *at))?;
        self.stores[best].given += bytes;
        Some(StoreId(best as u8))
    }

    fn takes(&self, at: usize, bytes: u64) -> bool {
        let store = &self.stores[at];
        let room = store.room.saturating_sub(store.given) >= bytes;
        room && store.rate > 0 && !self.lost.has(StoreId(at as u8))
    }

    /// When the store would be done with `bytes` more, in units of 2^-32 seconds.
    fn done(&self, at: usize, bytes: u64) -> u128 {
        let store = &self.stores[at];
        (u128::from(store.given.saturating_add(bytes)) << 32) / u128::from(store.rate.max(1))
    }
}

/// The width at which pages leave fastest; of equally fast ones the widest, which sends least.
fn best_width(rates: &[u64], source: u64) -> usize {
    let mut rates: Vec<u64> = rates.iter().copied().filter(|rate| *rate > 0).collect();
    rates.sort_unstable_by(|a, b| b.cmp(a));
    let widest = rates.len().min(MEMBERS_MOST + 1);
    (2..=widest).max_by_key(|width| leaving_rate(&rates, source, *width)).unwrap_or(2)
}

/// How fast pages leave with stripes of this width; `rates` descending. Fixed point of 2^-32.
fn leaving_rate(rates: &[u64], source: u64, width: usize) -> u128 {
    // With the k fastest stores taking part in every stripe, the others share the rest of it.
    let shared = |k: usize| {
        let rest: u128 = rates[k..].iter().map(|rate| u128::from(*rate)).sum();
        (rest << 32) / (width - k) as u128
    };
    let stores = (0..width).map(shared).min().unwrap_or(0);
    let stripes = stores.min((u128::from(source) << 32) / width as u128);
    stripes * (width as u128 - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn offers(rates: &[u64], room: u64) -> Vec<Offer> {
        let offer = |rate: &u64| Offer { room: Bytes(room), rate: BytesPerSec(*rate) };
        rates.iter().map(offer).collect()
    }

    fn width(rates: &[u64], source: u64) -> usize {
        let source = BytesPerSec(source);
        Placer::new(&offers(rates, 1), Redundancy::Parity, source).unwrap().width()
    }

    #[test]
    fn the_width_follows_the_bandwidths() {
        assert_eq!(width(&[100, 100, 100], 300), 3, "equal stores");
        assert_eq!(width(&[400, 400, 100], 900), 2, "a slow store holds up wide stripes");
        assert_eq!(width(&[1000, 1000, 1000, 1000], 100), 4, "the source is the slowest");
        assert_eq!(width(&[1000, 100, 100], 5000), 3, "as fast as two, and fewer bytes");
    }

    #[test]
    fn packs_follow_bandwidth_while_there_is_room() {
        let source = BytesPerSec(1000);
        let mut placer = Placer::new(&offers(&[30, 10], 4000), Redundancy::None, source).unwrap();
        let mut counts = [0; 2];
        for _ in 0..40 {
            counts[usize::from(placer.next(100).unwrap().packs[0].0)] += 1;
        }
        assert_eq!(counts, [30, 10]);
        for _ in 0..40 {
            placer.next(100).unwrap();
        }
        let full = PlacementError::Full { bytes: 100, with_room: 0, least: 1 };
        assert_eq!(placer.next(100), Err(full));
    }

    #[test]
    fn a_mirror_without_a_second_store_is_refused_at_the_start() {
        let source = BytesPerSec(1);
        let refused = Placer::new(&offers(&[5, 0], 9), Redundancy::Mirror, source).unwrap_err();
        let expected =
            PlacementError::Stores { redundancy: Redundancy::Mirror, least: 2, found: 1 };
        assert_eq!(refused, expected);
    }

    proptest! {
        #[test]
        fn a_stripe_never_puts_two_into_one_store(
            rates in prop::collection::vec(1_u64..1000, 2..9),
            rooms in 500_u64..5000,
            lost in prop::option::of((0_usize..9, 0_usize..50)),
            redundancy in prop_oneof![
                Just(Redundancy::None), Just(Redundancy::Mirror), Just(Redundancy::Parity)
            ],
        ) {
            let offers = offers(&rates, rooms);
            let mut placer = Placer::new(&offers, redundancy, BytesPerSec(900)).unwrap();
            let mut given = vec![0; rates.len()];
            for stripe in 0..200 {
                if let Some((store, _)) = lost.filter(|(s, at)| *at == stripe && *s < rates.len()) {
                    placer.lose(StoreId(store as u8));
                }
                let Ok(places) = placer.next(100) else { break };
                let mut all = places.packs.clone();
                all.extend(places.redundant);
                all.sort();
                let count = all.len();
                all.dedup();
                prop_assert_eq!(all.len(), count, "two members in one store");
                prop_assert_eq!(places.redundant.is_some(), redundancy != Redundancy::None);
                prop_assert!(count >= redundancy.stores_least() && count <= placer.width());
                for store in all {
                    given[usize::from(store.0)] += 100;
                    let gone = lost.is_some_and(|(s, at)| s == usize::from(store.0) && stripe >= at);
                    prop_assert!(!gone, "a lost store was used");
                }
            }
            prop_assert!(given.iter().all(|given| *given <= rooms));
        }
    }
}
