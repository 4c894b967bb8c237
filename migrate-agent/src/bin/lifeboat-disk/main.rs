//! `lifeboat-disk`: the processes behind a mount of disk images, apart from the agent so that a guest
//! outlives it.
//!
//! The agent starts `hold` and `move` once for each VM that leaves with its disks, and `hold`
//! and `arrive` where they may follow it. `serve` is for whoever wants a mount of images by hand, for a program
//! that is not QEMU; `changed` and `limit` ask such a mount. All it does is in `disk::fuse` and `disk::process`;
//! deliberately nothing of it is here.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use lifeboat_agent::disk::fuse::{SLOWEST, holder};
use lifeboat_agent::disk::process::{arrival, mover, plain};
use lifeboat_protocol::units::BytesPerSec;

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
    /// Prints what was changed through a mount of `serve`: begin and length in bytes, and the image's name, a
    /// line for each run of blocks of 64 KiB.
    Changed {
        /// The control socket of `serve`.
        #[arg(long)]
        control: PathBuf,
        /// What is printed counts as unchanged from then on: the next time only what is changed after.
        #[arg(long)]
        reset: bool,
    },
    /// Sets how fast the images of a mount of `serve` may be changed.
    Limit {
        /// The control socket of `serve`.
        #[arg(long)]
        control: PathBuf,
        /// Bytes per second, all images together; left out: no limit.
        #[arg(value_parser = clap::value_parser!(u64).range(SLOWEST.0..))]
        bytes: Option<u64>,
    },
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
    /// The socket at which `changed` and `limit` ask.
    #[arg(long)]
    control: Option<PathBuf>,
    /// How fast the images may be changed, all together, bytes per second.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(SLOWEST.0..))]
    limit: Option<u64>,
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
        Command::Changed { control, reset } => {
            ask(&control, if reset { "changed reset" } else { "changed" })
        }
        Command::Limit { control, bytes: None } => ask(&control, "limit"),
        Command::Limit { control, bytes: Some(bytes) } => ask(&control, &format!("limit {bytes}")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lifeboat-disk: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn move_disks(setting: &Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    Ok(runtime.block_on(mover::run(setting, || tracing::info!("serving")))?)
}

fn take_disks_in(setting: &Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    Ok(runtime.block_on(arrival::run(setting, || tracing::info!("serving")))?)
}

fn serve(arguments: &Serve) -> anyhow::Result<()> {
    let mount = plain::Plain {
        images: &arguments.images,
        at: &arguments.at,
        holder: &arguments.holder,
        control: arguments.control.as_deref(),
        limit: arguments.limit.map(BytesPerSec),
    };
    // Whoever started us waits for this line.
    let ready = || {
        println!("serving");
        std::io::stdout().flush()
    };
    Ok(plain::serve(&mount, ready)?)
}

fn ask(control: &Path, question: &str) -> anyhow::Result<()> {
    Ok(plain::ask(control, question, &mut std::io::stdout().lock())?)
}
