//! The command line of a QEMU, from a checked VM. Pure; used by `vms/`.
//!
//! Everything that decides what the guest sees is stated: nothing is left to QEMU's defaults,
//! which differ between versions, and devices stand at fixed PCI addresses, because the source's
//! and the destination's QEMU must be the same machine down to the slot.
//!
//! Two kinds of values reach QEMU: whole arguments (`-append TEXT`), which it takes as they are,
//! and options (`-netdev tap,ifname=X`), where a comma would begin the next option. The latter are
//! built by [`Options`] alone, which doubles commas.
//!
//! Memory is plain `-m`: its block is called `pc.ram` in the migration stream of every version,
//! and it is found by its size in the process's mappings (`ram`).
//!
//! Which user QEMU runs as is not here: it is that user from its first instruction (`process`).

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use lifeboat_protocol::units::Bytes;

use super::qcow2::Backing;
use super::run_dir::RunDir;
use super::swap::backing_node;

/// First PCI slot of the disks and of the NICs; 8 slots each. Lower slots belong to the chipset.
const DISK_SLOT_FIRST: usize = 0x08;
const NIC_SLOT_FIRST: usize = 0x10;
/// Disks, and NICs, that a VM may have.
pub const DEVICES_MAX: usize = 8;
/// CD drives among the disks: each is alone on its IDE bus, and every machine type has so many.
pub const CD_DRIVES_MAX: usize = 2;

/// How QEMU runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// By the CPU itself.
    Kvm,
    /// In emulation.
    Tcg,
}

impl Accelerator {
    /// As QEMU and the protocol spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What the new QEMU waits for. In both cases its guest stands until `cont`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// The guest boots at `cont`.
    Boot,
    /// The guest's state arrives by `migrate-incoming` first.
    Incoming,
}

/// A NIC, and the tap that it is plugged into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicSpec {
    /// `52:54:00:12:34:56`.
    pub mac: String,
    /// Its tap, as QEMU inherits it: an open descriptor (`tap`).
    pub tap: i32,
    /// Told to the guest; `None` leaves it to the guest.
    pub mtu: Option<u32>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// The image.
    pub path: PathBuf,
    /// Where it is opened instead, as after a swap onto the mount (`swap`): not all of it is here.
    pub mounted: Option<PathBuf>,
    /// `raw` or `qcow2`.
    pub format: &'static str,
    /// The guest cannot write to it.
    pub read_only: bool,
    /// It is the second flash of the machine, which its firmware writes to, and no disk.
    pub nvram: bool,
    /// It is the CD in a drive of its own.
    pub cdrom: bool,
    /// What it is an overlay of.
    pub backing: Option<Backing>,
}

/// All that a command line depends on. Its values are checked before they come here (`vms/`);
/// the escaping does not rely on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchSpec {
    /// The VM's name.
    pub name: String,
    /// Memory; whole MiB.
    pub memory: Bytes,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Machine type with its version.
    pub machine: String,
    /// Model, perhaps with features: `qemu64,+ssse3`.
    pub cpu_model: String,
    /// How instructions are run.
    pub accelerator: Accelerator,
    /// What is in the machine's first flash; without one, QEMU's own BIOS.
    pub firmware: Option<PathBuf>,
    /// Linux kernel to boot; without one, the first disk boots.
    pub kernel: Option<PathBuf>,
    /// Its initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub kernel_arguments: String,
    /// In the order of their slots.
    pub nics: Vec<NicSpec>,
    /// In the order of their slots.
    pub disks: Vec<DiskSpec>,
    /// Extra arguments of a root-owned profile.
    pub profile_arguments: Vec<String>,
    /// What it waits for.
    pub begin: Begin,
}

/// The guest's RAM as QEMU is told it. Under TCG it is 8 KiB more than the definition says, on
/// both sides of a migration: QEMU before 9.0 takes a short cut through its dirty bitmap when RAM
/// is a multiple of 256 KiB, and with TCG that loses writes, so that a migrated guest is corrupt
/// (docs/decisions/0006-tcg-ram-size.md).
#[must_use]
pub fn ram(spec: &LaunchSpec) -> Bytes {
    ram_under(spec.accelerator, spec.memory)
}

