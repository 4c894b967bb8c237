//! Speaks OpenFlow 1.3 and OVSDB with a switch, and has no opinion.
//!
//! Used by the controller. Two protocols in sibling modules that never import each other, and one
//! use of OVSDB on top:
//!
//! ```text
//!  openflow/  codec (the crate rust-openflow) ─ session (pure) ─ io (tokio)
//!  ovsdb/     value, wire, operation (pure)   ─ session (pure) ─ io (tokio)
//!  lldp       frames that tell which ports face each other (pure)
//!  qos/       rows of QoS and Queue: read, reserve, change, release
//! ```
//!
//! Deliberately *not* here: why a queue is wanted, for whom, and how much; and where certificates
//! lie ([`Tls`] takes their text).
//!
//! A clock is read in `clock.rs` and tasks are started in `tasks.rs` only.

mod clock;
mod tasks;

pub mod endpoint;
pub mod lldp;
pub mod openflow;
pub mod ovsdb;
pub mod qos;
pub mod tls;

pub use endpoint::{Endpoint, EndpointError};
pub use tls::{Tls, TlsError};
