//! Which hosts keep pages while a VM is between two hosts, and how a lost one is made up for.
//!
//! `plan` and each choice of a scatter-gather leg ask for it. The source sends at its full
//! reservation, so together the stores have to take that in: each at least an equal share, more where
//! there is room. Not here: opening a store (the driver's), and spreading pages over them
//! (`scatter-gather/`).

use std::cmp::Reverse;

use lifeboat_protocol::ids::HostId;
pub use lifeboat_protocol::terms::Redundancy;
use lifeboat_protocol::units::{BitsPerSec, Bytes};
use serde::{Deserialize, Serialize};

use crate::predict::Ahead;

/// Stores that are asked for at least. Parity over two would be a mirror with more work.
const fn stores_least(redundancy: Redundancy) -> usize {
    match redundancy {
        Redundancy::Parity => 3,
        other => other.stores_least(),
    }
}

/// A host that may keep pages.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// The host.
    pub host: HostId,
    /// Whether it is in the destination's rack.
    pub near: bool,
    /// What it would still set aside for stores.
    pub room: Bytes,
    /// Cores that nobody uses.
    pub cores: f64,
    /// What its way from the source can give, bit/s.
    pub rate: BitsPerSec,
    /// Why it keeps none; empty where it can.
    pub obstacle: String,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Wish {
    /// The pages of the VM, with what packs add.
    pub pages: Bytes,
    /// What the source sends, bit/s.
    pub rate: BitsPerSec,
    /// Whether a whole rack leaves, so that only the destination's rack may keep pages.
    pub near_only: bool,
    /// How many; 0: as many as the rate needs, three where there are three.
    pub count: usize,
    /// `None`: the best one for so many stores.
    pub redundancy: Option<Redundancy>,
}

/// One store that is to be opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChosenStore {
    /// Where.
    pub host: HostId,
    /// Room for pages that is to be set aside there.
    pub memory: Bytes,
    /// What is to be reserved towards it, bit/s.
    pub rate: BitsPerSec,
}

/// The stores of one migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChosenStores {
    /// Those, the best first.
    pub stores: Vec<ChosenStore>,
    /// How the loss of one is made up for.
    pub redundancy: Redundancy,
    /// What it brings that pages go there while the guest still runs at its source; `None`: they go afterwards.
    #[serde(default)]
    pub ahead: Option<Ahead>,
}

/// Why pages cannot wait anywhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoStoresError {
    /// Too few hosts can keep pages.
    #[error(
        "scatter-gather needs {wanted} intermediaries and {found} can keep its pages{}", list(.refusals)
    )]
    TooFew {
        /// So many at least.
        wanted: usize,
        /// So many there are.
        found: usize,
        /// What speaks against each of the others.
        refusals: Vec<String>,
    },
    /// Enough could, and have too little memory set aside.
    #[error("its pages find no room: each of {stores} stores needs {memory} for them{}", list(.refusals))]
    NoRoom {
        /// So many stores could be had.
        stores: usize,
        /// What each of them has to take.
        memory: Bytes,
        /// What speaks against each.
        refusals: Vec<String>,
    },
}

fn list(refusals: &[String]) -> String {
    if refusals.is_empty() { String::new() } else { format!(": {}", refusals.join("; ")) }
}

/// Cores that a host must have to spare: redis-server runs on one, and half of it is busy at 10 Gbit/s.
const CORES_LEAST: f64 = 0.5;
/// Beyond an equal share of the pages, because stores are not filled evenly.
const UNEVEN: f64 = 1.25;
/// Of a store's own: its index and its connections' buffers come on top at the agent.
const ROOM_LEAST: Bytes = Bytes::from_mib(16);
/// As many as parity needs.
const USUAL: usize = 3;

/// Chooses stores for one VM. The same question gives the same answer.
///
/// # Errors
/// Where too few hosts can, with what speaks against each.
pub fn choose(candidates: &[Candidate], wish: &Wish) -> Result<ChosenStores, NoStoresError> {
    let least = wish.redundancy.map_or(1, stores_least).max(wish.count);
    let mut able: Vec<&Candidate> =
        candidates.iter().filter(|one| refusal(one, wish).is_none()).collect();
    able.sort_by_key(|one| (!one.near, Reverse(one.rate), Reverse(one.room), one.host.clone()));
    let most = if wish.count == 0 { able.len() } else { wish.count };
    for count in least..=most.min(able.len()) {
        let chosen = &able[..count];
        let together: u64 = chosen.iter().map(|one| one.rate.0).fold(0, u64::saturating_add);
        let wider = count < most.min(able.len());
        if wider && (together < wish.rate.0 || count < USUAL) {
            continue;
        }
        if let Some(stores) = fitted(chosen, wish) {
            return Ok(stores);
        }
    }
    // Fewer, larger ones may have the room that many together with a small one do not.
    able.sort_by_key(|one| (Reverse(one.room), one.host.clone()));
    for count in (least..=most.min(able.len())).rev() {
        if let Some(stores) = fitted(&able[..count], wish) {
            return Ok(stores);
        }
    }
    let refusals = candidates.iter().map(|one| {
        let why = refusal(one, wish).unwrap_or_else(|| format!("it has {} for stores", one.room));
        format!("{}: {why}", one.host)
    });
    let (found, refusals) = (able.len(), refusals.collect());
    match found < least {
        true => Err(NoStoresError::TooFew { wanted: least, found, refusals }),
        false => {
            let redundancy = wish.redundancy.unwrap_or_else(|| Redundancy::of(found));
            let memory = memory_of_each(wish, redundancy, found);
            Err(NoStoresError::NoRoom { stores: found, memory, refusals })
        }
    }
}

