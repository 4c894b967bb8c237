//! Who goes first: SOLive's order for post-copy (IV-C) and for pre-copy (IV-D).
//!
//! `plan` orders with it, and the controller orders what is left again after each VM. Not here:
//! deadlines.
//!
//! Three groups. VMs that send more than they receive go first: each of them leaves the source's
//! link emptier for those that follow. VMs that receive more go last: each of them fills the
//! destination's link. Between them the *balanced* ones, which change nothing.
//!
//! **Inside the outer groups** the paper says two things for pre-copy that can contradict each
//! other: "ascending N/(outgoing - incoming)" and "low unique dirty page rate first". We let
//! equation (2) of the paper join them: what pre-copy sends is not N but `N * (1 + r + r^2 + ...)`,
//! where r = S/B is the share of an iteration's pages that are dirtied again. This *effective N*
//! takes the place of N. It grows with N and with S, so both sentences hold whenever they agree;
//! where they don't, what decides is the time that the paper's own equation gives. With S = 0 (or
//! in post-copy, which sends each page once) it is N, and the rule is that of IV-C. Incoming-heavy
//! VMs are taken in the opposite direction: the large effective N first, "as VMs having a higher
//! dirty rate need more bandwidth".
//!
//! **Among the balanced** the paper names no key (their order does not change the bandwidth). In
//! both of the orders that it reports as its choice (19 and 26 of figure 4) memory-intensive VMs
//! precede CPU-intensive ones, so: high dirty rate first, then many pages, while nothing has
//! reached the destination's link yet. In post-copy, too, the VM that writes most is the one that
//! suffers most from a narrow link.

use std::cmp::{Ordering, Reverse};

use lifeboat_protocol::ids::VmId;
use lifeboat_protocol::units::BitsPerSec;

use crate::measured::MeasuredVm;

/// SOLive's two rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// IV-C: each page is sent once.
    PostCopy,
    /// IV-D: dirtied pages are sent again.
    PreCopy,
}

/// What the order depends on besides the VMs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OrderParameters {
    /// The link's rate, bit/s: B of the paper, and what `balanced` is a share of.
    pub bandwidth: BitsPerSec,
    /// "About the same" incoming and outgoing use: their difference is at most this share of the
    /// link. The paper gives no figure.
    pub balanced: f64,
}

impl OrderParameters {
    /// For a link of `bandwidth`; up to 5 % of it counts as balanced (the paper's weakest
    /// network-bound VM differs by 14 %, its CPU- and memory-bound ones by about 0).
    #[must_use]
    pub const fn new(bandwidth: BitsPerSec) -> Self {
        Self { bandwidth, balanced: 0.05 }
    }
}

/// Iterations that the series is summed over: QEMU's default order of magnitude, and enough for r <
/// 0.9 to settle.
const SERIES: i32 = 30;

/// Group first, then the key inside it; the id last, so that ties are stable.
#[derive(Debug, PartialEq)]
enum Place {
    Outgoing { time_per_release: f64 },
    Balanced { dirty: Reverse<u64>, pages: Reverse<u64> },
    Incoming { time_per_load: f64 },
}

impl Place {
    const fn group(&self) -> u8 {
        match self {
            Self::Outgoing { .. } => 0,
            Self::Balanced { .. } => 1,
            Self::Incoming { .. } => 2,
        }
    }

    fn compare(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Self::Outgoing { time_per_release: a }, Self::Outgoing { time_per_release: b }) => {
                a.total_cmp(b)
            }
            (Self::Incoming { time_per_load: a }, Self::Incoming { time_per_load: b }) => {
                b.total_cmp(a)
            }
            (
                Self::Balanced { dirty: a, pages: a_pages },
                Self::Balanced { dirty: b, pages: b_pages },
            ) => (a, a_pages).cmp(&(b, b_pages)),
            _ => self.group().cmp(&other.group()),
        }
    }
}

/// The ids of `vms` in the order in which they should leave. Every id once; ties by id, so the
/// order of `vms` does not matter.
#[must_use]
pub fn order(rule: Rule, vms: &[MeasuredVm], parameters: OrderParameters) -> Vec<VmId> {
    let mut placed: Vec<(Place, &VmId)> =
        vms.iter().map(|vm| (place(rule, vm, parameters), &vm.id)).collect();
    placed.sort_by(|(a, a_id), (b, b_id)| a.compare(b).then_with(|| a_id.cmp(b_id)));
    placed.into_iter().map(|(_, id)| id.clone()).collect()
}

fn place(rule: Rule, vm: &MeasuredVm, parameters: OrderParameters) -> Place {
    let difference = vm.network_out.0 as f64 - vm.network_in.0 as f64;
    let balanced = parameters.bandwidth.0 as f64 * parameters.balanced.max(0.0);
    let pages = effective_pages(rule, vm, parameters.bandwidth);
    if difference > balanced {
        Place::Outgoing { time_per_release: pages / difference }
    } else if -difference > balanced {
        Place::Incoming { time_per_load: pages / -difference }
    } else {
        Place::Balanced { dirty: Reverse(vm.dirty_rate.0), pages: Reverse(vm.non_zero.0) }
    }
}

