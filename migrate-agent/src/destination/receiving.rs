//! From the link's HELLO to a QEMU that has loaded everything and stands paused.

use std::time::Duration;

use lifeboat_protocol::agent::Phase;
use lifeboat_protocol::terms::Mode;
use lifeboat_protocol::units::Bytes;
use lifeboat_scatter_gather::link::{Ended, Frame};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use xxhash_rust::xxh3::Xxh3Default;

use super::arriving::Arriving;
use super::disk::ArrivingDisks;
use super::{DestinationTask, Input};
use crate::clock;
use crate::link::io::frame_name;
use crate::link::{FrameReader, FrameWriter, LinkError};
use crate::progress::RateMeter;
use crate::qemu::qmp::{MigrationStatus, Qmp, RunState};
use crate::source::Failure;

/// A link on which nothing comes for so long is lost.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);
/// The source hears of this side at least so often.
const ACK_EVERY: Duration = Duration::from_millis(250);
/// QEMU may take so long to load the tail once it has it all.
const LOAD_LIMIT: Duration = Duration::from_secs(15);
/// QEMU may leave its stream unread for so long: one that emulates holds its main loop now and then.
const UNREAD_LIMIT: Duration = Duration::from_secs(30);

/// What a destination needs: events; and disks opened only when the guest is resumed, so that a
/// source that takes its guest back finds them unlocked.
pub(super) const CAPABILITIES: [&str; 2] = ["events", "late-block-activate"];

/// Where the stream goes.
enum Sink {
    /// Into QEMU as it is.
    Qemu(UnixStream),
    /// Read here, while QEMU waits at this socket.
    Read(Box<Arriving>, UnixStream),
    /// There is none: a cold migration.
    Nowhere,
}

/// The stream's arrival, counted and digested.
#[derive(Default)]
struct Arrived {
    bytes: u64,
    digest: Xxh3Default,
    meter: RateMeter,
}

impl DestinationTask {
    /// Takes the stream to its end and waits until QEMU has loaded it.
    pub(super) async fn receive(&mut self) -> Result<(), Failure> {
        self.wait_for_link().await?;
        let (Some(mut reader), Some(mut writer)) = (self.reader.take(), self.writer.take()) else {
            return Err(LinkError::Closed.into());
        };
        let received = self.receive_on(&mut reader, &mut writer).await;
        self.reader = Some(reader);
        self.writer = Some(writer);
        received?;
        self.remember_rest().await
    }

    async fn receive_on(
        &mut self,
        reader: &mut FrameReader,
        writer: &mut FrameWriter,
    ) -> Result<(), Failure> {
        let mut sink = self.open_sink().await?;
        writer.send(&Frame::Welcome).await?;
        let first = if self.disks.is_some() { Phase::DiskBulk } else { Phase::MemoryCopy };
        self.progress.enter(first);
        let mut arrived = Arrived::default();
        let ended = self.take_stream(reader, writer, &mut sink, &mut arrived).await?;
        if self.qmp.is_none() {
            // A cold one with disks: they are all here now.
            self.bring_up_late(writer).await?;
        }
        self.pause.begin();
        self.show(&mut arrived);
        self.progress.enter(Phase::Switchover);
        let whole = Ended { total: arrived.bytes, digest: arrived.digest.digest() };
        if ended != whole {
            // A byte lost or changed on the way would be a corrupt guest.
            return Err(Failure::Refused(format!(
                "the stream arrived damaged: {} bytes were sent, {} arrived",
                ended.total, whole.total
            )));
        }
        match sink {
            Sink::Qemu(mut socket) => socket.shutdown().await.map_err(Failure::Socket)?,
            Sink::Read(arriving, socket) => {
                // QEMU takes a guest whose pages follow for begun at once, and its images for whole.
                self.until_sealed(writer).await?;
                self.pause.lap("disks sealed");
                self.begin_gathering(*arriving, socket).await?;
            }
            Sink::Nowhere => {}
        }
        self.wait_until_loaded(writer).await
    }

