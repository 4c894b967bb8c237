//! What a VM is: the checked definition, from a file of this host or from a peer.
//!
//! Used by everything in `vms/` and by the gRPC server. Both origins go through one set of
//! checks ([`Raw::check`]), because what comes over the API is hostile until proven dull: after
//! it no field can be a path out of its directory, or too large, or mean something to QEMU that
//! its name does not say. Files are in `files`, the wire in `wire`.

use std::path::{Component, Path, PathBuf};

use lifeboat_protocol::ids::{NameError, VmId};
use lifeboat_protocol::units::{BitsPerSec, Bytes, BytesPerSec};

use crate::qemu::launch::{CD_DRIVES_MAX, DEVICES_MAX};

/// Virtual CPUs that a VM may have.
pub const VCPUS_MAX: u32 = 255;
/// Least and most memory of a VM.
pub const MEMORY_MIN: Bytes = Bytes::from_mib(8);
/// See [`MEMORY_MIN`].
pub const MEMORY_MAX: Bytes = Bytes::from_mib(16 << 20);
/// Longest kernel command line, in bytes (Linux takes 2048 on x86, its ending zero included).
pub const KERNEL_ARGUMENTS_BYTES_MAX: usize = 2047;
/// The least MTU that IPv6 allows, and the most that fits a frame's length.
const MTU_RANGE: std::ops::RangeInclusive<u32> = 1280..=65_521;

/// A VM, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// Its name, the same on every host.
    pub name: VmId,
    /// Whole MiB.
    pub memory: Bytes,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// QEMU machine type with its version.
    pub machine: String,
    /// QEMU CPU model, perhaps with features.
    pub cpu_model: String,
    /// The machine's firmware, such as OVMF's code; `None` is QEMU's own BIOS.
    pub firmware: Option<Image>,
    /// Linux kernel; `None` boots from the first disk.
    pub kernel: Option<Image>,
    /// Initial RAM disk.
    pub initrd: Option<Image>,
    /// For the kernel.
    pub kernel_arguments: String,
    /// In the order of their PCI slots.
    pub nics: Vec<Nic>,
    /// In the order of their PCI slots.
    pub disks: Vec<Disk>,
    /// A profile of the host.
    pub profile: Option<String>,
    /// Network rate that the VM's owner was promised; zero for none.
    pub promised_network: BitsPerSec,
    /// Disk rate that the VM's owner was promised; zero for none.
    pub promised_disk: BytesPerSec,
    /// Never post-copy.
    pub forbid_post_copy: bool,
    /// Pages never rest on a third host.
    pub forbid_intermediaries: bool,
    /// The guest may not be slowed down.
    pub forbid_throttling: bool,
    /// Started once after each boot of the host. Not on the wire: a host's own affair.
    pub autostart: bool,
}

/// A file in the images directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// A name, never a path.
    pub name: String,
    /// What it must hash to (xxh3-64); `None` takes it as it is.
    pub digest: Option<u64>,
}

/// A NIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Lower case.
    pub mac: String,
    /// OVS bridge of the host.
    pub bridge: String,
    /// 1 to 4094; `None` is untagged.
    pub vlan_tag: Option<u16>,
    /// Told to the guest; `None` is the bridge's, and the guest is not told.
    pub mtu: Option<u32>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Absolute, without `..`; or a plain name, which each host looks up in its first directory for
    /// disks. Those of a shared storage are absolute.
    pub path: PathBuf,
    /// How it is stored.
    pub format: DiskFormat,
    /// The guest cannot write to it.
    pub read_only: bool,
    /// It is no disk for the guest but the memory that the firmware keeps its variables in.
    pub nvram: bool,
    /// It is the CD in a drive of its own; then the guest cannot write to it.
    pub cdrom: bool,
    /// The storage, declared by every host that reaches it; `None` is local.
    pub shared_storage: Option<String>,
}

/// How a disk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// Byte for byte.
    Raw,
    /// QEMU's own format.
    Qcow2,
}

impl DiskFormat {
    /// As QEMU and the files spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl Definition {
    /// What QEMU itself needs beside the guest's memory, as set aside for an arrival: its code and
    /// heap (64 MiB cover an idle 7.2 with virtio devices, measured at about 45), its thread
    /// stacks and translation cache (32 MiB a CPU; emulation's cache can take more), and the
    /// device rings and page tables (1/64 of the memory).
    #[must_use]
    pub fn overhead(&self) -> Bytes {
        Bytes::from_mib(64)
            + Bytes::from_mib(u64::from(self.vcpus).saturating_mul(32))
            + Bytes(self.memory.0 / 64)
    }

