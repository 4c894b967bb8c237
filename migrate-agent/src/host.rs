//! What this host is: the facts of `DescribeHost`, and whether KVM may be used.
//!
//! Used by `main.rs` (once, at the start) and by the gRPC server. What stays the same until the
//! next boot or upgrade is gathered once ([`gather`]); what changes is asked when it is needed
//! ([`cpu_load`], [`bridge_mtu`]).
//!
//! Memory is not here: what is free is arithmetic over the VMs (`vms/`). Whether two hosts suit
//! each other is the controller's to judge.

pub mod proc;
mod qemu;
pub mod userfault;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Access, AtFlags, CWD, FileType};
use serde::Deserialize;

use crate::qemu::launch::Accelerator;
use crate::qemu::process::User;
use crate::qemu::qmp::QmpError;

pub use qemu::QemuFacts;

const KVM: &str = "/dev/kvm";

/// Why a fact about this host could not be had.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A file of the kernel cannot be read.
    #[error("cannot read {} of this host", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file of the kernel does not say what it should.
    #[error("{path} does not hold {wanted}")]
    Form {
        /// The file.
        path: &'static str,
        /// What was looked for.
        wanted: &'static str,
    },
    /// QEMU cannot be started.
    #[error(
        "cannot ask {} what it offers; is it installed, and may its user run it?",
        program.display()
    )]
    QemuStart {
        /// The program.
        program: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// QEMU started, and did not answer as QEMU does.
    #[error("{} was asked what it offers and {}", program.display(), quoted(.said))]
    QemuSilent {
        /// The program.
        program: PathBuf,
        /// Its standard error, shortened; empty when it said nothing.
        said: String,
        /// What became of the question.
        #[source]
        source: QmpError,
    },
    /// KVM is asked for, and cannot be had.
    #[error(
        "the configuration asks for KVM, and {KVM} {obstacle}; enable virtualisation and let \
         QEMU's group open it, or set `accelerator = \"tcg\"`"
    )]
    NoKvm {
        /// What is in the way.
        obstacle: KvmObstacle,
    },
}

fn quoted(text: &str) -> String {
    if text.is_empty() { "said nothing".to_owned() } else { format!("said: {text}") }
}

/// Why QEMU cannot use KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KvmObstacle {
    /// There is none.
    #[error("is not there")]
    Absent,
    /// The kernel, or a container, keeps even us from it.
    #[error("cannot be opened")]
    Closed,
    /// Its owner, group and mode do not let QEMU's user in.
    #[error("is not open to QEMU's user and group")]
    Forbidden,
}

/// How the operator wants guests' instructions to be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AcceleratorChoice {
    /// KVM where QEMU's user may open it, else emulation. Not right on a host that is itself a
    /// VM whose hypervisor offers KVM only in name: there a Linux guest may hang at boot, and
    /// `tcg` has to be said.
    #[default]
    Auto,
    /// KVM, or an error.
    Kvm,
    /// Emulation.
    Tcg,
}

impl AcceleratorChoice {
    /// What it comes to on this host, for a QEMU of `user`. Reads the mode of `/dev/kvm`; access
    /// lists beyond it are not seen.
    ///
    /// # Errors
    /// When KVM is asked for and cannot be had.
    pub fn resolve(self, user: User) -> Result<Accelerator, HostError> {
        match self {
            Self::Tcg => Ok(Accelerator::Tcg),
            choice => choice.decide(kvm_obstacle(Path::new(KVM), user)),
        }
    }

    fn decide(self, obstacle: Option<KvmObstacle>) -> Result<Accelerator, HostError> {
        match (self, obstacle) {
            (Self::Tcg, _) | (Self::Auto, Some(_)) => Ok(Accelerator::Tcg),
            (Self::Kvm | Self::Auto, None) => Ok(Accelerator::Kvm),
            (Self::Kvm, Some(obstacle)) => Err(HostError::NoKvm { obstacle }),
        }
    }
}

fn kvm_obstacle(device: &Path, user: User) -> Option<KvmObstacle> {
    let Ok(stat) = rustix::fs::stat(device) else { return Some(KvmObstacle::Absent) };
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice {
        return Some(KvmObstacle::Absent);
    }
    let access = Access::READ_OK | Access::WRITE_OK;
    if rustix::fs::accessat(CWD, device, access, AtFlags::empty()).is_err() {
        return Some(KvmObstacle::Closed);
    }
    // An agent that is not root cannot change users: its QEMU is itself, and that was just asked.
    let changes_user = rustix::process::geteuid().is_root();
    let open = !changes_user || opens(stat.st_mode, (stat.st_uid, stat.st_gid), user);
    (!open).then_some(KvmObstacle::Forbidden)
}

/// Whether a file of this mode and owner may be read and written by `user`, who has no further
/// groups. As the kernel does: the first class that fits decides alone.
fn opens(mode: u32, (owner, group): (u32, u32), user: User) -> bool {
    let shift = match user {
        User { uid: 0, .. } => return true,
        User { uid, .. } if uid == owner => 6,
        User { gid, .. } if gid == group => 3,
        _ => 0,
    };
    (mode >> shift) & 0o6 == 0o6
}

/// The QEMU that is to be asked.
#[derive(Debug, Clone, Copy)]
pub struct QemuProgram<'a> {
    /// The program.
    pub program: &'a Path,
    /// Whom it runs as.
    pub user: User,
    /// How it will run guests; what a CPU model can do here depends on it.
    pub accelerator: Accelerator,
}

