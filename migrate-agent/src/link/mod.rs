//! Page links on sockets: connect, accept, frames in and out, the relay of QEMU's stream.
//!
//! Used by `source.rs`, `destination.rs` and `registry/`. The frames themselves are
//! `lifeboat_scatter_gather::link`; what they mean is `handover/`. Nothing here decides.
//!
//! A link is TLS 1.3 between two agents' certificates. Without certificates it is served on
//! loopback only, which is what tests on one machine use.

pub mod io;
pub mod relay;
mod socket;

pub use io::{FrameReader, FrameWriter, LinkError};
pub use socket::{Listener, Peer, connect};
