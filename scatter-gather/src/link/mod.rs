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
//! Post-copy and scatter-gather carry the stream without the pages of the guest's RAM, and tell in
//! NOTES what is where. Two more connections, opened by the source before END and again whenever
//! they break, bring the pages: one for those that the guest waits for, one for the background.
//!
//! ```text
//!  on the first link, before END:   NOTES {..} ..  [KEY]
//!  HELLO {purpose: serve ..}             ------->
//!                                        <-------   WELCOME
//!                                        <-------   FETCH {runs}
//!  PAGES {..} or COMPRESSED {..}         ------->
//!  PACK {..} PARITY {..} .. SCATTERED    ------->   (scatter-gather, on the background's)
//!  on the first link, after RUNNING:     <-------   RELEASED {generation}
//! ```
//!
//! [`frame`] turns these into bytes and back and is all there is here: no socket, no clock.

pub mod frame;
pub mod pages;

pub use frame::{Ended, Frame, FrameError, Hello, Purpose, Standing, decode, encode};
