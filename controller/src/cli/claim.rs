//! `lifeboat claim VM --fenced`: the operator's word that ends `uncertain`.

use lifeboat_protocol::controller::ClaimRequest;

use super::CliError;
use super::client::Context;
use super::output::{print, print_json};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The VM.
    vm: String,
    /// Your word that the other host cannot run it: it is off, or cut from network and storage.
    #[arg(long)]
    fenced: bool,
    /// The host that shall run it; needed only when both could.
    #[arg(long)]
    host: Option<String>,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<u8, CliError> {
    let host = args.host.unwrap_or_default();
    let request = ClaimRequest { vm: args.vm, host, fenced: args.fenced };
    let reply = context.client().await?.claim(request).await?.into_inner();
    if context.json {
        print_json(&reply)?;
    } else if let Some(vm) = reply.vm {
        print(&format!("{} is {} at {}\n", vm.name, vm.state, vm.host))?;
    }
    Ok(0)
}
