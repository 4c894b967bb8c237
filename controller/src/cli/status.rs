//! `lifeboat status [ID] [--watch]`: where evacuations stand.

use lifeboat_protocol::controller::{EvacuationStatus, StatusReply, StatusRequest};

use super::CliError;
use super::client::Context;
use super::output::{print, print_json, rate, table, time, to_go};
use super::progress;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// One evacuation; without it, those that run and the last few that have ended.
    id: Option<String>,
    /// Stay, and show progress until it has ended.
    #[arg(long)]
    watch: bool,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<u8, CliError> {
    let mut client = context.client().await?;
    let request = StatusRequest { evacuation: args.id.unwrap_or_default() };
    if args.watch {
        let stream = client.watch(request).await?.into_inner();
        progress::show(context, stream).await?;
        return Ok(0);
    }
    show(context, &client.status(request).await?.into_inner())
}

pub(super) fn show(context: &Context, reply: &StatusReply) -> Result<u8, CliError> {
    if context.json {
        print_json(reply)?;
    } else if reply.evacuations.is_empty() {
        print("no evacuation yet\n")?;
    } else {
        let shown: Vec<String> = reply.evacuations.iter().map(text).collect();
        print(&shown.join("\n"))?;
    }
    Ok(0)
}

fn text(status: &EvacuationStatus) -> String {
    let mut text = format!(
        "{} of {}: {}, urgency {} %, {} so far, {} to go (predicted {})\n",
        status.evacuation,
        status.hosts.join(", "),
        status.state,
        status.urgency,
        time(status.elapsed_ms),
        to_go(status.time_to_go_ms, status.time_to_go_known),
        time(status.predicted_ms),
    );
    if !status.detail.is_empty() {
        text.push_str(&format!("  {}\n", super::output::clean(&status.detail)));
    }
    let rows = status.migrations.iter().map(|migration| {
        vec![
            migration.vm.clone(),
            migration.source.clone(),
            migration.destination.clone(),
            migration.phase.clone(),
            format!("{:.0} %", migration.done * 100.0),
            rate(migration.rate_bits_per_sec),
            to_go(migration.time_to_go_ms, migration.time_to_go_known),
            migration.reason.clone(),
        ]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let head = ["VM", "FROM", "TO", "PHASE", "DONE", "RATE", "TO GO", ""];
    text.push_str(&table(&head, &rows));
    if !status.reservations.is_empty() {
        let rows = status.reservations.iter().map(|held| {
            vec![
                format!("{}:{}", held.switch, held.port),
                if held.queue == 0 { "paced".to_owned() } else { held.queue.to_string() },
                rate(held.capacity_bits_per_sec),
                rate(held.reserved_bits_per_sec),
                rate(held.used_bits_per_sec),
            ]
        });
        let rows: Vec<Vec<String>> = rows.collect();
        text.push_str(&table(&["PORT", "QUEUE", "CAPACITY", "RESERVED", "USED"], &rows));
    }
    text
}
