//! Prometheus' text format (version 0.0.4). Pure: from replies to text.
//!
//! What is not known has no sample at all, so that no rule takes it for zero. Rates are gauges of
//! the last second, because the counters behind them start again with every switch.

use std::fmt::Write;

use lifeboat_protocol::controller::{EvacuationStatus, LinksReply, StatusReply, SwitchesReply};

/// One family of samples.
struct Family<'a> {
    text: &'a mut String,
    name: &'static str,
}

impl<'a> Family<'a> {
    fn begin(text: &'a mut String, name: &'static str, help: &str) -> Self {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
        Self { text, name }
    }

    fn sample(&mut self, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let labels = labels.join(",");
        let _ = match labels.is_empty() {
            true => writeln!(self.text, "{} {value}", self.name),
            false => writeln!(self.text, "{}{{{labels}}} {value}", self.name),
        };
    }
}

/// A label's value as the format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Everything that is measured.
pub(super) fn metrics(
    links: &LinksReply,
    switches: &SwitchesReply,
    status: &StatusReply,
) -> String {
    let mut text = String::new();
    of_links(&mut text, links);
    of_queues(&mut text, links);
    of_switches(&mut text, links, switches);
    let mut pending = Family::begin(
        &mut text,
        "lifeboat_releases_pending",
        "Releases that could not reach every switch yet.",
    );
    pending.sample(&[], links.pending.len() as f64);
    of_evacuations(&mut text, &status.evacuations);
    text
}

fn of_links(text: &mut String, reply: &LinksReply) {
    type Figure = fn(&lifeboat_protocol::controller::LinkLoad) -> Option<f64>;
    let families: [(&str, &str, Figure); 6] = [
        ("lifeboat_link_up", "Whether a link is up.", |link| Some(f64::from(u8::from(link.up)))),
        ("lifeboat_link_capacity_bits_per_second", "What a link carries, by configuration.", |l| {
            Some(l.capacity_bits_per_sec as f64)
        }),
        ("lifeboat_link_rate_bits_per_second", "What left by a link in the last second.", |l| {
            l.rate_known.then_some(l.rate_bits_per_sec as f64)
        }),
        ("lifeboat_link_reserved_bits_per_second", "What is guaranteed to evacuations.", |link| {
            Some(link.reserved_bits_per_sec as f64)
        }),
        ("lifeboat_link_saturation", "Smoothed share of a link in use; 1 is full.", |link| {
            link.saturation_known.then_some(link.saturation)
        }),
        ("lifeboat_link_hot_spot", "Whether a link is a hot spot.", |link| {
            link.saturation_known.then_some(f64::from(u8::from(link.hot_spot)))
        }),
    ];
    for (name, help, figure) in families {
        let mut family = Family::begin(text, name, help);
        for link in &reply.links {
            let labels = [("switch", &*link.switch), ("port", &link.port), ("peer", &link.peer)];
            if let Some(value) = figure(link) {
                family.sample(&labels, value);
            }
        }
    }
}

fn of_queues(text: &mut String, reply: &LinksReply) {
    type Figure = fn(&lifeboat_protocol::controller::QueueLoad) -> Option<f64>;
    let families: [(&str, &str, Figure); 2] = [
        ("lifeboat_reservation_bits_per_second", "What an evacuation is guaranteed.", |queue| {
            Some(queue.reserved_bits_per_sec as f64)
        }),
        ("lifeboat_reservation_used_bits_per_second", "What its migrations sent there.", |queue| {
            queue.rate_known.then_some(queue.rate_bits_per_sec as f64)
        }),
    ];
    for (name, help, figure) in families {
        let mut family = Family::begin(text, name, help);
        for link in &reply.links {
            for queue in &link.queues {
                let labels = [
                    ("evacuation", &*queue.evacuation),
                    ("switch", &link.switch),
                    ("port", &link.port),
                ];
                if let Some(value) = figure(queue) {
                    family.sample(&labels, value);
                }
            }
        }
    }
}

