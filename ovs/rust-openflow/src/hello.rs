//! HELLO: which versions a side speaks (section A.5.1).
//!
//! A side that sends no version bitmap (an 8-byte HELLO, as OpenFlow 1.0 has it) speaks every
//! version up to the one in its header.

use bytes::{BufMut, BytesMut};

use crate::wire::{BodyError, Reader, put_sized, sized};

/// The element type of a version bitmap.
const VERSION_BITMAP: u16 = 1;

/// What a HELLO says, together with the version of its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The version in the header: the highest that the side speaks.
    pub version: u8,
    /// Bit *n* stands for wire version *n*; `None` when the side sent no bitmap. Versions from
    /// 32 on, of which there are none, are not looked at.
    pub bitmap: Option<u32>,
}

impl Hello {
    /// One that offers the given wire versions (each below 32).
    pub fn offering(versions: &[u8]) -> Self {
        let known = versions.iter().copied().filter(|version| *version < 32);
        let bitmap = known.clone().fold(0, |bits, version| bits | 1 << version);
        Self { version: known.max().unwrap_or(0), bitmap: Some(bitmap) }
    }

    /// Whether the side that said this speaks the wire version.
    pub fn speaks(&self, version: u8) -> bool {
        match self.bitmap {
            Some(bits) => version < 32 && bits & (1 << version) != 0,
            None => version <= self.version,
        }
    }

    /// The wire versions that the side says it speaks, lowest first.
    pub fn versions(&self) -> Vec<u8> {
        (1..32).filter(|version| self.speaks(*version)).collect()
    }

    pub(crate) fn get(version: u8, reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        let mut bitmap = None;
        while reader.remaining() >= 4 {
            let kind: u16 = reader.get()?;
            let length: u16 = reader.get()?;
            let mut element = sized(reader, "hello element", length, 4)?;
            if kind == VERSION_BITMAP && bitmap.is_none() && element.remaining() >= 4 {
                bitmap = Some(element.get()?);
            }
            // Elements are padded to 8 bytes; the last one's padding may be missing.
            let pad = usize::from(length).next_multiple_of(8) - usize::from(length);
            reader.skip(pad.min(reader.remaining()))?;
        }
        Ok(Self { version, bitmap })
    }

    pub(crate) fn put(&self, out: &mut BytesMut) {
        let Some(bitmap) = self.bitmap else { return };
        put_sized(out, 2, |out| {
            out.put_u16(VERSION_BITMAP);
            out.put_u16(0);
            out.put_u32(bitmap);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_without_bitmap_speaks_all_up_to_its_version() {
        let hello = Hello { version: 4, bitmap: None };
        assert_eq!(hello.versions(), [1, 2, 3, 4]);
    }

    #[test]
    fn unknown_elements_are_skipped_and_the_last_needs_no_padding() {
        let bytes = [0, 9, 0, 5, 7, 0, 0, 0, 0, 1, 0, 8, 0, 0, 0, 0x10, 0, 9, 0, 5, 7];
        let hello = Hello::get(4, &mut Reader::new(&bytes));
        assert_eq!(hello, Ok(Hello { version: 4, bitmap: Some(0x10) }));
    }

    #[test]
    fn a_bitmap_is_taken_at_its_word() {
        let hello = Hello::offering(&[1, 4]);
        assert_eq!((hello.version, hello.bitmap), (4, Some(0b1_0010)));
        assert_eq!(hello.versions(), [1, 4]);
        assert!(!hello.speaks(3) && !hello.speaks(40));
    }
}
