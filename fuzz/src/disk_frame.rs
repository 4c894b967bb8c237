//! The frames in which a disk travels.

use bytes::BytesMut;
use lifeboat_agent::disk::sync::frame::{decode, decode_runs, encode_runs};

use super::pieces::{cut, frames};

/// Whatever another agent sends.
///
/// # Panics
/// Where something does not hold.
pub fn holds(data: &[u8]) {
    let Some((pieces, whole)) = cut(data) else { return };
    let (read, end) = frames(&pieces, decode);
    let (all, whole_end) = frames(std::slice::from_ref(&whole), decode);
    assert_eq!((&read, end.is_ok()), (&all, whole_end.is_ok()));
    let mut written = BytesMut::new();
    read.iter().for_each(|frame| frame.encode(&mut written));
    let (again, end) = frames(&[written.freeze()], decode);
    assert!(again == read && end.is_ok(), "what was written is read again: {end:?}");
    if let Ok(runs) = decode_runs(&whole) {
        assert!(runs.iter().all(|run| run.start <= run.end));
        let (again, left) = encode_runs(&runs);
        let first = &runs[..runs.len() - left.len()];
        assert!(decode_runs(&again).is_ok_and(|again| again == first));
    }
}
