//! A bridge as its OVSDB describes it: ports with their OpenFlow numbers, kind of datapath, and
//! what stands in the way of its OpenFlow connection. Pure: from the monitor's rows to values.
//!
//! Used by `connections`. Not here: QoS and queues, which are read anew for each change.

use std::collections::BTreeMap;

use lifeboat_ovs::ovsdb::{Cache, Datum, Row};

/// What is followed.
pub(super) const MONITORED: [(&str, &[&str]); 3] = [
    (
        "Bridge",
        &["name", "datapath_id", "datapath_type", "fail_mode", "protocols", "ports", "controller"],
    ),
    ("Port", &["name", "interfaces"]),
    ("Interface", &["name", "ofport", "link_state", "admin_state"]),
];

/// A bridge.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Bridge {
    /// As its switch daemon says.
    pub(super) datapath_id: Option<u64>,
    /// `netdev` or `system`.
    pub(super) datapath: String,
    /// Whether it drops what no flow tells it to forward.
    pub(super) secure: bool,
    /// The OpenFlow versions that it is restricted to; empty for its own choice.
    pub(super) protocols: Vec<String>,
    /// Whether it was told to connect to a controller.
    pub(super) has_controller: bool,
    /// By the interface's name; a bond by its own, beside its members.
    pub(super) ports: BTreeMap<String, BridgePort>,
}

/// A port of a bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BridgePort {
    /// Its OpenFlow number; 0 while it has none, and for a bond, whose members have them.
    pub(super) number: u32,
    /// Whether it is up, administratively and by link; of a bond, whether a member is.
    pub(super) up: bool,
    /// Whether it is several interfaces that share what is sent.
    pub(super) bond: bool,
}

impl Bridge {
    /// The bridge of this name; `None` when the database has none.
    pub(super) fn of(rows: &Cache, name: &str) -> Option<Self> {
        let (_, row) = rows.table("Bridge").find(|(_, row)| text(row, "name") == name)?;
        let kind = text(row, "datapath_type");
        Some(Self {
            datapath_id: u64::from_str_radix(text(row, "datapath_id"), 16).ok(),
            // The database leaves the kernel's datapath empty.
            datapath: if kind.is_empty() { "system" } else { kind }.to_owned(),
            secure: text(row, "fail_mode") == "secure",
            protocols: texts(row.get("protocols")),
            has_controller: row.get("controller").is_some_and(|set| !set.uuids().is_empty()),
            ports: ports(rows, row),
        })
    }

    /// Whether its datapath leaves the queues to a classifier beside them.
    pub(super) fn needs_classifier(&self) -> bool {
        self.datapath == "netdev"
    }

    /// For a person: why its OpenFlow connection cannot come.
    pub(super) fn obstacle(&self) -> Option<String> {
        if !self.has_controller {
            return Some(
                "its bridge has no controller: ovs-vsctl set-controller BRIDGE tcp:...".to_owned(),
            );
        }
        let speaks = self.protocols.is_empty() || self.protocols.iter().any(|p| p == "OpenFlow13");
        (!speaks).then(|| {
            let only = self.protocols.join(", ");
            format!("it speaks only {only}: ovs-vsctl set bridge BRIDGE protocols=OpenFlow13")
        })
    }
}

fn ports(rows: &Cache, bridge: &Row) -> BTreeMap<String, BridgePort> {
    let mut found = BTreeMap::new();
    let ports = bridge.get("ports").map(Datum::uuids).unwrap_or_default();
    for port in ports.into_iter().filter_map(|port| rows.row("Port", port)) {
        let interfaces = port.get("interfaces").map(Datum::uuids).unwrap_or_default();
        let members = interfaces.into_iter().filter_map(|uuid| rows.row("Interface", uuid));
        let members: Vec<(String, BridgePort)> = members.map(interface).collect();
        if members.len() > 1 {
            let up = members.iter().any(|(_, member)| member.up);
            let bond = BridgePort { number: 0, up, bond: true };
            found.insert(text(port, "name").to_owned(), bond);
        }
        found.extend(members);
    }
    found
}

