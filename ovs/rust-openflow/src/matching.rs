//! Which packets a flow is for: OXM fields and the match made of them (section A.2.3).
//!
//! Used by flow mods, packet-ins, statistics and SET_FIELD actions. Fields that have no name
//! here, and named ones in a form that 1.3 does not define (a masked TCP port, which Open vSwitch
//! has), are kept as [`Oxm::Raw`]. Not here: the prerequisites between fields; a switch checks
//! those and answers `OFPBMC_BAD_PREREQ`.

use std::net::{Ipv4Addr, Ipv6Addr};

use bytes::{BufMut, Bytes, BytesMut};

use crate::types::{MacAddr, PortNo};
use crate::wire::{BodyError, Reader, Wire, pad_to_8, put_all, put_sized, sized};

/// The class of the fields that the specification itself defines.
const OPENFLOW_BASIC: u16 = 0x8000;
/// Set in a VLAN_VID value when the packet has a tag at all.
const VLAN_PRESENT: u16 = 0x1000;
/// The only match type of 1.3.
const MATCH_OXM: u16 = 1;

/// A value, and which of its bits matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Masked<T> {
    /// The value; bits outside the mask should be zero.
    pub value: T,
    /// Bits that must agree; `None` means all of them.
    pub mask: Option<T>,
}

impl<T> Masked<T> {
    /// Exactly this value.
    pub fn exact(value: T) -> Self {
        Self { value, mask: None }
    }
}

/// A field that we have no name for, byte for byte.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RawOxm {
    class: u16,
    field: u8,
    has_mask: bool,
    payload: Bytes,
}

impl RawOxm {
    /// `field` is a 7-bit number; `payload` is the value, then the mask, of at most 255 bytes
    /// together. `None` when one of these does not fit.
    pub fn new(class: u16, field: u8, has_mask: bool, payload: Bytes) -> Option<Self> {
        let fits = field < 0x80 && payload.len() <= 255;
        fits.then_some(Self { class, field, has_mask, payload })
    }

    /// Class, field number, whether a mask follows the value, and both.
    pub fn parts(&self) -> (u16, u8, bool, &Bytes) {
        (self.class, self.field, self.has_mask, &self.payload)
    }
}

/// What a field's type does with the bytes behind the OXM header.
trait Payload: Sized {
    /// `Ok(None)`: sound, but in a form that this type does not have (it is then kept raw).
    fn get(has_mask: bool, payload: &[u8]) -> Result<Option<Self>, BodyError>;
    /// Writes the payload, and says whether it has a mask.
    fn put(&self, out: &mut BytesMut) -> bool;
}

fn whole<T: Wire>(reader: &mut Reader<'_>, length: usize) -> Result<T, BodyError> {
    let value = reader.get()?;
    if reader.is_empty() { Ok(value) } else { Err(BodyError::BadLength { what: "oxm", length }) }
}

macro_rules! exact_payloads {
    ($($type:ty),*) => {$(
        impl Payload for $type {
            fn get(has_mask: bool, payload: &[u8]) -> Result<Option<Self>, BodyError> {
                if has_mask {
                    return Ok(None);
                }
                whole(&mut Reader::new(payload), payload.len()).map(Some)
            }
            fn put(&self, out: &mut BytesMut) -> bool {
                Wire::put(self, out);
                false
            }
        }
    )*};
}
exact_payloads!(u8, u16, PortNo);

impl<T: Wire> Payload for Masked<T> {
    fn get(has_mask: bool, payload: &[u8]) -> Result<Option<Self>, BodyError> {
        let reader = &mut Reader::new(payload);
        if !has_mask {
            return Ok(Some(Self { value: whole(reader, payload.len())?, mask: None }));
        }
        let value = reader.get()?;
        Ok(Some(Self { value, mask: Some(whole(reader, payload.len())?) }))
    }

    fn put(&self, out: &mut BytesMut) -> bool {
        self.value.put(out);
        if let Some(mask) = &self.mask {
            mask.put(out);
        }
        self.mask.is_some()
    }
}

