//! What an operator sees of links: loads for `lifeboat top`, the graph for `lifeboat topology`.
//! Pure.

use lifeboat_policy::saturation::ratio;
use lifeboat_protocol::controller as wire;
use lifeboat_protocol::ids::HostId;
use lifeboat_protocol::units::BitsPerSec;
use lifeboat_topology::{End, Sighting};

use crate::config::Site;
use crate::network::{PendingRelease, PortRate, PortStatus, QueueRate, SwitchStatus};

pub(super) fn links(
    rates: Vec<PortRate>,
    switches: Vec<SwitchStatus>,
    pending: Vec<PendingRelease>,
) -> wire::LinksReply {
    wire::LinksReply {
        links: rates.into_iter().map(link).collect(),
        switches: switches.iter().map(switch).collect(),
        pending: pending.into_iter().map(pending_release).collect(),
    }
}

fn link(rate: PortRate) -> wire::LinkLoad {
    wire::LinkLoad {
        switch: rate.at.switch.to_string(),
        port: rate.at.port,
        peer: rate.peer,
        capacity_bits_per_sec: rate.capacity.0,
        rate_bits_per_sec: rate.transmitted.unwrap_or_default().0,
        rate_known: rate.transmitted.is_some(),
        reserved_bits_per_sec: rate.queues.iter().map(|q| q.reserved).sum::<BitsPerSec>().0,
        saturation: rate.saturation.share().unwrap_or_default(),
        saturation_known: rate.saturation.share().is_some(),
        hot_spot: rate.saturation.is_hot(),
        up: rate.up,
        queues: rate.queues.into_iter().map(queue).collect(),
    }
}

fn queue(queue: QueueRate) -> wire::QueueLoad {
    wire::QueueLoad {
        evacuation: queue.evacuation.to_string(),
        migrations: queue.migrations.iter().map(ToString::to_string).collect(),
        queue: queue.queue,
        reserved_bits_per_sec: queue.reserved.0,
        rate_bits_per_sec: queue.transmitted.unwrap_or_default().0,
        rate_known: queue.transmitted.is_some(),
        urgency: queue.urgency.percent(),
        kind: queue.kind.to_string(),
    }
}

fn switch(status: &SwitchStatus) -> wire::SwitchLoad {
    let ratio = status.migrations.and_then(|sent| ratio(sent, status.migration_budget));
    wire::SwitchLoad {
        name: status.name.to_string(),
        saturation: status.saturation.share().unwrap_or_default(),
        saturation_known: status.saturation.share().is_some(),
        hot_spot: status.saturation.is_hot(),
        migration_bits_per_sec: status.migrations.unwrap_or_default().0,
        migration_rate_known: status.migrations.is_some(),
        migration_budget_bits_per_sec: status.migration_budget.0,
        migration_ratio: ratio.unwrap_or_default(),
        migration_ratio_known: ratio.is_some(),
    }
}

fn pending_release(pending: PendingRelease) -> wire::PendingRelease {
    let reasons: Vec<String> = pending.failures.iter().map(|f| f.error.to_string()).collect();
    wire::PendingRelease {
        evacuation: pending.evacuation.to_string(),
        migration: pending.migration.map_or_else(String::new, |migration| migration.to_string()),
        switches: pending.failures.iter().map(|failure| failure.switch.to_string()).collect(),
        reason: reasons.join("; "),
        since_unix_ms: pending.since.0,
        tries: pending.tries,
    }
}

pub(super) fn topology(
    site: &Site,
    switches: &[SwitchStatus],
    connected: impl Fn(&HostId) -> bool,
) -> wire::TopologyReply {
    let hosts = site.config.hosts.iter().map(|host| wire::TopologyNode {
        name: host.name.to_string(),
        kind: "host".to_owned(),
        host: String::new(),
        rack: site.rack(&host.name),
        connected: connected(&host.name),
    });
    let nodes = switches.iter().map(|switch| wire::TopologyNode {
        name: switch.name.to_string(),
        kind: if switch.host.is_some() { "bridge" } else { "switch" }.to_owned(),
        host: switch.host.as_ref().map(ToString::to_string).unwrap_or_default(),
        rack: String::new(),
        connected: switch.openflow_connected,
    });
    let cables = site.config.links.iter().zip(&site.ends);
    let links = cables.map(|(link, (a, b))| {
        let ends = [port(switches, a), port(switches, b)];
        let back = link.capacity_back.unwrap_or(link.capacity);
        wire::TopologyLink {
            a_switch: a.switch.to_string(),
            a_port: a.port.to_string(),
            b_switch: b.switch.to_string(),
            b_port: b.port.to_string(),
            capacity_bits_per_sec: link.capacity.0,
            capacity_back_bits_per_sec: back.0,
            up: ends.iter().all(|end| end.is_some_and(PortStatus::passes)),
            seen: seen(ends).to_owned(),
            detail: detail(a, ends[0], b, ends[1]),
        }
    });
    let links = links.chain(unconfigured(switches)).collect();
    wire::TopologyReply { nodes: hosts.chain(nodes).collect(), links }
}

/// What LLDP knows of a link: the worse of its two directions.
fn seen(ends: [Option<&PortStatus>; 2]) -> &'static str {
    let sightings = ends.map(|end| end.and_then(|port| port.sighting.as_ref()));
    let any = |wanted: fn(&Sighting) -> bool| sightings.iter().flatten().any(|s| wanted(s));
    match () {
        () if any(|s| matches!(s, Sighting::Elsewhere { .. })) => "elsewhere",
        () if any(|s| matches!(s, Sighting::Lost)) => "lost",
        () if any(|s| matches!(s, Sighting::Seen)) => "seen",
        () if any(|s| matches!(s, Sighting::NotSeen)) => "not-seen",
        () => "not-probed",
    }
}

/// Where the cables really are.
fn detail(a: &End, at_a: Option<&PortStatus>, b: &End, at_b: Option<&PortStatus>) -> String {
    let wrong = [(a, at_a), (b, at_b)].into_iter().filter_map(|(from, status)| {
        let Some(Sighting::Elsewhere { at }) = &status?.sighting else { return None };
        Some(format!("{from} leads to {at}"))
    });
    wrong.collect::<Vec<_>>().join("; ")
}

/// Links that LLDP has seen and the configuration does not have. Nobody knows what they carry, so
/// nothing is sent over them.
fn unconfigured(switches: &[SwitchStatus]) -> Vec<wire::TopologyLink> {
    let mut links: Vec<wire::TopologyLink> = Vec::new();
    for switch in switches {
        for port in switch.ports.iter().filter(|port| port.peer.is_empty()) {
            let Some(Sighting::Elsewhere { at }) = &port.sighting else { continue };
            let known = |link: &wire::TopologyLink| {
                link.b_switch == switch.name.as_str() && link.b_port == port.name
            };
            if links.iter().any(known) {
                continue;
            }
            links.push(wire::TopologyLink {
                a_switch: switch.name.to_string(),
                a_port: port.name.clone(),
                b_switch: at.switch.to_string(),
                b_port: at.port.to_string(),
                up: port.up,
                seen: "unconfigured".to_owned(),
                detail: "add a [[link]] with its capacity to use it".to_owned(),
                ..wire::TopologyLink::default()
            });
        }
    }
    links
}

fn port<'a>(switches: &'a [SwitchStatus], end: &End) -> Option<&'a PortStatus> {
    let switch = switches.iter().find(|switch| switch.name == end.switch)?;
    switch.ports.iter().find(|port| port.name == end.port.as_str())
}
