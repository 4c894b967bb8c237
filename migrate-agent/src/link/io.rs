//! Frames over a byte stream: a reader and a writer half. Knows no TLS and no meaning.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use lifeboat_scatter_gather::link::frame::{self, Frame, FrameError, HEADER_BYTES};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes asked of the socket at once. Larger reads cost fewer system calls and more memory per
/// link; beyond this size neither was measured to matter.
const READ_BYTES: usize = 256 << 10;

/// Why a link is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The socket failed.
    #[error("page link broke")]
    Io(#[from] io::Error),
    /// The other side closed it.
    #[error("page link was closed by the other side")]
    Closed,
    /// The other side sent what is no frame.
    #[error("page link carried what is no frame")]
    Frame(#[from] FrameError),
    /// Nothing came for too long.
    #[error("no word on the page link for {} ms", .0.as_millis())]
    Silent(Duration),
    /// A frame came that has no place here.
    #[error("the other side sent {got} where {wanted} was expected")]
    Unexpected {
        /// What came.
        got: &'static str,
        /// What should have come.
        wanted: &'static str,
    },
    /// The page address cannot be used.
    #[error("page address `{address}` is not HOST:PORT")]
    Address {
        /// What was given.
        address: String,
    },
    /// TLS said no.
    #[error("page link to {address}: the other side's certificate was not accepted")]
    Tls {
        /// The peer.
        address: String,
        /// What TLS said.
        #[source]
        source: io::Error,
    },
    /// The other side is not an agent.
    #[error("page links are for agents only: {0}")]
    Role(String),
}

/// A frame's name for errors and logs.
#[must_use]
pub const fn frame_name(frame: &Frame) -> &'static str {
    match frame {
        Frame::Hello(_) => "HELLO",
        Frame::Welcome => "WELCOME",
        Frame::Stream(_) => "STREAM",
        Frame::End(_) => "END",
        Frame::Ack(_) => "ACK",
        Frame::Loaded(_) => "LOADED",
        Frame::Commit(_) => "COMMIT",
        Frame::Running(_) => "RUNNING",
        Frame::Abort(_) => "ABORT",
        Frame::Refused(_) => "REFUSED",
        Frame::Standing(_) => "STANDING",
        Frame::Ping(_) => "PING",
        Frame::Pong(_) => "PONG",
        Frame::Notes(_) => "NOTES",
        Frame::Fetch(_) => "FETCH",
        Frame::Pages(_) => "PAGES",
        Frame::Compressed(_) => "COMPRESSED",
        Frame::Key(_) => "KEY",
        Frame::Pack(_) => "PACK",
        Frame::Parity { .. } => "PARITY",
        Frame::Scattered => "SCATTERED",
        Frame::Released(_) => "RELEASED",
    }
}

/// The reading half of a link.
pub struct FrameReader {
    from: Box<dyn AsyncRead + Send + Sync + Unpin>,
    buffer: BytesMut,
}

impl FrameReader {
    /// A reader of `from`.
    pub fn new(from: impl AsyncRead + Send + Sync + Unpin + 'static) -> Self {
        Self { from: Box::new(from), buffer: BytesMut::with_capacity(READ_BYTES) }
    }

    /// The next frame. Cancel-safe: what was read stays in the buffer.
    ///
    /// # Errors
    /// [`LinkError`]; `Closed` at the end of the stream.
    pub async fn next(&mut self) -> Result<Frame, LinkError> {
        loop {
            if let Some(frame) = frame::decode(&mut self.buffer)? {
                return Ok(frame);
            }
            // Room for a whole read; a chunk whose frames are still in use is not copied.
            self.buffer.reserve(READ_BYTES + HEADER_BYTES);
            let read = match self.from.read_buf(&mut self.buffer).await {
                // TLS that ends without a farewell: frames say by themselves what is whole.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
                read => read?,
            };
            if read == 0 {
                return Err(LinkError::Closed);
            }
        }
    }

    /// The stream beneath, for what is not ours; what was read already comes first.
    pub fn into_stream(self) -> impl AsyncRead + Send + Sync + Unpin + 'static {
        io::Cursor::new(self.buffer).chain(self.from)
    }

    /// The next frame, if it comes within `limit`.
    ///
    /// # Errors
    /// As [`FrameReader::next`], and `Silent`.
    pub async fn next_within(&mut self, limit: Duration) -> Result<Frame, LinkError> {
        match tokio::time::timeout(limit, self.next()).await {
            Ok(frame) => frame,
            Err(_) => Err(LinkError::Silent(limit)),
        }
    }
}

/// The writing half of a link.
pub struct FrameWriter {
    to: Box<dyn AsyncWrite + Send + Sync + Unpin>,
    buffer: BytesMut,
}

impl FrameWriter {
    /// A writer to `to`.
    pub fn new(to: impl AsyncWrite + Send + Sync + Unpin + 'static) -> Self {
        Self { to: Box::new(to), buffer: BytesMut::with_capacity(1024) }
    }

    /// The stream beneath, for what is not ours.
    pub fn into_stream(self) -> impl AsyncWrite + Send + Sync + Unpin + 'static {
        self.to
    }

    /// Writes one frame and flushes it.
    ///
    /// # Errors
    /// When the socket fails.
    pub async fn send(&mut self, frame: &Frame) -> Result<(), LinkError> {
        self.buffer.clear();
        frame::encode(frame, &mut self.buffer);
        self.to.write_all(&self.buffer).await?;
        self.to.flush().await?;
        Ok(())
    }

    /// Writes one frame in pieces of `piece` bytes, each after what `wait` says of its length.
    ///
    /// # Errors
    /// When the socket fails.
    pub async fn send_in_pieces(
        &mut self,
        frame: &Frame,
        piece: usize,
        mut wait: impl FnMut(usize) -> Duration,
    ) -> Result<(), LinkError> {
        self.buffer.clear();
        frame::encode(frame, &mut self.buffer);
        for piece in self.buffer.chunks(piece.max(1)) {
            let wait = wait(piece.len());
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            self.to.write_all(piece).await?;
            self.to.flush().await?;
        }
        Ok(())
    }

    /// Writes a STREAM frame of `payload` without copying it.
    ///
    /// # Errors
    /// When the socket fails.
    ///
    /// # Panics
    /// When the payload exceeds a frame's largest.
    pub async fn send_stream(&mut self, payload: &[u8]) -> Result<(), LinkError> {
        self.to.write_all(&frame::stream_header(payload.len())).await?;
        self.to.write_all(payload).await?;
        self.to.flush().await?;
        Ok(())
    }

    /// Says that nothing more will come.
    pub async fn close(&mut self) {
        // The other side notices the end either way.
        let _ = self.to.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_frame_in_pieces_is_the_same_frame_and_each_piece_is_paid_for() {
        let (near, far) = tokio::io::duplex(1 << 20);
        let (mut writer, mut reader) = (FrameWriter::new(near), FrameReader::new(far));
        let frame = Frame::Stream(vec![7; 100_000].into());
        let mut paid = Vec::new();
        let pay = |bytes| {
            paid.push(bytes);
            Duration::ZERO
        };
        writer.send_in_pieces(&frame, 16 << 10, pay).await.unwrap();
        assert_eq!(reader.next().await.unwrap(), frame);
        assert_eq!(paid.iter().sum::<usize>(), HEADER_BYTES + 100_000);
        assert!(paid.len() == 7 && paid.iter().all(|bytes| *bytes <= 16 << 10), "{paid:?}");
    }
}