/// N, or what equation (2) makes of it. An iteration cannot send more than the one before (r is at
/// most 1).
fn effective_pages(rule: Rule, vm: &MeasuredVm, bandwidth: BitsPerSec) -> f64 {
    let pages = vm.non_zero.0 as f64;
    if rule == Rule::PostCopy {
        return pages;
    }
    let sent_per_second = bandwidth.bytes_per_sec().0.max(1) as f64;
    let again = (vm.dirty_rate.bytes_per_sec().0 as f64 / sent_per_second).min(1.0);
    pages * (0..SERIES).map(|iteration| again.powi(iteration)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat_protocol::units::{Bytes, BytesPerSec, Pages, PagesPerSec};
    use proptest::prelude::*;

    /// The paper's link.
    const GIGABIT: OrderParameters = OrderParameters::new(BitsPerSec(1_000_000_000));

    /// A VM with network use in hundredths of a percent of a gigabit.
    fn vm(id: &str, pages: u64, dirty: u64, out: u64, into: u64) -> MeasuredVm {
        MeasuredVm {
            id: VmId::new(id).unwrap(),
            memory: Pages(524_288).bytes(),
            non_zero: Pages(pages),
            dirty_rate: PagesPerSec(dirty),
            working_set: Pages(pages),
            network_out: BitsPerSec(out * 100_000),
            network_in: BitsPerSec(into * 100_000),
            disk: Bytes::ZERO,
            disk_writes: BytesPerSec::ZERO,
            error: 0.0,
        }
    }

    /// SOLive Table I, network use from IV-C.
    fn table_1() -> Vec<MeasuredVm> {
        vec![
            vm("NO", 268_694, 103, 6740, 28),
            vm("M", 518_280, 21_062, 0, 0),
            vm("C", 334_725, 3_146, 0, 0),
            vm("NI", 276_913, 1_118, 18, 1452),
            vm("NO1", 317_696, 926, 2630, 64),
            vm("M1", 430_071, 4_165, 0, 0),
            vm("C1", 392_307, 1_825, 0, 0),
            vm("NI1", 322_825, 1_502, 180, 7800),
        ]
    }

    fn names(rule: Rule, vms: &[MeasuredVm]) -> String {
        let ids = order(rule, vms, GIGABIT);
        ids.iter().map(VmId::as_str).collect::<Vec<_>>().join("/")
    }

    #[test]
    fn the_eight_vms_of_table_1_leave_in_order_19_of_figure_4() {
        for rule in [Rule::PreCopy, Rule::PostCopy] {
            assert_eq!(names(rule, &table_1()), "NO/NO1/M/M1/C/C1/NI/NI1", "{rule:?}");
        }
    }

    #[test]
    fn the_four_vms_of_figures_2_and_3_leave_in_the_fastest_order() {
        for rule in [Rule::PreCopy, Rule::PostCopy] {
            assert_eq!(names(rule, &table_1()[..4]), "NO/M/C/NI", "{rule:?}");
        }
    }

    #[test]
    fn pre_copy_counts_what_is_dirtied_again_and_post_copy_does_not() {
        let quiet = vm("quiet", 300_000, 0, 5000, 0);
        let busy = vm("busy", 250_000, 20_000, 5000, 0);
        let both = [busy, quiet];
        assert_eq!(names(Rule::PostCopy, &both), "busy/quiet");
        assert_eq!(names(Rule::PreCopy, &both), "quiet/busy");
        let quiet = vm("quiet", 300_000, 0, 0, 5000);
        let busy = vm("busy", 250_000, 20_000, 0, 5000);
        let both = [quiet, busy];
        assert_eq!(names(Rule::PostCopy, &both), "quiet/busy");
        assert_eq!(names(Rule::PreCopy, &both), "busy/quiet");
    }

    #[test]
    fn about_the_same_is_a_share_of_the_link() {
        let vms = [vm("a", 1, 0, 500, 0), vm("b", 1, 0, 501, 0), vm("c", 1, 0, 0, 500)];
        assert_eq!(names(Rule::PostCopy, &vms), "b/a/c");
    }

    fn any_vms() -> impl Strategy<Value = Vec<MeasuredVm>> {
        let figures = (0u64..600_000, 0u64..40_000, 0u64..10_000, 0u64..10_000);
        let rounded = figures.prop_map(|(n, s, o, i)| (n / 99_999, s / 9_999, o / 999, i / 999));
        prop::collection::vec(rounded, 0..12).prop_map(|all| {
            let one = |(i, (n, s, out, into)): (usize, (u64, u64, u64, u64))| {
                vm(&format!("v{i}"), n, s, out * 999, into * 999)
            };
            all.into_iter().enumerate().map(one).collect()
        })
    }

    proptest! {
        #[test]
        fn everyone_leaves_once_and_the_input_s_order_does_not_matter(vms in any_vms(), turn in 0usize..12) {
            for rule in [Rule::PreCopy, Rule::PostCopy] {
                let ordered = order(rule, &vms, GIGABIT);
                let mut sorted = ordered.clone();
                sorted.sort();
                let mut ids: Vec<VmId> = vms.iter().map(|vm| vm.id.clone()).collect();
                ids.sort();
                prop_assert_eq!(sorted, ids);
                let mut turned = vms.clone();
                turned.rotate_left(turn.min(vms.len()));
                prop_assert_eq!(order(rule, &turned, GIGABIT), ordered);
            }
        }

        #[test]
        fn senders_leave_before_receivers(vms in any_vms()) {
            let ordered = order(Rule::PreCopy, &vms, GIGABIT);
            let group = |id: &VmId| {
                let vm = vms.iter().find(|vm| vm.id == *id).unwrap();
                place(Rule::PreCopy, vm, GIGABIT).group()
            };
            prop_assert!(ordered.windows(2).all(|pair| group(&pair[0]) <= group(&pair[1])));
        }
    }
}
