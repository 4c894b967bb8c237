//! The program inside a guest: one loop that plays the role and proves that the guest is
//! unharmed.
//!
//! Started by the guest image's init. One thread, one `poll`, everything paced, because four
//! such guests share two emulated-on cores. What it says on the serial console is read by
//! `lab/demo` and the tests:
//!
//! ```text
//! LIFEBOAT-READY name=web role=NO boot=0b5e... pages=16384     once
//! LIFEBOAT-TICK 17 ok pages=16384 version=3 errors=0 ...       each second
//! LIFEBOAT-CORRUPT page 5 word 100: found ...                  at once, for each wrong byte
//!
//! With a disk (`lb.disk`), a tick says `disk_writes=.. disk_checks=..` as well; with several, of the one
//! where it is the least.
//! ```

use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::checked::Checked;
use crate::clock::Clock;
use crate::disk::{Counts, Disk, Plan};
use crate::heartbeat::{self, Answer};
use crate::pace::Pace;
use crate::params::{GuestParams, Role};
use crate::pattern::Region;
use crate::ports;
use crate::stream::{FROM_CLIENT, FROM_GUEST};
use crate::sys::{Watch, wait};
use crate::traffic::{Outflow, Sink};

/// The loop's own beat. A heartbeat wakes it earlier, and then due work is done along with it:
/// waking up is what costs an emulated guest most.
const BEAT: Duration = Duration::from_millis(20);
/// How much of a beat goes to pages at most: a small machine falls behind, it does not go silent.
const PAGE_BUDGET: Duration = Duration::from_millis(4);
/// Rounds between two looks at the clock, or reading that would be most of it.
const PIECE: u64 = 16 << 10;
/// How many of them are timed at the start.
const PIECES_TIMED: u64 = 32;
/// What could not be computed in its beat is made up for within this.
const COMPUTE_CATCH_UP: Duration = Duration::from_secs(2);
const BURST: Duration = Duration::from_millis(100);

/// Runs until the machine stops.
pub(crate) fn run(params: GuestParams, boot_id: [u8; 16]) -> io::Result<()> {
    let clock = Clock::start();
    let mut guest = Guest::new(params, boot_id, clock)?;
    guest.say_ready();
    loop {
        wait(&guest.watched(), BEAT)?;
        guest.beat();
    }
}

/// Those that the guest works on.
fn disks(params: &GuestParams, boot_id: [u8; 16]) -> io::Result<Vec<Disk>> {
    if params.disk == 0 {
        return Ok(vec![]);
    }
    let (bytes, block, rate) = (params.disk, params.disk_block, params.disk_rate);
    let (check_percent, trim) = (params.disk_check, params.disk_trim);
    let plan = Plan { bytes, block, rate, check_percent, trim };
    let start = |number: u8| {
        let device = format!("/dev/vd{}", char::from(b'a' + number));
        // Of different seeds: one disk's block in the place of another's is wrong.
        let seed = xxh3_64_with_seed(&boot_id, 1 + u64::from(number));
        Disk::start(Path::new(&device), plan, seed)
    };
    (0..params.disks).map(start).collect()
}

struct Guest {
    params: GuestParams,
    clock: Clock,
    region: Region,
    writing: Pace,
    checking: Pace,
    computing: Pace,
    digest: u64,
    /// How often the digest was taken: what a computing guest has done.
    rounds: u64,
    heartbeat: UdpSocket,
    listener: TcpListener,
    stream: Option<Checked>,
    outflow: Option<Outflow>,
    sink: Option<Sink>,
    disks: Vec<Disk>,
    state: Answer,
    seconds: u64,
}

