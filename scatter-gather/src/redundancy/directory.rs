//! Where packs are, and how to read them when stores, or single values in them, are lost. Used by the
//! destination, which fills it from the source's control records; pure.
//!
//! ```text
//!  its store has it ................ read it
//!  lost, mirrored, other is there .... read the other
//!  lost, in a stripe, rest is there .. read the same bytes of the rest and of the parity, XOR
//!  otherwise ......................... lost: ask the source, if it is still there
//! ```

use std::collections::{HashMap, HashSet};

use thiserror::Error;

use super::{StoreId, StoreSet};
use crate::page::PackId;

/// What protects a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// Nothing.
    None,
    /// A second copy in this store.
    Mirror(StoreId),
    /// The parity of this stripe.
    Stripe(u64),
}

/// How to read a pack, or a part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// From this store, under the pack's number.
    From(StoreId),
    /// By parity: the other packs of its stripe, and the parity.
    Rebuild {
        /// The stripe.
        stripe: u64,
        /// Where its parity is.
        parity: StoreId,
        /// The other packs, and where they are.
        others: Vec<(PackId, StoreId)>,
    },
    /// No store has it any more.
    Lost,
}

/// Why a record does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum DirectoryError {
    /// A pack's number twice.
    #[error("{0} was announced before")]
    Twice(PackId),
    /// A stripe's number twice.
    #[error("stripe {0} was announced before")]
    StripeTwice(u64),
    /// A pack of which nothing was said.
    #[error("{0} was never announced")]
    Unknown(PackId),
}

#[derive(Debug, Clone, Default)]
struct StripePlace {
    packs: Vec<PackId>,
    /// Known once the parity is acknowledged.
    parity: Option<StoreId>,
}

/// All packs of a migration.
#[derive(Debug, Clone, Default)]
pub struct Directory {
    packs: HashMap<PackId, (StoreId, Protection)>,
    stripes: HashMap<u64, StripePlace>,
    /// What a store gave for these is not what was put there.
    spoiled: HashSet<(PackId, StoreId)>,
}

impl Directory {
    /// A directory without packs.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A store has acknowledged a pack.
    ///
    /// # Errors
    /// [`DirectoryError::Twice`].
    pub fn pack(
        &mut self,
        pack: PackId,
        store: StoreId,
        protection: Protection,
    ) -> Result<(), DirectoryError> {
        if self.packs.contains_key(&pack) {
            return Err(DirectoryError::Twice(pack));
        }
        if let Protection::Stripe(stripe) = protection {
            self.stripes.entry(stripe).or_default().packs.push(pack);
        }
        self.packs.insert(pack, (store, protection));
        Ok(())
    }

    /// A store has acknowledged the parity of a stripe, all of whose packs were announced.
    ///
    /// # Errors
    /// [`DirectoryError::StripeTwice`].
    pub fn parity(&mut self, stripe: u64, store: StoreId) -> Result<(), DirectoryError> {
        let place = self.stripes.entry(stripe).or_default();
        match place.parity.replace(store) {
            None => Ok(()),
            Some(_) => Err(DirectoryError::StripeTwice(stripe)),
        }
    }

    /// What this store gives for a pack is not what was put there: it is not read there again. How many there are
    /// in that store by now.
    pub fn spoil(&mut self, pack: PackId, store: StoreId) -> usize {
        self.spoiled.insert((pack, store));
        self.spoiled.iter().filter(|(_, at)| *at == store).count()
    }

    /// Whether this store gave something that was not what was put there.
    #[must_use]
    pub fn has_spoiled(&self, store: StoreId) -> bool {
        self.spoiled.iter().any(|(_, at)| *at == store)
    }

    fn has(&self, pack: PackId, store: StoreId, lost: StoreSet) -> bool {
        !lost.has(store) && !self.spoiled.contains(&(pack, store))
    }

    /// How to read a pack with these stores lost.
    ///
    /// # Errors
    /// [`DirectoryError::Unknown`].
    pub fn way(&self, pack: PackId, lost: StoreSet) -> Result<Way, DirectoryError> {
        let (store, protection) = *self.packs.get(&pack).ok_or(DirectoryError::Unknown(pack))?;
        if self.has(pack, store, lost) {
            return Ok(Way::From(store));
        }
        Ok(match protection {
            Protection::Mirror(other) if self.has(pack, other, lost) => Way::From(other),
            Protection::Stripe(stripe) => self.rebuild(pack, stripe, lost),
            Protection::None | Protection::Mirror(_) => Way::Lost,
        })
    }

    fn rebuild(&self, pack: PackId, stripe: u64, lost: StoreSet) -> Way {
        let Some(place) = self.stripes.get(&stripe) else { return Way::Lost };
        let Some(parity) = place.parity.filter(|store| !lost.has(*store)) else { return Way::Lost };
        let others = place.packs.iter().filter(|other| **other != pack);
        let others: Vec<_> = others
            .filter_map(|other| self.packs.get(other).map(|(store, _)| (*other, *store)))
            .collect();
        match others.iter().all(|(other, store)| self.has(*other, *store, lost)) {
            true => Way::Rebuild { stripe, parity, others },
            false => Way::Lost,
        }
    }

