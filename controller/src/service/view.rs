//! What an operator sees: from the controller's own types to the replies on the wire. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lifeboat_policy::intermediary::ChosenStore;
use lifeboat_policy::predict::Range;
use lifeboat_protocol::controller as wire;
use lifeboat_protocol::ids::HostId;
use lifeboat_protocol::units::{Bytes, Pages};

use crate::clock::UnixMs;
use crate::config::HostConfig;
use crate::evacuation::{
    ChosenDiskStore, Evacuation, EvacuationOrder, Fleet, Leg, StoresOwed, VmPhase, VmRecord,
    time_to_go, vm_time_to_go,
};
use crate::inventory::{HostEntry, Inventory, name_of};
use crate::network::{Hop, PortRate, PortRef, SwitchStatus};
use crate::planner::{FullPlan, Goes, millis};
use crate::report::left_behind;

/// Evacuations that are over and still shown when none is asked for by name.
const RECENT: usize = 5;

pub(super) fn host(
    config: &HostConfig,
    entry: &HostEntry,
    rack: String,
    leaving: &BTreeSet<HostId>,
    emptied: &BTreeSet<HostId>,
    switches: &[SwitchStatus],
) -> wire::Host {
    let said = entry.description.clone().unwrap_or_default();
    let bridge = switches.iter().find(|switch| switch.host.as_ref() == Some(&config.name));
    let vms = entry.vms.iter().filter(|status| crate::inventory::owns(status)).count();
    let state = match () {
        () if !entry.connected => "unreachable",
        () if leaving.contains(&config.name) => "evacuating",
        () if entry.cordoned => "cordoned",
        () if emptied.contains(&config.name) && vms == 0 => "evacuated",
        () => "active",
    };
    wire::Host {
        name: config.name.to_string(),
        connected: entry.connected,
        state: state.to_owned(),
        agent_address: config.agent.to_string(),
        qemu_version: said.qemu_version,
        accelerator: said.accelerator,
        memory_total_bytes: said.memory_total_bytes,
        memory_free_bytes: said.memory_free_bytes,
        vm_count: u32::try_from(vms).unwrap_or(u32::MAX),
        rack,
        detail: entry.detail.clone(),
        ovsdb_connected: bridge.is_some_and(|switch| switch.ovsdb_connected),
        openflow_connected: bridge.is_some_and(|switch| switch.openflow_connected),
    }
}

pub(super) fn vms(host: &HostId, entry: &HostEntry, inventory: &Inventory) -> Vec<wire::Vm> {
    let ours = entry.vms.iter().map(|status| vm(host, status, inventory));
    let foreign = entry.description.iter().flat_map(|said| said.foreign_vms.iter());
    let foreign = foreign.map(|vm| wire::Vm {
        name: vm.name.clone(),
        host: host.to_string(),
        state: "foreign".to_owned(),
        owner: vm.owner.clone(),
        detail: format!("managed by {}; Lifeboat leaves it alone", vm.owner),
        ..wire::Vm::default()
    });
    ours.chain(foreign).collect()
}

pub(super) fn vm(
    host: &HostId,
    status: &lifeboat_protocol::agent::VmStatus,
    inventory: &Inventory,
) -> wire::Vm {
    let name = name_of(status).to_owned();
    let id = lifeboat_protocol::ids::VmId::new(name.clone()).ok();
    let measured = id.and_then(|id| inventory.measurement(&id)).map(|(_, said)| said);
    let measured = measured.unwrap_or_default();
    wire::Vm {
        host: host.to_string(),
        state: status.state().words().to_owned(),
        generation: status.generation,
        memory_bytes: status.definition.as_ref().map_or(0, |definition| definition.memory_bytes),
        non_zero_bytes: Pages(measured.non_zero_pages).bytes().0,
        dirty_pages_per_sec: measured.dirty_pages_per_sec,
        network_out_bits_per_sec: measured.network_out_bits_per_sec,
        network_in_bits_per_sec: measured.network_in_bits_per_sec,
        cpu_cores: measured.cpu_cores,
        detail: status.detail.clone(),
        migration: status.migration.clone(),
        owner: String::new(),
        name,
    }
}

