//! The FUSE layer: a directory of disk images, passed through, watched and limited.
//!
//! `disk/`'s sync drivers listen in as its [`Hook`]; the disk process serves it. QEMU is swapped onto
//! the mount for a migration only (`qemu::swap`); idle, it has its images open natively and this
//! costs nothing.
//!
//! Four storeys, each testable alone: `memory` (bytes that outlive the process), `abi` (the
//! kernel's messages), `serve` with `request` (what is answered, and when), `images` (files).
//! `holder` keeps a dead server's mount alive.
//!
//! Why not the crate `fuser`, and why no kernel pass-through: docs/decisions/0020.

pub mod abi;
pub mod holder;
mod image_lock;
mod images;
mod later;
mod limit;
mod memory;
mod readers;
mod request;
mod serve;
mod server;

pub use image_lock::Use;
pub use images::Image;
#[cfg(test)]
pub(crate) use images::Images;
pub use limit::{DiskLimit, SLOWEST};
pub use memory::{MAX_DATA, MemoryError};
pub use request::{Expiry, Hook, Op, PassThrough, Request};
pub use server::{ServeError, Server, unmount};
