//! One connection with a database server: pure, with `now` passed in.
//!
//! Used by [`super::io`]. Not here: sockets, reconnection, what transactions are for.
//!
//! ```text
//!  Open ──▶ requests and their answers by id; updates of monitors; echo, whoever asks
//!    │ silence after our echo, or garbage
//!    ▼
//!  Closed   (every pending request is finished with `Disconnected`)
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use serde_json::{Value, json};

use super::value::excerpt;
use super::wire::{Framer, Rpc, WireError};
use crate::tls::Tls;

/// The limits of a session.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Silence after which we ask whether the server is there, and silence after that which ends
    /// the session.
    pub probe_after: Duration,
    /// Largest message that we accept, in bytes.
    pub message_limit: usize,
    /// Most requests that wait for their answer.
    pub requests_limit: usize,
    /// Most bytes that wait to be written.
    pub output_limit: usize,
    /// First pause before connecting again; doubled each time
    pub backoff_min: Duration,
    /// up to this.
    pub backoff_max: Duration,
    /// What an `ssl:` server is spoken to with.
    pub tls: Option<Tls>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            probe_after: Duration::from_secs(5),
            message_limit: 16 << 20,
            requests_limit: 1024,
            output_limit: 4 << 20,
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(4),
            tls: None,
        }
    }
}

/// Why a session has ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No sign of life after an echo.
    #[error("the database server has been silent for {silent:?}")]
    Silent {
        /// For how long.
        silent: Duration,
    },
    /// What it sends cannot be followed any further.
    #[error("the database server sends what is not OVSDB")]
    Garbled(#[from] WireError),
}

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The server says no.
    #[error("the database server refuses: {error}")]
    Refused {
        /// What it says, as JSON.
        error: String,
    },
    /// No answer in time. The server may have done it.
    #[error("no answer from the database server within {within:?}")]
    TimedOut {
        /// The limit.
        within: Duration,
    },
    /// There is no connection, or it has ended first; then the server may have done it.
    #[error("not connected to the database server")]
    Disconnected,
    /// Too much is waiting already; nothing was sent.
    #[error("too many requests wait for the database server already")]
    Congested,
}

/// A request as the session names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(u64);

/// What a session tells its driver.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A request is over.
    Finished(RequestId, Result<Value, RequestError>),
    /// Rows of a monitor have changed.
    Update {
        /// The name that the monitor was given.
        monitor: Value,
        /// By table and row.
        updates: Value,
    },
}

#[derive(Debug)]
struct Pending {
    within: Duration,
    deadline: Instant,
}

/// One connection with a database server.
#[derive(Debug)]
pub struct Session {
    settings: Settings,
    open: bool,
    heard: Instant,
    probed: Option<Instant>,
    next_id: u64,
    pending: BTreeMap<u64, Pending>,
    framer: Framer,
    output: BytesMut,
    events: VecDeque<Event>,
}

impl Session {
    /// A connection that has just been made.
    pub fn new(settings: Settings, now: Instant) -> Self {
        Self {
            framer: Framer::new(settings.message_limit),
            settings,
            open: true,
            heard: now,
            probed: None,
            next_id: 1,
            pending: BTreeMap::new(),
            output: BytesMut::new(),
            events: VecDeque::new(),
        }
    }

    /// Takes what has arrived.
    ///
    /// # Errors
    /// When the session has to end.
    pub fn receive(&mut self, now: Instant, bytes: &[u8]) -> Result<(), SessionError> {
        self.heard = now;
        self.probed = None;
        self.framer.push(bytes);
        while let Some(value) = self.framer.next_value()? {
            self.take(Rpc::from_json(value)?);
        }
        Ok(())
    }

    /// What the time asks for: deadlines, probes.
    ///
    /// # Errors
    /// When the session has to end.
    pub fn tick(&mut self, now: Instant) -> Result<(), SessionError> {
        let late: Vec<_> = self
            .pending
            .iter()
            .filter(|(_, pending)| now >= pending.deadline)
            .map(|(id, pending)| (*id, pending.within))
            .collect();
        for (id, within) in late {
            self.finish(id, Err(RequestError::TimedOut { within }));
        }
        let patience = self.settings.probe_after;
        match self.probed {
            Some(probed) if now >= probed + patience => {
                let silent = now.saturating_duration_since(self.heard);
                return Err(SessionError::Silent { silent });
            }
            None if now >= self.heard + patience => {
                self.probed = Some(now);
                self.write(&json!({"id": "probe", "method": "echo", "params": []}));
            }
            _ => {}
        }
        Ok(())
    }

    /// When [`Self::tick`] is wanted next.
    pub fn next_tick(&self) -> Instant {
        let liveness = self.probed.unwrap_or(self.heard) + self.settings.probe_after;
        self.pending.values().map(|pending| pending.deadline).fold(liveness, Instant::min)
    }

