//! `lifeboat cordon HOST` and `lifeboat uncordon HOST`.

use lifeboat_protocol::controller::CordonRequest;

use super::client::Context;
use super::{CliError, hosts};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The host.
    host: String,
}

pub(super) async fn run(context: &Context, args: Args, cordoned: bool) -> Result<u8, CliError> {
    let request = CordonRequest { host: args.host, cordoned };
    let reply = context.client().await?.cordon(request).await?.into_inner();
    hosts::show(context, &reply)
}
