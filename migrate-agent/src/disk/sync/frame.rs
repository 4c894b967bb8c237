//! What two agents exchange about a disk: frames, bytes to values and back.
//!
//! `send` and `receive` put them on streams. Pure. Each frame is checked by itself (xxh3 over
//! everything else in it), so that a broken one is told from a late one. Big-endian.
//!
//! ```text
//!  0      2     3      4     6      8        12        16        24         32       40     48
//!  | "LD" | ver | kind | disk | zero | payload | zero    | version | settled  | offset | len  | check | payload...
//! ```
//!
//! * `version`: the update's number; of a question, its number; 0 where there is none.
//! * `settled`: every update up to this one is acknowledged ([`super::versions`]).
//! * `offset`, `len`: bytes of the image. Payload only where it differs from zeroes: at most 1 MiB.
//!
//! Deliberately not here: what a frame does, and TLS, which is the stream's.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use xxhash_rust::xxh3::Xxh3;

use super::versions::Version;

/// Bytes of a frame's header.
pub const HEADER: usize = 56;
/// The most bytes of a payload: one FUSE write, twice a transfer block.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// The version of this protocol.
pub const PROTOCOL: u8 = 1;

/// What a source says in `version` of its [`Kind::Hello`] that leaves out what it is told of; before, 0.
pub const SPARES: Version = Version(1);

const MAGIC: [u8; 2] = *b"LD";
const CHECK_AT: usize = 48;

/// A frame that cannot be read. The stream is of no use after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Something else than our frames is coming.
    #[error("what arrives is no frame about a disk")]
    Foreign,
    /// A newer or older agent.
    #[error("the peer speaks version {theirs} of the disk protocol, this agent version {PROTOCOL}")]
    Protocol {
        /// The peer's.
        theirs: u8,
    },
    /// A kind that we do not know.
    #[error("a frame about a disk is of the unknown kind {0}")]
    Kind(u8),
    /// A payload that is longer than any may be.
    #[error("a frame about a disk claims a payload of {0} bytes")]
    TooLong(u32),
    /// The check does not fit: it was damaged on its way.
    #[error("a frame about a disk was damaged on its way")]
    Damaged,
    /// Its fields contradict each other or lie beyond any image.
    #[error("a frame about a disk contradicts itself")]
    Contradiction,
}

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Source: a disk has this length, in blocks of `offset` bytes. First for each disk. From `version`
    /// [`SPARES`] on it understands [`Kind::Overwritten`].
    Hello = 1,
    /// Source: content.
    Data = 2,
    /// Source: zeroes; a hole, where the file system can make one.
    Zeroes = 3,
    /// Source: the image has length `offset` now.
    Resize = 4,
    /// Source: make durable whatever is applied.
    Flush = 5,
    /// Source: nothing changes from here on. The payload lists blocks that are not there yet.
    Seal = 6,
    /// Source: it changes again after all.
    Unseal = 7,
    /// Source: which blocks are there? Answered with [`Kind::Map`].
    AskMap = 8,
    /// Destination: update `version` is applied (after a flush: durable).
    Ack = 9,
    /// Destination: hashes of the blocks from byte `offset` on, 8 bytes each; 0 is not there.
    Map = 10,
    /// Destination: a guest reads here; send it first.
    Want = 11,
    /// Destination: it cannot go on; `version` is an errno.
    Failed = 12,
    /// Either: still alive.
    Alive = 13,
    /// Destination: its guest has overwritten all of this; it need not come any more.
    Overwritten = 14,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Hello,
        Self::Data,
        Self::Zeroes,
        Self::Resize,
        Self::Flush,
        Self::Seal,
        Self::Unseal,
        Self::AskMap,
        Self::Ack,
        Self::Map,
        Self::Want,
        Self::Failed,
        Self::Alive,
        Self::Overwritten,
    ];

    fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it says.
    pub kind: Kind,
    /// About which disk of the VM.
    pub disk: u16,
    /// The update's or question's number.
    pub version: Version,
    /// Everything up to this is acknowledged.
    pub settled: Version,
    /// Where in the image, bytes.
    pub offset: u64,
    /// How much of it, bytes.
    pub length: u64,
    /// Content, a list, hashes.
    pub payload: Bytes,
}

impl Frame {
    /// A frame of `kind` about `disk` with everything else zero.
    #[must_use]
    pub fn new(kind: Kind, disk: u16) -> Self {
        let none = Version(0);
        Self {
            kind,
            disk,
            version: none,
            settled: none,
            offset: 0,
            length: 0,
            payload: Bytes::new(),
        }
    }

