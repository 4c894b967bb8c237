//! The commands of a migration stream: `08`, be16 number, be16 length, payload. Bytes to values and
//! back. Used by reader and writer.
//!
//! PACKAGED is the one command whose payload is longer than its length says: the length covers a
//! be32, and that many bytes follow. Its inside is passed on unread.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::block::{PageRange, RamLayout};
use super::error::{Feature, StreamError};
use super::wire::{COMMAND, PAGE_BYTES};

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const POSTCOPY_ADVISE: u16 = 3;
const POSTCOPY_LISTEN: u16 = 4;
const POSTCOPY_RUN: u16 = 5;
const RAM_DISCARD: u16 = 6;
pub(super) const PACKAGED: u16 = 7;
const ENABLE_COLO: u16 = 8;
const POSTCOPY_RESUME: u16 = 9;
const RECV_BITMAP: u16 = 10;
const SWITCHOVER_START: u16 = 11;

/// Bytes before a command's payload.
pub(super) const HEAD_BYTES: usize = 5;
/// The only version of RAM_DISCARD.
const DISCARD_VERSION: u8 = 0;
/// The most ranges that one RAM_DISCARD holds beside the longest name.
pub(super) const DISCARD_RANGES_MOST: usize = (u16::MAX as usize - 258) / 16;

/// One command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// The destination shall open the return path.
    OpenReturnPath,
    /// The destination shall answer PONG with this number once it has read this far.
    Ping(u32),
    /// Post-copy may follow. Pages are 4 KiB on both sides (others are refused).
    PostcopyAdvise,
    /// From here on missing pages are asked for.
    PostcopyListen,
    /// The guest may run.
    PostcopyRun,
    /// Forget these pages: newer versions follow later.
    RamDiscard {
        /// The block's index.
        block: u16,
        /// What to forget.
        ranges: Vec<PageRange>,
    },
    /// A stream in the stream, read as a whole before it is acted on.
    Packaged(Bytes),
    /// A broken post-copy goes on.
    PostcopyResume,
    /// The destination shall say which pages of this block it has.
    RecvBitmap {
        /// The block's index.
        block: u16,
    },
    /// The last part begins (machine types of QEMU 10.0 and later).
    SwitchoverStart,
}

impl Command {
    /// Reads the payload of command `number`. `at` is where the command began.
    ///
    /// # Errors
    /// What the module above names; PACKAGED is the caller's.
    pub(super) fn decode(
        number: u16,
        mut payload: &[u8],
        layout: &RamLayout,
        at: u64,
    ) -> Result<Self, StreamError> {
        let input = &mut payload;
        let command = match number {
            OPEN_RETURN_PATH => Self::OpenReturnPath,
            PING => Self::Ping(input.try_get_u32().map_err(|_| short(number, at))?),
            POSTCOPY_ADVISE => advise(input, at)?,
            POSTCOPY_LISTEN => Self::PostcopyListen,
            POSTCOPY_RUN => Self::PostcopyRun,
            RAM_DISCARD => discard(input, layout, at)?,
            ENABLE_COLO => return Err(StreamError::Unsupported(Feature::Colo)),
            POSTCOPY_RESUME => Self::PostcopyResume,
            RECV_BITMAP => Self::RecvBitmap { block: counted_block(input, layout, at)? },
            SWITCHOVER_START => Self::SwitchoverStart,
            _ => return Err(StreamError::Unknown { what: "command", value: number.into(), at }),
        };
        match input.is_empty() {
            true => Ok(command),
            false => Err(short(number, at)),
        }
    }

    /// Writes the command's bytes, except for what PACKAGED packs.
    pub(super) fn encode(&self, layout: &RamLayout, out: &mut BytesMut) {
        out.put_u8(COMMAND);
        match self {
            Self::OpenReturnPath => head(out, OPEN_RETURN_PATH, 0),
            Self::Ping(value) => {
                head(out, PING, 4);
                out.put_u32(*value);
            }
            Self::PostcopyAdvise => {
                head(out, POSTCOPY_ADVISE, 16);
                out.put_u64(PAGE_BYTES as u64);
                out.put_u64(PAGE_BYTES as u64);
            }
            Self::PostcopyListen => head(out, POSTCOPY_LISTEN, 0),
            Self::PostcopyRun => head(out, POSTCOPY_RUN, 0),
            Self::RamDiscard { block, ranges } => encode_discard(*block, ranges, layout, out),
            Self::Packaged(inside) => {
                head(out, PACKAGED, 4);
                out.put_u32(u32::try_from(inside.len()).expect("a package is bounded"));
            }
            Self::PostcopyResume => head(out, POSTCOPY_RESUME, 0),
            Self::RecvBitmap { block } => {
                let name = name_of(*block, layout);
                head(out, RECV_BITMAP, 1 + name.len());
                put_name(name, out);
            }
            Self::SwitchoverStart => head(out, SWITCHOVER_START, 0),
        }
    }
}

