//! `lifeboat-experiment`: runs one experiment on this machine and writes what it found, and draws it.
//!
//! Started by `lab/experiment`, which builds it; also by the integration tests, for experiments that
//! are tests as well. It starts itself again inside private namespaces (`rig::private`), unless the
//! experiment raises a cloud. Exit code:
//! 0 when every bound holds, 1 when one is broken, 2 when it could not be measured.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use lifeboat_tests::experiments::{self, EXPERIMENTS, Record, Setting};
use lifeboat_tests::rig::private;

/// Runs an experiment and writes everything it measured to OUT/NAME.json.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The experiment, or `list`.
    name: String,
    /// A first look with few runs.
    #[arg(long)]
    quick: bool,
    /// How often each case is measured (`reservation`, `tenant`, `solive-6`, `solive-7`).
    #[arg(long)]
    runs: Option<usize>,
    /// After about how many minutes to end, with what was measured by then (`solive-6`, `solive-7`).
    #[arg(long)]
    minutes: Option<u64>,
    /// What the contested link carries, in Mbit/s (`reservation`): less for a slow machine.
    #[arg(long, value_parser = clap::value_parser!(u64).range(4..=10_000))]
    link_mbit: Option<u64>,
    /// Only the cases in whose name one of these stands (`solive-8`, `eviction`, `downtime`).
    #[arg(long)]
    only: Vec<String>,
    /// With `list`: names only.
    #[arg(long)]
    names: bool,
    /// Where the record goes.
    #[arg(long, default_value = "lab/out")]
    out: PathBuf,
    /// Where the guest image is.
    #[arg(long, default_value = "lab/build")]
    images: PathBuf,
}

fn main() -> ExitCode {
    match work(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lifeboat-experiment: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn work(args: &Args) -> anyhow::Result<ExitCode> {
    if args.name == "list" {
        list(args.names);
        return Ok(ExitCode::SUCCESS);
    }
    if !EXPERIMENTS.iter().any(|entry| entry.name == args.name) {
        bail!("there is no experiment {}; `list` names them", args.name);
    }
    // One thread for connections, which must answer while this one waits for the world; no more,
    // because what is measured needs the machine's few CPUs.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let on_a_cloud = experiments::raises_a_cloud(&args.name);
    if !on_a_cloud && !private::is_inside() {
        let ended = runtime.block_on(private::enter())?;
        return Ok(ended.code().map_or(ExitCode::from(2), |code| ExitCode::from(code as u8)));
    }
    if !on_a_cloud {
        private::settle()?;
    }
    let record = runtime.block_on(run(args))?;
    write(&record, &args.out)?;
    // Everything is in the record.
    let _ = fs::remove_file(args.out.join(format!("{}.partial.json", args.name)));
    print!("{}", record.table());
    for plot in experiments::plots(&record) {
        let files = plot.write(&args.out)?;
        let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
        println!("drawn: {}", names.join(" "));
    }
    Ok(if record.holds() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn list(names_only: bool) {
    for entry in EXPERIMENTS {
        if names_only {
            println!("{}", entry.name);
        } else {
            println!("{:<14} {}", entry.name, entry.about);
        }
    }
}

async fn run(args: &Args) -> anyhow::Result<Record> {
    let images = fs::canonicalize(&args.images).with_context(|| {
        format!("{} is not there: build the guest image with lab/image", args.images.display())
    })?;
    let folder = tempfile::Builder::new().prefix("lifeboat-").tempdir()?;
    fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    let partial = args.out.join(format!("{}.partial.json", args.name));
    let (folder, images) = (folder.path(), images.as_path());
    let (runs, minutes, link_mbit) = (args.runs, args.minutes, args.link_mbit);
    let (quick, only, partial) = (args.quick, args.only.as_slice(), partial.as_path());
    let setting = Setting { quick, folder, images, runs, minutes, link_mbit, only, partial };
    let outcome = experiments::run(&args.name, setting).await;
    let record = outcome.context("the experiment has no code")?;
    record.with_context(|| format!("{} could not be measured", args.name))
}

fn write(record: &Record, out: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let file = out.join(format!("{}.json", record.name));
    let text = serde_json::to_string_pretty(record)? + "\n";
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
}
