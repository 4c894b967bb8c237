//! `lifeboat-lab FILE`: checks a scenario and prints what follows from it as JSON.
//!
//! Called by `lab/up`; also the quickest way to see what a change to a scenario does. No network,
//! nothing raised.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

/// Checks a lab scenario and prints it, with everything that follows from it, as JSON.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The scenario (TOML).
    scenario: PathBuf,
}

fn main() -> ExitCode {
    match print_checked(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // One line for the operator, whatever RUST_BACKTRACE says.
        Err(error) => {
            eprintln!("lifeboat-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print_checked(args: &Args) -> anyhow::Result<()> {
    let file = args.scenario.display().to_string();
    let text = std::fs::read_to_string(&args.scenario)
        .with_context(|| format!("the scenario {file} cannot be read"))?;
    let scenario = lifeboat_lab::parse(&file, &text)?;
    println!("{}", serde_json::to_string_pretty(&scenario)?);
    Ok(())
}
