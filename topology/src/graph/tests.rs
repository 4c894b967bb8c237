//! Tests of [`Topology`]: the lab's two racks by hand, and random networks against a search by
//! exhaustion.

use proptest::prelude::*;

use super::*;
use crate::names::PortName;

fn host(name: &str) -> HostId {
    HostId::new(name).unwrap()
}

fn switch(name: &str) -> SwitchId {
    SwitchId::new(name).unwrap()
}

fn end(name: &str, port: &str) -> End {
    End::new(switch(name), PortName::new(port).unwrap())
}

fn mbit(rate: u64) -> BitsPerSec {
    BitsPerSec::from_mbit(rate)
}

fn link(network: &mut Topology, a: (&str, &str), b: (&str, &str), rate: u64) -> LinkId {
    let spec = LinkSpec::symmetric(end(a.0, a.1), end(b.0, b.1), mbit(rate));
    network.add_link(spec).unwrap()
}

/// Two racks s1 and s2 under a core s0; h1 and h4 with bridges of their own, the client on a cable.
fn two_racks() -> Topology {
    let mut network = Topology::new();
    for name in ["s0", "s1", "s2", "br1", "br4"] {
        network.add_switch(switch(name)).unwrap();
    }
    link(&mut network, ("s1", "up"), ("s0", "to1"), 400);
    link(&mut network, ("s2", "up"), ("s0", "to2"), 400);
    link(&mut network, ("br1", "up"), ("s1", "to-h1"), 200);
    link(&mut network, ("br4", "up"), ("s2", "to-h4"), 200);
    for (name, bridge) in [("h1", "br1"), ("h4", "br4")] {
        let own = Attachment::OwnBridge { bridge: switch(bridge) };
        assert_eq!(network.add_host(host(name), own), Ok(None));
    }
    let cable = Attachment::Cable { at: end("s0", "client"), up: mbit(100), down: mbit(50) };
    network.add_host(host("client"), cable).unwrap();
    network
}

#[test]
fn a_way_lists_the_ports_from_the_source_s_uplink_to_the_one_that_faces_the_destination() {
    let network = two_racks();
    let ways = network.ways(&host("h1"), &host("h4"), 3).unwrap();
    assert_eq!(ways.len(), 1);
    assert_eq!(ways[0].to_string(), "h1 > br1:up > s1:up > s0:to2 > s2:to-h4 > h4");
    assert_eq!(ways[0].capacity(), Some(mbit(200)));
    let to_client = &network.ways(&host("h1"), &host("client"), 1).unwrap()[0];
    assert_eq!(to_client.capacity(), Some(mbit(50)));
    let from_client = &network.ways(&host("client"), &host("h1"), 1).unwrap()[0];
    assert_eq!(from_client.hops[0].egress, Egress::Card(host("client")));
    assert_eq!(from_client.capacity(), Some(mbit(100)));
}

#[test]
fn opposite_directions_of_a_link_are_not_shared() {
    let network = two_racks();
    let way = |a: &str, b: &str| network.ways(&host(a), &host(b), 1).unwrap().remove(0);
    assert_eq!(way("h1", "h4").shared_with(&way("h1", "client")).len(), 2);
    assert!(way("h1", "h4").shared_with(&way("h4", "h1")).is_empty());
}

#[test]
fn a_rack_is_named_by_the_edge_switch_even_when_the_uplink_is_down() {
    let mut network = two_racks();
    network.set_port_up(&end("br1", "up"), false).unwrap();
    assert_eq!(network.rack(&host("h1")), Ok(&switch("s1")));
    assert_eq!(network.rack(&host("client")), Ok(&switch("s0")));
    assert_eq!(network.own_bridge(&host("h4")), Ok(Some(&switch("br4"))));
}

#[test]
fn a_missing_way_says_which_link_cuts_it() {
    let mut network = two_racks();
    network.set_port_up(&end("s2", "up"), false).unwrap();
    let error = network.ways(&host("h1"), &host("h4"), 1).unwrap_err().to_string();
    assert_eq!(
        error,
        "no way leads from host h1 to host h4: down is s2 port up - s0 port to2; bring one of them up"
    );
    network.set_port_up(&end("s2", "up"), true).unwrap();
    assert!(network.ways(&host("h1"), &host("h4"), 1).is_ok());
    network.set_link_up(LinkId(1), false).unwrap();
    assert!(network.ways(&host("h1"), &host("h4"), 1).is_err());
}

#[test]
fn a_link_is_up_only_while_both_ports_are() {
    let mut network = two_racks();
    let (one, other) = (end("s1", "up"), end("s0", "to1"));
    let along = network.leaving(&one).unwrap();
    network.set_port_up(&one, false).unwrap();
    network.set_port_up(&other, false).unwrap();
    network.set_port_up(&one, true).unwrap();
    assert_eq!(network.is_up(along), Ok(false), "the other port is still down");
    network.set_port_up(&other, true).unwrap();
    assert_eq!(network.is_up(along), Ok(true));
}

#[test]
fn hosts_that_no_link_joins_are_told_so() {
    let mut network = Topology::new();
    for name in ["a", "b"] {
        network.add_switch(switch(name)).unwrap();
        let own = Attachment::OwnBridge { bridge: switch(name) };
        network.add_host(host(name), own).unwrap();
    }
    let error = network.ways(&host("a"), &host("b"), 1).unwrap_err().to_string();
    assert!(error.contains("no link joins"), "{error}");
    assert_eq!(network.rack(&host("a")), Ok(&switch("a")));
}

