//! The beginning of a stream: magic, machine type and what follows it. Used by the reader alone.

use bytes::Buf;

use super::super::error::{Feature, StreamError};
use super::super::record::{ConfigurationField, Record};
use super::super::wire;
use super::{Place, Read, StreamReader, text};

impl StreamReader {
    pub(super) fn header(&mut self) -> Read {
        let Some(mut head) = self.input.peek(8) else { return Ok(None) };
        let (magic, version) = (head.get_u32(), head.get_u32());
        if magic != wire::MAGIC {
            return Err(StreamError::NotAStream(magic));
        }
        if version != wire::VERSION {
            return Err(StreamError::Version(version));
        }
        self.input.take(8);
        self.place = Place::Configuration;
        Ok(Some(Record::Header))
    }

    pub(super) fn configuration(&mut self) -> Read {
        let Some(mut head) = self.input.peek(5) else { return Ok(None) };
        if head.get_u8() != wire::CONFIGURATION {
            return Err(self.out_of_place("a stream without a machine type"));
        }
        let length = head.get_u32();
        let most = wire::MACHINE_NAME_MOST as u32;
        if length == 0 || length > most {
            return Err(self.field_error("a machine type's length", length.into()));
        }
        let whole = 5 + length as usize;
        let Some(name) = self.input.peek(whole) else { return Ok(None) };
        let machine = text(&name[5..]);
        let machine = machine.ok_or(StreamError::Name { at: self.input.offset() })?;
        self.input.take(whole);
        self.place = Place::Fields;
        Ok(Some(Record::Configuration { machine }))
    }

    /// A subsection of the configuration: `05`, u8 length, name, be32 version, fields.
    pub(super) fn field(&mut self) -> Read {
        match self.input.peek_byte() {
            None => return Ok(None),
            Some(wire::SUBSECTION) => {}
            Some(_) => {
                self.place = Place::Sections;
                return self.section();
            }
        }
        let Some(head) = self.input.peek(2) else { return Ok(None) };
        let named = 2 + usize::from(head[1]);
        let Some(head) = self.input.peek(named + 4) else { return Ok(None) };
        let name = String::from_utf8_lossy(&head[2..named]).into_owned();
        let version = (&head[named..]).get_u32();
        if version != 1 {
            return Err(self.field_error("a configuration's version", version.into()));
        }
        match name.as_str() {
            "configuration/uuid" => self.uuid(named + 4),
            "configuration/target-page-bits" => self.target_page_bits(named + 4),
            "configuration/capabilities" => self.capabilities(named + 4),
            _ => Err(StreamError::Unsupported(Feature::Capability(name))),
        }
    }

    fn uuid(&mut self, before: usize) -> Read {
        let Some(mut bytes) = self.input.peek(before + 16) else { return Ok(None) };
        let mut uuid = [0; 16];
        bytes.advance(before);
        bytes.copy_to_slice(&mut uuid);
        self.input.take(before + 16);
        Ok(Some(Record::ConfigurationField(ConfigurationField::Uuid(uuid))))
    }

    fn target_page_bits(&mut self, before: usize) -> Read {
        let Some(bytes) = self.input.peek(before + 4) else { return Ok(None) };
        let bits = (&bytes[before..]).get_u32();
        if bits != wire::PAGE_BITS {
            return Err(StreamError::Unsupported(Feature::TargetPageBits(bits)));
        }
        self.input.take(before + 4);
        Ok(Some(Record::ConfigurationField(ConfigurationField::TargetPageBits(bits))))
    }

    /// QEMU lists here only capabilities that change the stream's layout: each is refused.
    fn capabilities(&mut self, before: usize) -> Read {
        let Some(bytes) = self.input.peek(before + 5) else { return Ok(None) };
        let mut head = &bytes[before..];
        let (count, length) = (head.get_u32(), usize::from(head.get_u8()));
        if count == 0 {
            return Err(self.field_error("a number of capabilities", 0));
        }
        let Some(bytes) = self.input.peek(before + 5 + length) else { return Ok(None) };
        let name = String::from_utf8_lossy(&bytes[before + 5..]).into_owned();
        Err(StreamError::Unsupported(Feature::Capability(name)))
    }
}
