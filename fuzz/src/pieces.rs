//! Bytes cut as a socket might give them. An input's first byte says how: its checks hold for each way.

use bytes::{Bytes, BytesMut};

/// The rest of `data` in pieces, and as a whole; `None` for an input without a first byte.
#[must_use]
pub fn cut(data: &[u8]) -> Option<(Vec<Bytes>, Bytes)> {
    let (how, rest) = data.split_first()?;
    let whole = Bytes::copy_from_slice(rest);
    // Pieces of one byte up to more than a page, and never the same length twice in a row.
    let mut length = usize::from(*how) * 37 + 1;
    let (mut left, mut pieces) = (whole.clone(), Vec::new());
    while !left.is_empty() {
        pieces.push(left.split_to(length.min(left.len())));
        length = (length * 7 + 3) % 5000 + 1;
    }
    Some((pieces, whole))
}

/// All frames of `pieces` as they come, up to the first error of `decode`, and that.
pub fn frames<F, E>(
    pieces: &[Bytes],
    decode: impl Fn(&mut BytesMut) -> Result<Option<F>, E>,
) -> (Vec<F>, Result<(), E>) {
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
