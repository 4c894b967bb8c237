//! A scenario: hosts, switches, links, a client and VMs, with everything that follows from them.
//!
//! `parse` turns the text of a TOML file into a [`Scenario`] or says which key of which line is
//! wrong and why. A `Scenario` can be trusted: names exist and are unique, the switches form a
//! tree (they flood, and no spanning tree runs), VMs fit their hosts, and the client has an
//! address in the network of every NIC. What the file says is in `file`, the rules are in
//! `check`.

mod check;
mod file;

use lifeboat_protocol::ids::{DatapathId, HostId, SwitchId, VmId};
use lifeboat_protocol::units::{BitsPerSec, Bytes, PagesPerSec};
use serde::Serialize;

pub use check::Problem;

use crate::proportions::Role;

/// A checked scenario. Serialises to the JSON that `lab/up` reads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scenario {
    /// The scenario's name.
    pub name: String,
    /// What carries the guests' traffic: `udp` or `tcp`.
    pub transport: file::Transport,
    /// The largest packet that hosts exchange, in bytes.
    pub mtu: u32,
    /// The same of guests and the client; at most that of hosts.
    pub guest_mtu: u32,
    /// How long a link's queue is before it drops, in ms at the link's rate.
    pub queue_ms: u32,
    /// The fabric's switches.
    pub switches: Vec<Switch>,
    /// The links between switches.
    pub links: Vec<Link>,
    /// The hypervisor hosts.
    pub hosts: Vec<Host>,
    /// The host outside, from which the guests are watched.
    pub client: Client,
    /// The VMs and where they start.
    pub vms: Vec<Vm>,
}

/// A switch of the fabric.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Switch {
    /// Its name, and its bridge's.
    pub name: SwitchId,
    /// Its OpenFlow datapath id.
    pub datapath: DatapathId,
}

/// A link between two switches. It carries `capacity` each way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Link {
    /// The two ends: the switch and its port's interface.
    pub ends: [End; 2],
    /// In bit/s, each way.
    pub capacity: BitsPerSec,
}

/// One end of a link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct End {
    /// The switch.
    pub switch: SwitchId,
    /// The port's interface on it.
    pub port: String,
}

/// Where a host is plugged in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plug {
    /// The uplink's interface on the host's own bridge.
    pub uplink: String,
    /// The edge switch and the port there.
    pub edge: End,
    /// What the link carries from the host, in bit/s.
    pub capacity: BitsPerSec,
    /// What it carries towards the host, in bit/s.
    pub capacity_in: BitsPerSec,
    /// Datapath id of the host's own bridge.
    pub datapath: DatapathId,
    /// Its address on the management network.
    pub management: String,
}

/// A hypervisor host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Host {
    /// Its name.
    pub name: HostId,
    /// Where it is plugged in.
    pub plug: Plug,
    /// Its address on the data network, over which pages go; with prefix length.
    pub address: String,
    /// Memory that VMs and their QEMUs may take.
    pub memory: Bytes,
    /// How much of it may hold pages of VMs that are between two other hosts; zero for a host that is
    /// no intermediary.
    pub stores: Bytes,
}

/// The host from which the guests are watched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Client {
    /// Where it is plugged in.
    pub plug: Plug,
    /// Its networks.
    pub networks: Vec<Network>,
}

/// A network of the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Network {
    /// The client's address there, with prefix length.
    pub address: String,
    /// The VLAN tag, 0 for none.
    pub vlan: u16,
}

/// A VM and what its guest does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Vm {
    /// Its name.
    pub name: VmId,
    /// Where it runs at first.
    pub host: HostId,
    /// What it does.
    pub role: Role,
    /// Its memory.
    pub memory: Bytes,
    /// Its NICs, in order.
    pub nics: Vec<Nic>,
    /// Bytes of seeded pages: the working set.
    pub region: Bytes,
    /// Pages rewritten per second.
    pub dirty: PagesPerSec,
    /// Pages checked per second: the whole region every 20 s, unless the file says less.
    pub check: PagesPerSec,
    /// Its traffic in bit/s: to the client for NO, from it for NI.
    pub rate: BitsPerSec,
    /// Percent of one CPU that it computes.
    pub cpu: u64,
    /// Bytes of its local disk, an overlay, that it writes and checks; zero for none.
    pub disk: Bytes,
    /// The part of the kernel's command line that tells all this to `guest-workload`.
    pub arguments: String,
}

/// A NIC of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Nic {
    /// Its MAC address.
    pub mac: String,
    /// The guest's address on it, with prefix length.
    pub address: String,
    /// The VLAN tag of its port, 0 for none.
    pub vlan: u16,
}

/// A scenario that cannot be used: where, and why.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{file}:{line}: {key}: {problem}")]
pub struct ScenarioError {
    /// The file, as the caller named it.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// The key, as a path such as `vm.db.host`.
    pub key: String,
    /// What is wrong with it.
    pub problem: Box<Problem>,
}

/// Reads and checks the text of a scenario file; `file` is only for error messages.
///
/// # Errors
/// When the text is not TOML, has a key of a wrong name or type, or breaks a rule.
pub fn parse(file: &str, text: &str) -> Result<Scenario, ScenarioError> {
    check::Checker::new(file, text).scenario()
}

#[cfg(test)]
mod tests;
