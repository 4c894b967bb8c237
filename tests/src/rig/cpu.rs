//! CPU seconds of processes over a time in which some of them end.
//!
//! Used by the experiments. A process that has gone says nothing any more, so a thread looks every
//! 20 ms and keeps the last reading.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use lifeboat_agent::qemu::procfs::{self, TICKS_PER_SECOND};

use crate::clock;

const LOOK: Duration = Duration::from_millis(20);

type Readings = Arc<Mutex<BTreeMap<u32, (u64, u64)>>>;

/// A measurement that is under way.
#[derive(Debug)]
pub struct CpuMeter {
    readings: Readings,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl CpuMeter {
    /// Begins to watch these processes.
    #[must_use]
    pub fn start(pids: &[u32]) -> Self {
        let readings: Readings = Arc::default();
        let over = Arc::new(AtomicBool::new(false));
        let (pids, to, until) = (pids.to_vec(), Arc::clone(&readings), Arc::clone(&over));
        read(&pids, &readings);
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                clock::rest(LOOK);
                read(&pids, &to);
            }
        });
        Self { readings, over, thread: Some(thread) }
    }

    /// Ends, and gives each process's CPU seconds since the start.
    #[must_use]
    pub fn finish(mut self) -> BTreeMap<u32, f64> {
        self.stop();
        let readings = self.readings.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = |(first, last): &(u64, u64)| (last - first) as f64 / TICKS_PER_SECOND as f64;
        readings.iter().map(|(pid, reading)| (*pid, seconds(reading))).collect()
    }

    fn stop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has no way to fail.
            let _ = thread.join();
        }
    }
}

impl Drop for CpuMeter {
    fn drop(&mut self) {
        self.stop();
    }
}

fn read(pids: &[u32], readings: &Readings) {
    let mut readings = readings.lock().unwrap_or_else(PoisonError::into_inner);
    for pid in pids {
        if let Some(stat) = procfs::stat(*pid) {
            let reading = readings.entry(*pid).or_insert((stat.cpu_ticks, stat.cpu_ticks));
            reading.1 = reading.1.max(stat.cpu_ticks);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_used_is_seen_and_one_that_is_not_there_is_left_out() {
        let own = std::process::id();
        let meter = CpuMeter::start(&[own, u32::MAX]);
        let begin = clock::now();
        while clock::now().duration_since(begin) < Duration::from_millis(80) {
            std::hint::spin_loop();
        }
        let used = meter.finish();
        assert!(used.get(&own).is_some_and(|seconds| *seconds > 0.0), "{used:?}");
        assert_eq!(used.len(), 1);
    }
}