    /// Where the stream goes: nowhere for as long as there is no QEMU.
    async fn open_sink(&self) -> Result<Sink, Failure> {
        if self.mode == Mode::Cold || self.qmp.is_none() {
            return Ok(Sink::Nowhere);
        }
        let path = self.stream_socket()?;
        let socket = UnixStream::connect(&path).await.map_err(Failure::Socket)?;
        Ok(match self.gathers() {
            true => {
                let memory = Bytes(self.definition.memory_bytes);
                Sink::Read(Box::new(Arriving::new(memory)), socket)
            }
            false => Sink::Qemu(socket),
        })
    }

    /// Brings QEMU up with disks that have arrived; the source hears of this side meanwhile.
    async fn bring_up_late(&mut self, writer: &mut FrameWriter) -> Result<(), Failure> {
        if let Some(disks) = &self.disks {
            disks.name().await?;
        }
        // The connections of the beginning may be hours old.
        self.reach_stores().await?;
        let qmp = {
            let coming = self.bring_up(self.arrival());
            tokio::pin!(coming);
            let mut ack = tokio::time::interval(ACK_EVERY);
            loop {
                tokio::select! {
                    qmp = &mut coming => break qmp?,
                    _ = ack.tick() => writer.send(&Frame::Ack(0)).await?,
                }
            }
        };
        self.qmp = Some(qmp);
        Ok(())
    }

    async fn take_stream(
        &mut self,
        reader: &mut FrameReader,
        writer: &mut FrameWriter,
        sink: &mut Sink,
        arrived: &mut Arrived,
    ) -> Result<Ended, Failure> {
        let mut ack = tokio::time::interval(ACK_EVERY);
        let mut heard_at = clock::now();
        loop {
            let frame = tokio::select! {
                frame = reader.next() => frame?,
                _ = ack.tick() => {
                    writer.send(&Frame::Ack(arrived.bytes)).await?;
                    self.show(arrived);
                    if heard_at.elapsed() > SILENCE_LIMIT {
                        return Err(LinkError::Silent(SILENCE_LIMIT).into());
                    }
                    continue;
                }
                input = self.inputs.recv() => {
                    self.take_input_receiving(input)?;
                    continue;
                }
            };
            heard_at = clock::now();
            match frame {
                Frame::Stream(bytes) => {
                    if self.qmp.is_none() && self.mode != Mode::Cold {
                        self.bring_up_late(writer).await?;
                        *sink = self.open_sink().await?;
                        self.progress.enter(Phase::MemoryCopy);
                    }
                    arrived.digest.update(&bytes);
                    arrived.bytes += bytes.len() as u64;
                    match sink {
                        Sink::Qemu(socket) => {
                            self.give_qemu(socket, &bytes, writer, arrived.bytes).await?;
                            // What the source said meanwhile waits to be read.
                            heard_at = clock::now();
                        }
                        Sink::Read(arriving, _) => arriving.feed(bytes)?,
                        Sink::Nowhere => return Err(unexpected(&Frame::Stream(bytes))),
                    }
                }
                Frame::Notes(notes) => match sink {
                    Sink::Read(arriving, _) => arriving.note(notes)?,
                    _ => return Err(unexpected(&Frame::Notes(notes))),
                },
                Frame::Key(key) => match sink {
                    Sink::Read(arriving, _) => arriving.key = Some(key),
                    _ => return Err(unexpected(&Frame::Key(key))),
                },
                Frame::End(ended) => return Ok(ended),
                Frame::Ping(number) => writer.send(&Frame::Pong(number)).await?,
                Frame::Abort(reason) => return Err(Failure::Cancelled(reason)),
                other => return Err(unexpected(&other)),
            }
        }
    }

    /// Writes to QEMU; where that is busy the source goes on hearing of this side, and an operator is
    /// heard here.
    async fn give_qemu(
        &mut self,
        socket: &mut UnixStream,
        bytes: &[u8],
        writer: &mut FrameWriter,
        arrived: u64,
    ) -> Result<(), Failure> {
        let began = clock::now();
        let written = socket.write_all(bytes);
        tokio::pin!(written);
        loop {
            let silence = tokio::time::sleep(ACK_EVERY);
            tokio::select! {
                written = &mut written => return written.map_err(Failure::Socket),
                () = silence => writer.send(&Frame::Ack(arrived)).await?,
                input = self.inputs.recv() => self.take_input_receiving(input)?,
            }
            if began.elapsed() > UNREAD_LIMIT {
                return Err(Failure::Slow { what: "read its stream", limit: UNREAD_LIMIT });
            }
        }
    }

