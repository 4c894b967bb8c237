//! The frames of the page link between two agents.

use bytes::BytesMut;
use lifeboat_scatter_gather::link::frame::{decode, encode};

use super::pieces::{cut, frames};

/// Whatever another agent sends.
///
/// # Panics
/// Where something does not hold.
pub fn holds(data: &[u8]) {
    let Some((pieces, whole)) = cut(data) else { return };
    let (read, end) = frames(&pieces, decode);
    let (all, whole_end) = frames(&[whole], decode);
    assert_eq!((&read, end.is_ok()), (&all, whole_end.is_ok()));
    let mut written = BytesMut::new();
    read.iter().for_each(|frame| encode(frame, &mut written));
    let (again, end) = frames(&[written.freeze()], decode);
    assert!(again == read && end.is_ok(), "what was written is read again: {end:?}");
}
