//! A test that runs itself again in namespaces of its own, so that whatever it starts ends with it.
//!
//! As `rig::private` does for the experiments; a test differs in how it is named on its command
//! line, and needs no kernel parameter of the machine's.

use std::env;
use std::process::{Command, ExitStatus, Stdio};

use crate::rig::RigError;
use crate::rig::program::words;

const INSIDE: &str = "LIFEBOAT_TEST_IS_INSIDE";

/// Whether this process is inside already.
#[must_use]
pub fn is_inside() -> bool {
    env::var_os(INSIDE).is_some()
}

/// Runs the test `name` of this program, with its modules before it, again, inside, and returns how it ended.
/// Its output is this program's.
///
/// # Errors
/// When that needs rights or programs that are not there, or this program has no such test: it would run
/// none, and call that success.
pub fn run_inside(name: &str) -> Result<ExitStatus, RigError> {
    let program = env::current_exe().map_err(RigError::io("cannot find this program"))?;
    let mut list = Command::new(&program);
    let listed = list.args(["--exact", name, "--include-ignored", "--list"]).output();
    let listed = listed.map_err(RigError::io("cannot list the tests"))?.stdout;
    if !String::from_utf8_lossy(&listed).lines().any(|line| line == format!("{name}: test")) {
        return Err(RigError::refused("a test")(format!("this program has none called {name}")));
    }
    let mut command = words(
        "setpriv --pdeathsig KILL unshare --net --mount --pid --fork --kill-child --mount-proc --",
    );
    // The shell buries orphans while it waits; without the second command it would become the
    // program instead of starting it.
    command.args(["sh", "-c", "\"$@\"; exit $?", "sh"]).arg(program);
    // Also one that `tests/run` leaves out: whoever asked for it has decided that.
    command
        .args(["--exact", name, "--include-ignored", "--nocapture"])
        .env(INSIDE, "yes")
        .stdin(Stdio::null());
    command.status().map_err(|source| RigError::Start { program: "unshare".to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    #[test]
    fn a_test_that_is_not_there_is_no_success() {
        let error = run_inside("world::inside::tests::nobody").unwrap_err();
        let why = error.source().map(ToString::to_string).unwrap_or_default();
        assert!(why.contains("none called world::inside::tests::nobody"), "{error}: {why}");
    }
}
