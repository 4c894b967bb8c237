//! The RAM section: its list of blocks, its pages, its footers. Used by the reader alone.

use bytes::Buf;
use lifeboat_scatter_gather::page::PageAt;

use super::super::block::{RamBlock, RamLayout};
use super::super::command;
use super::super::error::{Feature, StreamError};
use super::super::record::{Kind, RamRecord, Record};
use super::super::wire;
use super::{Place, Ram, Read, StreamReader, text};

impl StreamReader {
    /// START: section, id, be32 instance, be32 version, then the list of blocks.
    pub(super) fn start(&mut self) -> Read {
        let Some((named, id)) = self.identified() else { return Ok(None) };
        match id.as_str() {
            wire::RAM_ID => {}
            "dirty-bitmap" => return Err(StreamError::Unsupported(Feature::DirtyBitmaps)),
            _ => return Err(StreamError::Unsupported(Feature::LiveSection(id))),
        }
        if self.ram.is_some() {
            return Err(self.out_of_place("a second RAM section"));
        }
        let Some(head) = self.input.peek(named + 16) else { return Ok(None) };
        let section = (&head[1..]).get_u32();
        let mut rest = &head[named..];
        let (instance, version, sizes) = (rest.get_u32(), rest.get_u32(), rest.get_u64());
        if instance != 0 || version != wire::RAM_VERSION {
            return Err(self.field_error("a RAM section's version", version.into()));
        }
        if sizes & wire::FLAGS != wire::RAM_MEM_SIZE {
            return Err(self.field_error("the flags of a list of blocks", sizes));
        }
        let Some((whole, blocks)) = self.blocks(named + 16, sizes & !wire::FLAGS)? else {
            return Ok(None);
        };
        self.layout = RamLayout::new(blocks, self.input.offset())?;
        self.input.take(whole);
        self.ram = Some(Ram { section, last_block: None, ended: false });
        self.place = Place::Body { kind: Kind::Part };
        Ok(Some(Record::RamStart { section, layout: self.layout.clone() }))
    }

    /// u8 length, name, be64 bytes, until they add up to `total`.
    fn blocks(
        &mut self,
        mut at: usize,
        total: u64,
    ) -> Result<Option<(usize, Vec<RamBlock>)>, StreamError> {
        let (mut blocks, mut left) = (Vec::new(), total);
        while left > 0 {
            let Some(head) = self.input.peek(at + 1) else { return Ok(None) };
            let named = at + 1 + usize::from(head[at]);
            let Some(entry) = self.input.peek(named + 8) else { return Ok(None) };
            let name = text(&entry[at + 1..named]);
            let used = (&entry[named..]).get_u64();
            let pages = u32::try_from(used >> wire::PAGE_BITS).ok();
            let fits = pages.filter(|p| *p > 0 && used & wire::FLAGS == 0 && used <= left);
            let Some(pages) = fits else {
                return Err(self.field_error("a block's length", used));
            };
            let name = name.ok_or(StreamError::Name { at: self.input.offset() })?;
            if blocks.len() == wire::BLOCKS_MOST {
                return Err(self.field_error("memory in all", total));
            }
            blocks.push(RamBlock { name, pages });
            (at, left) = (named + 8, left - used);
        }
        Ok(Some((at, blocks)))
    }

    pub(super) fn more(&mut self, kind: Kind) -> Read {
        let Some(mut head) = self.input.peek(5) else { return Ok(None) };
        head.advance(1);
        let section = head.get_u32();
        match self.ram {
            Some(ram) if ram.section == section && !ram.ended => {}
            Some(ram) if ram.section == section => {
                return Err(self.out_of_place("more RAM after its end"));
            }
            _ => return Err(self.field_error("a section's number", section.into())),
        }
        self.input.take(5);
        self.place = Place::Body { kind };
        Ok(Some(Record::RamSection { section, kind }))
    }