    fn show(&mut self, arrived: &mut Arrived) {
        let rate = arrived.meter.read(clock::now(), arrived.bytes);
        let bytes = arrived.bytes;
        let of_disks = self.disks.as_ref().map_or(0, ArrivingDisks::arrived);
        self.progress.update(|progress| {
            progress.disk_bytes_sent = of_disks;
            progress.bytes_sent = bytes;
            progress.rate_bits_per_sec = rate;
        });
    }

    fn take_input_receiving(&mut self, input: Option<Input>) -> Result<(), Failure> {
        match input {
            Some(Input::Cancel { reason, answer }) => {
                let _ = answer.send(true);
                Err(Failure::Cancelled(reason))
            }
            Some(Input::Commit(_, answer)) => {
                let _ = answer.send(Frame::Refused("not everything has been loaded".into()));
                Ok(())
            }
            Some(Input::Claim(answer)) => {
                let _ = answer.send(false);
                Ok(())
            }
            Some(Input::Lane(purpose, reader, writer)) => {
                self.lanes.push((purpose, reader, writer));
                Ok(())
            }
            Some(Input::Stored) => Ok(()),
            Some(Input::Limit(limit)) => {
                self.gather_limit = limit;
                Ok(())
            }
            // A second link for the same migration: the first one is in use, and stays.
            Some(Input::Link(..)) => Ok(()),
            None => Err(Failure::Cancelled("the agent is stopping".into())),
        }
    }

    /// The stream is complete; QEMU loads its tail and then stands paused.
    async fn wait_until_loaded(&mut self, writer: &mut FrameWriter) -> Result<(), Failure> {
        let Some(qmp) = self.qmp.clone() else { return Err(Failure::GuestGone) };
        let deadline = clock::now() + LOAD_LIMIT;
        let mut poll = tokio::time::interval(Duration::from_millis(2));
        let mut since_word = 0;
        loop {
            self.while_loading(poll.tick()).await;
            // Memory and disks: whoever says LOADED may be told to run with both.
            let sealed = self.disks.as_ref().is_none_or(ArrivingDisks::are_sealed);
            if sealed && self.is_loaded(&qmp).await? {
                self.pause.lap("qemu loads");
                return Ok(());
            }
            since_word += 1;
            if since_word >= 100 {
                since_word = 0;
                writer.send(&Frame::Ack(0)).await?;
            }
            if clock::now() > deadline {
                return Err(Failure::Slow { what: "load the guest", limit: LOAD_LIMIT });
            }
        }
    }

    /// Waits until the disks are complete.
    async fn until_sealed(&mut self, writer: &mut FrameWriter) -> Result<(), Failure> {
        let sealed = || self.disks.as_ref().is_none_or(ArrivingDisks::are_sealed);
        let (began, mut said) = (clock::now(), clock::now());
        while !sealed() {
            tokio::time::sleep(Duration::from_millis(1)).await;
            if said.elapsed() > ACK_EVERY {
                said = clock::now();
                writer.send(&Frame::Ack(0)).await?;
            }
            if began.elapsed() > LOAD_LIMIT {
                return Err(Failure::Unsealed(LOAD_LIMIT));
            }
        }
        Ok(())
    }

    async fn is_loaded(&mut self, qmp: &Qmp) -> Result<bool, Failure> {
        if qmp.is_closed() {
            return Err(Failure::GuestGone);
        }
        let asked = qmp.clone();
        let status = self.while_loading(async move { asked.query_status().await }).await;
        let state = status?.status;
        if self.mode == Mode::Cold {
            return Ok(state == RunState::Prelaunch);
        }
        let asked = qmp.clone();
        let info = self.while_loading(async move { asked.query_migrate().await }).await?;
        match info.status {
            MigrationStatus::PostcopyActive if self.gathers() => {
                Ok(state == RunState::Paused && self.has_loaded()?)
            }
            MigrationStatus::Completed => Ok(state == RunState::Paused),
            MigrationStatus::Failed => {
                Err(Failure::Qemu { status: info.status, detail: info.error_desc.clone() })
            }
            _ => Ok(false),
        }
    }
}

fn unexpected(frame: &Frame) -> Failure {
    LinkError::Unexpected { got: frame_name(frame), wanted: "STREAM or END" }.into()
}
