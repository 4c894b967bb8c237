//! What the journal teaches about the speed of migrations, for the next forecast.
//!
//! Used by the planner. What is made of the samples is `lifeboat_policy::predict::Experience`.

use lifeboat_policy::predict::Experience;
use lifeboat_protocol::agent::MigrationProgress;
use lifeboat_protocol::ids::HostId;
use lifeboat_protocol::terms::Mode;

use crate::evacuation::{Fleet, Outcome, VmRecord};

/// A migration of less says more about its beginning and end than about its speed.
const LEAST_BYTES: u64 = 16 << 20;

/// Of every migration that moved its VM: from where, and its rate divided by what its path had.
/// Newest first.
pub(super) fn shares(fleet: &Fleet) -> Vec<(HostId, f64)> {
    let evacuations = fleet.all();
    let records = evacuations.iter().flat_map(|evacuation| &evacuation.vms);
    let mut found: Vec<_> = records
        .filter_map(|record| {
            let leg = record.leg.as_ref()?;
            Some((leg.started, record.source.clone(), share(record)?))
        })
        .collect();
    found.sort_by_key(|(started, ..)| std::cmp::Reverse(*started));
    found.into_iter().map(|(_, source, share)| (source, share)).collect()
}

fn share(record: &VmRecord) -> Option<f64> {
    let leg = record.leg.as_ref().filter(|leg| leg.mode == Mode::PreCopy)?;
    let progress = record.progress.as_ref()?;
    // One that is held back for a date, or whose disks follow it, takes as long as it may.
    let paced = leg.disk_date.is_some() || leg.disk_store.is_some();
    let counts = leg.outcome == Some(Outcome::Moved) && !paced;
    counts.then(|| rate_share(progress, leg.prediction.path)).flatten()
}

/// What went over the path for memory and disks, by what it has.
fn rate_share(progress: &MigrationProgress, path: u64) -> Option<f64> {
    let bytes = progress.bytes_sent.saturating_add(progress.disk_bytes_sent);
    if bytes < LEAST_BYTES || progress.total_ms == 0 || path == 0 {
        return None;
    }
    let rate = bytes as f64 * 8.0 / (progress.total_ms as f64 / 1000.0);
    Some(rate / path as f64)
}

/// What migrations from `source` taught; where there were none, those from any host.
pub(super) fn of(source: &HostId, shares: &[(HostId, f64)]) -> Experience {
    let from_here = shares.iter().filter(|(host, _)| host == source).map(|(_, share)| *share);
    let own = Experience::of(from_here);
    match own.migrations {
        0 => Experience::of(shares.iter().map(|(_, share)| *share)),
        _ => own,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_went_over_the_path_as_well() {
        let mut progress = MigrationProgress {
            bytes_sent: 20_000_000,
            disk_bytes_sent: 80_000_000,
            total_ms: 10_000,
            ..MigrationProgress::default()
        };
        assert_eq!(rate_share(&progress, 100_000_000), Some(0.8));
        (progress.bytes_sent, progress.disk_bytes_sent) = (1 << 20, 1 << 20);
        assert_eq!(rate_share(&progress, 100_000_000), None, "too little to say anything");
    }

    #[test]
    fn what_happened_at_the_host_itself_counts_before_what_happened_elsewhere() {
        let host = |name: &str| HostId::new(name).unwrap();
        let shares = [(host("h2"), 0.2), (host("h1"), 0.8), (host("h2"), 0.4)];
        assert_eq!(of(&host("h1"), &shares).share, 0.8);
        assert_eq!(of(&host("h3"), &shares).migrations, 3);
        assert_eq!(of(&host("h3"), &[]), Experience::default());
    }
}
