//! The Controller service on its sockets: who may call, and which status code an error is.
//!
//! On TCP with certificates a caller must be an `operator` or a `controller`; an agent's certificate
//! opens nothing here. Without certificates only loopback and unix sockets are served; there the
//! machine's own permissions guard the door (the socket belongs to its owner alone). Deliberately
//! not here: what a command does (`service`).

mod caller;
mod methods;
mod serve;

pub use serve::{ServeError, serve};
