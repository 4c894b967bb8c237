//! Brings an image to another host while its VM writes to it, and keeps both in step until the VM
//! has moved.
//!
//! `source.rs` and `destination.rs` of the agent use it. Two papers in one machine: MigrateFS' three
//! phases (all blocks, dirty blocks, every write on both sides) and LiveFS' five (watch, hot segments,
//! what changed, hand over, the rest eagerly and on demand); they differ in two numbers.
//!
//! | file | what it is |
//! |---|---|
//! | `phases` | the source's phases: pure |
//! | `rank` | which segments go first, of a disk that follows its VM: pure |
//! | `heat` | which segment is next, where everything goes first: pure |
//! | `versions`, `incoming` | what the destination has, and what is newer: pure |
//! | `frame` | the frames between the two: pure |
//! | `ledger` | what is on its way |
//! | `mirror` | the hook in the FUSE layer: marks, or sends and waits |
//! | `within` | keeps a guest within the link while every change goes over it at once |
//! | `send` with `connection`, `passes` and `blocks` | the source's driver |
//! | `receive` | the destination's |
//! | `kept` | what outlives it, of disks that may follow their VM |
//! | `arriving` | its hook: a guest that runs before its disk is complete |
//!
//! Deliberately not here: memory, COMMIT, QMP.

pub mod arriving;
pub mod blocks;
mod connection;
pub mod frame;
pub mod heat;
pub mod incoming;
pub mod kept;
pub mod ledger;
pub mod mirror;
mod passes;
pub mod phases;
pub mod rank;
pub mod receive;
pub mod send;
pub mod stream;
pub mod versions;
pub mod within;