fn short(number: u16, at: u64) -> StreamError {
    StreamError::Field { what: "the length of command", value: number.into(), at }
}

fn advise(input: &mut &[u8], at: u64) -> Result<Command, StreamError> {
    if input.is_empty() {
        // QEMU sends no sizes where only bitmaps of disks follow by post-copy.
        return Err(StreamError::Unsupported(Feature::DirtyBitmaps));
    }
    let sizes = input.try_get_u64().map_err(|_| short(POSTCOPY_ADVISE, at))?;
    let target = input.try_get_u64().map_err(|_| short(POSTCOPY_ADVISE, at))?;
    if target != PAGE_BYTES as u64 {
        return Err(StreamError::Field { what: "a target page", value: target, at });
    }
    match sizes == PAGE_BYTES as u64 {
        true => Ok(Command::PostcopyAdvise),
        false => Err(StreamError::Unsupported(Feature::HugePages(sizes))),
    }
}

fn discard(input: &mut &[u8], layout: &RamLayout, at: u64) -> Result<Command, StreamError> {
    let version = input.try_get_u8().map_err(|_| short(RAM_DISCARD, at))?;
    if version != DISCARD_VERSION {
        return Err(StreamError::Unknown { what: "discard version", value: version.into(), at });
    }
    let block = counted_block(input, layout, at)?;
    let end = input.try_get_u8().map_err(|_| short(RAM_DISCARD, at))?;
    if end != 0 || !input.len().is_multiple_of(16) {
        return Err(short(RAM_DISCARD, at));
    }
    let mut ranges = Vec::with_capacity(input.len() / 16);
    while let (Ok(start), Ok(length)) = (input.try_get_u64(), input.try_get_u64()) {
        ranges.push(layout.range(block, start, length, at)?);
    }
    Ok(Command::RamDiscard { block, ranges })
}

/// u8 length, then the name of a block.
pub(super) fn counted_block(
    input: &mut &[u8],
    layout: &RamLayout,
    at: u64,
) -> Result<u16, StreamError> {
    let short = || StreamError::Field { what: "a name's length", value: 0, at };
    let length = input.try_get_u8().map_err(|_| short())?;
    let (name, rest) = input.split_at_checked(length.into()).ok_or_else(short)?;
    *input = rest;
    find_block(name, layout, at)
}

/// The index of the block called `name`.
pub(super) fn find_block(name: &[u8], layout: &RamLayout, at: u64) -> Result<u16, StreamError> {
    layout.find(name).ok_or_else(|| StreamError::NoSuchBlock {
        name: String::from_utf8_lossy(name).into_owned(),
        at,
    })
}

fn encode_discard(block: u16, ranges: &[PageRange], layout: &RamLayout, out: &mut BytesMut) {
    assert!(ranges.len() <= DISCARD_RANGES_MOST, "discards are split before they are written");
    let name = name_of(block, layout);
    head(out, RAM_DISCARD, 3 + name.len() + 16 * ranges.len());
    out.put_u8(DISCARD_VERSION);
    put_name(name, out);
    out.put_u8(0);
    for range in ranges {
        out.put_u64(u64::from(range.first) * PAGE_BYTES as u64);
        out.put_u64(u64::from(range.count) * PAGE_BYTES as u64);
    }
}

fn head(out: &mut BytesMut, number: u16, length: usize) {
    out.put_u16(number);
    out.put_u16(u16::try_from(length).expect("commands are split before they are written"));
}

/// u8 length, then the name.
pub(super) fn put_name(name: &str, out: &mut BytesMut) {
    out.put_u8(u8::try_from(name.len()).expect("names have at most 255 bytes"));
    out.put_slice(name.as_bytes());
}

/// The name of a block of our own layout.
pub(super) fn name_of(block: u16, layout: &RamLayout) -> &str {
    let block = layout.blocks().get(usize::from(block));
    &block.expect("pages are of the layout that they are written with").name
}
