//! The disk limit: how fast a VM may change its disks (MigrateFS section 3.2, "Set Disk Limit").
//!
//! `server` sends every change through it on its way to the hook. First come, first served, so
//! nobody starves; reads and flushes pass by. Settable at any time; taking the limit away lets go at
//! once whatever waits.
//!
//! A VM with images in several directories has a server for each and one limit for all of them
//! ([`DiskLimit`] can be shared): it holds whatever directory the guest writes to.
//!
//! QMP `stop` waits for every request. So before a guest is paused nothing may be held for long
//! ([`Limit::hold_at_most`]): one that writes a little at a time keeps its rate, and one with many
//! writes at once is let go. Without a limit at all it would take the link from the memory that the
//! pause waits for.
//!
//! While changes go over a link at once it also keeps them within what the link takes
//! ([`DiskLimit::keep_within`]).
//!
//! Deliberately not here: which rate is right (policy), and when changes go over a link (`sync::within`).

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lifeboat_policy::pace::{Pacer, writes_in_step};
use lifeboat_protocol::units::{Bytes, BytesPerSec};

use super::later::Later;
use super::request::{Op, Request};
use crate::clock;

/// Below this a guest would stand still: one 4 KiB write in a quarter of a second.
pub const SLOWEST: BytesPerSec = BytesPerSec(16 << 10);

/// What may be made up for at once after a disk, or the CPU, has stood still: several times as long as
/// that usually lasts, and short for a guest. A pacer's own burst lost 1 to 8 % of 200 MB/s.
const BURST: Duration = Duration::from_millis(25);

/// A discard or a resize changes much and moves little.
const COST_WITHOUT_DATA: Bytes = Bytes(4096);
/// Threads that let go what was held back, and do it.
const THREADS: usize = 2;

/// What holds changes down.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Rates {
    /// What the VM may change.
    disk: Option<BytesPerSec>,
    /// What the link takes over which every change goes at once.
    network: Option<BytesPerSec>,
}

impl Rates {
    fn in_force(self) -> Option<BytesPerSec> {
        let rate = match self.network {
            Some(network) => Some(writes_in_step(network, self.disk)),
            None => self.disk,
        };
        rate.map(|rate| rate.max(SLOWEST))
    }
}

struct Waiting {
    rates: Rates,
    pacer: Option<Pacer>,
    /// Nothing waits longer than this.
    longest: Option<Duration>,
    /// With when they came.
    queue: VecDeque<(Duration, Request)>,
    /// When the first in the queue may go; it has been granted.
    first_due: Option<Duration>,
    /// Somebody comes for it then.
    awaited: bool,
}

impl Waiting {
    fn take_first(&mut self) -> Option<Request> {
        (self.first_due, self.awaited) = (None, false);
        self.queue.pop_front().map(|(_, request)| request)
    }
}

/// The limit of one server, or of several together. A handle that can be cloned.
#[derive(Clone)]
pub struct DiskLimit(Arc<Limit>);

impl DiskLimit {
    /// No limit yet.
    ///
    /// # Errors
    /// When the system has no more threads.
    pub fn start() -> io::Result<Self> {
        Ok(Self(Arc::new(Limit::new(Later::start(THREADS)?))))
    }

    /// How fast images may be changed, together, at least [`SLOWEST`]; `None` for no limit (MigrateFS Table 1,
    /// "Set Disk Limit").
    pub fn set(&self, rate: Option<BytesPerSec>) {
        self.change(|rates| rates.disk = rate);
    }

    /// Whatever [`DiskLimit::set`] says, changes are no more than a migration can bear that may send `network`:
    /// each goes over its link at once. `None`: none does, or nothing limits it.
    pub fn keep_within(&self, network: Option<BytesPerSec>) {
        self.change(|rates| rates.network = network);
    }

    fn change(&self, change: impl FnOnce(&mut Rates)) {
        self.0.change(change).into_iter().for_each(Request::hand_on);
        self.pump();
    }

    /// Nothing is held back longer than `longest`, for as long as this holds: QEMU is about to pause its guest,
    /// which waits for every request. `None`: as long as the rate takes.
    pub fn hold_at_most(&self, longest: Option<Duration>) {
        self.0.hold_at_most(longest);
        self.pump();
    }

    /// The limit in force.
    #[must_use]
    pub fn rate(&self) -> Option<BytesPerSec> {
        self.0.rate()
    }

