//! Tests of `definition`: what passes its checks, and above all what does not.

use super::*;
use proptest::prelude::*;

fn raw() -> Raw {
    Raw {
        name: "web-1".to_owned(),
        memory: 256 << 20,
        vcpus: 1,
        machine: "pc-i440fx-7.2".to_owned(),
        cpu_model: "qemu64".to_owned(),
        kernel: Some(("vmlinuz-6.1.0-56-cloud-amd64".to_owned(), "00ff00ff00ff00ff".to_owned())),
        kernel_arguments: "console=ttyS0".to_owned(),
        nics: vec![RawNic {
            mac: "52:54:00:AA:00:01".to_owned(),
            bridge: "br0".to_owned(),
            vlan_tag: 10,
            mtu: 1500,
        }],
        ..Raw::default()
    }
}

fn disk(storage: &str, read_only: bool) -> RawDisk {
    RawDisk {
        path: "/srv/disks/a.raw".to_owned(),
        format: "raw".to_owned(),
        read_only,
        nvram: false,
        cdrom: false,
        shared_storage: storage.to_owned(),
    }
}

#[test]
fn a_plain_definition_passes() {
    let definition = raw().check().unwrap();
    assert_eq!(definition.nics[0].mac, "52:54:00:aa:00:01");
    assert_eq!(definition.nics[0].vlan_tag, Some(10));
    assert_eq!(definition.kernel.unwrap().digest, Some(0x00ff_00ff_00ff_00ff));
}

#[test]
fn what_does_not_pass_names_its_key() {
    type Spoil = fn(&mut Raw);
    let cases: &[(&str, Spoil)] = &[
        ("name", |r| r.name = "../web".to_owned()),
        ("name", |r| r.name = String::new()),
        ("memory", |r| r.memory = (256 << 20) + 1),
        ("memory", |r| r.memory = 0),
        ("memory", |r| r.memory = u64::MAX << 20),
        ("vcpus", |r| r.vcpus = 0),
        ("vcpus", |r| r.vcpus = 4096),
        ("machine", |r| r.machine = "pc".to_owned()),
        ("machine", |r| r.machine = "pc-i440fx-".to_owned()),
        ("machine", |r| r.machine = "pc-q35-7.2,dump-guest-core=on".to_owned()),
        ("machine", |r| r.machine = "microvm".to_owned()),
        ("cpu_model", |r| r.cpu_model = String::new()),
        ("cpu_model", |r| r.cpu_model = "-cpu".to_owned()),
        ("cpu_model", |r| r.cpu_model = "qemu64,vendor=Evil".to_owned()),
        ("cpu_model", |r| r.cpu_model = "qemu64,,x".to_owned()),
        ("kernel", |r| r.kernel = Some(("/etc/shadow".to_owned(), String::new()))),
        ("kernel", |r| r.kernel = Some(("..".to_owned(), String::new()))),
        ("kernel", |r| r.kernel = Some(("vmlinuz".to_owned(), "12".to_owned()))),
        ("kernel", |r| r.kernel = Some(("vmlinuz".to_owned(), "+12345678901234f".to_owned()))),
        ("initrd", |r| {
            r.kernel = None;
            r.initrd = Some(("initrd".to_owned(), String::new()));
        }),
        ("disk[0].nvram", |r| r.disks.push(RawDisk { nvram: true, ..disk("", false) })),
        ("disk[0].nvram", |r| {
            r.firmware = Some(("OVMF_CODE.fd".to_owned(), String::new()));
            r.disks.push(RawDisk { nvram: true, ..disk("", true) });
        }),
        ("disk[1].nvram", |r| {
            r.firmware = Some(("OVMF_CODE.fd".to_owned(), String::new()));
            let nvram = || RawDisk { nvram: true, ..disk("", false) };
            r.disks.extend([disk("", false), nvram(), nvram()]);
        }),
        ("kernel_arguments", |r| r.kernel = None),
        ("kernel_arguments", |r| r.kernel_arguments = "a\nb".to_owned()),
        ("kernel_arguments", |r| r.kernel_arguments = "x".repeat(2048)),
        ("nic[0].mac", |r| r.nics[0].mac = "01:00:5e:00:00:01".to_owned()),
        ("nic[0].mac", |r| r.nics[0].mac = "52:54:00:00:01".to_owned()),
        ("nic[0].mac", |r| r.nics[0].mac = "52:54:00:00:00:+1".to_owned()),
        ("nic[1].mac", |r| r.nics.push(r.nics[0].clone())),
        ("nic[0].bridge", |r| r.nics[0].bridge = "br0 -- del-br br0".to_owned()),
        ("nic[0].bridge", |r| r.nics[0].bridge = "--help".to_owned()),
        ("nic[0].vlan_tag", |r| r.nics[0].vlan_tag = 4095),
        ("nic[0].mtu", |r| r.nics[0].mtu = 68),
        ("nic", |r| r.nics = vec![RawNic::default(); 9]),
        ("disk[0].path", |r| {
            let path = "/srv/../etc/shadow".to_owned();
            r.disks.push(RawDisk { path, ..disk("", false) });
        }),
        ("disk[0].path", |r| {
            r.disks.push(RawDisk { path: "srv".to_owned(), ..disk("san", false) });
        }),
        ("disk[0].format", |r| {
            r.disks.push(RawDisk { format: "vvfat".to_owned(), ..disk("", false) });
        }),
        ("disk[0].shared_storage", |r| r.disks.push(disk("../x", false))),
        ("profile", |r| r.profile = "../../root".to_owned()),
    ];
    for (key, spoil) in cases {
        let mut spoiled = raw();
        spoil(&mut spoiled);
        let error = spoiled.clone().check().expect_err(&format!("{spoiled:?}"));
        assert_eq!(error.key, *key, "{error}");
    }
}

