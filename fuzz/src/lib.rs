//! What holds for any bytes that a peer may send, one check for each codec: it does not panic, reads
//! the same however the bytes were cut, and reads again what it has written.
//!
//! ```text
//!   tests/fuzz             src/bin/NAME.rs: libFuzzer looks for bytes for which NAME does not hold
//!   cargo test ... corpus  tests/tests/corpus.rs: holds for every seed, and for what was found once
//! ```
//!
//! Both begin with `corpus/NAME/`: seeds, made of captured bytes by [`seeds`] (`cargo run -p lifeboat-tests --bin lifeboat-seeds`), and
//! `found-*`, inputs that once broke something. Deliberately not here: what the bytes mean.

pub mod disk_frame;
pub mod lldp;
pub mod openflow;
pub mod pack;
pub mod page_frame;
pub mod pieces;
pub mod return_path;
pub mod seeds;
pub mod stream;

/// A codec's check: it panics where something does not hold.
pub type Check = fn(&[u8]);

/// Every check by the name of its target and of its corpus.
pub const CHECKS: [(&str, Check); 7] = [
    ("stream", stream::holds),
    ("return_path", return_path::holds),
    ("pack", pack::holds),
    ("page_frame", page_frame::holds),
    ("disk_frame", disk_frame::holds),
    ("lldp", lldp::holds),
    ("openflow", openflow::holds),
];
