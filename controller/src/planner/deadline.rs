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
use lifeboat_policy::pace::beside_writes;
use lifeboat_policy::predict::disk_copy;
use lifeboat_protocol::units::BytesPerSec;

use super::{Goes, millis};
use crate::clock::UnixMs;
use crate::evacuation::DiskDate;

/// What no prediction knows of (how QEMU's iterations end, how long the last flush of a busy disk takes)
/// is allowed this much of the window, and a second.
const MARGIN: u32 = 20;
/// But no more than this.
const MARGIN_MOST: Duration = Duration::from_secs(10);

/// Each brings limit and memory's time nearer to each other; after two they differ by little.
const ROUNDS: usize = 2;

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
    let window = aimed_at(Duration::from_millis(deadline.since(now)));
    let mut notes = Vec::new();
    for one in goes.iter_mut().filter(|one| one.figures.disk.0 > 0) {
        let own = one.step.predicted.prediction.likely.total_time.saturating_add(one.between);
        let others = total.saturating_sub(own);
        let window = window.saturating_sub(others);
        let (need, found) = Terms::of(one).settle(window);
        let (limit, note) = judge(one, found, others);
        let copying = millis(window.saturating_sub(need.vmm_time));
        let in_step_by = UnixMs(now.0.saturating_add(copying));
        let may_throttle = !one.disk_promise.unthrottled;
        one.disk_date = may_throttle.then_some(DiskDate { limit, in_step_by });
        notes.extend(note.map(|note| format!("{}: {note}", one.step.vm)));
    }
    notes
}

/// A date is kept by who aims at a little earlier.
fn aimed_at(window: Duration) -> Duration {
    let margin = (window / MARGIN + Duration::from_secs(1)).min(MARGIN_MOST);
    window.saturating_sub(margin)
}

/// The date to ask for, so that this is aimed at: [`aimed_at`] backwards.
fn asked_for(aimed: Duration) -> Duration {
    let with_share = aimed.saturating_add(Duration::from_secs(1)).saturating_mul(MARGIN);
    (with_share / (MARGIN - 1)).min(aimed.saturating_add(MARGIN_MOST))
}

/// What is known of a VM before it goes.
struct Terms<'a> {
    vm: &'a MeasuredVm,
    promise: DiskPromise,
    network: BytesPerSec,
    /// Its predicted total time, while nobody holds it back.
    total: Duration,
    /// From the end of the one before it to its first page.
    between: Duration,
}

impl<'a> Terms<'a> {
    fn of(goes: &'a Goes) -> Self {
        Self {
            vm: &goes.figures,
            promise: goes.disk_promise,
            network: goes.step.predicted.bandwidth.bytes_per_sec(),
            total: goes.step.predicted.prediction.likely.total_time,
            between: goes.between,
        }
    }

    /// A guest that is held back is so while its memory moves, too, and memory has what that leaves of
    /// the link: the limit makes the time that it is computed from.
    fn settle(&self, window: Duration) -> (Need, Verdict) {
        let (wanted, promised) = (Some(self.vm.disk_writes), self.promise.rate);
        let free = self.need(window, self.vm.disk_writes);
        let found = verdict(&free, Writes { wanted, promised });
        if found == Verdict::Free || self.promise.unthrottled {
            return (free, found);
        }
        let least = promised.max(SLOWEST);
        let most = |held| {
            let need = self.need(window, held);
            (need, verdict(&need, Writes { wanted: None, promised }))
        };
        let (mut best, mut held) = (most(least), least);
        if matches!(best.1, Verdict::Limit(_)) {
            best.1 = Verdict::Limit(least);
        }
        // Memory beside the slowest guest leaves the copy most time; beside a guest that makes use of
        // all that, less. Who is held to what comes of the latter keeps the date.
        for _ in 0..ROUNDS {
            let Verdict::Limit(bold) = most(held).1 else { break };
            let careful = most(bold);
            let Verdict::Limit(rate) = careful.1 else { break };
            (best, held) = (careful, rate);
        }
        best
    }

    /// What has to be done by when, of a guest that writes at `writes` while its memory moves.
    fn need(&self, window: Duration, writes: BytesPerSec) -> Need {
        let copy = disk_copy(self.vm, self.network);
        // Predicted at what the guest leaves of the link when nobody holds it back. Faster, memory gains
        // more than in proportion, because the guest dirties less of it meanwhile.
        let memory = self.total.saturating_sub(copy.time);
        let predicted_at = (self.network - copy.writes).0 as f64;
        let leaves = beside_writes(self.network, writes.min(copy.writes));
        let memory = memory.mul_f64(predicted_at / leaves.0.max(1) as f64);
        let vmm_time = memory.saturating_add(self.between);
        Need { left: copy.content, network: self.network, vmm_time, window, spread: 1.0 }
    }
}

