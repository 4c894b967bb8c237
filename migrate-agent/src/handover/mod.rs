//! The hand-over: who owns a VM, and the one step by which that changes.
//!
//! Used by `source.rs` and `destination.rs`, which drive it, and by everything that is about to
//! start a guest, which asks it ([`store`]). There is one hand-over for every mode: pre-copy,
//! post-copy, scatter-gather and cold migration differ only in where the pages wait.
//!
//! ```text
//!            source                                      destination
//!
//!          Sending  (owns g)                             Receiving
//!             |                                              | QEMU has loaded, stands paused
//!             |                                          [Loaded g+1]   durable, then LOADED
//!             | <------------------- LOADED ----------------'|
//!         [Ceded g+1]   durable: THE POINT OF NO RETURN      |
//!             | -------------------- COMMIT --------------> [Owner g+1]  durable, then cont
//!             |                                              |
//!             | <------------------- RUNNING ----------------' RESUME seen
//!      [Ceded, confirmed]
//!        QEMU may quit
//! ```
//!
//! States in brackets are fsynced before the next arrow leaves. From them follows everything:
//!
//! * Before `Ceded` is durable, any failure ends with the guest running at the source.
//! * After it, the source never resumes by itself. What it does not know is `uncertain`, and it
//!   goes on asking. Two things end that: *proof* (the destination says that it runs, or has
//!   durably refused), or an operator's `claim --fenced`.
//! * The destination, once `Loaded`, may not discard on its own: the source may have ceded. It
//!   asks; a source that durably gave up says so, and one that ceded thereby delivers COMMIT.
//! * In post-copy and scatter-gather the source's stopped QEMU is the guest's memory. RUNNING does
//!   not end it then: the destination says "gathering" for as long as it wants pages of it, which
//!   is on its disk too ([`gathering`]), and RELEASED takes RUNNING's place.
//! * So it is where its disks are to follow it ([`rest`]): the destination says "gathering" for as
//!   long as a block is missing there.
//! * Neither side ever answers from memory: a [`Standing`] is read off a durable record.
//!
//! [`source`] and [`destination`] are pure: `apply(event, &mut actions)`. The drivers perform the
//! actions in order, and `Persist` returns only when the record is on the disk.
//!
//! Why not QEMU's own post-copy hand-over: its point of no return is when the source *sends* the
//! package, and a source whose socket breaks after that resumes; both were seen to run at once
//! (docs/decisions/0005-one-hand-over.md).

pub mod destination;
pub mod gathering;
pub mod record;
pub mod rest;
pub mod source;
pub mod store;
pub mod storing;

#[cfg(test)]
mod simulation;

pub use lifeboat_scatter_gather::link::Standing;
pub use record::{Here, Record};
