//! LLDP frames: bytes to words and back (IEEE 802.1AB-2016, clauses 8 and 9). Pure.
//!
//! Used by whoever wants to know which ports face each other: it has a switch send a frame out of
//! one port and looks where it arrives. Only what that needs is here: chassis, port, time to live,
//! and TLVs of one organization; everything else is stepped over. A frame comes from a cable and may
//! hold anything, so nothing that it says about lengths is believed before it is checked. Not here:
//! what a chassis's name means, and whether a frame is to be believed.
//!
//! ```text
//!   6 destination   6 source   2 0x88cc   TLVs: 7 bits type, 9 bits length, value ... End
//!   01:80:c2:00:00:0e (never forwarded by a bridge)
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The EtherType of LLDP.
pub const ETHERTYPE: u16 = 0x88cc;
/// The address of the nearest bridge: frames to it end at the next one (clause 7.1).
pub const NEAREST_BRIDGE: [u8; 6] = [0x01, 0x80, 0xc2, 0x00, 0x00, 0x0e];

/// The longest value of a TLV: its length has nine bits.
const VALUE_MAX: usize = 511;
/// Chassis and port ids have 1 to 255 bytes behind their subtype (clauses 8.5.2.3, 8.5.3.3).
const ID_MAX: usize = 255;
/// Frames that are longer than any Ethernet carries are not looked at.
const FRAME_MAX: usize = 9216;
/// Shorter Ethernet frames are padded to this, without the checksum.
const FRAME_MIN: usize = 60;

const END: u8 = 0;
const CHASSIS: u8 = 1;
const PORT: u8 = 2;
const TTL: u8 = 3;
const ORGANIZATION: u8 = 127;

/// A name and how it is to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Id {
    /// How; 7 is "assigned locally" for both chassis and ports.
    pub subtype: u8,
    /// The name.
    pub value: Bytes,
}

impl Id {
    /// A name that means something only to whoever gave it.
    pub fn local(value: impl Into<Bytes>) -> Self {
        Self { subtype: 7, value: value.into() }
    }
}

/// A TLV of an organization (clause 8.6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Own {
    /// Whose.
    pub organization: [u8; 3],
    /// Which of its TLVs.
    pub subtype: u8,
    /// What it says.
    pub value: Bytes,
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The address of the port that it left by.
    pub source: [u8; 6],
    /// Who sends.
    pub chassis: Id,
    /// By which port.
    pub port: Id,
    /// Seconds for which that may be believed.
    pub ttl: u16,
    /// What organizations say, in their order.
    pub own: Vec<Own>,
}

/// Why bytes are no LLDP frame that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LldpError {
    /// Of another protocol.
    #[error("a frame of another protocol than LLDP")]
    OtherProtocol,
    /// It ends inside of something.
    #[error("an LLDP frame ends inside of its TLV {kind}")]
    Truncated {
        /// The type of the TLV; 0 also for the Ethernet header.
        kind: u8,
    },
    /// It does not begin with chassis, port and time to live, in this order (clause 8.2).
    #[error("an LLDP frame has TLV {found} where {wanted} must be")]
    Order {
        /// What is there.
        found: u8,
        /// What should be.
        wanted: u8,
    },
    /// A TLV whose value cannot have this length.
    #[error("an LLDP frame has {length} bytes in its TLV {kind}")]
    Length {
        /// The type of the TLV.
        kind: u8,
        /// Of its value.
        length: usize,
    },
    /// A frame that no Ethernet carries.
    #[error("an LLDP frame of {length} bytes is too long")]
    TooLong {
        /// In bytes.
        length: usize,
    },
}

