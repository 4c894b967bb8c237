//! `lifeboat migrate VM --to HOST`: an evacuation of one VM.

use lifeboat_protocol::controller::MigrateRequest;

use super::CliError;
use super::client::Context;
use super::evacuate::{Options, follow, left_alone};
use super::interrupts::Interrupts;

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
    let mut client = context.client().await?;
    let mut interrupts = Interrupts::listen()?;
    match interrupts.through(client.migrate(request)).await {
        Some(begun) => follow(context, begun?.into_inner(), &args.options, interrupts).await,
        None => Ok(left_alone()),
    }
}
