//! `lifeboat cancel ID`.

use lifeboat_protocol::controller::CancelRequest;

use super::client::{Context, operation_id};
use super::{CliError, status};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The evacuation.
    id: String,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<u8, CliError> {
    let request = CancelRequest { evacuation: args.id, operation_id: operation_id() };
    let reply = context.client().await?.cancel(request).await?.into_inner();
    status::show(context, &reply)
}
