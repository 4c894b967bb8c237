//! The words that Lifeboat's rooms share: ids, units, terms, and the gRPC messages.
//!
//! Every room but `ovs/` uses this one, and it uses none. There is no I/O here, no task and no
//! decision: a type is here when two rooms must mean the same thing by it.

pub mod ids;
pub mod roles;
pub mod terms;
pub mod units;

/// What a controller asks of an agent (`proto/agent.proto`).
#[allow(
    missing_docs,
    clippy::all,
    clippy::too_many_lines,
    reason = "generated; documented in its proto"
)]
pub mod agent {
    tonic::include_proto!("lifeboat.agent.v1");
}

/// What an operator asks of the controller (`proto/controller.proto`).
#[allow(
    missing_docs,
    clippy::all,
    clippy::too_many_lines,
    reason = "generated; documented in its proto"
)]
pub mod controller {
    tonic::include_proto!("lifeboat.controller.v1");
}

mod convert;

/// The metadata of an agent's refusal that names the intermediary at which it would have failed.
pub const FAILED_STORE: &str = "lifeboat-failed-store";