    /// What a host needs to have free for it.
    #[must_use]
    pub fn footprint(&self) -> Bytes {
        self.memory + self.overhead()
    }
}

/// A definition that cannot be used: which key, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{key}`: {problem}")]
pub struct DefinitionError {
    /// `nic[1].mac`.
    pub key: String,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What can be wrong with a value of a definition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// No name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Out of range.
    #[error("{given} is out of range: {least} to {most} {unit}")]
    Range {
        /// What was given.
        given: u64,
        /// The least allowed.
        least: u64,
        /// The most allowed.
        most: u64,
        /// Of what.
        unit: &'static str,
    },
    /// Not of whole MiB.
    #[error("{given} is not a whole number of MiB")]
    NotWholeMib {
        /// What was given, in bytes.
        given: u64,
    },
    /// Not of the form that the key needs.
    #[error("`{given}` is not {wanted}")]
    Form {
        /// What was given, shortened.
        given: String,
        /// What it should be, with an example.
        wanted: &'static str,
    },
    /// More of them than allowed.
    #[error("{given} of them, {most} are allowed")]
    TooMany {
        /// How many there are.
        given: usize,
        /// How many are allowed.
        most: usize,
    },
    /// It needs another key.
    #[error("needs `{other}` too")]
    Needs {
        /// The other key.
        other: &'static str,
    },
    /// Two NICs with one MAC.
    #[error("`{given}` is used twice")]
    Twice {
        /// The value.
        given: String,
    },
    /// A second NVRAM, or one that cannot be written.
    #[error("a machine has one NVRAM, and writes to it")]
    Nvram,
}

/// A definition as it was written or sent, not checked at all.
#[derive(Debug, Clone, Default)]
pub(super) struct Raw {
    pub(super) name: String,
    pub(super) memory: u64,
    pub(super) vcpus: u32,
    pub(super) machine: String,
    pub(super) cpu_model: String,
    /// Name and digest in hex; an empty digest is none.
    pub(super) firmware: Option<(String, String)>,
    pub(super) kernel: Option<(String, String)>,
    pub(super) initrd: Option<(String, String)>,
    pub(super) kernel_arguments: String,
    pub(super) nics: Vec<RawNic>,
    pub(super) disks: Vec<RawDisk>,
    pub(super) profile: String,
    pub(super) promised_network: u64,
    pub(super) promised_disk: u64,
    pub(super) forbid_post_copy: bool,
    pub(super) forbid_intermediaries: bool,
    pub(super) forbid_throttling: bool,
    pub(super) autostart: bool,
}

#[derive(Debug, Clone, Default)]
pub(super) struct RawNic {
    pub(super) mac: String,
    pub(super) bridge: String,
    pub(super) vlan_tag: u32,
    pub(super) mtu: u32,
}

#[derive(Debug, Clone, Default)]
pub(super) struct RawDisk {
    pub(super) path: String,
    pub(super) format: String,
    pub(super) read_only: bool,
    pub(super) nvram: bool,
    pub(super) cdrom: bool,
    pub(super) shared_storage: String,
}

fn at(key: impl Into<String>) -> impl Fn(Problem) -> DefinitionError {
    let key = key.into();
    move |problem| DefinitionError { key: key.clone(), problem }
}

impl Raw {
    /// Checks all of it.
    pub(super) fn check(self) -> Result<Definition, DefinitionError> {
        let count = |key, given: usize| match given <= DEVICES_MAX {
            true => Ok(()),
            false => Err(at(key)(Problem::TooMany { given, most: DEVICES_MAX })),
        };
        count("nic", self.nics.len())?;
        count("disk", self.disks.len())?;
        if self.kernel.is_none() && (self.initrd.is_some() || !self.kernel_arguments.is_empty()) {
            let key = if self.initrd.is_some() { "initrd" } else { "kernel_arguments" };
            return Err(at(key)(Problem::Needs { other: "kernel" }));
        }
        let given = self.disks.iter().filter(|disk| disk.cdrom).count();
        if given > CD_DRIVES_MAX {
            return Err(at("disk.cdrom")(Problem::TooMany { given, most: CD_DRIVES_MAX }));
        }
        let disks = disks(self.disks)?;
        if let Some(at_index) = disks.iter().position(|disk| disk.nvram) {
            nvram(&disks, at_index, self.firmware.is_some())?;
        }
        Ok(Definition {
            name: VmId::new(self.name).map_err(|e| at("name")(e.into()))?,
            memory: memory(self.memory).map_err(at("memory"))?,
            vcpus: range(self.vcpus, 1..=VCPUS_MAX, "CPUs").map_err(at("vcpus"))?,
            machine: machine(self.machine).map_err(at("machine"))?,
            cpu_model: cpu_model(self.cpu_model).map_err(at("cpu_model"))?,
            firmware: image(self.firmware).map_err(at("firmware"))?,
            kernel: image(self.kernel).map_err(at("kernel"))?,
            initrd: image(self.initrd).map_err(at("initrd"))?,
            kernel_arguments: arguments(self.kernel_arguments).map_err(at("kernel_arguments"))?,
            nics: nics(self.nics)?,
            disks,
            profile: optional_name(self.profile).map_err(at("profile"))?,
            promised_network: BitsPerSec(self.promised_network),
            promised_disk: BytesPerSec(self.promised_disk),
            forbid_post_copy: self.forbid_post_copy,
            forbid_intermediaries: self.forbid_intermediaries,
            forbid_throttling: self.forbid_throttling,
            autostart: self.autostart,
        })
    }
}

