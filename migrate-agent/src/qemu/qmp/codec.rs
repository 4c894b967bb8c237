//! Bytes of a QMP connection to JSON messages and back: one message per line.
//!
//! Pure; used by `io`. A message that grows beyond the limit is an error before it is complete,
//! so a QEMU gone mad cannot make the agent take memory without end.

use serde_json::Value;

/// Longest message that we take. The longest known, `query-cpu-definitions`, is about 100 KiB.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;

/// Bytes that are not QMP.
#[derive(Debug, thiserror::Error)]
pub(super) enum CodecError {
    /// No end of line within [`MESSAGE_BYTES_MAX`].
    #[error("a QMP message is longer than {MESSAGE_BYTES_MAX} bytes")]
    TooLong,
    /// A line that is not JSON.
    #[error("a QMP message is not JSON")]
    NotJson(#[source] serde_json::Error),
}

/// Collects bytes until they are messages.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are known to hold no end of line.
    searched: usize,
}

impl Decoder {
    /// Takes what was read from the socket.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message; `Ok(None)` when it is not complete yet.
    ///
    /// # Errors
    /// When the message is too long, or is not JSON.
    pub(super) fn next(&mut self) -> Result<Option<Value>, CodecError> {
        loop {
            let Some(length) = self.buffer[self.searched..].iter().position(|&b| b == b'\n') else {
                self.searched = self.buffer.len();
                let too_long = self.buffer.len() > MESSAGE_BYTES_MAX;
                return if too_long { Err(CodecError::TooLong) } else { Ok(None) };
            };
            let line: Vec<u8> = self.buffer.drain(..=self.searched + length).collect();
            self.searched = 0;
            if line.trim_ascii().is_empty() {
                continue;
            }
            return serde_json::from_slice(&line).map(Some).map_err(CodecError::NotJson);
        }
    }
}

/// One message as a line.
pub(super) fn encode(message: &Value) -> Vec<u8> {
    let mut line = message.to_string().into_bytes();
    line.extend_from_slice(b"\r\n");
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn messages_come_out_however_the_bytes_were_cut() {
        let bytes = b"{\"a\": 1}\r\n\r\n{\"b\": [2]}\n{\"c\"";
        for cut in 0..bytes.len() {
            let mut decoder = Decoder::default();
            let mut seen = vec![];
            for part in [&bytes[..cut], &bytes[cut..]] {
                decoder.push(part);
                while let Some(message) = decoder.next().unwrap() {
                    seen.push(message);
                }
            }
            assert_eq!(seen, [json!({"a": 1}), json!({"b": [2]})], "cut at {cut}");
        }
    }

    #[test]
    fn a_message_without_end_is_refused_before_it_fills_the_memory() {
        let mut decoder = Decoder::default();
        decoder.push(&vec![b' '; MESSAGE_BYTES_MAX]);
        assert!(decoder.next().unwrap().is_none());
        decoder.push(b" ");
        assert!(matches!(decoder.next(), Err(CodecError::TooLong)));
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next() {}
        }

        #[test]
        fn what_is_encoded_is_decoded(text in ".*", number in any::<i64>()) {
            let message = json!({"text": text, "number": number});
            let mut decoder = Decoder::default();
            decoder.push(&encode(&message));
            prop_assert_eq!(decoder.next().unwrap(), Some(message));
        }
    }
}
