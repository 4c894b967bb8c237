//! The operator's commands: one verb, one file. Each asks the controller and prints its answer, as
//! a table or, with `--json`, as the reply itself.
//!
//! Exit codes:
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done; of an evacuation: every VM moved |
//! | 1 | refused or failed; the message says why, and nothing was changed unless it says so |
//! | 2 | the evacuation ended and some VMs stayed, are uncertain, or lost; `verify`: not all files are the same |
//! | 3 | the evacuation ended and no VM moved |
//! | 4 | the evacuation was cancelled; `preseed`: stopped by Ctrl-C |
//! | 5 | detached: the evacuation goes on without this command |
//! | 64 | the command line was wrong |
//!
//! Deliberately not here: any check of what is asked for. The controller checks, so that every
//! client gets the same answer.

mod cancel;
mod certs;
mod claim;
mod client;
mod completions;
mod controller;
mod cordon;
mod error;
mod evacuate;
mod hosts;
mod interrupts;
mod limit;
mod migrate;
mod output;
mod plan;
mod preseed;
mod progress;
mod report;
mod retry;
mod status;
mod switches;
mod top;
mod topology;
mod verify;
mod vms;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

pub use error::CliError;

/// Refused or failed.
pub const ERROR: u8 = 1;
/// Some VMs stayed.
pub const PARTIAL: u8 = 2;
/// No VM moved.
pub const FAILED: u8 = 3;
/// Cancelled.
pub const CANCELLED: u8 = 4;
/// The evacuation goes on without this command.
pub const DETACHED: u8 = 5;
/// The command line was wrong (`EX_USAGE` of sysexits.h).
pub const USAGE: u8 = 64;

/// Moves live VMs off a failing host, and says beforehand how long it takes.
#[derive(Debug, Parser)]
#[command(name = "lifeboat", version, max_term_width = 100)]
pub struct Cli {
    /// The controller: `unix:PATH` or `HOST:PORT`.
    #[arg(
        long,
        global = true,
        env = "LIFEBOAT_SERVER",
        default_value = "unix:/run/lifeboat/controller.sock",
        value_name = "ADDR"
    )]
    server: String,
    /// Directory with ca.pem, cert.pem and key.pem, for a controller on TCP.
    #[arg(long, global = true, env = "LIFEBOAT_TLS_DIR", value_name = "DIR")]
    tls_dir: Option<PathBuf>,
    /// Print the controller's reply as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the controller.
    Controller(controller::Args),
    /// List the hosts.
    Hosts,
    /// List the VMs of a host, or of all.
    Vms(vms::Args),
    /// List the switches with their ports.
    Switches,
    /// Show what passes on every link, what is reserved there, and for whom.
    Top(top::Args),
    /// Print the network as a graph.
    Topology(topology::Args),
    /// Show where evacuations stand.
    Status(status::Args),
    /// Show what an evacuation would do, and change nothing.
    Plan(evacuate::Args),
    /// Move every VM off hosts.
    Evacuate(evacuate::Args),
    /// Move one VM.
    Migrate(migrate::Args),
    /// Let a host take no more VMs.
    Cordon(cordon::Args),
    /// Let a host take VMs again.
    Uncordon(cordon::Args),
    /// Try again what an evacuation left behind.
    Retry(retry::Args),
    /// Stop an evacuation; VMs past the point of no return arrive all the same.
    Cancel(cancel::Args),
    /// Limit what a VM that is under way may send, or change on its disks.
    Limit(limit::Args),
    /// Show what an evacuation came to.
    Report(report::Args),
    /// Say where an uncertain VM may run: the other host is fenced off.
    Claim(claim::Args),
    /// Copy a VM's disks to another host now, so that a later migration sends only what differs.
    Preseed(preseed::Args),
    /// Compare what a VM's overlays lie on with other hosts, by hash.
    Verify(verify::Args),
    /// Make certificates.
    Certs(certs::Args),
    /// Print a completion script for a shell.
    Completions(completions::Args),
}

/// Carries out one command and returns its exit code.
///
/// # Errors
/// With what was asked, what stood in the way, and what to do.
pub async fn run(cli: Cli) -> Result<u8, CliError> {
    let context = client::Context { server: cli.server, tls_dir: cli.tls_dir, json: cli.json };
    match cli.command {
        Command::Controller(args) => controller::run(args).await,
        Command::Hosts => hosts::run(&context).await,
        Command::Vms(args) => vms::run(&context, args).await,
        Command::Switches => switches::run(&context).await,
        Command::Top(args) => top::run(&context, args).await,
        Command::Topology(args) => topology::run(&context, args).await,
        Command::Status(args) => status::run(&context, args).await,
        Command::Plan(args) => plan::run(&context, args).await,
        Command::Evacuate(args) => evacuate::run(&context, args).await,
        Command::Migrate(args) => migrate::run(&context, args).await,
        Command::Cordon(args) => cordon::run(&context, args, true).await,
        Command::Uncordon(args) => cordon::run(&context, args, false).await,
        Command::Retry(args) => retry::run(&context, args).await,
        Command::Cancel(args) => cancel::run(&context, args).await,
        Command::Limit(args) => limit::run(&context, args).await,
        Command::Report(args) => report::run(&context, args).await,
        Command::Claim(args) => claim::run(&context, args).await,
        Command::Preseed(args) => preseed::run(&context, args).await,
        Command::Verify(args) => verify::run(&context, args).await,
        Command::Certs(args) => certs::run(args),
        Command::Completions(args) => completions::run(args),
    }
}

#[cfg(test)]
mod tests;
