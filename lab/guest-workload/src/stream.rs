//! The checked TCP stream: bytes that say by themselves where in the stream they belong.
//!
//! Guest and client each keep one `Outgoing` and one `Incoming` per connection. Byte `i` of a
//! direction is a function of (key, i), so a byte that is lost, repeated, changed or swapped with
//! another is seen at the position where it happens. Pure: the sockets are the drivers'.
//!
//! A stream is never repaired: after the first wrong byte everything behind it is out of place,
//! so the error is counted once and the stream is `broken` until a new connection starts at 0.

/// The key of the bytes that the client sends.
pub(crate) const FROM_CLIENT: u64 = 0x636c_6965_6e74_2121;
/// The key of the bytes that the guest sends.
pub(crate) const FROM_GUEST: u64 = 0x6775_6573_7421_2121;

/// The first byte of a stream that was not what its position asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stream byte {position}: found {found:#04x}, expected {expected:#04x}")]
pub(crate) struct WrongByte {
    /// Position in the stream, from 0.
    pub(crate) position: u64,
    /// What came.
    pub(crate) found: u8,
    /// What belongs there.
    pub(crate) expected: u8,
}

/// The side of a stream that makes its bytes.
#[derive(Debug)]
pub(crate) struct Outgoing {
    key: u64,
    position: u64,
}

impl Outgoing {
    /// A stream at position 0.
    pub(crate) fn new(key: u64) -> Self {
        Self { key, position: 0 }
    }

    /// Fills `buffer` with the bytes that come next, without moving on.
    pub(crate) fn peek(&self, buffer: &mut [u8]) {
        for (offset, byte) in buffer.iter_mut().enumerate() {
            *byte = byte_at(self.key, self.position + offset as u64);
        }
    }

    /// Moves on by what the socket took.
    pub(crate) fn advance(&mut self, taken: usize) {
        self.position += taken as u64;
    }

    /// How many bytes were handed to the socket.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }
}

/// The side of a stream that checks its bytes.
#[derive(Debug)]
pub(crate) struct Incoming {
    key: u64,
    position: u64,
    broken: bool,
}

impl Incoming {
    /// A stream at position 0.
    pub(crate) fn new(key: u64) -> Self {
        Self { key, position: 0, broken: false }
    }

    /// Checks the bytes that came next. Only the first wrong byte of a stream is an error;
    /// what follows it is counted by position and not judged.
    pub(crate) fn check(&mut self, bytes: &[u8]) -> Result<(), WrongByte> {
        let start = self.position;
        self.position += bytes.len() as u64;
        if self.broken {
            return Ok(());
        }
        let wrong = bytes
            .iter()
            .zip(start..)
            .find(|(byte, position)| **byte != byte_at(self.key, *position));
        let Some((&found, position)) = wrong else { return Ok(()) };
        self.broken = true;
        Err(WrongByte { position, found, expected: byte_at(self.key, position) })
    }

    /// How many bytes came.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }
}

fn byte_at(key: u64, position: u64) -> u8 {
    let x = (position >> 3).wrapping_add(key).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let word = (x ^ (x >> 32)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word.to_le_bytes()[(position & 7) as usize]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(len: usize) -> Vec<u8> {
        let mut all = vec![0; len];
        Outgoing::new(FROM_GUEST).peek(&mut all);
        all
    }

    #[test]
    fn a_lost_byte_is_seen_where_it_is_missing() {
        let mut all = bytes(4000);
        all.remove(1234);
        let wrong = Incoming::new(FROM_GUEST).check(&all).unwrap_err();
        // A byte may equal its neighbour by chance; then the error shows a byte later.
        assert!((1234..1240).contains(&wrong.position), "{wrong}");
    }

    #[test]
    fn a_repeated_segment_is_seen_once() {
        let all = bytes(3000);
        let mut incoming = Incoming::new(FROM_GUEST);
        incoming.check(&all[..2000]).unwrap();
        assert!(incoming.check(&all[1000..2000]).is_err());
        assert!(incoming.check(&all[1000..2000]).is_ok(), "only the first error is told");
        assert_eq!(incoming.position(), 4000);
    }

    #[test]
    fn the_other_directions_bytes_are_wrong() {
        assert!(Incoming::new(FROM_CLIENT).check(&bytes(64)).is_err());
    }

    proptest! {
        #[test]
        fn any_cut_into_segments_is_right(cuts in proptest::collection::vec(0usize..700, 1..20)) {
            let (mut outgoing, mut incoming) = (Outgoing::new(5), Incoming::new(5));
            for cut in cuts {
                let mut buffer = vec![0; cut];
                outgoing.peek(&mut buffer);
                outgoing.advance(cut);
                prop_assert!(incoming.check(&buffer).is_ok());
            }
            prop_assert_eq!(outgoing.position(), incoming.position());
        }
    }
}
