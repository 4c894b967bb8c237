//! Meters: limits that drop what exceeds them (section A.3.4.4).
//!
//! Used through [`crate::Message`]. Meter statistics are in [`crate::multipart`].

use bytes::{BufMut, BytesMut};

use crate::wire::{BodyError, Reader, Wire, put_all, put_sized, sized, wire_enum};

/// All meters, in deletions and requests (`OFPM_ALL`).
pub const ALL_METERS: u32 = u32::MAX;
/// Flag: rates are in kbit/s.
pub const RATE_KBPS: u16 = 1;
/// Flag: rates are in packets/s.
pub const RATE_PKTPS: u16 = 1 << 1;
/// Flag: the bands' burst sizes count.
pub const BURST: u16 = 1 << 2;
/// Flag: keep statistics.
pub const STATS: u16 = 1 << 3;

wire_enum! {
    /// What a meter mod does.
    pub enum MeterCommand: u16 {
        /// Add one that does not exist.
        Add = 0,
        /// Change one that does.
        Modify = 1,
        /// Delete it, with all flows that use it.
        Delete = 2,
    }
}

/// From which rate on what happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Band {
    /// In kbit/s or packets/s, as the meter's flags say.
    pub rate: u32,
    /// In kbit or packets; counts only with [`BURST`].
    pub burst: u32,
    /// What is done with what exceeds the rate.
    pub effect: BandEffect,
}

/// What a band does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BandEffect {
    /// Drop.
    Drop,
    /// Raise the drop precedence in the DSCP field by so much.
    DscpRemark(u8),
    /// Another type, with the 4 bytes that follow the burst size.
    Other {
        /// Band type.
        kind: u16,
        /// What follows the burst size.
        argument: u32,
    },
}

impl Wire for Band {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        let kind: u16 = reader.get()?;
        let length: u16 = reader.get()?;
        let mut body = sized(reader, "meter band", length, 4)?;
        let (rate, burst) = (body.get()?, body.get()?);
        let argument: u32 = body.get()?;
        let effect = match kind {
            1 => BandEffect::Drop,
            2 => BandEffect::DscpRemark(argument.to_be_bytes()[0]),
            _ => BandEffect::Other { kind, argument },
        };
        Ok(Self { rate, burst, effect })
    }

    fn put(&self, out: &mut BytesMut) {
        let (kind, argument) = match self.effect {
            BandEffect::Drop => (1, 0),
            BandEffect::DscpRemark(level) => (2, u32::from(level) << 24),
            BandEffect::Other { kind, argument } => (kind, argument),
        };
        put_sized(out, 2, |out| {
            out.put_u16(kind);
            out.put_u16(0);
            out.put_u32(self.rate);
            out.put_u32(self.burst);
            out.put_u32(argument);
        });
    }
}

/// A change of a meter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeterMod {
    /// What to do.
    pub command: MeterCommand,
    /// [`RATE_KBPS`] and the others.
    pub flags: u16,
    /// Which meter, from 1.
    pub meter: u32,
    /// Its bands; none in a deletion.
    pub bands: Vec<Band>,
}

impl MeterMod {
    /// A meter that drops what exceeds `rate` kbit/s, after a burst of `burst` kbit.
    pub fn drop_above(command: MeterCommand, meter: u32, rate: u32, burst: u32) -> Self {
        let bands = vec![Band { rate, burst, effect: BandEffect::Drop }];
        Self { command, flags: RATE_KBPS | BURST | STATS, meter, bands }
    }

    /// Deletes a meter, and with it every flow that uses it.
    pub fn delete(meter: u32) -> Self {
        Self { command: MeterCommand::Delete, flags: 0, meter, bands: Vec::new() }
    }
}

impl Wire for MeterMod {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        Ok(Self {
            command: reader.get()?,
            flags: reader.get()?,
            meter: reader.get()?,
            bands: reader.all()?,
        })
    }

    fn put(&self, out: &mut BytesMut) {
        self.command.put(out);
        out.put_u16(self.flags);
        out.put_u32(self.meter);
        put_all(&self.bands, out);
    }
}