/// What stays the same until this host boots again or its QEMU is upgraded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostFacts {
    /// What its QEMU offers; `None` where the agent runs no VMs.
    pub qemu: Option<QemuFacts>,
    /// What its CPUs can do, as `/proc/cpuinfo` names it; sorted; only what all of them can.
    pub cpu_flags: Vec<String>,
    /// CPUs that are on line.
    pub cpu_cores: u32,
    /// Changes with each boot.
    pub boot_id: String,
}

/// Gathers the facts. QEMU is run once, without a machine, and ended again.
///
/// # Errors
/// When the kernel's files or QEMU do not tell.
pub async fn gather(qemu: Option<QemuProgram<'_>>) -> Result<HostFacts, HostError> {
    let qemu = match qemu {
        Some(program) => Some(qemu::ask(program).await?),
        None => None,
    };
    let cpu_flags = proc::cpu_flags(&read(proc::CPU_INFO)?);
    let cpu = proc::cpu_times(&read(proc::STAT)?)?;
    let boot_id = proc::boot_id(&read(proc::BOOT_ID)?)?;
    Ok(HostFacts { qemu, cpu_flags, cpu_cores: cpu.cores, boot_id })
}

/// How many CPUs were in use, on average over the `window` that begins now.
///
/// # Errors
/// When the kernel does not tell.
pub async fn cpu_load(window: Duration) -> Result<f64, HostError> {
    let before = proc::cpu_times(&read(proc::STAT)?)?;
    tokio::time::sleep(window).await;
    let after = proc::cpu_times(&read(proc::STAT)?)?;
    Ok(proc::cores_in_use(before, after))
}

/// The MTU of a bridge (or any interface) of this host, in bytes.
///
/// # Errors
/// When there is no such interface.
pub fn bridge_mtu(bridge: &str) -> Result<u32, HostError> {
    let path = PathBuf::from(format!("/sys/class/net/{bridge}/mtu"));
    // A name with a slash would lead elsewhere, and is no interface's.
    let text = match bridge.contains('/') {
        true => Err(io::ErrorKind::NotFound.into()),
        false => std::fs::read_to_string(&path),
    };
    let text = text.map_err(|source| HostError::Unreadable { path, source })?;
    let error = HostError::Form { path: "/sys/class/net/*/mtu", wanted: "an MTU in bytes" };
    text.trim().parse().map_err(|_| error)
}

fn read(path: &str) -> Result<String, HostError> {
    std::fs::read_to_string(path)
        .map_err(|source| HostError::Unreadable { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    const QEMU: User = User { uid: 100, gid: 36 };

    #[test]
    fn kvm_is_used_where_it_can_be_and_is_wanted() {
        use AcceleratorChoice::{Auto, Kvm, Tcg};
        let closed = Some(KvmObstacle::Closed);
        assert!(matches!(Auto.decide(None), Ok(Accelerator::Kvm)));
        assert!(matches!(Auto.decide(closed), Ok(Accelerator::Tcg)));
        assert!(matches!(Kvm.decide(None), Ok(Accelerator::Kvm)));
        assert!(matches!(Tcg.decide(None), Ok(Accelerator::Tcg)));
        let said = Kvm.decide(Some(KvmObstacle::Forbidden)).unwrap_err().to_string();
        assert!(said.contains("not open to QEMU's user and group; enable"), "{said}");
        assert!(said.contains("`accelerator = \"tcg\"`"), "{said}");
    }

    #[test]
    fn a_device_that_is_no_device_is_no_kvm() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(kvm_obstacle(file.path(), QEMU), Some(KvmObstacle::Absent));
        assert_eq!(kvm_obstacle(Path::new("/dev/no-such"), QEMU), Some(KvmObstacle::Absent));
        assert_eq!(kvm_obstacle(Path::new("/dev/null"), QEMU), None);
    }

    #[test]
    fn the_first_class_of_a_mode_that_fits_decides() {
        let cases = [
            (0o660, (0, 36), true),    // Debian's: root:kvm
            (0o600, (0, 0), false),    // root's alone
            (0o666, (0, 0), true),     // everybody's
            (0o606, (0, 36), false),   // everybody's but the group's
            (0o066, (100, 36), false), // not its owner's
            (0o440, (0, 36), false),   // to read only
        ];
        for (mode, owner, open) in cases {
            assert_eq!(opens(mode, owner, QEMU), open, "{mode:o} {owner:?}");
        }
        assert!(opens(0o600, (5, 5), User { uid: 0, gid: 0 }));
    }

    #[tokio::test]
    async fn a_host_without_vms_has_facts_too() {
        let facts = gather(None).await.unwrap();
        assert!(facts.qemu.is_none() && facts.cpu_cores > 0 && facts.boot_id.len() == 36);
        let load = cpu_load(Duration::from_millis(30)).await.unwrap();
        assert!((0.0..=f64::from(facts.cpu_cores)).contains(&load), "{load}");
    }

    #[test]
    fn the_mtu_of_an_interface_is_read_and_a_missing_one_is_named() {
        assert!(bridge_mtu("lo").unwrap() >= 1500);
        let said = bridge_mtu("no-such-bridge").unwrap_err().to_string();
        assert!(said.contains("no-such-bridge"), "{said}");
        assert!(matches!(bridge_mtu("x/../lo"), Err(HostError::Unreadable { .. })));
    }
}
