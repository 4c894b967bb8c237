//! A control group with little memory, so that what a program has written is not read from the page cache.
//!
//! Bonnie++'s O_DIRECT ends with its writes: it reads through the page cache, which on a large machine has
//! the whole file. Both kinds of control groups are served; without one there is no figure.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::rig::RigError;

/// The group; its programs have to have ended when this is dropped.
pub(super) struct LittleMemory {
    folder: PathBuf,
}

impl LittleMemory {
    /// A group of its own for programs that take at most `bytes` together, page cache included.
    ///
    /// # Errors
    /// When this machine has no control groups for memory, or they are not ours to make.
    pub(super) fn of(bytes: u64) -> Result<Self, RigError> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")
            .map_err(RigError::io("cannot look for control groups"))?;
        let (root, limit) = hierarchy(&mounts).ok_or_else(|| {
            RigError::refused("a limit of memory")("this machine has no control groups for it")
        })?;
        if limit == V2 {
            // As it is already, where anybody uses it.
            let _ = std::fs::write(root.join("cgroup.subtree_control"), "+memory");
        }
        let folder = root.join(format!("lifeboat-experiment-{}", std::process::id()));
        std::fs::create_dir(&folder).map_err(RigError::io("cannot make a control group"))?;
        let group = Self { folder };
        std::fs::write(group.folder.join(limit), bytes.to_string())
            .map_err(RigError::io("cannot limit a control group's memory"))?;
        Ok(group)
    }

    /// `command`, as it has to be run to be in the group from its first page on.
    pub(super) fn holding(&self, command: &Command) -> Command {
        let mut within = Command::new("sh");
        within.arg("-c").arg("echo $$ >\"$0\" && exec \"$@\"");
        within.arg(self.folder.join("cgroup.procs")).arg(command.get_program());
        within.args(command.get_args());
        within
    }
}

impl Drop for LittleMemory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir(&self.folder) {
            eprintln!("{} is left: {error}", self.folder.display());
        }
    }
}

const V1: &str = "memory.limit_in_bytes";
const V2: &str = "memory.max";

/// Where groups of memory are made, and the file of their limit.
fn hierarchy(mounts: &str) -> Option<(PathBuf, &'static str)> {
    let mount = |line: &str| {
        let (place, rest) = line.split_once(" - ")?;
        let at = Path::new(place.split(' ').nth(4)?).to_owned();
        let mut rest = rest.split(' ');
        let (kind, options) = (rest.next()?, rest.nth(1)?);
        match kind {
            "cgroup" if options.split(',').any(|option| option == "memory") => Some((at, V1)),
            "cgroup2" => Some((at, V2)),
            _ => None,
        }
    };
    // Where both are, memory belongs to the older one.
    let found: Vec<_> = mounts.lines().filter_map(mount).collect();
    found.iter().find(|(_, limit)| *limit == V1).or(found.first()).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "31 24 0:27 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n";
    const NEW: &str =
        "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn memory_is_limited_where_this_machine_does_it() {
        let root = "22 1 8:1 / / rw - ext4 /dev/vda rw,memory\n";
        let cpu = "32 24 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        let at = |mounts: &str| hierarchy(mounts);
        assert_eq!(at(&format!("{root}{cpu}")), None);
        assert_eq!(at(&format!("{cpu}{NEW}")), Some(("/sys/fs/cgroup".into(), V2)));
        assert_eq!(at(&format!("{NEW}{OLD}")), Some(("/sys/fs/cgroup/memory".into(), V1)));
    }

    #[test]
    fn a_program_is_in_its_group_from_the_beginning() {
        let group = LittleMemory { folder: "/a group".into() };
        let mut command = Command::new("bonnie++");
        command.args(["-d", "a folder"]);
        let words: Vec<_> = group.holding(&command).get_args().map(ToOwned::to_owned).collect();
        assert_eq!(words[2..], ["/a group/cgroup.procs", "bonnie++", "-d", "a folder"]);
        std::mem::forget(group);
    }
}
