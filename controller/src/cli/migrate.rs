//! `lifeboat migrate VM --to HOST`: an evacuation of one VM.

use lifeboat_protocol::controller::MigrateRequest;

use super::CliError;
use super::client::Context;
use super::evacuate::{Options, follow};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The VM to move.
    vm: String,
    #[command(flatten)]
    options: Options,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<u8, CliError> {
    let options = Some(args.options.request(&[]));
    let request = MigrateRequest { vm: args.vm, options };
    let begun = context.client().await?.migrate(request).await?.into_inner();
    follow(context, begun, &args.options).await
}
