//! The scenario as the file says it: names and types, nothing checked yet.
//!
//! Every value that a rule may complain of is `Spanned`, so that the complaint can name its
//! line. Unknown keys are refused: a misspelt one must not be silently without effect.

use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::proportions::Role;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) name: Spanned<String>,
    pub(super) links: Links,
    #[serde(default)]
    pub(super) workload: Workload,
    pub(super) switch: Vec<Switch>,
    pub(super) host: Vec<Host>,
    pub(super) client: Client,
    #[serde(default)]
    pub(super) vm: Vec<Vm>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Links {
    pub(super) host: Spanned<String>,
    pub(super) core: Spanned<String>,
    pub(super) mtu: Option<Spanned<u32>>,
    pub(super) queue_ms: Option<Spanned<u32>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Workload {
    pub(super) load: Option<Spanned<f64>>,
    #[serde(default)]
    pub(super) transport: Transport,
    pub(super) mtu: Option<Spanned<u32>>,
}

impl Default for Workload {
    fn default() -> Self {
        Self { load: None, transport: Transport::Udp, mtu: None }
    }
}

/// What carries the guests' traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Datagrams at a rate.
    #[default]
    Udp,
    /// Connections that slow down when a link is full.
    Tcp,
}

impl Transport {
    /// As the file and `guest-workload` call it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Switch {
    pub(super) name: Spanned<String>,
    pub(super) uplink: Option<Spanned<String>>,
    pub(super) link: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Host {
    pub(super) name: Spanned<String>,
    pub(super) switch: Spanned<String>,
    pub(super) link: Option<Spanned<String>>,
    pub(super) link_in: Option<Spanned<String>>,
    pub(super) memory: Spanned<String>,
    pub(super) stores: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Client {
    pub(super) switch: Spanned<String>,
    pub(super) link: Option<Spanned<String>>,
    pub(super) network: Vec<Network>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Network {
    pub(super) address: Spanned<String>,
    pub(super) vlan: Option<Spanned<u16>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Vm {
    pub(super) name: Spanned<String>,
    pub(super) host: Spanned<String>,
    pub(super) role: Role,
    pub(super) memory: Spanned<String>,
    pub(super) nic: Spanned<Vec<Network>>,
    pub(super) region: Option<Spanned<String>>,
    pub(super) dirty: Option<Spanned<u64>>,
    pub(super) check: Option<Spanned<u64>>,
    pub(super) rate: Option<Spanned<String>>,
    pub(super) cpu: Option<Spanned<u64>>,
    pub(super) disk: Option<Spanned<String>>,
}
