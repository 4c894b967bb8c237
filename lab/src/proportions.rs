//! SOLive's Table I, brought to another link speed and another guest size.
//!
//! Used by the scenario to fill in what a VM does when the file only names its role. Pure.
//!
//! The paper's guests have 2 GiB and share one 1 Gbit/s NIC (SOLive IV-A). What makes the order
//! of migration matter are ratios to that link, so they are kept:
//!
//! | ratio | here |
//! |---|---|
//! | dirty rate / bandwidth | `dirty = paper's pages/s x link / 1 Gbit/s x load` |
//! | traffic / bandwidth | `rate = paper's share of the NIC x link x load` |
//! | non-zero pages / memory | `region = share of memory that is not zero - what the kernel uses` |
//!
//! `load` scales the first two alike. Memory is what the scenario gives the VM: at 200 Mbit/s the
//! paper's 2 GiB (17.2 s of its link) would be 410 MiB; 256 MiB are 0.63 of it.

use lifeboat_protocol::units::{BitsPerSec, Bytes, PAGE_BYTES, Pages, PagesPerSec};
use serde::{Deserialize, Serialize};

/// What a VM does (SOLive IV-A).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Outgoing network-intensive.
    #[serde(rename = "NO")]
    No,
    /// Memory-intensive.
    M,
    /// CPU-intensive.
    C,
    /// Incoming network-intensive.
    #[serde(rename = "NI")]
    Ni,
    /// Only proves that it is unharmed; not in the paper.
    #[serde(rename = "idle")]
    Idle,
}

impl Role {
    /// The name that `guest-workload` takes for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::No => "NO",
            Self::M => "M",
            Self::C => "C",
            Self::Ni => "NI",
            Self::Idle => "idle",
        }
    }
}

/// A row of Table I, with the traffic that section IV-C gives for all VMs running together.
struct Row {
    non_zero: u64,
    dirty: f64,
    /// Share of the NIC that the VM's main traffic takes (outgoing for NO, incoming for NI).
    traffic: f64,
    /// Percent of one CPU. Ours: the paper gives none; more would starve the other guests.
    cpu: u64,
}

const PAPER_LINK: f64 = 1e9;
const PAPER_PAGES: f64 = 524_288.0;

const fn row(role: Role) -> Row {
    match role {
        Role::No => Row { non_zero: 268_694, dirty: 103.0, traffic: 0.674, cpu: 0 },
        Role::M => Row { non_zero: 518_280, dirty: 21_062.0, traffic: 0.0, cpu: 0 },
        Role::C => Row { non_zero: 334_725, dirty: 3_146.0, traffic: 0.0, cpu: 10 },
        Role::Ni => Row { non_zero: 276_913, dirty: 1_118.0, traffic: 0.1452, cpu: 0 },
        Role::Idle => Row { non_zero: 157_286, dirty: 100.0, traffic: 0.0, cpu: 0 },
    }
}

/// What the guest's kernel and initramfs hold of non-zero memory.
const KERNEL: u64 = 48 << 20;
/// What must stay free of the region, or the guest's kernel runs out of memory.
const KEPT_FREE: u64 = 76 << 20;
const REGION_LEAST: u64 = 8 << 20;

/// What a guest of a role is told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Seeded pages, which are its working set too.
    pub region: Bytes,
    /// Pages rewritten per second.
    pub dirty: PagesPerSec,
    /// Its traffic: outgoing for NO, incoming for NI, zero for the others.
    pub rate: BitsPerSec,
    /// Percent of one CPU spent computing.
    pub cpu: u64,
}

/// Table I for `role` with `memory`, behind a link of `link`, at `load` times the paper's ratios.
#[must_use]
pub fn share(role: Role, memory: Bytes, link: BitsPerSec, load: f64) -> Share {
    let row = row(role);
    let non_zero = memory.scale(row.non_zero as f64 / PAPER_PAGES);
    let room = (memory - Bytes(KEPT_FREE)).max(Bytes(REGION_LEAST));
    let region = (non_zero - Bytes(KERNEL)).max(Bytes(REGION_LEAST)).min(room);
    let factor = link.0 as f64 / PAPER_LINK * load;
    Share {
        region: Pages(region.0 / PAGE_BYTES).bytes(),
        dirty: PagesPerSec((row.dirty * factor).round() as u64),
        rate: link.scale(row.traffic * load),
        cpu: row.cpu,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: BitsPerSec = BitsPerSec::from_mbit(200);

    #[test]
    fn the_memory_intensive_vm_dirties_69_percent_of_its_link_as_in_the_paper() {
        for link in [LINK, BitsPerSec::from_mbit(1000)] {
            let dirty = share(Role::M, Bytes::from_mib(256), link, 1.0).dirty;
            let ratio = dirty.bytes_per_sec().bits_per_sec().0 as f64 / link.0 as f64;
            assert!((ratio - 0.690).abs() < 0.001, "{ratio}");
        }
    }

    #[test]
    fn traffic_keeps_its_share_of_the_link() {
        let rate = |role| share(role, Bytes::from_mib(192), LINK, 1.0).rate;
        assert_eq!(rate(Role::No), BitsPerSec(134_800_000));
        assert_eq!(rate(Role::Ni), BitsPerSec(29_040_000));
        assert_eq!(rate(Role::C), BitsPerSec::ZERO);
    }

    #[test]
    fn load_scales_dirty_rate_and_traffic_alike() {
        let (full, half) = (
            share(Role::Ni, Bytes::from_mib(192), LINK, 1.0),
            share(Role::Ni, Bytes::from_mib(192), LINK, 0.5),
        );
        assert_eq!(half.rate, full.rate.scale(0.5));
        assert_eq!((full.dirty, half.dirty), (PagesPerSec(224), PagesPerSec(112)));
        assert_eq!(full.region, half.region);
    }

    #[test]
    fn the_region_leaves_the_guests_kernel_its_room() {
        for role in [Role::No, Role::M, Role::C, Role::Ni, Role::Idle] {
            for mib in [96, 192, 256, 1024] {
                let region = share(role, Bytes::from_mib(mib), LINK, 1.0).region;
                assert!(region.0 >= REGION_LEAST && region.0 + KEPT_FREE <= mib << 20);
            }
        }
    }
}
