//! Checked reading and plain writing of big-endian fields; the macros that spell a layout.
//!
//! Used by every other file of the crate. A layout reads like the specification's: one line a
//! field, `=> pad n` where the specification pads. Not here: any meaning.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};

/// Why the body of a well-framed message is not what its type promises.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// A field reaches beyond the end of what holds it.
    #[error("{missing} bytes missing at offset {offset}")]
    Truncated {
        /// Bytes from the start of the structure that was being read.
        offset: usize,
        /// How many more bytes the field needed.
        missing: usize,
    },
    /// A structure states a length that it cannot have.
    #[error("{what} states a length of {length}")]
    BadLength {
        /// The structure.
        what: &'static str,
        /// What it states, in bytes.
        length: usize,
    },
    /// The match is of the type that OpenFlow 1.1 used, or of none that exists.
    #[error("match type {0} instead of OXM (1)")]
    MatchType(u16),
    /// A SET_FIELD action that carries a mask, which 1.3 does not have.
    #[error("set-field of a masked field")]
    MaskedSetField,
}

/// A cursor over the bytes of one structure; never reads beyond them.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, offset: 0 }
    }

    pub(crate) fn remaining(&self) -> usize {
        self.bytes.len() - self.offset
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.remaining() == 0
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], BodyError> {
        let rest = &self.bytes[self.offset..];
        match rest.get(..count) {
            Some(taken) => {
                self.offset += count;
                Ok(taken)
            }
            None => Err(BodyError::Truncated { offset: self.offset, missing: count - rest.len() }),
        }
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], BodyError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(crate) fn get<T: Wire>(&mut self) -> Result<T, BodyError> {
        T::get(self)
    }

    pub(crate) fn skip(&mut self, count: usize) -> Result<(), BodyError> {
        self.take(count).map(|_| ())
    }

    /// A reader over the next `count` bytes, which this one then has behind it.
    pub(crate) fn inner(&mut self, count: usize) -> Result<Reader<'a>, BodyError> {
        self.take(count).map(Reader::new)
    }

    pub(crate) fn rest(&mut self) -> Bytes {
        let rest = Bytes::copy_from_slice(&self.bytes[self.offset..]);
        self.offset = self.bytes.len();
        rest
    }

    /// Values until the end. Each must consume something, or this would not end.
    pub(crate) fn all<T: Wire>(&mut self) -> Result<Vec<T>, BodyError> {
        let mut values = Vec::new();
        while !self.is_empty() {
            values.push(self.get()?);
        }
        Ok(values)
    }
}

/// Something with one representation on the wire.
pub(crate) trait Wire: Sized {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError>;
    fn put(&self, out: &mut BytesMut);
}

macro_rules! wire_integers {
    ($($integer:ty => $put:ident),*) => {$(
        impl Wire for $integer {
            fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
                Ok(<$integer>::from_be_bytes(reader.array()?))
            }
            fn put(&self, out: &mut BytesMut) {
                out.$put(*self);
            }
        }
    )*};
}
wire_integers!(u8 => put_u8, u16 => put_u16, u32 => put_u32, u64 => put_u64);

impl Wire for Ipv4Addr {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        Ok(reader.array::<4>()?.into())
    }
    fn put(&self, out: &mut BytesMut) {
        out.put_slice(&self.octets());
    }
}

impl Wire for Ipv6Addr {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        Ok(reader.array::<16>()?.into())
    }
    fn put(&self, out: &mut BytesMut) {
        out.put_slice(&self.octets());
    }
}

/// Seconds and nanoseconds, 32 bits each. A peer that says more nanoseconds than a second has is taken
/// at the most of them: carried over, they may be a second for which 32 bits have no room, and what
/// was read could not be written again.
impl Wire for Duration {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        let seconds: u32 = reader.get()?;
        let nanoseconds: u32 = reader.get()?;
        Ok(Duration::new(u64::from(seconds), nanoseconds.min(999_999_999)))
    }
    fn put(&self, out: &mut BytesMut) {
        out.put_u32(u32::try_from(self.as_secs()).unwrap_or(u32::MAX));
        out.put_u32(self.subsec_nanos());
    }
}

pub(crate) fn put_all<T: Wire>(values: &[T], out: &mut BytesMut) {
    for value in values {
        value.put(out);
    }
}

/// Writes what `body` writes, then its length into the 16 bits `length_at` bytes from its start.
///
/// A length beyond 16 bits is written as the largest: the message around it is then too long as
/// well, and [`crate::encode`] refuses it.
pub(crate) fn put_sized(out: &mut BytesMut, length_at: usize, body: impl FnOnce(&mut BytesMut)) {
    let start = out.len();
    body(out);
    let length = u16::try_from(out.len() - start).unwrap_or(u16::MAX);
    out[start + length_at..start + length_at + 2].copy_from_slice(&length.to_be_bytes());
}

/// Zeros up to the next multiple of 8 bytes, counted from `start`.
pub(crate) fn pad_to_8(out: &mut BytesMut, start: usize) {
    let length = out.len() - start;
    out.put_bytes(0, length.next_multiple_of(8) - length);
}

/// The rest of a structure whose first fields have said that it is `length` bytes, `read` of
/// them already behind the reader.
pub(crate) fn sized<'a>(
    reader: &mut Reader<'a>,
    what: &'static str,
    length: u16,
    read: usize,
) -> Result<Reader<'a>, BodyError> {
    let length = usize::from(length);
    match length.checked_sub(read) {
        Some(rest) => reader.inner(rest),
        None => Err(BodyError::BadLength { what, length }),
    }
}

/// A struct and its layout in one: fields in order, `=> pad n` for the specification's padding.
macro_rules! wire_struct {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $($(#[$field_meta:meta])* $field:ident: $type:ty $(=> pad $pad:literal)?,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
        }
        impl $crate::wire::Wire for $name {
            fn get(
                reader: &mut $crate::wire::Reader<'_>,
            ) -> Result<Self, $crate::wire::BodyError> {
                $(
                    let $field = reader.get()?;
                    $(reader.skip($pad)?;)?
                )*
                Ok(Self { $($field),* })
            }
            fn put(&self, out: &mut bytes::BytesMut) {
                $(
                    $crate::wire::Wire::put(&self.$field, out);
                    $(bytes::BufMut::put_bytes(out, 0, $pad);)?
                )*
            }
        }
    };
}

/// A closed list of numbers, open at its end: what we have no name for is kept as `Other`.
macro_rules! wire_enum {
    (
        $(#[$meta:meta])*
        pub enum $name:ident: $repr:ty {
            $($(#[$variant_meta:meta])* $variant:ident = $value:literal,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_meta])* $variant,)*
            /// A number that this crate has no name for.
            Other($repr),
        }
        impl From<$repr> for $name {
            fn from(number: $repr) -> Self {
                match number {
                    $($value => Self::$variant,)*
                    other => Self::Other(other),
                }
            }
        }
        impl From<$name> for $repr {
            fn from(value: $name) -> Self {
                match value {
                    $($name::$variant => $value,)*
                    $name::Other(other) => other,
                }
            }
        }
        impl $crate::wire::Wire for $name {
            fn get(
                reader: &mut $crate::wire::Reader<'_>,
            ) -> Result<Self, $crate::wire::BodyError> {
                Ok(reader.get::<$repr>()?.into())
            }
            fn put(&self, out: &mut bytes::BytesMut) {
                <$repr>::from(*self).put(out);
            }
        }
    };
}

pub(crate) use {wire_enum, wire_struct};
