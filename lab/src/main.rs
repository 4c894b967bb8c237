//! `lifeboat-lab FILE`: checks a scenario and prints what follows from it as JSON.
//!
//! Called by `lab/up`; also the quickest way to see what a change to a scenario does. No network,
//! nothing raised.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;

/// Checks a lab scenario and prints it, with everything that follows from it, as JSON.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The scenario (TOML).
    scenario: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let file = args.scenario.display().to_string();
    let text = std::fs::read_to_string(&args.scenario)
        .with_context(|| format!("the scenario {file} cannot be read"))?;
    let scenario = lifeboat_lab::parse(&file, &text)?;
    println!("{}", serde_json::to_string_pretty(&scenario)?);
    Ok(())
}
