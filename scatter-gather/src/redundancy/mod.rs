//! What becomes of the pages when an intermediary is lost: after the source has left, the stores
//! hold the only copy. Used by whoever scatters (where does this pack go?) and gathers (where do I
//! read it now?). Pure.
//!
//! ```text
//!  none    p0 | p1 | p2        a lost store is a lost guest: only where it is asked for, or with one
//!  mirror  p0 p0' | p1 p1'     every pack in two stores: twice the bytes
//!  parity  p0 | p1 | p0^p1     one more pack for every width-1: RAID 5's arithmetic
//! ```
//!
//! [`placement`] decides where, [`parity`] does the arithmetic, [`directory`] remembers and says how
//! to read what is left.

pub mod directory;
pub mod parity;
pub mod placement;

/// How a migration's packs survive the loss of one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redundancy {
    /// They don't.
    None,
    /// Each is in two stores.
    Mirror,
    /// Of each stripe any one can be computed from the others.
    Parity,
}

impl Redundancy {
    /// What fits a number of stores: parity from three on, with two a mirror, with one nothing.
    #[must_use]
    pub fn of(stores: usize) -> Self {
        match stores {
            0 | 1 => Self::None,
            2 => Self::Mirror,
            _ => Self::Parity,
        }
    }

    /// The fewest stores that it needs.
    #[must_use]
    pub fn stores_least(self) -> usize {
        match self {
            Self::None => 1,
            Self::Mirror | Self::Parity => 2,
        }
    }
}

/// A store of a migration, by its place in the migration's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoreId(pub u8);

/// Some stores of a migration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreSet(u64);

impl StoreSet {
    /// The most stores that a migration can have.
    pub const MOST: usize = 64;

    /// Adds a store.
    ///
    /// # Panics
    /// If the store's place is beyond [`Self::MOST`].
    pub fn add(&mut self, store: StoreId) {
        assert!(usize::from(store.0) < Self::MOST, "a migration has at most 64 stores");
        self.0 |= 1 << store.0;
    }

    /// Is the store among them?
    #[must_use]
    pub fn has(self, store: StoreId) -> bool {
        usize::from(store.0) < Self::MOST && self.0 >> store.0 & 1 == 1
    }
}

#[test]
fn redundancy_follows_the_number_of_stores() {
    let of = [0, 1, 2, 3, 9].map(Redundancy::of);
    use Redundancy::{Mirror, None, Parity};
    assert_eq!(of, [None, None, Mirror, Parity, Parity]);
    for stores in 1..9 {
        assert!(Redundancy::of(stores).stores_least() <= stores);
    }
}
