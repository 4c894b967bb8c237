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
//! | `mover` | the process at the source |
//! | `arrival` | the process at the destination, of disks that may follow their VM |
//! | `mounts`, `answering` | what both have: mounts, and answers to the agent |
//! | `sending` | its transfer: connects, goes on after a lost connection |
//! | `client` | the agent's side: start it, start it again, ask it |
//! | `plain`, `tracked` | a mount for whatever is not QEMU |
//!
//! A guest that may run before its disks are complete has the same at its destination: `lifeboat-disk
//! arrive` receives, and answers its reads (docs/decisions/0044).
//!
//! Deliberately not here: QMP (`source/disk.rs` and `destination/resting.rs` swap), and what arrives
//! before its VM as a whole (`sync::receive`, in the destination's agent).

mod answering;
pub mod arrival;
pub mod client;
pub mod control;
mod mounts;
pub mod mover;
pub mod plain;
mod sending;
pub mod setting;
mod tracked;
