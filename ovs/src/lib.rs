//! Speaks OpenFlow 1.3 and OVSDB with a switch, and has no opinion.
//!
//! Used by the controller. Two protocols in sibling modules that never import each other, and one
//! use of OVSDB on top:
//!
//! ```text
//!  openflow/  codec (the crate rust-openflow) ─ session (pure) ─ io (tokio)
//!  ovsdb/     value, wire, operation (pure)   ─ session (pure) ─ io (tokio)
//!  qos/       rows of QoS and Queue: read, reserve, change, release
//! ```
//!
//! Deliberately *not* here: why a queue is wanted, for whom, and how much; TLS (every connection
//! runs over any `AsyncRead + AsyncWrite`, so whoever has certificates wraps the stream); LLDP.
//!
//! A clock is read in `clock.rs` and tasks are started in `tasks.rs` only.

mod clock;
mod tasks;

pub mod endpoint;
pub mod openflow;
pub mod ovsdb;
pub mod qos;

pub use endpoint::{Endpoint, EndpointError};
