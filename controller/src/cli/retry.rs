//! `lifeboat retry ID`: a new evacuation for what an old one left behind.

use lifeboat_protocol::controller::RetryRequest;

use super::CliError;
use super::client::{Context, operation_id};
use super::evacuate::left_alone;
use super::interrupts::Interrupts;
use super::{plan, progress, report};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The evacuation that left VMs behind.
    id: String,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<u8, CliError> {
    let request = RetryRequest { evacuation: args.id, operation_id: operation_id() };
    let mut client = context.client().await?;
    let mut interrupts = Interrupts::listen()?;
    let Some(begun) = interrupts.through(client.retry(request)).await else {
        return Ok(left_alone());
    };
    let begun = begun?.into_inner();
    if !context.json
        && let Some(made) = &begun.plan
    {
        plan::show(context, made)?;
    }
    if !progress::follow(context, &begun.evacuation, &mut interrupts).await? {
        return Ok(super::DETACHED);
    }
    report::show_and_rate(context, &begun.evacuation).await
}
