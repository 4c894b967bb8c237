//! What a network's parts are called: ports, link ends, links and their two directions.
//!
//! Used by everything in this room and by whoever describes a network to it. Host and switch names
//! come from `protocol/`. No graph here.

use std::fmt;

use lifeboat_protocol::ids::SwitchId;
use lifeboat_protocol::units::BitsPerSec;
use serde::{Deserialize, Serialize};

use crate::error::TopologyError;

/// Longest name that Linux gives a network interface (`IFNAMSIZ` less the terminating zero).
pub const PORT_NAME_BYTES_MAX: usize = 15;

/// A switch port by its name in OVSDB, such as `s1-eth2`. Port *numbers* change when a bridge is
/// made again, so the topology speaks of names and the controller looks the number up.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortName(String);

impl PortName {
    /// The name, checked: 1 to 15 printable ASCII characters without spaces, `/` or `:`.
    ///
    /// # Errors
    /// [`TopologyError::PortName`] otherwise.
    pub fn new(text: impl Into<String>) -> Result<Self, TopologyError> {
        let text = text.into();
        let fine = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':';
        if (1..=PORT_NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(fine) {
            Ok(Self(text))
        } else {
            Err(TopologyError::PortName { given: text.chars().take(40).collect() })
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for PortName {
    type Error = TopologyError;
    fn try_from(text: String) -> Result<Self, TopologyError> {
        Self::new(text)
    }
}

impl From<PortName> for String {
    fn from(name: PortName) -> String {
        name.0
    }
}

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// One end of a link between switches: a port of a switch.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct End {
    /// The switch.
    pub switch: SwitchId,
    /// Its port.
    pub port: PortName,
}

impl End {
    /// The end of a link at `port` of `switch`.
    #[must_use]
    pub fn new(switch: SwitchId, port: PortName) -> Self {
        Self { switch, port }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} port {}", self.switch, self.port)
    }
}

/// A link between two switches, as configuration describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkSpec {
    /// One end.
    pub a: End,
    /// The other end.
    pub b: End,
    /// What passes from `a` to `b`, bit/s; not zero.
    pub a_to_b: BitsPerSec,
    /// What passes from `b` to `a`, bit/s; not zero.
    pub b_to_a: BitsPerSec,
}

impl LinkSpec {
    /// A link with the same capacity in both directions.
    #[must_use]
    pub fn symmetric(a: End, b: End, capacity: BitsPerSec) -> Self {
        Self { a, b, a_to_b: capacity, b_to_a: capacity }
    }
}

/// How a host reaches the network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attachment {
    /// The host has a bridge of its own (as every hypervisor has), inside the same machine: nothing
    /// between the two can be full. The host's uplink is then an ordinary link of that bridge.
    OwnBridge {
        /// The bridge.
        bridge: SwitchId,
    },
    /// A cable to a port of a switch that is not the host's own.
    Cable {
        /// The switch's end.
        at: End,
        /// Host to switch, bit/s; not zero.
        up: BitsPerSec,
        /// Switch to host, bit/s; not zero.
        down: BitsPerSec,
    },
}

/// A link's number in its topology: the order in which links and cables were added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LinkId(pub u32);

impl fmt::Display for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "link {}", self.0)
    }
}

/// Which way along a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From `a` to `b`; of a cable, from the host to the switch.
    Forward,
    /// From `b` to `a`; of a cable, from the switch to the host.
    Backward,
}

impl Direction {
    /// The other direction.
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Forward => Self::Backward,
            Self::Backward => Self::Forward,
        }
    }
}

/// One direction of one link: what can be full, and what can be reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DirectedLink {
    /// The link.
    pub link: LinkId,
    /// Which way along it.
    pub direction: Direction,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_name_is_one_that_linux_would_give() {
        for bad in ["", "a b", "a/b", "a:b", "sixteen-letters!", "ä"] {
            let error = PortName::new(bad).unwrap_err().to_string();
            assert!(error.contains(bad), "{error}");
        }
        assert_eq!(PortName::new("s1-eth2").unwrap().to_string(), "s1-eth2");
    }
}
