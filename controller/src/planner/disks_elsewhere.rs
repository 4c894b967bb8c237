//! Which intermediary a VM's disks go on to (`--disk scatter`), and what that makes of the forecast.
//!
//! One for each VM: with the room, and the widest way from the source. Not here: making that room (the
//! driver's), and pages (`elsewhere`).

use std::cmp::Reverse;
use std::collections::BTreeMap;

use lifeboat_policy::measured::MeasuredVm;
use lifeboat_policy::predict::pre_copy;
use lifeboat_protocol::agent::HostDescription;
use lifeboat_protocol::ids::HostId;
use lifeboat_protocol::terms::{DiskMode, Urgency};
use lifeboat_protocol::units::{BitsPerSec, Bytes, BytesPerSec};
use lifeboat_topology::Topology;

use super::elsewhere::{FAILED_BEFORE, FailedStores, way_rate};
use super::measure::criteria;
use super::{FullPlan, Goes, Planner, Stays};
use crate::evacuation::{ChosenDiskStore, EvacuationOrder};
use crate::inventory::HostEntry;
use crate::network::Hop;

/// File systems need a little beside the blocks themselves, and the guest goes on writing until it moves.
const ROOM: f64 = 1.1;
/// The role without which a host keeps nothing of others.
const ROLE: &str = "intermediary";

/// A host that might keep a VM's disks, or why not.
struct Keeper {
    host: HostId,
    room: Bytes,
    rate: BitsPerSec,
    obstacle: Option<String>,
}

impl Planner {
    /// Names the intermediary of every VM whose disks are to go by way of one. A VM for which there is none
    /// stays.
    pub(super) async fn choose_disk_stores(
        &self,
        order: &EvacuationOrder,
        full: &mut FullPlan,
        failed: &FailedStores,
    ) {
        if order.disk != DiskMode::Scatter {
            return;
        }
        let topology = self.fresh_topology().await;
        let (mut kept, mut taken) = (Vec::new(), BTreeMap::<HostId, Bytes>::new());
        for mut goes in std::mem::take(&mut full.goes) {
            let failed = failed.get(&goes.step.vm).map_or(&[][..], Vec::as_slice);
            let mut keepers = self.keepers(order, (&goes, failed), &topology);
            for one in &mut keepers {
                one.room = one.room - taken.get(&one.host).copied().unwrap_or_default();
            }
            match choose(keepers, goes.figures.disk) {
                Ok((host, rate)) => {
                    *taken.entry(host.clone()).or_default() += goes.figures.disk;
                    let ways = self.disk_store_ways(
                        &goes.source,
                        &host,
                        &goes.step.destination,
                        order.urgency,
                    );
                    let [to_store, _] = ways.await;
                    let entitled = to_store.iter().map(|hop| hop.rate).min().unwrap_or_default();
                    goes.eviction = Some(evicted(&goes, order, entitled.max(rate)));
                    goes.store_hops = to_store;
                    let bytes = goes.figures.disk;
                    goes.disk_store = Some(ChosenDiskStore { host, bytes, rate: entitled });
                    kept.push(goes);
                }
                Err(refusals) => full.stays.push(Stays {
                    vm: goes.step.vm.clone(),
                    host: goes.source.clone(),
                    reason: format!(
                        "its disks take {}, and no intermediary can keep them; use --disk on-demand or copy",
                        goes.figures.disk
                    ),
                    refusals,
                }),
            }
        }
        full.goes = kept;
    }

    /// The best way from a source to the intermediary, and from there to the destination. Empty where
    /// none leads there.
    pub async fn disk_store_ways(
        &self,
        source: &HostId,
        store: &HostId,
        destination: &HostId,
        urgency: Urgency,
    ) -> [Vec<Hop>; 2] {
        let pairs = [(source, store), (store, destination)];
        let mut ways = self.best_ways(pairs.into_iter(), urgency).await.into_iter();
        [ways.next().unwrap_or_default(), ways.next().unwrap_or_default()]
    }

    /// What a host keeps that is to be emptied: somebody else's VM may need it.
    pub(super) fn kept_disks_notes(&self, order: &EvacuationOrder) -> Vec<String> {
        let leaving = order.hosts.iter().filter(|_| order.empties_hosts());
        let kept = leaving.flat_map(|host| {
            let said = self.inventory.host(host).and_then(|entry| entry.description);
            let stores = said.unwrap_or_default().disk_stores.into_iter();
            stores.map(move |store| {
                format!(
                    "{host} keeps disks of {} for migration {}: until its destination has all of them, {host} has to \
                     stay up",
                    store.vm, store.migration
                )
            })
        });
        kept.collect()
    }

