//! What an evacuation came to: per VM and host, prediction beside measurement.
//!
//! Pure: made anew from the journal's record whenever it is asked for. The figures are the agents'
//! own (downtime by one clock, bytes on the wire); what nobody measured stays zero or marked as
//! unknown. The table of it is in `cli/`.

use lifeboat_protocol::controller::{HostReport, LeftBehind, Report, VmReport};
use lifeboat_protocol::ids::HostId;

use crate::evacuation::{Evacuation, Leg, VmPhase, VmRecord};

/// The report of an evacuation, also of one that still runs.
#[must_use]
pub fn report(evacuation: &Evacuation) -> Report {
    let vms: Vec<VmReport> = evacuation.vms.iter().map(vm_report).collect();
    let end = evacuation.finished.unwrap_or(evacuation.started);
    Report {
        evacuation: evacuation.id.to_string(),
        hosts: evacuation.order.hosts.iter().map(ToString::to_string).collect(),
        state: evacuation.state.words().to_owned(),
        urgency: evacuation.order.urgency.percent(),
        reason: evacuation.order.reason.to_string(),
        started_unix_ms: evacuation.started.0,
        bytes_sent: vms.iter().map(|vm| vm.bytes_sent).sum(),
        left_behind: left_behind(evacuation),
        host_reports: evacuation.order.hosts.iter().map(|h| host_report(evacuation, h)).collect(),
        predicted_total_ms: evacuation.predicted_ms,
        total_ms: end.since(evacuation.started),
        vms,
    }
}

/// Who stayed, with the reason.
#[must_use]
pub fn left_behind(evacuation: &Evacuation) -> Vec<LeftBehind> {
    let stays = evacuation.vms.iter().filter(|record| record.phase == VmPhase::LeftBehind);
    stays
        .map(|record| LeftBehind {
            vm: record.vm.to_string(),
            host: record.source.to_string(),
            reason: record.reason.clone(),
            refusals: Vec::new(),
        })
        .collect()
}

fn vm_report(record: &VmRecord) -> VmReport {
    let progress = record.progress.clone().unwrap_or_default();
    let leg = record.leg.as_ref();
    let prediction = leg.map_or(record.prediction, |leg| leg.prediction);
    VmReport {
        vm: record.vm.to_string(),
        source: record.source.to_string(),
        destination: leg.map_or_else(String::new, |leg| leg.destination.to_string()),
        mode: leg.map_or_else(String::new, |leg| leg.mode.to_string()),
        outcome: record.phase.words().to_owned(),
        eviction_ms: progress.eviction_ms,
        total_ms: progress.total_ms,
        downtime_us: progress.downtime_us,
        bytes_sent: progress.bytes_sent,
        iterations: progress.iteration,
        predicted_total_ms: prediction.total_ms,
        predicted_eviction_ms: prediction.eviction_ms,
        predicted_downtime_ms: prediction.downtime_ms,
        predicted_bytes: prediction.bytes,
        attempts: record.attempts,
        reason: record.reason.clone(),
        stop_unix_us: progress.stop_unix_us,
        resume_unix_us: progress.resume_unix_us,
        network_downtime_us: 0,
        network_downtime_known: false,
        stores: leg.map_or_else(Vec::new, |leg| {
            leg.store_hosts().iter().map(ToString::to_string).collect()
        }),
        redundancy: leg.map_or_else(String::new, Leg::redundancy_word),
    }
}

/// Whether its source has nothing of it any more.
fn rid_of(record: &VmRecord) -> bool {
    matches!(record.phase, VmPhase::Gathering | VmPhase::Moved)
}

fn host_report(evacuation: &Evacuation, host: &HostId) -> HostReport {
    let of_host = || evacuation.vms.iter().filter(|record| record.source == *host);
    let count = |phase| of_host().filter(|record| record.phase == phase).count();
    // The host's eviction ends when the last of its VMs has left it wholly.
    let gone = of_host().filter(|record| rid_of(record)).filter_map(|record| {
        let began = record.leg.as_ref()?.started.since(evacuation.started);
        Some(began.saturating_add(record.progress.as_ref()?.eviction_ms))
    });
    HostReport {
        host: host.to_string(),
        eviction_ms: gone.max().unwrap_or(0),
        moved: u32::try_from(count(VmPhase::Moved)).unwrap_or(u32::MAX),
        left_behind: u32::try_from(count(VmPhase::LeftBehind)).unwrap_or(u32::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::UnixMs;
    use crate::evacuation::testing::{choice, order};
    use crate::evacuation::{Event, Limits, PageTicket, Prediction};
    use crate::network::Reserved;
    use lifeboat_protocol::agent::{MigrationProgress, Phase};
    use lifeboat_protocol::ids::{EvacuationId, MigrationId, VmId};

    #[test]
    fn a_report_sets_what_was_measured_beside_what_was_predicted() {
        let id = EvacuationId::new("e1").unwrap();
        let mut evacuation = Evacuation::new(id, order("h1"), Limits::default(), UnixMs(1000));
        let prediction =
            Prediction { total_ms: 900, downtime_ms: 90, bytes: 7, ..Prediction::default() };
        let source = evacuation.order.hosts[0].clone();
        let record = VmRecord::waiting(VmId::new("a").unwrap(), source.clone(), prediction);
        let stays = VmRecord::left_behind(VmId::new("b").unwrap(), source, "no room".to_owned());
        let migration = MigrationId::new("e1-m1").unwrap();
        let (address, token, seeded, disks_there, scatter, disk_store) = Default::default();
        let ticket = PageTicket { address, token, seeded, disks_there, scatter, disk_store };
        let progress = MigrationProgress {
            migration: "e1-m1".to_owned(),
            phase: Phase::Completed.into(),
            eviction_ms: 500,
            total_ms: 480,
            downtime_us: 61_000,
            bytes_sent: 1 << 20,
            ..MigrationProgress::default()
        };
        let events = [
            Event::Planned { vms: vec![record, stays] },
            Event::Chosen { choice: Some(choice("a", "h2")), no_place: Vec::new() },
            Event::Reserved { migration: migration.clone(), reserved: Reserved::default() },
            Event::Prepared { migration: migration.clone(), ticket },
            Event::Progress(Box::new(progress)),
            Event::Released { migration, failures: Vec::new() },
        ];
        for event in events {
            evacuation.apply(UnixMs(1200), event, &mut Vec::new());
        }
        let found = report(&evacuation);
        assert_eq!(
            (found.state.as_str(), found.total_ms, found.bytes_sent),
            ("partial", 200, 1 << 20)
        );
        let vm = &found.vms[0];
        assert_eq!(
            (vm.outcome.as_str(), vm.downtime_us, vm.predicted_total_ms),
            ("moved", 61_000, 1000)
        );
        assert_eq!(found.left_behind[0].reason, "no room");
        assert_eq!((found.host_reports[0].eviction_ms, found.host_reports[0].moved), (700, 1));
    }
}
