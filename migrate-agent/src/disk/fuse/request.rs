//! One request about an image's content: it is done, and answered, at once or later, from any thread.
//!
//! `serve` makes them and hands them to the [`Hook`], which is how a migration listens in: it decides
//! when a request is done and when it is answered.
//!
//! # Nobody waits for ever
//!
//! A guest's request that is never answered takes the whole VM with it: QMP `stop` waits for it, and
//! QMP is dead from then on. So a hook that keeps a request gives it a deadline, after which the
//! request is answered whatever the hook does ([`Hook::expired`] says how), and a request that is
//! dropped is done and answered.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use rustix::io::{Errno, IoSlice};

use super::abi::{Reply, header_out};
use super::images::Image;
use super::later::Ticket;
use super::memory::{Slot, State};
use super::server::Shared;

/// What is asked about an image's content. Offsets and lengths in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Read.
    Read {
        /// From here.
        offset: u64,
        /// At most so much.
        length: u64,
    },
    /// Write.
    Write {
        /// From here.
        offset: u64,
        /// So much.
        length: u64,
    },
    /// fallocate(2): a discard, zeroes, or space that is set aside.
    Allocate {
        /// Its mode.
        mode: u32,
        /// From here.
        offset: u64,
        /// So much.
        length: u64,
    },
    /// A new length.
    Resize {
        /// The new one.
        length: u64,
    },
    /// Make durable what was answered so far.
    Flush {
        /// Without the attributes.
        data_only: bool,
    },
}

impl Op {
    /// What it changes; a new length changes all beyond it.
    #[must_use]
    pub fn changes(&self) -> Option<Range<u64>> {
        match *self {
            Self::Write { offset, length } | Self::Allocate { offset, length, .. } => {
                Some(offset..offset.saturating_add(length))
            }
            Self::Resize { length } => Some(length..u64::MAX),
            Self::Read { .. } | Self::Flush { .. } => None,
        }
    }
}

/// What becomes of a request whose deadline has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// It is done here, if it is not yet, and answered.
    Answer,
    /// It fails with this.
    Fail(Errno),
}

/// Listens in on every request about an image's content.
pub trait Hook: Send + Sync + 'static {
    /// `request` has arrived. Called by several threads at once; must not wait. Whoever keeps the
    /// request gives it a deadline ([`Request::set_deadline`]).
    fn arrived(&self, request: Request);

    /// The deadline of a kept request has passed. Called once, before it is answered.
    fn expired(&self, image: &Image, op: &Op) -> Expiry;
}

/// Passes everything through.
#[derive(Debug, Clone, Copy, Default)]
pub struct PassThrough;

impl Hook for PassThrough {
    fn arrived(&self, request: Request) {
        request.answer();
    }

    fn expired(&self, _: &Image, _: &Op) -> Expiry {
        Expiry::Answer
    }
}

struct Work {
    /// `None` once it is answered.
    slot: Option<Slot>,
    outcome: Option<Result<u64, Errno>>,
    expiry: Option<Ticket>,
}

struct Held {
    server: Arc<Shared>,
    image: Arc<Image>,
    op: Op,
    direct: bool,
    unique: u64,
    work: Mutex<Work>,
}

/// A request that is not answered yet.
pub struct Request {
    held: Arc<Held>,
}

impl Request {
    pub(super) fn new(
        server: Arc<Shared>,
        image: Arc<Image>,
        (op, direct): (Op, bool),
        (unique, slot): (u64, Slot),
    ) -> Self {
        // A change that the server before this one made, and perhaps answered, is not made again.
        let outcome = match slot.state() {
            State::Done(outcome) => Some(outcome_of(outcome)),
            State::Taken | State::Free => None,
        };
        let work = Mutex::new(Work { slot: Some(slot), outcome, expiry: None });
        Self { held: Arc::new(Held { server, image, op, direct, unique, work }) }
    }

    /// To the hook of its server.
    pub(super) fn hand_on(self) {
        let server = Arc::clone(&self.held.server);
        server.hook.arrived(self);
    }

    /// What is asked.
    #[must_use]
    pub fn op(&self) -> Op {
        self.held.op
    }

    /// The image that it is about.
    #[must_use]
    pub fn image(&self) -> &Arc<Image> {
        &self.held.image
    }

    /// Whether its deadline has answered it.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.held.work().slot.is_none()
    }

    /// A copy of what a write writes; empty for all else, and once the deadline has answered it.
    #[must_use]
    pub fn data(&self) -> Vec<u8> {
        let Op::Write { length, .. } = self.held.op else { return Vec::new() };
        let work = self.held.work();
        let data = work.slot.as_ref().and_then(|slot| slot.data().get(..length as usize));
        data.map(<[u8]>::to_vec).unwrap_or_default()
    }

    /// Does it here, unless it is done, and says how it went: the bytes of a read or write.
    ///
    /// # Errors
    /// As the disk answers.
    pub fn perform(&self) -> Result<u64, Errno> {
        self.held.perform(&mut self.held.work())
    }

    /// Does it, unless it is done, and answers.
    pub fn answer(self) {
        drop(self);
    }

    /// Answers with an error. Whoever fails a write that was done breaks no promise: a failed
    /// write may have happened.
    pub fn fail(self, errno: Errno) {
        self.held.answer(Some(errno));
    }

    /// From `deadline` on it is answered as [`Hook::expired`] says.
    pub fn set_deadline(&self, deadline: Instant) {
        let held: Weak<Held> = Arc::downgrade(&self.held);
        let expire = move || {
            if let Some(held) = held.upgrade() {
                held.expire();
            }
        };
        let ticket = self.held.server.later.at(deadline, expire);
        let before = self.held.work().expiry.replace(ticket);
        before.into_iter().for_each(|ticket| self.held.server.later.cancel(ticket));
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.held.answer(None);
    }
}

