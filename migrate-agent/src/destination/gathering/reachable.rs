//! A migration's stores, reached: two connections to each, and the ways to packs over them. Used by the gather,
//! and by whoever reads a lost index off them.

use lifeboat_protocol::ids::MigrationId;
use lifeboat_scatter_gather::page::PackId;
use lifeboat_scatter_gather::redundancy::directory::{DirectoryError, Way};
use lifeboat_scatter_gather::redundancy::{StoreId, StoreSet};
use lifeboat_scatter_gather::store::{RedisStore, RunId};

use super::stores::{PATIENCE, TroubleError};
use crate::handover::gathering::StoreAt;
use crate::stores::{self, StoreLinkError};
use crate::tls::TlsIdentity;

/// One store, reached.
#[derive(Debug, Clone)]
pub(super) struct Reached {
    pub(super) demands: RedisStore,
    background: RedisStore,
}

/// A migration's stores, reached before its guest is touched.
pub(in crate::destination) struct Reachable {
    pub(super) places: Vec<StoreAt>,
    pub(super) reached: Vec<Option<Reached>>,
    pub(super) migration: MigrationId,
    pub(super) identity: Option<TlsIdentity>,
}

impl Reachable {
    /// Reaches every store.
    pub(in crate::destination) async fn reach(
        mut places: Vec<StoreAt>,
        migration: &MigrationId,
        identity: Option<&TlsIdentity>,
    ) -> Result<Self, StoreLinkError> {
        let mut reached = Vec::new();
        for at in &mut places {
            let open = reach(at, migration, identity, None).await?;
            at.run = Some(open.demands.run().to_string());
            reached.push(Some(open));
        }
        let (migration, identity) = (migration.clone(), identity.cloned());
        Ok(Self { places, reached, migration, identity })
    }

    /// Reaches those that answer: the guest is here, and its pages are where they are. One that was started anew
    /// since has none of them, and is not taken for the one that had.
    pub(in crate::destination) async fn reach_again(
        places: Vec<StoreAt>,
        migration: &MigrationId,
        identity: Option<&TlsIdentity>,
    ) -> Self {
        let mut reached = Vec::new();
        for at in &places {
            match reach(at, migration, identity, None).await {
                Ok(open) => reached.push(Some(open)),
                Err(error) => {
                    tracing::error!(%error, "a store is passed over");
                    reached.push(None);
                }
            }
        }
        let (migration, identity) = (migration.clone(), identity.cloned());
        Self { places, reached, migration, identity }
    }

    /// A way with the connections to go it.
    pub(super) fn way(
        &self,
        pack: PackId,
        way: Result<Way, DirectoryError>,
        background: bool,
    ) -> Result<OpenWay, TroubleError> {
        let open = |store: StoreId| {
            let reached = self.reached.get(usize::from(store.0));
            let reached = reached.and_then(Option::as_ref).ok_or(TroubleError::NoWay(pack))?;
            let chosen = if background { &reached.background } else { &reached.demands };
            Ok::<_, TroubleError>((store, chosen.clone()))
        };
        match way {
            Ok(Way::From(store)) => Ok(OpenWay::From(open(store)?)),
            Ok(Way::Rebuild { stripe, parity, others }) => {
                let other = |(pack, store): (PackId, StoreId)| Ok((pack, open(store)?));
                let others = others.into_iter().map(other).collect::<Result<_, TroubleError>>()?;
                Ok(OpenWay::Rebuild { stripe, parity: open(parity)?, others })
            }
            Ok(Way::Lost) | Err(_) => Err(TroubleError::NoWay(pack)),
        }
    }

    /// Those that were reached, with what the background asks them on.
    pub(super) fn open(&self) -> impl Iterator<Item = (StoreId, RedisStore)> {
        let numbered = (0_u8..).map(StoreId).zip(&self.reached);
        numbered.filter_map(|(id, reached)| Some((id, reached.as_ref()?.background.clone())))
    }

    /// The first that was not.
    pub(super) fn away(&self) -> Option<StoreId> {
        (0_u8..).map(StoreId).zip(&self.reached).find(|(_, open)| open.is_none()).map(|(id, _)| id)
    }

    /// Whose pages they keep.
    pub(super) fn migration(&self) -> &MigrationId {
        &self.migration
    }

    /// The stores that were not reached.
    pub(super) fn lost(&self) -> StoreSet {
        set_of(&self.reached.iter().map(Option::is_none).collect::<Vec<_>>())
    }

    /// The stores.
    pub(in crate::destination) fn places(&self) -> &[StoreAt] {
        &self.places
    }
}

pub(super) async fn reach(
    at: &StoreAt,
    migration: &MigrationId,
    identity: Option<&TlsIdentity>,
    before: Option<&Reached>,
) -> Result<Reached, StoreLinkError> {
    let noted = || at.run.clone().map(RunId::noted);
    let run = before.map(|before| before.demands.run().clone()).or_else(noted);
    let demands = stores::connect(at, migration, identity, run, PATIENCE).await?;
    let same = Some(demands.run().clone());
    let background = stores::connect(at, migration, identity, same, PATIENCE).await?;
    Ok(Reached { demands, background })
}

pub(super) type Open = (StoreId, RedisStore);

/// A way to a pack, with connections.
pub(super) enum OpenWay {
    From(Open),
    Rebuild { stripe: u64, parity: Open, others: Vec<(PackId, Open)> },
}

pub(super) fn set_of(stores: &[bool]) -> StoreSet {
    let mut set = StoreSet::default();
    let chosen = (0_u8..).zip(stores).filter(|(_, is)| **is);
    chosen.for_each(|(store, _)| set.add(StoreId(store)));
    set
}
