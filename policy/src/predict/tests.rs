//! Tests of the prediction: figures worked out by hand, and what must hold for any VM.

use super::*;
use crate::reserve::Floor;
use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::terms::{Mode, Urgency};
use lifeboat_protocol::units::{BitsPerSec, Pages, PagesPerSec};
use proptest::prelude::*;
use std::collections::BTreeMap;

fn vm(id: &str, pages: u64, dirty: u64, working_set: u64) -> MeasuredVm {
    MeasuredVm {
        id: VmId::new(id).unwrap(),
        memory: Pages(pages).bytes(),
        non_zero: Pages(pages),
        dirty_rate: PagesPerSec(dirty),
        working_set: Pages(working_set),
        network_out: BitsPerSec::ZERO,
        network_in: BitsPerSec::ZERO,
        disk: Bytes::ZERO,
        disk_writes: BytesPerSec::ZERO,
        error: 0.1,
    }
}

/// 25 MB/s: 200 Mbit/s.
const BETWEEN: Duration = Duration::from_secs(3);
const RATE: BytesPerSec = BytesPerSec(25_000_000);

#[test]
fn an_idle_vm_is_sent_once() {
    let one = pre_copy(&vm("idle", 10_000, 0, 0), RATE, &StopCriteria::default());
    // 10 000 pages * 4104 bytes * 1514 / 1448 = 42.91 MB, 1.716 s, and the pause's fixed 40 ms.
    assert_eq!((one.iterations, one.converges), (1, true));
    assert_eq!(one.bytes.0 / 10_000, 4_291);
    assert_eq!(one.total_time.as_millis(), 1_756);
    assert_eq!(one.downtime, Duration::from_millis(40));
}

#[test]
fn zero_pages_cost_nine_bytes_each() {
    let mut sparse = vm("sparse", 10_000, 0, 0);
    sparse.memory = Pages(110_000).bytes();
    let dense = pre_copy(&vm("dense", 10_000, 0, 0), RATE, &StopCriteria::default());
    let one = pre_copy(&sparse, RATE, &StopCriteria::default());
    // 900 000 bytes and their framing.
    assert_eq!((one.bytes - dense.bytes).0 / 1000, 941);
}

#[test]
fn a_working_set_that_fits_into_the_pause_always_converges() {
    // 1400 pages are 6 MB: 240 ms, however often they are rewritten.
    let hot = pre_copy(&vm("hot", 50_000, 1_000_000, 1_400), RATE, &StopCriteria::default());
    assert!(hot.converges && hot.iterations == 1, "{hot:?}");
    let hotter = pre_copy(&vm("hot", 50_000, 1_000_000, 10_000), RATE, &StopCriteria::default());
    assert!(!hotter.converges && hotter.iterations == 30, "{hotter:?}");
    // What does not converge says what the pause would be: the whole working set.
    assert_eq!(hotter.downtime.as_millis(), 1_756);
}

#[test]
fn equation_2_is_the_model_while_the_working_set_is_far_away() {
    // r = S / B = 0.25, so about N * (1 + 0.25 + 0.0625 + ...).
    let pages_per_second = 25_000_000.0 / (4104.0 * FRAMING);
    let dirty = (pages_per_second * 0.25) as u64;
    let mut large = vm("large", 1_000_000, dirty, 900_000_000);
    large.memory = Pages(1_000_000_000).bytes();
    large.non_zero = Pages(1_000_000_000);
    let criteria = StopCriteria { max_time: Duration::from_secs(u64::MAX), ..Default::default() };
    let one = pre_copy(&large, RATE, &criteria);
    let ratio = one.bytes.0 as f64 / (1_000_000_000.0 * 4104.0 * FRAMING);
    assert!(one.converges && ratio > 1.2 && ratio < 1.0 / 0.75, "{ratio}");
}

#[test]
fn a_cold_migration_moves_no_memory_and_is_all_downtime() {
    let one = cold(ColdTimes::default(), &vm("a", 1, 0, 0), RATE).likely;
    assert_eq!((one.bytes, one.downtime), (Bytes::ZERO, Duration::from_secs(30)));
}

fn mbit(rate: u64) -> BitsPerSec {
    BitsPerSec::from_mbit(rate)
}

