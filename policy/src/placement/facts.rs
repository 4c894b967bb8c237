//! What a VM needs and what a host offers, as far as placement cares.
//!
//! The agents report both; the controller fills these in. Nothing is decided here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::units::{BitsPerSec, Bytes};
use serde::Serialize;

/// QEMU's version, major and minor: migration is promised from older to newer with the same machine
/// type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct QemuVersion {
    /// The first number.
    pub major: u32,
    /// The second number.
    pub minor: u32,
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A text that does not begin with a version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is no QEMU version such as 7.2.22")]
pub struct QemuVersionError {
    /// What was given, shortened.
    pub given: String,
}

impl FromStr for QemuVersion {
    type Err = QemuVersionError;

    /// Reads what QEMU says of itself (`7.2.22 (Debian 1:7.2+dfsg-7)`): the first two numbers.
    fn from_str(text: &str) -> Result<Self, QemuVersionError> {
        let mut numbers = text.trim().split(|c: char| !c.is_ascii_digit());
        let mut next = || numbers.next().and_then(|number| number.parse().ok());
        match (next(), next()) {
            (Some(major), Some(minor)) => Ok(Self { major, minor }),
            _ => Err(QemuVersionError { given: text.chars().take(40).collect() }),
        }
    }
}

/// The CPU that the guest was started with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuNeed {
    /// A named model, the same everywhere.
    Named(String),
    /// The source's own (`host`, `max`): the destination must have every flag that the guest was
    /// shown.
    HostLike {
        /// The model's name.
        model: String,
        /// The flags shown.
        flags: BTreeSet<String>,
    },
}

/// One network card of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NicNeed {
    /// The bridge that its tap is a port of, by name.
    pub bridge: String,
    /// Largest packet, bytes.
    pub mtu: u32,
    /// Its VLAN tag, if it has one.
    pub vlan: Option<u16>,
}

/// What those of a guest's disks need that do not go along.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskNeed {
    /// None of its disks lies on such storage.
    None,
    /// Storage that several hosts reach, by the name that they know it by. A host counts only with
    /// a proof (a probe file).
    Shared(BTreeSet<String>),
}

/// The disks that only the source has, and that go along.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LocalDisks {
    /// Their images, the same at every host: paths, or plain names.
    pub paths: BTreeSet<String>,
    /// What they take together; holes take nothing.
    pub bytes: Bytes,
}

/// A directory of a host in which disks may arrive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskRoom {
    /// Which.
    pub path: String,
    /// What is free of its file system.
    pub free: Bytes,
}

impl DiskRoom {
    /// Whether the image `path` lies in it.
    #[must_use]
    pub fn holds(&self, path: &str) -> bool {
        let rest = path.strip_prefix(self.path.trim_end_matches('/'));
        rest.is_some_and(|rest| rest.starts_with('/'))
    }
}

/// What one VM needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VmNeeds {
    /// The VM.
    pub id: VmId,
    /// Its memory.
    pub memory: Bytes,
    /// Its virtual CPUs.
    pub vcpus: u32,
    /// What it receives, bit/s: its destination's link must have room for that.
    pub network_in: BitsPerSec,
    /// The QEMU that it runs in.
    pub qemu: QemuVersion,
    /// Its machine type with version, such as `pc-q35-7.2`.
    pub machine_type: String,
    /// Its CPU.
    pub cpu: CpuNeed,
    /// The device models that it has, such as `virtio-net-pci`.
    pub devices: BTreeSet<String>,
    /// Its network cards.
    pub nics: Vec<NicNeed>,
    /// Its disks.
    pub disk: DiskNeed,
    /// Its disks that go along.
    pub local_disks: LocalDisks,
    /// The root-owned profile of extra QEMU arguments that it was started with, if any.
    pub profile: Option<String>,
    /// Who else manages it (libvirt, Proxmox, an HA manager), if anybody does.
    pub foreign_owner: Option<String>,
}

/// Whether a host takes VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    /// It does.
    Ready,
    /// An operator said no.
    Cordoned,
    /// It is being emptied itself.
    Evacuating,
    /// Its agent does not answer.
    Unreachable,
}

