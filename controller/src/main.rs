//! The binary `lifeboat`: the controller (`lifeboat controller`) and the operator's commands.
//!
//! Thin over the library: parses, runs, and turns the outcome into an exit code. What the codes
//! mean is in `cli`.

use std::process::ExitCode;

use clap::Parser;
use lifeboat_controller::cli::{self, Cli};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { cli::USAGE } else { 0 };
            // Nothing can be said about an output that is closed.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    match run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("lifeboat: {error:#}");
            ExitCode::from(cli::ERROR)
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let code = runtime.block_on(cli::run(cli));
    // A prompt may still wait for a line that nobody will type.
    runtime.shutdown_background();
    Ok(code?)
}
