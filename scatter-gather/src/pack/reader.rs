//! Opens packs and single slots. Used by the destination, and by whoever rebuilds an index.
//!
//! What a store gives back is hostile until its lengths and checks are right. Pages are decrypted
//! where they lie and handed out as slices: nothing is copied but what was compressed.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::builder::{header_check, slot_check};
use super::width::unsqueezed;
use super::{
    CHECKED_BYTES, FORMAT, HEADER_BYTES, MAGIC, PackError, RUN_BYTES, SLOT_HEAD_BYTES, Width,
};
use crate::page::{PAGE_BYTES, PackId, PageAt, Version};
use crate::seal::{MigrationTag, Opener};

/// Pages in a row of one block that hold nothing but zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZeroRun {
    /// The block.
    pub block: u16,
    /// The first page.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// The version of the last of them; those before have the versions before.
    pub version: Version,
}

impl ZeroRun {
    pub(super) fn encode(self, out: &mut BytesMut) {
        out.put_u16(self.block);
        out.put_u16(0);
        out.put_u32(self.first);
        out.put_u32(self.count);
        out.put_u32(0);
        out.put_u64(self.version.0);
    }

    fn decode(mut bytes: &[u8]) -> Self {
        let block = bytes.get_u16();
        bytes.advance(2);
        let (first, count) = (bytes.get_u32(), bytes.get_u32());
        bytes.advance(4);
        Self { block, first, count, version: Version(bytes.get_u64()) }
    }
}

/// One page of a pack, in the clear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenPage {
    /// Which page.
    pub at: PageAt,
    /// Its place in the pack.
    pub slot: u16,
    /// Its version.
    pub version: Version,
    /// Its bytes.
    pub data: Bytes,
}

/// What a pack holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// How wide its slots are.
    pub width: Width,
    /// The pages, by slot.
    pub pages: Vec<OpenPage>,
    /// The pages of zeroes.
    pub zeroes: Vec<ZeroRun>,
}

/// Whose packs are read, and with what they are opened.
#[derive(Debug)]
pub struct Reading {
    /// The migration.
    pub migration: MigrationTag,
    /// What opens its pages; `None` where they were not sealed.
    pub opener: Option<Opener>,
}

struct Header {
    slots: u16,
    width: Width,
    lane: u32,
}

impl Reading {
    /// Opens a whole pack.
    ///
    /// # Errors
    /// Whatever is not as it was put: see [`PackError`].
    pub fn pack(&self, id: PackId, mut bytes: BytesMut) -> Result<Contents, PackError> {
        let header = self.header(id, &bytes)?;
        let mut rest = bytes.split_off(HEADER_BYTES);
        let mut pages = Vec::with_capacity(header.slots.into());
        for slot in 0..header.slots {
            let bytes = rest.split_to(header.width.slot_bytes(self.opener.is_some()));
            pages.push(self.open(header.lane, (slot, header.width), bytes)?);
        }
        let zeroes = rest.chunks_exact(RUN_BYTES).map(ZeroRun::decode).collect();
        Ok(Contents { width: header.width, pages, zeroes })
    }

    /// Opens one slot that was fetched without its pack, which has slots of this width, and expects
    /// this page in it.
    ///
    /// # Errors
    /// As for [`Self::pack`]; [`PackError::OtherPage`] where the slot holds another page.
    pub fn slot(
        &self,
        lane: u32,
        (slot, width): (u16, Width),
        wanted: PageAt,
        bytes: BytesMut,
    ) -> Result<OpenPage, PackError> {
        let expected = width.slot_bytes(self.opener.is_some());
        if bytes.len() != expected {
            return Err(PackError::Length { found: bytes.len(), wanted: expected });
        }
        let page = self.open(lane, (slot, width), bytes)?;
        match page.at == wanted {
            true => Ok(page),
            false => Err(PackError::OtherPage { found: page.at, wanted }),
        }
    }

    fn header(&self, id: PackId, bytes: &[u8]) -> Result<Header, PackError> {
        let Some((mut head, rest)) = bytes.split_at_checked(HEADER_BYTES) else {
            return Err(PackError::Length { found: bytes.len(), wanted: HEADER_BYTES });
        };
        let checked = &bytes[..CHECKED_BYTES];
        if head[..4] != MAGIC || head[4] != FORMAT {
            return Err(PackError::NotAPack);
        }
        head.advance(5);
        let sealed = head.get_u8();
        let (slots, runs) = (head.get_u16(), head.get_u16());
        let width = head.get_u16();
        let (lane, number) = (head.get_u32(), head.get_u64());
        let width = u8::try_from(width).ok().and_then(Width::eighths);
        let width = width.ok_or(PackError::NotAPack)?;
        let slot_bytes = width.slot_bytes(sealed != 0);
        let wanted = usize::from(slots) * slot_bytes + usize::from(runs) * RUN_BYTES;
        if rest.len() != wanted {
            let (found, wanted) = (bytes.len(), HEADER_BYTES + wanted);
            return Err(PackError::Length { found, wanted });
        }
        let check = (&head[16..]).get_u64();
        if check != header_check(checked, &rest[rest.len() - usize::from(runs) * RUN_BYTES..]) {
            return Err(PackError::Header(id));
        }
        let mine = head[..16] == self.migration.0 && sealed == u8::from(self.opener.is_some());
        if number != id.0 || !mine {
            return Err(PackError::Other(id));
        }
        Ok(Header { slots, width, lane })
    }

    /// Opens a slot of the right length.
    fn open(
        &self,
        lane: u32,
        (slot, width): (u16, Width),
        mut bytes: BytesMut,
    ) -> Result<OpenPage, PackError> {
        let check = slot_check(&bytes);
        let mut head = &bytes[..SLOT_HEAD_BYTES];
        let block = head.get_u16();
        head.advance(2);
        let at = PageAt { block, page: head.get_u32() };
        let version = Version(head.get_u64());
        if head.get_u64() != check {
            return Err(PackError::Page(at));
        }
        let mut payload = bytes.split_off(SLOT_HEAD_BYTES);
        if let Some(opener) = &self.opener {
            opener.open(lane, at, version, &mut payload)?;
            payload.truncate(width.body_bytes());
        }
        let data = match width {
            Width::WHOLE => payload.freeze(),
            _ => unsqueezed(&payload).ok_or(PackError::Compressed(at))?.into(),
        };
        debug_assert_eq!(data.len(), PAGE_BYTES);
        Ok(OpenPage { at, slot, version, data })
    }
}
