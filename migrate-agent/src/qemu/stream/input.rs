//! Bytes that have arrived and are not read yet: a row of slices that is looked into without being
//! copied. Used by the stream's reader and by the return path's.
//!
//! It never holds more than what was given to it: no length that a peer states is allocated.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Slices in the order of their arrival.
#[derive(Debug, Default)]
pub(super) struct Input {
    chunks: VecDeque<Bytes>,
    /// Bytes in all chunks.
    length: usize,
    /// Bytes that were taken since the beginning.
    taken: u64,
}

impl Input {
    /// Adds what arrived.
    pub(super) fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.length += bytes.len();
            self.chunks.push_back(bytes);
        }
    }

    /// Bytes that wait here.
    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// How many bytes came before the next one.
    pub(super) fn offset(&self) -> u64 {
        self.taken
    }

    /// The next `wanted` bytes in one piece, left where they are; `None` while fewer are there.
    /// Only bytes that lie across two slices are copied.
    pub(super) fn peek(&mut self, wanted: usize) -> Option<&[u8]> {
        if self.length < wanted {
            return None;
        }
        if self.chunks.front().is_some_and(|front| front.len() < wanted) {
            let joined = self.join(wanted);
            self.length += joined.len();
            self.chunks.push_front(joined);
        }
        self.chunks.front().map_or(Some(&[][..]), |front| Some(&front[..wanted]))
    }

    /// The next byte, left where it is.
    pub(super) fn peek_byte(&self) -> Option<u8> {
        self.chunks.front().and_then(|front| front.first()).copied()
    }

    /// Takes the next `wanted` bytes; `None` while fewer are there.
    pub(super) fn take(&mut self, wanted: usize) -> Option<Bytes> {
        if self.length < wanted {
            return None;
        }
        self.taken += wanted as u64;
        if let Some(front) = self.chunks.front_mut().filter(|front| front.len() > wanted) {
            self.length -= wanted;
            return Some(front.split_to(wanted));
        }
        Some(self.join(wanted))
    }

    /// Takes the first slice, however long it is; `None` when nothing is there.
    pub(super) fn take_some(&mut self) -> Option<Bytes> {
        let first = self.chunks.pop_front()?;
        self.length -= first.len();
        self.taken += first.len() as u64;
        Some(first)
    }

    /// The first `wanted` bytes as one slice, which must be there; they leave the row.
    fn join(&mut self, wanted: usize) -> Bytes {
        self.length -= wanted;
        if self.chunks.front().is_some_and(|front| front.len() == wanted) {
            return self.chunks.pop_front().unwrap_or_default();
        }
        let mut joined = BytesMut::with_capacity(wanted);
        while joined.len() < wanted {
            let Some(front) = self.chunks.front_mut() else { break };
            let part = front.split_to(front.len().min(wanted - joined.len()));
            joined.extend_from_slice(&part);
            if front.is_empty() {
                self.chunks.pop_front();
            }
        }
        joined.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(chunks: &[&'static [u8]]) -> Input {
        let mut input = Input::default();
        chunks.iter().for_each(|chunk| input.push(Bytes::from_static(chunk)));
        input
    }

    #[test]
    fn what_lies_across_slices_is_one_piece() {
        let mut input = of(&[b"ab", b"", b"cd", b"efg"]);
        assert_eq!(input.peek(3), Some(&b"abc"[..]));
        assert_eq!((input.len(), input.offset()), (7, 0));
        assert_eq!(input.take(4).as_deref(), Some(&b"abcd"[..]));
        assert_eq!((input.len(), input.offset()), (3, 4));
        assert_eq!(input.take(4), None);
        assert_eq!(input.take_some().as_deref(), Some(&b"efg"[..]));
        assert_eq!((input.len(), input.offset(), input.peek_byte()), (0, 7, None));
    }

    #[test]
    fn a_slice_is_not_copied_when_it_is_whole() {
        let page = Bytes::from(vec![7; 64]);
        let mut input = Input::default();
        input.push(page.clone());
        assert_eq!(input.take(32).map(|taken| taken.as_ptr()), Some(page.as_ptr()));
        assert_eq!(input.take(32).map(|taken| taken.as_ptr()), Some(page[32..].as_ptr()));
    }

    #[test]
    fn nothing_is_always_there() {
        let mut input = of(&[]);
        assert_eq!(input.peek(0), Some(&[][..]));
        assert_eq!(input.take(0).as_deref(), Some(&[][..]));
        assert_eq!(input.peek(1), None);
    }
}
