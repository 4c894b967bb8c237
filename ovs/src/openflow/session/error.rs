//! Why a session ends, and why a request has no answer.
//!
//! Used by [`super`] and by whoever asks a switch. Not here: what the operating system says; that is
//! the driver's.

use std::time::Duration;

use rust_openflow::multipart::Mismatch;
use rust_openflow::{DecodeError, EncodeError, Failure};

/// Why a session has ended, or could not begin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The switch does not speak 1.3.
    #[error(
        "the switch speaks OpenFlow {} and we speak 1.3: \
         ovs-vsctl set bridge BRIDGE protocols=OpenFlow13", versions(.theirs)
    )]
    NoCommonVersion {
        /// Wire versions: 1 is OpenFlow 1.0, 4 is 1.3.
        theirs: Vec<u8>,
    },
    /// The switch refuses our HELLO.
    #[error("the switch refuses the connection: {failure}")]
    Refused {
        /// What it says.
        failure: Failure,
    },
    /// No features in time.
    #[error("the switch has not finished the handshake within {within:?}")]
    SlowHandshake {
        /// The limit.
        within: Duration,
    },
    /// No sign of life after an echo request.
    #[error("the switch has been silent for {silent:?}")]
    Silent {
        /// For how long.
        silent: Duration,
    },
    /// It sends what cannot be followed any further.
    #[error("the switch sends what is not OpenFlow 1.3")]
    Garbled(#[from] DecodeError),
    /// A message out of order in the handshake.
    #[error("message type {kind} came where {wanted} was due")]
    OutOfOrder {
        /// What came.
        kind: u8,
        /// What was due.
        wanted: &'static str,
    },
}

fn versions(theirs: &[u8]) -> String {
    let name = |wire: &u8| format!("1.{}", u32::from(*wire).saturating_sub(1));
    if theirs.is_empty() {
        return "no version that exists".to_owned();
    }
    theirs.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// Why a request has no answer, or the answer is no.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The switch says no.
    #[error("the switch refuses: {failure}")]
    Refused {
        /// What it says.
        failure: Failure,
        /// Which message of the request, from 0.
        index: usize,
    },
    /// No answer in time. The switch may have done it.
    #[error("no answer from the switch within {within:?}")]
    TimedOut {
        /// The limit.
        within: Duration,
    },
    /// The connection has ended first. The switch may have done it.
    #[error("the connection to the switch has ended before its answer")]
    Disconnected,
    /// It does not fit a message.
    #[error(transparent)]
    TooLarge(#[from] EncodeError),
    /// Too much is waiting already; nothing was sent.
    #[error("too many requests wait for the switch already")]
    Congested,
    /// The parts of an answer do not go together.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// More parts than we accept.
    #[error("the answer has more than {limit} parts")]
    TooManyParts {
        /// The limit.
        limit: usize,
    },
    /// An answer of another type than the question.
    #[error("message type {kind} came as the answer")]
    WrongAnswer {
        /// Its type.
        kind: u8,
    },
}

impl RequestError {
    /// Whether the same request may succeed later.
    pub fn may_retry(&self) -> bool {
        matches!(self, Self::TimedOut { .. } | Self::Disconnected | Self::Congested)
    }
}
