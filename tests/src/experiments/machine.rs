//! What a reader must know of the machine to judge an experiment's figures.
//!
//! Used by every experiment for its record.

use std::fs;
use std::thread;

use lifeboat_lab::experiment::Machine;

use crate::rig::program::{run, words};

/// The machine that this runs on. What cannot be found out is empty or zero.
pub(super) fn machine() -> Machine {
    let cpu_info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Machine {
        cpu: value_of(&cpu_info, "model name").to_owned(),
        cpus: thread::available_parallelism().map_or(0, usize::from),
        memory_bytes: first_number(value_of(&memory, "MemTotal")) << 10,
        kernel: kernel.trim().to_owned(),
        qemu: first_line("qemu-system-x86_64 --version"),
        open_vswitch: first_line("ovs-vswitchd --version"),
        load_percent_before: (load_of(&load) * 100.0) as u64,
    }
}

/// What all CPUs of the machine have done since it was started, in ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CpuTime {
    idle: u64,
    all: u64,
}

impl CpuTime {
    pub(super) fn now() -> Self {
        Self::parse(&fs::read_to_string("/proc/stat").unwrap_or_default())
    }

    /// `cpu  user nice system idle iowait irq softirq steal ...`
    fn parse(text: &str) -> Self {
        let line = text.lines().next().unwrap_or_default();
        let ticks: Vec<u64> =
            line.split_whitespace().skip(1).take(8).filter_map(|word| word.parse().ok()).collect();
        Self { idle: ticks.iter().skip(3).take(2).sum(), all: ticks.iter().sum() }
    }

    /// How much of the machine nobody used in between.
    pub(super) fn idle_percent_since(self, before: Self) -> f64 {
        let (idle, all) =
            (self.idle.saturating_sub(before.idle), self.all.saturating_sub(before.all));
        if all == 0 { 0.0 } else { idle as f64 / all as f64 * 100.0 }
    }
}

fn value_of<'a>(text: &'a str, key: &str) -> &'a str {
    let of_line = |line: &'a str| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim())
    };
    text.lines().find_map(of_line).unwrap_or_default()
}

fn first_number(text: &str) -> u64 {
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or_default()
}

fn load_of(text: &str) -> f64 {
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or_default()
}

fn first_line(command: &str) -> String {
    let said = run(&mut words(command)).unwrap_or_default();
    said.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_s_own_files_are_read_by_their_keys() {
        assert_eq!(
            value_of("model\t: 6\nmodel name\t: A CPU: fast\n", "model name"),
            "A CPU: fast"
        );
        assert_eq!(first_number(value_of("MemTotal:  24 kB\n", "MemTotal")), 24);
        assert_eq!(load_of("1.25 0.50 0.1 2/300 77\n"), 1.25);
        assert_eq!((value_of("", "x"), first_number(""), load_of("")), ("", 0, 0.0));
    }

    #[test]
    fn idle_time_is_that_of_all_cpus_between_two_readings() {
        let before = CpuTime::parse("cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 2 3\n");
        let after = CpuTime::parse("cpu  160 0 60 820 60 0 0 0 9 9\n");
        assert_eq!(before, CpuTime { idle: 850, all: 1000 });
        assert_eq!(after.idle_percent_since(before), 30.0);
        assert_eq!(before.idle_percent_since(before), 0.0);
    }

    #[test]
    fn this_machine_says_something() {
        let machine = machine();
        assert!(machine.cpus > 0 && machine.memory_bytes > 1 << 28, "{machine:?}");
    }
}
