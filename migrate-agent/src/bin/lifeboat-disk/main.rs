//! `lifeboat-disk`: the processes behind a mount of disk images, apart from the agent so that a guest
//! outlives it.
//!
//! The agent starts `hold` and `move` once for each VM that leaves with its disks, and `hold`
//! and `arrive` where they may follow it. `serve` is for whoever
//! wants a mount of images by hand, which marks and limits nothing. All it does is in `disk::fuse` and
//! `disk::process`; deliberately nothing of it is here.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use lifeboat_agent::disk::fuse::{DiskLimit, PassThrough, Server, holder, holder::HolderError};
use lifeboat_agent::disk::process::{arrival, mover};

/// Serves disk images through FUSE, and keeps their mounts alive.
#[derive(Debug, Parser)]
#[command(version, about, long_about = None)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Keeps the descriptors of servers, so that one that dies can be replaced without an error.
    Hold {
        /// The socket to listen on.
        #[arg(long)]
        socket: PathBuf,
        /// End when the last mount that was held is forgotten.
        #[arg(long)]
        until_forgotten: bool,
    },
    /// Serves one VM's images, and sends them to another host. The agent steers it.
    Move {
        /// The file beside which its sockets are.
        #[arg(long)]
        setting: PathBuf,
    },
    /// Receives one VM's images, and serves them to a guest that may run before they are complete. The
    /// agent steers it.
    Arrive {
        /// The file beside which its sockets are.
        #[arg(long)]
        setting: PathBuf,
    },
    /// Serves the images of a directory at a mount point, until it is unmounted.
    Serve(Serve),
}

#[derive(Debug, Args)]
struct Serve {
    /// The directory with the images.
    #[arg(long)]
    images: PathBuf,
    /// An empty directory. When the holder knows it already, its mount is taken over.
    #[arg(long)]
    at: PathBuf,
    /// The holder's socket.
    #[arg(long)]
    holder: PathBuf,
}

fn main() -> ExitCode {
    let logs = tracing_subscriber::fmt().with_writer(std::io::stderr);
    let filter = tracing_subscriber::EnvFilter::try_from_env("LIFEBOAT_LOG");
    logs.with_env_filter(filter.unwrap_or_else(|_| "info".into())).init();
    let outcome = match Arguments::parse().command {
        Command::Hold { socket, until_forgotten } => {
            let ends = match until_forgotten {
                true => holder::Ends::WithTheLastMount,
                false => holder::Ends::Never,
            };
            let held = holder::hold(&socket, ends);
            held.with_context(|| format!("cannot hold at {}", socket.display()))
        }
        Command::Move { setting } => move_disks(&setting),
        Command::Arrive { setting } => take_disks_in(&setting),
        Command::Serve(arguments) => serve(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lifeboat-disk: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn move_disks(setting: &std::path::Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    Ok(runtime.block_on(mover::run(setting, || tracing::info!("serving")))?)
}

fn take_disks_in(setting: &std::path::Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    Ok(runtime.block_on(arrival::run(setting, || tracing::info!("serving")))?)
}

fn serve(arguments: &Serve) -> anyhow::Result<()> {
    let name = arguments.at.to_str().context("the mount point's path is not UTF-8")?;
    let (hook, limit) = (Arc::new(PassThrough), DiskLimit::start()?);
    let (mut server, serving) = match holder::Serving::take(&arguments.holder, name) {
        Ok((serving, device, memory)) => {
            (Server::take_over(&arguments.images, device, memory, hook, limit)?, serving)
        }
        Err(HolderError::Unknown(_)) => {
            let server = Server::mount_within(&arguments.images, &arguments.at, hook, limit)?;
            let serving = holder::Serving::park(&arguments.holder, name, server.parts())?;
            (server, serving)
        }
        Err(error) => return Err(error.into()),
    };
    // Whoever started us waits for this line.
    println!("serving");
    std::io::stdout().flush()?;
    server.join();
    serving.forget()?;
    Ok(())
}
