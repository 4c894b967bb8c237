//! QEMU's migration stream and its return path: bytes to records and back; pure.
//!
//! Used by post-copy and scatter-gather, which must know each page: `source.rs` reads what the
//! source's QEMU writes, `destination.rs` writes what the destination's QEMU reads. Plain pre-copy
//! does not use it; there the bytes are carried unread.
//!
//! ```text
//!  "QEVM" 3, CONFIGURATION                                       reader: Header, Configuration
//!  [OPEN_RETURN_PATH, PING 1] [POSTCOPY_ADVISE]                  Command
//!  RAM START {blocks}  RAM PART {pages} ...                      RamStart, Ram.., Footer
//!    |
//!    +-- pre-copy:  [SWITCHOVER_START] RAM END {pages}, devices, 00, 06 description, end of file
//!    |                                                  '-- DeviceState: no length, opaque --'
//!    '-- post-copy: RAM_DISCARD.., PACKAGED {LISTEN, devices, RUN}, RAM PART.., RAM END, 00
//! ```
//!
//! Of QEMU 7.2 up to 10.x. Device sections carry no length, so nothing after the last RAM END can be
//! taken apart: it is passed on as it is, and [`tail`] finds where it ends. Everything that these
//! rooms cannot carry safely (a second live section, deltas, compressed pages, side channels) is
//! refused by name as soon as it is read, which is before COMMIT: the VM then runs on at the source.
//!
//! Not here: sockets, the order in which pages are wanted, and the resumed streams of a native
//! post-copy that QEMU itself recovers (its source never waits there: docs/decisions/0005).

mod block;
mod command;
pub mod compose;
mod error;
mod input;
mod reader;
mod record;
pub mod return_path;
pub mod tail;
mod wire;
mod writer;

#[cfg(test)]
mod arbitrary;
#[cfg(test)]
mod captures;
#[cfg(test)]
mod tests;

pub use block::{PageRange, RamBlock, RamLayout};
pub use command::Command;
pub use error::{Feature, StreamError};
pub use lifeboat_scatter_gather::page::PageAt;
pub use reader::StreamReader;
pub use record::{ConfigurationField, Kind, RamRecord, Record};
pub use wire::{PAGE_BYTES, PING_IN_PACKAGE, PING_PACKAGE_LOADED};
pub use writer::StreamWriter;
