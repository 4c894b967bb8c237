//! The heartbeat's two datagrams: bytes to values and back.
//!
//! The client asks with a sequence number; the guest answers with the same number and what it
//! knows of itself. The boot id is the kernel's own (random per boot): the same id after a
//! migration proves that it is the same living guest and not one that was started anew.
//! A datagram of any other shape is no heartbeat (`None`): the port is open to everybody.
//!
//! ```text
//! question  "LBHB" u32 | version u32 = 1 | sequence u64
//! answer    question | tick u64 | writes u64 | checked u64 | errors u64 | boot id 16 bytes
//! ```
//! All integers big-endian.

const MAGIC: [u8; 8] = *b"LBHB\0\0\0\x01";
/// Bytes of a question.
pub(crate) const QUESTION_BYTES: usize = 16;
/// Bytes of an answer.
pub(crate) const ANSWER_BYTES: usize = QUESTION_BYTES + 4 * 8 + 16;

/// What a guest says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Answer {
    /// The question's sequence number.
    pub(crate) sequence: u64,
    /// The guest's own counter: grows with every answer, never falls in one life.
    pub(crate) tick: u64,
    /// Pages written since boot (`Region::writes`).
    pub(crate) writes: u64,
    /// Pages checked since boot.
    pub(crate) checked: u64,
    /// Wrong pages and wrong stream bytes found since boot: 0 is the verdict "unharmed".
    pub(crate) errors: u64,
    /// The kernel's boot id.
    pub(crate) boot_id: [u8; 16],
}

/// The bytes of a question.
pub(crate) fn question(sequence: u64) -> [u8; QUESTION_BYTES] {
    let mut bytes = [0; QUESTION_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..].copy_from_slice(&sequence.to_be_bytes());
    bytes
}

/// The sequence number of a question.
pub(crate) fn read_question(bytes: &[u8]) -> Option<u64> {
    let bytes: &[u8; QUESTION_BYTES] = bytes.try_into().ok()?;
    (bytes[..8] == MAGIC).then(|| be(&bytes[8..]))
}

/// The bytes of an answer.
pub(crate) fn answer(answer: &Answer) -> [u8; ANSWER_BYTES] {
    let mut bytes = [0; ANSWER_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    let words = [answer.sequence, answer.tick, answer.writes, answer.checked, answer.errors];
    for (slot, word) in bytes[8..48].chunks_exact_mut(8).zip(words) {
        slot.copy_from_slice(&word.to_be_bytes());
    }
    bytes[48..].copy_from_slice(&answer.boot_id);
    bytes
}

/// The answer that `bytes` hold.
pub(crate) fn read_answer(bytes: &[u8]) -> Option<Answer> {
    let bytes: &[u8; ANSWER_BYTES] = bytes.try_into().ok()?;
    if bytes[..8] != MAGIC {
        return None;
    }
    let word = |at: usize| be(&bytes[at..at + 8]);
    let boot_id = bytes[48..].try_into().ok()?;
    Some(Answer {
        sequence: word(8),
        tick: word(16),
        writes: word(24),
        checked: word(32),
        errors: word(40),
        boot_id,
    })
}

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_question_has_this_shape() {
        assert_eq!(question(258), *b"LBHB\0\0\0\x01\0\0\0\0\0\0\x01\x02");
        assert_eq!(read_question(&question(258)), Some(258));
    }

    proptest! {
        #[test]
        fn an_answer_survives_its_bytes(w in any::<[u64; 5]>(), boot_id in any::<[u8; 16]>()) {
            let [sequence, tick, writes, checked, errors] = w;
            let value = Answer { sequence, tick, writes, checked, errors, boot_id };
            prop_assert_eq!(read_answer(&answer(&value)), Some(value));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = read_answer(&bytes);
            let _ = read_question(&bytes);
        }
    }
}
