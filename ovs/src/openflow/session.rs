//! One connection with a switch, from HELLO on: pure, with `now` passed in.
//!
//! Used by [`super::io`], which moves its bytes, and by tests. Not here: sockets, tasks, clocks.
//!
//! ```text
//!            HELLO (both)        FEATURES_REPLY
//!  Greeting ─────────────▶ Asking ─────────────▶ Up ──▶ requests, echo, asynchronous messages
//!     │ no common version     │ handshake too slow  │ silence after an echo request
//!     └──────────────┬────────┴─────────────────────┘
//!                    ▼
//!                  Closed   (every pending request is answered with `Disconnected`)
//! ```
//!
//! A request is one question, or several changes followed by a barrier. Errors are matched by
//! xid: an error to a change is kept until the barrier's answer, so that all changes of a request
//! have been tried when its result is told. What carries no xid of ours is asynchronous.

mod error;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use rust_openflow::hello::Hello;
use rust_openflow::multipart::{MORE, Reply, Request};
use rust_openflow::switch::Features;
use rust_openflow::{DecodeError, Failure, Message, VERSION, decode_within, encode};

use crate::tls::Tls;

pub use error::{RequestError, SessionError};

/// The limits of a session.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Silence after which we ask whether the switch is there, and silence after that which ends
    /// the session.
    pub probe_after: Duration,
    /// From the connection to the switch's features.
    pub handshake_within: Duration,
    /// Largest message that we accept, in bytes.
    pub message_limit: usize,
    /// Most parts of one multipart answer.
    pub parts_limit: usize,
    /// Most requests that wait for their answer.
    pub requests_limit: usize,
    /// Most bytes that wait to be written.
    pub output_limit: usize,
    /// What an `ssl:` switch is spoken to with; a listener with it takes nothing but TLS.
    pub tls: Option<Tls>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            probe_after: Duration::from_secs(5),
            handshake_within: Duration::from_secs(10),
            message_limit: rust_openflow::MESSAGE_LIMIT,
            parts_limit: 4096,
            requests_limit: 1024,
            output_limit: 4 << 20,
            tls: None,
        }
    }
}

/// What a request has brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// All changes are done (the barrier has been answered).
    Done,
    /// The whole answer to a multipart question.
    Reply(Reply),
    /// The answer to any other question.
    Message(Message),
}

/// A request as the session names it: the xid of its last message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(u32);

/// What a session tells its driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The handshake is over.
    Up(Features),
    /// A request is over.
    Finished(RequestId, Result<Answer, RequestError>),
    /// Something that was not asked for: port status, packet-in, flow removed, or an error to
    /// nothing that we wait for.
    Asynchronous(Message),
    /// A message that was skipped because its body is malformed.
    Skipped(DecodeError),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    Asking,
    Up,
    Closed,
}

/// What has been sent and not been answered.
#[derive(Debug)]
struct Pending {
    within: Duration,
    deadline: Instant,
    /// The xids of its messages but the last, which names the request.
    changes: Vec<u32>,
    refused: Option<RequestError>,
    gathered: Option<Reply>,
    parts: usize,
    /// The message type that answers, and the multipart type if it is one.
    wanted: (u8, Option<u16>),
}

/// One connection with a switch.
#[derive(Debug)]
pub struct Session {
    settings: Settings,
    state: State,
    started: Instant,
    heard: Instant,
    probed: Option<Instant>,
    next_xid: u32,
    pending: BTreeMap<u32, Pending>,
    /// Which request a change belongs to.
    owners: BTreeMap<u32, u32>,
    input: BytesMut,
    output: BytesMut,
    events: VecDeque<Event>,
}

const BARRIER_REPLY: u8 = 21;
const MULTIPART_REPLY: u8 = 19;

