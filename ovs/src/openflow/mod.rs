//! OpenFlow 1.3 with one switch or many.
//!
//! [`codec`] is the crate `rust-openflow`; [`session`] is what both ends have agreed on and wait
//! for, pure; [`io`] is sockets and tasks. Not here: what flows are for.

pub mod io;
pub mod session;

pub use rust_openflow as codec;
pub use rust_openflow::{
    Action, Failure, Instruction, MacAddr, Masked, Match, Message, Oxm, PortNo, flow, meter,
    multipart, packet, switch,
};

pub use io::{
    Listener, SwitchEvent, SwitchHandle, Switches, WhatHappened, connect, listen, run_connection,
};
pub use session::{Answer, RequestError, SessionError, Settings};
