//! `lifeboat preseed VM --to HOST`: a copy of a VM's disks ahead of a migration.
//!
//! It lasts as long as the command; Ctrl-C stops it, and what has been copied stays.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use lifeboat_protocol::controller::{
    ForgetPreseedRequest, PreseedReply, PreseedRequest, SeedsRequest,
};
use lifeboat_protocol::units::BitsPerSec;
use tokio_stream::StreamExt;

use super::client::Context;
use super::interrupts::Interrupts;
use super::output::{print, print_json, rate, size, table, time, to_go};
use super::{CANCELLED, CliError};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The VM.
    #[arg(required_unless_present = "list")]
    vm: Option<String>,
    /// The host that is to have the copy.
    #[arg(long, value_name = "HOST", required_unless_present = "list")]
    to: Option<String>,
    /// What it may send at most, in Mbit/s, instead of a fifth of the narrowest link on its way.
    #[arg(long, value_name = "MBIT", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Delete the copy.
    #[arg(long, conflicts_with_all = ["limit", "list"])]
    forget: bool,
    /// Show the copies that hosts have.
    #[arg(long, conflicts_with_all = ["vm", "to", "limit"])]
    list: bool,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<u8, CliError> {
    let mut client = context.client().await?;
    if args.list {
        let reply = client.seeds(SeedsRequest {}).await?.into_inner();
        if context.json {
            print_json(&reply)?;
            return Ok(0);
        }
        let rows = reply.seeds.iter();
        let rows = rows.map(|seed| {
            vec![seed.vm.clone(), seed.host.clone(), size(seed.bytes), time(seed.age_ms)]
        });
        print(&table(&["VM", "COPY AT", "SIZE", "AGE"], &rows.collect::<Vec<_>>()))?;
        return Ok(0);
    }
    let (vm, to) = (args.vm.unwrap_or_default(), args.to.unwrap_or_default());
    if args.forget {
        let request = ForgetPreseedRequest { vm, host: to };
        let reply = client.forget_seed(request).await?.into_inner();
        match context.json {
            true => print_json(&reply)?,
            false => print(&format!("deleted the copy of {} at {}\n", reply.vm, reply.host))?,
        }
        return Ok(0);
    }
    let limit_bits_per_sec = args.limit.map_or(0, |limit| BitsPerSec::from_mbit(limit).0);
    let request = PreseedRequest { vm, to, limit_bits_per_sec };
    let mut interrupts = Interrupts::listen()?;
    let mut news = client.preseed(request).await?.into_inner();
    let mut display = Display::new(context);
    let mut last = PreseedReply::default();
    loop {
        tokio::select! {
            reply = news.next() => match reply {
                Some(reply) => last = reply?,
                None => break,
            },
            _ = interrupts.next() => {
                display.finish();
                // Hanging up ends the copy at both agents.
                eprintln!("stopped; what has been copied stays, and the next copy goes on with it");
                return Ok(CANCELLED);
            }
        }
        display.update(&last)?;
    }
    display.finish();
    if last.phase != "done" {
        return Err(CliError::Broken { doing: "copying disks" });
    }
    match context.json {
        true => print_json(&last)?,
        false => {
            let (vm, to) = (&last.vm, &last.to);
            let (sent, all) = (size(last.bytes_sent), size(last.bytes_total));
            print(&format!("{to} has a copy of {vm}'s disks: {sent} sent, for images of {all}\n"))?;
        }
    }
    Ok(0)
}

/// A bar on a terminal, a line for each phase elsewhere, replies with `--json`.
struct Display {
    json: bool,
    bar: Option<ProgressBar>,
    phase: String,
}

impl Display {
    fn new(context: &Context) -> Self {
        let bar = (!context.json && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(0);
            match ProgressStyle::with_template("{bar:28} {percent:>3} %  {msg}") {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        Self { json: context.json, bar, phase: String::new() }
    }

    fn update(&mut self, reply: &PreseedReply) -> Result<(), CliError> {
        if self.json {
            let line = serde_json::to_string(reply).map_err(CliError::Json)?;
            eprintln!("{line}");
            return Ok(());
        }
        let text = line(reply);
        if let Some(bar) = &self.bar {
            // What was the same already counts as done.
            bar.set_length(reply.bytes_total.max(1));
            let done = reply.bytes_total.saturating_sub(reply.bytes_left);
            bar.set_position(if reply.phase == "comparing" { 0 } else { done });
            bar.set_message(text);
        } else if self.phase != reply.phase {
            eprintln!("{text}");
        }
        self.phase.clone_from(&reply.phase);
        Ok(())
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

fn line(reply: &PreseedReply) -> String {
    let mut line = format!("{} {} {} > {}", reply.vm, reply.phase, reply.host, reply.to);
    if reply.phase == "copying" {
        let (left, go) =
            (size(reply.bytes_left), to_go(reply.time_to_go_ms, reply.time_to_go_known));
        let now = rate(reply.rate_bits_per_sec);
        line = format!("{line}, {now}, {left} left, {go} to go");
    }
    super::output::clean(&line)
}
