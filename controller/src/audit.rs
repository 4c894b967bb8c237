//! Who did what, and what came of it: one JSON line each, appended and on the disk before the
//! operator gets the answer. Nothing here is ever rewritten.
//!
//! Written by `service` for each command. Deliberately not here: what the machine did by itself;
//! that is in the journal and the report.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::Serialize;

use crate::clock::UnixMs;

/// What went wrong with the audit log.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// It cannot be opened or written; no command is carried out without it.
    #[error("the audit log {path} cannot be written; make room or correct its permissions")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// An entry that JSON cannot hold.
    #[error("an audit entry cannot be written as JSON")]
    Encode {
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
}

/// One command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AuditEntry<'a> {
    /// When it was answered, Unix milliseconds.
    pub at_unix_ms: UnixMs,
    /// Who, as the certificate or the socket says.
    pub operator: &'a str,
    /// How they were recognised: `certificate`, `unix socket`, `loopback`.
    pub by: &'a str,
    /// What: the command with its arguments.
    pub command: &'a str,
    /// `accepted` or the refusal's sentence.
    pub outcome: &'a str,
    /// The evacuation that it concerns; empty for none.
    pub evacuation: &'a str,
    /// The controller's term.
    pub term: u64,
}

/// The log, open for appending.
#[derive(Debug)]
pub struct AuditLog {
    path: PathBuf,
    file: Mutex<File>,
}

impl AuditLog {
    /// Opens `audit.jsonl` in `state_dir`, readable by its owner only.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(state_dir: &Path) -> Result<Self, AuditError> {
        let path = state_dir.join("audit.jsonl");
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
        match file {
            Ok(file) => Ok(Self { path, file: Mutex::new(file) }),
            Err(source) => Err(AuditError::Write { path, source }),
        }
    }

    /// Appends one line; it is on the disk when this returns.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, entry: &AuditEntry<'_>) -> Result<(), AuditError> {
        let mut line = serde_json::to_vec(entry).map_err(|source| AuditError::Encode { source })?;
        line.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // One write call: a line is never torn by another process that appends.
        let written = file.write_all(&line).and_then(|()| file.sync_data());
        written.map_err(|source| AuditError::Write { path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_appended_one_line_each_and_survive_reopening() {
        let dir = tempfile::tempdir().unwrap();
        for command in ["cordon h1", "evacuate h1\nnot a second line"] {
            let log = AuditLog::open(dir.path()).unwrap();
            let entry = AuditEntry {
                at_unix_ms: UnixMs(7),
                operator: "ann",
                by: "certificate",
                command,
                outcome: "accepted",
                evacuation: "",
                term: 3,
            };
            log.write(&entry).unwrap();
        }
        let text = std::fs::read_to_string(dir.path().join("audit.jsonl")).unwrap();
        assert_eq!(text.lines().count(), 2);
        let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first["operator"], "ann");
    }
}
