//! What may go wrong between a migration and its stores, so that each can be answered in its own
//! way: full is another place, restarted is a lost store, late may be tried again.

use std::path::PathBuf;
use std::time::Duration;

use redis::{ErrorKind, RedisError};
use thiserror::Error;

use super::client::RunId;
use super::keys::Key;

/// Why a store did not do what it was asked.
#[derive(Debug, Error)]
pub enum StoreError {
    /// It has no room (`maxmemory` without eviction). What it acknowledged before is still there.
    #[error("the store is full: {0}")]
    Full(String),
    /// Another process than before answers: everything in it is gone.
    #[error("the store was restarted (run {found:?} in place of {expected:?}): its pages are lost")]
    Restarted {
        /// The run that the pages were put into.
        expected: RunId,
        /// The run that answers.
        found: RunId,
    },
    /// It has lost what it acknowledged.
    #[error("the store does not have {0}")]
    Missing(Key),
    /// No answer in time.
    #[error("the store did not answer in time")]
    Late,
    /// The connection is broken; reconnect, and compare the run id.
    #[error("the connection to the store broke: {0}")]
    Broken(#[source] RedisError),
    /// It refuses the command or the login.
    #[error("the store refused: {0}")]
    Refused(#[source] RedisError),
    /// An answer that makes no sense.
    #[error("the store answered {what} that makes no sense")]
    Nonsense {
        /// What was asked for.
        what: &'static str,
    },
}

impl StoreError {
    /// Is everything that was put there lost?
    #[must_use]
    pub fn is_loss(&self) -> bool {
        matches!(self, Self::Restarted { .. } | Self::Missing(_))
    }
}

impl From<RedisError> for StoreError {
    fn from(error: RedisError) -> Self {
        if error.code() == Some("OOM") {
            return Self::Full(error.detail().unwrap_or_default().to_owned());
        }
        if error.kind() == ErrorKind::AuthenticationFailed {
            return Self::Refused(error);
        }
        if error.is_timeout() {
            return Self::Late;
        }
        if error.is_io_error() || error.is_connection_dropped() || error.is_unrecoverable_error() {
            return Self::Broken(error);
        }
        Self::Refused(error)
    }
}

/// Why a server does not run.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The program cannot be started.
    #[error("cannot start {program:?}: {source}; is redis-server installed?")]
    Program {
        /// Its path.
        program: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The folder cannot be used.
    #[error("cannot use {folder:?} for a store: {source}")]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A store runs there already.
    #[error("a store runs in {0:?} already; adopt it, or end it first")]
    Occupied(PathBuf),
    /// It ended at once.
    #[error("redis-server ended with {status}; the last it wrote: {log}")]
    Ended {
        /// How.
        status: std::process::ExitStatus,
        /// The end of its log.
        log: String,
    },
    /// It runs and does not answer.
    #[error("redis-server did not answer within {0:?}")]
    NotReady(Duration),
    /// It answers, but not as a store of ours.
    #[error("the store that runs there cannot be used: {0}")]
    Client(#[from] StoreError),
}
