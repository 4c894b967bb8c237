//! The stores of one migration: reached before its guest is touched, and whether the guest fits into them.
//!
//! Used by the task that scatters ([`super::Scattering`]) and by `source.rs`, which has them before there is one. What
//! goes to which of them is decided by `lifeboat_scatter_gather::scatter`.

use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units::{Bytes, BytesPerSec};
use lifeboat_scatter_gather::link::pages::PageKey;
use lifeboat_scatter_gather::pack::{Batch, RUNS_MOST, Width, pack_bytes_most};
use lifeboat_scatter_gather::page::PageAt;
use lifeboat_scatter_gather::redundancy::Redundancy;
use lifeboat_scatter_gather::redundancy::placement::Placer;
use lifeboat_scatter_gather::scatter::Scatter;
use lifeboat_scatter_gather::seal::KEY_BYTES;
use lifeboat_scatter_gather::store::RedisStore;

use super::{PATIENCE, ScatteringError};
use crate::postcopy::absorb::Absorbed;
use crate::stores::{self, Plan};
use crate::tls::TlsIdentity;

/// A migration's stores, reached, with what seals its pages.
#[derive(Clone)]
pub(crate) struct Stores {
    pub(super) plan: Plan,
    pub(super) open: Vec<RedisStore>,
    pub(super) key: [u8; KEY_BYTES],
}

impl Stores {
    /// Reaches every store. Before the guest is touched: a store that is not there costs nothing.
    pub(crate) async fn reach(
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
    pub(crate) fn key(&self) -> PageKey {
        PageKey(self.key)
    }

    /// Whether scattering begins while the guest still runs.
    pub(crate) fn are_for_a_live_guest(&self) -> bool {
        self.plan.while_live
    }

    /// Whether the guest fits.
    pub(crate) fn must_fit(&self, absorbed: &Absorbed) -> Result<(), ScatteringError> {
        // What was read ahead in vain takes room, too.
        let stale = absorbed.contents().stale().div_ceil(self.plan.batch.pages().into());
        self.must_have_room(packs_of(absorbed.all(), self.plan.batch).saturating_add(stale))
    }

    /// Whether so many packs fit, with what protects them.
    pub(super) fn must_have_room(&self, packs: u64) -> Result<(), ScatteringError> {
        // Where pages are compressed, packs of all widths are open at the end.
        let open = Width::NUMBER as u64 - 1;
        let packs = packs.saturating_add(open).saturating_mul(self.pack_bytes());
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
    pub(super) fn scatter(&self, limit: Option<BytesPerSec>) -> Result<Scatter, ScatteringError> {
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

#[cfg(test)]
mod tests {
    use lifeboat_scatter_gather::pack::{Coder, PackBuilder};
    use lifeboat_scatter_gather::page::{PackId, Version};
    use lifeboat_scatter_gather::seal::MigrationTag;

    use super::*;

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
