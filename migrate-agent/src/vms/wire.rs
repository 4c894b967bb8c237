//! A definition from and to the protocol's message. What comes in is checked like a file.

use lifeboat_protocol::agent;

use super::definition::{Definition, DefinitionError, Image, Raw, RawDisk, RawNic};

impl TryFrom<agent::VmDefinition> for Definition {
    type Error = DefinitionError;

    fn try_from(message: agent::VmDefinition) -> Result<Self, DefinitionError> {
        let image = |image: agent::BootImage| (image.name, image.digest);
        let nic = |nic: agent::Nic| RawNic {
            mac: nic.mac,
            bridge: nic.bridge,
            vlan_tag: nic.vlan_tag,
            mtu: nic.mtu,
        };
        let disk = |disk: agent::Disk| RawDisk {
            path: disk.path,
            format: disk.format,
            read_only: disk.read_only,
            nvram: disk.nvram,
            cdrom: disk.cdrom,
            shared_storage: disk.shared_storage,
        };
        let raw = Raw {
            name: message.name,
            memory: message.memory_bytes,
            vcpus: message.vcpus,
            machine: message.machine,
            cpu_model: message.cpu_model,
            firmware: message.firmware.filter(|image| !image.name.is_empty()).map(image),
            kernel: message.kernel.filter(|image| !image.name.is_empty()).map(image),
            initrd: message.initrd.filter(|image| !image.name.is_empty()).map(image),
            kernel_arguments: message.kernel_arguments,
            nics: message.nics.into_iter().map(nic).collect(),
            disks: message.disks.into_iter().map(disk).collect(),
            profile: message.profile,
            promised_network: message.promised_network_bits_per_sec,
            promised_disk: message.promised_disk_bytes_per_sec,
            forbid_post_copy: message.forbid_post_copy,
            forbid_intermediaries: message.forbid_intermediaries,
            forbid_throttling: message.forbid_throttling,
            autostart: false,
        };
        raw.check()
    }
}

impl From<&Definition> for agent::VmDefinition {
    fn from(definition: &Definition) -> Self {
        let image = |image: &Image| agent::BootImage {
            name: image.name.clone(),
            digest: image.digest.map(|digest| format!("{digest:016x}")).unwrap_or_default(),
        };
        let nics = definition.nics.iter().map(|nic| agent::Nic {
            mac: nic.mac.clone(),
            bridge: nic.bridge.clone(),
            vlan_tag: nic.vlan_tag.map_or(0, u32::from),
            mtu: nic.mtu.unwrap_or(0),
        });
        let disks = definition.disks.iter().map(|disk| agent::Disk {
            path: disk.path.to_string_lossy().into_owned(),
            read_only: disk.read_only,
            nvram: disk.nvram,
            cdrom: disk.cdrom,
            shared_storage: disk.shared_storage.clone().unwrap_or_default(),
            format: disk.format.as_str().to_owned(),
            is_there: false,
        });
        Self {
            name: definition.name.to_string(),
            memory_bytes: definition.memory.0,
            vcpus: definition.vcpus,
            machine: definition.machine.clone(),
            cpu_model: definition.cpu_model.clone(),
            firmware: definition.firmware.as_ref().map(image),
            kernel: definition.kernel.as_ref().map(image),
            initrd: definition.initrd.as_ref().map(image),
            kernel_arguments: definition.kernel_arguments.clone(),
            nics: nics.collect(),
            disks: disks.collect(),
            profile: definition.profile.clone().unwrap_or_default(),
            promised_network_bits_per_sec: definition.promised_network.0,
            promised_disk_bytes_per_sec: definition.promised_disk.0,
            forbid_post_copy: definition.forbid_post_copy,
            forbid_intermediaries: definition.forbid_intermediaries,
            forbid_throttling: definition.forbid_throttling,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_definition_survives_the_wire() {
        let raw = Raw {
            name: "db".to_owned(),
            memory: 192 << 20,
            vcpus: 2,
            machine: "pc-q35-7.2".to_owned(),
            cpu_model: "qemu64,+ssse3".to_owned(),
            firmware: Some(("OVMF_CODE.fd".to_owned(), String::new())),
            kernel: Some(("vmlinuz".to_owned(), "0123456789abcdef".to_owned())),
            initrd: Some(("initrd".to_owned(), String::new())),
            nics: vec![RawNic {
                mac: "52:54:00:00:00:01".to_owned(),
                bridge: "br0".to_owned(),
                ..RawNic::default()
            }],
            disks: vec![
                RawDisk {
                    path: "/nfs/a".to_owned(),
                    format: "qcow2".to_owned(),
                    nvram: true,
                    shared_storage: "nfs".to_owned(),
                    ..RawDisk::default()
                },
                RawDisk {
                    path: "a.iso".to_owned(),
                    format: "raw".to_owned(),
                    cdrom: true,
                    ..RawDisk::default()
                },
            ],
            profile: "fast".to_owned(),
            forbid_throttling: true,
            ..Raw::default()
        };
        let definition = raw.check().unwrap();
        let message = agent::VmDefinition::from(&definition);
        assert_eq!(Definition::try_from(message).unwrap(), definition);
    }

    #[test]
    fn an_empty_message_is_refused_by_its_name() {
        let error = Definition::try_from(agent::VmDefinition::default()).unwrap_err();
        assert_eq!(error.key, "name");
    }
}
