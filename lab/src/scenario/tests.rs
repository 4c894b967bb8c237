//! Tests of the scenario: the default is right, and every rule says line, key and reason.

use super::*;

const DEFAULT: &str = include_str!("../../scenarios/two-racks.toml");

fn default() -> Scenario {
    parse("two-racks.toml", DEFAULT).unwrap()
}

/// The error of the default scenario after one change.
fn changed(from: &str, to: &str) -> String {
    assert!(DEFAULT.contains(from), "the default no longer says {from}");
    parse("x.toml", &DEFAULT.replacen(from, to, 1)).unwrap_err().to_string()
}

fn line_of(text: &str) -> usize {
    DEFAULT.lines().position(|line| line.contains(text)).unwrap() + 1
}

#[test]
fn the_default_is_two_racks_with_four_vms_on_the_first_host() {
    let scenario = default();
    assert_eq!((scenario.switches.len(), scenario.hosts.len(), scenario.vms.len()), (3, 5, 4));
    assert!(scenario.vms.iter().all(|vm| vm.host.as_str() == "h1"));
    assert_eq!(scenario.vms.iter().filter(|vm| vm.nics[0].vlan == 10).count(), 1);
    assert_eq!(scenario.vms.iter().filter(|vm| vm.nics.len() == 2).count(), 1);
}

#[test]
fn ports_are_named_after_what_they_face() {
    let scenario = default();
    let h4 = &scenario.hosts[3].plug;
    assert_eq!((h4.uplink.as_str(), h4.edge.port.as_str()), ("h4-up", "s2-h4"));
    let ports: Vec<_> = scenario.links[0].ends.iter().map(|end| end.port.as_str()).collect();
    assert_eq!(ports, ["s1-s0", "s0-s1"]);
}

#[test]
fn no_single_destination_takes_all_of_h1() {
    let scenario = default();
    let needed: u64 = scenario.vms.iter().map(|vm| vm.memory.0).sum();
    assert!(scenario.hosts[1..].iter().all(|host| host.memory.0 < needed));
    assert!(scenario.hosts[1..].iter().map(|host| host.memory.0).sum::<u64>() > needed * 2);
}

#[test]
fn the_guests_are_told_where_the_client_is_in_their_own_network() {
    let scenario = default();
    assert!(scenario.vms[0].arguments.contains("lb.client=10.0.0.100"));
    assert!(scenario.vms[2].arguments.contains("lb.ip2=10.0.20.103/24"));
}

#[test]
fn guests_are_told_their_packets_only_where_these_are_not_ethernet_s() {
    assert!(!default().vms[0].arguments.contains("lb.mtu"));
    let large = DEFAULT.replacen("load = 0.25", "load = 0.25\nmtu = 9000", 1);
    let scenario = parse("x.toml", &large).unwrap();
    assert!(scenario.vms.iter().all(|vm| vm.arguments.ends_with(" lb.mtu=9000")));
    assert_eq!((scenario.guest_mtu, scenario.queue_ms), (9000, 25));
}

#[test]
fn the_json_has_rates_and_sizes_as_plain_numbers() {
    let json = serde_json::to_value(default()).unwrap();
    assert_eq!(json["hosts"][0]["plug"]["capacity"], 200_000_000);
    assert_eq!(json["mtu"], 9000);
    assert_eq!(
        (&json["hosts"][1]["stores"], &json["hosts"][2]["stores"]),
        (&0.into(), &(256 << 20).into())
    );
    assert_eq!(json["vms"][1]["memory"], 256 << 20);
}

#[test]
fn a_wrong_type_names_line_and_key() {
    let error = changed("memory = \"640 MiB\"", "memory = 640");
    assert!(error.starts_with(&format!("x.toml:{}: memory: ", line_of("memory = \"640 MiB\""))));
    assert!(error.contains("invalid type"), "{error}");
}

#[test]
fn a_misspelt_key_is_refused() {
    let error = changed("switch = \"s2\"", "swich = \"s2\"");
    assert!(error.contains("unknown field `swich`"), "{error}");
}

#[test]
fn an_unknown_switch_is_named_beside_those_that_exist() {
    let error = changed("switch = \"s2\"", "switch = \"s9\"");
    let line = line_of("switch = \"s2\"");
    assert_eq!(
        error,
        format!("x.toml:{line}: host.h3.switch: there is no switch `s9`; there are s0, s1, s2")
    );
}

#[test]
fn every_other_rule_speaks_up() {
    let cases = [
        ("role = \"NI\"", "role = \"XX\"", "unknown variant"),
        ("name = \"h2\"", "name = \"h1\"", "`h1` is there already"),
        ("name = \"h2\"", "name = \"h 2\"", "is no name for a host"),
        ("name = \"h2\"", "name = \"hypervisor\"", "longer than 6"),
        ("uplink = \"s0\"\n", "", "must form one tree"),
        ("host = \"200 Mbit/s\"", "host = \"200\"", "is not a rate"),
        ("host = \"200 Mbit/s\"", "host = \"0 Mbit/s\"", "between 1 Mbit/s and 10 Gbit/s"),
        ("mtu = 9000", "mtu = 9001", "not within 1500 to 9000"),
        ("load = 0.25", "load = 0.25\nmtu = 9001", "not within 1500 to 9000"),
        ("mtu = 9000", "queue_ms = 4", "not within 5 to 500"),
        ("load = 0.25", "load = -1.0", "between 0 and 10"),
        ("load = 0.25", "load = nan", "between 0 and 10"),
        ("memory = \"1280 MiB\"", "memory = \"512 MiB\"", "VMs on h1 take 640 MiB"),
        ("memory = \"256 MiB\"", "memory = \"64 MiB\"", "the guest needs 96 MiB"),
        ("10.0.0.101/24", "10.0.0.101", "is not an IPv4 address with its prefix"),
        ("10.0.0.101/24", "10.0.0.1/24", "`10.0.0.1` is there already"),
        ("10.0.0.101/24", "10.7.0.1/24", "the client has no network with 10.7.0.1/24"),
        ("104/24\", vlan = 10", "104/24\", vlan = 11", "in VLAN 11"),
        ("104/24\", vlan = 10", "104/24\", vlan = 4095", "is 1 to 4094, not 4095"),
        ("nic = [{ address = \"10.0.0.101/24\" }]", "nic = []", "1 or 2 NICs, not 0"),
        ("role = \"M\"", "role = \"M\"\nregion = \"250 MiB\"", "does not fit a VM of 256 MiB"),
        ("stores = \"256 MiB\"", "stores = \"1 GiB\"", "more than the host's memory, 640 MiB"),
    ];
    for (from, to, expected) in cases {
        let error = changed(from, to);
        assert!(error.contains(expected), "{to}: {error}");
        assert!(!error.starts_with("x.toml:0"), "{error}");
    }
}

#[test]
fn one_host_is_too_few() {
    let hosts = DEFAULT.split("[[host]]").collect::<Vec<_>>();
    let client = DEFAULT.find("[client]").unwrap();
    let one = format!("{}[[host]]{}{}", hosts[0], hosts[1], &DEFAULT[client..]);
    let error = parse("x.toml", &one).unwrap_err();
    assert_eq!(*error.problem, Problem::HostCount(1));
}
