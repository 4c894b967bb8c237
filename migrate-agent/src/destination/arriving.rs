//! A guest that arrives without its RAM: what the source leaves of QEMU's stream, and its notes of
//! where the rest is, put together until END. Pure; used by `receiving.rs`, which then starts
//! `gathering/` with it.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use lifeboat_protocol::units;
use lifeboat_scatter_gather::ledger::{Ledger, Where};
use lifeboat_scatter_gather::link::pages::{Note, PageKey};
use lifeboat_scatter_gather::page::{PAGE_BYTES, PageAt};

use crate::postcopy::{Event, Gather, GatherError};
use crate::qemu::stream::{
    ConfigurationField, RamLayout, RamRecord, Record, StreamError, StreamReader, tail,
};

/// RAM blocks beside the guest's RAM, firmware and video memory above all, may have so much in all.
const BESIDE_BYTES_MOST: u64 = 1 << 30;
/// Devices' state of a large guest is some megabytes.
const DEVICES_BYTES_MOST: usize = 256 << 20;

/// A guest on its way.
#[derive(Debug, Default)]
pub(super) struct Arriving {
    reader: StreamReader,
    pages_most: u64,
    machine: Option<String>,
    fields: Vec<ConfigurationField>,
    in_hand: BTreeMap<PageAt, Option<Bytes>>,
    notes: Vec<Note>,
    tail: BytesMut,
    pub(super) key: Option<PageKey>,
}

/// A guest of which everything is known.
#[derive(Debug)]
pub(super) struct Arrived {
    /// QEMU's machine type.
    pub(super) machine: String,
    /// What follows it in the stream.
    pub(super) fields: Vec<ConfigurationField>,
    /// Its RAM blocks.
    pub(super) layout: RamLayout,
    /// The block whose pages are elsewhere.
    pub(super) ram: u16,
    /// What the source said of it.
    pub(super) notes: Vec<Note>,
    /// The devices' state.
    pub(super) devices: Bytes,
    /// Where every page is.
    pub(super) gather: Gather,
    /// Pages that came with the stream.
    pub(super) in_hand: BTreeMap<PageAt, Bytes>,
    /// The pages that are elsewhere.
    pub(super) elsewhere: u64,
    /// What opens them in stores.
    pub(super) key: Option<PageKey>,
}

impl Arriving {
    /// Of a guest with so much RAM.
    pub(super) fn new(memory: units::Bytes) -> Self {
        let pages_most = memory.0.saturating_add(BESIDE_BYTES_MOST) / PAGE_BYTES as u64;
        Self { pages_most, ..Self::default() }
    }

    /// Takes in some of the stream.
    pub(super) fn feed(&mut self, bytes: Bytes) -> Result<(), StreamError> {
        self.reader.feed(bytes);
        while let Some(record) = self.reader.read()? {
            match record {
                Record::Configuration { machine } => self.machine = Some(machine),
                Record::ConfigurationField(field) => self.fields.push(field),
                Record::Ram(RamRecord::Page { at, data, .. }) => {
                    // A copy: the slice would keep all that was received with it.
                    self.in_hand.insert(at, Some(Bytes::copy_from_slice(&data)));
                }
                Record::Ram(RamRecord::Zero { at, .. }) => {
                    self.in_hand.insert(at, None);
                }
                Record::RamStart { layout, .. } if layout.pages() > self.pages_most => {
                    let (what, value) = ("memory in all", layout.pages());
                    return Err(StreamError::Field { what, value, at: 0 });
                }
                Record::DeviceState(bytes) => {
                    if self.tail.len() + bytes.len() > DEVICES_BYTES_MOST {
                        let value = (self.tail.len() + bytes.len()) as u64;
                        return Err(StreamError::Field { what: "a devices' state", value, at: 0 });
                    }
                    self.tail.extend_from_slice(&bytes);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes in what the source says of the pages that it kept. Their number is bounded by the
    /// ledger's, which every note has to fit.
    pub(super) fn note(&mut self, notes: Vec<Note>) -> Result<(), StreamError> {
        self.notes.extend(notes);
        match self.notes.len() as u64 <= self.pages_most {
            true => Ok(()),
            false => {
                let value = self.notes.len() as u64;
                Err(StreamError::Field { what: "a number of notes", value, at: 0 })
            }
        }
    }

    /// Everything has come. `batch`: pages that are asked of the source at once.
    pub(super) fn finish(self, batch: usize) -> Result<Arrived, crate::source::Failure> {
        self.reader.finish()?;
        let layout = self.reader.layout().clone();
        let devices = Bytes::copy_from_slice(tail::split(&self.tail)?.devices);
        let mut gather = gather(&layout, batch)?;
        let mut in_hand = BTreeMap::new();
        for (at, data) in self.in_hand {
            let place = match data {
                Some(_) => Where::AtSource,
                None => Where::Zero,
            };
            note(&mut gather, at, place)?;
            if let Some(data) = data {
                in_hand.insert(at, data);
            }
        }
        for told in &self.notes {
            let place = if told.zero { Where::Zero } else { Where::AtSource };
            gather.apply(Event::NotedRun(told.run, place), &mut Vec::new())?;
        }
        let ram = self.notes.first().map_or(0, |note| note.run.block);
        let elsewhere = gather.counts().at_source - in_hand.len() as u64;
        let machine = self.machine.unwrap_or_default();
        let (fields, key, notes) = (self.fields, self.key, self.notes);
        Ok(Arrived {
            machine,
            fields,
            layout,
            ram,
            notes,
            devices,
            gather,
            in_hand,
            elsewhere,
            key,
        })
    }
}

/// A gather of a guest of this layout, which its reader has bounded.
pub(super) fn gather(layout: &RamLayout, batch: usize) -> Result<Gather, GatherError> {
    let blocks: Vec<u32> = layout.blocks().iter().map(|block| block.pages).collect();
    Ok(Gather::new(Ledger::new(&blocks, layout.pages())?, batch))
}

fn note(gather: &mut Gather, at: PageAt, place: Where) -> Result<(), GatherError> {
    // Before COMPLETE a note asks for nothing to be done.
    gather.apply(Event::Noted(at, place), &mut Vec::new())
}
