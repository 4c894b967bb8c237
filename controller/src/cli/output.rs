//! Tables, JSON, and figures as people read them. Pure but for the printing itself.

use std::io::Write;
use std::time::Duration;

use lifeboat_protocol::units::{BitsPerSec, Bytes};
use serde::Serialize;

use super::CliError;

/// Prints text; a closed pipe (`| head`) is an error like any other.
pub(super) fn print(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(CliError::Output)
}

/// Prints a reply as JSON.
pub(super) fn print_json<T: Serialize>(reply: &T) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(reply).map_err(CliError::Json)?;
    print(&format!("{text}\n"))
}

/// A table with aligned columns; the last column is not padded. Control characters of a peer's words
/// are not printed.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(|&title| title.to_owned()).collect();
    let all: Vec<Vec<String>> = std::iter::once(&head)
        .chain(rows)
        .map(|row| row.iter().map(|cell| clean(cell)).collect())
        .collect();
    let columns = head.len();
    let width = |column: usize| {
        let cells = all.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in &all {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// One line without control characters.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Milliseconds as `840 ms`, `12.3 s`, `4 min 05 s`.
pub(super) fn time(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", Duration::from_millis(ms).as_secs_f64()),
        _ => format!("{} min {:02} s", ms / 60_000, ms / 1_000 % 60),
    }
}

/// A time to go; `?` while it is not known.
pub(super) fn to_go(ms: u64, known: bool) -> String {
    if known { time(ms) } else { "?".to_owned() }
}

/// A size.
pub(super) fn size(bytes: u64) -> String {
    Bytes(bytes).to_string()
}

/// A rate.
pub(super) fn rate(bits: u64) -> String {
    BitsPerSec(bits).to_string()
}

/// A yes or a no in a table.
pub(super) fn yes(is: bool) -> String {
    if is { "yes" } else { "no" }.to_owned()
}
