//! Memory set aside for a store: a control group of its own, so that the kernel neither takes it away
//! under pressure nor swaps it, and the store cannot take more than it was promised.
//!
//! ```text
//!  <cgroup2>/lifeboat-stores/<host>-<migration>      <cgroup, memory>/lifeboat-stores/<host>-<migration>
//!     memory.min  what was promised                     memory.soft_limit_in_bytes  what was promised
//!     memory.max  a quarter more: buffers               memory.limit_in_bytes       a quarter more
//!     memory.swap.max  0                                memory.swappiness  0
//!     cgroup.procs  the store's server                  cgroup.procs       the store's server
//! ```
//!
//! The first version has no promise that holds under pressure; it swaps nothing of the group's, and what
//! has grown beyond its soft limit goes before this does.
//!
//! Used by [`super::Intermediary`]. Where the machine has the memory controller in neither version, or
//! we may not change it, a store runs all the same, with redis' own limit, and the log says so.

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
    #[error("this machine has no control groups with the memory controller")]
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

/// Where control groups with the memory controller are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Root {
    /// The first version, of that controller alone.
    First(PathBuf),
    /// The second.
    Second(PathBuf),
}

impl Root {
    /// By `/proc/self/mountinfo`. The controller is of one version only.
    pub(super) fn find() -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        if let Some(root) = mount_point(&mounts, "cgroup2", None) {
            let all = std::fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
            if all.split_whitespace().any(|name| name == "memory") {
                return Some(Self::Second(root));
            }
        }
        mount_point(&mounts, "cgroup", Some("memory")).map(Self::First)
    }

    fn folder(&self) -> &Path {
        match self {
            Self::First(folder) | Self::Second(folder) => folder,
        }
    }
}

/// Where a file system of this kind is mounted, with this among its own options.
fn mount_point(mounts: &str, kind: &str, option: Option<&str>) -> Option<PathBuf> {
    let is_it = |line: &&str| {
        let mut own = line.split(" - ").nth(1).unwrap_or_default().split(' ');
        let (found, options) = (own.next(), own.nth(1).unwrap_or_default());
        found == Some(kind) && option.is_none_or(|option| options.split(',').any(|o| o == option))
    };
    let line = mounts.lines().find(is_it)?;
    line.split(' ').nth(4).map(PathBuf::from)
}

/// Puts `process` into a group `name` of its own for which `memory` is set aside.
pub(super) fn set_aside(
    root: Option<&Root>,
    name: &str,
    process: u32,
    memory: Bytes,
) -> Result<PathBuf, CgroupError> {
    let root = root.ok_or(CgroupError::None)?;
    let parent = root.folder().join(PARENT);
    let group = parent.join(name);
    let most = (Bytes(memory.0.saturating_add(memory.0 / 4)) + SLACK).0.to_string();
    // A kernel without swap, or an older one, has not all of the files that come last. A parent that
    // promises nothing would take the children's promise back.
    let (limit, others) = match root {
        Root::First(_) => {
            make(&parent)?;
            let soft = (&group, "memory.soft_limit_in_bytes", memory.0.to_string());
            ("memory.limit_in_bytes", vec![soft, (&group, "memory.swappiness", "0".to_owned())])
        }
        Root::Second(folder) => {
            enable(folder)?;
            make(&parent)?;
            enable(&parent)?;
            let promise = |group, bytes: &str| (group, "memory.min", bytes.to_owned());
            let own = promise(&group, &memory.0.to_string());
            let swap = (&group, "memory.swap.max", "0".to_owned());
            ("memory.max", vec![promise(&parent, "max"), own, swap])
        }
    };
    make(&group)?;
    write(&group, limit, &most)?;
    write(&group, "cgroup.procs", &process.to_string())?;
    for (folder, file, value) in others {
        if let Err(error) = write(folder, file, &value) {
            tracing::debug!(%error, "not set");
        }
    }
    Ok(group)
}

/// Removes a group; the processes in it have to be gone.
pub(super) fn give_back(root: Option<&Root>, name: &str) {
    let Some(root) = root else { return };
    let group = root.folder().join(PARENT).join(name);
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
    fn each_version_is_found_among_mounts_of_the_other() {
        let mounts = "30 1 0:1 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      31 30 0:2 / /sys/fs/cgroup/cpu rw,memory - cgroup cgroup rw,cpu\n\
                      32 30 0:2 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      33 30 0:3 / /sys/fs/cgroup/unified rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
        let second = |mounts| mount_point(mounts, "cgroup2", None);
        assert_eq!(second(mounts), Some("/sys/fs/cgroup/unified".into()));
        let first = mount_point(mounts, "cgroup", Some("memory"));
        assert_eq!(first, Some("/sys/fs/cgroup/memory".into()));
        assert_eq!(second("1 2 3 / /x rw - ext4 a rw"), None);
        assert_eq!(second("cgroup2"), None);
    }

    /// The kernel's files stand in for themselves: a folder with the same names.
    fn group_with(folder: &Path, files: &[&str]) {
        let group = folder.join(PARENT).join("h1-m1");
        std::fs::create_dir_all(&group).unwrap();
        for folder in [folder, &folder.join(PARENT), &group] {
            for file in files {
                std::fs::write(folder.join(file), "").unwrap();
            }
        }
    }

    #[test]
    fn a_group_promises_no_less_and_allows_little_more() {
        let folder = tempfile::tempdir().unwrap();
        let files = ["cgroup.subtree_control", "memory.min", "memory.max", "cgroup.procs"];
        group_with(folder.path(), &files);
        let memory = Bytes::from_mib(256);
        let root = Root::Second(folder.path().to_owned());
        let made = set_aside(Some(&root), "h1-m1", 42, memory).unwrap();
        let said = |file: &str| std::fs::read_to_string(made.join(file)).unwrap();
        assert_eq!((said("memory.min"), said("cgroup.procs")), (memory.0.to_string(), "42".into()));
        assert_eq!(said("memory.max"), Bytes::from_mib(320 + 64).0.to_string());
        assert!(matches!(set_aside(None, "a", 1, memory), Err(CgroupError::None)));
        let nowhere = set_aside(Some(&Root::Second("/no/such".into())), "a", 1, memory);
        assert!(nowhere.unwrap_err().to_string().contains("/no/such"));
    }

    #[test]
    fn one_of_the_first_version_has_the_same_limit() {
        let folder = tempfile::tempdir().unwrap();
        let files = ["memory.limit_in_bytes", "memory.swappiness", "cgroup.procs"];
        group_with(folder.path(), &files);
        let root = Root::First(folder.path().to_owned());
        let made = set_aside(Some(&root), "h1-m1", 42, Bytes::from_mib(256)).unwrap();
        let said = |file: &str| std::fs::read_to_string(made.join(file)).unwrap();
        assert_eq!(said("memory.limit_in_bytes"), Bytes::from_mib(320 + 64).0.to_string());
        assert_eq!((said("memory.swappiness"), said("cgroup.procs")), ("0".into(), "42".into()));
    }
}
