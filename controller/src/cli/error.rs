//! Why a command failed, for the person who typed it.

use std::path::PathBuf;

use crate::config::ConfigError;
use crate::daemon::DaemonError;
use crate::tls::TlsError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The controller cannot be reached.
    #[error(
        "the controller at {server} cannot be reached ({detail}); is `lifeboat controller` running, and is --server (or LIFEBOAT_SERVER) right?"
    )]
    Connect {
        /// The address.
        server: String,
        /// What the transport says.
        detail: String,
    },
    /// An address that is served with certificates only.
    #[error(
        "the controller at {server} is reached with certificates only, since others can reach that address too; name the directory with yours: --tls-dir DIR (`lifeboat certs init` makes them, with the role of an operator)"
    )]
    NeedsCertificates {
        /// The address.
        server: String,
    },
    /// An address that is none.
    #[error("--server {server} is no address: write unix:/path/to/socket or HOST:PORT")]
    Server {
        /// What was given.
        server: String,
    },
    /// The controller said no, in these words.
    #[error("{sentence}")]
    Refused {
        /// Its words.
        sentence: String,
    },
    /// The answer broke off.
    #[error(
        "the connection to the controller broke while {doing}; the evacuation goes on, see `lifeboat status`"
    )]
    Broken {
        /// What was being done.
        doing: &'static str,
    },
    /// A question that nobody can answer.
    #[error(
        "evacuate asks before it begins, and there is no terminal to ask on; add --yes, or look first with `lifeboat plan`"
    )]
    NoTerminal,
    /// Ctrl-C would not be heard.
    #[error("Ctrl-C cannot be listened for; nothing was changed")]
    Signals(#[source] std::io::Error),
    /// The operator's no.
    #[error("nothing was changed")]
    Declined,
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The controller itself.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A file that cannot be written.
    #[error("{file} cannot be written")]
    Write {
        /// The file.
        file: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file that is there already.
    #[error(
        "{file} is there already; certificates are never overwritten: name another directory, or move it away"
    )]
    Exists {
        /// The file.
        file: PathBuf,
    },
    /// A certificate that cannot be made.
    #[error("the certificate of {of} cannot be made")]
    Certificate {
        /// Whose.
        of: String,
        /// Why not.
        #[source]
        source: rcgen::Error,
    },
    /// A reply that JSON cannot hold.
    #[error("the reply cannot be printed as JSON")]
    Json(#[source] serde_json::Error),
    /// The output is closed.
    #[error("the output cannot be written")]
    Output(#[source] std::io::Error),
}

impl From<tonic::Status> for CliError {
    fn from(status: tonic::Status) -> Self {
        Self::Refused { sentence: status.message().to_owned() }
    }
}
