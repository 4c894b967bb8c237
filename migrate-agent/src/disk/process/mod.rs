//! The process that moves one VM's disks away, and the agent's hand on it.
//!
//! A guest whose disks are on a mount must not notice when the agent dies, and no process may serve a
//! mount that it uses itself. So the FUSE server, the mirror and the sending side of `sync/` live in
//! `lifeboat-disk move`, one for each VM that leaves; the agent starts it, swaps QEMU onto its
//! mounts, and steers it over a unix socket. Beside it `lifeboat-disk hold` keeps the mounts alive
//! when it is killed. Why two: docs/decisions/0031.
//!
//! | file | what it is |
//! |---|---|
//! | `control` | the words between the two, and their bytes: pure |
//! | `setting` | what the process is started with, and where its files are |
//! | `mover` | the process itself |
//! | `sending` | its transfer: connects, goes on after a lost connection |
//! | `client` | the agent's side: start it, start it again, ask it |
//!
//! Deliberately not here: QMP (`source/disk.rs` swaps), and what arrives elsewhere
//! (`sync::receive`, in the destination's agent).

pub mod client;
pub mod control;
pub mod mover;
mod sending;
pub mod setting;
