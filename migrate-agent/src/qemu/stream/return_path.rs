//! The return path: what a destination's QEMU says back to its source. Bytes to messages and back;
//! pure. Used by post-copy's driver, which answers in the source's place.
//!
//! ```text
//!  be16 type | be16 length | payload           RECV_BITMAP: behind it, not counted by its length,
//!                                              be64 bytes | bitmap, little-endian | be64 end mark
//! ```
//!
//! Requests are resolved to a block here: QEMU names it only where it differs from the request
//! before. When they are written, the name is always said, because not every request is passed on.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::block::{PageRange, RamLayout};
use super::command::{counted_block, name_of, put_name};
use super::error::StreamError;
use super::input::Input;
use super::wire::PAGE_BYTES;

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RECV_BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;
const SWITCHOVER_ACK: u16 = 7;

/// Bytes before a message's payload.
const HEAD_BYTES: usize = 4;
/// The longest payload: a request with the longest name.
const PAYLOAD_MOST: usize = 8 + 4 + 1 + 255;
/// What stands behind a bitmap.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// One message of the return path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The destination has all it wants; 0 is success.
    Shut(u32),
    /// The destination has read as far as the PING of this number.
    Pong(u32),
    /// The guest waits for these pages.
    RequestPages {
        /// The block's index.
        block: u16,
        /// Which pages.
        range: PageRange,
    },
    /// Which pages of a block the destination has: bit n, from the lowest bit of the first byte.
    ReceivedBitmap {
        /// The block's index.
        block: u16,
        /// The bits, a multiple of eight bytes; a 1 is "do not send again".
        bits: Bytes,
    },
    /// A broken post-copy goes on.
    ResumeAck(u32),
    /// The source may switch over (capability switchover-ack).
    SwitchoverAck,
}

/// Reads messages from bytes in any pieces.
#[derive(Debug)]
pub struct ReturnReader {
    input: Input,
    layout: RamLayout,
    /// The block of the request before.
    last_block: Option<u16>,
    failed: Option<StreamError>,
}

impl ReturnReader {
    /// A reader for the blocks that the stream has announced.
    #[must_use]
    pub fn new(layout: RamLayout) -> Self {
        Self { input: Input::default(), layout, last_block: None, failed: None }
    }

    /// Adds bytes that arrived.
    pub fn feed(&mut self, bytes: Bytes) {
        self.input.push(bytes);
    }

    /// The next message; `None` until more bytes are fed.
    ///
    /// # Errors
    /// A message that no QEMU up to 10.x sends, or that names pages that there are not; the same
    /// from then on.
    pub fn read(&mut self) -> Result<Option<Message>, StreamError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let message = self.advance();
        if let Err(error) = &message {
            self.failed = Some(error.clone());
        }
        message
    }

    fn advance(&mut self) -> Result<Option<Message>, StreamError> {
        let at = self.input.offset();
        let Some(mut head) = self.input.peek(HEAD_BYTES) else { return Ok(None) };
        let (kind, length) = (head.get_u16(), usize::from(head.get_u16()));
        if length > PAYLOAD_MOST {
            return Err(length_error(length, at));
        }
        let whole = HEAD_BYTES + length;
        let Some(bytes) = self.input.peek(whole) else { return Ok(None) };
        let mut payload = &bytes[HEAD_BYTES..];
        let input = &mut payload;
        let message = match kind {
            SHUT => Message::Shut(number(input, at)?),
            PONG => Message::Pong(number(input, at)?),
            REQ_PAGES_ID | REQ_PAGES => {
                request(kind, input, &self.layout, &mut self.last_block, at)?
            }
            RECV_BITMAP => {
                let block = counted_block(input, &self.layout, at)?;
                return match input.is_empty() {
                    true => self.bitmap(whole, block, at),
                    false => Err(length_error(length, at)),
                };
            }
            RESUME_ACK => Message::ResumeAck(number(input, at)?),
            SWITCHOVER_ACK => Message::SwitchoverAck,
            _ => return Err(StreamError::Unknown { what: "answer", value: kind.into(), at }),
        };
        if !input.is_empty() {
            return Err(length_error(length, at));
        }
        self.input.take(whole);
        Ok(Some(message))
    }

    /// A bitmap is as long as its block needs: nothing else is waited for.
    fn bitmap(&mut self, head: usize, block: u16, at: u64) -> Result<Option<Message>, StreamError> {
        let Some(bytes) = self.input.peek(head + 8) else { return Ok(None) };
        let stated = (&bytes[head..]).get_u64();
        let wanted = bitmap_bytes(self.layout.blocks()[usize::from(block)].pages);
        if stated != wanted as u64 {
            return Err(StreamError::Field { what: "a bitmap's length", value: stated, at });
        }
        if self.input.len() < head + 8 + wanted + 8 {
            return Ok(None);
        }
        self.input.take(head + 8);
        let bits = self.input.take(wanted).unwrap_or_default();
        let end = self.input.take(8).map_or(0, |mut end| end.get_u64());
        match end == BITMAP_END {
            true => Ok(Some(Message::ReceivedBitmap { block, bits })),
            false => Err(StreamError::Field { what: "a bitmap's end", value: end, at }),
        }
    }
}

