//! What a guest wrote and when, by its own count, and the figures that come of it.
//!
//! The count is in the guest's memory and moves with it; it is said each second on the serial line, of
//! which both hosts keep a log.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lifeboat_lab::experiment::Sample;

use super::hosts::BLOCK;
use crate::clock;
use crate::rig::RigError;

/// Figures of a migration: the guest's mean rate while the disk's first pass went on, and the least in
/// any [`STRETCH`] before the pause, MB/s.
pub(super) const BULK: &str = "written_in_bulk_mb_per_sec";
pub(super) const LEAST: &str = "written_in_slowest_stretch_mb_per_sec";
/// Figures of a trace: seconds since the order, and MB/s since the count before.
pub(super) const AT: &str = "at_seconds";
pub(super) const RATE: &str = "mb_per_sec";

/// A guest says its count each second of its own clock, which drifts under load.
const STRETCH: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(20);

/// The trace's name.
pub(super) fn trace_of(case: &str) -> String {
    format!("{case}: each second")
}

/// A count, and when it was heard.
#[derive(Debug, Clone, Copy)]
struct Said {
    at: Instant,
    writes: u64,
}

/// Hears a guest out.
pub(super) struct Ear {
    heard: Arc<Mutex<Vec<Said>>>,
    over: Arc<AtomicBool>,
    logs: Vec<PathBuf>,
    thread: Option<JoinHandle<()>>,
}

impl Ear {
    /// Listens to these logs; one that is not there yet says nothing.
    pub(super) fn at(logs: Vec<PathBuf>) -> Self {
        let (heard, over): (Arc<Mutex<Vec<Said>>>, Arc<AtomicBool>) = Default::default();
        let (to, until, of) = (Arc::clone(&heard), Arc::clone(&over), logs.clone());
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                listen(&of, &to);
                clock::rest(LOOK);
            }
        });
        Self { heard, over, logs, thread: Some(thread) }
    }

    fn heard(&self) -> Vec<Said> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the guest has filled its image and goes on writing.
    pub(super) async fn filled(&self, image: u64, within: Duration) -> Result<(), RigError> {
        let deadline = clock::now() + within;
        loop {
            let heard = self.heard();
            let filled = heard.iter().position(|said| said.writes > image / BLOCK);
            if filled.is_some_and(|first| heard.len() >= first + 3) {
                return Ok(());
            }
            if clock::now() > deadline {
                let what = format!("a guest that writes ({heard:?})");
                return Err(RigError::TooLate { what, seconds: within.as_secs() });
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Wrong bytes that the guest has ever reported.
    fn wrong(&self) -> f64 {
        let text = |log: &PathBuf| {
            String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned()
        };
        self.logs.iter().map(|log| text(log).matches("LIFEBOAT-CORRUPT").count()).sum::<usize>()
            as f64
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has no way to fail.
            let _ = thread.join();
        }
    }
}

fn listen(logs: &[PathBuf], to: &Mutex<Vec<Said>>) {
    let newest = logs.iter().filter_map(|log| {
        let text = fs::read(log).ok()?;
        // A tick is at most some hundred bytes.
        let end = String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).into_owned();
        let whole = end.lines().filter(|line| line.starts_with("LIFEBOAT-TICK"));
        let count = |line: &str| {
            // Behind it comes another word, so it is not cut off.
            line.split_once(" disk_checks=")?;
            line.split_whitespace().find_map(|word| word.strip_prefix("disk_writes=")?.parse().ok())
        };
        whole.filter_map(count).max()
    });
    if let Some(writes) = newest.max() {
        let mut heard = to.lock().unwrap_or_else(PoisonError::into_inner);
        if heard.last().is_none_or(|last| last.writes < writes) {
            heard.push(Said { at: clock::now(), writes });
        }
    }
}

/// A migration that is over, or a bulk phase.
pub(super) struct Moved {
    pub(super) ear: Ear,
    pub(super) began: Instant,
    /// The disk has been sent once.
    pub(super) bulk_over: Instant,
    /// The guest was paused; the end of the bulk phase where nothing else was measured.
    pub(super) paused: Instant,
    pub(super) figures: BTreeMap<&'static str, f64>,
}

impl Moved {
    pub(super) fn samples(mut self, case: &str, run: usize) -> Vec<Sample> {
        let heard = self.ear.heard();
        let mut samples = Vec::new();
        for pair in heard.windows(2).filter(|pair| pair[0].at >= self.began) {
            let rate = rate(&pair[0], &pair[1]);
            let at = pair[1].at.duration_since(self.began).as_secs_f64();
            let figures = BTreeMap::from([(AT, at), (RATE, rate)]);
            samples.push(Sample { case: trace_of(case), run, figures });
        }
        self.figures.insert(BULK, between(&heard, self.began, self.bulk_over));
        self.figures.insert(LEAST, least(&heard, self.began, self.paused));
        self.figures.insert("bulk_seconds", (self.bulk_over - self.began).as_secs_f64());
        self.figures.insert("wrong_bytes_reported", self.ear.wrong());
        samples.push(Sample { case: case.to_owned(), run, figures: self.figures });
        samples
    }
}

/// MB/s from one count to another.
fn rate(one: &Said, other: &Said) -> f64 {
    let bytes = ((other.writes - one.writes) * BLOCK) as f64;
    bytes / other.at.duration_since(one.at).as_secs_f64() / 1e6
}

/// MB/s between two moments, by the counts nearest to them.
fn between(heard: &[Said], from: Instant, until: Instant) -> f64 {
    let first = heard.iter().find(|said| said.at >= from);
    let last = heard.iter().rev().find(|said| said.at <= until);
    match (first, last) {
        (Some(first), Some(last)) if last.at > first.at => rate(first, last),
        // Too few counts: what came around it.
        _ => heard
            .windows(2)
            .filter(|p| p[1].at >= from)
            .map(|p| rate(&p[0], &p[1]))
            .next()
            .unwrap_or(0.0),
    }
}

/// The least MB/s over any stretch between two moments.
fn least(heard: &[Said], from: Instant, until: Instant) -> f64 {
    let within: Vec<&Said> = heard.iter().filter(|s| s.at >= from && s.at <= until).collect();
    let mut least = f64::INFINITY;
    for (number, first) in within.iter().enumerate() {
        if let Some(last) = within[number..].iter().find(|said| said.at - first.at >= STRETCH) {
            least = least.min(rate(first, last));
        }
    }
    // A guest that said nothing at all wrote nothing.
    if least.is_finite() { least } else { 0.0 }
}
