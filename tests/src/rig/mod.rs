//! Real components, raised and driven: namespaces, Open vSwitch, traffic, QEMU, agents.
//!
//! Used by the experiments. Everything is made inside namespaces that [`private`] has entered (a
//! [`cloud`] makes its own), so
//! it vanishes with the process that asked for them, however that ends; nothing here needs to be
//! undone, and nothing touches the machine's own network or switch.

pub mod agents;
pub mod cloud;
pub mod cpu;
pub mod direct;
pub mod echo;
pub mod network;
pub mod private;
pub mod program;
pub mod rack;
pub mod stores;
pub mod switch;
pub mod traffic;
pub mod userfaultfd;

use std::io;

/// What a rig can fail at. It is all the machine's: none of it is what an experiment asks about.
#[derive(Debug, thiserror::Error)]
pub enum RigError {
    /// A program is missing or cannot be started.
    #[error("cannot start {program}: run lab/install first")]
    Start {
        /// The program.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A program that had to succeed did not.
    #[error("`{command}` ended with {status}: {said}")]
    Failed {
        /// The program and its arguments.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it printed, shortened.
        said: String,
    },
    /// A file, socket or namespace.
    #[error("{what}")]
    Io {
        /// What was to be done.
        what: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {seconds} s")]
    TooLate {
        /// What was waited for.
        what: String,
        /// For how long.
        seconds: u64,
    },
    /// The component under test refused, where it should not have.
    #[error("{what} was refused")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Its words.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl RigError {
    /// For `map_err` on what the system says.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// For `map_err` on what a component says.
    pub fn refused<E>(what: &'static str) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        move |source| Self::Refused { what, source: source.into() }
    }
}
