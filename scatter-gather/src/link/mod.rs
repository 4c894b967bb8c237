//! The page link: what two agents say to each other while a VM moves.
//!
//! One connection per migration, from the source's agent to the destination's, carries QEMU's
//! stream and the hand-over's few words in order; that order is what lets END mean "you have it
//! all" and COMMIT mean "after LOADED". A short connection of the same kind asks what became of
//! a hand-over after a crash.
//!
//! ```text
//!  source's agent                                   destination's agent
//!  HELLO {purpose: migrate, token, ...}  ------->
//!                                        <-------   WELCOME
//!  STREAM {bytes} ...                    ------->
//!                                        <-------   ACK {bytes written to QEMU} ...
//!  END {total, digest}                   ------->
//!                                        <-------   LOADED {generation}
//!  COMMIT {generation}                   ------->
//!                                        <-------   RUNNING {generation}
//!  either side, before COMMIT:   ABORT {reason}
//!  destination, when it never will:      <-------   REFUSED {reason}
//!
//!  HELLO {purpose: ask ..}               ------->   (either agent may ask the other)
//!                                        <-------   STANDING {..}
//!  COMMIT {generation}, if it was lost   ------->
//!                                        <-------   RUNNING {generation}
//! ```
//!
//! [`frame`] turns these into bytes and back and is all there is here: no socket, no clock.

pub mod frame;

pub use frame::{Ended, Frame, FrameError, Hello, Purpose, Standing, decode, encode};
