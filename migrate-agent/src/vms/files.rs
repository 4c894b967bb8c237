//! A definition from and to a TOML file.
//!
//! ```toml
//! name = "web-1"
//! memory = "256 MiB"
//! vcpus = 1
//! machine = "pc-i440fx-7.2"
//! cpu_model = "qemu64"
//! kernel = "vmlinuz"            # in the images directory
//! initrd = "initrd"
//! kernel_arguments = "console=ttyS0"
//! autostart = true
//! promised_network = "15 Mbit/s"
//!
//! [[nic]]
//! mac = "52:54:00:00:01:01"
//! bridge = "br0"
//! vlan_tag = 10
//! ```
//!
//! Further keys: `kernel_digest`, `initrd_digest`, `firmware` and `firmware_digest` (such as OVMF's
//! code, in the images directory), `profile`, `promised_disk` (a size, per
//! second), `forbid_post_copy`, `forbid_intermediaries`, `forbid_throttling`, `nic.mtu`, and
//! `[[disk]]` with `path`, `format`, `read_only`, `nvram` (what the firmware keeps its variables in),
//! `cdrom`, `shared_storage`.

use std::path::Path;

use lifeboat_protocol::units::{BitsPerSec, Bytes, text};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Problem, Raw, RawDisk, RawNic};
use crate::toml_file::{self, FileError, SyntaxError};