    /// The bytes of the image that it is about.
    #[must_use]
    pub fn range(&self) -> std::ops::Range<u64> {
        self.offset..self.offset.saturating_add(self.length)
    }

    /// Appends its bytes to `out`.
    ///
    /// # Panics
    /// When the payload is longer than [`MAX_PAYLOAD`].
    pub fn encode(&self, out: &mut BytesMut) {
        assert!(self.payload.len() <= MAX_PAYLOAD, "a payload fits into a frame");
        out.reserve(HEADER + self.payload.len());
        let mut header = [0; HEADER];
        let mut fields = &mut header[..];
        fields.put_slice(&MAGIC);
        fields.put_u8(PROTOCOL);
        fields.put_u8(self.kind as u8);
        fields.put_u16(self.disk);
        fields.put_u16(0);
        fields.put_u32(self.payload.len() as u32);
        fields.put_u32(0);
        fields.put_u64(self.version.0);
        fields.put_u64(self.settled.0);
        fields.put_u64(self.offset);
        fields.put_u64(self.length);
        let check = check(&header[..CHECK_AT], &self.payload);
        header[CHECK_AT..].copy_from_slice(&check.to_be_bytes());
        out.put_slice(&header);
        out.put_slice(&self.payload);
    }
}

fn check(header: &[u8], payload: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(header);
    hash.update(payload);
    hash.digest()
}

/// Takes the frame that `buffer` begins with out of it; `Ok(None)` when it is not complete yet.
///
/// # Errors
/// When it is none of ours, damaged or absurd.
pub fn decode(buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
    let Some(header) = buffer.first_chunk::<HEADER>() else { return Ok(None) };
    let mut fields = &header[..];
    if fields.copy_to_bytes(2)[..] != MAGIC {
        return Err(FrameError::Foreign);
    }
    let theirs = fields.get_u8();
    if theirs != PROTOCOL {
        return Err(FrameError::Protocol { theirs });
    }
    let number = fields.get_u8();
    let (disk, _) = (fields.get_u16(), fields.get_u16());
    let claimed = fields.get_u32();
    fields.advance(4);
    let length = claimed as usize;
    if length > MAX_PAYLOAD {
        return Err(FrameError::TooLong(claimed));
    }
    let Some(payload) = buffer.get(HEADER..HEADER + length) else { return Ok(None) };
    if header[CHECK_AT..] != check(&header[..CHECK_AT], payload).to_be_bytes() {
        return Err(FrameError::Damaged);
    }
    let kind = Kind::of(number).ok_or(FrameError::Kind(number))?;
    let (version, settled) = (Version(fields.get_u64()), Version(fields.get_u64()));
    let (offset, extent) = (fields.get_u64(), fields.get_u64());
    let whole = buffer.split_to(HEADER + length).freeze();
    let payload = whole.slice(HEADER..);
    let frame = Frame { kind, disk, version, settled, offset, length: extent, payload };
    if is_sensible(&frame) { Ok(Some(frame)) } else { Err(FrameError::Contradiction) }
}

/// Ends within what a file can be, and content is as long as it says.
fn is_sensible(frame: &Frame) -> bool {
    let end = frame.offset.checked_add(frame.length);
    let within = end.is_some_and(|end| i64::try_from(end).is_ok());
    let fits = match frame.kind {
        Kind::Data => frame.length == frame.payload.len() as u64 && frame.length > 0,
        Kind::Zeroes => frame.payload.is_empty() && frame.length > 0,
        Kind::Seal => frame.payload.len().is_multiple_of(16),
        Kind::Map => frame.payload.len().is_multiple_of(8),
        _ => frame.payload.is_empty(),
    };
    within && fits
}

/// Runs of blocks as a seal's payload: first block and count, 8 bytes each. What does not fit into
/// one frame is returned beside it.
#[must_use]
pub fn encode_runs(runs: &[std::ops::Range<u64>]) -> (Bytes, &[std::ops::Range<u64>]) {
    let (now, rest) = runs.split_at(runs.len().min(MAX_PAYLOAD / 16));
    let mut out = BytesMut::with_capacity(now.len() * 16);
    for run in now {
        out.put_u64(run.start);
        out.put_u64(run.end.saturating_sub(run.start));
    }
    (out.freeze(), rest)
}

