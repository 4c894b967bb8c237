//! Who really runs, and when: heard from the QEMUs themselves, not from the agents under test.
//!
//! Each QEMU of the world has a second monitor (a host's profile gives it one) and a serial log. A
//! thread per host holds both open from the moment at which the QEMU appears: RESUME and STOP carry
//! QEMU's own time stamps of one clock, so that two guests which ran at once for a millisecond are
//! found. Used by [`super::World`]. Deliberately not here: any command that changes a guest.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::Host;
use crate::clock;

/// A QEMU is found within this time; its guest is resumed much later.
const LOOK: Duration = Duration::from_millis(5);
/// So many of the lines that a guest said last are told.
const NEWEST: usize = 5;

/// Where a host's QEMU is seen.
#[derive(Debug, Clone)]
pub struct Watched {
    /// Its second monitor.
    pub monitor: PathBuf,
    /// Its guest's serial line.
    pub serial: PathBuf,
}

/// One QEMU, from its appearance to its end.
#[derive(Debug)]
pub struct Life {
    /// Where.
    pub host: Host,
    /// From RESUME to STOP, in microseconds since the epoch; the last one may be open.
    pub ran: Vec<(u64, Option<u64>)>,
    /// Whether it is still there.
    pub lives: bool,
    /// Its process.
    pid: i32,
    serial: Option<File>,
    text: String,
}

impl Life {
    /// All that its guest has said there on its serial line.
    #[must_use]
    pub fn said(&self) -> &str {
        &self.text
    }

    /// What its guest said around its first bad line, if it said one, and its newest lines.
    #[must_use]
    pub fn told(&self) -> Vec<&str> {
        let lines: Vec<_> = self.text.lines().collect();
        let newest = lines.len().saturating_sub(NEWEST);
        let Some(bad) = lines.iter().position(|line| is_bad(line)) else {
            return lines[newest..].to_vec();
        };
        // A kernel says what has happened just before, and where in the forty lines that follow.
        let (from, to) = (bad.saturating_sub(NEWEST), (bad + 40).min(lines.len()));
        lines[from..to].iter().chain(&lines[newest.max(to)..]).copied().collect()
    }

    /// Whether its guest runs now.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.ran.last().is_some_and(|(_, stop)| stop.is_none())
    }

    fn ticks(&self) -> impl Iterator<Item = u64> + '_ {
        let whole = self.text.lines().filter_map(|line| line.strip_prefix("LIFEBOAT-TICK "));
        // The last words of a line may still be on their way, or come out of another QEMU.
        whole.filter_map(|rest| rest.split_once(" ok ")?.0.parse().ok())
    }

    fn resumed(&mut self, at: u64) {
        if !self.runs() {
            self.ran.push((at, None));
        }
    }

    fn stopped(&mut self, at: u64) {
        if let Some((_, stop @ None)) = self.ran.last_mut() {
            *stop = Some(at);
        }
    }
}

/// Everything seen since the guest was booted.
#[derive(Debug, Default)]
pub struct Seen {
    lives: Vec<Life>,
    /// Those before were of an earlier boot of the guest.
    first: usize,
}

impl Seen {
    /// The QEMUs of this boot of the guest, oldest first.
    #[must_use]
    pub fn lives(&self) -> &[Life] {
        self.lives.get(self.first..).unwrap_or_default()
    }

    /// The newest life of this host, if it is that of this process.
    fn same_life(&self, host: Host, pid: i32) -> Option<usize> {
        let newest = self.lives.iter().rposition(|life| life.host == host)?;
        (pid != 0 && self.lives[newest].pid == pid).then_some(newest)
    }

    /// Where the guest runs now: by all that is right, at one host or at none.
    #[must_use]
    pub fn running(&self) -> Vec<Host> {
        self.lives().iter().filter(|life| life.runs()).map(|life| life.host).collect()
    }

    /// The hosts that have a QEMU of the VM, running or not.
    #[must_use]
    pub fn with_qemu(&self) -> Vec<Host> {
        self.lives().iter().filter(|life| life.lives).map(|life| life.host).collect()
    }

    /// The newest second that the guest has counted.
    #[must_use]
    pub fn last_tick(&self) -> Option<u64> {
        self.lives().iter().flat_map(Life::ticks).max()
    }

    /// The newest second that it has counted at one host.
    #[must_use]
    pub fn last_tick_at(&self, host: Host) -> Option<u64> {
        let there = self.lives().iter().filter(|life| life.host == host);
        there.flat_map(Life::ticks).max()
    }