pub(super) fn switch(status: SwitchStatus) -> wire::Switch {
    let port = |port: crate::network::PortStatus| wire::SwitchPort {
        name: port.name,
        number: port.number,
        peer: port.peer,
        capacity_bits_per_sec: port.capacity.0,
        reserved_bits_per_sec: port.reserved.0,
        tx_bits_per_sec: port.transmitted.unwrap_or_default().0,
        rate_known: port.transmitted.is_some(),
        up: port.up,
        ability: port.ability.to_string(),
    };
    wire::Switch {
        name: status.name.to_string(),
        datapath_id: status.datapath_id,
        openflow_connected: status.openflow_connected,
        ovsdb_connected: status.ovsdb_connected,
        datapath: status.datapath,
        ports: status.ports.into_iter().map(port).collect(),
        detail: status.detail,
        saturation: status.saturation.share().unwrap_or_default(),
        saturation_known: status.saturation.share().is_some(),
        hot_spot: status.saturation.is_hot(),
        shaping: status.shaping.map(|shaping| shaping.to_string()).unwrap_or_default(),
    }
}

/// Those that run, and the last few that have ended.
pub(super) fn recent(fleet: &Fleet) -> Vec<&Evacuation> {
    let all = fleet.all();
    let ended = all.iter().filter(|e| e.state.is_final()).count();
    let mut skip = ended.saturating_sub(RECENT);
    let mut shown = Vec::new();
    for evacuation in all {
        if evacuation.state.is_final() && skip > 0 {
            skip -= 1;
        } else {
            shown.push(evacuation);
        }
    }
    shown
}

/// The newest ids, for the sentence that answers an unknown one.
pub(super) fn ids(fleet: &Fleet) -> String {
    let all = fleet.all();
    let newest: Vec<String> = all.iter().rev().take(10).map(|e| e.id.to_string()).collect();
    if newest.is_empty() { "none".to_owned() } else { newest.join(", ") }
}

pub(super) fn status(
    evacuation: &Evacuation,
    rates: &[PortRate],
    now: UnixMs,
) -> wire::EvacuationStatus {
    let to_go = if evacuation.state.is_final() { Some(0) } else { time_to_go(evacuation) };
    wire::EvacuationStatus {
        evacuation: evacuation.id.to_string(),
        hosts: evacuation.order.hosts.iter().map(ToString::to_string).collect(),
        state: evacuation.state.words().to_owned(),
        urgency: evacuation.order.urgency.percent(),
        migrations: evacuation.vms.iter().map(|record| migration(record, now)).collect(),
        left_behind: left_behind(evacuation),
        elapsed_ms: evacuation.finished.unwrap_or(now).since(evacuation.started),
        time_to_go_ms: to_go.unwrap_or(0),
        time_to_go_known: to_go.is_some(),
        predicted_ms: evacuation.predicted_ms,
        reservations: reservations(evacuation, rates),
        detail: evacuation.detail.clone(),
        pending_stores: pending_stores(evacuation),
    }
}

/// Stores that nobody needs any more and that are still there, as far as is known.
fn pending_stores(evacuation: &Evacuation) -> Vec<wire::PendingStore> {
    let owed = evacuation.stores_owed().iter();
    let one = |owed: &StoresOwed, host: &HostId| wire::PendingStore {
        migration: owed.migration.to_string(),
        host: host.to_string(),
        reason: "not released yet".to_owned(),
    };
    owed.flat_map(|owed| owed.hosts.iter().map(move |host| one(owed, host))).collect()
}

