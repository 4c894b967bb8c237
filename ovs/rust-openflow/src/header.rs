//! The 8 bytes in front of every OpenFlow message, and what can be wrong with a message.
//!
//! Used by [`crate::message`]. The length is judged before anything else is read: a peer that
//! states fewer than 8 bytes or more than we allow cannot be followed any further.

use bytes::{BufMut, BytesMut};

use crate::wire::{BodyError, Reader};

/// OpenFlow 1.3 on the wire.
pub const VERSION: u8 = 4;

/// The largest message that the 16-bit length field can state, in bytes.
pub const MESSAGE_LIMIT: usize = 65_535;

/// Bytes of a header.
pub(crate) const HEADER_LENGTH: usize = 8;

/// What stands in front of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// 1 is OpenFlow 1.0, 4 is 1.3, 6 is 1.5.
    pub version: u8,
    /// The number of the message type in that version.
    pub kind: u8,
    /// Of the whole message with its header, in bytes.
    pub length: u16,
    /// Chosen by whoever asks, repeated by whoever answers.
    pub xid: u32,
}

impl Header {
    /// The header at the front of `bytes`, or `None` as long as it is not all there.
    pub fn peek(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        Some(Self {
            version: reader.get().ok()?,
            kind: reader.get().ok()?,
            length: reader.get().ok()?,
            xid: reader.get().ok()?,
        })
    }

    pub(crate) fn put(&self, out: &mut BytesMut) {
        out.put_u8(self.version);
        out.put_u8(self.kind);
        out.put_u16(self.length);
        out.put_u32(self.xid);
    }
}

/// Why no message could be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Shorter than its own header; where the next message begins is unknown.
    #[error("message of type {kind} states a length of {length} bytes, less than its header")]
    TooShort {
        /// Message type.
        kind: u8,
        /// Stated length in bytes.
        length: u16,
    },
    /// Longer than we are willing to wait for.
    #[error("message of type {kind} states a length of {length} bytes, the limit is {limit}")]
    TooLong {
        /// Message type.
        kind: u8,
        /// Stated length in bytes.
        length: u16,
        /// What the caller allows, in bytes.
        limit: usize,
    },
    /// Not 1.3, and not a HELLO, which every version understands.
    #[error("message of type {kind} in OpenFlow wire version {version} instead of {VERSION}")]
    Version {
        /// The version in the header.
        version: u8,
        /// Message type.
        kind: u8,
        /// Transaction id.
        xid: u32,
    },
    /// The frame is sound, its contents are not. The message has been taken from the buffer.
    #[error("malformed message of type {kind}")]
    Body {
        /// Message type.
        kind: u8,
        /// Transaction id.
        xid: u32,
        /// What is wrong.
        #[source]
        source: BodyError,
    },
}

impl DecodeError {
    /// Whether the stream cannot be read any further, because nobody knows where the next
    /// message begins.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::TooShort { .. } | Self::TooLong { .. })
    }
}

/// Why a message cannot be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// It does not fit the 16 bits of the length field.
    #[error("message of {length} bytes, OpenFlow allows {MESSAGE_LIMIT}")]
    TooLong {
        /// Bytes it would have.
        length: usize,
    },
}
