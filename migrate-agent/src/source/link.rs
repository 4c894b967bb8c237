//! The page link to the destination, as the source's task has it: opened with HELLO, and heard.
//!
//! Deliberately not here: what a word means in which phase.

use std::time::Duration;

use lifeboat_scatter_gather::link::{Frame, Hello, Purpose};
use tokio::sync::mpsc;

use super::copying::{heard, unwelcome};
use super::{Failure, SourceTask};
use crate::clock;
use crate::link::io::frame_name;
use crate::link::{FrameReader, LinkError};

/// How long the destination may take to say WELCOME: its QEMU is already up.
const WELCOME_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to bring its QEMU up once the disks are there.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(60);
/// The PING that asks whether it is up; signs of life have the number 0.
const ARRIVAL: u64 = 1;

impl SourceTask {
    /// Opens it.
    pub(super) async fn connect(&mut self) -> Result<(), Failure> {
        let identity = self.context.identity.as_ref();
        let (address, host) = (&self.order.page_address, &self.order.destination);
        let (mut reader, mut writer) = crate::link::connect(address, host, identity).await?;
        writer.send(&Frame::Hello(self.hello(Purpose::Migrate))).await?;
        match reader.next_within(WELCOME_LIMIT).await? {
            Frame::Welcome => {}
            Frame::Refused(reason) | Frame::Abort(reason) => return Err(Failure::Refused(reason)),
            other => {
                let got = frame_name(&other);
                return Err(LinkError::Unexpected { got, wanted: "WELCOME" }.into());
            }
        }
        self.words = Some(listen(reader));
        self.writer = Some(writer);
        Ok(())
    }

    /// Its first word, and that of the connections beside it.
    pub(super) fn hello(&self, purpose: Purpose) -> Hello {
        Hello {
            purpose,
            migration: self.order.migration.clone(),
            vm: self.order.vm.clone(),
            host: self.context.host.clone(),
            generation: self.machine.next_generation(),
            token: self.order.token,
        }
    }

    /// Has the destination bring its QEMU up, and waits for it. With disks it does that only when memory
    /// begins to come, because they may take hours; a guest whose memory takes no time would stand still
    /// for it.
    pub(super) async fn await_arrival(&mut self) -> Result<(), Failure> {
        let writer = self.writer.as_mut().ok_or(LinkError::Closed)?;
        writer.send_stream(&[]).await?;
        // Frames are taken in order: the answer means that the one before it is behind it.
        writer.send(&Frame::Ping(ARRIVAL)).await?;
        let late = tokio::time::sleep(ARRIVAL_LIMIT);
        tokio::pin!(late);
        loop {
            tokio::select! {
                word = heard(&mut self.words) => return match word {
                    Ok(Frame::Pong(ARRIVAL)) => Ok(()),
                    other => Err(unwelcome(other)),
                },
                input = self.inputs.recv() => self.take_input(input, None).await?,
                () = &mut late => return Err(Failure::NoArrival(ARRIVAL_LIMIT)),
            }
        }
    }

    /// The next word of the destination before `deadline`.
    pub(super) async fn next_word(
        &mut self,
        deadline: std::time::Instant,
    ) -> Result<Frame, LinkError> {
        let Some(words) = &mut self.words else { return Err(LinkError::Closed) };
        let limit = deadline.saturating_duration_since(clock::now());
        match tokio::time::timeout(limit, words.recv()).await {
            Ok(Some(word)) => word,
            Ok(None) => Err(LinkError::Closed),
            Err(_) => Err(LinkError::Silent(limit)),
        }
    }
}

/// Reads the link in a task of its own, so that a word is heard whatever else goes on. Ends with
/// the link, or when nobody listens any more.
fn listen(mut reader: FrameReader) -> mpsc::Receiver<Result<Frame, LinkError>> {
    /// The destination says something (at least ACK) four times a second.
    const SILENCE_LIMIT: Duration = Duration::from_secs(5);
    let (to, words) = mpsc::channel(64);
    crate::tasks::spawn("page link words", async move {
        loop {
            let word = reader.next_within(SILENCE_LIMIT).await;
            let last = word.is_err();
            if matches!(word, Ok(Frame::Ack(_) | Frame::Pong(0))) {
                continue;
            }
            if to.send(word).await.is_err() || last {
                return;
            }
        }
    });
    words
}
