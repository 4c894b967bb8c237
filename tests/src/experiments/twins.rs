//! Two guests that are alike, for experiments that move one by two agents and the other by QEMU alone: their
//! definitions, what they say of themselves, and folders for both.
//!
//! Deliberately not here: hosts, networks, and what is compared.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lifeboat_agent::qemu::launch::{Accelerator, Begin, LaunchSpec};
use lifeboat_protocol::units::Bytes;

use crate::clock;
use crate::rig::RigError;

pub(super) const MACHINE: &str = "pc-i440fx-7.2";

/// What both are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Twins {
    /// The memory of each.
    pub(super) memory: Bytes,
    /// What their kernels are told, but for their names.
    pub(super) kernel_arguments: &'static str,
}

impl Twins {
    /// The one that agents move, called `ours`, as its definition.
    pub(super) fn ours(&self) -> String {
        format!(
            "name = \"ours\"\nmemory = \"{} MiB\"\nvcpus = 1\nmachine = \"{MACHINE}\"\n\
             cpu_model = \"max\"\nkernel = \"vmlinuz\"\ninitrd = \"initrd\"\n\
             kernel_arguments = \"{} lb.name=ours\"\n",
            self.memory.mib(),
            self.kernel_arguments
        )
    }

    /// The one that QEMU moves by itself, called `direct`.
    pub(super) fn direct(&self, images: &Path) -> LaunchSpec {
        LaunchSpec {
            name: "direct".to_owned(),
            memory: self.memory,
            vcpus: 1,
            machine: MACHINE.to_owned(),
            cpu_model: "max".to_owned(),
            accelerator: Accelerator::Tcg,
            firmware: None,
            kernel: Some(images.join("vmlinuz")),
            initrd: Some(images.join("initrd")),
            kernel_arguments: format!("{} lb.name=direct", self.kernel_arguments),
            nics: vec![],
            disks: vec![],
            profile_arguments: vec![],
            begin: Begin::Boot,
        }
    }
}

/// Waits until the guest of a serial log has said `times` more that it is alive and well, and gives
/// the number of wrong bytes it has ever reported there.
pub(super) fn lives(serial: &Path, times: usize) -> Result<f64, RigError> {
    const WITHIN: Duration = Duration::from_secs(60);
    let text = || String::from_utf8_lossy(&fs::read(serial).unwrap_or_default()).into_owned();
    let ticks = |text: &str| text.lines().filter(|line| line.contains("LIFEBOAT-TICK")).count();
    let before = ticks(&text());
    let found = clock::wait_for(WITHIN, || {
        let text = text();
        (ticks(&text) >= before + times).then(|| text.matches("LIFEBOAT-CORRUPT").count() as f64)
    });
    let what = format!("a sign of life of the guest in {}", serial.display());
    found.ok_or(RigError::TooLate { what, seconds: WITHIN.as_secs() })
}

/// A folder that is there afterwards.
pub(super) fn made(folder: &Path, name: &str) -> Result<PathBuf, RigError> {
    let path = folder.join(name);
    fs::create_dir_all(&path).map_err(RigError::io(format!("cannot make {}", path.display())))?;
    Ok(path)
}