/// What it is held to, and what the operator should know; `others` go before it or after it.
fn judge(goes: &Goes, found: Verdict, others: Duration) -> (Option<BytesPerSec>, Option<String>) {
    let (vm, promise) = (&goes.figures, goes.disk_promise);
    match found {
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
            (kept, Some(conflict(vm, promise, &choices, others)))
        }
    }
}

/// What it would take; each alone does.
fn conflict(vm: &MeasuredVm, promise: DiskPromise, choices: &Choices, others: Duration) -> String {
    let mut ways = Vec::new();
    let by = choices.window.map(|window| asked_for(window.saturating_add(others)));
    ways.extend(by.map(|by| format!("--by {}s", by.as_secs() + 1)));
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

    /// 1 GiB over 25 MB/s, and 3 s of memory over an idle link: 12 s beside 20 MB/s of writes.
    fn terms(vm: &MeasuredVm, writes: u64) -> Terms<'_> {
        let network = BytesPerSec(25_000_000);
        let memory = 75.0 / (25.0 - writes as f64 / 1e6);
        let total = disk_copy(vm, network).time + Duration::from_secs_f64(memory);
        let (promise, between) = (DiskPromise::default(), Duration::ZERO);
        Terms { vm, promise, network, total, between }
    }

    #[test]
    fn a_date_is_aimed_at_with_a_margin_that_has_an_end() {
        let seconds = |window| aimed_at(Duration::from_secs(window)).as_secs();
        assert_eq!((seconds(1), seconds(60), seconds(3600)), (0, 56, 3590));
    }

    #[test]
    fn the_date_that_is_named_would_do() {
        let vm = vm();
        let promise = DiskPromise { rate: BytesPerSec(10_000_000), unthrottled: false };
        let terms = Terms { promise, ..terms(&vm, 20_000_000) };
        let Verdict::Conflict(choices) = terms.settle(Duration::from_secs(40)).1 else { panic!() };
        let named = Duration::from_secs(asked_for(choices.window.unwrap()).as_secs() + 1);
        let (need, found) = terms.settle(aimed_at(named));
        assert!(
            matches!(found, Verdict::Limit(rate) if rate >= promise.rate),
            "{found:?} {need:?}"
        );
        for seconds in 0..4000 {
            let aimed = Duration::from_secs(seconds);
            let asked = Duration::from_secs(asked_for(aimed).as_secs() + 1);
            assert!(
                aimed_at(asked) >= aimed && asked < aimed + Duration::from_secs(12),
                "{aimed:?}"
            );
        }
    }

    #[test]
    fn who_is_held_back_leaves_memory_the_link_and_gets_some_of_the_time() {
        let vm = MeasuredVm { disk_writes: BytesPerSec(20_000_000), ..vm() };
        let terms = terms(&vm, 20_000_000);
        let window = Duration::from_secs(62);
        let (need, found) = terms.settle(window);
        let Verdict::Limit(limit) = found else { panic!("{found:?}") };
        // 4 s of memory beside 5 MB/s; 12 s beside what it wants would leave it 2 MB/s.
        assert!((5_000_000..6_000_000).contains(&limit.0), "{limit:?} {need:?}");
        let memory = Duration::from_secs_f64(75.0 / (24.0 - limit.0 as f64 / 1e6));
        assert!(need.vmm_time >= memory && need.vmm_time < memory + Duration::from_millis(100));
        // The date holds with what it was computed from.
        let took = need.left.time_at(need.network - limit).unwrap() + memory;
        assert!(took <= window && took + Duration::from_secs(1) > window, "{took:?}");
    }

    #[test]
    fn who_writes_little_is_left_alone_and_who_may_not_be_held_back_is_counted_as_it_writes() {
        let vm = MeasuredVm { disk_writes: BytesPerSec(2_000_000), ..vm() };
        assert_eq!(terms(&vm, 2_000_000).settle(Duration::from_secs(62)).1, Verdict::Free);
        let vm = MeasuredVm { disk_writes: BytesPerSec(20_000_000), ..vm };
        let promise = DiskPromise { unthrottled: true, ..DiskPromise::default() };
        let (need, _) = Terms { promise, ..terms(&vm, 20_000_000) }.settle(Duration::from_secs(62));
        assert_eq!(need.vmm_time.as_secs(), 12);
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
            conflict(&vm(), promise, &choices, Duration::from_secs(40)),
            "its disks (1 GiB) will not be there by then, while it may write the 10.0 MB/s that it was \
             promised; either of these would do: --by 148s; 200 Mbit/s of network for it; a promise \
             of at most 2.0 MB/s"
        );
        let none = Choices { limit: None, window: None, network: None };
        let none = conflict(&vm(), DiskPromise::default(), &none, Duration::ZERO);
        assert!(none.contains("nothing would do"));
    }
}
