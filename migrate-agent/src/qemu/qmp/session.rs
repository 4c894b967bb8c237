//! What QMP messages mean: greeting, answers by id, events. Pure; used by `io` and the handles.
//!
//! ```text
//!   connect -> (events?) -> greeting -> qmp_capabilities -> commands, answers, events ...-> closed
//! ```
//!
//! Answers are matched by id, not by order: an answer that comes after its deadline meets nobody
//! and is dropped, and the answers after it still find their own commands. `W` is who waits.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::codec;
use super::types::VersionInfo;

/// Why QEMU refused a command, in its words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Deserialize)]
#[error("{desc} ({class})")]
pub struct Refusal {
    /// `GenericError` nearly always; `CommandNotFound` tells that this QEMU lacks the command.
    pub class: String,
    /// For a person.
    pub desc: String,
}

/// Something that happened in QEMU.
#[derive(Debug, Clone, PartialEq)]
pub struct QmpEvent {
    /// `STOP`, `RESUME`, `MIGRATION`, ... ; also those of versions that we do not know.
    pub name: String,
    /// The event's own data; an empty object for none.
    pub data: Value,
    /// When, by QEMU's host clock, in seconds since the epoch; 0 when that clock failed.
    pub seconds: u64,
    /// The rest of it, in microseconds.
    pub microseconds: u64,
}

impl QmpEvent {
    /// When it happened, in microseconds since the epoch; 0 when QEMU's clock failed.
    #[must_use]
    pub const fn unix_us(&self) -> u64 {
        self.seconds.saturating_mul(1_000_000).saturating_add(self.microseconds)
    }
}

/// A message, understood.
#[derive(Debug)]
pub(super) enum Incoming<W> {
    /// QEMU introduced itself.
    Greeting(VersionInfo),
    /// An answer, and who waits for it.
    Answer(W, Result<Value, Refusal>),
    /// An event.
    Event(QmpEvent),
    /// An answer that nobody waits for any more, or a message of a kind that we do not know.
    Ignored,
}

/// The commands that are under way on one connection.
#[derive(Debug)]
pub(super) struct Session<W> {
    waiting: HashMap<u64, W>,
    next_id: u64,
    closed: bool,
}

impl<W> Default for Session<W> {
    fn default() -> Self {
        Self { waiting: HashMap::new(), next_id: 1, closed: false }
    }
}

impl<W> Session<W> {
    /// Registers a command: its id, and the line to send. `None` once the connection has ended.
    pub(super) fn request(
        &mut self,
        command: &str,
        arguments: &Value,
        waiter: W,
    ) -> Option<(u64, Vec<u8>)> {
        if self.closed {
            return None;
        }
        let id = self.next_id;
        self.next_id += 1;
        let mut message = json!({"execute": command, "id": id});
        if !arguments.is_null() {
            message["arguments"] = arguments.clone();
        }
        self.waiting.insert(id, waiter);
        Some((id, codec::encode(&message)))
    }

    /// Nobody waits for this one any more.
    pub(super) fn forget(&mut self, id: u64) {
        self.waiting.remove(&id);
    }

    /// The connection has ended: whoever waits is let go (the waiters are dropped).
    pub(super) fn close(&mut self) {
        self.closed = true;
        self.waiting.clear();
    }

    /// Whether the connection has ended.
    pub(super) const fn is_closed(&self) -> bool {
        self.closed
    }

    /// Takes a message from QEMU.
    pub(super) fn receive(&mut self, message: Value) -> Incoming<W> {
        let Value::Object(mut message) = message else { return Incoming::Ignored };
        if let Some(Value::String(name)) = message.remove("event") {
            return Incoming::Event(event(name, &mut message));
        }
        if let Some(greeting) = message.remove("QMP") {
            let version = greeting.get("version").and_then(|v| VersionInfo::deserialize(v).ok());
            return Incoming::Greeting(version.unwrap_or_default());
        }
        let waiter = message.get("id").and_then(Value::as_u64);
        let Some(waiter) = waiter.and_then(|id| self.waiting.remove(&id)) else {
            return Incoming::Ignored;
        };
        match message.remove("return") {
            Some(value) => Incoming::Answer(waiter, Ok(value)),
            None => Incoming::Answer(waiter, Err(refusal(message.remove("error")))),
        }
    }
}

