//! Private namespaces for a whole program: it starts itself again inside of them.
//!
//! ```text
//!   lifeboat-experiment          outside: raises one kernel parameter, waits, puts it back
//!      '- unshare (killed with it)
//!           '- sh                process 1 inside: buries orphans, such as QEMUs
//!                '- lifeboat-experiment again, which finds itself inside
//! ```
//!
//! Whatever is started inside (switches, agents, guests) ends with process 1, and all interfaces
//! with the namespaces. The kernel parameter is the machine's: ovs-vswitchd sends for all its ports
//! through one socket that gets its buffer from `net.core.wmem_default` when it is made, and with
//! the usual 208 KiB the backlog of one queue stops every other port. It is raised until the switches
//! have sent their first packets, and then put back; their sockets keep what they got.

use std::env;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use super::RigError;
use super::program::{run, words};

const WMEM: &str = "/proc/sys/net/core/wmem_default";
const WMEM_WANTED: u64 = 16 << 20;
/// Set inside; names the file that says that the switches are up.
const INSIDE: &str = "LIFEBOAT_RIG_UP_FILE";

/// Says, from inside, that the switches have sent their first packets.
///
/// # Errors
/// When the file cannot be written.
pub fn switches_are_up() -> Result<(), RigError> {
    let Some(file) = env::var_os(INSIDE) else { return Ok(()) };
    fs::write(file, "").map_err(RigError::io("cannot say that the switches are up"))
}

/// Whether this process is inside already.
#[must_use]
pub fn is_inside() -> bool {
    env::var_os(INSIDE).is_some()
}

/// Starts this program again, with the same arguments, in namespaces of its own, and returns how
/// it ended. On Ctrl-C it is ended.
///
/// # Errors
/// When that needs rights or programs that are not there.
pub async fn enter() -> Result<ExitStatus, RigError> {
    let folder = tempfile::tempdir().map_err(RigError::io("cannot make a temporary folder"))?;
    let up_file = folder.path().join("up");
    let wmem = Wmem::raise()?;
    let mut child = tokio::process::Command::from(unshared(&up_file)?)
        .spawn()
        .map_err(|source| RigError::Start { program: "unshare".to_owned(), source })?;
    let mut wmem = Some(wmem);
    let mut looks = tokio::time::interval(Duration::from_millis(50));
    let mut asked_to_end = false;
    loop {
        tokio::select! {
            ended = child.wait() => return ended.map_err(RigError::io("cannot wait for unshare")),
            _ = tokio::signal::ctrl_c(), if !asked_to_end => {
                asked_to_end = true;
                child.start_kill().map_err(RigError::io("cannot end unshare"))?;
            }
            _ = looks.tick(), if wmem.is_some() => if up_file.exists() { wmem = None },
        }
    }
}

fn unshared(up_file: &Path) -> Result<Command, RigError> {
    let program = env::current_exe().map_err(RigError::io("cannot find this program"))?;
    let mut command = words(
        "setpriv --pdeathsig KILL unshare --net --mount --pid --fork --kill-child --mount-proc --",
    );
    // The shell buries orphans while it waits; without the second command it would become the
    // program instead of starting it.
    command.args(["sh", "-c", "\"$@\"; exit $?", "sh"]).arg(program).args(env::args_os().skip(1));
    // A group of its own: Ctrl-C is for the outer process, which then ends all of it.
    command.env(INSIDE, up_file).stdin(Stdio::null()).process_group(0);
    Ok(command)
}

/// The first thing to do inside: names of namespaces and the loopback interface are ours alone.
///
/// # Errors
/// When the system does not allow it.
pub fn settle() -> Result<(), RigError> {
    fs::create_dir_all("/run/netns").map_err(RigError::io("cannot make /run/netns"))?;
    run(&mut words("mount -t tmpfs none /run/netns"))?;
    run(&mut words("ip link set lo up")).map(drop)
}

/// The raised kernel parameter; put back when dropped.
struct Wmem {
    before: Option<String>,
}

impl Wmem {
    fn raise() -> Result<Self, RigError> {
        let before =
            fs::read_to_string(WMEM).map_err(RigError::io(format!("cannot read {WMEM}")))?;
        if before.trim().parse().is_ok_and(|bytes: u64| bytes >= WMEM_WANTED) {
            return Ok(Self { before: None });
        }
        let needs_root = format!("cannot set {WMEM}: this needs root");
        fs::write(WMEM, WMEM_WANTED.to_string()).map_err(RigError::io(needs_root))?;
        Ok(Self { before: Some(before) })
    }
}

impl Drop for Wmem {
    fn drop(&mut self) {
        let Some(before) = &self.before else { return };
        if let Err(error) = fs::write(WMEM, before) {
            eprintln!("cannot put {WMEM} back to {}: {error}", before.trim());
        }
    }
}

/// Where the programs of this build are: beside the running one.
///
/// # Errors
/// When the running program cannot be found.
pub fn built(name: &str) -> Result<PathBuf, RigError> {
    let own = env::current_exe().map_err(RigError::io("cannot find this program"))?;
    // Tests lie one folder deeper than binaries.
    let folders = own.ancestors().skip(1).take(2).map(Path::to_owned);
    let found = folders.map(|folder| folder.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| RigError::Start {
        program: name.to_owned(),
        source: io::Error::from(io::ErrorKind::NotFound),
    })
}
