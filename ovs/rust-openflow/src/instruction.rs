//! What a flow does with the packets that match it (section A.2.4).
//!
//! Used by flow mods and flow statistics. Instructions without a name here are kept raw.

use bytes::{BufMut, Bytes, BytesMut};

use crate::action::Action;
use crate::wire::{BodyError, Reader, Wire, pad_to_8, put_all, put_sized, sized};

/// One instruction of a flow.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Instruction {
    /// Go on in a later table.
    GotoTable(u8),
    /// Note something for later tables.
    WriteMetadata {
        /// The bits to set.
        metadata: u64,
        /// Which bits are meant.
        mask: u64,
    },
    /// Add to the action set that runs when the tables end.
    WriteActions(Vec<Action>),
    /// Do this now, in this order.
    ApplyActions(Vec<Action>),
    /// Empty the action set.
    ClearActions,
    /// Pass a meter first, which may drop the packet.
    Meter(u32),
    /// Kept as it came: the type, and what follows its 4-byte header.
    Raw {
        /// Instruction type.
        kind: u16,
        /// Everything behind type and length.
        body: Bytes,
    },
}

impl Instruction {
    fn kind(&self) -> u16 {
        match self {
            Self::GotoTable(_) => 1,
            Self::WriteMetadata { .. } => 2,
            Self::WriteActions(_) => 3,
            Self::ApplyActions(_) => 4,
            Self::ClearActions => 5,
            Self::Meter(_) => 6,
            Self::Raw { kind, .. } => *kind,
        }
    }

    fn put_body(&self, out: &mut BytesMut) {
        match self {
            Self::GotoTable(table) => out.put_u8(*table),
            Self::WriteMetadata { metadata, mask } => {
                out.put_u32(0);
                out.put_u64(*metadata);
                out.put_u64(*mask);
            }
            Self::WriteActions(actions) | Self::ApplyActions(actions) => {
                out.put_u32(0);
                put_all(actions, out);
            }
            Self::ClearActions => {}
            Self::Meter(meter) => out.put_u32(*meter),
            Self::Raw { body, .. } => out.put_slice(body),
        }
    }
}

fn actions(body: &mut Reader<'_>) -> Result<Vec<Action>, BodyError> {
    body.skip(4)?;
    body.all()
}

impl Wire for Instruction {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        let kind: u16 = reader.get()?;
        let length: u16 = reader.get()?;
        if length < 8 || !length.is_multiple_of(8) {
            return Err(BodyError::BadLength { what: "instruction", length: length.into() });
        }
        let mut body = sized(reader, "instruction", length, 4)?;
        Ok(match kind {
            1 => Self::GotoTable(body.get()?),
            2 => {
                body.skip(4)?;
                Self::WriteMetadata { metadata: body.get()?, mask: body.get()? }
            }
            3 => Self::WriteActions(actions(&mut body)?),
            4 => Self::ApplyActions(actions(&mut body)?),
            5 => Self::ClearActions,
            6 => Self::Meter(body.get()?),
            _ => Self::Raw { kind, body: body.rest() },
        })
    }

    fn put(&self, out: &mut BytesMut) {
        put_sized(out, 2, |out| {
            let start = out.len();
            out.put_u16(self.kind());
            out.put_u16(0);
            self.put_body(out);
            pad_to_8(out, start);
        });
    }
}