/// A sender of 100 Mbit/s and an idle VM on a link of 200 Mbit/s.
fn evacuate(sender_first: bool, parallel: usize) -> HostPrediction {
    evacuate_by(Mode::PreCopy, sender_first, parallel)
}

fn evacuate_by(mode: Mode, sender_first: bool, parallel: usize) -> HostPrediction {
    let mut sender = vm("sender", 10_000, 0, 0);
    sender.network_out = mbit(100);
    let idle = vm("idle", 40_000, 0, 0);
    let destination = HostId::new("h2").unwrap();
    let leave = |vm| Departure { vm, mode, destination: &destination, between: None };
    let mut departures = vec![leave(&sender), leave(&idle)];
    if !sender_first {
        departures.reverse();
    }
    let source = LinkUse { capacity: mbit(200), used: mbit(100) };
    let destinations = BTreeMap::from([(destination.clone(), LinkUse { used: mbit(0), ..source })]);
    let terms = HostTerms {
        urgency: Urgency::new(30).unwrap(),
        floor: Floor::default(),
        criteria: StopCriteria::default(),
        cold: ColdTimes::default(),
        parallel,
        experience: Experience::default(),
        between: BETWEEN,
    };
    predict_host(&departures, source, &destinations, &terms)
}

#[test]
fn whoever_sends_leaves_the_link_to_those_that_follow() {
    let good = evacuate(true, 1);
    assert_eq!(good.vms[0].bandwidth, mbit(100));
    assert_eq!(good.vms[1].bandwidth, mbit(190));
    assert_eq!(good.vms[1].starts.likely, good.vms[0].prediction.likely.total_time + BETWEEN);
    assert!(good.total_time.likely < evacuate(false, 1).total_time.likely);
}

#[test]
fn pages_that_follow_their_guest_have_the_link_that_it_has_left() {
    for mode in [Mode::PostCopy, Mode::ScatterGather] {
        let good = evacuate_by(mode, true, 1);
        assert_eq!(good.vms[0].bandwidth, mbit(190), "{mode}");
    }
}

#[test]
fn two_at_a_time_share_what_there_is() {
    let both = evacuate(true, 2);
    assert_eq!(both.vms[0].bandwidth, mbit(50));
    assert_eq!(both.vms[1].starts.likely, Duration::ZERO);
    assert_eq!(both.total_time.likely, both.vms[1].prediction.likely.total_time);
}

proptest! {
    #[test]
    fn low_likely_and_high_are_in_order_and_nothing_is_sent_less_than_once(
        pages in 0u64..2_000_000, zero in 0u64..1_000_000, dirty in 0u64..100_000,
        working_set in 0u64..2_000_000, rate in 1u64..2_000_000_000, error in 0.0f64..0.5,
    ) {
        let mut one = vm("any", pages, dirty, working_set.min(pages));
        one.memory = Pages(pages + zero).bytes();
        one.error = error;
        let range = range(pre_copy, &one, BytesPerSec(rate), 0.1, &StopCriteria::default());
        prop_assert!(range.likely.bytes.0 >= pages * PAGE_BYTES);
        prop_assert!(range.likely.total_time >= range.likely.downtime);
        // First iterations are ordered; a non-converging high case may be cut short by its caps.
        if range.high.converges {
            prop_assert!(range.likely.converges && range.low.converges);
            prop_assert!(range.low.total_time <= range.high.total_time);
        }
        let pause = StopCriteria::default().downtime;
        prop_assert!(!range.likely.converges || range.likely.downtime <= pause + Duration::from_millis(1));
    }

    #[test]
    fn nothing_overflows(pages in any::<u64>(), dirty in any::<u64>(), set in any::<u64>(), rate in any::<u64>()) {
        let mut one = vm("any", pages, dirty, set);
        one.memory = Bytes(rate);
        let range = range(pre_copy, &one, BytesPerSec(rate), 0.1, &StopCriteria::default());
        prop_assert!(range.likely.total_time >= range.likely.downtime);
    }
}

