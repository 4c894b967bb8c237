//! Between which QEMUs, and with which machine, a test moves its guest.
//!
//! Usually from the installed QEMU to itself with its board `pc`. With `LIFEBOAT_TESTS=full` also with
//! `q35`, within the QEMU of bookworm-backports, and from the older to the newer with the older's
//! machine. The newer one is unpacked by `lab/newer-qemu`; a test that cannot have it fails.
#![allow(dead_code, reason = "each test uses its part of it")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// The QEMU of Debian 12.
const INSTALLED: &str = "/usr/bin/qemu-system-x86_64";

/// A source's QEMU, a destination's, and the machine that both have.
#[derive(Debug, Clone)]
pub(crate) struct Qemus {
    pub(crate) source: PathBuf,
    pub(crate) destination: PathBuf,
    pub(crate) machine: &'static str,
}

impl Qemus {
    /// The installed one, with the machine that most tests use.
    pub(crate) fn installed() -> Self {
        let installed = PathBuf::from(INSTALLED);
        Self { source: installed.clone(), destination: installed, machine: "pc-i440fx-7.2" }
    }

    /// Each that this run of the tests is about.
    pub(crate) fn all() -> Vec<Self> {
        if !is_full() {
            return vec![Self::installed()];
        }
        let (older, newer) = (PathBuf::from(INSTALLED), newer());
        let pairs = [(&older, &older, "7.2"), (&newer, &newer, "10.0"), (&older, &newer, "7.2")];
        assert_ne!(version(&older), version(&newer), "these are to be two versions");
        let boards = |(source, destination, version): (&PathBuf, &PathBuf, &str)| {
            let machines = match version {
                "7.2" => ["pc-i440fx-7.2", "pc-q35-7.2"],
                _ => ["pc-i440fx-10.0", "pc-q35-10.0"],
            };
            let (source, destination) = (source.clone(), destination.clone());
            machines.map(|machine| Self {
                source: source.clone(),
                destination: destination.clone(),
                machine,
            })
        };
        let all: Vec<Self> = pairs.into_iter().flat_map(boards).collect();
        assert_eq!(all.len(), 6);
        all
    }

    /// Said before a test's part, so that a failure says which it was.
    pub(crate) fn announce(&self) {
        let (source, destination) = (version(&self.source), version(&self.destination));
        eprintln!("== {}: QEMU {source} to QEMU {destination}", self.machine);
    }
}

/// Whether this run may take long.
pub(crate) fn is_full() -> bool {
    std::env::var("LIFEBOAT_TESTS").is_ok_and(|tier| tier == "full")
}

/// The QEMU of bookworm-backports.
pub(crate) fn newer() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let made = Command::new(root.join("lab/newer-qemu")).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    String::from_utf8(made.stdout).unwrap().trim().into()
}

/// As the binary says, for instance `7.2.22`.
fn version(program: &Path) -> String {
    let said = Command::new(program).arg("--version").output().expect("lab/install installs QEMU");
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let version = said.split_whitespace().nth(3);
    version.unwrap_or_else(|| panic!("{}: {said}", program.display())).to_owned()
}
