//! Two hosts with a shaped link between them, and the guest that moves.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use lifeboat_agent::qemu::launch::{Accelerator, Begin, DiskSpec, LaunchSpec};
use lifeboat_protocol::units::Bytes;

use super::Case;
use crate::experiments::Setting;
use crate::experiments::twins::made;
use crate::rig::RigError;
use crate::rig::network::{self, Namespace};
use crate::rig::program::run;

pub(super) const NAMES: [&str; 2] = ["h1", "h2"];
pub(super) const ADDRESSES: [Ipv4Addr; 2] =
    [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)];
pub(super) const MEMORY: Bytes = Bytes::from_mib(128);
pub(super) const IMAGE_BYTES: u64 = 1 << 30;
pub(super) const QUICK_IMAGE_BYTES: u64 = 256 << 20;
/// One write of the guest.
pub(super) const BLOCK: u64 = 64 << 10;
/// What the link carries, headers included.
pub(super) const LINK_BITS: u64 = 480_000_000;
/// What both sides are told that they may send, bytes/s of content: full frames carry 1448 of 1514
/// bytes.
pub(super) const TOLD: u64 = LINK_BITS / 8 * 1448 / 1514;

const MACHINE: &str = "pc-i440fx-7.2";

/// The hosts.
pub(super) struct Hosts {
    pub(super) namespaces: [Namespace; 2],
    pub(super) folder: PathBuf,
    pub(super) images: PathBuf,
    pub(super) image: u64,
    /// Runs so far: each has folders of its own.
    runs: usize,
}

impl Hosts {
    pub(super) async fn raise(setting: &Setting<'_>, image: u64) -> Result<Self, RigError> {
        let folder = setting.folder.to_owned();
        // QEMUs run as somebody else, who has to pass through.
        open(&folder, 0o755)?;
        let namespaces = [Namespace::make(NAMES[0])?, Namespace::make(NAMES[1])?];
        let [here, there] = &namespaces;
        network::plug(here, ADDRESSES[0], there, "eth0")?;
        run(&mut there.command(&format!("ip address add {}/24 dev eth0", ADDRESSES[1])))?;
        run(&mut there.command("ethtool -K eth0 tx off"))?;
        for side in &namespaces {
            network::limit(side, "eth0", Some(LINK_BITS))?;
        }
        Ok(Self { namespaces, folder, images: setting.images.to_owned(), image, runs: 0 })
    }

    /// An empty folder for a run, short because sockets lie in it.
    pub(super) fn for_a_run(&mut self) -> Result<PathBuf, RigError> {
        self.runs += 1;
        made(&self.folder, &self.runs.to_string())
    }

    /// Makes an image that QEMU's user can write.
    pub(super) fn make_image(&self, path: &Path) -> Result<(), RigError> {
        let file = File::create_new(path).and_then(|file| file.set_len(self.image));
        file.map_err(RigError::io("cannot make an image"))?;
        open(path, 0o666)
    }

    fn kernel_arguments(&self, case: &Case) -> String {
        format!(
            "console=ttyS0 quiet panic=-1 nokaslr tsc=unstable no_timer_check mitigations=off lb.name=vm lb.role=idle \
             lb.region=24MiB lb.dirty=100 lb.check=500 lb.disk={} lb.disk_block={BLOCK} \
             lb.disk_rate={} lb.disk_check=25",
            self.image,
            case.wants / BLOCK
        )
    }

    /// The guest as an agent is told of it.
    pub(super) fn definition(&self, case: &Case) -> String {
        format!(
            "name = \"vm\"\nmemory = \"{} MiB\"\nvcpus = 1\nmachine = \"{MACHINE}\"\ncpu_model = \"max\"\n\
             kernel = \"vmlinuz\"\ninitrd = \"initrd\"\nkernel_arguments = \"{}\"\n\
             [[disk]]\npath = \"disk\"\nformat = \"raw\"\n",
            MEMORY.mib(),
            self.kernel_arguments(case)
        )
    }

    /// The same guest for QEMU alone.
    pub(super) fn spec(&self, case: &Case, image: &Path) -> LaunchSpec {
        LaunchSpec {
            name: "vm".to_owned(),
            memory: MEMORY,
            vcpus: 1,
            machine: MACHINE.to_owned(),
            cpu_model: "max".to_owned(),
            accelerator: Accelerator::Tcg,
            firmware: None,
            kernel: Some(self.images.join("vmlinuz")),
            initrd: Some(self.images.join("initrd")),
            kernel_arguments: self.kernel_arguments(case),
            nics: vec![],
            disks: vec![DiskSpec {
                mounted: None,
                path: image.to_owned(),
                format: "raw",
                read_only: false,
                nvram: false,
                cdrom: false,
                backing: None,
            }],
            profile_arguments: vec![],
            begin: Begin::Boot,
        }
    }
}

pub(super) fn open(path: &Path, mode: u32) -> Result<(), RigError> {
    let opened = fs::set_permissions(path, fs::Permissions::from_mode(mode));
    opened.map_err(RigError::io("cannot open a file to QEMU's user"))
}
