//! What `/proc` tells of a process: command line, start, CPU time, mappings, namespaces.
//!
//! Used by `process`, `foreign`, `ram` and `measure/`. The parsers are pure and take whatever
//! the kernel, or a process that names itself oddly, may write: what cannot be read is `None`.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

/// Kernel clock ticks per second in `/proc/PID/stat`; fixed at 100 for user space on Linux.
pub const TICKS_PER_SECOND: u64 = 100;

fn path(pid: u32, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{file}"))
}

/// The parts of `/proc/PID/stat` (proc(5)) that we use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// `R`, `S`, `Z` ...
    pub state: char,
    /// CPU time in user and kernel mode, in ticks.
    pub cpu_ticks: u64,
    /// When it started, in ticks since boot: with the pid, it names a process for good.
    pub start_ticks: u64,
}

/// Reads a `stat` line. The command name may hold anything, brackets and newlines too: the
/// fields begin after the last closing bracket.
#[must_use]
pub fn parse_stat(text: &str) -> Option<Stat> {
    let after = &text[text.rfind(')')? + 1..];
    let fields: Vec<&str> = after.split_ascii_whitespace().collect();
    // `fields[0]` is field 3 of proc(5).
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        cpu_ticks: number(14)?.saturating_add(number(15)?),
        start_ticks: number(22)?,
    })
}

/// [`parse_stat`] of a living process.
#[must_use]
pub fn stat(pid: u32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(path(pid, "stat")).ok()?)
}

/// [`parse_stat`] of one thread.
#[must_use]
pub fn thread_stat(pid: u32, tid: u32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(path(pid, &format!("task/{tid}/stat"))).ok()?)
}

/// The threads of a process.
#[must_use]
pub fn threads(pid: u32) -> Vec<u32> {
    numbers_in(&path(pid, "task"))
}

/// Every process id at this moment.
#[must_use]
pub fn all() -> Vec<u32> {
    numbers_in(&PathBuf::from("/proc"))
}

fn numbers_in(directory: &std::path::Path) -> Vec<u32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Reads a `cmdline`: arguments, each ended by a zero.
#[must_use]
pub fn parse_cmdline(bytes: &[u8]) -> Vec<String> {
    let text = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    if text.is_empty() {
        return vec![];
    }
    text.split(|&b| b == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// The arguments of a living process; empty when it has gone or is a zombie.
#[must_use]
pub fn cmdline(pid: u32) -> Vec<String> {
    parse_cmdline(&fs::read(path(pid, "cmdline")).unwrap_or_default())
}

/// The control groups of a process, as the kernel lists them.
#[must_use]
pub fn cgroup(pid: u32) -> String {
    fs::read_to_string(path(pid, "cgroup")).unwrap_or_default()
}

/// The real user id of a process.
#[must_use]
pub fn uid(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(path(pid, "status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("Uid:"))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Whether a process lives in this process's network namespace. Hosts of a lab share their
/// process ids, not their networks: another host's QEMU is none of ours.
#[must_use]
pub fn shares_our_network(pid: u32) -> bool {
    let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/net"));
    match (of("self"), of(&pid.to_string())) {
        (Ok(ours), Ok(theirs)) => ours == theirs,
        _ => false,
    }
}

/// A mapping of a process's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Its addresses.
    pub range: Range<u64>,
    /// May be read and written.
    pub writable: bool,
    /// The file, or `[heap]` and the like; empty for anonymous memory.
    pub name: String,
}

/// Reads `/proc/PID/maps`; lines that are not understood are left out.
#[must_use]
pub fn parse_maps(text: &str) -> Vec<Mapping> {
    text.lines().filter_map(parse_mapping).collect()
}

fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    let writable = words.next()?.starts_with("rw");
    let name = words.nth(3).unwrap_or_default().to_owned();
    (start < end).then_some(Mapping { range: start..end, writable, name })
}

/// The mappings of a living process.
///
/// # Errors
/// When the process has gone, or is not ours to look into.
pub fn maps(pid: u32) -> io::Result<Vec<Mapping>> {
    Ok(parse_maps(&fs::read_to_string(path(pid, "maps"))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_process_that_names_itself_like_a_stat_line_fools_nobody() {
        let line = "42 (a) R 1 (b) S 1 42 42 0 -1 4194560 1 2 3 4 70 30 0 0 20 0 3 0 9001 1 2";
        let stat = parse_stat(line).unwrap();
        assert_eq!(stat, Stat { state: 'S', cpu_ticks: 100, start_ticks: 9001 });
    }

    #[test]
    fn our_own_process_can_be_read() {
        let pid = std::process::id();
        assert!(stat(pid).unwrap().start_ticks > 0);
        assert!(!cmdline(pid).is_empty());
        assert!(threads(pid).contains(&pid));
        assert!(shares_our_network(pid));
        assert!(maps(pid).unwrap().iter().any(|m| m.name == "[stack]" && m.writable));
        assert_eq!(uid(pid), Some(rustix::process::getuid().as_raw()));
    }

    #[test]
    fn an_empty_argument_is_an_argument() {
        assert_eq!(parse_cmdline(b"a\0\0b\0"), ["a", "", "b"]);
        assert!(parse_cmdline(b"").is_empty());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = (parse_stat(&text), parse_maps(&text), parse_cmdline(text.as_bytes()));
        }
    }
}