fn migration(record: &VmRecord, now: UnixMs) -> wire::MigrationStatus {
    let progress = record.progress.clone().unwrap_or_default();
    let leg = record.leg.as_ref();
    let to_go = vm_time_to_go(record);
    let moving = matches!(record.phase, VmPhase::Sending | VmPhase::Committing);
    let phase = match record.phase {
        VmPhase::Sending | VmPhase::Committing if record.progress.is_some() => {
            progress.phase().words()
        }
        other => other.words(),
    };
    let waits = matches!(record.phase, VmPhase::Waiting | VmPhase::Measuring);
    let leg_now = leg.filter(|_| !waits);
    wire::MigrationStatus {
        migration: leg_now.map_or_else(String::new, |leg| leg.migration.to_string()),
        vm: record.vm.to_string(),
        source: record.source.to_string(),
        destination: leg_now.map_or_else(String::new, |leg| leg.destination.to_string()),
        mode: leg_now.map_or_else(String::new, |leg| leg.mode.to_string()),
        phase: phase.to_owned(),
        iteration: progress.iteration,
        bytes_total: progress.bytes_total,
        bytes_remaining: progress.bytes_remaining,
        bytes_sent: progress.bytes_sent,
        disk_bytes_left: progress.disk_bytes_left,
        disk_limit_bytes_per_sec: progress.disk_limit_bytes_per_sec,
        throttle_percent: progress.throttle_percent,
        rate_bits_per_sec: if moving { progress.rate_bits_per_sec } else { 0 },
        limit_bits_per_sec: progress.limit_bits_per_sec,
        elapsed_ms: match (moving, leg) {
            (true, Some(leg)) => now.since(leg.started),
            _ => progress.total_ms.max(progress.elapsed_ms),
        },
        time_to_go_ms: to_go.unwrap_or(0),
        time_to_go_known: to_go.is_some(),
        predicted_ms: leg_now.map_or(record.prediction, |leg| leg.prediction).total_ms,
        reason: record.said(),
        attempt: record.attempts,
        done: record.done,
        evicted: matches!(record.phase, VmPhase::Gathering | VmPhase::Moved),
        pages_total: progress.pages_total,
        pages_arrived: progress.pages_arrived,
        pages_stored: progress.pages_stored,
        stores: leg_now.map_or_else(Vec::new, |leg| {
            leg.store_hosts().iter().map(ToString::to_string).collect()
        }),
        redundancy: leg_now.map_or_else(String::new, Leg::redundancy_word),
        eviction_ms: progress.eviction_ms,
    }
}

fn reservations(evacuation: &Evacuation, rates: &[PortRate]) -> Vec<wire::ReservationStatus> {
    let mut by_port: BTreeMap<&PortRef, wire::ReservationStatus> = BTreeMap::new();
    for (_, leg) in evacuation.live() {
        for hop in &leg.reserved.hops {
            let queues = rates.iter().filter(|rate| rate.at == hop.at).flat_map(|r| &r.queues);
            let queue = queues.clone().find(|queue| queue.evacuation == evacuation.id);
            let status = wire::ReservationStatus {
                switch: hop.at.switch.to_string(),
                port: hop.at.port.clone(),
                queue: hop.queue,
                capacity_bits_per_sec: hop.capacity.0,
                reserved_bits_per_sec: queue.map_or(hop.rate, |queue| queue.reserved).0,
                used_bits_per_sec: queue.and_then(|q| q.transmitted).unwrap_or_default().0,
            };
            // The migrations of an evacuation share one queue on a port.
            by_port.insert(&hop.at, status);
        }
    }
    by_port.into_values().collect()
}

pub(super) fn plan(order: &EvacuationOrder, plan: &FullPlan) -> wire::Plan {
    let mut ports: BTreeMap<&PortRef, &Hop> = BTreeMap::new();
    for hop in plan.goes.iter().flat_map(|goes| goes.hops.iter().chain(&goes.store_hops)) {
        let most = ports.entry(&hop.at).or_insert(hop);
        if hop.rate > most.rate {
            *most = hop;
        }
    }
    let reservation = |(at, hop): (&PortRef, &Hop)| wire::PlannedReservation {
        switch: at.switch.to_string(),
        port: at.port.clone(),
        capacity_bits_per_sec: hop.capacity.0,
        reserved_bits_per_sec: hop.rate.0,
    };
    let stays = plan.stays.iter().map(|stays| wire::LeftBehind {
        vm: stays.vm.to_string(),
        host: stays.host.to_string(),
        reason: stays.reason.clone(),
        refusals: stays.refusals.clone(),
    });
    let parallel = order.parallel.max(1);
    let vms = (0u32..).zip(&plan.goes).map(|(at, goes)| planned_vm(at / parallel + 1, goes));
    wire::Plan {
        hosts: order.hosts.iter().map(ToString::to_string).collect(),
        urgency: order.urgency.percent(),
        mode: order.mode.to_string(),
        parallel,
        vms: vms.collect(),
        left_behind: stays.collect(),
        total: plan.total.as_ref().map(|total| estimate(total, |time| millis(*time) as f64)),
        reservations: ports.into_iter().map(reservation).collect(),
        notes: plan.notes.clone(),
        reservation: order.reservation.to_string(),
        fixed: order.fixed,
    }
}

