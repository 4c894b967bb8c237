//! The records that statistics replies are made of (section A.3.5).
//!
//! Used by [`super`]. Counters of all ones mean that the switch does not keep that one.

use std::time::Duration;

use bytes::{BufMut, BytesMut};

use crate::instruction::Instruction;
use crate::matching::Match;
use crate::meter::Band;
use crate::types::{FixedText, PortNo};
use crate::wire::{BodyError, Reader, Wire, put_all, put_sized, sized, wire_struct};

wire_struct! {
    /// Who made the switch.
    pub struct Description {
        /// Manufacturer.
        manufacturer: FixedText<256>,
        /// Hardware.
        hardware: FixedText<256>,
        /// Software and its version.
        software: FixedText<256>,
        /// Serial number.
        serial: FixedText<32>,
        /// The datapath, for people; Open vSwitch puts the bridge's name here.
        datapath: FixedText<256>,
    }
}

wire_struct! {
    /// Counters of a port.
    pub struct PortStats {
        /// Which port.
        port: PortNo => pad 4,
        /// Packets received.
        rx_packets: u64,
        /// Packets sent.
        tx_packets: u64,
        /// Bytes received.
        rx_bytes: u64,
        /// Bytes sent.
        tx_bytes: u64,
        /// Received and dropped.
        rx_dropped: u64,
        /// Dropped instead of sent.
        tx_dropped: u64,
        /// Received with errors.
        rx_errors: u64,
        /// Not sent for errors.
        tx_errors: u64,
        /// Frame alignment errors.
        rx_frame_errors: u64,
        /// Overruns.
        rx_over_errors: u64,
        /// Checksum errors.
        rx_crc_errors: u64,
        /// Collisions.
        collisions: u64,
        /// How long the port has existed.
        age: Duration,
    }
}

wire_struct! {
    /// Counters of a queue.
    pub struct QueueStats {
        /// Which port.
        port: PortNo,
        /// Which queue of it.
        queue: u32,
        /// Bytes sent.
        tx_bytes: u64,
        /// Packets sent.
        tx_packets: u64,
        /// Packets dropped, because the queue was full.
        tx_errors: u64,
        /// How long it has existed. Open vSwitch 3.1 sends rubbish here; use a clock of your own.
        age: Duration,
    }
}

wire_struct! {
    /// Sums over the flows that a request meant.
    pub struct Aggregate {
        /// Packets.
        packets: u64,
        /// Bytes.
        bytes: u64,
        /// Number of flows.
        flows: u32 => pad 4,
    }
}

wire_struct! {
    /// Counters of a table.
    pub struct TableStats {
        /// Which table.
        table: u8 => pad 3,
        /// Flows in it.
        active: u32,
        /// Packets looked up in it.
        lookups: u64,
        /// Packets that matched.
        matched: u64,
    }
}

wire_struct! {
    /// What meters the switch can have.
    pub struct MeterFeatures {
        /// How many.
        max_meters: u32,
        /// Bit *n* stands for band type *n*; 1 is drop.
        band_types: u32,
        /// The flags of [`crate::meter`] that it understands.
        capabilities: u32,
        /// Bands in one meter.
        max_bands: u8,
        /// Colours.
        max_colors: u8 => pad 2,
    }
}

/// A flow, with its counters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowStats {
    /// Its table.
    pub table: u8,
    /// How long it has existed.
    pub age: Duration,
    /// Its priority.
    pub priority: u16,
    /// Seconds; 0 is never.
    pub idle_timeout: u16,
    /// Seconds; 0 is never.
    pub hard_timeout: u16,
    /// As in [`crate::flow::FlowMod::flags`].
    pub flags: u16,
    /// Its cookie.
    pub cookie: u64,
    /// Packets that it matched.
    pub packets: u64,
    /// Bytes that it matched.
    pub bytes: u64,
    /// Which packets.
    pub matching: Match,
    /// What with them.
    pub instructions: Vec<Instruction>,
}

impl Wire for FlowStats {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        let length: u16 = reader.get()?;
        let mut body = sized(reader, "flow statistics", length, 2)?;
        let table = body.get()?;
        body.skip(1)?;
        let age = body.get()?;
        let (priority, idle_timeout, hard_timeout) = (body.get()?, body.get()?, body.get()?);
        let flags = body.get()?;
        body.skip(4)?;
        Ok(Self {
            table,
            age,
            priority,
            idle_timeout,
            hard_timeout,
            flags,
            cookie: body.get()?,
            packets: body.get()?,
            bytes: body.get()?,
            matching: body.get()?,
            instructions: body.all()?,
        })
    }

    fn put(&self, out: &mut BytesMut) {
        put_sized(out, 0, |out| {
            out.put_u16(0);
            out.put_u8(self.table);
            out.put_u8(0);
            self.age.put(out);
            out.put_u16(self.priority);
            out.put_u16(self.idle_timeout);
            out.put_u16(self.hard_timeout);
            out.put_u16(self.flags);
            out.put_u32(0);
            out.put_u64(self.cookie);
            out.put_u64(self.packets);
            out.put_u64(self.bytes);
            self.matching.put(out);
            put_all(&self.instructions, out);
        });
    }
}

wire_struct! {
    /// Counters of one band of a meter: what exceeded its rate.
    pub struct BandStats {
        /// Packets.
        packets: u64,
        /// Bytes.
        bytes: u64,
    }
}

/// Counters of a meter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeterStats {
    /// Which meter.
    pub meter: u32,
    /// Flows that use it.
    pub flows: u32,
    /// Packets that came to it.
    pub packets: u64,
    /// Bytes that came to it.
    pub bytes: u64,
    /// How long it has existed.
    pub age: Duration,
    /// In the order of its bands.
    pub bands: Vec<BandStats>,
}

impl Wire for MeterStats {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        let meter = reader.get()?;
        let length: u16 = reader.get()?;
        let mut body = sized(reader, "meter statistics", length, 6)?;
        body.skip(6)?;
        Ok(Self {
            meter,
            flows: body.get()?,
            packets: body.get()?,
            bytes: body.get()?,
            age: body.get()?,
            bands: body.all()?,
        })
    }

    fn put(&self, out: &mut BytesMut) {
        put_sized(out, 4, |out| {
            out.put_u32(self.meter);
            out.put_bytes(0, 8);
            out.put_u32(self.flows);
            out.put_u64(self.packets);
            out.put_u64(self.bytes);
            self.age.put(out);
            put_all(&self.bands, out);
        });
    }
}

/// A meter as it is set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeterConfig {
    /// As in [`crate::meter::MeterMod::flags`].
    pub flags: u16,
    /// Which meter.
    pub meter: u32,
    /// Its bands.
    pub bands: Vec<Band>,
}

impl Wire for MeterConfig {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        let length: u16 = reader.get()?;
        let mut body = sized(reader, "meter configuration", length, 2)?;
        Ok(Self { flags: body.get()?, meter: body.get()?, bands: body.all()? })
    }

    fn put(&self, out: &mut BytesMut) {
        put_sized(out, 0, |out| {
            out.put_u16(0);
            out.put_u16(self.flags);
            out.put_u32(self.meter);
            put_all(&self.bands, out);
        });
    }
}