    /// The packs of this stripe that were announced.
    #[must_use]
    pub fn in_stripe(&self, stripe: u64) -> &[PackId] {
        self.stripes.get(&stripe).map_or(&[], |place| &place.packs)
    }

    /// Is the pack a member of this stripe?
    #[must_use]
    pub fn is_in(&self, pack: PackId, stripe: u64) -> bool {
        self.packs
            .get(&pack)
            .is_some_and(|(_, protection)| *protection == Protection::Stripe(stripe))
    }

    /// The packs that no store has any more, ascending: what the source must keep or send again.
    #[must_use]
    pub fn unreadable(&self, lost: StoreSet) -> Vec<PackId> {
        let is_lost = |pack: &PackId| self.way(*pack, lost) == Ok(Way::Lost);
        let mut packs: Vec<PackId> = self.packs.keys().copied().filter(is_lost).collect();
        packs.sort_unstable();
        packs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(stores: &[u8]) -> StoreSet {
        let mut set = StoreSet::default();
        stores.iter().for_each(|store| set.add(StoreId(*store)));
        set
    }

    fn directory() -> Directory {
        let mut all = Directory::new();
        all.pack(PackId(0), StoreId(0), Protection::Stripe(7)).unwrap();
        all.pack(PackId(1), StoreId(1), Protection::Stripe(7)).unwrap();
        all.parity(7, StoreId(2)).unwrap();
        all.pack(PackId(2), StoreId(0), Protection::Mirror(StoreId(1))).unwrap();
        all.pack(PackId(3), StoreId(2), Protection::None).unwrap();
        all.pack(PackId(4), StoreId(0), Protection::Stripe(8)).unwrap();
        all
    }

    #[test]
    fn a_pack_is_read_where_it_is_or_made_from_the_rest() {
        let all = directory();
        let way = |pack, lost: &[u8]| all.way(PackId(pack), set(lost)).unwrap();
        assert_eq!(way(0, &[]), Way::From(StoreId(0)));
        assert_eq!(way(0, &[1, 2]), Way::From(StoreId(0)));
        let others = vec![(PackId(1), StoreId(1))];
        let rebuild = Way::Rebuild { stripe: 7, parity: StoreId(2), others };
        assert_eq!(way(0, &[0]), rebuild);
        assert_eq!(way(0, &[0, 1]), Way::Lost);
        assert_eq!(way(0, &[0, 2]), Way::Lost);
        assert_eq!(way(2, &[0]), Way::From(StoreId(1)));
        assert_eq!(way(2, &[0, 1]), Way::Lost);
        assert_eq!(way(3, &[2]), Way::Lost);
        assert_eq!(way(4, &[0]), Way::Lost, "its parity is not acknowledged yet");
    }

    #[test]
    fn one_value_that_is_not_as_it_was_costs_no_other() {
        let mut all = directory();
        assert_eq!(all.spoil(PackId(0), StoreId(0)), 1);
        let others = vec![(PackId(1), StoreId(1))];
        let rebuild = Way::Rebuild { stripe: 7, parity: StoreId(2), others };
        let none = StoreSet::default();
        assert_eq!(all.way(PackId(0), none), Ok(rebuild));
        // Of the same store and of the same stripe.
        assert_eq!(all.way(PackId(2), none), Ok(Way::From(StoreId(0))));
        assert_eq!(all.way(PackId(1), none), Ok(Way::From(StoreId(1))));
        assert_eq!(all.way(PackId(1), set(&[1])), Ok(Way::Lost), "two of its stripe");
        // A copy, then the other copy.
        assert_eq!(all.spoil(PackId(2), StoreId(0)), 2);
        assert_eq!(all.spoil(PackId(2), StoreId(0)), 2, "said again");
        assert_eq!(all.way(PackId(2), none), Ok(Way::From(StoreId(1))));
        assert!(all.has_spoiled(StoreId(0)) && !all.has_spoiled(StoreId(1)));
        assert_eq!(all.spoil(PackId(2), StoreId(1)), 1);
        assert_eq!(all.spoil(PackId(3), StoreId(2)), 1);
        assert_eq!(all.unreadable(none), [PackId(2), PackId(3)]);
    }

    #[test]
    fn what_is_gone_is_named() {
        let all = directory();
        assert_eq!(all.unreadable(set(&[])), []);
        assert_eq!(all.unreadable(set(&[0])), [PackId(4)]);
        assert_eq!(all.unreadable(set(&[1])), []);
        assert_eq!(all.unreadable(set(&[2])), [PackId(3)]);
    }

    #[test]
    fn nothing_is_announced_twice() {
        let mut all = directory();
        let twice = all.pack(PackId(0), StoreId(1), Protection::None);
        assert_eq!(twice, Err(DirectoryError::Twice(PackId(0))));
        assert_eq!(all.parity(7, StoreId(0)), Err(DirectoryError::StripeTwice(7)));
        assert_eq!(all.way(PackId(9), set(&[])), Err(DirectoryError::Unknown(PackId(9))));
    }
}
