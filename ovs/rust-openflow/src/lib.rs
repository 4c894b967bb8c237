//! A typed OpenFlow 1.3 codec: bytes to messages and back, and nothing else.
//!
//! Used by whatever speaks OpenFlow 1.3 with a switch (or plays one in a test). The two verbs are
//! [`decode`], which takes one whole message from the front of a buffer, and [`encode`], which
//! appends one. Both are pure.
//!
//! Deliberately *not* here: sockets, sessions, timers, versions other than 1.3 (only their HELLO
//! is understood, so that the two sides can find out that they have none in common), groups,
//! table features, and experimenter messages, which are kept as raw bytes.
//!
//! ```text
//!  bytes ──▶ header ──▶ message ──▶ switch / flow / packet / meter / multipart
//!                                      └── matching (OXM), action, instruction
//! ```
//!
//! What a peer says about lengths is compared with what has arrived before it is believed; no
//! input makes the decoder panic, and it never allocates more than a small multiple of the bytes
//! it was given. Section numbers in the docs are those of the OpenFlow Switch Specification 1.3.5.

mod wire;

pub mod action;
pub mod failure;
pub mod flow;
pub mod header;
pub mod hello;
pub mod instruction;
pub mod matching;
pub mod message;
pub mod meter;
pub mod multipart;
pub mod packet;
pub mod switch;
pub mod types;

pub use action::Action;
pub use failure::Failure;
pub use header::{DecodeError, EncodeError, Header, MESSAGE_LIMIT, VERSION};
pub use instruction::Instruction;
pub use matching::{Masked, Match, Oxm};
pub use message::{Message, decode, decode_within, encode};
pub use types::{FixedText, MacAddr, PortNo};
pub use wire::BodyError;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;