impl Session {
    /// A connection that has just been made; our HELLO is its first output.
    pub fn new(settings: Settings, now: Instant) -> Self {
        let mut session = Self {
            settings,
            state: State::Greeting,
            started: now,
            heard: now,
            probed: None,
            next_xid: 1,
            pending: BTreeMap::new(),
            owners: BTreeMap::new(),
            input: BytesMut::new(),
            output: BytesMut::new(),
            events: VecDeque::new(),
        };
        session.say(&Message::Hello(Hello::offering(&[VERSION])));
        session
    }

    /// Takes what has arrived.
    ///
    /// # Errors
    /// When the session has to end. What is in [`Self::output`] should still be written.
    pub fn receive(&mut self, now: Instant, bytes: &[u8]) -> Result<(), SessionError> {
        self.heard = now;
        self.probed = None;
        self.input.extend_from_slice(bytes);
        loop {
            match decode_within(self.settings.message_limit, &mut self.input) {
                Ok(None) => return Ok(()),
                Ok(Some((header, message))) => self.take(header.xid, message)?,
                Err(error) if error.is_fatal() || self.state != State::Up => {
                    return Err(error.into());
                }
                Err(error) => self.skip(error),
            }
        }
    }

    /// What the time asks for: deadlines, probes.
    ///
    /// # Errors
    /// When the session has to end.
    pub fn tick(&mut self, now: Instant) -> Result<(), SessionError> {
        let within = self.settings.handshake_within;
        if self.state != State::Up && now >= self.started + within {
            return Err(SessionError::SlowHandshake { within });
        }
        self.expire(now);
        let patience = self.settings.probe_after;
        match self.probed {
            Some(probed) if now >= probed + patience => {
                let silent = now.saturating_duration_since(self.heard);
                return Err(SessionError::Silent { silent });
            }
            None if self.state == State::Up && now >= self.heard + patience => {
                self.probed = Some(now);
                self.say(&Message::EchoRequest(Bytes::new()));
            }
            _ => {}
        }
        Ok(())
    }

    /// When [`Self::tick`] is wanted next.
    pub fn next_tick(&self) -> Instant {
        let liveness = match (self.state, self.probed) {
            (State::Up, Some(probed)) => probed + self.settings.probe_after,
            (State::Up, None) => self.heard + self.settings.probe_after,
            _ => self.started + self.settings.handshake_within,
        };
        self.pending.values().map(|pending| pending.deadline).fold(liveness, Instant::min)
    }

    /// Sends changes, then a barrier; finished with [`Answer::Done`] or with the first refusal.
    ///
    /// # Errors
    /// When nothing was sent.
    pub fn change(
        &mut self,
        now: Instant,
        within: Duration,
        changes: &[Message],
    ) -> Result<RequestId, RequestError> {
        self.send(now, within, changes, &Message::BarrierRequest, (BARRIER_REPLY, None))
    }

    /// Sends one question.
    ///
    /// # Errors
    /// When nothing was sent.
    pub fn ask(
        &mut self,
        now: Instant,
        within: Duration,
        question: &Message,
    ) -> Result<RequestId, RequestError> {
        let wanted = match question {
            Message::MultipartRequest { request, .. } => (MULTIPART_REPLY, Some(request.kind())),
            other => (other.kind() + 1, None),
        };
        self.send(now, within, &[], question, wanted)
    }

    /// The same for a multipart question.
    ///
    /// # Errors
    /// When nothing was sent.
    pub fn question(
        &mut self,
        now: Instant,
        within: Duration,
        request: Request,
    ) -> Result<RequestId, RequestError> {
        self.ask(now, within, &Message::question(request))
    }

    /// The session is over, whatever the reason: everything pending is finished.
    pub fn close(&mut self) {
        self.state = State::Closed;
        self.owners.clear();
        for (xid, _) in std::mem::take(&mut self.pending) {
            self.finish(xid, Err(RequestError::Disconnected));
        }
    }

    /// What is to be told, in order.
    pub fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// What is to be written. The driver takes from its front what it has written.
    pub fn output(&mut self) -> &mut BytesMut {
        &mut self.output
    }

