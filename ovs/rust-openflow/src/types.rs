//! The small values that several messages share: port numbers, MAC addresses, padded text.
//!
//! Used by every message. Not here: anything with a layout of more than one field.

use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

use bytes::{BufMut, BytesMut};

use crate::wire::{BodyError, Reader, Wire};

/// The `buffer_id` that says "no buffer: the whole packet is here" (`OFP_NO_BUFFER`).
pub const NO_BUFFER: u32 = u32::MAX;

/// A port of a switch, or one of the reserved ports of section A.2.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortNo(pub u32);

impl PortNo {
    /// Back out of the port that the packet came in by.
    pub const IN_PORT: Self = Self(0xffff_fff8);
    /// Through the flow tables; only in a packet-out.
    pub const TABLE: Self = Self(0xffff_fff9);
    /// As a learning switch that knows no OpenFlow would.
    pub const NORMAL: Self = Self(0xffff_fffa);
    /// To all ports of the VLAN but the incoming one.
    pub const FLOOD: Self = Self(0xffff_fffb);
    /// To all ports but the incoming one.
    pub const ALL: Self = Self(0xffff_fffc);
    /// To the controller, as a packet-in.
    pub const CONTROLLER: Self = Self(0xffff_fffd);
    /// The switch's own network stack.
    pub const LOCAL: Self = Self(0xffff_fffe);
    /// No particular port: a wildcard in requests.
    pub const ANY: Self = Self(0xffff_ffff);
}

impl fmt::Display for PortNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::IN_PORT => f.write_str("IN_PORT"),
            Self::TABLE => f.write_str("TABLE"),
            Self::NORMAL => f.write_str("NORMAL"),
            Self::FLOOD => f.write_str("FLOOD"),
            Self::ALL => f.write_str("ALL"),
            Self::CONTROLLER => f.write_str("CONTROLLER"),
            Self::LOCAL => f.write_str("LOCAL"),
            Self::ANY => f.write_str("ANY"),
            Self(number) => write!(f, "{number}"),
        }
    }
}

impl Wire for PortNo {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        reader.get().map(Self)
    }
    fn put(&self, out: &mut BytesMut) {
        out.put_u32(self.0);
    }
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr(pub [u8; 6]);

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Text that is not six pairs of hexadecimal digits with colons between them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an Ethernet address: {0:?} (wanted is 02:00:00:00:00:01)")]
pub struct NotAMacAddr(String);

impl FromStr for MacAddr {
    type Err = NotAMacAddr;

    fn from_str(text: &str) -> Result<Self, NotAMacAddr> {
        let refuse = || NotAMacAddr(text.to_owned());
        let mut address = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut address {
            let pair = pairs.next().filter(|pair| pair.len() == 2).ok_or_else(refuse)?;
            if !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(refuse());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| refuse())?;
        }
        if pairs.next().is_some() { Err(refuse()) } else { Ok(Self(address)) }
    }
}

impl Wire for MacAddr {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        reader.array().map(Self)
    }
    fn put(&self, out: &mut BytesMut) {
        out.put_slice(&self.0);
    }
}

/// Text in `N` bytes, the last of them zero, as names and descriptions travel.
///
/// Cut at construction to what fits, so that what is encoded is what was shown.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FixedText<const N: usize>(String);

impl<const N: usize> From<&str> for FixedText<N> {
    fn from(text: &str) -> Self {
        let text = text.split('\0').next().unwrap_or_default();
        let mut end = text.len().min(N.saturating_sub(1));
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Self(text[..end].to_owned())
    }
}

impl<const N: usize> Deref for FixedText<N> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<const N: usize> fmt::Display for FixedText<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<const N: usize> Wire for FixedText<N> {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        Ok(String::from_utf8_lossy(reader.take(N)?).as_ref().into())
    }
    fn put(&self, out: &mut BytesMut) {
        out.put_slice(self.0.as_bytes());
        out.put_bytes(0, N - self.0.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_as_it_prints() {
        let address = MacAddr([2, 0, 0xab, 0, 0, 9]);
        assert_eq!("02:00:ab:00:00:09".parse(), Ok(address));
        assert_eq!(address.to_string(), "02:00:ab:00:00:09");
        for wrong in
            ["", "02:00:ab:00:00", "02:00:ab:00:00:09:11", "2:0:0:0:0:0:", "+2:00:00:00:00:00"]
        {
            assert!(wrong.parse::<MacAddr>().is_err(), "{wrong:?} was accepted");
        }
    }

    #[test]
    fn text_is_cut_between_characters() {
        assert_eq!(&*FixedText::<6>::from("abcdé"), "abcd");
        assert_eq!(&*FixedText::<16>::from("s1-eth1\0junk"), "s1-eth1");
    }
}
