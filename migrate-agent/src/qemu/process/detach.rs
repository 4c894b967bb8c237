//! Starting a program that outlives us: own user, own session, nothing of ours inherited. And the
//! opposite, for a program of a moment: one that ends with us.
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

/// Has the kernel kill what `command` starts as soon as the thread that starts it has ended: also
/// when this process is killed and can clean up nothing.
pub(crate) fn ends_with_us(command: &mut Command) {
    let us = rustix::process::getpid();
    // SAFETY: the closure runs in the child after fork, where only async-signal-safe calls are
    // allowed; prctl(2) and getppid(2) are, made directly as system calls; nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            // Who died before the line above sends no signal any more.
            if rustix::process::getppid() != Some(us) {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn what_ends_with_us_is_killed_when_who_started_it_has_ended() {
        let start = || {
            let mut command = Command::new("sleep");
            command.arg("600");
            ends_with_us(&mut command);
            command.spawn().unwrap()
        };
        let mut child = std::thread::scope(|scope| scope.spawn(start).join().unwrap());
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }
}