    /// Hands `request` to its hook, now or when it may go.
    pub(super) fn admit(&self, request: Request) {
        match self.0.admit(request) {
            Some(request) => request.hand_on(),
            None => self.pump(),
        }
    }

    /// Hands on whatever it lets go now.
    fn pump(&self) {
        loop {
            let own = self.clone();
            match self.0.next(move || own.pump()) {
                Some(request) => request.hand_on(),
                None => return,
            }
        }
    }
}

struct Limit {
    origin: Instant,
    later: Later,
    waiting: Mutex<Waiting>,
}

impl Drop for Limit {
    fn drop(&mut self) {
        self.later.end();
    }
}

impl Limit {
    fn new(later: Later) -> Self {
        let (queue, awaited) = Default::default();
        let rates = Rates::default();
        let waiting =
            Waiting { rates, pacer: None, longest: None, queue, first_due: None, awaited };
        Self { origin: clock::now(), later, waiting: Mutex::new(waiting) }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn elapsed(&self) -> Duration {
        clock::now().saturating_duration_since(self.origin)
    }

    /// Changes the rate at which changes pass, at least [`SLOWEST`]. Returns what may go at once, to be handed on.
    fn change(&self, change: impl FnOnce(&mut Rates)) -> Vec<Request> {
        let now = self.elapsed();
        let mut waiting = self.waiting();
        let before = waiting.rates.in_force();
        change(&mut waiting.rates);
        let rate = waiting.rates.in_force();
        if rate == before {
            return Vec::new();
        }
        match (rate, &mut waiting.pacer) {
            (Some(rate), Some(pacer)) => pacer.set_rate(now, rate),
            (Some(rate), none) => *none = Some(Pacer::bursting(rate, BURST)),
            (None, pacer) => *pacer = None,
        }
        if waiting.pacer.is_none() {
            (waiting.first_due, waiting.awaited) = (None, false);
            let all = std::mem::take(&mut waiting.queue);
            return all.into_iter().map(|(_, request)| request).collect();
        }
        // Granted at the old rate: it goes now, and what it owes is paid at the new one.
        let first = waiting.first_due.and_then(|_| waiting.take_first());
        first.into_iter().collect()
    }

    /// From now on nothing waits longer than `longest`, whatever the rate; `pump` must follow. `None`: as long
    /// as the rate takes, and what went too early is forgotten.
    fn hold_at_most(&self, longest: Option<Duration>) {
        let mut waiting = self.waiting();
        if waiting.longest.is_some() && longest.is_none() {
            let rate = waiting.pacer.as_ref().map(Pacer::rate);
            waiting.pacer = rate.map(|rate| Pacer::bursting(rate, BURST));
        }
        (waiting.longest, waiting.awaited) = (longest, false);
    }

    fn rate(&self) -> Option<BytesPerSec> {
        self.waiting().pacer.as_ref().map(Pacer::rate)
    }

    /// `Some` when `request` may go now; else it waits its turn and `pump` must follow.
    fn admit(&self, request: Request) -> Option<Request> {
        if request.op().changes().is_none() {
            return Some(request);
        }
        let now = self.elapsed();
        let mut waiting = self.waiting();
        if waiting.pacer.is_none() && waiting.queue.is_empty() {
            return Some(request);
        }
        waiting.queue.push_back((now, request));
        None
    }

    /// Takes out the next that may go. While one has to wait, `again` is called when its time comes.
    fn next(&self, again: impl FnOnce() + Send + 'static) -> Option<Request> {
        let now = self.elapsed();
        let mut waiting = self.waiting();
        let (came, cost) = waiting.queue.front().map(|(came, first)| (*came, cost(&first.op())))?;
        let due = match (waiting.first_due, &mut waiting.pacer) {
            (Some(due), _) => due,
            (None, Some(pacer)) => pacer.ready_at(now, cost)?,
            (None, None) => now,
        };
        let due = waiting.longest.map_or(due, |longest| due.min(came + longest));
        if due <= now {
            return waiting.take_first();
        }
        waiting.first_due = Some(due);
        let awaited = std::mem::replace(&mut waiting.awaited, true);
        drop(waiting);
        if !awaited {
            self.later.at(self.origin + due, again);
        }
        None
    }
}

fn cost(op: &Op) -> Bytes {
    match *op {
        Op::Write { length, .. } => Bytes(length),
        _ => COST_WITHOUT_DATA,
    }
}
