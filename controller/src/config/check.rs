//! What a correct TOML file can still have wrong: names that nothing has, networks that do not fit
//! together, services that anybody could reach.

use std::path::Path;

use lifeboat_protocol::ids::SwitchId;
use lifeboat_protocol::units::BitsPerSec;
use lifeboat_topology::{Attachment, End, LinkSpec, PortName, Topology, TopologyError};
use serde::{Deserialize, Deserializer, de};
use toml::Spanned;

use super::error::line_of;
use super::{Config, ConfigError, Listen, Site};

/// Reads `"200 Mbit/s"` where the key may be absent.
pub(super) fn optional_rate<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<BitsPerSec>, D::Error> {
    let given = String::deserialize(from)?;
    given.parse().map(Some).map_err(de::Error::custom)
}

pub(super) fn check(file: &Path, text: &str, config: Config) -> Result<Site, ConfigError> {
    check_protection(file, &config)?;
    check_ranges(file, &config)?;
    check_switch_tls(file, &config)?;
    let network = |source| ConfigError::Network { file: file.to_owned(), source };
    let mut topology = Topology::new();
    for switch in &config.switches {
        topology.add_switch(switch.name.clone()).map_err(network)?;
    }
    for host in &config.hosts {
        let bridge = host.switch_id().ok_or_else(|| ConfigError::BridgeName {
            file: file.to_owned(),
            host: host.name.to_string(),
            bridge: host.bridge.clone(),
        })?;
        topology.add_switch(bridge.clone()).map_err(network)?;
        topology.add_host(host.name.clone(), Attachment::OwnBridge { bridge }).map_err(network)?;
    }
    let mut ends = Vec::new();
    for link in &config.links {
        let a = end(file, text, &config, &link.a)?;
        let b = end(file, text, &config, &link.b)?;
        let b_to_a = link.capacity_back.unwrap_or(link.capacity);
        let spec = LinkSpec { a: a.clone(), b: b.clone(), a_to_b: link.capacity, b_to_a };
        topology.add_link(spec).map_err(network)?;
        ends.push((a, b));
    }
    Ok(Site { config, topology, ends })
}

/// `NAME:PORT`, where the name is a switch's or a host's; `HOST:BRIDGE:PORT` is understood too.
fn end(
    file: &Path,
    text: &str,
    config: &Config,
    given: &Spanned<String>,
) -> Result<End, ConfigError> {
    let found = given.get_ref().split_once(':').and_then(|(name, port)| {
        let host = config.hosts.iter().find(|host| host.name.as_str() == name);
        let Some(host) = host else {
            let known = config.switches.iter().find(|switch| switch.name.as_str() == name)?;
            return Some((known.name.clone(), port));
        };
        let port = port.strip_prefix(&format!("{}:", host.bridge)).unwrap_or(port);
        Some((host.switch_id()?, port))
    });
    let unknown = || ConfigError::UnknownEnd {
        file: file.to_owned(),
        line: line_of(text, given.span().start),
        given: given.get_ref().clone(),
        known: known_names(config),
    };
    let (switch, port): (SwitchId, &str) = found.ok_or_else(unknown)?;
    let port = PortName::new(port).map_err(|source: TopologyError| ConfigError::Syntax {
        file: file.to_owned(),
        line: line_of(text, given.span().start),
        key: given.get_ref().clone(),
        problem: source.to_string(),
    })?;
    Ok(End::new(switch, port))
}

fn known_names(config: &Config) -> String {
    let switches = config.switches.iter().map(|switch| switch.name.as_str());
    let names: Vec<&str> =
        switches.chain(config.hosts.iter().map(|host| host.name.as_str())).collect();
    names.join(", ")
}

/// Without certificates nothing leaves or enters the machine.
fn check_protection(file: &Path, config: &Config) -> Result<(), ConfigError> {
    if config.controller.tls_dir.is_some() {
        return Ok(());
    }
    let open = |at: &Listen| matches!(at, Listen::Tcp(address) if !address.ip().is_loopback());
    if let Some(address) = config.controller.listen.iter().find(|at| open(at)) {
        let (file, address) = (file.to_owned(), address.to_string());
        return Err(ConfigError::Unprotected { file, address });
    }
    match config.hosts.iter().find(|host| open(&host.agent)) {
        Some(host) => Err(ConfigError::UnprotectedAgent {
            file: file.to_owned(),
            host: host.name.to_string(),
            address: host.agent.to_string(),
        }),
        None => check_switch_agents(file, config, open),
    }
}

/// What speaks TLS with switches needs certificates to speak with.
fn check_switch_tls(file: &Path, config: &Config) -> Result<(), ConfigError> {
    let controller = &config.controller;
    if controller.switch_tls_dir.is_some() {
        return Ok(());
    }
    let hosts = config.hosts.iter().map(|host| &host.ovsdb);
    let mut databases = hosts.chain(config.switches.iter().map(|switch| &switch.ovsdb));
    let address = match controller.openflow_tls_listen {
        Some(address) => Some(address.to_string()),
        None => databases.find(|ovsdb| ovsdb.starts_with("ssl:")).cloned(),
    };
    match address {
        None => Ok(()),
        Some(address) => Err(ConfigError::NoSwitchCertificates { file: file.to_owned(), address }),
    }
}

fn check_switch_agents(
    file: &Path,
    config: &Config,
    open: impl Fn(&Listen) -> bool,
) -> Result<(), ConfigError> {
    let addresses =
        config.switches.iter().filter_map(|switch| Some((&switch.name, switch.agent.as_ref()?)));
    match addresses.into_iter().find(|(_, agent)| open(agent)) {
        Some((switch, agent)) => Err(ConfigError::UnprotectedAgent {
            file: file.to_owned(),
            host: switch.to_string(),
            address: agent.to_string(),
        }),
        None => Ok(()),
    }
}

fn check_ranges(file: &Path, config: &Config) -> Result<(), ConfigError> {
    let policy = &config.policy;
    let wrong = |key, given: String, range| {
        Err(ConfigError::Range { file: file.to_owned(), key, given, range })
    };
    if !(0.0..=0.9).contains(&policy.floor) {
        return wrong("policy.floor", policy.floor.to_string(), "a share from 0 to 0.9");
    }
    if !(0.0..=1.0).contains(&policy.threshold) {
        return wrong("policy.threshold", policy.threshold.to_string(), "a share from 0 to 1");
    }
    if !(0.0..=1.0).contains(&policy.hot_spot_enter) {
        let given = policy.hot_spot_enter.to_string();
        return wrong("policy.hot_spot_enter", given, "a share from 0 to 1");
    }
    if !(0.0..=policy.hot_spot_enter).contains(&policy.hot_spot_leave) {
        let given = policy.hot_spot_leave.to_string();
        return wrong("policy.hot_spot_leave", given, "a share from 0 to policy.hot_spot_enter");
    }
    if !(1..=20).contains(&policy.attempts) {
        return wrong("policy.attempts", policy.attempts.to_string(), "1 to 20");
    }
    // Beyond it the agents refuse: 16 MiB, of which several are in memory at once.
    if policy.batch_pages > 4000 {
        let given = policy.batch_pages.to_string();
        return wrong("policy.batch_pages", given, "1 to 4000, or 0 for the agents' default");
    }
    if config.controller.listen.is_empty() {
        return wrong("controller.listen", "[]".to_owned(), "at least one address");
    }
    Ok(())
}