/// See [`ram`].
#[must_use]
pub fn ram_under(accelerator: Accelerator, memory: Bytes) -> Bytes {
    match accelerator {
        Accelerator::Kvm => memory,
        Accelerator::Tcg => memory + Bytes(8 << 10),
    }
}

/// The arguments for QEMU, the program's own name left out.
#[must_use]
pub fn command_line(spec: &LaunchSpec, run_dir: &RunDir) -> Vec<OsString> {
    let mut line = CommandLine::default();
    line.flag("-nodefaults").flag("-no-user-config").flag("-no-shutdown").flag("-S");
    line.options("-name", Options::new().set("guest", &spec.name));
    line.options("-sandbox", sandbox());
    line.options("-machine", machine(spec));
    line.options("-accel", Options::first(spec.accelerator.as_str()));
    // A model's features are options of their own: its commas are meant.
    line.pair("-cpu", &spec.cpu_model);
    line.options("-m", Options::new().set("size", format!("{}K", ram(spec).0 >> 10)));
    line.options("-smp", Options::new().set("cpus", spec.vcpus.to_string()));
    line.pair("-display", "none");
    firmware(&mut line, spec);
    boot(&mut line, spec);
    for (index, disk) in spec.disks.iter().enumerate() {
        disk_nodes(&mut line, index, disk);
        if !disk.nvram {
            line.options("-device", disk_device(index, &spec.disks));
        }
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        nic_arguments(&mut line, index, nic);
    }
    consoles(&mut line, run_dir);
    line.pair("-pidfile", run_dir.pid_file());
    if spec.begin == Begin::Incoming {
        line.pair("-incoming", "defer");
    }
    line.0.extend(spec.profile_arguments.iter().map(OsString::from));
    line.0
}

/// QEMU gives up what it never needs once it runs: new programs, other identities, its limits.
fn sandbox() -> Options {
    let denied = ["obsolete", "elevateprivileges", "spawn", "resourcecontrol"];
    denied.iter().fold(Options::first("on"), |options, what| options.set(what, "deny"))
}

/// The machine, and what is in its flash.
fn machine(spec: &LaunchSpec) -> Options {
    let machine = Options::first(&spec.machine);
    let machine = match spec.firmware {
        Some(_) => machine.set("pflash0", "firmware"),
        None => machine,
    };
    match spec.disks.iter().position(|disk| disk.nvram) {
        Some(index) => machine.set("pflash1", format!("disk{index}")),
        None => machine,
    }
}

fn firmware(line: &mut CommandLine, spec: &LaunchSpec) {
    if let Some(path) = &spec.firmware {
        read_only_node(line, "firmware", "raw", path);
    }
}

/// An image of the format `driver` that nobody writes to, as the node `name`.
fn read_only_node(line: &mut CommandLine, name: &str, driver: &str, path: &Path) {
    let file = format!("{name}-file");
    let options = Options::new()
        .set("driver", "file")
        .set("node-name", &file)
        .set_path("filename", path)
        .set("read-only", "on");
    line.options("-blockdev", options);
    let options = Options::new()
        .set("driver", driver)
        .set("node-name", name)
        .set("file", file)
        .set("read-only", "on");
    line.options("-blockdev", options);
}

fn boot(line: &mut CommandLine, spec: &LaunchSpec) {
    let Some(kernel) = &spec.kernel else { return };
    line.pair("-kernel", kernel);
    if let Some(initrd) = &spec.initrd {
        line.pair("-initrd", initrd);
    }
    if !spec.kernel_arguments.is_empty() {
        line.pair("-append", &spec.kernel_arguments);
    }
}

/// What becomes of a guest's discards: the image gives the room back, and it need not be sent. On both nodes
/// of a disk, or QEMU ignores them.
pub(super) const DISCARD: &str = "unmap";

