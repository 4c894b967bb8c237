//! `lifeboat hosts`: who is there, and what room they have.

use lifeboat_protocol::controller::{HostsReply, HostsRequest};

use super::CliError;
use super::client::Context;
use super::output::{print, print_json, size, table, yes};

pub(super) async fn run(context: &Context) -> Result<u8, CliError> {
    let reply = context.client().await?.hosts(HostsRequest {}).await?.into_inner();
    show(context, &reply)
}

pub(super) fn show(context: &Context, reply: &HostsReply) -> Result<u8, CliError> {
    if context.json {
        print_json(reply)?;
        return Ok(0);
    }
    let rows = reply.hosts.iter().map(|host| {
        let memory =
            format!("{} of {}", size(host.memory_free_bytes), size(host.memory_total_bytes));
        vec![
            host.name.clone(),
            host.state.clone(),
            host.rack.clone(),
            host.vm_count.to_string(),
            memory,
            format!("{} {}", host.qemu_version, host.accelerator),
            yes(host.ovsdb_connected && host.openflow_connected),
            host.detail.clone(),
        ]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let head = ["HOST", "STATE", "RACK", "VMS", "FREE", "QEMU", "SWITCH", ""];
    print(&table(&head, &rows))?;
    Ok(0)
}
