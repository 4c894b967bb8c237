//! The numbers of QEMU's migration stream, by the names that QEMU's documentation gives them
//! (docs/devel/migration, `migration/savevm.h`, `migration/ram.c`), and the bounds that we add.
//!
//! Used by reader and writer. All integers of the stream are big-endian.

/// Bytes of a target page on the architectures that are carried (x86).
pub const PAGE_BYTES: usize = 4096;
/// [`PAGE_BYTES`] as a power of two.
pub(super) const PAGE_BITS: u32 = 12;

/// The first four bytes of a stream: "QEVM".
pub(super) const MAGIC: u32 = 0x5145_564d;
/// The only version of the stream's framing that QEMU still writes.
pub(super) const VERSION: u32 = 3;

pub(super) const SECTION_EOF: u8 = 0x00;
pub(super) const SECTION_START: u8 = 0x01;
pub(super) const SECTION_PART: u8 = 0x02;
pub(super) const SECTION_END: u8 = 0x03;
pub(super) const SECTION_FULL: u8 = 0x04;
pub(super) const SUBSECTION: u8 = 0x05;
pub(super) const DESCRIPTION: u8 = 0x06;
pub(super) const CONFIGURATION: u8 = 0x07;
pub(super) const COMMAND: u8 = 0x08;
pub(super) const FOOTER: u8 = 0x7e;

/// A record's flags live below the page's address.
pub(super) const FLAGS: u64 = PAGE_BYTES as u64 - 1;
pub(super) const RAM_ZERO: u64 = 0x02;
pub(super) const RAM_MEM_SIZE: u64 = 0x04;
pub(super) const RAM_PAGE: u64 = 0x08;
pub(super) const RAM_EOS: u64 = 0x10;
pub(super) const RAM_CONTINUE: u64 = 0x20;
pub(super) const RAM_XBZRLE: u64 = 0x40;
pub(super) const RAM_HOOK: u64 = 0x80;
pub(super) const RAM_COMPRESS: u64 = 0x100;
pub(super) const RAM_MULTIFD_FLUSH: u64 = 0x200;

/// The id and version of the one live section that is carried.
pub(super) const RAM_ID: &str = "ram";
pub(super) const RAM_VERSION: u32 = 4;

/// QEMU's own PING inside PACKAGED: its PONG says that the devices' state is loaded.
pub const PING_IN_PACKAGE: u32 = 3;
/// QEMU 10.2's last word of PACKAGED; its source waits for the PONG before it may be ended.
pub const PING_PACKAGE_LOADED: u32 = 0x42;

/// The longest machine type that is believed.
pub(super) const MACHINE_NAME_MOST: usize = 256;
/// More RAM blocks than any machine has; a guest has about ten.
pub(super) const BLOCKS_MOST: usize = 4096;
/// The largest PACKAGED: devices of a large guest take some megabytes.
pub(super) const PACKAGE_MOST: usize = 256 << 20;
