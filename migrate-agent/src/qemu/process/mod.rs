//! A QEMU as a process of this host: started, recognised again, ended.
//!
//! Used by `vms/`. A [`QemuProcess`] is held by a pidfd, so that a signal can only ever reach the
//! very process that was recognised, never a later one with the same number.
//!
//! ```text
//!   start -> running -> (QMP quit) -> gone
//!              ^  '----> kill ---------^
//!   adopt -----'
//! ```
//!
//! QEMU does not end with the agent: it is the child of nobody in particular, in its own session.
//! Under systemd the agent's unit needs `KillMode=process`.

mod detach;

pub(crate) use detach::ends_with_us;

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Child;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::sync::watch;

use super::procfs;
use super::run_dir::RunDir;

/// Who QEMU runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id; on a host with KVM, the group that may open `/dev/kvm`.
    pub gid: u32,
}

/// Why a process could not be started, recognised or ended.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The run directory cannot be prepared.
    #[error("cannot prepare {path} for QEMU")]
    RunDir {
        /// The directory or file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The program cannot be started at all.
    #[error("cannot start {program}")]
    Start {
        /// The program.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The process could not be watched or signalled.
    #[error("cannot reach process {pid}")]
    Reach {
        /// The process.
        pid: u32,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It was killed, and is still there.
    #[error("process {pid} was killed and has not ended within {waited:?}; it hangs in the kernel")]
    Unkillable {
        /// The process.
        pid: u32,
        /// How long we waited.
        waited: Duration,
    },
}

/// A QEMU of ours.
#[derive(Debug)]
pub struct QemuProcess {
    pid: u32,
    start_ticks: u64,
    handle: Arc<OwnedFd>,
    /// Becomes true when it has ended.
    ended: watch::Receiver<bool>,
}

impl QemuProcess {
    /// Starts QEMU. It has not said anything yet when this returns: connect to its monitor, and
    /// read [`RunDir::log_tail`] when it ends instead.
    ///
    /// # Errors
    /// When the log cannot be opened or the program cannot be started.
    pub fn start(
        program: &Path,
        arguments: &[OsString],
        user: User,
        run_dir: &RunDir,
    ) -> Result<Self, ProcessError> {
        Self::start_with(program, arguments, user, run_dir, vec![])
    }

    /// As [`Self::start`]; QEMU inherits `kept` under the numbers that they have here.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(
        program: &Path,
        arguments: &[OsString],
        user: User,
        run_dir: &RunDir,
        kept: Vec<OwnedFd>,
    ) -> Result<Self, ProcessError> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o644)
            .custom_flags(libc::O_NOFOLLOW)
            .open(run_dir.log())
            .map_err(|source| ProcessError::RunDir {
                path: run_dir.log().display().to_string(),
                source,
            })?;
        let start_error =
            |source| ProcessError::Start { program: program.display().to_string(), source };
        let child = detach::start(program, arguments, (user.uid, user.gid), log, kept)
            .map_err(start_error)?;
        let pid = child.id();
        Self::hold(pid, Some(child))?.ok_or_else(|| ProcessError::Reach {
            pid,
            source: io::Error::from(io::ErrorKind::NotFound),
        })
    }

    /// Recognises the QEMU that was started with this run directory, perhaps by an agent before
    /// us. `None` when it has gone. A process that merely has the same number is not touched:
    /// ours carries our pid file's path as an argument, which no other can be made to do.
    ///
    /// # Errors
    /// When the process cannot be held.
    pub fn adopt(run_dir: &RunDir) -> Result<Option<Self>, ProcessError> {
        let Some(pid) = run_dir.claimed_pid() else { return Ok(None) };
        let Some(process) = Self::hold(pid, None)? else { return Ok(None) };
        // Looked at after it is held: what we see is what we hold.
        let pid_file = run_dir.pid_file().display().to_string();
        let ours = procfs::cmdline(pid)
            .windows(2)
            .any(|pair| pair[0] == "-pidfile" && pair[1] == pid_file);
        Ok((ours && process.is_alive()).then_some(process))
    }

    fn hold(pid: u32, child: Option<Child>) -> Result<Option<Self>, ProcessError> {
        let reach = |source: io::Error| ProcessError::Reach { pid, source };
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let Some(raw) = raw else { return Ok(None) };
        let handle = match rustix::process::pidfd_open(raw, PidfdFlags::NONBLOCK) {
            Ok(handle) => handle,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(errno) => return Err(reach(errno.into())),
        };
        let Some(stat) = procfs::stat(pid) else { return Ok(None) };
        let handle = Arc::new(handle);
        let ended = watch_end(pid, Arc::clone(&handle), child).map_err(reach)?;
        Ok(Some(Self { pid, start_ticks: stat.start_ticks, handle, ended }))
    }

    /// Its process id.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it still runs. A zombie does not.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        procfs::stat(self.pid)
            .is_some_and(|stat| stat.start_ticks == self.start_ticks && stat.state != 'Z')
    }

    /// Returns when it has ended, for whatever reason.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        // An error means that the watching thread is gone, which it is only after the end.
        let _ = ended.wait_for(|&ended| ended).await;
    }

    /// Waits until it has ended by itself, and kills it when it has not within `grace`.
    /// Says whether it had to be killed.
    ///
    /// # Errors
    /// When it cannot be reached, or survives even SIGKILL.
    pub async fn end_within(&self, grace: Duration) -> Result<bool, ProcessError> {
        if tokio::time::timeout(grace, self.ended()).await.is_ok() {
            return Ok(false);
        }
        self.kill().await.map(|()| true)
    }

    /// Kills it and waits until it has gone.
    ///
    /// # Errors
    /// When it cannot be reached, or does not go.
    pub async fn kill(&self) -> Result<(), ProcessError> {
        const PATIENCE: Duration = Duration::from_secs(10);
        match rustix::process::pidfd_send_signal(self.handle.as_fd(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => (),
            Err(errno) => {
                return Err(ProcessError::Reach { pid: self.pid, source: errno.into() });
            }
        }
        let gone = tokio::time::timeout(PATIENCE, self.ended()).await;
        gone.map_err(|_| ProcessError::Unkillable { pid: self.pid, waited: PATIENCE })
    }
}

/// A thread that waits for the end of a process: a pidfd becomes readable then. While we live a
/// child is ours to reap; when we die, init's.
fn watch_end(
    pid: u32,
    handle: Arc<OwnedFd>,
    child: Option<Child>,
) -> io::Result<watch::Receiver<bool>> {
    let (end, ended) = watch::channel(false);
    let wait = move || {
        loop {
            let mut wanted = [PollFd::new(&*handle, PollFlags::IN)];
            match rustix::event::poll(&mut wanted, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => (),
                Err(errno) => {
                    tracing::error!(pid, %errno, "cannot watch a QEMU; taken for ended");
                    break;
                }
            }
        }
        if let Some(mut child) = child {
            match child.wait() {
                Ok(status) => tracing::debug!(pid, %status, "QEMU has ended"),
                Err(error) => tracing::warn!(pid, %error, "cannot reap QEMU"),
            }
        }
        // Nobody may be interested any more.
        let _ = end.send(true);
    };
    std::thread::Builder::new().name(format!("qemu {pid}")).stack_size(256 << 10).spawn(wait)?;
    Ok(ended)
}
