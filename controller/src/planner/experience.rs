//! What the journal teaches about the speed of migrations, for the next forecast.
//!
//! Used by the planner. What is made of the samples is `lifeboat_policy::predict::Experience`.

use lifeboat_policy::predict::Experience;
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
    let moved = leg.outcome == Some(Outcome::Moved) && progress.bytes_sent >= LEAST_BYTES;
    if !moved || progress.total_ms == 0 || leg.prediction.path == 0 {
        return None;
    }
    let rate = progress.bytes_sent as f64 * 8.0 / (progress.total_ms as f64 / 1000.0);
    Some(rate / leg.prediction.path as f64)
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
    fn what_happened_at_the_host_itself_counts_before_what_happened_elsewhere() {
        let host = |name: &str| HostId::new(name).unwrap();
        let shares = [(host("h2"), 0.2), (host("h1"), 0.8), (host("h2"), 0.4)];
        assert_eq!(of(&host("h1"), &shares).share, 0.8);
        assert_eq!(of(&host("h3"), &shares).migrations, 3);
        assert_eq!(of(&host("h3"), &[]), Experience::default());
    }
}
