//! Frames on a stream: what both drivers need of one.
//!
//! Used by `send` and `receive`. Deliberately not here: which frames, and TLS.

use std::io;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::frame::{Frame, FrameError, decode};

/// A stream that is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// It broke or ended.
    #[error("the connection about disks broke")]
    Io(#[from] io::Error),
    /// What arrived makes no sense.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// Frames out of a stream.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads from `stream`.
    pub fn new(stream: R) -> Self {
        Self { stream, buffer: BytesMut::with_capacity(64 << 10) }
    }

    /// The next frame; `None` at the end of the stream, between two frames. May be dropped at any
    /// await: nothing that was read is lost.
    ///
    /// # Errors
    /// When the stream breaks, also inside a frame, or a frame makes no sense.
    pub async fn next(&mut self) -> Result<Option<Frame>, StreamError> {
        loop {
            if let Some(frame) = decode(&mut self.buffer)? {
                return Ok(Some(frame));
            }
            let read = match self.stream.read_buf(&mut self.buffer).await {
                // TLS that ends without a farewell: frames say by themselves what is whole.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
                read => read?,
            };
            if read > 0 {
                continue;
            }
            return match self.buffer.is_empty() {
                true => Ok(None),
                false => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            };
        }
    }
}

/// Frames into a stream.
#[derive(Debug)]
pub struct FrameWriter<W> {
    stream: W,
    buffer: BytesMut,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// Writes to `stream`.
    pub fn new(stream: W) -> Self {
        Self { stream, buffer: BytesMut::new() }
    }

    /// Writes one frame, whole. Not to be dropped half way.
    ///
    /// # Errors
    /// When the stream breaks.
    pub async fn write(&mut self, frame: &Frame) -> Result<(), StreamError> {
        self.buffer.clear();
        frame.encode(&mut self.buffer);
        self.stream.write_all(&self.buffer).await?;
        self.stream.flush().await?;
        Ok(())
    }

    /// Ends the stream in this direction.
    ///
    /// # Errors
    /// When it is broken.
    pub async fn shutdown(&mut self) -> Result<(), StreamError> {
        Ok(self.stream.shutdown().await?)
    }
}
