//! Runs the few system programs that the agent needs: `ip`, `ovs-vsctl`, `tc`.
//!
//! Used by `vms/` and `switch/`. Arguments go straight to the program, no shell reads them; every
//! call has a time limit, because `ovs-vsctl` waits for a daemon that may not be there.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// How long a program may take.
pub const LIMIT: Duration = Duration::from_secs(15);

/// Why a program did not do what it was called for.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// It cannot be started.
    #[error("cannot run `{command}`; is it installed?")]
    Start {
        /// Program and arguments.
        command: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It failed.
    #[error("`{command}` failed: {said}")]
    Failed {
        /// Program and arguments.
        command: String,
        /// Its standard error, shortened.
        said: String,
    },
    /// It did not end.
    #[error("`{command}` has not ended within {LIMIT:?}")]
    TooSlow {
        /// Program and arguments.
        command: String,
    },
}

/// Runs `program` and returns its standard output.
///
/// # Errors
/// When it cannot be started, fails, or takes longer than [`LIMIT`] (it is killed then).
pub async fn run(program: &str, arguments: &[&str]) -> Result<String, ProgramError> {
    let command = || format!("{program} {}", arguments.join(" "));
    tracing::trace!(program, ?arguments, "running a program");
    let running =
        Command::new(program).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    let output = match tokio::time::timeout(LIMIT, running).await {
        Ok(Ok(output)) => output,
        Ok(Err(source)) => return Err(ProgramError::Start { command: command(), source }),
        Err(_) => return Err(ProgramError::TooSlow { command: command() }),
    };
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said: String = String::from_utf8_lossy(&output.stderr).trim().chars().take(400).collect();
    Err(ProgramError::Failed { command: command(), said })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_that_fails_is_quoted() {
        assert_eq!(run("echo", &["a;b", "$HOME"]).await.unwrap(), "a;b $HOME\n");
        let error = run("ls", &["/nonexistent-lifeboat"]).await.unwrap_err().to_string();
        assert!(error.contains("ls /nonexistent-lifeboat") && error.contains("No such"), "{error}");
        let error = run("no-such-program-of-ours", &[]).await.unwrap_err();
        assert!(matches!(error, ProgramError::Start { .. }));
    }
}
