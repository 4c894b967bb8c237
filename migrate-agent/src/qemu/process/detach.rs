//! Starting a program that outlives us: own user, own session, nothing of ours inherited.
//!
//! The only `unsafe` of this room: what runs between fork and exec.

#![allow(unsafe_code)]

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Starts `program` as `uid`:`gid` without further groups, in a session of its own (so that
/// neither a terminal's Ctrl-C nor its end reaches it), in `/`, with `log` as standard output
/// and error. `kept` are open in it under the numbers that they have here.
///
/// # Errors
/// When it cannot be started.
pub(super) fn start(
    program: &Path,
    arguments: &[OsString],
    (uid, gid): (u32, u32),
    log: File,
    kept: Vec<OwnedFd>,
) -> std::io::Result<Child> {
    let error_log = log.try_clone()?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir("/")
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.stdin(Stdio::null()).stdout(log).stderr(error_log);
    if rustix::process::geteuid().is_root() {
        command.gid(gid).uid(uid);
    }
    // SAFETY: the closure runs in the child after fork, where only async-signal-safe calls are
    // allowed; setsid(2) and fcntl(2) are, made directly as system calls; nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            // In the child's table alone: these survive exec, under the numbers that they have.
            for descriptor in &kept {
                rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty())?;
            }
            Ok(())
        });
    }
    // Our own copies of `kept` are closed with the command.
    command.spawn()
}