/// The runs of blocks in a seal's payload.
///
/// # Errors
/// When a run ends beyond every number.
pub fn decode_runs(payload: &[u8]) -> Result<Vec<std::ops::Range<u64>>, FrameError> {
    let mut runs = Vec::new();
    for mut pair in payload.chunks_exact(16) {
        let (start, count) = (pair.get_u64(), pair.get_u64());
        let end = start.checked_add(count).ok_or(FrameError::Contradiction)?;
        runs.push(start..end);
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn data() -> Frame {
        Frame {
            version: Version(7),
            settled: Version(5),
            offset: 4096,
            length: 5,
            payload: Bytes::from_static(b"hello"),
            ..Frame::new(Kind::Data, 1)
        }
    }

    fn bytes_of(frame: &Frame) -> BytesMut {
        let mut out = BytesMut::new();
        frame.encode(&mut out);
        out
    }

    #[test]
    fn a_frame_has_its_fields_where_the_picture_says() {
        let bytes = bytes_of(&data());
        assert_eq!(bytes.len(), HEADER + 5);
        assert_eq!(&bytes[..8], b"LD\x01\x02\x00\x01\x00\x00");
        assert_eq!(&bytes[8..16], [0, 0, 0, 5, 0, 0, 0, 0]);
        assert_eq!(bytes[23..24], [7]);
        assert_eq!(bytes[31..32], [5]);
        assert_eq!(bytes[38..40], [16, 0]);
        assert_eq!(bytes[47..48], [5]);
        assert_eq!(&bytes[HEADER..], b"hello");
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = bytes_of(&data());
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(!matches!(decode(&mut bad), Ok(Some(_))), "bit {bit}");
        }
    }

    #[test]
    fn frames_that_contradict_themselves_are_refused() {
        let refused = |frame: Frame| {
            assert_eq!(decode(&mut bytes_of(&frame)), Err(FrameError::Contradiction), "{frame:?}");
        };
        refused(Frame { length: 6, ..data() });
        refused(Frame { offset: i64::MAX as u64, ..data() });
        refused(Frame { kind: Kind::Zeroes, ..data() });
        refused(Frame { kind: Kind::Map, ..data() });
        refused(Frame { kind: Kind::Ack, ..data() });
        refused(Frame { offset: u64::MAX, length: u64::MAX, ..Frame::new(Kind::Want, 0) });
    }

    #[test]
    fn a_length_that_is_stated_is_not_believed() {
        let mut bytes = bytes_of(&data());
        bytes[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(decode(&mut bytes), Err(FrameError::TooLong(u32::MAX)));
    }

    #[test]
    fn runs_come_back_and_overlong_lists_are_split() {
        let runs: Vec<_> = (0..70_000_u64).map(|i| i * 3..i * 3 + 2).collect();
        let (first, rest) = encode_runs(&runs);
        let (second, nothing) = encode_runs(rest);
        assert!(nothing.is_empty());
        let both = [decode_runs(&first).unwrap(), decode_runs(&second).unwrap()].concat();
        assert_eq!(both, runs);
        let mut overflow = [0xff; 16];
        overflow[15] = 1;
        assert_eq!(decode_runs(&overflow), Err(FrameError::Contradiction));
    }

    fn any_frame() -> impl Strategy<Value = Frame> {
        let numbers = (any::<u16>(), any::<u64>(), any::<u64>(), 0..1_u64 << 62);
        (0..Kind::ALL.len(), numbers, prop::collection::vec(any::<u8>(), 0..200)).prop_map(
            |(kind, (disk, version, settled, offset), mut payload)| {
                let kind = Kind::ALL[kind];
                match kind {
                    Kind::Data => payload.push(1),
                    Kind::Seal | Kind::Map => payload.truncate(payload.len() / 16 * 16),
                    _ => payload.clear(),
                }
                let length = if kind == Kind::Data { payload.len() as u64 } else { 512 };
                let (version, settled) = (Version(version), Version(settled));
                Frame { kind, disk, version, settled, offset, length, payload: payload.into() }
            },
        )
    }

    proptest! {
        #[test]
        fn frames_come_back_however_they_are_cut(
            frames in prop::collection::vec(any_frame(), 1..6),
            cut in 1_usize..300,
        ) {
            let mut bytes = BytesMut::new();
            frames.iter().for_each(|frame| frame.encode(&mut bytes));
            let (mut buffer, mut found) = (BytesMut::new(), Vec::new());
            for piece in bytes.chunks(cut) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = decode(&mut buffer).unwrap() {
                    found.push(frame);
                }
            }
            prop_assert_eq!(found, frames);
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn any_bytes_are_refused_or_incomplete(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            prop_assert!(!matches!(decode(&mut buffer), Ok(Some(_))));
        }

        #[test]
        fn any_bytes_behind_a_good_beginning_are_refused_or_incomplete(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut buffer = BytesMut::from(&[b'L', b'D', PROTOCOL][..]);
            buffer.extend_from_slice(&bytes);
            prop_assert!(!matches!(decode(&mut buffer), Ok(Some(_))));
        }
    }
}
