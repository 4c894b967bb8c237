//! `lifeboat controller --config FILE [--check]`: the daemon.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

use super::CliError;
use super::output::print;
use crate::config::Site;
use crate::daemon::Daemon;
use crate::driver::Patience;
use crate::network;
use crate::tls::{TlsFiles, for_switches};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Only check the configuration.
    #[arg(long)]
    check: bool,
    /// How log lines look (what they say: LIFEBOAT_LOG, as in `info` or `lifeboat_controller=debug`).
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

pub(super) async fn run(args: Args) -> Result<u8, CliError> {
    let site = Site::load(&args.config)?;
    if args.check {
        return check(&site);
    }
    log(args.log_format);
    let network = network::connect(&site)?;
    let daemon = Daemon::start(site, network, Patience::default())?;
    daemon.serve().await?;
    Ok(0)
}

fn check(site: &Site) -> Result<u8, CliError> {
    if let Some(dir) = &site.config.controller.tls_dir {
        TlsFiles::load(dir)?;
    }
    if let Some(dir) = &site.config.controller.switch_tls_dir {
        for_switches(dir)?;
    }
    print(&format!(
        "the configuration is good: {} hosts, {} switches, {} links\n",
        site.config.hosts.len(),
        site.config.switches.len(),
        site.config.links.len()
    ))?;
    Ok(0)
}

fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_env("LIFEBOAT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().init(),
    }
}