fn form(given: &str, wanted: &'static str) -> Problem {
    Problem::Form { given: given.chars().take(80).collect(), wanted }
}

fn memory(bytes: u64) -> Result<Bytes, Problem> {
    if !bytes.is_multiple_of(1 << 20) {
        return Err(Problem::NotWholeMib { given: bytes });
    }
    let (given, least, most) = (bytes >> 20, MEMORY_MIN.mib(), MEMORY_MAX.mib());
    match (least..=most).contains(&given) {
        true => Ok(Bytes(bytes)),
        false => Err(Problem::Range { given, least, most, unit: "MiB" }),
    }
}

fn range(
    given: u32,
    allowed: std::ops::RangeInclusive<u32>,
    unit: &'static str,
) -> Result<u32, Problem> {
    let (least, most) = ((*allowed.start()).into(), (*allowed.end()).into());
    match allowed.contains(&given) {
        true => Ok(given),
        false => Err(Problem::Range { given: given.into(), least, most, unit }),
    }
}

/// Only PCI machines of x86, and only with their version: an alias such as `pc` is another
/// machine on every QEMU, and a guest cannot be moved between two machines.
fn machine(name: String) -> Result<String, Problem> {
    let version = name.strip_prefix("pc-i440fx-").or_else(|| name.strip_prefix("pc-q35-"));
    let ok = version.is_some_and(|v| {
        v.len() <= 32 && v.starts_with(|c: char| c.is_ascii_alphanumeric()) && plain(v)
    });
    let wanted = "a machine type with its version, such as `pc-i440fx-7.2` or `pc-q35-7.2`";
    if ok { Ok(name) } else { Err(form(&name, wanted)) }
}

fn cpu_model(name: String) -> Result<String, Problem> {
    let mut parts = name.split(',');
    let model = parts.next().unwrap_or_default();
    let feature = |part: &str| {
        let bare = part.strip_prefix(['+', '-']).unwrap_or(part);
        let bare = bare.strip_suffix("=on").or_else(|| bare.strip_suffix("=off")).unwrap_or(bare);
        plain(bare)
    };
    let ok = name.len() <= 512
        && plain(model)
        && model.starts_with(|c: char| c.is_ascii_alphanumeric())
        && parts.all(feature);
    let wanted = "a CPU model, such as `qemu64` or `Skylake-Client-v3,+ssse3,avx=off`";
    if ok { Ok(name) } else { Err(form(&name, wanted)) }
}

fn plain(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

fn optional_name(name: String) -> Result<Option<String>, Problem> {
    if name.is_empty() { Ok(None) } else { checked_name(name).map(Some) }
}

/// The rules for names of files, storages and profiles are those of a VM's name.
fn checked_name(name: String) -> Result<String, Problem> {
    match VmId::new(name.clone()) {
        Ok(_) => Ok(name),
        Err(_) => Err(form(
            &name,
            "a name: 1 to 63 letters, digits, `-`, `_`, `.`, beginning with a letter or a digit",
        )),
    }
}

fn image(image: Option<(String, String)>) -> Result<Option<Image>, Problem> {
    let Some((name, digest)) = image else { return Ok(None) };
    let wanted = "an xxh3-64 digest: 16 hex digits";
    let digest = match digest.as_str() {
        "" => None,
        text if text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit()) => {
            Some(u64::from_str_radix(text, 16).map_err(|_| form(text, wanted))?)
        }
        text => return Err(form(text, wanted)),
    };
    Ok(Some(Image { name: checked_name(name)?, digest }))
}

fn arguments(text: String) -> Result<String, Problem> {
    let length = text.len();
    if length > KERNEL_ARGUMENTS_BYTES_MAX {
        let most = KERNEL_ARGUMENTS_BYTES_MAX as u64;
        return Err(Problem::Range { given: length as u64, least: 0, most, unit: "bytes" });
    }
    match text.chars().any(char::is_control) {
        true => Err(form(&text, "a kernel command line: one line, without control characters")),
        false => Ok(text),
    }
}

