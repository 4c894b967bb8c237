//! What can be wrong with the configuration, always with the line to look at.

use std::path::{Path, PathBuf};

use lifeboat_topology::TopologyError;

/// Why a configuration is not taken.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration {file} cannot be read")]
    Read {
        /// The file.
        file: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Not TOML, a wrong type, a missing or an unknown key.
    #[error("{}:{line}: {key}: {problem}", file.display())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key on that line, or the table that lacks one.
        key: String,
        /// What is wrong, in one line.
        problem: String,
    },
    /// The end of a link is no port of anything.
    #[error("{}:{line}: `{given}` is no end of a link: write SWITCH:PORT or HOST:PORT; known are {known}", file.display())]
    UnknownEnd {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What was given.
        given: String,
        /// The names that can stand before the colon.
        known: String,
    },
    /// The parts do not make a network.
    #[error("{}: the network does not fit together", file.display())]
    Network {
        /// The file.
        file: PathBuf,
        /// Which part, and why.
        #[source]
        source: TopologyError,
    },
    /// Something that is served to everybody without certificates.
    #[error("{}: listen = \"{address}\" needs certificates: set tls_dir (see `lifeboat certs init`), or listen on 127.0.0.1 or a unix socket", file.display())]
    Unprotected {
        /// The file.
        file: PathBuf,
        /// The address.
        address: String,
    },
    /// An agent across the network without certificates.
    #[error("{}: the agent of host {host} at {address} is reached over the network and needs certificates: set tls_dir (see `lifeboat certs init`)", file.display())]
    UnprotectedAgent {
        /// The file.
        file: PathBuf,
        /// The host.
        host: String,
        /// Its agent's address.
        address: String,
    },
    /// TLS with switches, without certificates for it.
    #[error("{}: {address} speaks TLS and needs certificates: set controller.switch_tls_dir to a directory with ca.pem (of the switches), cert.pem and key.pem, as `ovs-pki` makes them", file.display())]
    NoSwitchCertificates {
        /// The file.
        file: PathBuf,
        /// What speaks it.
        address: String,
    },
    /// A figure out of its range.
    #[error("{}: {key} = {given} is out of range: {range}", file.display())]
    Range {
        /// The file.
        file: PathBuf,
        /// The key.
        key: &'static str,
        /// What was given.
        given: String,
        /// What it may be.
        range: &'static str,
    },
    /// A host and its bridge whose names are too long together.
    #[error("{}: host {host} with bridge `{bridge}` makes no name for a switch; shorten one of them", file.display())]
    BridgeName {
        /// The file.
        file: PathBuf,
        /// The host.
        host: String,
        /// The bridge.
        bridge: String,
    },
}

/// The line, from 1, that holds byte `at`.
pub(super) fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1
}

impl ConfigError {
    /// The parser's error with the line and the key that it speaks of.
    pub(super) fn from_toml(file: &Path, text: &str, error: &toml::de::Error) -> Self {
        let line = line_of(text, error.span().map_or(0, |span| span.start));
        let shown = text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
        let key = shown.split('=').next().unwrap_or_default().trim().to_owned();
        let problem = error.message().replace('\n', "; ");
        Self::Syntax { file: file.to_owned(), line, key, problem }
    }
}