macro_rules! oxm_fields {
    ($($(#[$meta:meta])* $variant:ident($type:ty) = $number:literal,)*) => {
        /// One field of a packet and the value that it must have (section A.2.3.7).
        #[derive(Debug, Clone, PartialEq, Eq, Hash)]
        pub enum Oxm {
            $($(#[$meta])* $variant($type),)*
            /// Kept as it came.
            Raw(RawOxm),
        }

        fn named(field: u8, has_mask: bool, payload: &[u8]) -> Result<Option<Oxm>, BodyError> {
            match field {
                $($number => Ok(<$type as Payload>::get(has_mask, payload)?.map(Oxm::$variant)),)*
                _ => Ok(None),
            }
        }

        fn put_named(oxm: &Oxm, out: &mut BytesMut) -> (u16, u8, bool) {
            match oxm {
                $(Oxm::$variant(value) => {
                    (OPENFLOW_BASIC, $number, <$type as Payload>::put(value, out))
                })*
                Oxm::Raw(raw) => {
                    out.put_slice(&raw.payload);
                    (raw.class, raw.field, raw.has_mask)
                }
            }
        }
    };
}

oxm_fields! {
    /// The port that the packet came in by.
    InPort(PortNo) = 0,
    /// What earlier tables have noted.
    Metadata(Masked<u64>) = 2,
    /// Ethernet destination.
    EthDst(Masked<MacAddr>) = 3,
    /// Ethernet source.
    EthSrc(Masked<MacAddr>) = 4,
    /// Ethernet type behind the VLAN tags.
    EthType(u16) = 5,
    /// VLAN id with the bit 0x1000 for "has a tag"; see [`Oxm::vlan`] and [`Oxm::untagged`].
    VlanVid(Masked<u16>) = 6,
    /// VLAN priority, 0 to 7.
    VlanPcp(u8) = 7,
    /// The six DSCP bits of IPv4 and IPv6.
    IpDscp(u8) = 8,
    /// The two ECN bits.
    IpEcn(u8) = 9,
    /// IP protocol: 6 is TCP, 17 UDP.
    IpProto(u8) = 10,
    /// IPv4 source.
    Ipv4Src(Masked<Ipv4Addr>) = 11,
    /// IPv4 destination.
    Ipv4Dst(Masked<Ipv4Addr>) = 12,
    /// TCP source port.
    TcpSrc(u16) = 13,
    /// TCP destination port.
    TcpDst(u16) = 14,
    /// UDP source port.
    UdpSrc(u16) = 15,
    /// UDP destination port.
    UdpDst(u16) = 16,
    /// ICMP type.
    Icmpv4Type(u8) = 19,
    /// ICMP code.
    Icmpv4Code(u8) = 20,
    /// ARP operation: 1 asks, 2 answers, 3 and 4 are RARP's.
    ArpOp(u16) = 21,
    /// IPv4 address of whoever speaks ARP.
    ArpSpa(Masked<Ipv4Addr>) = 22,
    /// IPv4 address that is asked for.
    ArpTpa(Masked<Ipv4Addr>) = 23,
    /// Ethernet address of whoever speaks ARP.
    ArpSha(Masked<MacAddr>) = 24,
    /// Ethernet address of whom the ARP is for.
    ArpTha(Masked<MacAddr>) = 25,
    /// IPv6 source.
    Ipv6Src(Masked<Ipv6Addr>) = 26,
    /// IPv6 destination.
    Ipv6Dst(Masked<Ipv6Addr>) = 27,
}

impl Oxm {
    /// Packets with a tag of this VLAN (0 to 4095).
    pub fn vlan(vid: u16) -> Self {
        Self::VlanVid(Masked::exact(vid & 0xfff | VLAN_PRESENT))
    }

    /// Packets without a VLAN tag.
    pub fn untagged() -> Self {
        Self::VlanVid(Masked::exact(0))
    }

    /// Whether only some of the bits count.
    pub fn is_masked(&self) -> bool {
        put_named(self, &mut BytesMut::new()).2
    }
}

impl Wire for Oxm {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        let class: u16 = reader.get()?;
        let field: u8 = reader.get()?;
        let length: u8 = reader.get()?;
        let payload = reader.take(usize::from(length))?;
        let (field, has_mask) = (field >> 1, field & 1 == 1);
        if class == OPENFLOW_BASIC
            && let Some(oxm) = named(field, has_mask, payload)?
        {
            return Ok(oxm);
        }
        let payload = Bytes::copy_from_slice(payload);
        Ok(Self::Raw(RawOxm { class, field, has_mask, payload }))
    }

    fn put(&self, out: &mut BytesMut) {
        let start = out.len();
        out.put_u32(0);
        let (class, field, has_mask) = put_named(self, out);
        let length = u8::try_from(out.len() - start - 4).unwrap_or(u8::MAX);
        out[start..start + 2].copy_from_slice(&class.to_be_bytes());
        out[start + 2] = field << 1 | u8::from(has_mask);
        out[start + 3] = length;
    }
}

/// The packets that agree in all of these fields; without any, all packets.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Match {
    /// In the order in which they travel; a field that another one depends on goes first.
    pub fields: Vec<Oxm>,
}

impl Match {
    /// All packets.
    pub fn any() -> Self {
        Self::default()
    }

    /// Only those that also have this.
    #[must_use]
    pub fn with(mut self, field: Oxm) -> Self {
        self.fields.push(field);
        self
    }
}

impl FromIterator<Oxm> for Match {
    fn from_iter<I: IntoIterator<Item = Oxm>>(fields: I) -> Self {
        Self { fields: fields.into_iter().collect() }
    }
}

impl Wire for Match {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        let kind: u16 = reader.get()?;
        let length: u16 = reader.get()?;
        if kind != MATCH_OXM {
            return Err(BodyError::MatchType(kind));
        }
        let fields = sized(reader, "match", length, 4)?.all()?;
        reader.skip(usize::from(length).next_multiple_of(8) - usize::from(length))?;
        Ok(Self { fields })
    }

    fn put(&self, out: &mut BytesMut) {
        let start = out.len();
        put_sized(out, 2, |out| {
            out.put_u16(MATCH_OXM);
            out.put_u16(0);
            put_all(&self.fields, out);
        });
        pad_to_8(out, start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(oxm: &Oxm) -> Vec<u8> {
        let mut out = BytesMut::new();
        oxm.put(&mut out);
        out.to_vec()
    }

    #[test]
    fn fields_have_the_bytes_of_the_specification() {
        assert_eq!(bytes_of(&Oxm::InPort(PortNo(3))), [0x80, 0, 0, 4, 0, 0, 0, 3]);
        assert_eq!(bytes_of(&Oxm::vlan(5)), [0x80, 0, 12, 2, 0x10, 5]);
        let net = Masked { value: Ipv4Addr::new(10, 0, 0, 0), mask: Some([255, 0, 0, 0].into()) };
        let bytes = [0x80, 0, 25, 8, 10, 0, 0, 0, 255, 0, 0, 0];
        assert_eq!(bytes_of(&Oxm::Ipv4Dst(net)), bytes);
    }

    #[test]
    fn a_masked_tcp_port_is_kept_raw_and_a_long_one_is_refused() {
        let masked = [0x80, 0, 14 << 1 | 1, 4, 0, 80, 0xff, 0xf0];
        let oxm = Oxm::get(&mut Reader::new(&masked)).unwrap();
        assert!(matches!(&oxm, Oxm::Raw(_)) && oxm.is_masked());
        assert_eq!(bytes_of(&oxm), masked);
        let long = [0x80, 0, 14 << 1, 3, 0, 80, 1];
        assert!(Oxm::get(&mut Reader::new(&long)).is_err());
    }
}
