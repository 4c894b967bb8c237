//! What is done to a packet (section A.2.5).
//!
//! Used by instructions and packet-outs. Actions without a name here (MPLS, TTL, experimenters)
//! are kept raw.

use bytes::{BufMut, Bytes, BytesMut};

use crate::matching::Oxm;
use crate::types::PortNo;
use crate::wire::{BodyError, Reader, Wire, pad_to_8, put_sized, sized};

/// `max_len` of an output to the controller that asks for the whole packet (`OFPCML_NO_BUFFER`).
pub const WHOLE_PACKET: u16 = 0xffff;

/// One step of what is done to a packet.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Send it out of a port.
    Output {
        /// Where to.
        port: PortNo,
        /// How many bytes of it, when the port is the controller.
        max_len: u16,
    },
    /// Put an empty VLAN tag in front, of type 0x8100 or 0x88a8.
    PushVlan(u16),
    /// Take the outermost VLAN tag away.
    PopVlan,
    /// The queue that later outputs use on their port. It must have been made by other means; a
    /// switch does not have to complain when it does not exist.
    SetQueue(u32),
    /// Hand it to a group.
    Group(u32),
    /// Overwrite a field.
    SetField(Oxm),
    /// Kept as it came: the type, and what follows its 4-byte header, with its padding.
    Raw {
        /// Action type.
        kind: u16,
        /// Everything behind type and length.
        body: Bytes,
    },
}

impl Action {
    /// Send it out of `port`; to the controller in its whole length.
    pub fn output(port: PortNo) -> Self {
        Self::Output { port, max_len: WHOLE_PACKET }
    }

    fn kind(&self) -> u16 {
        match self {
            Self::Output { .. } => 0,
            Self::PushVlan(_) => 17,
            Self::PopVlan => 18,
            Self::SetQueue(_) => 21,
            Self::Group(_) => 22,
            Self::SetField(_) => 25,
            Self::Raw { kind, .. } => *kind,
        }
    }

    fn put_body(&self, out: &mut BytesMut) {
        match self {
            Self::Output { port, max_len } => {
                port.put(out);
                out.put_u16(*max_len);
            }
            Self::PushVlan(ethertype) => out.put_u16(*ethertype),
            Self::PopVlan => {}
            Self::SetQueue(queue) => out.put_u32(*queue),
            Self::Group(group) => out.put_u32(*group),
            Self::SetField(field) => field.put(out),
            Self::Raw { body, .. } => out.put_slice(body),
        }
    }
}

impl Wire for Action {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        let kind: u16 = reader.get()?;
        let length: u16 = reader.get()?;
        if length < 8 || !length.is_multiple_of(8) {
            return Err(BodyError::BadLength { what: "action", length: length.into() });
        }
        let mut body = sized(reader, "action", length, 4)?;
        Ok(match kind {
            0 => Self::Output { port: body.get()?, max_len: body.get()? },
            17 => Self::PushVlan(body.get()?),
            18 => Self::PopVlan,
            21 => Self::SetQueue(body.get()?),
            22 => Self::Group(body.get()?),
            25 => {
                let field: Oxm = body.get()?;
                if field.is_masked() {
                    return Err(BodyError::MaskedSetField);
                }
                Self::SetField(field)
            }
            _ => Self::Raw { kind, body: body.rest() },
        })
    }

    fn put(&self, out: &mut BytesMut) {
        // Unlike those of matches, the length of an action counts its padding.
        put_sized(out, 2, |out| {
            let start = out.len();
            out.put_u16(self.kind());
            out.put_u16(0);
            self.put_body(out);
            pad_to_8(out, start);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_have_the_bytes_of_the_specification() {
        let mut out = BytesMut::new();
        Action::SetQueue(7).put(&mut out);
        Action::SetField(Oxm::IpDscp(7)).put(&mut out);
        assert_eq!(out[..8], [0, 21, 0, 8, 0, 0, 0, 7]);
        assert_eq!(out[8..], [0, 25, 0, 16, 0x80, 0, 16, 1, 7, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_length_that_would_not_advance_is_refused() {
        for length in [0, 4, 7, 12] {
            let bytes = [0, 21, 0, length, 0, 0, 0, 7, 0, 0, 0, 0];
            assert!(Action::get(&mut Reader::new(&bytes)).is_err(), "length {length}");
        }
    }
}
