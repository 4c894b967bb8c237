//! What can be wrong with a network's description, or with a question about it.
//!
//! Used by the whole room. Every variant names the part that was asked for; a missing way names
//! where it is cut.

use lifeboat_protocol::ids::{HostId, SwitchId};
use std::fmt;

use crate::names::{End, LinkId};

/// Why a part could not be added, or a question not be answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// A text that no network interface can have as its name.
    #[error(
        "`{given}` is no port name: 1 to 15 printable characters without spaces, `/` or `:`, as `ovs-vsctl list-ports` prints them"
    )]
    PortName {
        /// What was given, shortened.
        given: String,
    },
    /// A host that was not added.
    #[error("host {host} is not in the topology; check its name in the configuration")]
    UnknownHost {
        /// The host.
        host: HostId,
    },
    /// A switch that was not added.
    #[error("switch {switch} is not in the topology; check its name in the configuration")]
    UnknownSwitch {
        /// The switch.
        switch: SwitchId,
    },
    /// A link number that this topology did not give out.
    #[error("{link} is not in the topology")]
    UnknownLink {
        /// The number.
        link: LinkId,
    },
    /// A switch port at which no link ends.
    #[error("no link ends at {end}; check the links of switch {} in the configuration", end.switch)]
    UnknownPort {
        /// The port.
        end: End,
    },
    /// A host added twice.
    #[error("host {host} is there twice; remove one of its entries")]
    DuplicateHost {
        /// The host.
        host: HostId,
    },
    /// A switch added twice.
    #[error("switch {switch} is there twice; remove one of its entries")]
    DuplicateSwitch {
        /// The switch.
        switch: SwitchId,
    },
    /// A port at which two links would end.
    #[error("two links end at {end}; one of them must name another port")]
    DuplicatePort {
        /// The port.
        end: End,
    },
    /// A link from a switch to itself.
    #[error("a link at {end} leads back to the same switch; name the other end")]
    Loop {
        /// One of its ends.
        end: End,
    },
    /// A link that could carry nothing.
    #[error("the link at {end} has a capacity of zero; give it the rate that it can really carry")]
    ZeroCapacity {
        /// The end that would send.
        end: End,
    },
    /// Nothing leads from one host to the other at present.
    #[error("no way leads from host {from_host} to host {to_host}: {}", cut_sentence(.cut))]
    NoWay {
        /// Where the way should begin.
        from_host: HostId,
        /// Where it should end.
        to_host: HostId,
        /// The links that are down and that lead out of what `from_host` still reaches; empty when
        /// no link does, up or down.
        cut: Vec<CutLink>,
    },
    /// A host asked for a way to itself.
    #[error("host {host} was asked for a way to itself")]
    SameHost {
        /// The host.
        host: HostId,
    },
}

/// A link that is down and beyond which the other host may lie.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct CutLink {
    /// The link.
    pub link: LinkId,
    /// Its ends, as an operator finds them.
    pub between: String,
}

impl fmt::Display for CutLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.between)
    }
}

fn cut_sentence(cut: &[CutLink]) -> String {
    if cut.is_empty() {
        return "no link joins their parts of the network; check the links in the configuration"
            .to_owned();
    }
    let links: Vec<String> = cut.iter().map(ToString::to_string).collect();
    format!("down is {}; bring one of them up", links.join(", "))
}
