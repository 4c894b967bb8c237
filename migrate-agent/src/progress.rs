//! A migration's progress, written by the side that runs it and watched by whoever asks.
//!
//! One [`Progress`] per side of a migration. Phases are timed here, in one place: entering a
//! phase ends the one before it.

use std::time::Instant;

use lifeboat_protocol::agent::{MigrationProgress, Phase, PhaseTime};
use tokio::sync::watch;

use crate::clock;

/// The writing end.
pub struct Progress {
    to: watch::Sender<MigrationProgress>,
    began: Instant,
    entered: Instant,
}

impl Progress {
    /// A migration that begins now, in `Setup`.
    #[must_use]
    pub fn new(mut first: MigrationProgress) -> (Self, watch::Receiver<MigrationProgress>) {
        first.set_phase(Phase::Setup);
        let (to, watching) = watch::channel(first);
        let now = clock::now();
        (Self { to, began: now, entered: now }, watching)
    }

    /// Enters a phase and books the time of the one before.
    pub fn enter(&mut self, phase: Phase) {
        let now = clock::now();
        let micros = u64::try_from((now - self.entered).as_micros()).unwrap_or(u64::MAX);
        self.entered = now;
        let elapsed_ms = self.elapsed_ms();
        self.to.send_modify(|progress| {
            let phase_before = progress.phase;
            progress.phase_times.push(PhaseTime { phase: phase_before, micros });
            progress.set_phase(phase);
            progress.elapsed_ms = elapsed_ms;
        });
        let now_in = phase.words();
        tracing::info!(phase = now_in, after_us = micros, "phase");
    }

    /// Changes figures; the elapsed time is kept up with them.
    pub fn update(&mut self, change: impl FnOnce(&mut MigrationProgress)) {
        let elapsed_ms = self.elapsed_ms();
        self.to.send_modify(|progress| {
            progress.elapsed_ms = elapsed_ms;
            change(progress);
        });
    }

    /// Milliseconds since the migration began.
    #[must_use]
    pub fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// What watchers see now.
    #[must_use]
    pub fn now(&self) -> MigrationProgress {
        self.to.borrow().clone()
    }
}

/// A rate in bit/s from a counter of bytes that is read now and then.
#[derive(Debug, Default)]
pub struct RateMeter {
    last: Option<(Instant, u64)>,
    bits_per_sec: u64,
}

impl RateMeter {
    /// Takes a reading; gives the rate over the time since the one before, smoothed by half so
    /// that a reading between two bursts does not show a stop.
    pub fn read(&mut self, now: Instant, bytes: u64) -> u64 {
        if let Some((then, before)) = self.last {
            let seconds = now.duration_since(then).as_secs_f64();
            if seconds < 0.05 {
                return self.bits_per_sec;
            }
            let rate = bytes.saturating_sub(before) as f64 * 8.0 / seconds;
            let smoothed =
                if self.bits_per_sec == 0 { rate } else { (rate + self.bits_per_sec as f64) / 2.0 };
            self.bits_per_sec = smoothed as u64;
        }
        self.last = Some((now, bytes));
        self.bits_per_sec
    }
}