fn event(name: String, message: &mut Map<String, Value>) -> QmpEvent {
    // QEMU writes -1 for both when its clock fails; that is no time at all.
    let time = |key: &str| {
        message.get("timestamp").and_then(|t| t.get(key)).and_then(Value::as_u64).unwrap_or(0)
    };
    let (seconds, microseconds) = (time("seconds"), time("microseconds"));
    let data = message.remove("data").unwrap_or_else(|| json!({}));
    QmpEvent { name, data, seconds, microseconds }
}

fn refusal(error: Option<Value>) -> Refusal {
    let unreadable = || Refusal {
        class: "GenericError".to_owned(),
        desc: "neither a result nor an error was given".to_owned(),
    };
    error.and_then(|value| serde_json::from_value(value).ok()).unwrap_or_else(unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_answer_finds_its_command_by_id_even_after_one_was_given_up() {
        let mut session = Session::default();
        let (slow, _) = session.request("stop", &Value::Null, "slow").unwrap();
        let (quick, line) = session.request("cont", &json!({"x": 1}), "quick").unwrap();
        let sent: Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(sent, json!({"execute": "cont", "id": quick, "arguments": {"x": 1}}));
        session.forget(slow);
        let late = session.receive(json!({"return": {}, "id": slow}));
        assert!(matches!(late, Incoming::Ignored));
        let answer = session.receive(json!({"return": 7, "id": quick}));
        assert!(matches!(answer, Incoming::Answer("quick", Ok(value)) if value == 7));
    }

    #[test]
    fn a_refusal_carries_qemus_words() {
        let mut session = Session::default();
        let (id, _) = session.request("eject", &Value::Null, ()).unwrap();
        let error = json!({"class": "CommandNotFound", "desc": "no such command"});
        let Incoming::Answer((), Err(refusal)) = session.receive(json!({"error": error, "id": id}))
        else {
            panic!("no refusal");
        };
        assert_eq!(refusal.to_string(), "no such command (CommandNotFound)");
    }

    #[test]
    fn an_event_of_an_unknown_version_passes_with_its_time() {
        let mut session: Session<()> = Session::default();
        let message = json!({"event": "NEW_IN_99", "data": {"a": {"b": []}},
            "timestamp": {"seconds": 1_700_000_000_u64, "microseconds": 250}});
        let Incoming::Event(event) = session.receive(message) else { panic!("no event") };
        assert_eq!(event.name, "NEW_IN_99");
        assert_eq!(event.unix_us(), 1_700_000_000_000_250);
        let failed_clock =
            json!({"event": "STOP", "timestamp": {"seconds": -1, "microseconds": -1}});
        let Incoming::Event(event) = session.receive(failed_clock) else { panic!("no event") };
        assert_eq!(event.unix_us(), 0);
    }

    #[test]
    fn a_closed_session_lets_everybody_go_and_takes_no_more() {
        let mut session = Session::default();
        let waiter = std::rc::Rc::new(());
        let _ = session.request("stop", &Value::Null, waiter.clone()).unwrap();
        session.close();
        assert_eq!(std::rc::Rc::strong_count(&waiter), 1);
        assert!(session.request("cont", &Value::Null, waiter).is_none());
    }

    proptest! {
        #[test]
        fn no_message_panics(id in any::<i64>(), which in 0..6_usize, text in ".*") {
            let mut session = Session::default();
            let _ = session.request("x", &Value::Null, ());
            let message = match which {
                0 => json!({"QMP": text}),
                1 => json!({"QMP": {"version": [id]}}),
                2 => json!({"event": text, "timestamp": id}),
                3 => json!({"return": text, "id": id}),
                4 => json!({"error": id, "id": 1}),
                _ => json!([text, id]),
            };
            let _ = session.receive(message);
        }
    }
}
