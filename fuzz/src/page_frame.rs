//! The frames of the page link between two agents.

use bytes::{Bytes, BytesMut};
use lifeboat_scatter_gather::link::frame::{Frame, FrameError, decode, encode};

/// Whatever another agent sends.
///
/// # Panics
/// Where something does not hold.
pub fn holds(data: &[u8]) {
    let Some((pieces, whole)) = super::pieces::cut(data) else { return };
    let (frames, end) = read(&pieces);
    let (all, whole_end) = read(&[whole]);
    assert_eq!((&frames, end.is_ok()), (&all, whole_end.is_ok()));
    let mut written = BytesMut::new();
    frames.iter().for_each(|frame| encode(frame, &mut written));
    let (again, end) = read(&[written.freeze()]);
    assert!(again == frames && end.is_ok(), "what was written is read again: {end:?}");
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
