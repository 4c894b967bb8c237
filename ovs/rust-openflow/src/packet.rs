//! Packets between switch and controller (sections A.4.1 and A.3.7).
//!
//! Used through [`crate::Message`]. Not here: what is in the packet.

use bytes::{BufMut, Bytes, BytesMut};

use crate::action::Action;
use crate::matching::{Match, Oxm};
use crate::types::{NO_BUFFER, PortNo};
use crate::wire::{BodyError, Reader, Wire, put_all, wire_enum};

wire_enum! {
    /// Why a packet came to the controller.
    pub enum PacketInReason: u8 {
        /// No flow matched, or the table-miss flow did.
        NoMatch = 0,
        /// A flow said so.
        Action = 1,
        /// Its TTL was used up.
        InvalidTtl = 2,
    }
}

/// A packet that the switch hands to the controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketIn {
    /// Where the switch keeps it, or [`NO_BUFFER`].
    pub buffer: u32,
    /// Its whole length in bytes, of which `data` may be only the beginning.
    pub total_length: u16,
    /// Why.
    pub reason: PacketInReason,
    /// The table that sent it.
    pub table: u8,
    /// The cookie of the flow that sent it.
    pub cookie: u64,
    /// Where it came from, above all its [`Oxm::InPort`].
    pub matching: Match,
    /// The packet from its Ethernet header on.
    pub data: Bytes,
}

impl PacketIn {
    /// The port that it came in by, if the switch says so, as it must.
    pub fn in_port(&self) -> Option<PortNo> {
        self.matching.fields.iter().find_map(|field| match field {
            Oxm::InPort(port) => Some(*port),
            _ => None,
        })
    }
}

impl Wire for PacketIn {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        Ok(Self {
            buffer: reader.get()?,
            total_length: reader.get()?,
            reason: reader.get()?,
            table: reader.get()?,
            cookie: reader.get()?,
            matching: reader.get()?,
            data: {
                // Two bytes, so that the IP header behind the 14 of Ethernet is aligned.
                reader.skip(2)?;
                reader.rest()
            },
        })
    }

    fn put(&self, out: &mut BytesMut) {
        out.put_u32(self.buffer);
        out.put_u16(self.total_length);
        self.reason.put(out);
        out.put_u8(self.table);
        out.put_u64(self.cookie);
        self.matching.put(out);
        out.put_u16(0);
        out.put_slice(&self.data);
    }
}

/// A packet that the controller has the switch send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketOut {
    /// A packet that the switch keeps, or [`NO_BUFFER`].
    pub buffer: u32,
    /// Where it is to seem to come from; [`PortNo::CONTROLLER`] if from nowhere.
    pub in_port: PortNo,
    /// What to do with it.
    pub actions: Vec<Action>,
    /// The packet from its Ethernet header on, when it is not buffered.
    pub data: Bytes,
}

impl PacketOut {
    /// Sends `data` out of one port.
    pub fn to_port(port: PortNo, data: Bytes) -> Self {
        let actions = vec![Action::output(port)];
        Self { buffer: NO_BUFFER, in_port: PortNo::CONTROLLER, actions, data }
    }
}

impl Wire for PacketOut {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        let buffer = reader.get()?;
        let in_port = reader.get()?;
        let length: u16 = reader.get()?;
        reader.skip(6)?;
        let actions = reader.inner(length.into())?.all()?;
        Ok(Self { buffer, in_port, actions, data: reader.rest() })
    }

    fn put(&self, out: &mut BytesMut) {
        let mut actions = BytesMut::new();
        put_all(&self.actions, &mut actions);
        out.put_u32(self.buffer);
        self.in_port.put(out);
        // Too long for 16 bits is too long for the message; `encode` refuses that.
        out.put_u16(u16::try_from(actions.len()).unwrap_or(u16::MAX));
        out.put_bytes(0, 6);
        out.put_slice(&actions);
        out.put_slice(&self.data);
    }
}
