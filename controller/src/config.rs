//! `lab.toml`: where the controller listens, which hosts and switches there are, what each link
//! carries.
//!
//! Capacities come from here and nowhere else: what a veth pair or OVS claims as link speed is not
//! true. Read once at start and by `--check`. A host's own bridge is a switch of the network like
//! any other; its name is `HOST.BRIDGE`. Deliberately not here: VMs (the agents know them), and
//! anything that changes while the controller runs.
//!
//! ```toml
//! [controller]
//! listen = ["unix:/run/lifeboat/controller.sock", "10.99.0.254:7443"]
//! openflow_listen = "10.99.0.254:6653"
//! state_dir = "/var/lib/lifeboat"
//! tls_dir = "/etc/lifeboat/tls"
//!
//! [[host]]
//! name = "h1"
//! agent = "10.99.0.1:7444"
//! ovsdb = "tcp:10.99.0.1:6640"
//! bridge = "br0"
//! uplink = "h1-eth0"
//! address = "10.0.0.1"
//!
//! [[switch]]
//! name = "s1"
//! datapath_id = "0000000000000001"
//! ovsdb = "unix:/run/openvswitch/db.sock"
//! agent = "10.99.0.254:7444"
//! agent_name = "fabric"
//!
//! [[link]]
//! a = "s1:s1-eth1"
//! b = "h1:h1-eth0"
//! capacity = "200 Mbit/s"
//! ```

mod check;
mod error;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lifeboat_policy::reserve::{Floor, Rules};
use lifeboat_policy::saturation::SaturationParameters;
use lifeboat_protocol::ids::{DatapathId, HostId, SwitchId};
use lifeboat_protocol::terms::ReservationKind;
use lifeboat_protocol::units::BitsPerSec;
use lifeboat_topology::{End, Topology};
use serde::Deserialize;
use toml::Spanned;

pub use error::ConfigError;

/// The file as it is written.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The daemon itself.
    pub controller: ControllerConfig,
    /// What the policies are told.
    #[serde(default)]
    pub policy: PolicyConfig,
    /// The hypervisor hosts.
    #[serde(default, rename = "host")]
    pub hosts: Vec<HostConfig>,
    /// The switches of the fabric; the hosts' own bridges are not among them.
    #[serde(default, rename = "switch")]
    pub switches: Vec<SwitchConfig>,
    /// The cables.
    #[serde(default, rename = "link")]
    pub links: Vec<LinkConfig>,
}

/// The daemon itself.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControllerConfig {
    /// Where operators are served: `unix:PATH` or `IP:PORT`.
    pub listen: Vec<Listen>,
    /// Where switches connect to. Absent: the controller opens no OpenFlow port.
    pub openflow_listen: Option<SocketAddr>,
    /// Where switches connect to with TLS; needs `switch_tls_dir`.
    pub openflow_tls_listen: Option<SocketAddr>,
    /// `ca.pem` (the authority of the switches: `switchca/cacert.pem` of `ovs-pki`), `cert.pem` and
    /// `key.pem` (ours), for `openflow_tls_listen` and for `ssl:` databases.
    pub switch_tls_dir: Option<PathBuf>,
    /// Where Prometheus reads `/metrics`, a loopback address; `127.0.0.1:9464` unless it says
    /// otherwise, and nowhere with `off`.
    #[serde(default)]
    pub metrics_listen: MetricsListen,
    /// How often LLDP probes every link, milliseconds, at least 100. Absent: never, because it takes
    /// a flow on every switch that hands the probes up.
    pub discovery_interval_ms: Option<u32>,
    /// Journal and audit log.
    pub state_dir: PathBuf,
    /// `ca.pem`, `cert.pem`, `key.pem`. Absent: only loopback and unix sockets are used.
    pub tls_dir: Option<PathBuf>,
}

impl ControllerConfig {
    /// How often every link is probed, if it is.
    #[must_use]
    pub fn discovery_interval(&self) -> Option<Duration> {
        self.discovery_interval_ms.map(|ms| Duration::from_millis(ms.max(100).into()))
    }
}

/// Where metrics are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum MetricsListen {
    /// Nowhere.
    Off,
    /// Here; over plain HTTP, so only on the machine itself.
    At(SocketAddr),
}

impl Default for MetricsListen {
    fn default() -> Self {
        Self::At(SocketAddr::from(([127, 0, 0, 1], 9464)))
    }
}

