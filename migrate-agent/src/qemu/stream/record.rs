//! The records that a migration stream consists of. Used by reader and writer: what one reads the
//! other writes back byte for byte.

use bytes::Bytes;

use lifeboat_scatter_gather::page::PageAt;

use super::block::RamLayout;
use super::command::Command;

/// How a section of the stream goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// More of it will follow.
    Part,
    /// The last of it.
    End,
}

/// What follows the machine type in the stream's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigurationField {
    /// The VM's UUID, where QEMU was told to compare it.
    Uuid([u8; 16]),
    /// The size of target pages, as a power of two. Not sent for x86.
    TargetPageBits(u32),
}

/// One record of the body of a RAM section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RamRecord {
    /// A page's bytes, [`super::PAGE_BYTES`] of them.
    Page {
        /// Which page.
        at: PageAt,
        /// Whether the record says "same block as before" in place of the block's name.
        continued: bool,
        /// The bytes, a slice of what was received.
        data: Bytes,
    },
    /// A page of zeroes.
    Zero {
        /// Which page.
        at: PageAt,
        /// As for [`RamRecord::Page`].
        continued: bool,
    },
    /// The body ends here; a footer follows.
    EndOfBody,
}

/// One record of a migration stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// The eight bytes that every stream begins with.
    Header,
    /// The machine type, such as `pc-i440fx-7.2`.
    Configuration {
        /// Its name.
        machine: String,
    },
    /// A part of the configuration that follows the machine type.
    ConfigurationField(ConfigurationField),
    /// A command.
    Command(Command),
    /// The RAM section begins: which blocks there are.
    RamStart {
        /// The number that later parts are called by.
        section: u32,
        /// The blocks.
        layout: RamLayout,
    },
    /// The RAM section goes on.
    RamSection {
        /// Its number.
        section: u32,
        /// Whether this is the last of it.
        kind: Kind,
    },
    /// A record of the RAM section's body.
    Ram(RamRecord),
    /// A section's footer.
    Footer {
        /// The section's number.
        section: u32,
    },
    /// Some of what follows the RAM section in pre-copy, unread: devices, end mark, description.
    DeviceState(Bytes),
    /// The end mark of a post-copy's stream.
    EndOfStream,
}