/// Bytes of the bitmap of a block: whole words of 64 bits.
#[must_use]
pub fn bitmap_bytes(pages: u32) -> usize {
    (pages as usize).div_ceil(64) * 8
}

fn length_error(length: usize, at: u64) -> StreamError {
    StreamError::Field { what: "an answer's length", value: length as u64, at }
}

fn number(input: &mut &[u8], at: u64) -> Result<u32, StreamError> {
    input.try_get_u32().map_err(|_| length_error(input.len(), at))
}

fn request(
    kind: u16,
    input: &mut &[u8],
    layout: &RamLayout,
    last_block: &mut Option<u16>,
    at: u64,
) -> Result<Message, StreamError> {
    let start = input.try_get_u64().map_err(|_| length_error(input.len(), at))?;
    let length = number(input, at)?;
    if kind == REQ_PAGES_ID {
        *last_block = Some(counted_block(input, layout, at)?);
    }
    let nameless = StreamError::OutOfPlace { what: "a request without a block", at };
    let block = last_block.ok_or(nameless)?;
    let range = layout.range(block, start, length.into(), at)?;
    match range.count {
        0 => Err(StreamError::Field { what: "a request", value: 0, at }),
        _ => Ok(Message::RequestPages { block, range }),
    }
}

/// Writes one message. Requests always name their block.
///
/// # Panics
/// If a block is not of `layout`, a range is 4 GiB or longer, or a bitmap has not its block's
/// length: all are ours.
pub fn encode(message: &Message, layout: &RamLayout, out: &mut BytesMut) {
    let mut word = |kind: u16, value: u32| {
        out.put_u16(kind);
        out.put_u16(4);
        out.put_u32(value);
    };
    match message {
        Message::Shut(error) => word(SHUT, *error),
        Message::Pong(value) => word(PONG, *value),
        Message::ResumeAck(value) => word(RESUME_ACK, *value),
        Message::SwitchoverAck => out.put_u32(u32::from(SWITCHOVER_ACK) << 16),
        Message::RequestPages { block, range } => {
            let name = name_of(*block, layout);
            let length = u64::from(range.count) * PAGE_BYTES as u64;
            out.put_u16(REQ_PAGES_ID);
            out.put_u16(13 + name.len() as u16);
            out.put_u64(u64::from(range.first) * PAGE_BYTES as u64);
            out.put_u32(u32::try_from(length).expect("requests are of few pages"));
            put_name(name, out);
        }
        Message::ReceivedBitmap { block, bits } => {
            let pages = layout.blocks()[usize::from(*block)].pages;
            assert_eq!(bits.len(), bitmap_bytes(pages), "a bitmap has its block's length");
            let name = name_of(*block, layout);
            out.put_u16(RECV_BITMAP);
            out.put_u16(1 + name.len() as u16);
            put_name(name, out);
            out.put_u64(bits.len() as u64);
            out.put_slice(bits);
            out.put_u64(BITMAP_END);
        }
    }
}