/// Reads a frame from its Ethernet header on. What follows the End TLV is padding.
///
/// # Errors
/// When it is of another protocol, or not whole.
pub fn decode(frame: &Bytes) -> Result<Frame, LldpError> {
    if frame.len() > FRAME_MAX {
        return Err(LldpError::TooLong { length: frame.len() });
    }
    let mut rest = frame.clone();
    if rest.len() < 14 {
        return Err(LldpError::Truncated { kind: 0 });
    }
    rest.advance(6);
    let mut source = [0; 6];
    rest.copy_to_slice(&mut source);
    if rest.get_u16() != ETHERTYPE {
        return Err(LldpError::OtherProtocol);
    }
    let chassis = id(wanted(&mut rest, CHASSIS)?, CHASSIS)?;
    let port = id(wanted(&mut rest, PORT)?, PORT)?;
    let mut time = wanted(&mut rest, TTL)?;
    if time.len() < 2 {
        return Err(LldpError::Length { kind: TTL, length: time.len() });
    }
    let ttl = time.get_u16();
    let mut own = Vec::new();
    loop {
        match tlv(&mut rest)? {
            (END, _) => return Ok(Frame { source, chassis, port, ttl, own }),
            (ORGANIZATION, value) => own.push(organization(value)?),
            _ => {}
        }
    }
}

/// Writes a frame, padded to what Ethernet needs.
///
/// # Errors
/// When a name or value has a length that no TLV can have.
pub fn encode(frame: &Frame) -> Result<Bytes, LldpError> {
    let mut out = BytesMut::with_capacity(128);
    out.put_slice(&NEAREST_BRIDGE);
    out.put_slice(&frame.source);
    out.put_u16(ETHERTYPE);
    put_id(CHASSIS, &frame.chassis, &mut out)?;
    put_id(PORT, &frame.port, &mut out)?;
    put_head(TTL, 2, &mut out)?;
    out.put_u16(frame.ttl);
    for own in &frame.own {
        put_head(ORGANIZATION, 4 + own.value.len(), &mut out)?;
        out.put_slice(&own.organization);
        out.put_u8(own.subtype);
        out.put_slice(&own.value);
    }
    put_head(END, 0, &mut out)?;
    if out.len() > FRAME_MAX {
        return Err(LldpError::TooLong { length: out.len() });
    }
    out.put_bytes(0, FRAME_MIN.saturating_sub(out.len()));
    Ok(out.freeze())
}

/// The next TLV: its type and its value.
fn tlv(rest: &mut Bytes) -> Result<(u8, Bytes), LldpError> {
    if rest.len() < 2 {
        return Err(LldpError::Truncated { kind: END });
    }
    let head = rest.get_u16();
    let kind = u8::try_from(head >> 9).unwrap_or(u8::MAX);
    let length = usize::from(head & 0x1ff);
    if rest.len() < length {
        return Err(LldpError::Truncated { kind });
    }
    Ok((kind, rest.split_to(length)))
}

fn wanted(rest: &mut Bytes, kind: u8) -> Result<Bytes, LldpError> {
    match tlv(rest)? {
        (found, value) if found == kind => Ok(value),
        (found, _) => Err(LldpError::Order { found, wanted: kind }),
    }
}

fn id(mut value: Bytes, kind: u8) -> Result<Id, LldpError> {
    if !(2..=ID_MAX + 1).contains(&value.len()) {
        return Err(LldpError::Length { kind, length: value.len() });
    }
    Ok(Id { subtype: value.get_u8(), value })
}

fn organization(mut value: Bytes) -> Result<Own, LldpError> {
    if value.len() < 4 {
        return Err(LldpError::Length { kind: ORGANIZATION, length: value.len() });
    }
    let mut organization = [0; 3];
    value.copy_to_slice(&mut organization);
    Ok(Own { organization, subtype: value.get_u8(), value })
}

fn put_id(kind: u8, id: &Id, out: &mut BytesMut) -> Result<(), LldpError> {
    let length = id.value.len();
    if !(1..=ID_MAX).contains(&length) {
        return Err(LldpError::Length { kind, length });
    }
    put_head(kind, 1 + length, out)?;
    out.put_u8(id.subtype);
    out.put_slice(&id.value);
    Ok(())
}