fn refusal(one: &Candidate, wish: &Wish) -> Option<String> {
    match () {
        () if !one.obstacle.is_empty() => Some(one.obstacle.clone()),
        () if wish.near_only && !one.near => {
            Some("it is in another rack than the destination, and a whole rack leaves".to_owned())
        }
        () if one.cores < CORES_LEAST => Some(format!("its CPUs are busy ({:.1} free)", one.cores)),
        () if one.rate == BitsPerSec::ZERO => Some("no way with room leads to it".to_owned()),
        () => None,
    }
}

/// What each of so many stores has to take.
fn memory_of_each(wish: &Wish, redundancy: Redundancy, count: usize) -> Bytes {
    // One alone is filled with just what there is, and so is each of two that have the same.
    let exact = count == 1 || (count == 2 && redundancy == Redundancy::Mirror);
    let uneven = if exact { 1.0 } else { UNEVEN };
    let share = wish.pages.scale(redundancy.factor(count) * uneven / count as f64);
    share.max(ROOM_LEAST)
}

/// These stores with what each has to take, if it can.
fn fitted(chosen: &[&Candidate], wish: &Wish) -> Option<ChosenStores> {
    let count = chosen.len();
    if count == 0 {
        return None;
    }
    let redundancy = wish.redundancy.unwrap_or_else(|| Redundancy::of(count));
    let memory = memory_of_each(wish, redundancy, count);
    if chosen.iter().any(|one| one.room < memory) {
        return None;
    }
    let equal = BitsPerSec(wish.rate.0.div_ceil(count as u64));
    let half = wish.rate.scale(0.5);
    // At least 1/n; up to a half where there is room (SOLive, figure 8).
    let rate = |one: &Candidate| one.rate.min(half.max(equal));
    let stores =
        chosen.iter().map(|one| ChosenStore { host: one.host.clone(), memory, rate: rate(one) });
    Some(ChosenStores { stores: stores.collect(), redundancy, ahead: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(name: &str, mib: u64, mbit: u64) -> Candidate {
        Candidate {
            host: HostId::new(name).unwrap(),
            near: true,
            room: Bytes::from_mib(mib),
            cores: 2.0,
            rate: BitsPerSec::from_mbit(mbit),
            obstacle: String::new(),
        }
    }

    fn wish() -> Wish {
        Wish {
            pages: Bytes::from_mib(300),
            rate: BitsPerSec::from_mbit(900),
            near_only: false,
            count: 0,
            redundancy: None,
        }
    }

    fn names(chosen: &ChosenStores) -> String {
        let names: Vec<&str> = chosen.stores.iter().map(|store| store.host.as_str()).collect();
        names.join(" ")
    }

    #[test]
    fn three_are_taken_with_parity_and_each_gets_up_to_a_half() {
        let all = ["a", "b", "c", "d"].map(|name| candidate(name, 1000, 1000));
        let chosen = choose(&all, &wish()).unwrap();
        assert_eq!((names(&chosen).as_str(), chosen.redundancy), ("a b c", Redundancy::Parity));
        assert_eq!(chosen.stores[0].rate, BitsPerSec::from_mbit(450));
        // 300 MiB and half as much again, a third each, a quarter more.
        assert_eq!(chosen.stores[0].memory, Bytes::from_mib(450).scale(1.25 / 3.0));
    }

    #[test]
    fn slow_ways_need_more_of_them() {
        let all = ["a", "b", "c", "d", "e"].map(|name| candidate(name, 1000, 200));
        assert_eq!(choose(&all, &wish()).unwrap().stores.len(), 5);
        let few = &all[..2];
        let chosen = choose(few, &wish()).unwrap();
        assert_eq!((chosen.stores.len(), chosen.redundancy), (2, Redundancy::Mirror));
        // Each has all of it.
        assert_eq!(chosen.stores[0].memory, Bytes::from_mib(300));
        assert_eq!(choose(&all[..1], &wish()).unwrap().redundancy, Redundancy::None);
    }

    #[test]
    fn what_was_asked_for_is_kept_or_refused() {
        let all = ["a", "b"].map(|name| candidate(name, 1000, 1000));
        let with = |redundancy| Wish { redundancy: Some(redundancy), ..wish() };
        let error = choose(&all, &with(Redundancy::Parity)).unwrap_err().to_string();
        assert!(error.contains("needs 3 intermediaries"), "{error}");
        assert_eq!(choose(&all, &with(Redundancy::None)).unwrap().redundancy, Redundancy::None);
        let one = Wish { count: 1, ..wish() };
        assert_eq!(choose(&all, &one).unwrap().stores.len(), 1);
    }

    #[test]
    fn who_cannot_is_left_out_and_named() {
        let mut busy = candidate("a", 1000, 1000);
        busy.cores = 0.1;
        let mut silent = candidate("b", 1000, 1000);
        silent.obstacle = "its agent does not answer".to_owned();
        let small = candidate("c", 10, 1000);
        let mut far = candidate("d", 1000, 1000);
        far.near = false;
        let all = [busy, silent, small, far];
        assert_eq!(names(&choose(&all, &wish()).unwrap()), "d");
        let full = choose(&all[2..3], &wish()).unwrap_err().to_string();
        let needs = "each of 1 stores needs 300 MiB for them: c: it has 10 MiB for stores";
        assert!(full.contains(needs), "{full}");
        let just = candidate("e", 300, 1000);
        assert_eq!(names(&choose(&[just], &wish()).unwrap()), "e");
        let rack = Wish { near_only: true, ..wish() };
        let error = choose(&all, &rack).unwrap_err().to_string();
        for part in ["a: its CPUs", "b: its agent", "c: it has", "d: it is in another rack"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
