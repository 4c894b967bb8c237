//! What a world's VM is, and what it keeps its data on: written for a host before its agent starts.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Agent, FRESH_NVRAM, PROFILE, START_LIMIT, STORAGE};
use crate::clock;
use crate::rig::RigError;
use crate::rig::program::{Running, words};
use crate::world::{Disk, HOSTS, NEIGHBOUR, VM, host_name};

const DISK_BYTES: u64 = 64 << 20;
/// Not a whole number of the blocks that are sent: its last one is short.
const CD_BYTES: u64 = (4 << 20) + 2048;
/// What the guest writes of a local disk, again and again.
const WRITTEN_BYTES: u64 = 8 << 20;
/// The image of a VM's second disk.
const SECOND: &str = "disk-2";

impl Agent {
    fn make_disk(&self, disk: Disk) -> std::io::Result<String> {
        let (file, path, format, key) = match disk {
            Disk::None => return Ok(String::new()),
            Disk::Raw | Disk::Busy(_) => (self.disk(), "disk".to_owned(), "raw", String::new()),
            Disk::Two { apart } => {
                (self.disk(), "disk".to_owned(), "raw", self.make_second(apart)?)
            }
            Disk::Cd => (self.disk(), "disk".to_owned(), "raw", self.make_cd()?),
            Disk::Overlay | Disk::Lazy => (self.disk(), "disk".to_owned(), "qcow2", String::new()),
            Disk::Firmware => (self.disk(), "disk".to_owned(), "raw", "nvram = true\n".to_owned()),
            Disk::Shared => {
                let file = self.shared().join("disk.raw");
                let key = format!("shared_storage = \"{STORAGE}\"\n");
                (file.clone(), file.display().to_string(), "raw", key)
            }
        };
        match disk {
            Disk::Overlay => self.make_overlay(&file)?,
            Disk::Lazy => make_lazy(&file)?,
            Disk::Busy(busy) => File::create(&file)?.set_len(busy.image)?,
            Disk::Firmware => drop(fs::copy(FRESH_NVRAM, &file)?),
            _ => File::create(&file)?.set_len(DISK_BYTES)?,
        }
        open_to_qemu(&file)?;
        Ok(format!("[[disk]]\npath = \"{path}\"\nformat = \"{format}\"\n{key}"))
    }

    /// Its part of the definition, which follows the disk's.
    fn make_cd(&self) -> std::io::Result<String> {
        let content: Vec<u8> = (0..CD_BYTES).map(|at| (at.wrapping_mul(at) >> 11) as u8).collect();
        fs::write(self.cd(), content)?;
        Ok("[[disk]]\npath = \"cd.iso\"\nformat = \"raw\"\ncdrom = true\n".to_owned())
    }

    /// As [`Self::make_cd`].
    fn make_second(&self, apart: bool) -> std::io::Result<String> {
        let file = self.second_disk(apart);
        File::create(&file)?.set_len(DISK_BYTES)?;
        open_to_qemu(&file)?;
        let path = match apart {
            true => self.apart().join(SECOND).display().to_string(),
            false => SECOND.to_owned(),
        };
        Ok(format!("[[disk]]\npath = \"{path}\"\nformat = \"raw\"\n"))
    }

