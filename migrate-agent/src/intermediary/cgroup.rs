//! Memory set aside for a store: a control group of its own (cgroup v2), so that the kernel neither
//! takes it away under pressure nor swaps it, and the store cannot take more than it was promised.
//!
//! ```text
//!  <cgroup2>/lifeboat-stores/<host>-<migration>
//!     memory.min  what was promised       memory.max  a quarter more: buffers of connections
//!     memory.swap.max  0                  cgroup.procs  the store's server
//! ```
//!
//! Used by [`super::Intermediary`]. Where the machine has no cgroup v2 with the memory controller, or
//! we may not change it, a store runs all the same, with redis' own limit, and the log says so once.

use std::io;
use std::path::{Path, PathBuf};

use lifeboat_protocol::units::Bytes;

/// All groups of ours.
const PARENT: &str = "lifeboat-stores";
/// Beside the quarter.
const SLACK: Bytes = Bytes::from_mib(64);

/// Why memory could not be set aside by the kernel.
#[derive(Debug, thiserror::Error)]
pub(super) enum CgroupError {
    /// There is none.
    #[error("this machine has no cgroup v2 with the memory controller")]
    None,
    /// There is one, and it says no.
    #[error("control group {}: cannot {doing}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Where control groups with the memory controller are, by `/proc/self/mountinfo`.
pub(super) fn root() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let root = mount_point(&mounts)?;
    let controllers = std::fs::read_to_string(root.join("cgroup.controllers")).ok()?;
    controllers.split_whitespace().any(|name| name == "memory").then_some(root)
}

fn mount_point(mounts: &str) -> Option<PathBuf> {
    let is_v2 = |line: &&str| line.split(" - ").nth(1).is_some_and(|t| t.starts_with("cgroup2 "));
    let line = mounts.lines().find(is_v2)?;
    line.split(' ').nth(4).map(PathBuf::from)
}

/// Puts `process` into a group `name` of its own for which `memory` is set aside.
pub(super) fn set_aside(
    root: Option<&Path>,
    name: &str,
    process: u32,
    memory: Bytes,
) -> Result<PathBuf, CgroupError> {
    let root = root.ok_or(CgroupError::None)?;
    let parent = root.join(PARENT);
    let group = parent.join(name);
    enable(root)?;
    make(&parent)?;
    enable(&parent)?;
    make(&group)?;
    let most = Bytes(memory.0.saturating_add(memory.0 / 4)) + SLACK;
    write(&group, "memory.max", &most.0.to_string())?;
    write(&group, "cgroup.procs", &process.to_string())?;
    // A parent that promises nothing would take the children's promise back; and a kernel without
    // swap, or an older one, has not all of these files.
    for (folder, file, value) in [
        (&parent, "memory.min", "max".to_owned()),
        (&group, "memory.min", memory.0.to_string()),
        (&group, "memory.swap.max", "0".to_owned()),
    ] {
        if let Err(error) = write(folder, file, &value) {
            tracing::debug!(%error, "not set");
        }
    }
    Ok(group)
}

/// Removes a group; the processes in it have to be gone.
pub(super) fn give_back(root: Option<&Path>, name: &str) {
    let Some(root) = root else { return };
    let group = root.join(PARENT).join(name);
    match std::fs::remove_dir(&group) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(group = %group.display(), %error, "control group not removed");
        }
        _ => (),
    }
}

fn make(path: &Path) -> Result<(), CgroupError> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map_err(failed(path, "make it")),
    }
}

/// Has the memory controller in the groups below.
fn enable(path: &Path) -> Result<(), CgroupError> {
    let file = "cgroup.subtree_control";
    let enabled = std::fs::read_to_string(path.join(file)).unwrap_or_default();
    match enabled.split_whitespace().any(|name| name == "memory") {
        true => Ok(()),
        false => write(path, file, "+memory"),
    }
}

fn write(group: &Path, file: &'static str, value: &str) -> Result<(), CgroupError> {
    // Opened as it is: these files are the kernel's, none is ever made.
    let opened = std::fs::OpenOptions::new().write(true).open(group.join(file));
    let written = opened.and_then(|mut opened| io::Write::write_all(&mut opened, value.as_bytes()));
    written.map_err(failed(group, file))
}

fn failed(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { path, doing, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_version_is_found_among_mounts_of_the_first() {
        let mounts = "30 1 0:1 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      31 30 0:2 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      32 30 0:3 / /sys/fs/cgroup/unified rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point("1 2 3 / /x rw - ext4 a rw"), None);
        assert_eq!(mount_point("cgroup2"), None);
    }

    /// The kernel's files stand in for themselves: a folder with the same names.
    #[test]
    fn a_group_promises_no_less_and_allows_little_more() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join(PARENT).join("h1-m1");
        std::fs::create_dir_all(&group).unwrap();
        for folder in [root.path(), &root.path().join(PARENT), &group] {
            for file in ["cgroup.subtree_control", "memory.min", "memory.max", "cgroup.procs"] {
                std::fs::write(folder.join(file), "").unwrap();
            }
        }
        let memory = Bytes::from_mib(256);
        let made = set_aside(Some(root.path()), "h1-m1", 42, memory).unwrap();
        let said = |file: &str| std::fs::read_to_string(made.join(file)).unwrap();
        assert_eq!((said("memory.min"), said("cgroup.procs")), (memory.0.to_string(), "42".into()));
        assert_eq!(said("memory.max"), Bytes::from_mib(320 + 64).0.to_string());
        assert!(matches!(set_aside(None, "a", 1, memory), Err(CgroupError::None)));
        let nowhere = set_aside(Some(Path::new("/no/such")), "a", 1, memory);
        assert!(nowhere.unwrap_err().to_string().contains("/no/such"));
    }
}