impl TryFrom<String> for MetricsListen {
    type Error = MetricsListenError;
    fn try_from(given: String) -> Result<Self, MetricsListenError> {
        match given.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Self::At(address)),
            Err(_) if given == "off" => Ok(Self::Off),
            _ => Err(MetricsListenError { given }),
        }
    }
}

/// A text that no metrics can be read at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{given}` is no place for metrics: write `off` or a loopback address such as `127.0.0.1:9464` (put a proxy that asks who calls before it to read them elsewhere)"
)]
pub struct MetricsListenError {
    /// What was given.
    pub given: String,
}

/// An address to serve or to call.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Listen {
    /// A unix socket.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

/// A text that is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{given}` is no address: write `unix:/path/to/socket` or `IP:PORT`, such as `127.0.0.1:7443`"
)]
pub struct ListenError {
    /// What was given.
    pub given: String,
}

impl TryFrom<String> for Listen {
    type Error = ListenError;
    fn try_from(given: String) -> Result<Self, ListenError> {
        match given.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Self::Unix(PathBuf::from(path))),
            Some(_) => Err(ListenError { given }),
            None => given.parse().map(Self::Tcp).map_err(|_| ListenError { given }),
        }
    }
}

impl std::str::FromStr for Listen {
    type Err = ListenError;
    fn from_str(text: &str) -> Result<Self, ListenError> {
        Self::try_from(text.to_owned())
    }
}

impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// What the policies are told. The defaults are the policies' own.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyConfig {
    /// Share of each link that stays for everybody else, whatever the urgency.
    pub floor: f64,
    /// What stays for everybody else at least.
    #[serde(with = "lifeboat_protocol::units::text")]
    pub floor_at_least: BitsPerSec,
    /// SOLive's threshold: by how much more must be free before a reservation grows, as a share.
    pub threshold: f64,
    /// Whether a reservation follows the counters each second (SOLive's Algorithm 1) unless the
    /// order says otherwise.
    pub adaptive: bool,
    /// What a reservation means to the others unless the order says otherwise.
    pub reservation: ReservationKind,
    /// A link is a hot spot from this share of its capacity on,
    pub hot_spot_enter: f64,
    /// until it has fallen to this share.
    pub hot_spot_leave: f64,
    /// Legs per VM before it is left behind.
    pub attempts: u32,
    /// The pause to aim for at the switchover, milliseconds.
    pub downtime_limit_ms: u32,
    /// Pages of a pack that goes to a store (SOLive's batch), 1 to 4000; 0 for the agents' default, 63.
    pub batch_pages: u32,
    /// Whether pages go to stores while their guest still runs at its source, where that empties it sooner.
    pub scatter_ahead: bool,
    /// Over which window VMs are measured, milliseconds; 0 for the agents' default.
    pub measure_window_ms: u32,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            floor: 0.05,
            floor_at_least: BitsPerSec::from_mbit(1),
            threshold: 0.05,
            adaptive: true,
            reservation: ReservationKind::Borrow,
            hot_spot_enter: 0.9,
            hot_spot_leave: 0.75,
            attempts: 3,
            downtime_limit_ms: 300,
            batch_pages: 0,
            scatter_ahead: true,
            measure_window_ms: 0,
        }
    }
}

impl PolicyConfig {
    /// What everybody else keeps of each link.
    #[must_use]
    pub const fn floor(&self) -> Floor {
        Floor { share: self.floor, at_least: self.floor_at_least }
    }

    /// The rules of Algorithm 1.
    #[must_use]
    pub const fn rules(&self) -> Rules {
        Rules { threshold: self.threshold, floor: self.floor() }
    }

    /// When a link counts as a hot spot.
    #[must_use]
    pub fn saturation(&self) -> SaturationParameters {
        let (enter, leave) = (self.hot_spot_enter, self.hot_spot_leave);
        SaturationParameters { enter, leave, ..SaturationParameters::default() }
    }
}

