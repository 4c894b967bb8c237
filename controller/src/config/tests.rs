//! What an operator reads when the file is wrong, and what a right one becomes.

use std::path::Path;

use super::*;

const GOOD: &str = r#"
[controller]
listen = ["unix:/run/lifeboat/controller.sock", "127.0.0.1:7443"]
state_dir = "/var/lib/lifeboat"

[[host]]
name = "h1"
agent = "unix:/run/lifeboat/h1.sock"
ovsdb = "tcp:127.0.0.1:6640"
bridge = "br0"
uplink = "h1-eth0"
address = "10.0.0.1"

[[host]]
name = "h2"
agent = "127.0.0.1:7002"
ovsdb = "tcp:127.0.0.1:6641"
bridge = "br0"
uplink = "h2-eth0"
address = "10.0.0.2"
rack = "left"

[[switch]]
name = "s1"
datapath_id = "1"
ovsdb = "unix:/run/openvswitch/db.sock"

[[link]]
a = "s1:s1-eth1"
b = "h1:h1-eth0"
capacity = "200 Mbit/s"

[[link]]
a = "s1:s1-eth2"
b = "h2:br0:h2-eth0"
capacity = "100 Mbit/s"
capacity_back = "50 Mbit/s"
"#;

fn parse(text: &str) -> Result<Site, ConfigError> {
    Site::parse(Path::new("lab.toml"), text)
}

fn error(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

#[test]
fn a_good_file_becomes_a_network_with_ways() {
    let site = parse(GOOD).unwrap();
    let [h1, h2] = ["h1", "h2"].map(|name| HostId::new(name).unwrap());
    let ways = site.topology.ways(&h1, &h2, 1).unwrap();
    assert_eq!(ways[0].to_string(), "h1 > h1.br0:h1-eth0 > s1:s1-eth2 > h2");
    assert_eq!(ways[0].capacity(), Some(BitsPerSec::from_mbit(100)));
    let back = site.topology.ways(&h2, &h1, 1).unwrap();
    assert_eq!(back[0].capacity(), Some(BitsPerSec::from_mbit(50)));
    assert_eq!((site.rack(&h1).as_str(), site.rack(&h2).as_str()), ("s1", "left"));
}

#[test]
fn a_wrong_type_is_reported_with_file_line_and_key() {
    let wrong = GOOD.replace("state_dir = \"/var/lib/lifeboat\"", "state_dir = 7");
    let said = error(&wrong);
    assert!(said.starts_with("lab.toml:4: state_dir: invalid type: integer `7`"), "{said}");
    let wrong = GOOD.replace("\"200 Mbit/s\"", "\"200 MiB\"");
    let said = error(&wrong);
    assert!(said.starts_with("lab.toml:") && said.contains("200 Mbit/s"), "{said}");
}

#[test]
fn an_unknown_key_is_reported() {
    let said = error(&GOOD.replace("uplink = \"h1-eth0\"", "uplnk = \"h1-eth0\""));
    assert!(said.contains("uplnk") && said.contains("lab.toml:11"), "{said}");
}

#[test]
fn the_end_of_a_link_that_nothing_has_lists_what_there_is() {
    let said = error(&GOOD.replace("a = \"s1:s1-eth2\"", "a = \"s9:s9-eth2\""));
    assert!(said.contains("lab.toml:34") && said.contains("`s9:s9-eth2`"), "{said}");
    assert!(said.contains("known are s1, h1, h2"), "{said}");
}

#[test]
fn nothing_is_served_or_called_across_the_network_without_certificates() {
    let said = error(&GOOD.replace("127.0.0.1:7443", "0.0.0.0:7443"));
    assert!(said.contains("0.0.0.0:7443") && said.contains("certs init"), "{said}");
    let said = error(&GOOD.replace("127.0.0.1:7002", "10.99.0.2:7002"));
    assert!(said.contains("host h2") && said.contains("certs init"), "{said}");
    let with = GOOD.replace("127.0.0.1:7443", "0.0.0.0:7443").replace(
        "state_dir = \"/var/lib/lifeboat\"",
        "state_dir = \"/var/lib/lifeboat\"\ntls_dir = \"/etc/lifeboat/tls\"",
    );
    assert!(parse(&with).is_ok());
}

#[test]
fn figures_out_of_range_say_the_range() {
    let said = error(&format!("{GOOD}\n[policy]\nfloor = 1.5\n"));
    assert!(said.contains("policy.floor = 1.5") && said.contains("0 to 0.9"), "{said}");
    let said = error(&format!("{GOOD}\n[policy]\nbatch_pages = 5000\n"));
    assert!(said.contains("policy.batch_pages = 5000") && said.contains("1 to 4000"), "{said}");
}