#[test]
fn disks_go_first_at_what_the_guests_writes_leave() {
    let without = pre_copy(&vm("a", 10_000, 0, 0), RATE, &StopCriteria::default());
    let with = |writes| {
        let disk = Bytes(1_000_000_000);
        let vm = MeasuredVm { disk, disk_writes: BytesPerSec(writes), ..vm("a", 10_000, 0, 0) };
        pre_copy(&vm, RATE, &StopCriteria::default())
    };
    let disk = (with(0).total_time - without.total_time).as_secs_f64();
    assert!((disk - 1e9 * FRAMING / 25e6).abs() < 0.1, "{disk}");
    let disk = (with(5_000_000).total_time - without.total_time).as_secs_f64();
    assert!(disk > 1e9 * FRAMING / 20e6, "{disk}");
    assert!(with(5_000_000).converges);
    // Who writes as fast as the link carries never gets there unless held back.
    assert!(!with(25_000_000).converges);
}

#[test]
fn post_copy_sends_each_page_once_whatever_is_written() {
    let criteria = StopCriteria::default();
    let idle = post_copy(&vm("idle", 10_000, 0, 0), RATE, &criteria);
    let busy = post_copy(&vm("busy", 10_000, 9_000, 10_000), RATE, &criteria);
    assert_eq!((idle.bytes, busy.converges), (busy.bytes, true));
    // What it dirtied while it was taken in, taken in as well: 361 pages.
    assert_eq!((busy.downtime - idle.downtime).as_micros(), 1_482);
    // 42.91 MB as above, 41 ms to absorb them, and the pause's fixed 40 ms.
    assert_eq!((idle.bytes.0 / 10_000, idle.total_time.as_millis()), (4_291, 1_797));
    assert_eq!(idle.downtime, Duration::from_millis(40));
    let mut sparse = vm("sparse", 10_000, 0, 0);
    sparse.memory = Pages(110_000).bytes();
    assert_eq!(post_copy(&sparse, RATE, &criteria), idle, "zero pages do not travel");
}

#[test]
fn a_guest_that_outruns_its_own_host_is_counted_as_slowed_down() {
    let criteria = StopCriteria::default();
    // All of 2 GiB dirtied twice a second, and of 400 MiB: the second's pause is short enough as it is.
    let (large, small) =
        (vm("large", 524_288, 1_048_576, 524_288), vm("small", 102_400, 204_800, 102_400));
    assert_eq!((is_absorbed(&large, &criteria), is_absorbed(&small, &criteria)), (false, true));
    assert_eq!(post_copy(&large, RATE, &criteria).downtime, criteria.downtime_limit);
    let slow = vm("slow", 524_288, 26_214, 524_288);
    assert!(is_absorbed(&slow, &criteria));
    let took = |vm: &MeasuredVm| post_copy(vm, RATE, &criteria).total_time;
    assert!(took(&large) > took(&slow) + SLOWING);
}

#[test]
fn pages_go_ahead_where_the_link_is_nearly_as_fast_as_memory() {
    // 1 GiB in 1.07 s: over 10 Gbit/s most of it has gone by then, over 1 Gbit/s an eighth.
    let idle = vm("idle", 262_144, 0, 0);
    let (fast, slow) = (BytesPerSec(1_250_000_000), BytesPerSec(125_000_000));
    let over_fast = ahead(&idle, fast, 1.0).unwrap();
    assert!(over_fast.sooner > Duration::from_millis(850), "{over_fast:?}");
    assert_eq!((over_fast.in_vain, ahead(&idle, slow, 1.0)), (Bytes::ZERO, None));
    // Mirrored, half as many pages have gone.
    let mirrored = ahead(&idle, BytesPerSec(600_000_000), 2.0).unwrap();
    let once = ahead(&idle, BytesPerSec(600_000_000), 1.0).unwrap();
    assert!(mirrored.sooner <= once.sooner, "{mirrored:?} {once:?}");
    // A guest that writes to most of what would go makes it go twice.
    let busy = vm("busy", 262_144, 500_000, 262_144);
    assert_eq!(ahead(&busy, fast, 1.0), None);
    let calm = ahead(&vm("calm", 262_144, 20_000, 262_144), fast, 1.0).unwrap();
    assert!(calm.in_vain > Bytes::ZERO && calm.sooner < over_fast.sooner, "{calm:?}");
    assert_eq!(ahead(&vm("empty", 0, 0, 0), fast, 1.0), None);
}
