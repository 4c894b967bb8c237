//! Writes records as a migration stream. Used by whoever feeds a destination's QEMU.
//!
//! What comes out is a row of slices for one vectored write: pages are not copied, everything
//! between them is gathered. The grammar of the stream is its user's ([`super::compose`] has the
//! sentences); names and numbers are those of the layout that was written or given.

use bytes::{BufMut, Bytes, BytesMut};

use lifeboat_scatter_gather::page::PageAt;

use super::block::RamLayout;
use super::command::{self, Command};
use super::record::{ConfigurationField, Kind, RamRecord, Record};
use super::wire;

/// Records in, slices out.
#[derive(Debug, Default)]
pub struct StreamWriter {
    layout: RamLayout,
    /// The block of the record before, so that its name need not be repeated.
    last_block: Option<u16>,
    /// What was written since the last slice that is not ours.
    open: BytesMut,
    ready: Vec<Bytes>,
    length: usize,
}

impl StreamWriter {
    /// A writer at the beginning of a stream, which learns the blocks from [`Record::RamStart`].
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A writer in the middle of a stream, after the blocks were announced.
    #[must_use]
    pub fn with_layout(layout: RamLayout) -> Self {
        Self { layout, ..Self::default() }
    }

    /// Bytes that wait to be taken.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length + self.open.len()
    }

    /// Takes everything that was written, in order.
    #[must_use]
    pub fn take(&mut self) -> Vec<Bytes> {
        self.close();
        self.length = 0;
        std::mem::take(&mut self.ready)
    }

    /// Writes one page, its block's name only where it differs from the page before.
    ///
    /// # Panics
    /// If `data` is not a page, or the page is not of the layout: both are ours.
    pub fn page(&mut self, at: PageAt, data: Bytes) {
        let continued = self.last_block == Some(at.block);
        self.write(&Record::Ram(RamRecord::Page { at, continued, data }));
    }

    /// Writes one page of zeroes. Panics as [`Self::page`] does.
    pub fn zero(&mut self, at: PageAt) {
        let continued = self.last_block == Some(at.block);
        self.write(&Record::Ram(RamRecord::Zero { at, continued }));
    }

    /// Writes one record.
    ///
    /// # Panics
    /// If the record is not of the layout, or longer than the stream can say: both are ours, for
    /// what a reader returns always fits.
    pub fn write(&mut self, record: &Record) {
        match record {
            Record::Header => {
                self.open.put_u32(wire::MAGIC);
                self.open.put_u32(wire::VERSION);
            }
            Record::Configuration { machine } => self.configuration(machine),
            Record::ConfigurationField(field) => self.field(*field),
            Record::Command(command) => self.command(command),
            Record::RamStart { section, layout } => self.start(*section, layout),
            Record::RamSection { section, kind } => {
                self.open.put_u8(match kind {
                    Kind::Part => wire::SECTION_PART,
                    Kind::End => wire::SECTION_END,
                });
                self.open.put_u32(*section);
            }
            Record::Ram(record) => self.ram(record),
            Record::Footer { section } => {
                self.open.put_u8(wire::FOOTER);
                self.open.put_u32(*section);
            }
            Record::DeviceState(bytes) => self.slice(bytes.clone()),
            Record::EndOfStream => self.open.put_u8(wire::SECTION_EOF),
        }
    }

    fn configuration(&mut self, machine: &str) {
        assert!(machine.len() <= wire::MACHINE_NAME_MOST, "a machine type is a short name");
        self.open.put_u8(wire::CONFIGURATION);
        self.open.put_u32(machine.len() as u32);
        self.open.put_slice(machine.as_bytes());
    }

    fn field(&mut self, field: ConfigurationField) {
        self.open.put_u8(wire::SUBSECTION);
        let name = match field {
            ConfigurationField::Uuid(_) => "configuration/uuid",
            ConfigurationField::TargetPageBits(_) => "configuration/target-page-bits",
        };
        command::put_name(name, &mut self.open);
        self.open.put_u32(1);
        match field {
            ConfigurationField::Uuid(uuid) => self.open.put_slice(&uuid),
            ConfigurationField::TargetPageBits(bits) => self.open.put_u32(bits),
        }
    }

    fn command(&mut self, command: &Command) {
        command.encode(&self.layout, &mut self.open);
        if let Command::Packaged(inside) = command {
            self.slice(inside.clone());
        }
    }

    fn start(&mut self, section: u32, layout: &RamLayout) {
        self.layout = layout.clone();
        self.last_block = None;
        self.open.put_u8(wire::SECTION_START);
        self.open.put_u32(section);
        command::put_name(wire::RAM_ID, &mut self.open);
        self.open.put_u32(0);
        self.open.put_u32(wire::RAM_VERSION);
        self.open.put_u64(layout.pages() << wire::PAGE_BITS | wire::RAM_MEM_SIZE);
        for block in layout.blocks() {
            command::put_name(&block.name, &mut self.open);
            self.open.put_u64(u64::from(block.pages) << wire::PAGE_BITS);
        }
    }

    fn ram(&mut self, record: &RamRecord) {
        match record {
            RamRecord::Page { at, continued, data } => {
                assert_eq!(data.len(), wire::PAGE_BYTES, "a page has the size of a page");
                self.record(*at, wire::RAM_PAGE, *continued);
                self.slice(data.clone());
            }
            RamRecord::Zero { at, continued } => {
                self.record(*at, wire::RAM_ZERO, *continued);
                self.open.put_u8(0);
            }
            RamRecord::EndOfBody => self.open.put_u64(wire::RAM_EOS),
        }
    }

    fn record(&mut self, at: PageAt, flag: u64, continued: bool) {
        if continued {
            self.open.put_u64(at.offset() | flag | wire::RAM_CONTINUE);
        } else {
            self.open.put_u64(at.offset() | flag);
            command::put_name(command::name_of(at.block, &self.layout), &mut self.open);
        }
        self.last_block = Some(at.block);
    }

    /// Adds a slice that is not copied.
    fn slice(&mut self, bytes: Bytes) {
        self.close();
        self.length += bytes.len();
        self.ready.push(bytes);
    }

    fn close(&mut self) {
        if !self.open.is_empty() {
            self.length += self.open.len();
            self.ready.push(self.open.split().freeze());
        }
    }
}
