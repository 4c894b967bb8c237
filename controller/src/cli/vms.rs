//! `lifeboat vms [HOST]`: what runs where, with the newest measurements.

use lifeboat_protocol::controller::VmsRequest;

use super::CliError;
use super::client::Context;
use super::output::{print, print_json, rate, size, table};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only the VMs of this host.
    host: Option<String>,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<u8, CliError> {
    let request = VmsRequest { host: args.host.unwrap_or_default() };
    let reply = context.client().await?.vms(request).await?.into_inner();
    if context.json {
        print_json(&reply)?;
        return Ok(0);
    }
    let rows = reply.vms.iter().map(|vm| {
        let measured = vm.non_zero_bytes > 0;
        let figure = |text: String| if measured { text } else { "-".to_owned() };
        vec![
            vm.name.clone(),
            vm.host.clone(),
            vm.state.clone(),
            size(vm.memory_bytes),
            figure(size(vm.non_zero_bytes)),
            figure(format!("{} pages/s", vm.dirty_pages_per_sec)),
            figure(rate(vm.network_out_bits_per_sec)),
            figure(rate(vm.network_in_bits_per_sec)),
            vm.detail.clone(),
        ]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let head = ["VM", "HOST", "STATE", "MEMORY", "NON-ZERO", "DIRTIES", "SENDS", "RECEIVES", ""];
    print(&table(&head, &rows))?;
    Ok(0)
}