fn disk_nodes(line: &mut CommandLine, index: usize, disk: &DiskSpec) {
    let on_off = |on| if on { "on" } else { "off" };
    let discards = |options: Options| match disk.read_only {
        true => options,
        false => options.set("discard", DISCARD),
    };
    let (node, path) = match &disk.mounted {
        Some(path) => (format!("mount{index}"), path),
        None => (format!("file{index}"), &disk.path),
    };
    let file = Options::new()
        .set("driver", "file")
        .set("node-name", &node)
        .set_path("filename", path)
        .set("read-only", on_off(disk.read_only));
    line.options("-blockdev", discards(file));
    let format = Options::new()
        .set("driver", disk.format)
        .set("node-name", format!("disk{index}"))
        .set("file", node)
        .set("read-only", on_off(disk.read_only));
    let format = discards(format);
    let format = match &disk.backing {
        Some(backing) => {
            // A node with a name: a swap of the overlay has to name it. What is beneath it in turn,
            // QEMU opens by itself.
            let node = backing_node(index);
            read_only_node(line, &node, &backing.format, &backing.path);
            format.set("backing", node)
        }
        None => format,
    };
    line.options("-blockdev", format);
}

/// What the guest sees of a disk.
fn disk_device(index: usize, disks: &[DiskSpec]) -> Options {
    let node = format!("disk{index}");
    if disks[index].cdrom {
        // A guest that cannot read a CD is told so, as by a real drive.
        let bus = disks[..index].iter().filter(|disk| disk.cdrom).count();
        return Options::first("ide-cd")
            .set("id", format!("cd{index}"))
            .set("drive", node)
            .set("bus", format!("ide.{bus}"))
            .set("unit", "0");
    }
    // `werror=stop`: a guest that meets a broken disk waits for it rather than lose a write.
    Options::first("virtio-blk-pci")
        .set("id", format!("vd{index}"))
        .set("drive", node)
        .set("addr", format!("{:#x}", DISK_SLOT_FIRST + index))
        .set("werror", "stop")
        .set("rerror", "stop")
}

/// Offloads are off, for the tap was opened without their header: with them a guest leaves its
/// checksums to the tap, and OVS' userspace datapath passes such frames on unfinished. They are part
/// of what the guest was told and so must be the same wherever it runs, whichever datapath is there.
fn nic_arguments(line: &mut CommandLine, index: usize, nic: &NicSpec) {
    let tap = Options::first("tap").set("id", format!("net{index}")).set("fd", nic.tap.to_string());
    line.options("-netdev", tap);
    // No boot ROM: its size differs between packages, and it travels in the stream.
    let device = Options::first("virtio-net-pci")
        .set("id", format!("nic{index}"))
        .set("netdev", format!("net{index}"))
        .set("mac", &nic.mac)
        .set("addr", format!("{:#x}", NIC_SLOT_FIRST + index))
        .set("romfile", "");
    let device = match nic.mtu {
        Some(mtu) => device.set("host_mtu", mtu.to_string()),
        None => device,
    };
    line.options("-device", device);
}

/// The monitor, a second one for `rescue`, and the serial line: a socket for a person, and a log that
/// misses nothing.
fn consoles(line: &mut CommandLine, run_dir: &RunDir) {
    let socket = |id: &str, path: &Path| {
        Options::first("socket")
            .set("id", id)
            .set_path("path", path)
            .set("server", "on")
            .set("wait", "off")
    };
    line.options("-chardev", socket("monitor", &run_dir.qmp_socket()));
    line.options("-mon", Options::new().set("chardev", "monitor").set("mode", "control"));
    let serial = socket("serial0", &run_dir.serial_socket())
        .set_path("logfile", &run_dir.serial_log())
        .set("logappend", "on");
    line.options("-chardev", serial);
    line.pair("-serial", "chardev:serial0");
    line.options("-chardev", socket("rescue", &run_dir.rescue_socket()));
    line.options("-mon", Options::new().set("chardev", "rescue").set("mode", "control"));
}

/// A growing list of arguments.
#[derive(Default)]
struct CommandLine(Vec<OsString>);

impl CommandLine {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.into());
        self
    }

    /// A value that QEMU takes whole.
    fn pair(&mut self, name: &str, value: impl Into<OsString>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }

    fn options(&mut self, name: &str, options: Options) {
        self.pair(name, options.0);
    }
}

/// The options of one argument: `first,key=value,...`, commas in values doubled.
struct Options(OsString);

impl Options {
    fn new() -> Self {
        Self(OsString::new())
    }

    fn first(value: &str) -> Self {
        Self(escaped(value).into())
    }