    /// Everything that must never be: two at once, a second counted twice, a wrong byte, a panic,
    /// a second boot. One sentence each.
    #[must_use]
    pub fn offences(&self) -> Vec<String> {
        let mut offences = twice(self.lives());
        let mut ticks: Vec<u64> = self.lives().iter().flat_map(Life::ticks).collect();
        let counted = ticks.len();
        ticks.sort_unstable();
        ticks.dedup();
        if ticks.len() != counted {
            offences.push("the guest counted a second twice: there were two of it".to_owned());
        }
        for life in self.lives() {
            let said = life.text.lines().find(|line| is_bad(line));
            offences.extend(said.map(|line| format!("at host {}: {line}", life.host + 1)));
        }
        let boots = self.lives().iter().map(|life| life.text.matches("LIFEBOAT-READY").count());
        let boots: usize = boots.sum();
        if boots > 1 {
            offences.push(format!("the guest was booted {boots} times"));
        }
        offences
    }
}

/// What no guest may ever say.
fn is_bad(line: &str) -> bool {
    line.contains("CORRUPT") || line.contains("Kernel panic") || line.contains("Oops")
}

fn twice(lives: &[Life]) -> Vec<String> {
    let mut runs: Vec<(Host, (u64, Option<u64>))> = Vec::new();
    for life in lives {
        runs.extend(life.ran.iter().map(|ran| (life.host, *ran)));
    }
    runs.sort_by_key(|(_, (start, _))| *start);
    let pairs = runs.windows(2).filter_map(|pair| {
        let [(one, (_, stop)), (other, (start, _))] = pair else { return None };
        let overlap = stop.is_none_or(|stop| stop > *start);
        overlap.then(|| {
            let for_us =
                stop.map_or_else(|| "on and on".to_owned(), |s| format!("{} us", s - start));
            format!("it ran at hosts {} and {} at once, {for_us}", one + 1, other + 1)
        })
    });
    pairs.collect()
}

/// The witness of a world. Its threads end with the process.
pub struct Witness {
    seen: Arc<Mutex<Seen>>,
}