/// Why a definition file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VmFileError {
    /// Not such a file at all.
    #[error(transparent)]
    Syntax(#[from] FileError<SyntaxError>),
    /// A value that is not allowed.
    #[error(transparent)]
    Value(#[from] FileError<Problem>),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VmFile {
    name: String,
    #[serde(deserialize_with = "text::deserialize", serialize_with = "exact::bytes")]
    memory: Bytes,
    vcpus: u32,
    machine: String,
    cpu_model: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    firmware: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    firmware_digest: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    kernel_digest: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    initrd: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    initrd_digest: String,
    #[serde(default)]
    kernel_arguments: String,
    #[serde(default)]
    profile: String,
    #[serde(default, deserialize_with = "text::deserialize", serialize_with = "exact::rate")]
    promised_network: BitsPerSec,
    #[serde(default, deserialize_with = "text::deserialize", serialize_with = "exact::bytes")]
    promised_disk: Bytes,
    #[serde(default)]
    forbid_post_copy: bool,
    #[serde(default)]
    forbid_intermediaries: bool,
    #[serde(default)]
    forbid_throttling: bool,
    #[serde(default)]
    autostart: bool,
    #[serde(default)]
    nic: Vec<NicEntry>,
    #[serde(default)]
    disk: Vec<DiskEntry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NicEntry {
    mac: String,
    bridge: String,
    #[serde(default)]
    vlan_tag: u32,
    #[serde(default)]
    mtu: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskEntry {
    path: String,
    format: String,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    nvram: bool,
    #[serde(default)]
    cdrom: bool,
    #[serde(default)]
    shared_storage: String,
}

/// Quantities to the last unit: their ordinary text rounds, and a definition must not.
mod exact {
    use lifeboat_protocol::units::{BitsPerSec, Bytes};
    use serde::Serializer;

    pub(super) fn bytes<S: Serializer>(value: &Bytes, to: S) -> Result<S::Ok, S::Error> {
        match value.0.is_multiple_of(1 << 20) {
            true => to.collect_str(&format_args!("{} MiB", value.mib())),
            false => to.collect_str(&format_args!("{} B", value.0)),
        }
    }

    pub(super) fn rate<S: Serializer>(value: &BitsPerSec, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{} bit/s", value.0))
    }
}

/// Reads the definition in `file`.
///
/// # Errors
/// With file, line and key.
pub fn read(file: &Path) -> Result<Definition, VmFileError> {
    parse(file, &toml_file::read(file)?)
}

/// As [`read`], from text; `file` is for error texts.
///
/// # Errors
/// As [`read`].
pub fn parse(file: &Path, text: &str) -> Result<Definition, VmFileError> {
    let parsed: VmFile = toml_file::parse(file, text)?;
    Raw::from(parsed).check().map_err(|error| {
        let line = toml_file::line_of_key(text, &error.key);
        FileError { file: file.into(), line, key: error.key, problem: error.problem }.into()
    })
}

/// The definition as the text of a file, which [`parse`] reads back.
#[must_use]
pub fn to_text(definition: &Definition) -> String {
    let file = VmFile::from(definition);
    toml::to_string(&file).unwrap_or_else(|error| {
        unreachable!("a definition is strings, numbers and tables after them: {error}")
    })
}

impl From<VmFile> for Raw {
    fn from(file: VmFile) -> Self {
        let nic = |nic: NicEntry| RawNic {
            mac: nic.mac,
            bridge: nic.bridge,
            vlan_tag: nic.vlan_tag,
            mtu: nic.mtu,
        };
        let disk = |disk: DiskEntry| RawDisk {
            path: disk.path,
            format: disk.format,
            read_only: disk.read_only,
            nvram: disk.nvram,
            cdrom: disk.cdrom,
            shared_storage: disk.shared_storage,
        };
        Self {
            name: file.name,
            memory: file.memory.0,
            vcpus: file.vcpus,
            machine: file.machine,
            cpu_model: file.cpu_model,
            firmware: file.firmware.map(|name| (name, file.firmware_digest)),
            kernel: file.kernel.map(|name| (name, file.kernel_digest)),
            initrd: file.initrd.map(|name| (name, file.initrd_digest)),
            kernel_arguments: file.kernel_arguments,
            nics: file.nic.into_iter().map(nic).collect(),
            disks: file.disk.into_iter().map(disk).collect(),
            profile: file.profile,
            promised_network: file.promised_network.0,
            promised_disk: file.promised_disk.0,
            forbid_post_copy: file.forbid_post_copy,
            forbid_intermediaries: file.forbid_intermediaries,
            forbid_throttling: file.forbid_throttling,
            autostart: file.autostart,
        }
    }
}

impl From<&Definition> for VmFile {
    fn from(definition: &Definition) -> Self {
        let digest = |image: &Option<super::definition::Image>| {
            let digest = image.as_ref().and_then(|image| image.digest);
            digest.map(|digest| format!("{digest:016x}")).unwrap_or_default()
        };
        let nic = definition.nics.iter().map(|nic| NicEntry {
            mac: nic.mac.clone(),
            bridge: nic.bridge.clone(),
            vlan_tag: nic.vlan_tag.map_or(0, u32::from),
            mtu: nic.mtu.unwrap_or(0),
        });
        let disk = definition.disks.iter().map(|disk| DiskEntry {
            path: disk.path.to_string_lossy().into_owned(),
            format: disk.format.as_str().to_owned(),
            read_only: disk.read_only,
            nvram: disk.nvram,
            cdrom: disk.cdrom,
            shared_storage: disk.shared_storage.clone().unwrap_or_default(),
        });
        Self {
            name: definition.name.to_string(),
            memory: definition.memory,
            vcpus: definition.vcpus,
            machine: definition.machine.clone(),
            cpu_model: definition.cpu_model.clone(),
            firmware_digest: digest(&definition.firmware),
            firmware: definition.firmware.as_ref().map(|image| image.name.clone()),
            kernel_digest: digest(&definition.kernel),
            kernel: definition.kernel.as_ref().map(|image| image.name.clone()),
            initrd_digest: digest(&definition.initrd),
            initrd: definition.initrd.as_ref().map(|image| image.name.clone()),
            kernel_arguments: definition.kernel_arguments.clone(),
            profile: definition.profile.clone().unwrap_or_default(),
            promised_network: definition.promised_network,
            promised_disk: Bytes(definition.promised_disk.0),
            forbid_post_copy: definition.forbid_post_copy,
            forbid_intermediaries: definition.forbid_intermediaries,
            forbid_throttling: definition.forbid_throttling,
            autostart: definition.autostart,
            nic: nic.collect(),
            disk: disk.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = r#"name = "web-1"
memory = "256 MiB"
vcpus = 1
machine = "pc-i440fx-7.2"
cpu_model = "qemu64"
firmware = "OVMF_CODE.fd"
kernel = "vmlinuz"
initrd = "initrd"
kernel_arguments = "console=ttyS0 \"quoted\""
autostart = true
promised_network = "15 Mbit/s"

[[nic]]
mac = "52:54:00:00:01:01"
bridge = "br0"
vlan_tag = 10

[[disk]]
path = "/srv/a.raw"
format = "raw"

[[disk]]
path = "vars.fd"
format = "raw"
nvram = true

[[disk]]
path = "/srv/iso/a.iso"
format = "raw"
cdrom = true
"#;

    fn error(text: &str) -> String {
        parse(Path::new("vms/web.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn a_definition_survives_its_file() {
        for memory in ["256 MiB", "1100 MiB", "1 GiB"] {
            let sample = SAMPLE.replace("256 MiB", memory).replace("15 Mbit/s", "1234567 bit/s");
            let definition = parse(Path::new("web.toml"), &sample).unwrap();
            assert!(definition.autostart);
            assert_eq!(parse(Path::new("x"), &to_text(&definition)).unwrap(), definition);
        }
    }

    #[test]
    fn errors_name_file_line_and_key() {
        let said = error(&SAMPLE.replace("vlan_tag = 10", "vlan_tag = 5000"));
        assert!(
            said.starts_with("vms/web.toml:16: `nic[0].vlan_tag`: 5000 is out of range"),
            "{said}"
        );
        let said = error(&SAMPLE.replace("vcpus = 1", "vcpus = \"one\""));
        assert!(said.starts_with("vms/web.toml:3: `vcpus`: "), "{said}");
        let said = error(&SAMPLE.replace("256 MiB", "256 Mbit"));
        assert!(said.starts_with("vms/web.toml:2: `memory`: `256 Mbit` is not a size"), "{said}");
        let said = error(&SAMPLE.replace("machine = \"pc-i440fx-7.2\"", "machine = \"pc\""));
        assert!(said.starts_with("vms/web.toml:4: `machine`: `pc` is not"), "{said}");
    }
}