    /// On a base of which every host has its own copy at the same place beside its disks.
    fn make_overlay(&self, file: &Path) -> std::io::Result<()> {
        let folders = (0..HOSTS).map(|host| self.folder.with_file_name(host_name(host)));
        for folder in folders {
            File::create(folder.join("base.raw"))?.set_len(DISK_BYTES)?;
        }
        let overlay = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "../base.raw"];
        qemu_img(Command::new("qemu-img").args(overlay).arg(file))
    }

    /// Where the VM's second disk is on this host, in the directory of the first or in one of its own.
    #[must_use]
    pub fn second_disk(&self, apart: bool) -> PathBuf {
        self.folder.join(if apart { "more" } else { "disks" }).join(SECOND)
    }

    /// What this host calls its second directory for disks: the same on every host.
    fn apart(&self) -> PathBuf {
        self.folder.with_file_name("more")
    }

    /// Gives the host a second directory for disks, which has the same path on every host. Hosts share their
    /// mounts otherwise, and so the path would be one directory.
    pub(in crate::world) fn give_second_room(&mut self) -> Result<(), RigError> {
        let cannot = || RigError::io("cannot make a second directory for disks");
        let (own, log) = (self.folder.join("more"), self.folder.join("mounts.log"));
        for folder in [&own, &self.apart()] {
            fs::create_dir_all(folder).map_err(cannot())?;
        }
        // It keeps the namespace. (To bind that to a file fails now and then with Linux 6.18.)
        let mut command = words("unshare --mount --propagation private sh -c");
        command.arg("mount --bind \"$0\" \"$1\" && echo mounted && exec sleep infinity");
        let keeper = Running::start(command.arg(own).arg(self.apart()), &log)?;
        let mounted = || fs::read_to_string(&log).is_ok_and(|said| said.contains("mounted"));
        let mounted = clock::wait_for(START_LIMIT, || mounted().then_some(()));
        mounted.ok_or_else(|| cannot()(ErrorKind::TimedOut.into()))?;
        let second = format!("/disks\", \"{}\"]", self.apart().display());
        self.configure(|text| text.replace("/disks\"]", &second))?;
        self.mounts = Some(keeper);
        Ok(())
    }

    /// Has the host, from its agent's next start on, show its certificate of this directory to its peers, and ask
    /// them for theirs.
    ///
    /// # Errors
    /// When its configuration cannot be written.
    pub fn show_certificate(&self, folder: &Path) -> Result<(), RigError> {
        let own = folder.join(format!("agent-{}", host_name(self.host)));
        let is_other = |line: &&str| !line.starts_with("tls_dir = ");
        self.configure(|text| {
            let others: Vec<&str> = text.lines().filter(is_other).collect();
            format!("tls_dir = \"{}\"\n{}\n", own.display(), others.join("\n"))
        })
    }

    /// Defines the VM here, started with the host.
    pub(in crate::world) fn define_vm(&self, disk: Disk) -> Result<(), RigError> {
        let writes = match disk {
            Disk::Raw | Disk::Overlay | Disk::Shared => written(""),
            Disk::Lazy => written(" lb.disk_trim=1MiB"),
            Disk::Two { .. } => written(" lb.disks=2 lb.disk_trim=1MiB"),
            Disk::Cd => written(" lb.cd=1"),
            Disk::Busy(busy) => format!(
                " lb.disk={} lb.disk_block={} lb.disk_rate={} lb.disk_check={}",
                busy.image,
                busy.block,
                busy.rate / busy.block,
                busy.check_percent
            ),
            Disk::None | Disk::Firmware => String::new(),
        };
        // With less OVMF runs into a page fault of its own.
        let (memory, firmware) = match disk {
            Disk::Firmware => (256, "firmware = \"OVMF_CODE_4M.fd\"\n"),
            _ => (128, ""),
        };
        let promised = if let Disk::Busy(busy) = disk { busy.promised } else { 0 };
        let disk = self.make_disk(disk).map_err(RigError::io("cannot make a VM's disk"))?;
        let promised = match promised {
            0 => String::new(),
            bytes => format!("promised_disk = \"{bytes} B\"\n"),
        };
        let keys = format!("profile = \"{PROFILE}\"\n{firmware}{promised}");
        self.define(VM, memory, &writes, &format!("{keys}{disk}"))
    }

    /// Defines a second VM here, started with the host, which has a disk of its own and nobody who watches it.
    pub(in crate::world) fn define_neighbour(&self) -> Result<(), RigError> {
        let cannot = || RigError::io("cannot make the neighbour's disk");
        let file = self.disk().with_file_name(NEIGHBOUR);
        File::create(&file).and_then(|file| file.set_len(DISK_BYTES)).map_err(cannot())?;
        open_to_qemu(&file).map_err(cannot())?;
        let disk = format!("[[disk]]\npath = \"{NEIGHBOUR}\"\nformat = \"raw\"\n");
        self.define(NEIGHBOUR, 128, &written(""), &disk)
    }

    fn define(&self, vm: &str, memory: u32, writes: &str, keys: &str) -> Result<(), RigError> {
        let definition = format!(
            "name = \"{vm}\"\nmemory = \"{memory} MiB\"\nvcpus = 1\nmachine = \"pc-i440fx-7.2\"\n\
             cpu_model = \"max\"\nkernel = \"vmlinuz\"\ninitrd = \"initrd\"\n\
             kernel_arguments = \"console=ttyS0 quiet panic=-1 nokaslr tsc=unstable no_timer_check \
             mitigations=off lb.name={vm} lb.role=idle lb.region={} lb.dirty=100 lb.check=500{writes}\"\n\
             autostart = true\n{keys}",
            24 << 20
        );
        fs::write(self.folder.join(format!("vms/{vm}.toml")), definition)
            .map_err(RigError::io("cannot write a VM's definition"))
    }
}

fn written(more: &str) -> String {
    format!(" lb.disk={WRITTEN_BYTES} lb.disk_rate=300{more}")
}

/// QEMU's user is not ours.
fn open_to_qemu(file: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(file, fs::Permissions::from_mode(0o666))
}

/// In qcow2, whose counts of references are written late, with a bitmap that is kept in it.
fn make_lazy(file: &Path) -> std::io::Result<()> {
    let create = ["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on"];
    qemu_img(Command::new("qemu-img").args(create).arg(file).arg(DISK_BYTES.to_string()))?;
    qemu_img(
        Command::new("qemu-img").args(["bitmap", "--add", "-f", "qcow2"]).arg(file).arg("kept"),
    )
}

fn qemu_img(command: &mut Command) -> std::io::Result<()> {
    if command.status()?.success() { Ok(()) } else { Err(ErrorKind::InvalidData.into()) }
}
