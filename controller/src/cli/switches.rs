//! `lifeboat switches`: every switch and port, with what is reserved, what passes, and what can be
//! reserved.

use lifeboat_protocol::controller::{Switch, SwitchesRequest};

use super::CliError;
use super::client::Context;
use super::output::{print, print_json, rate, table, yes};

pub(super) async fn run(context: &Context) -> Result<u8, CliError> {
    let reply = context.client().await?.switches(SwitchesRequest {}).await?.into_inner();
    if context.json {
        print_json(&reply)?;
        return Ok(0);
    }
    let switches = reply.switches.iter().map(|switch| {
        vec![
            switch.name.clone(),
            switch.datapath_id.clone(),
            yes(switch.openflow_connected),
            yes(switch.ovsdb_connected),
            switch.datapath.clone(),
            full(switch),
            switch.shaping.clone(),
            switch.detail.clone(),
        ]
    });
    let rows: Vec<Vec<String>> = switches.collect();
    print(&table(
        &["SWITCH", "DATAPATH ID", "OPENFLOW", "OVSDB", "KIND", "FULL", "KERNEL", ""],
        &rows,
    ))?;
    let ports = reply.switches.iter().flat_map(|switch| {
        switch.ports.iter().map(|port| {
            vec![
                format!("{}:{}", switch.name, port.name),
                port.peer.clone(),
                if port.up { "up" } else { "down" }.to_owned(),
                rate(port.capacity_bits_per_sec),
                rate(port.reserved_bits_per_sec),
                if port.rate_known { rate(port.tx_bits_per_sec) } else { "?".to_owned() },
                if port.peer.is_empty() { String::new() } else { port.ability.clone() },
            ]
        })
    });
    let rows: Vec<Vec<String>> = ports.collect();
    let head = ["PORT", "LEADS TO", "LINK", "CAPACITY", "RESERVED", "SENDS", "CAN DO"];
    print(&format!("\n{}", table(&head, &rows)))?;
    Ok(0)
}

/// How full its fullest link is.
fn full(switch: &Switch) -> String {
    match (switch.saturation_known, switch.hot_spot) {
        (false, _) => "?".to_owned(),
        (true, hot) => {
            format!("{:.0} %{}", switch.saturation * 100.0, if hot { " hot" } else { "" })
        }
    }
}