impl Witness {
    /// Begins to look at all hosts.
    #[must_use]
    pub fn start(hosts: Vec<Watched>) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        for (host, watched) in hosts.into_iter().enumerate() {
            let seen = Arc::clone(&seen);
            thread::spawn(move || watch_host(host, &watched, &seen));
        }
        Self { seen }
    }

    /// What has been seen until now.
    pub fn look(&self) -> MutexGuard<'_, Seen> {
        let mut seen = lock(&self.seen);
        for life in &mut seen.lives {
            read_on(life);
        }
        seen
    }

    /// The guest is about to be booted anew: what was before is no longer its life.
    pub fn forget(&self) {
        let mut seen = lock(&self.seen);
        seen.first = seen.lives.len();
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The file is read to its end also when it has long been removed.
fn read_on(life: &mut Life) {
    let mut new = Vec::new();
    if let Some(serial) = &mut life.serial
        && serial.read_to_end(&mut new).is_ok()
    {
        life.text.push_str(&String::from_utf8_lossy(&new));
    }
}

fn watch_host(host: Host, watched: &Watched, seen: &Mutex<Seen>) {
    loop {
        if let Ok(socket) = UnixStream::connect(&watched.monitor) {
            watch_qemu(host, watched, socket, seen);
        }
        clock::rest(LOOK);
    }
}

/// Whose life it is: a QEMU that ends closes its connections before it stops listening, and then it is the
/// same one that answers once more.
fn life_of(pid: i32, host: Host, watched: &Watched, seen: &Mutex<Seen>) -> usize {
    let known = lock(seen).same_life(host, pid);
    if let Some(number) = known {
        return number;
    }
    let serial = clock::wait_for(Duration::from_secs(1), || File::open(&watched.serial).ok());
    let mut seen = lock(seen);
    let (ran, text) = (vec![], String::new());
    seen.lives.push(Life { host, ran, lives: true, pid, serial, text });
    seen.lives.len() - 1
}

/// One QEMU, to its end.
fn watch_qemu(host: Host, watched: &Watched, mut socket: UnixStream, seen: &Mutex<Seen>) {
    // Where that cannot be told it is another one.
    let peer = rustix::net::sockopt::socket_peercred(&socket);
    let pid = peer.map_or(0, |peer| peer.pid.as_raw_nonzero().get());
    let number = life_of(pid, host, watched, seen);
    let asked = socket.write_all(
        b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"query-status\",\"id\":\"status\"}\n",
    );
    let mut lines = BufReader::new(socket);
    let mut line = Vec::new();
    while asked.is_ok() {
        line.clear();
        match lines.read_until(b'\n', &mut line) {
            Ok(0) => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
            Ok(_) => {
                if let Some(life) = lock(seen).lives.get_mut(number) {
                    note(life, &line);
                }
            }
        }
    }
    if let Some(life) = lock(seen).lives.get_mut(number) {
        life.stopped(unix_us());
        life.lives = false;
    }
}

fn note(life: &mut Life, line: &[u8]) {
    let Ok(message) = serde_json::from_slice::<Value>(line) else { return };
    let stamp = &message["timestamp"];
    let part = |name: &str| stamp[name].as_u64().unwrap_or_default();
    let at = part("seconds") * 1_000_000 + part("microseconds");
    match message["event"].as_str() {
        Some("RESUME") => life.resumed(at),
        Some("STOP") => life.stopped(at),
        Some(_) => {}
        // It was resumed before we came.
        None if message["return"]["running"] == true => life.resumed(unix_us()),
        None => {}
    }
}

fn unix_us() -> u64 {
    u64::try_from(clock::unix_now().as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(host: Host, ran: &[(u64, Option<u64>)], text: &str) -> Life {
        let (ran, text) = (ran.to_vec(), text.to_owned());
        Life { host, ran, lives: true, pid: 0, serial: None, text }
    }

    fn offences(lives: Vec<Life>) -> Vec<String> {
        Seen { lives, first: 0 }.offences()
    }

    #[test]
    fn one_after_the_other_is_right_and_a_microsecond_of_both_is_not() {
        let after = vec![life(0, &[(10, Some(20))], ""), life(1, &[(20, None)], "")];
        assert_eq!(offences(after), Vec::<String>::new());
        let both = vec![life(0, &[(10, Some(21))], ""), life(1, &[(20, None)], "")];
        assert_eq!(offences(both), ["it ran at hosts 1 and 2 at once, 1 us"]);
        let for_ever = vec![life(0, &[(10, None)], ""), life(1, &[(20, Some(30))], "")];
        assert_eq!(offences(for_ever), ["it ran at hosts 1 and 2 at once, on and on"]);
    }

    #[test]
    fn a_qemu_that_answers_again_while_it_ends_is_not_another_one() {
        let of = |host, pid| Life { pid, ..life(host, &[], "") };
        let seen = Seen { lives: vec![of(0, 7), of(1, 8), of(0, 9), of(1, 0)], first: 0 };
        assert_eq!(seen.same_life(0, 9), Some(2));
        assert_eq!(seen.same_life(0, 7), None, "there has been another one since");
        assert_eq!(
            (seen.same_life(1, 8), seen.same_life(1, 0), seen.same_life(2, 9)),
            (None, None, None)
        );
    }

    #[test]
    fn a_second_counted_twice_a_wrong_byte_and_a_second_boot_are_told() {
        let ready = "LIFEBOAT-READY name=vm\n";
        let tick = "LIFEBOAT-TICK 7 ok pages=1\nLIFEBOAT-TICK 8 ok pages=1\n";
        let split = "CK 8 ok pages=1\nLIFEBOAT-TICK 9 ok pages=1\nLIFEBOAT-TIC";
        let well = vec![life(0, &[], &format!("{ready}{tick}")), life(1, &[], split)];
        assert_eq!(offences(well), Vec::<String>::new());
        let again = vec![life(0, &[], tick), life(1, &[], "LIFEBOAT-TICK 8 ok pages=1\n")];
        assert_eq!(offences(again).len(), 1);
        let wrong = "LIFEBOAT-CORRUPT page 5 word 100: found 7\n";
        assert!(offences(vec![life(2, &[], wrong)])[0].starts_with("at host 3: LIFEBOAT-CORRUPT"));
        let booted = vec![life(0, &[], ready), life(1, &[], ready)];
        assert_eq!(offences(booted), ["the guest was booted 2 times"]);
    }
    #[test]
    fn what_a_guest_said_around_its_first_bad_line_is_told_before_the_newest() {
        let counted = |seconds: std::ops::Range<u32>| {
            seconds.map(|second| format!("TICK {second}\n")).collect::<String>()
        };
        let calm = life(0, &[], &counted(0..9));
        assert_eq!(calm.told(), ["TICK 4", "TICK 5", "TICK 6", "TICK 7", "TICK 8"]);
        let oops = life(0, &[], &format!("{}[6.9] Oops: 0010\n{}", counted(0..9), counted(9..99)));
        let told = oops.told();
        assert_eq!(
            told[..7],
            ["TICK 4", "TICK 5", "TICK 6", "TICK 7", "TICK 8", "[6.9] Oops: 0010", "TICK 9"]
        );
        assert_eq!(told.len(), 5 + 40 + 5);
        assert_eq!(told[49], "TICK 98");
    }
}
