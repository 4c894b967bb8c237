//! Running programs, and caring about how they end.
//!
//! Used by the rest of the rig. Long-running ones are held by [`Running`], which ends them.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::RigError;

/// Runs a program to its end and returns what it printed.
///
/// # Errors
/// When it cannot be started, or fails; with what it printed.
pub fn run(command: &mut Command) -> Result<String, RigError> {
    const SAID_BYTES: usize = 2000;
    let line = describe(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| RigError::Start { program: line.clone(), source })?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(said);
    }
    let mut said = said + &String::from_utf8_lossy(&output.stderr);
    let cut = said.char_indices().map(|(at, _)| at).find(|&at| at >= SAID_BYTES);
    said.truncate(cut.unwrap_or(said.len()));
    Err(RigError::Failed { command: line, status: output.status, said: said.trim().to_owned() })
}

/// A program from a line of words, none of which holds a space.
#[must_use]
pub fn words(line: &str) -> Command {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words);
    command
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// A program that runs until this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
}

impl Running {
    /// Starts it, with all that it prints in a file.
    ///
    /// # Errors
    /// When the file cannot be made or the program cannot be started.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self, RigError> {
        let program = describe(command);
        let cannot = |source| RigError::Start { program: program.clone(), source };
        let out = File::create(log).map_err(cannot)?;
        let error = out.try_clone().map_err(cannot)?;
        let child = command.stdin(Stdio::null()).stdout(out).stderr(error).spawn();
        Ok(Self { child: child.map_err(cannot)? })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_fails_is_quoted_with_what_it_said() {
        let error = run(words("ls").arg("/no such file")).unwrap_err().to_string();
        assert!(error.starts_with("`ls /no such file` ended with"), "{error}");
        assert!(error.contains("cannot access"), "{error}");
        assert_eq!(run(&mut words("echo a b")).unwrap(), "a b\n");
        let missing = run(&mut words("no-such-program x")).unwrap_err();
        assert!(matches!(missing, RigError::Start { .. }), "{missing}");
    }
}