#[test]
fn a_local_disk_may_be_a_plain_name_and_nothing_between_that_and_a_path() {
    let with = |path: &str| {
        let mut raw = raw();
        raw.disks.push(RawDisk { path: path.to_owned(), ..disk("", false) });
        raw.check()
    };
    assert_eq!(with("data.qcow2").unwrap().disks[0].path, Path::new("data.qcow2"));
    for bad in ["", ".", "..", "a/b", "./a", "/a/../b", "a\n"] {
        assert!(with(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn nobody_writes_to_a_cd_and_there_is_a_drive_for_each() {
    let with = |cds: usize, nvram: bool| {
        let firmware = Some(("OVMF_CODE.fd".to_owned(), String::new()));
        let disks = vec![RawDisk { cdrom: true, nvram, ..disk("", false) }; cds];
        Raw { firmware, disks, ..raw() }.check()
    };
    let two = with(2, false).unwrap().disks;
    assert!(two.len() == 2 && two.iter().all(|cd| cd.cdrom && cd.read_only));
    assert_eq!(with(3, false).unwrap_err().key, "disk.cdrom");
    assert_eq!(with(1, true).unwrap_err().key, "disk[0].nvram");
}

#[test]
fn the_footprint_counts_what_qemu_needs_itself() {
    let definition = raw().check().unwrap();
    assert_eq!(definition.overhead(), Bytes::from_mib(64 + 32 + 4));
    assert_eq!(definition.footprint(), Bytes::from_mib(356));
}

proptest! {
    /// Whatever a peer writes into these, what passes can be put on a command line.
    #[test]
    fn nothing_that_passes_holds_a_separator(text in "[ -~]{0,20}") {
        let spoiled = Raw {
            machine: text.clone(),
            profile: text.clone(),
            nics: vec![RawNic { bridge: text.clone(), ..raw().nics[0].clone() }],
            ..raw()
        };
        if let Ok(definition) = spoiled.check() {
            let profile = definition.profile.unwrap_or_default();
            for value in [&definition.machine, &definition.nics[0].bridge, &profile] {
                prop_assert!(!value.contains([',', '/', ' ', '=', ';']), "{}", value);
            }
        }
    }
}
