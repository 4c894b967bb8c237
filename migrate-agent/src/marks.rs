//! Named points in the hand-over at which a test may kill or hold this agent.
//!
//! The hand-over's promise is about crashes between any two of its steps; a test that kills "at
//! about the right time" proves little. So each step passes a mark, and two environment variables
//! act on it, read once at the start:
//!
//! * `LIFEBOAT_DIE_AT=MARK`: the process kills itself there, as `kill -9` would;
//! * `LIFEBOAT_HOLD_AT=MARK`: it stays there while the file `LIFEBOAT_HOLD_FILE` exists (the test
//!   makes the file, sees the mark in the log, does its harm elsewhere, removes the file).
//!
//! Without them a mark is one comparison. The marks are `source/before/ACTION`,
//! `source/after/ACTION`, and the same for `destination/`; the actions are those of
//! `handover::{source,destination}::Action`.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

struct Orders {
    die_at: Option<String>,
    hold_at: Option<String>,
    hold_file: Option<PathBuf>,
}

fn orders() -> &'static Orders {
    static ORDERS: OnceLock<Orders> = OnceLock::new();
    ORDERS.get_or_init(|| Orders {
        die_at: std::env::var("LIFEBOAT_DIE_AT").ok(),
        hold_at: std::env::var("LIFEBOAT_HOLD_AT").ok(),
        hold_file: std::env::var_os("LIFEBOAT_HOLD_FILE").map(PathBuf::from),
    })
}

/// Passes the mark `side/when/action`.
pub async fn pass(side: &str, when: &str, action: &str) {
    let orders = orders();
    if orders.die_at.is_none() && orders.hold_at.is_none() {
        return;
    }
    let mark = format!("{side}/{when}/{action}");
    if orders.die_at.as_ref() == Some(&mark) {
        tracing::warn!(mark, "dying here, as ordered");
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
    if orders.hold_at.as_ref() == Some(&mark)
        && let Some(file) = &orders.hold_file
        && file.exists()
    {
        tracing::warn!(mark, "holding here, as ordered");
        while file.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tracing::warn!(mark, "going on");
    }
}
