//! Why a migration stream is not carried on: what QEMU sent that these modes do not know, or that
//! makes no sense. Used by everything in `stream/`.
//!
//! All of it is found while the guest still belongs to the source, so the answer is always the
//! same: end the migration, the VM runs on, and another mode may do.

use std::fmt;

use thiserror::Error;

/// Something real that QEMU can send and that post-copy and scatter-gather do not carry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Feature {
    /// Deltas against a page's previous version: a later version alone would be lost.
    Xbzrle,
    /// Compressed pages (removed in QEMU 9.1).
    Compress,
    /// Pages on side channels.
    Multifd,
    /// RDMA's hooks.
    Rdma,
    /// A second machine in lockstep.
    Colo,
    /// Dirty bitmaps of disks as a live section.
    DirtyBitmaps,
    /// A capability that changes the layout, by QEMU's name.
    Capability(String),
    /// A live section of a device (vfio, block migration), by its id.
    LiveSection(String),
    /// A device's state before RAM (virtio-mem), by its id.
    EarlyDevice(String),
    /// RAM in pages larger than a target page. Bytes of all sizes in use, added up.
    HugePages(u64),
    /// Target pages that are not 4 KiB.
    TargetPageBits(u32),
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xbzrle => write!(f, "xbzrle deltas (switch capability xbzrle off)"),
            Self::Compress => write!(f, "compressed pages (switch capability compress off)"),
            Self::Multifd => write!(f, "multifd channels (switch capability multifd off)"),
            Self::Rdma => write!(f, "RDMA (migrate over a socket)"),
            Self::Colo => write!(f, "COLO (switch capability x-colo off)"),
            Self::DirtyBitmaps => {
                write!(f, "dirty bitmaps of disks (switch capability dirty-bitmaps off)")
            }
            Self::Capability(name) => write!(f, "capability {name} (switch it off)"),
            Self::LiveSection(id) => {
                write!(f, "the live section {id:?} of a device (use pre-copy for this VM)")
            }
            Self::EarlyDevice(id) => {
                write!(f, "the device {id:?}, whose state comes before RAM (use pre-copy)")
            }
            Self::HugePages(sizes) => {
                write!(f, "RAM in huge pages (sizes {sizes:#x}; use pre-copy for this VM)")
            }
            Self::TargetPageBits(bits) => {
                write!(f, "target pages of 2^{bits} bytes (use pre-copy for this VM)")
            }
        }
    }
}

/// What stands in the way of reading on. Offsets count bytes from the stream's beginning.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StreamError {
    /// QEMU sends something that it may, but that these modes do not carry.
    #[error("QEMU sends what post-copy and scatter-gather do not carry: {0}")]
    Unsupported(Feature),
    /// It does not begin with QEMU's magic.
    #[error("no migration stream begins with {0:#010x}")]
    NotAStream(u32),
    /// A framing version other than 3.
    #[error("migration streams of version {0} are not known")]
    Version(u32),
    /// A section type, command, flag or message that no QEMU up to 10.x sends there.
    #[error("unknown {what} {value:#x} at byte {at}")]
    Unknown {
        /// What kind of number it is.
        what: &'static str,
        /// The number.
        value: u64,
        /// Where it began.
        at: u64,
    },
    /// A known thing at a place where it cannot be.
    #[error("{what} out of place at byte {at}")]
    OutOfPlace {
        /// What it is.
        what: &'static str,
        /// Where it began.
        at: u64,
    },
    /// A field that says what cannot be.
    #[error("{what} of {value:#x} makes no sense at byte {at}")]
    Field {
        /// The field.
        what: &'static str,
        /// What it says.
        value: u64,
        /// Where its record began.
        at: u64,
    },
    /// A name that is not printable ASCII.
    #[error("a name that is not readable at byte {at}")]
    Name {
        /// Where its record began.
        at: u64,
    },
    /// A RAM block that the stream has not announced.
    #[error("RAM block {name:?} is not among the announced ones at byte {at}")]
    NoSuchBlock {
        /// The name.
        name: String,
        /// Where its record began.
        at: u64,
    },
    /// A page or range that is not inside its block.
    #[error("page {page} is outside RAM block {block:?} of {pages} pages at byte {at}")]
    OutsideBlock {
        /// The block's name.
        block: String,
        /// The first page that is outside.
        page: u64,
        /// How many pages the block has.
        pages: u32,
        /// Where its record began.
        at: u64,
    },
    /// The stream ended in the middle of something.
    #[error("the migration stream ended at byte {at}, in the middle of {what}")]
    Cut {
        /// What was being read.
        what: &'static str,
        /// How many bytes there were.
        at: u64,
    },
    /// The devices' state does not end as QEMU ends it.
    #[error("no end was found in {bytes} bytes of devices' state")]
    NoEnd {
        /// How many bytes there were.
        bytes: u64,
    },
}
