//! What was told about a guest's pages, kept for an agent that takes over from this one: the very
//! frames, one behind the other. Written as they come and read back in the same order.
//!
//! Not fsynced: it is of use only while the guest's QEMU lives, and that ends with the host.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use bytes::BytesMut;
use lifeboat_scatter_gather::link::{Frame, FrameError, decode, encode};

/// Why a journal cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file.
    #[error("what was told of the guest's pages cannot be read back")]
    Io(#[from] io::Error),
    /// What is in it. A last frame that was cut off by the end of the agent is no error.
    #[error("what was told of the guest's pages is damaged")]
    Frame(#[from] FrameError),
}

/// The frames of one guest.
#[derive(Debug)]
pub(in crate::destination) struct Journal {
    file: File,
    buffer: BytesMut,
    /// It is not whole any more: a frame could not be written. What was written before stays of use.
    broken: bool,
}

impl Journal {
    /// Begins one, in the place of any that is there.
    pub(in crate::destination) fn begin(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
        Ok(Self { file, buffer: BytesMut::new(), broken: false })
    }

    /// Adds a frame. After one that could not be added none is, so that what is there is what was told, up to
    /// some point: whoever reads it misses its end ([`super::index`]).
    pub(in crate::destination) fn add(&mut self, frame: &Frame) -> io::Result<()> {
        if self.broken {
            return Ok(());
        }
        self.buffer.clear();
        encode(frame, &mut self.buffer);
        let written = self.file.write_all(&self.buffer);
        self.broken = written.is_err();
        written
    }

    /// Reads what is there and goes on behind it.
    pub(in crate::destination) fn go_on(path: &Path) -> Result<(Self, Vec<Frame>), JournalError> {
        let mut bytes = BytesMut::from(&std::fs::read(path)?[..]);
        let whole = bytes.len();
        let mut frames = Vec::new();
        while let Some(frame) = decode(&mut bytes)? {
            frames.push(frame);
        }
        let file = OpenOptions::new().append(true).open(path)?;
        file.set_len((whole - bytes.len()) as u64)?;
        Ok((Self { file, buffer: BytesMut::new(), broken: false }, frames))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_that_was_cut_off_is_left_out_and_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let mut journal = Journal::begin(&path).unwrap();
        journal.add(&Frame::Ping(1)).unwrap();
        journal.add(&Frame::Scattered).unwrap();
        drop(journal);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend_from_slice(&[1, 0, 0]);
        std::fs::write(&path, bytes).unwrap();
        let (mut journal, frames) = Journal::go_on(&path).unwrap();
        assert_eq!(frames, [Frame::Ping(1), Frame::Scattered]);
        journal.add(&Frame::Ping(2)).unwrap();
        let (_, frames) = Journal::go_on(&path).unwrap();
        assert_eq!(frames, [Frame::Ping(1), Frame::Scattered, Frame::Ping(2)]);
    }
}
