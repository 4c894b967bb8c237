//! What comes on a source's stream: read, applied to the images, answered.
//!
//! Every stream of a migration has one [`receive`]; all share their [`Received`]. Deliberately not here: what
//! is there and what is newer (`incoming`), and what this side's guest does meanwhile.

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use super::super::frame::{Frame, FrameError, Kind, SPARES, decode_runs};
use super::super::stream::{FrameReader, FrameWriter, StreamError};
use super::super::versions::Version;
use super::files::zero;
use super::maps::{send_map, send_missing};
use super::{Answers, Disk, LONGEST, ReceiveError, Received, Source};
use crate::tasks;

/// Receives on one stream until its end.
///
/// # Errors
/// When the stream breaks or an image cannot be written; the peer is told of the latter.
pub async fn receive<R, W>(
    received: Arc<Received>,
    (reader, writer): (R, W),
) -> Result<(), ReceiveError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let (answers, mut to_write) = mpsc::unbounded_channel::<Frame>();
    let mut writer = FrameWriter::new(writer);
    let writing = tasks::spawn("answers about disks", async move {
        while let Some(frame) = to_write.recv().await {
            if writer.write(&frame).await.is_err() {
                return;
            }
        }
    });
    let mut reader = FrameReader::new(reader);
    let outcome = loop {
        let frame = match reader.next().await {
            Ok(Some(frame)) => frame,
            Ok(None) => break Ok(()),
            Err(error) => break Err(error.into()),
        };
        let (own, to) = (Arc::clone(&received), answers.clone());
        if let Err(error) = tasks::blocking(move || own.apply(&frame, &to)).await {
            if let Some((disk, errno)) = error.for_the_source() {
                let version = Version(errno.unsigned_abs().into());
                let _ = answers.send(Frame { version, ..Frame::new(Kind::Failed, disk) });
            }
            break Err(error);
        }
    };
    received.stop_wanting(&answers);
    drop(answers);
    let _ = writing.await;
    outcome
}

impl Received {
    /// Applies one frame and answers it. Blocks.
    fn apply(&self, frame: &Frame, answers: &Answers) -> Result<(), ReceiveError> {
        let failed = |source| ReceiveError::Write { disk: frame.disk, source };
        match frame.kind {
            Kind::Hello => {
                // First: what is asked for once the questions are forgotten has to go out.
                {
                    let mut wants = self.wants.lock().unwrap_or_else(PoisonError::into_inner);
                    wants.retain(|source| !source.answers.same_channel(answers));
                    let spares = frame.version >= SPARES;
                    wants.push(Source { answers: answers.clone(), spares });
                }
                self.announce(frame)?;
                // Whoever waits for a block asks again.
                self.arrivals.send_modify(|count| *count = count.wrapping_add(1));
                return Ok(());
            }
            Kind::Alive => {
                let _ = answers.send(frame.clone());
                return Ok(());
            }
            _ => self.wait_until_announced(frame.disk),
        }
        let disk = self.disk(frame.disk)?;
        disk.wait_until_free();
        match frame.kind {
            Kind::Data | Kind::Zeroes => self.content(&disk, frame)?,
            Kind::Resize => self.resize(&disk, frame)?,
            Kind::Flush => disk.file.sync_data().map_err(failed)?,
            Kind::Seal => {
                self.must_not_be_owned(frame.disk)?;
                if !disk.compared.load(Ordering::SeqCst) {
                    return Err(ReceiveError::NotCompared(frame.disk));
                }
                let runs = decode_runs(&frame.payload).map_err(StreamError::from)?;
                {
                    let mut incoming = disk.incoming();
                    // Before: what comes after a seal settles nothing.
                    incoming.settle(frame.settled);
                    incoming.seal(&runs);
                }
                disk.file.sync_all().map_err(failed)?;
                if let Some(kept) = &self.kept {
                    kept.save(frame.disk, || disk.incoming().save()).map_err(failed)?;
                }
                disk.sealed.store(true, Ordering::SeqCst);
            }
            Kind::Unseal => {
                {
                    let mut incoming = disk.incoming();
                    self.must_be_open(frame.disk)?;
                    self.must_not_be_owned(frame.disk)?;
                    disk.sealed.store(false, Ordering::SeqCst);
                    incoming.unseal();
                }
                if let Some(kept) = &self.kept {
                    kept.unseal(frame.disk).map_err(failed)?;
                }
            }
            Kind::AskMap if self.is_owned() => {
                send_missing(&disk, frame.disk, answers);
                return Ok(());
            }
            Kind::AskMap => {
                send_map(&disk, frame.disk, answers).map_err(failed)?;
                disk.compared.store(true, Ordering::SeqCst);
                return Ok(());
            }
            // What only a destination says: from a source it means nothing.
            _ => return Err(StreamError::from(FrameError::Contradiction).into()),
        }
        disk.incoming().settle(frame.settled);
        self.arrivals.send_modify(|count| *count = count.wrapping_add(1));
        // Whoever cannot be answered any more asks again over the next connection.
        let _ = answers.send(Frame { version: frame.version, ..Frame::new(Kind::Ack, frame.disk) });
        Ok(())
    }

    fn content(&self, disk: &Disk, frame: &Frame) -> Result<(), ReceiveError> {
        let failed = |source| ReceiveError::Write { disk: frame.disk, source };
        let range = frame.range();
        // Held while it is written: a newer update must not land between the look and the write.
        let mut incoming = disk.incoming();
        self.must_be_open(frame.disk)?;
        if range.end > incoming.length() {
            self.must_not_be_owned(frame.disk)?;
            if range.end > LONGEST {
                return Err(ReceiveError::BeyondEnd(frame.disk));
            }
        }
        let parts = incoming.arrived(&range, frame.version);
        if let Some(end) = parts.last().map(|part| part.end).filter(|end| *end > incoming.length())
        {
            // A write past the end makes the image longer, as it did at the source: qcow2 grows so.
            disk.file.set_len(end).map_err(failed)?;
            incoming.resize(end);
        }
        for part in parts {
            let written = match frame.kind {
                Kind::Data => {
                    let from = (part.start - range.start) as usize;
                    let length = (part.end - part.start) as usize;
                    disk.file.write_all_at(&frame.payload[from..from + length], part.start)
                }
                _ => zero(&disk.file, &part),
            };
            written.map_err(failed)?;
        }
        Ok(())
    }

    fn resize(&self, disk: &Disk, frame: &Frame) -> Result<(), ReceiveError> {
        let length = frame.offset;
        if length > LONGEST {
            return Err(ReceiveError::Length { disk: frame.disk, length });
        }
        let mut incoming = disk.incoming();
        self.must_be_open(frame.disk)?;
        self.must_not_be_owned(frame.disk)?;
        let before = incoming.length();
        let zeroes = incoming.resized(length, frame.version);
        let failed = |source| ReceiveError::Write { disk: frame.disk, source };
        zeroes.iter().try_for_each(|part| zero(&disk.file, part)).map_err(failed)?;
        if incoming.length() != before {
            disk.file.set_len(incoming.length()).map_err(failed)?;
        }
        Ok(())
    }
}
