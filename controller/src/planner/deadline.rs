//! `--by TIME` for VMs with disks: what each may write so that its disks arrive in time.
//!
//! The planner asks for every VM of a plan, and again for each one when its turn has come, with what is
//! left of the time then. The others count with what they are predicted to take. During a migration its
//! agent asks again each second, with what is left then: it is told by when the disks have to be in
//! step. Pure: inequality (1) is `policy::disk`'s; here are its terms, and the words for what comes of it.
//!
//! Deliberately not here: who is slowed down if several are late.

use std::time::Duration;

use lifeboat_policy::disk::{Choices, Need, SLOWEST, Verdict, Writes, verdict};
use lifeboat_policy::measured::MeasuredVm;
use lifeboat_policy::predict::disk_copy;
use lifeboat_protocol::units::BytesPerSec;

use super::{Goes, millis};
use crate::clock::UnixMs;
use crate::evacuation::DiskDate;

/// What a VM's owner was promised for its disks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskPromise {
    /// Bytes/s; zero for none.
    pub rate: BytesPerSec,
    /// Its guest may not be slowed down at all.
    pub unthrottled: bool,
}

/// Sets what each VM may write so that everything is over by `deadline`; says what the operator should
/// know.
pub(super) fn keep(
    goes: &mut [Goes],
    total: Duration,
    now: UnixMs,
    deadline: UnixMs,
) -> Vec<String> {
    let window = Duration::from_millis(deadline.since(now));
    let mut notes = Vec::new();
    for one in goes.iter_mut().filter(|one| one.figures.disk.0 > 0) {
        let own = one.step.predicted.prediction.likely.total_time.saturating_add(one.between);
        let others = total.saturating_sub(own);
        let window = window.saturating_sub(others);
        let need = need(one, window);
        let (limit, note) = judge(one, &need);
        let copying = millis(window.saturating_sub(need.vmm_time));
        let in_step_by = UnixMs(now.0.saturating_add(copying));
        let may_throttle = !one.disk_promise.unthrottled;
        one.disk_date = may_throttle.then_some(DiskDate { limit, in_step_by });
        notes.extend(note.map(|note| format!("{}: {note}", one.step.vm)));
    }
    notes
}

fn need(goes: &Goes, window: Duration) -> Need {
    let network = goes.step.predicted.bandwidth.bytes_per_sec();
    let copy = disk_copy(&goes.figures, network);
    let total = goes.step.predicted.prediction.likely.total_time;
    let vmm_time = total.saturating_sub(copy.time).saturating_add(goes.between);
    Need { left: copy.content, network, vmm_time, window, spread: 1.0 }
}

fn judge(goes: &Goes, need: &Need) -> (Option<BytesPerSec>, Option<String>) {
    let (vm, promise) = (&goes.figures, goes.disk_promise);
    let writes = Writes { wanted: Some(vm.disk_writes), promised: promise.rate };
    match verdict(need, writes) {
        Verdict::Free => (None, None),
        Verdict::Limit(rate) | Verdict::Conflict(Choices { limit: Some(rate), .. })
            if promise.unthrottled =>
        {
            let why = format!(
                "its disks arrive in time only if it writes at most {}, and it may not be slowed down",
                shown(rate)
            );
            (None, Some(why))
        }
        Verdict::Limit(rate) => {
            let why =
                format!("held to {} of writes, so that its disks arrive in time", shown(rate));
            (Some(rate), Some(why))
        }
        Verdict::Conflict(choices) => {
            let kept = (!promise.unthrottled).then_some(promise.rate.max(SLOWEST));
            (kept, Some(conflict(vm, promise, &choices)))
        }
    }
}

/// What it would take; each alone does.
fn conflict(vm: &MeasuredVm, promise: DiskPromise, choices: &Choices) -> String {
    let mut ways = Vec::new();
    ways.extend(choices.window.map(|window| format!("--by {}s", window.as_secs() + 1)));
    let reserve = |rate: BytesPerSec| format!("{} of network for it", rate.bits_per_sec());
    ways.extend(choices.network.map(reserve));
    ways.extend(choices.limit.map(|rate| format!("a promise of at most {}", shown(rate))));
    let way_out = match ways.is_empty() {
        true => "nothing would do; it needs shared storage, or `--mode cold`".to_owned(),
        false => format!("either of these would do: {}", ways.join("; ")),
    };
    let held = match promise.rate.0 {
        0 => format!("even when it is held to {}", shown(SLOWEST)),
        _ => format!("while it may write the {} that it was promised", shown(promise.rate)),
    };
    format!("its disks ({}) will not be there by then, {held}; {way_out}", vm.disk)
}

fn shown(rate: BytesPerSec) -> String {
    format!("{:.1} MB/s", rate.0 as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat_policy::disk::Choices;
    use lifeboat_protocol::ids::VmId;
    use lifeboat_protocol::units::{BitsPerSec, Bytes, Pages, PagesPerSec};

    fn vm() -> MeasuredVm {
        MeasuredVm {
            id: VmId::new("db").unwrap(),
            memory: Bytes::from_mib(256),
            non_zero: Pages(1),
            dirty_rate: PagesPerSec(0),
            working_set: Pages(0),
            network_out: BitsPerSec::ZERO,
            network_in: BitsPerSec::ZERO,
            disk: Bytes::from_mib(1024),
            disk_writes: BytesPerSec(40_000_000),
            error: 0.0,
        }
    }

    #[test]
    fn a_conflict_names_every_way_out_and_chooses_none() {
        let choices = Choices {
            limit: Some(BytesPerSec(2_000_000)),
            window: Some(Duration::from_secs(99)),
            network: Some(BytesPerSec(25_000_000)),
        };
        let promise = DiskPromise { rate: BytesPerSec(10_000_000), unthrottled: false };
        assert_eq!(
            conflict(&vm(), promise, &choices),
            "its disks (1 GiB) will not be there by then, while it may write the 10.0 MB/s that it was \
             promised; either of these would do: --by 100s; 200 Mbit/s of network for it; a promise \
             of at most 2.0 MB/s"
        );
        let none = Choices { limit: None, window: None, network: None };
        assert!(conflict(&vm(), DiskPromise::default(), &none).contains("nothing would do"));
    }
}