    pub(super) fn body(&mut self, kind: Kind) -> Read {
        let Some(mut head) = self.input.peek(8) else { return Ok(None) };
        let word = head.get_u64();
        let flags = word & wire::FLAGS;
        match flags & !wire::RAM_CONTINUE {
            wire::RAM_PAGE => self.page(word, wire::PAGE_BYTES),
            wire::RAM_ZERO => self.page(word, 1),
            wire::RAM_EOS if word == wire::RAM_EOS => {
                self.input.take(8);
                self.place = Place::Footer { kind };
                Ok(Some(Record::Ram(RamRecord::EndOfBody)))
            }
            _ => Err(self.flags(flags)),
        }
    }

    /// Why these flags are not carried.
    fn flags(&self, flags: u64) -> StreamError {
        let known = [
            (wire::RAM_XBZRLE, Feature::Xbzrle),
            (wire::RAM_HOOK, Feature::Rdma),
            (wire::RAM_COMPRESS, Feature::Compress),
            (wire::RAM_MULTIFD_FLUSH, Feature::Multifd),
        ];
        let found = known.into_iter().find(|(flag, _)| flags & !wire::RAM_CONTINUE == *flag);
        match found {
            Some((_, feature)) => StreamError::Unsupported(feature),
            None => self.unknown("RAM flags", flags),
        }
    }

    /// A page with `payload` bytes behind its address and name: its content, or one byte to fill with.
    fn page(&mut self, word: u64, payload: usize) -> Read {
        let continued = word & wire::RAM_CONTINUE != 0;
        let Some((head, block)) = self.record_block(continued)? else { return Ok(None) };
        if self.input.len() < head + payload {
            return Ok(None);
        }
        let at = self.layout.page(block, word & !wire::FLAGS, self.input.offset())?;
        if payload == 1 {
            return self.zero(head, at, continued);
        }
        self.input.take(head);
        let data = self.input.take(payload).unwrap_or_default();
        self.remember(block);
        Ok(Some(Record::Ram(RamRecord::Page { at, continued, data })))
    }

    fn zero(&mut self, head: usize, at: PageAt, continued: bool) -> Read {
        let fill = self.input.peek(head + 1).map_or(0, |bytes| bytes[head]);
        if fill != 0 {
            return Err(self.field_error("the byte that a page is filled with", fill.into()));
        }
        self.input.take(head + 1);
        self.remember(at.block);
        Ok(Some(Record::Ram(RamRecord::Zero { at, continued })))
    }

    /// The bytes of a page record before its payload, and its block.
    fn record_block(&mut self, continued: bool) -> Result<Option<(usize, u16)>, StreamError> {
        if continued {
            let last = self.ram.and_then(|ram| ram.last_block);
            let block = last.ok_or_else(|| self.out_of_place("a page of the same block"))?;
            return Ok(Some((8, block)));
        }
        let Some(head) = self.input.peek(9) else { return Ok(None) };
        let named = 9 + usize::from(head[8]);
        let at = self.input.offset();
        let Some(head) = self.input.peek(named) else { return Ok(None) };
        let block = command::find_block(&head[9..], &self.layout, at)?;
        Ok(Some((named, block)))
    }

    fn remember(&mut self, block: u16) {
        if let Some(ram) = &mut self.ram {
            ram.last_block = Some(block);
        }
    }

    pub(super) fn footer(&mut self, kind: Kind) -> Read {
        let Some(mut head) = self.input.peek(5) else { return Ok(None) };
        let (mark, section) = (head.get_u8(), head.get_u32());
        if mark != wire::FOOTER || self.ram.is_none_or(|ram| ram.section != section) {
            return Err(self.out_of_place("a section without its footer"));
        }
        self.input.take(5);
        self.place = Place::Sections;
        if kind == Kind::End {
            self.ram = self.ram.map(|ram| Ram { ended: true, ..ram });
            // Devices follow, whose sections have no length: no record can be told from here on.
            self.place = if self.packaged { Place::Sections } else { Place::Tail };
        }
        Ok(Some(Record::Footer { section }))
    }
}
