//! OpenFlow 1.3 messages, as a switch sends them.

use bytes::{Bytes, BytesMut};
use rust_openflow::{DecodeError, Header, Message, decode, encode};

/// Whatever a switch sends.
///
/// # Panics
/// Where something does not hold.
pub fn holds(data: &[u8]) {
    let Some((pieces, whole)) = super::pieces::cut(data) else { return };
    let (messages, end) = read(&pieces);
    assert_eq!((&messages, &end), (&read(std::slice::from_ref(&whole)).0, &read(&[whole]).1));
    for (header, message) in messages {
        let mut written = BytesMut::new();
        // Some of what is read we never say, and some is said more shortly than it came.
        if encode(header.xid, &message, &mut written).is_err() {
            continue;
        }
        let again = decode(&mut written).expect("what was written is read again");
        let (_, again) = again.expect("a whole message was written");
        assert_eq!((again, written.len()), (message, 0));
    }
}

fn read(pieces: &[Bytes]) -> (Vec<(Header, Message)>, Result<(), DecodeError>) {
    let (mut buffer, mut messages) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        buffer.extend_from_slice(piece);
        loop {
            match decode(&mut buffer) {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Err(error)),
            }
        }
    }
    (messages, Ok(()))
}
