//! The frames in which a disk travels.

use bytes::{Bytes, BytesMut};
use lifeboat_agent::disk::sync::frame::{Frame, FrameError, decode, decode_runs, encode_runs};

/// Whatever another agent sends.
///
/// # Panics
/// Where something does not hold.
pub fn holds(data: &[u8]) {
    let Some((pieces, whole)) = super::pieces::cut(data) else { return };
    let (frames, end) = read(&pieces);
    let (all, whole_end) = read(std::slice::from_ref(&whole));
    assert_eq!((&frames, end.is_ok()), (&all, whole_end.is_ok()));
    let mut written = BytesMut::new();
    frames.iter().for_each(|frame| frame.encode(&mut written));
    let (again, end) = read(&[written.freeze()]);
    assert!(again == frames && end.is_ok(), "what was written is read again: {end:?}");
    if let Ok(runs) = decode_runs(&whole) {
        assert!(runs.iter().all(|run| run.start <= run.end));
        let (again, left) = encode_runs(&runs);
        let first = &runs[..runs.len() - left.len()];
        assert!(decode_runs(&again).is_ok_and(|again| again == first));
    }
}

fn read(pieces: &[Bytes]) -> (Vec<Frame>, Result<(), FrameError>) {
    let (mut buffer, mut frames) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        buffer.extend_from_slice(piece);
        loop {
            match decode(&mut buffer) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Err(error)),
            }
        }
    }
    (frames, Ok(()))
}
