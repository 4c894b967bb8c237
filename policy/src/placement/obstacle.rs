//! What can stand between a VM and a host, as types that print as an operator reads them.
//!
//! Used by placement and by the plan's list of those left behind. Each sentence reads on after
//! "host h3: ".

use std::collections::BTreeSet;

use lifeboat_protocol::units::{BitsPerSec, Bytes};
use serde::Serialize;

use super::facts::QemuVersion;

/// What forbids moving a VM, whatever the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum VmObstacle {
    /// Somebody else would start it again, or think it dead.
    #[error("it belongs to {owner}; move it with {owner}'s own tools, or release it there first")]
    ForeignOwner {
        /// Who.
        owner: String,
    },
}

/// What speaks against one host as the destination of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Obstacle {
    /// The VM is there already.
    #[error("the VM is there already")]
    Source,
    /// `--to` names other hosts, or this one has been tried.
    #[error("it is no candidate: --to names others, or it has failed this VM already")]
    NotAllowed,
    /// An operator said that it takes no VMs.
    #[error("it is cordoned; `lifeboat uncordon` it if it may take VMs")]
    Cordoned,
    /// It is being emptied.
    #[error("it is being evacuated itself")]
    Evacuating,
    /// Its agent does not answer.
    #[error("its agent does not answer")]
    Unreachable,
    /// Too little memory.
    #[error("{needed} of memory are needed with QEMU's own, {free} are free or not yet promised")]
    Memory {
        /// The guest's memory and QEMU's overhead.
        needed: Bytes,
        /// Free, less arrivals and what this plan has given away already.
        free: Bytes,
    },
    /// Too little room on its link.
    #[error("the VM receives {needed}, the host's link has {spare} to spare")]
    LinkRoom {
        /// What the VM receives.
        needed: BitsPerSec,
        /// What is left of the link.
        spare: BitsPerSec,
    },
    /// Nothing leads there, or nothing leads there now.
    #[error("{sentence}")]
    NoWay {
        /// What `topology/` says: which hosts, and where it is cut.
        sentence: String,
    },
    /// Its QEMU is older.
    #[error("its QEMU {host} is older than the VM's {vm}; upgrade it")]
    QemuOlder {
        /// The VM's.
        vm: QemuVersion,
        /// The host's.
        host: QemuVersion,
    },
    /// Its QEMU does not know the machine type.
    #[error("its QEMU does not offer the machine type {wanted}")]
    MachineType {
        /// The VM's.
        wanted: String,
    },
    /// Its QEMU or processor cannot run the CPU model.
    #[error("it cannot run the CPU model {wanted}")]
    CpuModel {
        /// The VM's.
        wanted: String,
    },
    /// The guest was shown CPU flags that are missing there.
    #[error("its processor lacks {}, which the guest was shown", list(.missing))]
    CpuFlags {
        /// Those.
        missing: BTreeSet<String>,
    },
    /// Its QEMU lacks device models.
    #[error("its QEMU does not offer {}", list(.missing))]
    Devices {
        /// Those.
        missing: BTreeSet<String>,
    },
    /// The profile of extra QEMU arguments is missing.
    #[error(
        "it has no profile {wanted} of QEMU arguments; put the same file there as at the source"
    )]
    Profile {
        /// The VM's.
        wanted: String,
    },
    /// A bridge is missing.
    #[error("it has no bridge {bridge}")]
    Bridge {
        /// The bridge of one of the VM's network cards.
        bridge: String,
    },
    /// A bridge passes smaller packets.
    #[error("its bridge {bridge} passes packets of {has} bytes, the VM sends {wanted}")]
    Mtu {
        /// The bridge.
        bridge: String,
        /// The VM's.
        wanted: u32,
        /// The bridge's.
        has: u32,
    },
    /// A bridge does not carry the tag.
    #[error("its bridge {bridge} does not carry VLAN {vlan}")]
    Vlan {
        /// The bridge.
        bridge: String,
        /// The tag.
        vlan: u16,
    },
    /// Shared storage is not proven there.
    #[error("it was not proven to reach the storage {}", list(.missing))]
    Storage {
        /// Those that are missing.
        missing: BTreeSet<String>,
    },
    /// A disk may not be made there.
    #[error(
        "it takes in no disk at {path}; add the directory to `disk_dirs` in its agent.toml, and make it"
    )]
    DiskPlace {
        /// The disk.
        path: String,
    },
    /// No guest can fetch its pages there.
    #[error("guests cannot run there before their pages are there: {why}")]
    Fetching {
        /// What its agent says.
        why: String,
    },
    /// What an overlay lies on is missing there, or is something else.
    #[error("what its overlay lies on is not the same there: {why}")]
    Base {
        /// Which file, and what is wrong with it.
        why: String,
    },
    /// The disks do not fit.
    #[error("{needed} of disks are to be moved, {free} are free in {room}")]
    DiskRoom {
        /// What they take.
        needed: Bytes,
        /// What is free, less what this plan has given away already.
        free: Bytes,
        /// Where.
        room: String,
    },
}

fn list(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}
