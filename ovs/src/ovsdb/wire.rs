//! Finding one JSON value after another in a stream, and what JSON-RPC 1.0 makes of it
//! (RFC 7047 section 4.1).
//!
//! Used by the session. Values follow each other without any separator, so their ends have to be
//! found. Every byte is looked at once, however the stream is cut; memory is bounded by the limit.

use bytes::{Buf, BytesMut};
use serde_json::{Map, Value};

use super::value::excerpt;

/// What makes a stream unreadable.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// A message longer than we accept.
    #[error("a message of more than {limit} bytes")]
    TooLong {
        /// The limit, in bytes.
        limit: usize,
    },
    /// Between messages, something other than white space or the beginning of an object.
    #[error("byte {byte:#04x} where a message was to begin")]
    NotAnObject {
        /// The byte.
        byte: u8,
    },
    /// Braces that match around what is not JSON.
    #[error("malformed JSON")]
    Json(#[from] serde_json::Error),
    /// JSON that is neither request, answer nor notification.
    #[error("not a JSON-RPC message: {excerpt}")]
    NotRpc {
        /// Its beginning.
        excerpt: String,
    },
}

/// Cuts a stream into JSON objects.
#[derive(Debug)]
pub struct Framer {
    limit: usize,
    buffer: BytesMut,
    /// How far the buffer has been looked at.
    scanned: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Framer {
    /// One that accepts objects of up to `limit` bytes.
    pub fn new(limit: usize) -> Self {
        let buffer = BytesMut::new();
        Self { limit, buffer, scanned: 0, depth: 0, in_string: false, escaped: false }
    }

    /// Takes what has arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next object, once all of it is there.
    ///
    /// # Errors
    /// After any of them the stream cannot be read any further.
    pub fn next_value(&mut self) -> Result<Option<Value>, WireError> {
        if self.depth == 0 && self.scanned == 0 {
            self.skip_space()?;
        }
        while let Some(byte) = self.buffer.get(self.scanned) {
            let byte = *byte;
            self.scanned += 1;
            if self.scanned > self.limit {
                return Err(WireError::TooLong { limit: self.limit });
            }
            if self.closes(byte) {
                let object = self.buffer.split_to(self.scanned);
                self.scanned = 0;
                return Ok(Some(serde_json::from_slice(&object)?));
            }
        }
        Ok(None)
    }

    fn skip_space(&mut self) -> Result<(), WireError> {
        let space = self.buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        self.buffer.advance(space);
        match self.buffer.first() {
            Some(b'{') | None => Ok(()),
            Some(byte) => Err(WireError::NotAnObject { byte: *byte }),
        }
    }

    /// Whether this byte ends the object. Brackets count like braces: which of them fits which is
    /// for the parser to say, and its depth limit stands behind ours.
    fn closes(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        self.depth == 0
    }
}

/// A message of JSON-RPC 1.0.
#[derive(Debug, Clone, PartialEq)]
pub enum Rpc {
    /// The peer wants an answer.
    Request {
        /// To be repeated in the answer.
        id: Value,
        /// What it wants.
        method: String,
        /// With what.
        params: Value,
    },
    /// The peer wants none.
    Notification {
        /// What it says.
        method: String,
        /// With what.
        params: Value,
    },
    /// The answer to a request.
    Answer {
        /// Which request.
        id: Value,
        /// `Err` with the error's value, which is not null.
        result: Result<Value, Value>,
    },
}

impl Rpc {
    /// What a value says.
    ///
    /// # Errors
    /// When it is none of the three.
    pub fn from_json(value: Value) -> Result<Self, WireError> {
        let refuse = |value: &Value| WireError::NotRpc { excerpt: excerpt(value) };
        let Value::Object(mut object) = value else { return Err(refuse(&value)) };
        let mut take = |key: &str| object.remove(key).unwrap_or(Value::Null);
        let (id, method, params) = (take("id"), take("method"), take("params"));
        let (result, error) = (take("result"), take("error"));
        match (method, id) {
            (Value::String(method), Value::Null) => Ok(Self::Notification { method, params }),
            (Value::String(method), id) => Ok(Self::Request { id, method, params }),
            (Value::Null, Value::Null) => Err(refuse(&Value::Object(Map::new()))),
            (Value::Null, id) if error.is_null() => Ok(Self::Answer { id, result: Ok(result) }),
            (Value::Null, id) => Ok(Self::Answer { id, result: Err(error) }),
            (other, _) => Err(refuse(&other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn all(framer: &mut Framer) -> Vec<Value> {
        std::iter::from_fn(|| framer.next_value().unwrap()).collect()
    }

    #[test]
    fn objects_are_found_wherever_the_stream_is_cut() {
        let text = r#"{"a":"}\"{"}  {"b":[{"c":"\\"}]}{"d":1}"#;
        let wanted = [json!({"a": "}\"{"}), json!({"b": [{"c": "\\"}]}), json!({"d": 1})];
        for cut in 0..text.len() {
            let mut framer = Framer::new(100);
            framer.push(&text.as_bytes()[..cut]);
            let mut found = all(&mut framer);
            framer.push(&text.as_bytes()[cut..]);
            found.extend(all(&mut framer));
            assert_eq!(found, wanted, "cut at {cut}");
        }
    }

    #[test]
    fn a_message_beyond_the_limit_is_refused_before_it_is_whole() {
        let mut framer = Framer::new(16);
        framer.push(br#"{"a":"0123456789"#);
        assert!(framer.next_value().unwrap().is_none());
        framer.push(b"x");
        assert!(matches!(framer.next_value(), Err(WireError::TooLong { limit: 16 })));
    }

    #[test]
    fn what_is_not_an_object_is_refused() {
        for text in ["[1]", "x", "{]", "null", "}"] {
            let mut framer = Framer::new(16);
            framer.push(text.as_bytes());
            assert!(framer.next_value().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_overflow() {
        let mut framer = Framer::new(1 << 20);
        framer.push(&[br#"{"a":"#, &[b'['; 100_000][..], &[b']'; 100_000][..], b"}"].concat());
        assert!(matches!(framer.next_value(), Err(WireError::Json(_))));
    }

    #[test]
    fn the_three_kinds_of_message_are_told_apart() {
        let echo = json!({"id": "echo", "method": "echo", "params": []});
        assert!(matches!(Rpc::from_json(echo), Ok(Rpc::Request { .. })));
        let update = json!({"id": null, "method": "update", "params": [1, {}]});
        assert!(matches!(Rpc::from_json(update), Ok(Rpc::Notification { .. })));
        let error = json!({"id": 3, "result": null, "error": {"error": "no"}});
        assert!(matches!(Rpc::from_json(error), Ok(Rpc::Answer { result: Err(_), .. })));
        for wrong in [json!({}), json!([]), json!({"method": 4, "id": 1})] {
            assert!(Rpc::from_json(wrong).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(pieces in prop::collection::vec(
            prop::collection::vec(any::<u8>(), 0..40), 0..8,
        )) {
            let mut framer = Framer::new(64);
            for piece in pieces {
                framer.push(&piece);
                while let Ok(Some(value)) = framer.next_value() {
                    let _ = Rpc::from_json(value);
                }
            }
        }
    }
}
