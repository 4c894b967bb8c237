//! Where a guest's pages are, read off the stores: for an agent that takes over from one whose journal was lost,
//! or could not be written to its end, after the source has gone.
//!
//! Every pack says what is in it, and in which order pages were packed; every parity says which packs are in its
//! stripe. So what the source told is told again, from the stores that answer. All of the guest is read once
//! for it: that is slow, and better than losing it.

use std::collections::BTreeMap;

use lifeboat_scatter_gather::link::Frame;
use lifeboat_scatter_gather::link::pages::{NOTES_MOST, PackNote, PageKey};
use lifeboat_scatter_gather::pack::{Index, Reading};
use lifeboat_scatter_gather::page::PackId;
use lifeboat_scatter_gather::redundancy::StoreId;
use lifeboat_scatter_gather::redundancy::directory::{Directory, Protection};
use lifeboat_scatter_gather::redundancy::parity::Parity;
use lifeboat_scatter_gather::seal::{MigrationKey, MigrationTag};
use lifeboat_scatter_gather::store::{RedisStore, StoreError};

use super::reachable::Reachable;
use super::stores::whole;

/// What stores have, and what protects it.
#[derive(Default)]
struct Found {
    packs: BTreeMap<PackId, (StoreId, Protection)>,
    parities: BTreeMap<u64, StoreId>,
}

/// What the source has told, once it has told everything: as frames, in an order in which it might have.
pub(in crate::destination) async fn rebuilt(reachable: &Reachable, key: &PageKey) -> Vec<Frame> {
    tracing::warn!("what was told of the guest's pages is lost; it is read off the stores");
    let found = find(reachable).await;
    let mut directory = Directory::new();
    for (pack, (store, protection)) in &found.packs {
        let _ = directory.pack(*pack, *store, *protection);
    }
    for (stripe, store) in &found.parities {
        let _ = directory.parity(*stripe, *store);
    }
    let tag = MigrationTag::new(reachable.migration());
    let opener = Some(MigrationKey::new(key.0).opener(tag));
    let reading = Reading { migration: tag, opener };
    let (mut index, mut unread) = (Index::default(), 0);
    for pack in found.packs.keys() {
        let contents = match reachable.way(*pack, directory.way(*pack, reachable.lost()), true) {
            Ok(way) => whole(way, *pack, &reading).await.map_err(|trouble| trouble.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match contents {
            Ok((contents, _)) => index.add(*pack, &contents),
            Err(error) => {
                unread += 1;
                tracing::error!(%pack, error, "nothing of it is known");
            }
        }
    }
    tracing::warn!(packs = found.packs.len(), unread, "what is in the stores is known again");
    frames(&index, &found)
}

fn frames(index: &Index, found: &Found) -> Vec<Frame> {
    let zeroes = index.zeroes();
    let mut frames: Vec<Frame> =
        zeroes.chunks(NOTES_MOST).map(|notes| Frame::Notes(notes.to_vec())).collect();
    for (pack, width, pages) in index.packs() {
        if let Some((store, protection)) = found.packs.get(&pack).copied() {
            frames.push(Frame::Pack(PackNote { pack, width, store, protection, pages }));
        }
    }
    let parities = found.parities.iter();
    frames.extend(parities.map(|(stripe, store)| Frame::Parity { stripe: *stripe, store: *store }));
    frames.push(Frame::Scattered);
    frames
}

async fn find(reachable: &Reachable) -> Found {
    let mut found = Found::default();
    let mut members: BTreeMap<PackId, u64> = BTreeMap::new();
    for (id, store) in reachable.open() {
        if let Err(error) = look_into(id, &store, &mut found, &mut members).await {
            tracing::error!(store = id.0, %error, "what is in it is not known");
        }
    }
    // Of a stripe one pack may be in a store that does not answer.
    let away = reachable.away();
    for (pack, stripe) in members {
        match found.packs.get_mut(&pack) {
            Some((_, protection)) => *protection = Protection::Stripe(stripe),
            None => {
                if let Some(store) = away {
                    found.packs.insert(pack, (store, Protection::Stripe(stripe)));
                }
            }
        }
    }
    found
}

async fn look_into(
    id: StoreId,
    store: &RedisStore,
    found: &mut Found,
    members: &mut BTreeMap<PackId, u64>,
) -> Result<(), StoreError> {
    for pack in store.packs().await? {
        let place = found.packs.entry(pack).or_insert((id, Protection::None));
        if place.0 != id {
            place.1 = Protection::Mirror(id);
        }
    }
    for stripe in store.stripes().await? {
        let bytes = store.get(&store.keys().parity(stripe)).await?.freeze();
        match Parity::decode(stripe, &bytes) {
            Ok(parity) => {
                found.parities.insert(stripe, id);
                members.extend(parity.members.iter().map(|member| (member.pack, stripe)));
            }
            Err(error) => tracing::error!(store = id.0, %error, "it mends nothing"),
        }
    }
    Ok(())
}