    fn send(
        &mut self,
        now: Instant,
        within: Duration,
        changes: &[Message],
        last: &Message,
        wanted: (u8, Option<u16>),
    ) -> Result<RequestId, RequestError> {
        if self.state != State::Up {
            return Err(RequestError::Disconnected);
        }
        let full = self.pending.len() >= self.settings.requests_limit;
        if full || self.output.len() >= self.settings.output_limit {
            return Err(RequestError::Congested);
        }
        let start = self.output.len();
        let mut xids = Vec::with_capacity(changes.len() + 1);
        for message in changes.iter().chain([last]) {
            let xid = self.fresh_xid();
            if let Err(error) = encode(xid, message, &mut self.output) {
                self.output.truncate(start);
                return Err(error.into());
            }
            xids.push(xid);
        }
        let id = xids.pop().unwrap_or_default();
        self.owners.extend(xids.iter().map(|change| (*change, id)));
        let deadline = now + within;
        let (refused, gathered, parts) = (None, None, 0);
        let changes = xids;
        let pending = Pending { within, deadline, changes, refused, gathered, parts, wanted };
        self.pending.insert(id, pending);
        Ok(RequestId(id))
    }

    /// Never 0, which some switches use for what they say unasked, and never one that waits.
    fn fresh_xid(&mut self) -> u32 {
        loop {
            let xid = self.next_xid;
            self.next_xid = self.next_xid.checked_add(1).unwrap_or(1);
            if !self.pending.contains_key(&xid) && !self.owners.contains_key(&xid) {
                return xid;
            }
        }
    }

    /// Something of our own that nobody waits for; its size is fixed and small.
    fn say(&mut self, message: &Message) {
        let xid = self.fresh_xid();
        self.reply(xid, message);
    }

    fn reply(&mut self, xid: u32, message: &Message) {
        // Only echoes can be large, and they were read from a message of the same size.
        let fits = encode(xid, message, &mut self.output);
        debug_assert!(fits.is_ok(), "our own messages fit");
    }

    fn take(&mut self, xid: u32, message: Message) -> Result<(), SessionError> {
        if let Message::EchoRequest(data) = message {
            // A peer that asks faster than it reads gets no more answers; it then sees silence.
            if self.output.len() < self.settings.output_limit {
                self.reply(xid, &Message::EchoReply(data));
            }
            return Ok(());
        }
        match self.state {
            State::Greeting => self.greet(xid, message),
            State::Asking => self.learn(message),
            State::Up => {
                self.answer(xid, message);
                Ok(())
            }
            State::Closed => Ok(()),
        }
    }

    fn greet(&mut self, xid: u32, message: Message) -> Result<(), SessionError> {
        match message {
            Message::Hello(hello) if hello.speaks(VERSION) => {
                self.state = State::Asking;
                self.say(&Message::FeaturesRequest);
                Ok(())
            }
            Message::Hello(hello) => {
                self.reply(xid, &Message::Error(Failure::new(0, 0)));
                Err(SessionError::NoCommonVersion { theirs: hello.versions() })
            }
            Message::Error(failure) => Err(SessionError::Refused { failure }),
            other => Err(SessionError::OutOfOrder { kind: other.kind(), wanted: "HELLO" }),
        }
    }

    fn learn(&mut self, message: Message) -> Result<(), SessionError> {
        match message {
            Message::FeaturesReply(features) => {
                self.state = State::Up;
                self.events.push_back(Event::Up(features));
                Ok(())
            }
            Message::Error(failure) => Err(SessionError::Refused { failure }),
            // Open vSwitch may speak of its ports before it is asked anything.
            early @ (Message::PortStatus(_) | Message::PacketIn(_) | Message::FlowRemoved(_)) => {
                self.events.push_back(Event::Asynchronous(early));
                Ok(())
            }
            other => Err(SessionError::OutOfOrder { kind: other.kind(), wanted: "FEATURES_REPLY" }),
        }
    }