fn of_switches(text: &mut String, links: &LinksReply, switches: &SwitchesReply) {
    let name = "lifeboat_switch_connected";
    let mut family = Family::begin(text, name, "Whether a connection to a switch stands.");
    for switch in &switches.switches {
        let connections =
            [("openflow", switch.openflow_connected), ("ovsdb", switch.ovsdb_connected)];
        for (protocol, is) in connections {
            let labels = [("switch", &*switch.name), ("protocol", protocol)];
            family.sample(&labels, f64::from(u8::from(is)));
        }
    }
    let name = "lifeboat_switch_migration_ratio";
    let help = "What migrations send through a switch, by its budget (MigrateFS 5.1).";
    let mut family = Family::begin(text, name, help);
    for switch in links.switches.iter().filter(|switch| switch.migration_ratio_known) {
        family.sample(&[("switch", &switch.name)], switch.migration_ratio);
    }
}

fn of_evacuations(text: &mut String, evacuations: &[EvacuationStatus]) {
    let name = "lifeboat_evacuation_migrations";
    let mut family = Family::begin(text, name, "VMs of an evacuation by phase.");
    for evacuation in evacuations {
        let mut phases: Vec<&str> =
            evacuation.migrations.iter().map(|migration| migration.phase.as_str()).collect();
        phases.sort_unstable();
        for phase in phases.chunk_by(|a, b| a == b) {
            let labels = [
                ("evacuation", &*evacuation.evacuation),
                ("state", &evacuation.state),
                ("phase", phase[0]),
            ];
            family.sample(&labels, phase.len() as f64);
        }
    }
    let name = "lifeboat_evacuation_time_to_go_seconds";
    let mut family = Family::begin(text, name, "How long an evacuation will still take.");
    for evacuation in evacuations.iter().filter(|evacuation| evacuation.time_to_go_known) {
        let labels = [("evacuation", &*evacuation.evacuation)];
        family.sample(&labels, evacuation.time_to_go_ms as f64 / 1000.0);
    }
}

#[cfg(test)]
mod tests {
    use lifeboat_protocol::controller::{LinkLoad, MigrationStatus};

    use super::*;

    #[test]
    fn what_is_not_known_has_no_sample() {
        let link = LinkLoad {
            switch: "s1".to_owned(),
            port: "d1".to_owned(),
            peer: "h\"1\\".to_owned(),
            capacity_bits_per_sec: 100,
            up: true,
            ..LinkLoad::default()
        };
        let known = LinkLoad {
            port: "d2".to_owned(),
            rate_known: true,
            rate_bits_per_sec: 0,
            ..link.clone()
        };
        let links = LinksReply { links: vec![link, known], ..LinksReply::default() };
        let shown = metrics(&links, &SwitchesReply::default(), &StatusReply::default());
        let rates: Vec<&str> =
            shown.lines().filter(|l| l.starts_with("lifeboat_link_rate")).collect();
        let labels = r#"switch="s1",port="d2",peer="h\"1\\""#;
        assert_eq!(rates, [format!("lifeboat_link_rate_bits_per_second{{{labels}}} 0")]);
        assert!(!shown.contains("\nlifeboat_link_saturation{"), "{shown}");
        assert!(shown.contains("\nlifeboat_releases_pending 0\n"), "{shown}");
    }

    #[test]
    fn every_line_is_a_comment_or_a_sample_and_every_family_is_declared_once() {
        let migration =
            |phase: &str| MigrationStatus { phase: phase.to_owned(), ..MigrationStatus::default() };
        let evacuation = EvacuationStatus {
            evacuation: "e1".to_owned(),
            state: "running".to_owned(),
            migrations: vec![migration("waiting"), migration("sending"), migration("waiting")],
            ..EvacuationStatus::default()
        };
        let status = StatusReply { evacuations: vec![evacuation], term: 1 };
        let shown = metrics(&LinksReply::default(), &SwitchesReply::default(), &status);
        let waiting = r#"{evacuation="e1",state="running",phase="waiting"} 2"#;
        assert!(shown.contains(waiting), "{shown}");
        let mut declared: Vec<&str> =
            shown.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let all = declared.len();
        declared.sort_unstable();
        declared.dedup();
        assert_eq!(declared.len(), all);
        let sample =
            |line: &str| line.rsplit_once(' ').is_some_and(|(_, v)| v.parse::<f64>().is_ok());
        assert!(shown.lines().all(|line| line.starts_with('#') || sample(line)), "{shown}");
    }
}
