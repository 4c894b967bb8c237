//! Reads a migration stream record by record from bytes that arrive in any pieces. Used by whoever
//! takes a guest's pages from QEMU.
//!
//! ```text
//!  Header --> Configuration --> Fields --+--> Sections <--> Body --> Footer --+--> Sections
//!                                        |      |  RAM END came, no PACKAGED  '--> Tail (to the end)
//!                                        |      '-- 00, after PACKAGED and RAM END --> Ended
//! ```
//!
//! After an error the reader stays in it: a stream that made no sense once is not read further.
//! `opening` and `ram` read what their names say.

mod opening;
mod ram;

use bytes::{Buf, Bytes};

use super::block::RamLayout;
use super::command::{self, Command};
use super::error::{Feature, StreamError};
use super::input::Input;
use super::record::{Kind, Record};
use super::wire;

/// Where in the stream the next record begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Header,
    Configuration,
    Fields,
    Sections,
    Body { kind: Kind },
    Footer { kind: Kind },
    Tail,
    Ended,
}

/// The RAM section, once it has begun.
#[derive(Debug, Clone, Copy)]
struct Ram {
    section: u32,
    /// The block of the record before: QEMU carries it across sections.
    last_block: Option<u16>,
    ended: bool,
}

type Read = Result<Option<Record>, StreamError>;

/// Bytes in, records out.
#[derive(Debug)]
pub struct StreamReader {
    input: Input,
    place: Place,
    layout: RamLayout,
    ram: Option<Ram>,
    packaged: bool,
    failed: Option<StreamError>,
}

impl Default for StreamReader {
    fn default() -> Self {
        Self::new()
    }
}

impl StreamReader {
    /// A reader at the beginning of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self {
            input: Input::default(),
            place: Place::Header,
            layout: RamLayout::default(),
            ram: None,
            packaged: false,
            failed: None,
        }
    }

    /// Adds bytes that arrived. They are kept as they are: pages are slices of them.
    pub fn feed(&mut self, bytes: Bytes) {
        self.input.push(bytes);
    }

    /// The RAM blocks that the stream has announced; empty before it does.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Bytes that were fed and are not read yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.input.len()
    }

    /// The next record; `None` until more bytes are fed.
    ///
    /// # Errors
    /// What QEMU sent that these modes do not carry, or that makes no sense; the same from then on.
    pub fn read(&mut self) -> Read {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let record = self.advance();
        if let Err(error) = &record {
            self.failed = Some(error.clone());
        }
        record
    }

    /// Says that no more bytes will come, after [`Self::read`] has answered `None`.
    ///
    /// # Errors
    /// [`StreamError::Cut`] where QEMU would have gone on. Whether a pre-copy's devices are all
    /// there is for [`super::tail::split`] to say.
    pub fn finish(&self) -> Result<(), StreamError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let what = match self.place {
            Place::Tail | Place::Ended if self.input.len() == 0 => return Ok(()),
            Place::Tail | Place::Ended => "its end",
            Place::Header | Place::Configuration | Place::Fields => "its beginning",
            Place::Sections => "its sections",
            Place::Body { .. } => "a page",
            Place::Footer { .. } => "a footer",
        };
        Err(StreamError::Cut { what, at: self.input.offset() + self.input.len() as u64 })
    }

    fn advance(&mut self) -> Read {
        match self.place {
            Place::Header => self.header(),
            Place::Configuration => self.configuration(),
            Place::Fields => self.field(),
            Place::Sections => self.section(),
            Place::Body { kind } => self.body(kind),
            Place::Footer { kind } => self.footer(kind),
            Place::Tail => Ok(self.input.take_some().map(Record::DeviceState)),
            Place::Ended => match self.input.len() {
                0 => Ok(None),
                _ => Err(self.out_of_place("something after the end")),
            },
        }
    }

    fn section(&mut self) -> Read {
        match self.input.peek_byte() {
            None => Ok(None),
            Some(wire::COMMAND) => self.command(),
            Some(wire::SECTION_START) => self.start(),
            Some(wire::SECTION_PART) => self.more(Kind::Part),
            Some(wire::SECTION_END) => self.more(Kind::End),
            Some(wire::SECTION_FULL) => self.early_device(),
            Some(wire::SECTION_EOF) => self.end(),
            Some(wire::SUBSECTION) => Err(self.out_of_place("a subsection")),
            Some(wire::DESCRIPTION) => Err(self.out_of_place("a description")),
            Some(wire::CONFIGURATION) => Err(self.out_of_place("a second machine type")),
            Some(wire::FOOTER) => Err(self.out_of_place("a second footer")),
            Some(other) => Err(self.unknown("section type", other.into())),
        }
    }

    fn command(&mut self) -> Read {
        let Some(mut head) = self.input.peek(command::HEAD_BYTES) else { return Ok(None) };
        head.advance(1);
        let (number, length) = (head.get_u16(), usize::from(head.get_u16()));
        let whole = command::HEAD_BYTES + length;
        let at = self.input.offset();
        let Some(bytes) = self.input.peek(whole) else { return Ok(None) };
        let payload = &bytes[command::HEAD_BYTES..];
        let command = if number == command::PACKAGED {
            if length != 4 {
                return Err(self.field_error("a package's header", length as u64));
            }
            let inside = (&payload[..]).get_u32();
            return self.package(whole, inside);
        } else {
            Command::decode(number, payload, &self.layout, at)?
        };
        self.input.take(whole);
        Ok(Some(Record::Command(command)))
    }

    /// What is packed waits until all of it is there: QEMU reads it as a whole, too.
    fn package(&mut self, head: usize, inside: u32) -> Read {
        let length = usize::try_from(inside).unwrap_or(usize::MAX);
        if length > wire::PACKAGE_MOST {
            return Err(self.field_error("a package's length", inside.into()));
        }
        if self.input.len() < head + length {
            return Ok(None);
        }
        self.input.take(head);
        self.packaged = true;
        let packed = self.input.take(length).unwrap_or_default();
        Ok(Some(Record::Command(Command::Packaged(packed))))
    }

    /// The length of a section's head with its id, and the id; `None` while it is not all there.
    fn identified(&mut self) -> Option<(usize, String)> {
        let length = usize::from(self.input.peek(6)?[5]);
        let head = self.input.peek(6 + length)?;
        Some((6 + length, String::from_utf8_lossy(&head[6..]).into_owned()))
    }

    fn early_device(&mut self) -> Read {
        let Some((_, id)) = self.identified() else { return Ok(None) };
        Err(StreamError::Unsupported(Feature::EarlyDevice(id)))
    }

    fn end(&mut self) -> Read {
        if !self.packaged || self.ram.is_none_or(|ram| !ram.ended) {
            return Err(self.out_of_place("the end of the stream"));
        }
        self.input.take(1);
        self.place = Place::Ended;
        Ok(Some(Record::EndOfStream))
    }

    fn out_of_place(&self, what: &'static str) -> StreamError {
        StreamError::OutOfPlace { what, at: self.input.offset() }
    }

    fn field_error(&self, what: &'static str, value: u64) -> StreamError {
        StreamError::Field { what, value, at: self.input.offset() }
    }

    fn unknown(&self, what: &'static str, value: u64) -> StreamError {
        StreamError::Unknown { what, value, at: self.input.offset() }
    }
}

/// A name of printable ASCII, not empty.
fn text(bytes: &[u8]) -> Option<String> {
    let readable = !bytes.is_empty() && bytes.iter().all(u8::is_ascii_graphic);
    readable.then(|| String::from_utf8_lossy(bytes).into_owned())
}