    fn answer(&mut self, xid: u32, message: Message) {
        match message {
            Message::PortStatus(_) | Message::PacketIn(_) | Message::FlowRemoved(_) => {
                self.events.push_back(Event::Asynchronous(message));
            }
            Message::Error(failure) => self.refuse(xid, failure),
            Message::MultipartReply { flags, reply } if self.pending.contains_key(&xid) => {
                self.gather(xid, flags, reply);
            }
            // The echo that answers our probe has done its work by arriving.
            Message::EchoReply(_) => {}
            other => self.conclude(xid, other),
        }
    }

    fn refuse(&mut self, xid: u32, failure: Failure) {
        if let Some(owner) = self.owners.remove(&xid) {
            if let Some(pending) = self.pending.get_mut(&owner) {
                let index = pending.changes.iter().position(|change| *change == xid);
                let index = index.unwrap_or_default();
                pending.refused.get_or_insert(RequestError::Refused { failure, index });
            }
        } else if let Some(pending) = self.pending.get(&xid) {
            let index = pending.changes.len();
            self.finish(xid, Err(RequestError::Refused { failure, index }));
        } else {
            self.events.push_back(Event::Asynchronous(Message::Error(failure)));
        }
    }

    fn gather(&mut self, xid: u32, flags: u16, reply: Reply) {
        let limit = self.settings.parts_limit;
        let Some(pending) = self.pending.get_mut(&xid) else { return };
        let kind = reply.kind();
        let joined = if pending.wanted != (MULTIPART_REPLY, Some(kind)) {
            Err(RequestError::WrongAnswer { kind: MULTIPART_REPLY })
        } else if pending.parts >= limit {
            Err(RequestError::TooManyParts { limit })
        } else if let Some(gathered) = &mut pending.gathered {
            gathered.append(reply).map_err(RequestError::from)
        } else {
            pending.gathered = Some(reply);
            Ok(())
        };
        pending.parts += 1;
        match joined {
            Err(error) => self.finish(xid, Err(error)),
            Ok(()) if flags & MORE != 0 => {}
            Ok(()) => {
                let whole = pending.gathered.take().map(Answer::Reply);
                let kind = MULTIPART_REPLY;
                self.finish(xid, whole.ok_or(RequestError::WrongAnswer { kind }));
            }
        }
    }

    fn conclude(&mut self, xid: u32, message: Message) {
        let Some(pending) = self.pending.get_mut(&xid) else { return };
        let result = match (pending.refused.take(), message) {
            (Some(refused), Message::BarrierReply) => Err(refused),
            (None, Message::BarrierReply) if pending.wanted.0 == BARRIER_REPLY => Ok(Answer::Done),
            (_, other) if other.kind() == pending.wanted.0 => Ok(Answer::Message(other)),
            (_, other) => Err(RequestError::WrongAnswer { kind: other.kind() }),
        };
        self.finish(xid, result);
    }

    fn finish(&mut self, xid: u32, result: Result<Answer, RequestError>) {
        if let Some(pending) = self.pending.remove(&xid) {
            for change in pending.changes {
                self.owners.remove(&change);
            }
        }
        self.events.push_back(Event::Finished(RequestId(xid), result));
    }

    /// A malformed answer finishes its request; a malformed unasked message is only told.
    fn skip(&mut self, error: DecodeError) {
        if let DecodeError::Body { xid, kind, .. } = &error
            && self.pending.contains_key(xid)
        {
            self.finish(*xid, Err(RequestError::WrongAnswer { kind: *kind }));
        }
        self.events.push_back(Event::Skipped(error));
    }

    fn expire(&mut self, now: Instant) {
        let late = |pending: &Pending| now >= pending.deadline;
        let over: Vec<_> = self.pending.iter().filter(|(_, pending)| late(pending)).collect();
        let over: Vec<_> = over.into_iter().map(|(xid, pending)| (*xid, pending.within)).collect();
        for (xid, within) in over {
            self.finish(xid, Err(RequestError::TimedOut { within }));
        }
    }
}

#[cfg(test)]
mod tests;