    fn keepers(
        &self,
        order: &EvacuationOrder,
        (goes, failed): (&Goes, &[HostId]),
        topology: &Topology,
    ) -> Vec<Keeper> {
        let hosts = self.inventory.hosts();
        let named =
            |host: &HostId| order.intermediaries.is_empty() || order.intermediaries.contains(host);
        let others = hosts.iter().filter(|(host, _)| named(host));
        let keeper = |(host, entry): (&HostId, &HostEntry)| {
            let said = entry.description.clone().unwrap_or_default();
            let obstacle = match () {
                () if *host == goes.source => Some("it is the source".to_owned()),
                () if *host == goes.step.destination => Some("it is the destination".to_owned()),
                () if !entry.connected => Some("its agent does not answer".to_owned()),
                () if order.hosts.contains(host) => Some("it is being evacuated itself".to_owned()),
                () if entry.cordoned => Some("it is cordoned".to_owned()),
                () if failed.contains(host) => Some(FAILED_BEFORE.to_owned()),
                () => cannot_keep(&said),
            };
            let room = said.disk_rooms.iter().map(|room| room.free_bytes).max();
            Keeper {
                host: host.clone(),
                room: Bytes(room.unwrap_or(0)),
                rate: way_rate(topology, &goes.source, host),
                obstacle,
            }
        };
        others.map(keeper).collect()
    }
}

fn cannot_keep(said: &HostDescription) -> Option<String> {
    match () {
        () if !said.roles.iter().any(|role| role == ROLE) => {
            Some("its agent does not have the role intermediary".to_owned())
        }
        () if said.disk_rooms.is_empty() => {
            Some("its agent takes in no disks (`disk_dirs` in agent.toml)".to_owned())
        }
        () => None,
    }
}

/// The host to which the source has the widest way of those with the room, and that way's rate; else what
/// speaks against each.
fn choose(keepers: Vec<Keeper>, disks: Bytes) -> Result<(HostId, BitsPerSec), Vec<String>> {
    let needed = disks.scale(ROOM);
    let (mut able, mut refusals) = (Vec::new(), Vec::new());
    for one in keepers {
        match &one.obstacle {
            Some(why) => refusals.push(format!("{}: {why}", one.host)),
            None if one.room < needed => refusals
                .push(format!("{}: {} are free there, {needed} are needed", one.host, one.room)),
            None => able.push(one),
        }
    }
    able.sort_by_key(|one| (Reverse(one.rate), Reverse(one.room), one.host.clone()));
    able.into_iter().next().map(|one| (one.host, one.rate)).ok_or(refusals)
}

/// Until the source is rid of it: its memory goes to the destination, and then all of its disks to the
/// intermediary. What of them goes before, because it is busy, is not known yet, and not counted.
fn evicted(goes: &Goes, order: &EvacuationOrder, rate: BitsPerSec) -> std::time::Duration {
    let memory = MeasuredVm { disk: Bytes::ZERO, ..goes.figures.clone() };
    let direct = goes.step.predicted.bandwidth.bytes_per_sec();
    let moved = pre_copy(&memory, direct, &criteria(order)).total_time;
    let watched = std::time::Duration::from_millis(match order.disk_watch_ms {
        0 => WATCH_MS,
        ms => ms.into(),
    });
    let rate = BytesPerSec(rate.bytes_per_sec().0.max(1));
    let sent = goes.figures.disk.time_at(rate).unwrap_or(std::time::Duration::MAX);
    moved.saturating_add(watched).saturating_add(sent)
}

/// For so long the agents watch which part of a disk is busy where nothing is said.
const WATCH_MS: u64 = 3000;

#[cfg(test)]
mod tests {
    use super::*;

    fn keeper(name: &str, mib: u64, mbit: u64, obstacle: Option<&str>) -> Keeper {
        Keeper {
            host: HostId::new(name).unwrap(),
            room: Bytes::from_mib(mib),
            rate: BitsPerSec::from_mbit(mbit),
            obstacle: obstacle.map(str::to_owned),
        }
    }

    #[test]
    fn the_widest_way_to_enough_room_is_taken_and_who_cannot_says_why() {
        let all = || {
            vec![
                keeper("h1", 900, 900, Some("it is the source")),
                keeper("h3", 109, 500, None),
                keeper("h4", 200, 100, None),
                keeper("h5", 120, 200, None),
            ]
        };
        let (host, rate) = choose(all(), Bytes::from_mib(100)).unwrap();
        assert_eq!((host.as_str(), rate), ("h5", BitsPerSec::from_mbit(200)));
        let refusals = choose(all(), Bytes::from_mib(300)).unwrap_err();
        assert_eq!(refusals.len(), 4);
        assert!(refusals[0].contains("it is the source") && refusals[2].contains("are needed"));
    }

    #[test]
    fn who_has_no_role_or_no_room_at_all_keeps_nothing() {
        let mut said = HostDescription::default();
        assert!(cannot_keep(&said).unwrap().contains("role intermediary"));
        said.roles.push("intermediary".to_owned());
        assert!(cannot_keep(&said).unwrap().contains("disk_dirs"));
        said.disk_rooms.push(lifeboat_protocol::agent::DiskRoom::default());
        assert_eq!(cannot_keep(&said), None);
    }
}