fn interface(row: &Row) -> (String, BridgePort) {
    let number = row.get("ofport").and_then(Datum::integer).unwrap_or_default();
    let up = text(row, "link_state") == "up" && text(row, "admin_state") == "up";
    // -1 is what Open vSwitch writes for an interface that it cannot open.
    let number = u32::try_from(number).unwrap_or_default();
    (text(row, "name").to_owned(), BridgePort { number, up, bond: false })
}

fn text<'a>(row: &'a Row, column: &str) -> &'a str {
    row.get(column).and_then(Datum::text).unwrap_or_default()
}

fn texts(datum: Option<&Datum>) -> Vec<String> {
    use lifeboat_ovs::ovsdb::Atom;
    let Some(Datum::Set(atoms)) = datum else { return Vec::new() };
    let text = |atom: &Atom| if let Atom::String(text) = atom { Some(text.clone()) } else { None };
    atoms.iter().filter_map(text).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const B: &str = "00000000-0000-0000-0000-00000000000b";
    const P: &str = "00000000-0000-0000-0000-000000000001";
    const I: &str = "00000000-0000-0000-0000-000000000002";

    fn rows(bridge: serde_json::Value, ofport: serde_json::Value) -> Cache {
        let mut cache = Cache::default();
        let update = json!({
            "Bridge": { B: { "new": bridge } },
            "Port": { P: { "new": { "name": "p1", "interfaces": ["uuid", I] } } },
            "Interface": { I: { "new": {
                "name": "p1", "ofport": ofport, "link_state": "up", "admin_state": "up",
            } } },
        });
        cache.update(&update).unwrap();
        cache
    }

    #[test]
    fn a_bridge_has_its_ports_with_their_numbers() {
        let rows = rows(
            json!({
                "name": "br0", "datapath_id": "00000000000000ff", "datapath_type": "netdev",
                "fail_mode": "secure", "protocols": "OpenFlow13", "ports": ["set", [["uuid", P]]],
                "controller": ["uuid", P],
            }),
            json!(7),
        );
        let bridge = Bridge::of(&rows, "br0").unwrap();
        assert_eq!((bridge.datapath_id, bridge.secure), (Some(255), true));
        assert_eq!(bridge.ports["p1"], BridgePort { number: 7, up: true, bond: false });
        assert!(bridge.needs_classifier() && bridge.obstacle().is_none());
        assert_eq!(Bridge::of(&rows, "br1"), None);
    }

    #[test]
    fn a_bond_is_a_port_of_its_own_beside_its_members() {
        let (one, other) = (I, P);
        let state = |name: &str, up: &str| json!({"name": name, "ofport": 3, "link_state": up, "admin_state": "up"});
        let mut rows = Cache::default();
        let update = json!({
            "Bridge": { B: { "new": { "name": "br0", "ports": ["uuid", P] } } },
            "Port": { P: { "new": { "name": "bond0",
                "interfaces": ["set", [["uuid", one], ["uuid", other]]] } } },
            "Interface": { one: { "new": state("m1", "down") }, other: { "new": state("m2", "up") } },
        });
        rows.update(&update).unwrap();
        let ports = Bridge::of(&rows, "br0").unwrap().ports;
        assert_eq!(ports.keys().collect::<Vec<_>>(), ["bond0", "m1", "m2"]);
        assert_eq!(ports["bond0"], BridgePort { number: 0, up: true, bond: true });
        assert!(!ports["m1"].up && !ports["m1"].bond);
    }

    #[test]
    fn what_is_unknown_stays_unknown_and_obstacles_say_what_to_do() {
        let old = json!({"name": "br0", "protocols": "OpenFlow10", "ports": ["uuid", P],
            "controller": ["uuid", P], "datapath_id": ["set", []], "datapath_type": ""});
        let bridge = Bridge::of(&rows(old, json!(-1)), "br0").unwrap();
        assert_eq!((bridge.datapath_id, bridge.datapath.as_str()), (None, "system"));
        assert_eq!(bridge.ports["p1"].number, 0);
        assert!(bridge.obstacle().unwrap().contains("OpenFlow10"));
        let alone = Bridge::of(&rows(json!({"name": "br0"}), json!(1)), "br0").unwrap();
        assert!(alone.obstacle().unwrap().contains("set-controller"));
    }
}