    fn set(self, key: &str, value: impl AsRef<str>) -> Self {
        self.set_path(key, Path::new(value.as_ref()))
    }

    fn set_path(mut self, key: &str, value: &Path) -> Self {
        use std::os::unix::ffi::{OsStrExt, OsStringExt};
        if !self.0.is_empty() {
            self.0.push(",");
        }
        self.0.push(key);
        self.0.push("=");
        let mut bytes = vec![];
        for &byte in value.as_os_str().as_bytes() {
            bytes.push(byte);
            if byte == b',' {
                bytes.push(byte);
            }
        }
        self.0.push(OsString::from_vec(bytes));
        self
    }
}

fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> LaunchSpec {
        LaunchSpec {
            name: "web-1".to_owned(),
            memory: Bytes::from_mib(256),
            vcpus: 2,
            machine: "pc-i440fx-7.2".to_owned(),
            cpu_model: "qemu64,+ssse3".to_owned(),
            accelerator: Accelerator::Tcg,
            firmware: None,
            kernel: Some("/images/vmlinuz".into()),
            initrd: Some("/images/initrd".into()),
            kernel_arguments: "console=ttyS0 a=b,c".to_owned(),
            nics: vec![NicSpec { mac: "52:54:00:00:00:01".to_owned(), tap: 30, mtu: None }],
            disks: vec![],
            profile_arguments: vec![],
            begin: Begin::Boot,
        }
    }

    fn words(spec: &LaunchSpec) -> Vec<String> {
        let line = command_line(spec, &RunDir::new(Path::new("/run/lb"), "web-1"));
        line.into_iter().map(|word| word.into_string().unwrap()).collect()
    }

    fn after<'a>(words: &'a [String], name: &str) -> Vec<&'a str> {
        let pairs = words.windows(2).filter(|pair| pair[0] == name);
        pairs.map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn the_machine_is_stated_whole() {
        let words = words(&spec());
        assert_eq!(after(&words, "-machine"), ["pc-i440fx-7.2"]);
        assert_eq!(after(&words, "-m"), ["size=262152K"]);
        assert_eq!(after(&words, "-smp"), ["cpus=2"]);
        assert_eq!(after(&words, "-cpu"), ["qemu64,+ssse3"]);
        assert_eq!(after(&words, "-append"), ["console=ttyS0 a=b,c"]);
        assert_eq!(
            after(&words, "-sandbox"),
            ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
        );
        for flag in ["-nodefaults", "-S", "-no-shutdown", "-no-user-config"] {
            assert!(words.iter().any(|word| word == flag), "{flag}");
        }
    }

    #[test]
    fn nics_stand_at_fixed_addresses_in_their_order() {
        let mut two = spec();
        two.nics.push(NicSpec { mac: "m2".to_owned(), tap: 31, mtu: Some(1400) });
        let words = words(&two);
        assert_eq!(
            after(&words, "-device"),
            [
                "virtio-net-pci,id=nic0,netdev=net0,mac=52:54:00:00:00:01,addr=0x10,romfile=",
                "virtio-net-pci,id=nic1,netdev=net1,mac=m2,addr=0x11,romfile=,host_mtu=1400"
            ]
        );
        assert_eq!(after(&words, "-netdev"), ["tap,id=net0,fd=30", "tap,id=net1,fd=31"]);
    }

    #[test]
    fn no_value_can_begin_another_option() {
        let mut evil = spec();
        evil.name = "a,debug-threads=on".to_owned();
        evil.machine = "pc,dump-guest-core=on".to_owned();
        evil.nics[0].mac = "x,romfile=/etc/shadow".to_owned();
        let path = "/d/a,b=c".into();
        evil.disks.push(DiskSpec {
            path,
            mounted: None,
            format: "raw",
            read_only: true,
            nvram: false,
            cdrom: false,
            backing: None,
        });
        let words = words(&evil);
        assert_eq!(after(&words, "-name"), ["guest=a,,debug-threads=on"]);
        assert_eq!(after(&words, "-machine"), ["pc,,dump-guest-core=on"]);
        assert!(after(&words, "-device")[1].contains("mac=x,,romfile=/etc/shadow,addr"));
        assert_eq!(
            after(&words, "-blockdev")[0],
            "driver=file,node-name=file0,filename=/d/a,,b=c,read-only=on"
        );
    }

    #[test]
    fn what_an_overlay_lies_on_is_a_node_of_its_own() {
        let mut with_disk = spec();
        let name = "base".to_owned();
        let backing = Some(Backing { name, path: "/d/base".into(), format: "raw".to_owned() });
        let path = "/d/over".into();
        with_disk.disks.push(DiskSpec {
            path,
            mounted: None,
            format: "qcow2",
            read_only: false,
            nvram: false,
            cdrom: false,
            backing,
        });
        let words = words(&with_disk);
        let nodes = after(&words, "-blockdev");
        assert_eq!(
            nodes[1..],
            [
                "driver=file,node-name=backing0-file,filename=/d/base,read-only=on",
                "driver=raw,node-name=backing0,file=backing0-file,read-only=on",
                "driver=qcow2,node-name=disk0,file=file0,read-only=off,discard=unmap,backing=backing0"
            ]
        );
    }

    #[test]
    fn firmware_and_what_it_writes_are_flash_and_no_disks() {
        let mut with_flash = spec();
        with_flash.firmware = Some("/images/OVMF_CODE.fd".into());
        let (path, backing) = ("/d/vars".into(), None);
        let (mounted, format, read_only, cdrom) = (None, "raw", false, false);
        let nvram = DiskSpec { path, mounted, format, read_only, nvram: true, cdrom, backing };
        with_flash.disks.push(nvram);
        let words = words(&with_flash);
        assert_eq!(after(&words, "-machine"), ["pc-i440fx-7.2,pflash0=firmware,pflash1=disk0"]);
        assert!(after(&words, "-device").iter().all(|device| !device.contains("virtio-blk")));
        assert_eq!(
            after(&words, "-blockdev"),
            [
                "driver=file,node-name=firmware-file,filename=/images/OVMF_CODE.fd,read-only=on",
                "driver=raw,node-name=firmware,file=firmware-file,read-only=on",
                "driver=file,node-name=file0,filename=/d/vars,read-only=off,discard=unmap",
                "driver=raw,node-name=disk0,file=file0,read-only=off,discard=unmap"
            ]
        );
    }

    #[test]
    fn each_cd_is_alone_on_a_bus_and_takes_no_slot_of_a_disk() {
        let disk = |path: &str, cdrom: bool| DiskSpec {
            mounted: None,
            path: path.into(),
            format: "raw",
            read_only: cdrom,
            nvram: false,
            cdrom,
            backing: None,
        };
        let mut with_cds = spec();
        with_cds.nics.clear();
        with_cds.disks = vec![disk("/d/a.iso", true), disk("/d/b", false), disk("/d/c.iso", true)];
        let words = words(&with_cds);
        assert_eq!(
            after(&words, "-device"),
            [
                "ide-cd,id=cd0,drive=disk0,bus=ide.0,unit=0",
                "virtio-blk-pci,id=vd1,drive=disk1,addr=0x9,werror=stop,rerror=stop",
                "ide-cd,id=cd2,drive=disk2,bus=ide.1,unit=0"
            ]
        );
        assert_eq!(
            after(&words, "-blockdev")[..2],
            [
                "driver=file,node-name=file0,filename=/d/a.iso,read-only=on",
                "driver=raw,node-name=disk0,file=file0,read-only=on"
            ]
        );
    }

    #[test]
    fn an_incoming_vm_differs_from_a_booting_one_by_that_alone() {
        let boot = words(&spec());
        let mut incoming = spec();
        incoming.begin = Begin::Incoming;
        let incoming = words(&incoming);
        assert_eq!(incoming[..boot.len()], boot[..]);
        assert_eq!(incoming[boot.len()..], ["-incoming", "defer"]);
    }

    #[test]
    fn the_serial_line_is_logged_and_can_be_watched() {
        let words = words(&spec());
        let chardevs = after(&words, "-chardev");
        assert_eq!(
            chardevs[1],
            "socket,id=serial0,path=/run/lb/web-1/io/serial.sock,server=on,wait=off,\
             logfile=/run/lb/web-1/io/serial.log,logappend=on"
        );
        assert_eq!(after(&words, "-pidfile"), ["/run/lb/web-1/io/pid"]);
    }
}