fn nics(raw: Vec<RawNic>) -> Result<Vec<Nic>, DefinitionError> {
    let mut nics: Vec<Nic> = vec![];
    for (index, raw) in raw.into_iter().enumerate() {
        let key = |field: &str| at(format!("nic[{index}].{field}"));
        let mac = mac(&raw.mac).map_err(key("mac"))?;
        if nics.iter().any(|nic| nic.mac == mac) {
            return Err(key("mac")(Problem::Twice { given: mac }));
        }
        nics.push(Nic {
            mac,
            bridge: bridge(raw.bridge).map_err(key("bridge"))?,
            vlan_tag: vlan(raw.vlan_tag).map_err(key("vlan_tag"))?,
            mtu: match raw.mtu {
                0 => None,
                mtu => Some(range(mtu, MTU_RANGE, "bytes").map_err(key("mtu"))?),
            },
        });
    }
    Ok(nics)
}

/// A unicast MAC, in lower case: a guest with a group address would hear nobody.
fn mac(text: &str) -> Result<String, Problem> {
    let octets: Vec<Option<u8>> = text
        .split(':')
        .map(|octet| match octet.len() {
            2 if !octet.starts_with('+') => u8::from_str_radix(octet, 16).ok(),
            _ => None,
        })
        .collect();
    let unicast = octets.first().copied().flatten().is_some_and(|first| first & 1 == 0);
    let ok = octets.len() == 6 && octets.iter().all(Option::is_some) && unicast;
    let wanted = "a unicast MAC address, such as `52:54:00:12:34:56`";
    if ok { Ok(text.to_ascii_lowercase()) } else { Err(form(text, wanted)) }
}

fn bridge(name: String) -> Result<String, Problem> {
    match name.len() <= 15 && plain(&name) && !name.starts_with(['-', '.']) {
        true => Ok(name),
        false => Err(form(&name, "a bridge: an interface name of at most 15 characters")),
    }
}

fn vlan(tag: u32) -> Result<Option<u16>, Problem> {
    if tag == 0 {
        return Ok(None);
    }
    let tag = range(tag, 1..=4094, "(a VLAN tag; 0 for untagged)")?;
    Ok(u16::try_from(tag).ok())
}

fn disks(raw: Vec<RawDisk>) -> Result<Vec<Disk>, DefinitionError> {
    let check = |(index, raw): (usize, RawDisk)| {
        let key = |field: &str| at(format!("disk[{index}].{field}"));
        let wanted = "`raw` or `qcow2`";
        let format = match raw.format.as_str() {
            "raw" => DiskFormat::Raw,
            "qcow2" => DiskFormat::Qcow2,
            other => return Err(key("format")(form(other, wanted))),
        };
        let storage = optional_name(raw.shared_storage).map_err(key("shared_storage"))?;
        let path = disk_path(&raw.path, storage.is_none()).map_err(key("path"))?;
        let (read_only, nvram, cdrom) = (raw.read_only || raw.cdrom, raw.nvram, raw.cdrom);
        Ok(Disk { path, format, read_only, nvram, cdrom, shared_storage: storage })
    };
    raw.into_iter().enumerate().map(check).collect()
}

/// Disk `index` is the first NVRAM of `disks`.
fn nvram(disks: &[Disk], index: usize, has_firmware: bool) -> Result<(), DefinitionError> {
    let key = at(format!("disk[{index}].nvram"));
    let alone = disks.iter().filter(|disk| disk.nvram).count() == 1;
    match has_firmware {
        true if alone && !disks[index].read_only => Ok(()),
        true => Err(key(Problem::Nvram)),
        false => Err(key(Problem::Needs { other: "firmware" })),
    }
}

fn disk_path(text: &str, may_be_a_name: bool) -> Result<PathBuf, Problem> {
    let path = Path::new(text);
    let mut parts = path.components();
    let whole = match parts.next() {
        Some(Component::RootDir) => parts.all(|part| matches!(part, Component::Normal(_))),
        Some(Component::Normal(_)) => may_be_a_name && parts.next().is_none(),
        _ => false,
    };
    let ok = whole && !text.chars().any(char::is_control) && text.len() <= 4095;
    match may_be_a_name {
        _ if ok => Ok(path.into()),
        true => Err(form(text, "an absolute path without `..`, or a plain name")),
        false => Err(form(text, "an absolute path without `..`")),
    }
}

#[cfg(test)]
#[path = "definition_tests.rs"]
mod tests;