impl Held {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn perform(&self, work: &mut Work) -> Result<u64, Errno> {
        if let Some(outcome) = work.outcome {
            return outcome;
        }
        // Answered already, by its deadline.
        let slot = work.slot.as_mut().ok_or(Errno::CANCELED)?;
        let outcome = self.perform_in(slot);
        if self.op.changes().is_some() {
            slot.set_state(State::Done(number_of(outcome)));
        }
        work.outcome = Some(outcome);
        outcome
    }

    fn perform_in(&self, slot: &mut Slot) -> Result<u64, Errno> {
        let image = &self.image;
        match self.op {
            Op::Read { offset, length } => {
                let into = slot.data_mut().get_mut(..length as usize).ok_or(Errno::INVAL)?;
                image.read(self.direct, offset, into).map(|n| n as u64)
            }
            Op::Write { offset, length } => {
                let data = slot.data().get(..length as usize).ok_or(Errno::INVAL)?;
                image.write(self.direct, offset, data).map(|n| n as u64)
            }
            Op::Allocate { mode, offset, length } => {
                image.allocate(mode, offset, length).map(|()| 0)
            }
            Op::Resize { length } => image.resize(length).map(|()| 0),
            Op::Flush { data_only } => image.sync(data_only).map(|()| 0),
        }
    }

    fn answer(&self, failed: Option<Errno>) {
        let mut work = self.work();
        if work.slot.is_none() {
            return;
        }
        let outcome = match failed {
            Some(errno) => Err(errno),
            None => self.perform(&mut work),
        };
        let (slot, expiry) = (work.slot.take(), work.expiry.take());
        drop(work);
        if let Some(slot) = &slot {
            self.reply(slot, outcome);
        }
        drop(slot);
        expiry.into_iter().for_each(|ticket| self.server.later.cancel(ticket));
    }

    fn reply(&self, slot: &Slot, outcome: Result<u64, Errno>) {
        let written = |bytes: u64| Reply::written(u32::try_from(bytes).unwrap_or(u32::MAX));
        let body: Result<Reply, Errno> = match (outcome, self.op) {
            (Ok(bytes), Op::Read { .. }) => {
                let read = usize::try_from(bytes).ok().and_then(|n| slot.data().get(..n));
                return send(&self.server.device, self.unique, read.ok_or(Errno::IO));
            }
            (Ok(bytes), Op::Write { .. }) => Ok(written(bytes)),
            (Ok(_), Op::Resize { .. }) => {
                self.server.images.attributes(self.image.node()).map(|a| Reply::attributes(&a))
            }
            (Ok(_), Op::Allocate { .. } | Op::Flush { .. }) => Ok(Reply::empty()),
            (Err(errno), _) => Err(errno),
        };
        send(&self.server.device, self.unique, body.as_ref().map(Reply::as_bytes).map_err(|e| *e));
    }

    fn expire(&self) {
        if self.work().slot.is_none() {
            return;
        }
        tracing::warn!(image = ?self.image.name(), op = ?self.op, "a reply's deadline has passed");
        match self.server.hook.expired(&self.image, &self.op) {
            Expiry::Answer => self.answer(None),
            Expiry::Fail(errno) => self.answer(Some(errno)),
        }
    }
}

/// Sends a reply. That the kernel no longer waits for it (the caller was killed, or the server
/// before us had answered) is no failure.
pub(super) fn send(device: &impl AsFd, unique: u64, body: Result<&[u8], Errno>) {
    let header = header_out(unique, body.map(<[u8]>::len));
    let parts = [IoSlice::new(&header), IoSlice::new(body.unwrap_or_default())];
    loop {
        match rustix::io::writev(device, &parts) {
            Err(Errno::INTR) => {}
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => return,
            Err(errno) => {
                tracing::error!(%errno, unique, "the kernel does not take a FUSE reply");
                return;
            }
        }
    }
}

fn number_of(outcome: Result<u64, Errno>) -> i64 {
    match outcome {
        Ok(bytes) => i64::try_from(bytes).unwrap_or(i64::MAX),
        Err(errno) => -i64::from(errno.raw_os_error()),
    }
}

fn outcome_of(number: i64) -> Result<u64, Errno> {
    match u64::try_from(number) {
        Ok(bytes) => Ok(bytes),
        Err(_) => Err(Errno::from_raw_os_error(i32::try_from(-number).unwrap_or(libc::EIO))),
    }
}