impl Guest {
    fn new(params: GuestParams, boot_id: [u8; 16], clock: Clock) -> io::Result<Self> {
        // The seed differs per boot: a page of another guest or of an earlier life is wrong too.
        let region = Region::new(params.region, xxh3_64_with_seed(&boot_id, 0));
        let now = clock.now();
        let heartbeat = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ports::HEARTBEAT))?;
        heartbeat.set_nonblocking(true)?;
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, ports::STREAM))?;
        listener.set_nonblocking(true)?;
        let outflow = match (params.role, params.client) {
            (Role::No, Some(client)) => {
                Some(Outflow::new(client, params.transport, (params.rate, params.mtu), now)?)
            }
            _ => None,
        };
        let sink = if params.role == Role::Ni { Some(Sink::new()?) } else { None };
        let disks = disks(&params, boot_id)?;
        let percent = if params.role == Role::C { params.cpu } else { 0 };
        let mut own = Self {
            writing: Pace::new(params.dirty, BURST, 1, now),
            checking: Pace::new(params.check, BURST, 1, now),
            computing: Pace::new(0, COMPUTE_CATCH_UP, PIECE, now),
            digest: 0,
            rounds: 0,
            state: Answer { boot_id, ..Answer::default() },
            seconds: 0,
            stream: None,
            params,
            clock,
            region,
            heartbeat,
            listener,
            outflow,
            sink,
            disks,
        };
        if percent > 0 {
            let rounds = own.rounds_for(percent);
            own.computing = Pace::new(rounds, COMPUTE_CATCH_UP, PIECE, own.clock.now());
        }
        Ok(own)
    }

    fn watched(&self) -> Vec<Watch> {
        let fixed = [self.heartbeat.as_raw_fd(), self.listener.as_raw_fd()];
        let fixed = fixed.into_iter().map(|fd| Watch { fd, writable: false });
        let sink = self.sink.as_ref().map(Sink::watch);
        fixed.chain(self.stream.as_ref().map(Checked::watch)).chain(sink).collect()
    }

    /// Reads the clock once: the guests' clock source is emulated hardware too.
    fn beat(&mut self) {
        let now = self.clock.now();
        self.answer_heartbeats();
        self.serve_stream(now);
        self.work_on_pages(now);
        self.move_traffic(now);
        self.compute(now);
        self.each_second(now);
    }

    fn answer_heartbeats(&mut self) {
        let mut buffer = [0; heartbeat::QUESTION_BYTES + 1];
        while let Ok((count, from)) = self.heartbeat.recv_from(&mut buffer) {
            let Some(sequence) = heartbeat::read_question(&buffer[..count]) else { continue };
            self.state.sequence = sequence;
            self.state.tick += 1;
            self.state.writes = self.region.writes();
            self.state.checked = self.region.checked();
            // A full send buffer loses the answer, as the network might: the client counts it.
            let _ = self.heartbeat.send_to(&heartbeat::answer(&self.state), from);
        }
    }

    fn serve_stream(&mut self, now: Duration) {
        while let Ok((socket, _)) = self.listener.accept() {
            if socket.set_nonblocking(true).is_ok() {
                let rate = self.params.stream;
                self.stream = Some(Checked::new(socket, FROM_GUEST, FROM_CLIENT, rate, now));
            }
        }
        match self.stream.as_mut().map(|stream| stream.drive(now)) {
            Some(Ok(Some(wrong))) => self.say_corrupt(&wrong),
            Some(Err(_)) => self.stream = None,
            _ => {}
        }
    }

    fn work_on_pages(&mut self, start: Duration) {
        let (writes, checks) = (self.writing.due(start), self.checking.due(start));
        let mut wrote = 0;
        while wrote < writes && self.within(start, wrote) {
            self.region.write_next();
            wrote += 1;
        }
        self.writing.took(wrote);
        let mut checked = 0;
        while checked < checks && self.within(start, checked) {
            if let Err(wrong) = self.region.check_next() {
                self.say_corrupt(&wrong);
            }
            checked += 1;
        }
        self.checking.took(checked);
    }

    fn within(&self, start: Duration, done: u64) -> bool {
        done == 0
            || !done.is_multiple_of(32)
            || self.clock.now().saturating_sub(start) < PAGE_BUDGET
    }

    fn move_traffic(&mut self, now: Duration) {
        if let Some(outflow) = &mut self.outflow {
            outflow.drive(now);
        }
        if let Some(sink) = &mut self.sink {
            sink.drive();
        }
    }

    /// Does the work that is due, until the next beat's time has come.
    fn compute(&mut self, now: Duration) {
        let due = self.computing.due(now) / PIECE;
        let (start, mut done) = (self.clock.now(), 0);
        while done < due && self.clock.now().saturating_sub(start) < BEAT {
            self.compute_piece();
            done += 1;
        }
        self.computing.took(done * PIECE);
    }

    fn compute_piece(&mut self) {
        for _ in 0..PIECE {
            self.digest = xxh3_64_with_seed(&self.digest.to_le_bytes(), self.digest);
        }
        self.rounds += PIECE;
    }

    /// How many rounds a second are `percent` of this CPU: work, not time, for a CPU that others take
    /// away now and then would count their time as its own. The quickest of some pieces counts.
    fn rounds_for(&mut self, percent: u64) -> u64 {
        let mut piece = || {
            let start = self.clock.now();
            self.compute_piece();
            self.clock.now().saturating_sub(start).as_nanos().max(1)
        };
        let quickest = (0..PIECES_TIMED).map(|_| piece()).min().unwrap_or(1);
        let a_second = u128::from(PIECE) * 1_000_000_000 / quickest;
        u64::try_from(a_second).unwrap_or(u64::MAX) / 100 * percent
    }

    fn each_second(&mut self, now: Duration) {
        if now.as_secs() <= self.seconds {
            return;
        }
        self.seconds = now.as_secs();
        if self.params.spoil_after == Some(Duration::from_secs(self.seconds)) {
            self.region.spoil();
        }
        let wrong: Vec<String> = self.disks.iter().flat_map(Disk::wrong).collect();
        wrong.iter().for_each(|wrong| self.say_corrupt(wrong));
        self.say_tick();
    }

    fn say_ready(&self) {
        let boot: String = self.state.boot_id.iter().map(|byte| format!("{byte:02x}")).collect();
        let (name, role) = (&self.params.name, self.params.role);
        println!(
            "LIFEBOAT-READY name={name} role={role} boot={boot} pages={}",
            self.region.pages()
        );
    }

    fn say_tick(&self) {
        let verdict = if self.state.errors == 0 { "ok" } else { "CORRUPT" };
        let least = |count: fn(&Counts) -> &AtomicU64| {
            self.disks.iter().map(|disk| count(&disk.counts).load(Ordering::Relaxed)).min()
        };
        let disk = match (least(|counts| &counts.writes), least(|counts| &counts.checks)) {
            (Some(writes), Some(checks)) => format!(" disk_writes={writes} disk_checks={checks}"),
            _ => String::new(),
        };
        let stream = self.stream.as_ref().map_or((0, 0), |s| (s.sent(), s.received()));
        println!(
            "LIFEBOAT-TICK {} {verdict} pages={} version={} writes={} checked={} errors={} \
             stream_out={} stream_in={} traffic_out={} traffic_in={} rounds={} digest={:x}{disk}",
            self.seconds,
            self.region.pages(),
            self.region.version(),
            self.region.writes(),
            self.region.checked(),
            self.state.errors,
            stream.0,
            stream.1,
            self.outflow.as_ref().map_or(0, Outflow::sent),
            self.sink.as_ref().map_or(0, Sink::received),
            self.rounds,
            self.digest,
        );
    }

    fn say_corrupt(&mut self, wrong: &dyn std::fmt::Display) {
        self.state.errors += 1;
        println!("LIFEBOAT-CORRUPT {wrong}");
    }
}
