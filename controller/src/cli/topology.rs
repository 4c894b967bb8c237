//! `lifeboat topology`: hosts, switches and links; as a table, as JSON, or for Graphviz.

use lifeboat_protocol::controller::{TopologyLink, TopologyNode, TopologyReply, TopologyRequest};

use super::CliError;
use super::client::Context;
use super::output::{clean, print, print_json, rate, table, yes};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// As a graph for Graphviz: `lifeboat topology --dot | dot -Tsvg`.
    #[arg(long)]
    dot: bool,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<u8, CliError> {
    let reply = context.client().await?.topology(TopologyRequest {}).await?.into_inner();
    match (context.json, args.dot) {
        (true, _) => print_json(&reply)?,
        (_, true) => print(&dot(&reply))?,
        _ => print(&text(&reply))?,
    }
    Ok(0)
}

fn text(reply: &TopologyReply) -> String {
    let nodes = reply.nodes.iter().map(|node| {
        let of = if node.host.is_empty() { &node.rack } else { &node.host };
        vec![node.name.clone(), node.kind.clone(), of.clone(), yes(node.connected)]
    });
    let nodes: Vec<Vec<String>> = nodes.collect();
    let links = reply.links.iter().map(|link| {
        vec![
            format!("{}:{}", link.a_switch, link.a_port),
            format!("{}:{}", link.b_switch, link.b_port),
            capacity(link),
            if link.up { "up" } else { "down" }.to_owned(),
            link.seen.clone(),
            link.detail.clone(),
        ]
    });
    let links: Vec<Vec<String>> = links.collect();
    let nodes = table(&["NODE", "KIND", "OF", "CONNECTED"], &nodes);
    format!("{nodes}\n{}", table(&["LINK", "TO", "CARRIES", "STATE", "LLDP", ""], &links))
}

fn capacity(link: &TopologyLink) -> String {
    let there = rate(link.capacity_bits_per_sec);
    match link.capacity_bits_per_sec == link.capacity_back_bits_per_sec {
        true => there,
        false => format!("{there}, back {}", rate(link.capacity_back_bits_per_sec)),
    }
}

/// The graph in Graphviz' language.
fn dot(reply: &TopologyReply) -> String {
    let mut text = "graph lifeboat {\n".to_owned();
    for node in &reply.nodes {
        text.push_str(&format!("  {} [{}];\n", quoted(&node.name), node_style(node)));
        if !node.host.is_empty() {
            let (host, bridge) = (quoted(&node.host), quoted(&node.name));
            text.push_str(&format!("  {host} -- {bridge} [style=bold];\n"));
        }
    }
    for link in &reply.links {
        text.push_str(&format!(
            "  {} -- {} [taillabel={}, headlabel={}, label={}{}];\n",
            quoted(&link.a_switch),
            quoted(&link.b_switch),
            quoted(&link.a_port),
            quoted(&link.b_port),
            quoted(&capacity(link)),
            if link.up { "" } else { ", style=dashed, color=red" },
        ));
    }
    text.push_str("}\n");
    text
}

fn node_style(node: &TopologyNode) -> String {
    let shape = match node.kind.as_str() {
        "host" => "box",
        "bridge" => "oval",
        _ => "diamond",
    };
    let colour = if node.connected { "" } else { ", color=red" };
    format!("shape={shape}{colour}")
}

/// A text as Graphviz quotes it.
fn quoted(text: &str) -> String {
    format!("\"{}\"", clean(text).replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply() -> TopologyReply {
        let node = |name: &str, kind: &str, host: &str, connected| TopologyNode {
            name: name.to_owned(),
            kind: kind.to_owned(),
            host: host.to_owned(),
            rack: String::new(),
            connected,
        };
        let link = TopologyLink {
            a_switch: "s1".to_owned(),
            a_port: "d1".to_owned(),
            b_switch: "h1.br0".to_owned(),
            b_port: "u1".to_owned(),
            capacity_bits_per_sec: 100_000_000,
            capacity_back_bits_per_sec: 50_000_000,
            up: false,
            seen: "lost".to_owned(),
            detail: "for 9 s".to_owned(),
        };
        let nodes = vec![
            node("h1", "host", "", true),
            node("h1.br0", "bridge", "h1", true),
            node("s1", "switch", "", false),
        ];
        TopologyReply { nodes, links: vec![link] }
    }

    #[test]
    fn a_graph_is_one_that_graphviz_reads() {
        let shown = dot(&reply());
        assert!(shown.starts_with("graph lifeboat {\n  \"h1\" [shape=box];"), "{shown}");
        assert!(shown.contains("\"h1\" -- \"h1.br0\" [style=bold];"), "{shown}");
        assert!(
            shown.contains("\"s1\" -- \"h1.br0\"") && shown.contains("style=dashed"),
            "{shown}"
        );
        assert_eq!(shown.matches('{').count(), shown.matches('}').count());
        assert_eq!(quoted("a\"b\\c\n"), r#""a\"b\\c ""#);
    }

    #[test]
    fn a_table_says_what_lldp_has_seen() {
        let shown = text(&reply());
        assert!(shown.contains("100 Mbit/s, back 50 Mbit/s  down   lost  for 9 s"), "{shown}");
    }
}