    /// Sends a request.
    ///
    /// # Errors
    /// When nothing was sent.
    pub fn request(
        &mut self,
        now: Instant,
        within: Duration,
        method: &str,
        params: &Value,
    ) -> Result<RequestId, RequestError> {
        if !self.open {
            return Err(RequestError::Disconnected);
        }
        let full = self.pending.len() >= self.settings.requests_limit;
        if full || self.output.len() >= self.settings.output_limit {
            return Err(RequestError::Congested);
        }
        let id = self.next_id;
        self.next_id += 1;
        self.write(&json!({"id": id, "method": method, "params": params}));
        self.pending.insert(id, Pending { within, deadline: now + within });
        Ok(RequestId(id))
    }

    /// The session is over, whatever the reason: everything pending is finished.
    pub fn close(&mut self) {
        self.open = false;
        for (id, _) in std::mem::take(&mut self.pending) {
            self.events.push_back(Event::Finished(RequestId(id), Err(RequestError::Disconnected)));
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

    fn write(&mut self, message: &Value) {
        self.output.extend_from_slice(message.to_string().as_bytes());
    }

    fn take(&mut self, message: Rpc) {
        match message {
            Rpc::Request { id, method, params } => self.serve(&id, &method, &params),
            Rpc::Notification { method, params } if method == "update" => {
                let params = match params {
                    Value::Array(params) => <[Value; 2]>::try_from(params).ok(),
                    _ => None,
                };
                if let Some([monitor, updates]) = params {
                    self.events.push_back(Event::Update { monitor, updates });
                }
            }
            Rpc::Notification { .. } => {}
            Rpc::Answer { id, result } => {
                // The answer to our own probe has no number; it has done its work by arriving.
                if let Some(id) = id.as_u64().filter(|id| self.pending.contains_key(id)) {
                    let refused = |error| RequestError::Refused { error: excerpt(&error) };
                    self.finish(id, result.map_err(refused));
                }
            }
        }
    }

    fn serve(&mut self, id: &Value, method: &str, params: &Value) {
        // A peer that asks faster than it reads gets no more answers; it then sees silence.
        if self.output.len() >= self.settings.output_limit {
            return;
        }
        if method == "echo" {
            self.write(&json!({"id": id, "result": params, "error": null}));
        } else {
            self.write(&json!({"id": id, "result": null, "error": "unknown method"}));
        }
    }

    fn finish(&mut self, id: u64, result: Result<Value, RequestError>) {
        self.pending.remove(&id);
        self.events.push_back(Event::Finished(RequestId(id), result));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const SECOND: Duration = Duration::from_secs(1);

    fn session() -> (Session, Instant) {
        let now = clock::now();
        (Session::new(Settings::default(), now), now)
    }

    fn told(session: &mut Session) -> Vec<Event> {
        std::iter::from_fn(|| session.next_event()).collect()
    }

    fn say(session: &mut Session, now: Instant, message: &Value) {
        session.receive(now, message.to_string().as_bytes()).unwrap();
    }

    #[test]
    fn echo_is_answered_even_while_a_request_waits() {
        let (mut session, now) = session();
        session.request(now, SECOND, "transact", &json!([])).unwrap();
        session.output().clear();
        say(&mut session, now, &json!({"id": "e", "method": "echo", "params": [7]}));
        let said: Value = serde_json::from_slice(session.output()).unwrap();
        assert_eq!(said, json!({"id": "e", "result": [7], "error": null}));
    }

    #[test]
    fn answers_find_their_request_in_any_order() {
        let (mut session, now) = session();
        let first = session.request(now, SECOND, "a", &json!([])).unwrap();
        let second = session.request(now, SECOND, "b", &json!([])).unwrap();
        say(&mut session, now, &json!({"id": second.0, "result": null, "error": "no"}));
        say(&mut session, now, &json!({"id": first.0, "result": 1, "error": null}));
        say(&mut session, now, &json!({"id": 99, "result": 1, "error": null}));
        let refused = RequestError::Refused { error: "\"no\"".into() };
        let wanted = [Event::Finished(second, Err(refused)), Event::Finished(first, Ok(json!(1)))];
        assert_eq!(told(&mut session), wanted);
    }

    #[test]
    fn a_late_answer_belongs_to_nobody() {
        let (mut session, now) = session();
        let id = session.request(now, SECOND, "a", &json!([])).unwrap();
        session.tick(now + SECOND).unwrap();
        say(&mut session, now, &json!({"id": id.0, "result": 1, "error": null}));
        let late = Err(RequestError::TimedOut { within: SECOND });
        assert_eq!(told(&mut session), [Event::Finished(id, late)]);
    }

    #[test]
    fn a_silent_server_is_probed_once_and_then_given_up() {
        let (mut session, now) = session();
        session.tick(now + 5 * SECOND).unwrap();
        assert!(session.output().starts_with(b"{"));
        assert!(matches!(session.tick(now + 10 * SECOND), Err(SessionError::Silent { .. })));
    }

    #[test]
    fn closing_finishes_what_waits() {
        let (mut session, now) = session();
        let id = session.request(now, SECOND, "a", &json!([])).unwrap();
        session.close();
        assert_eq!(told(&mut session), [Event::Finished(id, Err(RequestError::Disconnected))]);
        let refused = session.request(now, SECOND, "a", &json!([]));
        assert_eq!(refused, Err(RequestError::Disconnected));
    }
}
