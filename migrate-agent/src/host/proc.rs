//! What the kernel's text files say about this host. Pure parsers; `host` reads the files.
//!
//! Formats: proc(5). What a newer kernel adds is passed over.

use std::collections::BTreeSet;

use super::HostError;

pub(super) const CPU_INFO: &str = "/proc/cpuinfo";
pub(super) const STAT: &str = "/proc/stat";
pub(super) const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What every CPU of the host can do, sorted. Only what all have: a guest may run on any of them.
/// Empty where the kernel does not say.
#[must_use]
pub fn cpu_flags(cpu_info: &str) -> Vec<String> {
    let flags = cpu_info.lines().filter_map(|line| {
        let (key, value) = line.split_once(':')?;
        // x86 and Arm.
        matches!(key.trim(), "flags" | "Features").then_some(value)
    });
    let sets = flags.map(|value| value.split_ascii_whitespace().collect::<BTreeSet<&str>>());
    let common = sets.reduce(|common, flags| common.intersection(&flags).copied().collect());
    common.unwrap_or_default().into_iter().map(str::to_owned).collect()
}

/// What the CPUs have done since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuTimes {
    /// Clock ticks, over all CPUs, in which they did something, or were kept from it by a
    /// hypervisor underneath.
    pub busy: u64,
    /// Clock ticks in which they waited, or did what yields to everybody else (nice).
    pub idle: u64,
    /// CPUs that are on line.
    pub cores: u32,
}

/// Reads `/proc/stat`.
///
/// # Errors
/// When it is not of that form.
pub fn cpu_times(stat: &str) -> Result<CpuTimes, HostError> {
    let error = || HostError::Form { path: STAT, wanted: "the times of the CPUs" };
    let cpus = || stat.lines().filter(|line| line.starts_with("cpu"));
    let sum = cpus().find_map(|line| line.strip_prefix("cpu ")).ok_or_else(error)?;
    // user nice system idle iowait irq softirq steal, then guest times that user holds already
    let ticks: Option<Vec<u64>> =
        sum.split_ascii_whitespace().take(8).map(|tick| tick.parse().ok()).collect();
    let ticks = ticks.filter(|ticks| ticks.len() >= 4).ok_or_else(error)?;
    let waits = |index| matches!(index, 1 | 3 | 4);
    let (mut busy, mut idle) = (0_u64, 0_u64);
    for (index, &tick) in ticks.iter().enumerate() {
        let sum = if waits(index) { &mut idle } else { &mut busy };
        *sum = sum.saturating_add(tick);
    }
    let cores = cpus().filter(|line| !line.starts_with("cpu ")).count();
    Ok(CpuTimes { busy, idle, cores: u32::try_from(cores).map_err(|_| error())? })
}

/// How many CPUs were in use between two readings; 0 where no tick has passed.
#[must_use]
pub fn cores_in_use(before: CpuTimes, after: CpuTimes) -> f64 {
    // The kernel's counters of waiting can go back a little: then nothing was waited.
    let busy = after.busy.saturating_sub(before.busy) as f64;
    let idle = after.idle.saturating_sub(before.idle) as f64;
    let share = if busy + idle > 0.0 { busy / (busy + idle) } else { 0.0 };
    share * f64::from(after.cores)
}

/// The id of this boot, a UUID.
///
/// # Errors
/// When it is not of that form.
pub fn boot_id(text: &str) -> Result<String, HostError> {
    let id = text.trim();
    let uuid = id.len() == 36 && id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    let error = HostError::Form { path: BOOT_ID, wanted: "a boot id" };
    if uuid { Ok(id.to_owned()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_flags_that_all_cpus_have_count() {
        let text = "processor\t: 0\nflags\t\t: fpu sse2 avx\nvmx flags\t: ept\nbugs\t\t: x\n\n\
                    processor\t: 1\nflags\t\t: sse2 fpu\n";
        assert_eq!(cpu_flags(text), ["fpu", "sse2"]);
        assert_eq!(cpu_flags("Features\t: fp asimd\n"), ["asimd", "fp"]);
        assert!(cpu_flags("processor\t: 0\n").is_empty());
    }

    #[test]
    fn the_load_is_what_was_not_waited() {
        let before =
            cpu_times("cpu  100 9 50 791 50 0 0 0 70 0\ncpu0 1\ncpu1 1\nintr 5\n").unwrap();
        assert_eq!(before, CpuTimes { busy: 150, idle: 850, cores: 2 });
        // 60 user and 15 stolen of 100 ticks; 11 niced ones are there for whoever wants them.
        let after =
            cpu_times("cpu  160 20 50 800 55 0 0 15 70 0\ncpu0 1\ncpu1 1\nintr 5\n").unwrap();
        assert!((cores_in_use(before, after) - 1.5).abs() < 1e-9);
        assert!(cores_in_use(after, after).abs() < 1e-9);
        let back = CpuTimes { idle: before.idle - 1, busy: before.busy + 10, ..before };
        assert!((cores_in_use(before, back) - 2.0).abs() < 1e-9);
    }

    #[test]
    fn what_is_no_such_file_is_refused_without_panic() {
        for text in ["", "cpu", "cpu  1 2 3", "cpu  1 2 x 4", "cpu  -1 2 3 4", "cpu0 1 2 3 4"] {
            assert!(cpu_times(text).is_err(), "{text}");
        }
        let most = u64::MAX;
        let times = cpu_times(&format!("cpu  {most} {most} 0 {most} {most}")).unwrap();
        assert_eq!((times.busy, times.idle, times.cores), (most, most, 0));
    }

    #[test]
    fn a_boot_id_is_a_uuid() {
        let id = "0f5bd8a8-7d3e-4a4c-9b7c-2d5d0f8a1e11";
        assert_eq!(boot_id(&format!("{id}\n")).unwrap(), id);
        for text in ["", "abc", &format!("{id}0"), &id.replace('a', "ä")] {
            assert!(boot_id(text).is_err(), "{text}");
        }
    }
}