#[test]
fn what_is_wrong_is_refused_by_name() {
    let mut network = two_racks();
    let spec = |a: End, b: End, rate| LinkSpec::symmetric(a, b, mbit(rate));
    let own = Attachment::OwnBridge { bridge: switch("br1") };
    let cases: [(Result<(), TopologyError>, &str); 8] = [
        (network.add_switch(switch("s0")), "switch s0 is there twice"),
        (network.add_host(host("h1"), own).map(drop), "host h1 is there twice"),
        (
            network.add_link(spec(end("s1", "up"), end("s2", "x"), 1)).map(drop),
            "two links end at s1 port up",
        ),
        (network.add_link(spec(end("s1", "x"), end("s1", "y"), 1)).map(drop), "same switch"),
        (network.add_link(spec(end("s1", "x"), end("s9", "y"), 1)).map(drop), "switch s9 is not"),
        (network.add_link(spec(end("s1", "x"), end("s2", "y"), 0)).map(drop), "capacity of zero"),
        (network.set_port_up(&end("s1", "none"), true), "no link ends at s1 port none"),
        (network.ways(&host("h1"), &host("h9"), 1).map(drop), "host h9 is not in the topology"),
    ];
    for (result, wanted) in cases {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
    let zero = Attachment::Cable { at: end("s2", "z"), up: mbit(0), down: mbit(1) };
    assert!(network.add_host(host("h8"), zero).is_err());
    assert!(
        network.ways(&host("h1"), &host("h8"), 1).is_err(),
        "a refused host leaves nothing behind"
    );
}

#[test]
fn of_two_ways_as_long_the_one_with_more_room_comes_first() {
    let mut network = two_racks();
    let second = link(&mut network, ("s1", "up2"), ("s0", "to1b"), 400);
    let first =
        |network: &Topology| network.ways(&host("h1"), &host("h4"), 2).unwrap()[0].to_string();
    assert!(first(&network).contains("s1:up "), "equal: the link added first");
    let used = network.leaving(&end("s1", "up")).unwrap();
    network.set_used(used, mbit(390)).unwrap();
    assert!(first(&network).contains("s1:up2"), "{}", first(&network));
    let along = DirectedLink { link: second, direction: Direction::Forward };
    assert_eq!(network.spare(along), Ok(mbit(400)));
}

/// A random network: `edges` between at most 6 switches, with hosts at the first and the second.
fn random(edges: &[(usize, usize, u64, bool)]) -> Topology {
    let mut network = Topology::new();
    for index in 0..6 {
        network.add_switch(switch(&format!("s{index}"))).unwrap();
    }
    for (name, bridge) in [("from", "s0"), ("to", "s1")] {
        network.add_host(host(name), Attachment::OwnBridge { bridge: switch(bridge) }).unwrap();
    }
    for (number, (a, b, rate, up)) in edges.iter().enumerate().filter(|(_, e)| e.0 != e.1) {
        let at = |index: usize| (format!("s{index}"), format!("p{number}"));
        let (a, b) = (at(*a), at(*b));
        let id = link(&mut network, (&a.0, &a.1), (&b.0, &b.1), rate + 1);
        network.set_link_up(id, *up).unwrap();
    }
    network
}

/// The lengths of all ways without loops, sorted, by trying every one.
fn all_lengths(network: &Topology) -> Vec<usize> {
    fn extend(
        graph: &DiGraph<Node, Edge>,
        at: NodeIndex,
        goal: NodeIndex,
        seen: &mut Vec<NodeIndex>,
        found: &mut Vec<usize>,
    ) {
        if at == goal {
            found.push(seen.len());
            return;
        }
        seen.push(at);
        for edge in graph.edges(at).filter(|e| e.weight().is_up()) {
            if !seen.contains(&edge.target()) {
                extend(graph, edge.target(), goal, seen, found);
            }
        }
        seen.pop();
    }
    let mut found = Vec::new();
    let (from, to) = (network.hosts[&host("from")].0, network.hosts[&host("to")].0);
    extend(&network.graph, from, to, &mut Vec::new(), &mut found);
    found.sort_unstable();
    // Two of the edges stay inside the hosts and are no hops.
    found.into_iter().map(|length| length - 2).collect()
}

proptest! {
    #[test]
    fn the_k_shortest_ways_are_the_k_shortest_of_all(
        edges in prop::collection::vec((0usize..6, 0usize..6, 0u64..50, any::<bool>()), 0..12),
        k in 1usize..8,
    ) {
        let network = random(&edges);
        let all = all_lengths(&network);
        match network.ways(&host("from"), &host("to"), k) {
            Err(TopologyError::NoWay { .. }) => prop_assert!(all.is_empty()),
            Err(other) => prop_assert!(false, "{other}"),
            Ok(ways) => {
                let lengths: Vec<usize> = ways.iter().map(|way| way.hops.len()).collect();
                prop_assert_eq!(&lengths[..], &all[..k.min(all.len())]);
                for (index, way) in ways.iter().enumerate() {
                    prop_assert!(!ways[..index].contains(way), "each way once");
                    for hop in &way.hops {
                        prop_assert!(network.is_up(hop.along).unwrap());
                    }
                    let switches: BTreeSet<_> = way.ports().map(|end| &end.switch).collect();
                    prop_assert_eq!(switches.len(), way.hops.len(), "no switch twice");
                }
                prop_assert_eq!(network.ways(&host("from"), &host("to"), k).unwrap(), ways);
            }
        }
    }
}