/// VLAN tags, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct VlanRange {
    /// The first.
    pub first: u16,
    /// The last.
    pub last: u16,
}

/// A bridge of a host that guests can be ports of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bridge {
    /// Largest packet that passes, bytes.
    pub mtu: u32,
    /// The tags that its uplink carries; empty: all of them.
    pub vlans: Vec<VlanRange>,
}

/// What one host offers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostFacts {
    /// The host.
    pub id: HostId,
    /// Whether it takes VMs.
    pub state: HostState,
    /// All memory that it may give to guests.
    pub memory_total: Bytes,
    /// What of it is free now.
    pub memory_free: Bytes,
    /// Memory and virtual CPUs of each VM on its way there that is not in `memory_free` yet.
    pub arrivals: Vec<(Bytes, u32)>,
    /// What its link can still take in, bit/s.
    pub spare_in: BitsPerSec,
    /// Its QEMU.
    pub qemu: QemuVersion,
    /// The machine types that its QEMU offers.
    pub machine_types: BTreeSet<String>,
    /// The CPU models that its QEMU offers and its processor can run.
    pub cpu_models: BTreeSet<String>,
    /// Its processor's flags, as its QEMU shows them.
    pub cpu_flags: BTreeSet<String>,
    /// The device models that its QEMU offers.
    pub devices: BTreeSet<String>,
    /// Its bridges by name.
    pub bridges: BTreeMap<String, Bridge>,
    /// The profiles of extra QEMU arguments that it has.
    pub profiles: BTreeSet<String>,
    /// The shared storage that was proven to be reachable there.
    pub storage: BTreeSet<String>,
    /// Where disks may arrive.
    pub disk_rooms: Vec<DiskRoom>,
    /// Why no guest can fetch its pages there while it runs; empty where one can.
    pub fetch_obstacle: String,
    /// What copies of VMs' disks take there, which their disks need not take again.
    pub seeds: BTreeMap<VmId, Bytes>,
    /// Why a VM's overlays cannot lie on what is there, for each VM where that is so.
    pub base_obstacles: BTreeMap<VmId, String>,
}

/// What a QEMU process needs besides the guest's memory: something for itself, something that grows
/// with the memory (page tables, dirty bitmaps, the migration's buffers) and with the CPUs (stacks,
/// coroutines). The defaults are careful estimates of ours, not measurements; an operator who has
/// measured says so in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Overhead {
    /// For each process.
    pub fixed: Bytes,
    /// For each GiB of guest memory, begun or whole.
    pub per_gib: Bytes,
    /// For each virtual CPU.
    pub per_vcpu: Bytes,
}

impl Default for Overhead {
    fn default() -> Self {
        Self {
            fixed: Bytes::from_mib(96),
            per_gib: Bytes::from_mib(16),
            per_vcpu: Bytes::from_mib(4),
        }
    }
}

impl Overhead {
    /// Everything that a guest of `memory` with `vcpus` takes of a host.
    #[must_use]
    pub fn total(&self, memory: Bytes, vcpus: u32) -> Bytes {
        let per_gib = self.per_gib.0.saturating_mul(memory.0.div_ceil(1 << 30));
        let per_vcpu = self.per_vcpu.0.saturating_mul(u64::from(vcpus));
        memory + self.fixed + Bytes(per_gib) + Bytes(per_vcpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_as_qemu_says_it() {
        let version = |text: &str| text.parse::<QemuVersion>().map(|v| v.to_string());
        assert_eq!(version("7.2.22 (Debian 1:7.2+dfsg-7)"), Ok("7.2".to_owned()));
        assert_eq!(version("10.0"), Ok("10.0".to_owned()));
        for bad in ["", "seven", "7", "v7.2", "99999999999.1"] {
            assert!(version(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn overhead_counts_a_begun_gib_as_whole() {
        let small = Overhead::default().total(Bytes::from_mib(256), 1);
        assert_eq!(small, Bytes::from_mib(256 + 96 + 16 + 4));
        assert_eq!(Overhead::default().total(Bytes(u64::MAX), u32::MAX), Bytes(u64::MAX));
    }
}
