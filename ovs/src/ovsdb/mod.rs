//! OVSDB (RFC 7047) with one database server.
//!
//! ```text
//!  bytes ─ wire ─▶ JSON-RPC ─ session ─▶ answers and updates ─ io ─▶ Client, Monitor
//!          value, operation: what transactions and rows are made of
//! ```
//!
//! Used by [`crate::qos`] and the controller. Not here: the schema (columns are asked for by name,
//! and one that a server lacks is that server's error), locks, `monitor_cond`, TLS.

pub mod cache;
pub mod io;
pub mod operation;
pub mod session;
pub mod value;
pub mod wire;

pub use cache::{Cache, Change};
pub use io::{Client, ClientError, Monitor, Status};
pub use operation::{Condition, Mutation, Operation, Outcome, TransactError};
pub use session::{RequestError, SessionError, Settings};
pub use value::{Atom, Datum, Row, Uuid};
pub use wire::WireError;
