//! What a guest's standing still is made of: one line of the log, by which an operator sees where the
//! milliseconds went. Nothing is decided by it.

use std::fmt;
use std::time::{Duration, Instant};

use crate::clock;

/// Steps that follow each other, and how long each took.
#[derive(Debug, Default)]
pub struct Laps {
    last: Option<Instant>,
    laps: Vec<(&'static str, Duration)>,
}

impl Laps {
    /// Begins, in the place of whatever was measured before.
    pub fn begin(&mut self) {
        *self = Self { last: Some(clock::now()), laps: Vec::new() };
    }

    /// A step has ended; nothing before the beginning.
    pub fn lap(&mut self, step: &'static str) {
        if let Some(last) = &mut self.last {
            let now = clock::now();
            self.laps.push((step, now.saturating_duration_since(*last)));
            *last = now;
        }
    }
}

impl fmt::Display for Laps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (step, took)) in self.laps.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{step} {} ms", took.as_millis())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_follows_the_beginning_is_said() {
        let mut laps = Laps::default();
        laps.lap("too early");
        assert_eq!(laps.to_string(), "");
        laps.begin();
        laps.lap("stream");
        laps.lap("commit");
        let said = laps.to_string();
        assert!(said.starts_with("stream ") && said.contains(" ms, commit "), "{said}");
    }
}
