//! Where one VM's run-time files are; used by everything that touches a running QEMU.
//!
//! ```text
//!   RUN_DIR/VM/              root's: QEMU can look, not write
//!       definition.toml      what this QEMU was started from (for adoption)
//!       qemu.log             its standard error; opened by the agent
//!       rescue.pid           who holds its second monitor, while its pages are on their way
//!       io/                  QEMU's user's, nobody else looks in
//!           pid  qmp.sock  rescue.sock  serial.sock  serial.log  migration sockets
//! ```
//!
//! What is in `io/` was written by QEMU, which a guest may have taken over: it is read with
//! suspicion (no symbolic links, small sizes), and proves nothing by itself.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

/// A socket's path must fit into `sockaddr_un`: 107 bytes and a zero.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The directory of one VM's run-time files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir {
    root: PathBuf,
}

impl RunDir {
    /// That of the VM `name` beneath the agent's `run_dir`.
    #[must_use]
    pub fn new(run_dir: &Path, name: &str) -> Self {
        Self { root: run_dir.join(name) }
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// What this QEMU was started from.
    #[must_use]
    pub fn definition(&self) -> PathBuf {
        self.root.join("definition.toml")
    }

    /// QEMU's standard error.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.root.join("qemu.log")
    }

    /// Written by QEMU.
    #[must_use]
    pub fn pid_file(&self) -> PathBuf {
        self.io("pid")
    }

    /// QEMU's monitor.
    #[must_use]
    pub fn qmp_socket(&self) -> PathBuf {
        self.io("qmp.sock")
    }

    /// QEMU's second monitor: see `qemu::rescue`.
    #[must_use]
    pub fn rescue_socket(&self) -> PathBuf {
        self.io("rescue.sock")
    }

    /// Who holds a connection to it.
    #[must_use]
    pub fn rescue_pid(&self) -> PathBuf {
        self.root.join("rescue.pid")
    }

    /// The guest's serial line, live.
    #[must_use]
    pub fn serial_socket(&self) -> PathBuf {
        self.io("serial.sock")
    }

    /// All that came out of the serial line. It is not rotated: a guest that writes without end
    /// fills the file system of the run directory, which should have a quota for QEMU's user.
    #[must_use]
    pub fn serial_log(&self) -> PathBuf {
        self.io("serial.log")
    }

    /// A path that QEMU can create, or connect to (after the agent has bound it there).
    #[must_use]
    pub fn io(&self, name: &str) -> PathBuf {
        self.root.join("io").join(name)
    }

    /// Makes the directories anew, `io/` owned by `uid` and `gid`. What an earlier run of the
    /// same VM left is removed first.
    ///
    /// # Errors
    /// What the system says; run as root, or as that user.
    pub fn create(&self, uid: u32, gid: u32) -> io::Result<()> {
        self.remove()?;
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&self.root)?;
        // The umask may have taken bits away that QEMU's user needs to pass through.
        fs::set_permissions(&self.root, fs::Permissions::from_mode(0o755))?;
        let io_dir = self.root.join("io");
        fs::DirBuilder::new().mode(0o700).create(&io_dir)?;
        std::os::unix::fs::chown(&io_dir, Some(uid), Some(gid))
    }

    /// Removes all of it; that it is not there is fine.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            outcome => outcome,
        }
    }

    /// The process id that QEMU wrote, if there is one. A claim, not a proof.
    #[must_use]
    pub fn claimed_pid(&self) -> Option<u32> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(self.pid_file(), flags, Mode::empty()).ok()?;
        let mut text = String::new();
        fs::File::from(file).take(16).read_to_string(&mut text).ok()?;
        text.trim().parse().ok()
    }

    /// The last lines of QEMU's standard error, for an error text; empty when there are none.
    #[must_use]
    pub fn log_tail(&self) -> String {
        const TAIL_BYTES: usize = 600;
        let text = fs::read(self.log()).unwrap_or_default();
        let tail = &text[text.len().saturating_sub(TAIL_BYTES)..];
        String::from_utf8_lossy(tail).trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_that_is_a_link_or_rubbish_claims_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(directory.path(), "vm");
        fs::create_dir_all(run_dir.path().join("io")).unwrap();
        assert_eq!(run_dir.claimed_pid(), None);
        fs::write(run_dir.pid_file(), "4711\n").unwrap();
        assert_eq!(run_dir.claimed_pid(), Some(4711));
        fs::write(run_dir.pid_file(), "1; rm").unwrap();
        assert_eq!(run_dir.claimed_pid(), None);
        fs::write(directory.path().join("else"), "1\n").unwrap();
        fs::remove_file(run_dir.pid_file()).unwrap();
        std::os::unix::fs::symlink(directory.path().join("else"), run_dir.pid_file()).unwrap();
        assert_eq!(run_dir.claimed_pid(), None);
    }
}
