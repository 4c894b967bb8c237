//! Past COMMIT and without word: the source asks the destination until it knows, or is told.

use std::time::Duration;

use lifeboat_protocol::agent::Phase;
use lifeboat_scatter_gather::link::frame::TOKEN_BYTES;
use lifeboat_scatter_gather::link::{Frame, Hello, Purpose, Standing};

use super::{Input, SourceTask};
use crate::clock;
use crate::handover::source::{Event, State};
use crate::link::{FrameReader, FrameWriter, LinkError};

/// Between two questions. Short: a guest may be standing still.
const ASK_EVERY: Duration = Duration::from_millis(300);
/// An answer has this long.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// A destination that has the guest, and is silent for so long, is spoken of: then nobody knows whether it runs,
/// and an operator's claim is taken.
const SPOKEN_OF_AFTER: Duration = Duration::from_secs(5);

impl SourceTask {
    /// One question, or one input, whichever comes first.
    pub(super) async fn ask_once(&mut self) {
        tokio::select! {
            input = self.inputs.recv() => self.take_input_past_commit(input).await,
            () = tokio::time::sleep(ASK_EVERY) => self.ask_now().await,
        }
        self.show_sent();
    }

    async fn take_input_past_commit(&mut self, input: Option<Input>) {
        match input {
            Some(Input::Claim(answer)) => {
                tracing::warn!("claimed by an operator: the destination is said to be fenced");
                self.tell(Event::Claim).await;
                let _ = answer.send(matches!(self.machine.state(), State::Over(_)));
            }
            Some(Input::Cancel { answer, .. }) => {
                let _ = answer.send(false);
            }
            Some(Input::Limit(limit)) => {
                self.limit = limit;
                self.limit_serving(limit);
                self.limit_rest().await;
            }
            Some(Input::DiskLimit(_)) => {}
            None => tokio::time::sleep(ASK_EVERY).await,
        }
    }

    async fn ask_now(&mut self) {
        let event = match self.question().await {
            Ok(event) => {
                self.has_answered();
                event
            }
            Err(error) => {
                tracing::debug!(%error, "the destination does not answer");
                self.say_silent();
                Event::NoWord
            }
        };
        match event {
            Event::Heard(Standing::Died) if self.machine.state() != State::DestinationDied => {
                self.say_died();
                self.end_storing().await;
            }
            Event::Heard(Standing::Pending) if !self.disks_follow() => self.serve_who_starts(),
            Event::Heard(Standing::Gathering) if self.disks_follow() => self.rest_on().await,
            Event::Heard(Standing::Gathering) => {
                self.serve_again();
                // Its RUNNING was not heard: now it may begin. Where it has begun nothing happens.
                self.begin_scattering();
            }
            _ => {}
        }
        self.tell(event).await;
    }

    async fn question(&mut self) -> Result<Event, LinkError> {
        let (mut reader, mut writer) = self.open_question().await?;
        let standing = match reader.next_within(ANSWER_LIMIT).await? {
            Frame::Standing(standing) => standing,
            other => {
                let got = crate::link::io::frame_name(&other);
                return Err(LinkError::Unexpected { got, wanted: "STANDING" });
            }
        };
        tracing::info!(?standing, "the destination answered");
        if standing != Standing::Loaded {
            return Ok(Event::Heard(standing));
        }
        if self.machine.state() == State::Returning {
            // Nothing has been ceded yet: that comes first, durably.
            self.tell(Event::Heard(standing)).await;
        }
        // COMMIT was lost on the way, or never sent; this connection delivers it.
        writer.send(&Frame::Commit(self.machine.next_generation())).await?;
        match reader.next_within(ANSWER_LIMIT).await? {
            Frame::Running(generation) => Ok(Event::Running(generation)),
            Frame::Standing(standing) => Ok(Event::Heard(standing)),
            Frame::Refused(_) => Ok(Event::Refused),
            other => {
                let got = crate::link::io::frame_name(&other);
                Err(LinkError::Unexpected { got, wanted: "RUNNING" })
            }
        }
    }

    async fn open_question(&mut self) -> Result<(FrameReader, FrameWriter), LinkError> {
        let (host, address) = self.machine.destination();
        let identity = self.context.identity.as_ref();
        let (reader, mut writer) = crate::link::connect(address, host, identity).await?;
        let hello = Hello {
            purpose: Purpose::AskDestination,
            migration: self.order.migration.clone(),
            vm: self.order.vm.clone(),
            host: self.context.host.clone(),
            generation: self.machine.next_generation(),
            token: [0; TOKEN_BYTES],
        };
        writer.send(&Frame::Hello(hello)).await?;
        Ok((reader, writer))
    }

    /// The guest is at the destination, as far as is known, and part of it is here.
    fn is_elsewhere(&self) -> bool {
        let phase = self.progress.now().phase();
        matches!(phase, Phase::PostCopy | Phase::Gather | Phase::DiskRest)
    }

    fn has_answered(&mut self) {
        if self.silent_since.take().is_some() && self.is_elsewhere() {
            self.progress.update(|progress| {
                progress.reason.clear();
                progress.silent_ms = 0;
            });
        }
    }

    fn say_silent(&mut self) {
        let since = *self.silent_since.get_or_insert_with(clock::now);
        if !self.is_elsewhere() || since.elapsed() < SPOKEN_OF_AFTER {
            return;
        }
        let (vm, destination) = (self.order.vm.clone(), self.order.destination.clone());
        let seconds = since.elapsed().as_secs();
        self.progress.update(|progress| {
            progress.silent_ms = seconds * 1000;
            progress.reason = format!(
                "{destination} has {vm} and has not answered for {seconds} s; it is asked on, and what it wants is kept here.                  If {destination} is known to be off or fenced: `lifeboat claim {vm} --fenced` resumes {vm} here as it was                  at the switchover"
            );
        });
    }

    fn say_died(&mut self) {
        let (vm, destination) = (self.order.vm.clone(), self.order.destination.clone());
        self.end_with(
            Phase::Lost,
            format!(
                "{destination} took {vm} over and its QEMU died there. The guest as it was at the switchover is still \
                 here, paused; what it did since then is lost. To resume it: `lifeboat claim {vm} --fenced`"
            ),
        );
    }
}