fn put_head(kind: u8, length: usize, out: &mut BytesMut) -> Result<(), LldpError> {
    match u16::try_from(length) {
        Ok(fitting) if length <= VALUE_MAX => {
            out.put_u16(u16::from(kind) << 9 | fitting);
            Ok(())
        }
        _ => Err(LldpError::Length { kind, length }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame() -> Frame {
        Frame {
            source: [2, 0, 0, 0, 0, 7],
            chassis: Id::local("00000000000000ff"),
            port: Id::local("12"),
            ttl: 3,
            own: vec![Own {
                organization: [2, 1, 3],
                subtype: 1,
                value: Bytes::from_static(b"token"),
            }],
        }
    }

    /// A frame made by hand from the standard's figures: chassis by MAC address (subtype 4), port
    /// by interface name (5), TTL 120, a system name to step over, End.
    const BY_HAND: &[u8] = &[
        0x01, 0x80, 0xc2, 0, 0, 0x0e, 2, 0, 0, 0, 0, 1, 0x88, 0xcc, //
        0x02, 0x07, 4, 2, 0, 0, 0, 0, 1, // chassis
        0x04, 0x05, 5, b'e', b't', b'h', b'0', // port
        0x06, 0x02, 0, 120, // time to live
        0x0a, 0x02, b's', b'w', // system name
        0, 0, 0xff, 0xff, // End, and padding that is none of ours
    ];

    #[test]
    fn a_frame_of_another_maker_is_read_and_what_is_unknown_stepped_over() {
        let read = decode(&Bytes::from_static(BY_HAND)).unwrap();
        assert_eq!((read.ttl, read.port.subtype, &read.port.value[..]), (120, 5, &b"eth0"[..]));
        assert_eq!((read.chassis.subtype, read.own.len()), (4, 0));
    }

    #[test]
    fn a_frame_is_padded_to_what_ethernet_needs() {
        let short = Frame { own: Vec::new(), ..frame() };
        assert_eq!(encode(&short).unwrap().len(), 60);
        assert_eq!(decode(&encode(&short).unwrap()), Ok(short));
    }

    #[test]
    fn what_is_no_frame_says_why() {
        let cut = |length: usize| decode(&Bytes::from_static(&BY_HAND[..length]));
        assert_eq!(cut(13), Err(LldpError::Truncated { kind: 0 }));
        assert_eq!(cut(20), Err(LldpError::Truncated { kind: 1 }));
        let mut other = BY_HAND.to_vec();
        other[13] = 0xcd;
        assert_eq!(decode(&Bytes::from(other)), Err(LldpError::OtherProtocol));
        let mut order = BY_HAND.to_vec();
        order[14] = 0x04;
        let wrong = LldpError::Order { found: 2, wanted: 1 };
        assert_eq!(decode(&Bytes::from(order)), Err(wrong));
        let nameless = Frame { port: Id::local(""), ..frame() };
        assert_eq!(encode(&nameless), Err(LldpError::Length { kind: 2, length: 0 }));
        let long = Frame { port: Id::local(vec![b'x'; 256]), ..frame() };
        assert_eq!(encode(&long), Err(LldpError::Length { kind: 2, length: 256 }));
        let endless = Bytes::from(vec![0; FRAME_MAX + 1]);
        assert_eq!(decode(&endless), Err(LldpError::TooLong { length: FRAME_MAX + 1 }));
    }

    fn any_id() -> impl Strategy<Value = Id> {
        let value = prop::collection::vec(any::<u8>(), 1..=ID_MAX);
        (any::<u8>(), value).prop_map(|(subtype, value)| Id { subtype, value: value.into() })
    }

    fn any_own() -> impl Strategy<Value = Own> {
        let value = prop::collection::vec(any::<u8>(), 0..=VALUE_MAX - 4);
        (any::<[u8; 3]>(), any::<u8>(), value).prop_map(|(organization, subtype, value)| Own {
            organization,
            subtype,
            value: value.into(),
        })
    }

    proptest! {
        #[test]
        fn a_frame_reads_as_it_was_written(
            source in any::<[u8; 6]>(), chassis in any_id(), port in any_id(), ttl in any::<u16>(),
            own in prop::collection::vec(any_own(), 0..4),
        ) {
            let frame = Frame { source, chassis, port, ttl, own };
            prop_assert_eq!(decode(&encode(&frame).unwrap()), Ok(frame));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&Bytes::from(bytes));
        }

        #[test]
        fn no_spoilt_frame_makes_it_panic(at in 0usize..60, with in any::<u8>(), cut in 0usize..80) {
            let mut bytes = encode(&frame()).unwrap().to_vec();
            bytes[at] = with;
            bytes.truncate(cut.max(1));
            let _ = decode(&Bytes::from(bytes));
        }
    }
}