/// A hypervisor host.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// Its name, as its agent and its certificate have it.
    pub name: HostId,
    /// Where its agent serves.
    pub agent: Listen,
    /// Its OVSDB: `tcp:IP:PORT` or `unix:PATH`.
    pub ovsdb: String,
    /// The bridge that its VMs and its uplink are ports of.
    pub bridge: String,
    /// The bridge's port that leads to the fabric.
    pub uplink: String,
    /// Its address on the data network, where pages leave from.
    pub address: IpAddr,
    /// The bridge's datapath id, where it is set; else it is learned from OVSDB.
    pub datapath_id: Option<DatapathId>,
    /// What its bridge has for migrations (MigrateFS 5.1); absent: no ratio is shown.
    #[serde(default, deserialize_with = "check::optional_rate")]
    pub migration_budget: Option<BitsPerSec>,
    /// The rack's name; absent: the edge switch's.
    pub rack: Option<String>,
}

impl HostConfig {
    /// The name of its own bridge among the switches: `HOST.BRIDGE`.
    #[must_use]
    pub fn switch_id(&self) -> Option<SwitchId> {
        SwitchId::new(format!("{}.{}", self.name, self.bridge)).ok()
    }
}

/// A switch of the fabric.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwitchConfig {
    /// Its name; also its bridge's name in its OVSDB unless `bridge` says otherwise.
    pub name: SwitchId,
    /// Its datapath id: how its OpenFlow connection is recognised.
    pub datapath_id: DatapathId,
    /// Its OVSDB: `tcp:IP:PORT` or `unix:PATH`.
    pub ovsdb: String,
    /// Its bridge's name in OVSDB, where that is not its own.
    pub bridge: Option<String>,
    /// The agent with the role `switch` on its machine: needed where its datapath is in userspace,
    /// which leaves its queues to a classifier beside them.
    pub agent: Option<Listen>,
    /// What it has for migrations (MigrateFS 5.1); absent: no ratio is shown.
    #[serde(default, deserialize_with = "check::optional_rate")]
    pub migration_budget: Option<BitsPerSec>,
    /// The name in that agent's certificate, where it is not the switch's: one agent can serve
    /// several switches.
    pub agent_name: Option<HostId>,
}

impl SwitchConfig {
    /// By what name its agent is known; `None` without one.
    #[must_use]
    pub fn agent_id(&self) -> Option<HostId> {
        self.agent.as_ref()?;
        self.agent_name.clone().or_else(|| HostId::new(self.name.as_str()).ok())
    }

    /// Its bridge's name in its OVSDB.
    #[must_use]
    pub fn bridge_name(&self) -> &str {
        self.bridge.as_deref().unwrap_or(self.name.as_str())
    }
}

/// A cable between two ports.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkConfig {
    /// One end: `SWITCH:PORT`, or `HOST:PORT` for a port of a host's own bridge.
    pub a: Spanned<String>,
    /// The other end.
    pub b: Spanned<String>,
    /// What it carries from `a` to `b`.
    #[serde(with = "lifeboat_protocol::units::text")]
    pub capacity: BitsPerSec,
    /// What it carries from `b` to `a`, where that differs.
    #[serde(default, deserialize_with = "check::optional_rate")]
    pub capacity_back: Option<BitsPerSec>,
}

/// The file, read and checked, with the network that it describes.
#[derive(Debug, Clone)]
pub struct Site {
    /// The file.
    pub config: Config,
    /// The network.
    pub topology: Topology,
    /// The two ends of each link, in the file's order.
    pub ends: Vec<(End, End)>,
}

impl Site {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// With file, line and key of the first thing that is wrong.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { file: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    /// Checks a file's text; `file` is only for the errors.
    ///
    /// # Errors
    /// With file, line and key of the first thing that is wrong.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Config =
            toml::from_str(text).map_err(|error| ConfigError::from_toml(file, text, &error))?;
        check::check(file, text, config)
    }

    /// A host of the file.
    #[must_use]
    pub fn host(&self, host: &HostId) -> Option<&HostConfig> {
        self.config.hosts.iter().find(|known| known.name == *host)
    }

    /// The rack of a host: what the file says, else its edge switch.
    #[must_use]
    pub fn rack(&self, host: &HostId) -> String {
        let said = self.host(host).and_then(|known| known.rack.clone());
        said.unwrap_or_else(|| {
            self.topology.rack(host).map(ToString::to_string).unwrap_or_default()
        })
    }

    /// The names of all hosts, for the sentence that answers an unknown one.
    #[must_use]
    pub fn host_names(&self) -> String {
        let names: Vec<&str> = self.config.hosts.iter().map(|host| host.name.as_str()).collect();
        names.join(", ")
    }
}

#[cfg(test)]
mod tests;