fn planned_vm(wave: u32, goes: &Goes) -> wire::PlannedVm {
    let predicted = &goes.step.predicted.prediction;
    wire::PlannedVm {
        vm: goes.step.vm.to_string(),
        source: goes.source.to_string(),
        destination: goes.step.destination.to_string(),
        mode: goes.step.mode.to_string(),
        wave,
        total_ms: Some(estimate(predicted, |p| millis(p.total_time) as f64)),
        downtime_ms: Some(estimate(predicted, |p| millis(p.downtime) as f64)),
        bytes: Some(estimate(predicted, |p| Bytes(p.bytes.0).0 as f64)),
        path: goes.hops.iter().map(|hop| hop.at.to_string()).collect(),
        why_here: goes.why_here.clone(),
        why_now: goes.why_now.clone(),
        why_mode: goes.why_mode.why.clone(),
        mode_refusals: goes.why_mode.refusals.clone(),
        eviction_ms: Some(estimate(predicted, |p| match goes.eviction {
            // As unsure as all of it.
            Some(likely) => {
                millis(likely) as f64 * ratio(p.total_time, predicted.likely.total_time)
            }
            None => millis(p.total_time) as f64,
        })),
        rate_bits_per_sec: goes.step.predicted.bandwidth.0,
        non_zero_bytes: goes.measured.0,
        dirty_pages_per_sec: goes.measured.1,
        stores: goes
            .stores
            .iter()
            .flat_map(|chosen| chosen.stores.iter().map(planned_store))
            .chain(goes.disk_store.iter().map(planned_disk_store))
            .collect(),
        redundancy: goes.stores.as_ref().map_or_else(String::new, |s| s.redundancy.to_string()),
    }
}

fn ratio(time: Duration, of: Duration) -> f64 {
    if of.is_zero() { 1.0 } else { time.as_secs_f64() / of.as_secs_f64() }
}

fn planned_store(store: &ChosenStore) -> wire::PlannedStore {
    wire::PlannedStore {
        host: store.host.to_string(),
        memory_bytes: store.memory.0,
        rate_bits_per_sec: store.rate.0,
        ..wire::PlannedStore::default()
    }
}

fn planned_disk_store(store: &ChosenDiskStore) -> wire::PlannedStore {
    wire::PlannedStore {
        host: store.host.to_string(),
        disk_bytes: store.bytes.0,
        rate_bits_per_sec: store.rate.0,
        ..wire::PlannedStore::default()
    }
}

fn estimate<T>(range: &Range<T>, figure: impl Fn(&T) -> f64) -> wire::Estimate {
    wire::Estimate {
        low: figure(&range.low),
        likely: figure(&range.likely),
        high: figure(&range.high),
    }
}

/// The plan of an evacuation that runs already, for an operation that is repeated: who and when is
/// in the record, the reasons are not.
pub(super) fn plan_of_record(evacuation: &Evacuation) -> wire::Plan {
    let vms = evacuation.vms.iter().filter(|record| record.phase != VmPhase::LeftBehind);
    wire::Plan {
        hosts: evacuation.order.hosts.iter().map(ToString::to_string).collect(),
        urgency: evacuation.order.urgency.percent(),
        mode: evacuation.order.mode.to_string(),
        parallel: evacuation.order.parallel,
        vms: vms
            .map(|record| wire::PlannedVm {
                vm: record.vm.to_string(),
                source: record.source.to_string(),
                ..wire::PlannedVm::default()
            })
            .collect(),
        left_behind: left_behind(evacuation),
        notes: vec!["this operation was begun before; see its status".to_owned()],
        reservation: evacuation.order.reservation.to_string(),
        fixed: evacuation.order.fixed,
        ..wire::Plan::default()
    }
}
