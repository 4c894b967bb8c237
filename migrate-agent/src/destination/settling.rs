//! From LOADED to a running guest, or to none: performs what the hand-over's machine decides,
//! and asks the source while it is in doubt.

use std::collections::VecDeque;
use std::time::Duration;

use lifeboat_protocol::agent::{MigrationProgress, Phase};
use lifeboat_scatter_gather::link::frame::TOKEN_BYTES;
use lifeboat_scatter_gather::link::{Frame, Hello, Purpose, Standing};

use super::{DestinationTask, Input};
use crate::clock;
use crate::handover::destination::{Action, Destination, Event, State};
use crate::link::LinkError;
use crate::link::io::frame_name;
use crate::qemu::qmp::{Qmp, QmpError, RunState};
use crate::source::Failure;

/// A source that has heard LOADED says COMMIT, ABORT or at least PING within this time.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);
/// Between two questions: a guest is standing still.
const ASK_EVERY: Duration = Duration::from_millis(300);
/// An answer has this long.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// A resumed guest shows it within this time, or its QEMU is looked at again.
const RESUME_LIMIT: Duration = Duration::from_secs(10);
/// Looks at QEMU this often while a COMMIT is awaited.
const WATCH_EVERY: Duration = Duration::from_millis(200);

impl DestinationTask {
    /// Until it is decided, and then says how.
    pub(super) async fn settle(mut self) -> MigrationProgress {
        loop {
            if let Some(outcome) = self.is_over() {
                let outcome = self.gather_on(outcome).await;
                let outcome = self.rest_on(outcome).await;
                self.report(outcome);
                return self.progress.now();
            }
            let event = match self.machine.state() {
                State::InDoubt => self.next_in_doubt().await,
                _ => self.next_on_link().await,
            };
            if let Some(event) = event {
                self.tell(event).await;
            }
        }
    }

    async fn next_on_link(&mut self) -> Option<Event> {
        let Some(mut reader) = self.reader.take() else { return Some(Event::LinkLost) };
        let event = tokio::select! {
            word = reader.next_within(SILENCE_LIMIT) => self.word(word).await,
            input = self.inputs.recv() => self.take_input_settling(input).await,
            () = gone(self.qmp.as_ref()) => Some(Event::GuestDied),
        };
        self.reader = Some(reader);
        event
    }

    async fn word(&mut self, word: Result<Frame, LinkError>) -> Option<Event> {
        match word {
            Ok(Frame::Commit(generation)) => {
                self.pause.lap("COMMIT comes");
                Some(Event::Commit(generation))
            }
            Ok(Frame::Abort(reason)) => {
                self.progress.update(|progress| progress.reason = reason);
                Some(Event::Abort)
            }
            Ok(Frame::Ping(number)) => {
                let Some(writer) = &mut self.writer else { return Some(Event::LinkLost) };
                let sent = writer.send(&Frame::Pong(number)).await;
                sent.err().map(|_| Event::LinkLost)
            }
            Ok(other) => {
                tracing::warn!(frame = frame_name(&other), "has no place after LOADED");
                None
            }
            Err(error) => {
                tracing::warn!(%error, "link lost after LOADED: in doubt");
                self.reader = None;
                Some(Event::LinkLost)
            }
        }
    }

    async fn take_input_settling(&mut self, input: Option<Input>) -> Option<Event> {
        match input {
            Some(Input::Commit(generation, answer)) => {
                self.waiting = Some(answer);
                Some(Event::Commit(generation))
            }
            Some(Input::Claim(answer)) => {
                // Its pages or blocks are at the source, which is said to be fenced off: it could not run.
                let may = self.machine.state() == State::InDoubt
                    && self.gathering.is_none()
                    && !self.disks_follow();
                let _ = answer.send(may);
                may.then_some(Event::Claim)
            }
            Some(Input::Cancel { answer, .. }) => {
                // The source may have ceded: only its word can end this.
                let _ = answer.send(false);
                None
            }
            Some(Input::Link(..) | Input::Stored) => None,
            Some(Input::Lane(purpose, reader, writer)) => {
                self.take_lane(purpose, reader, writer).await;
                None
            }
            Some(Input::Limit(limit)) => {
                self.limit_gathering(limit).await;
                None
            }
            None => {
                tokio::time::sleep(ASK_EVERY).await;
                None
            }
        }
    }

    async fn next_in_doubt(&mut self) -> Option<Event> {
        self.progress.update(|progress| {
            if progress.phase() != Phase::Uncertain {
                progress.set_phase(Phase::Uncertain);
                progress.reason =
                    "loaded here and paused; the source does not say whether it has ceded".into();
            }
        });
        tokio::select! {
            input = self.inputs.recv() => self.take_input_settling(input).await,
            () = gone(self.qmp.as_ref()) => Some(Event::GuestDied),
            () = tokio::time::sleep(ASK_EVERY) => match self.question().await {
                Ok(event) => Some(event),
                Err(error) => {
                    tracing::debug!(%error, "the source does not answer");
                    None
                }
            },
        }
    }

    async fn question(&mut self) -> Result<Event, LinkError> {
        let (host, address) = self.machine.source();
        let identity = self.context.identity.as_ref();
        let (mut reader, mut writer) = crate::link::connect(address, host, identity).await?;
        let hello = Hello {
            purpose: Purpose::AskSource,
            migration: self.machine.migration().clone(),
            vm: self.vm.clone(),
            host: self.context.host.clone(),
            generation: self.machine.generation(),
            token: [0; TOKEN_BYTES],
        };
        writer.send(&Frame::Hello(hello)).await?;
        match reader.next_within(ANSWER_LIMIT).await? {
            Frame::Standing(standing) => {
                tracing::info!(?standing, "the source answered");
                Ok(Event::Heard(standing))
            }
            other => Err(LinkError::Unexpected { got: frame_name(&other), wanted: "STANDING" }),
        }
    }

    /// Gives the machine an event and performs what it wants done, and what comes of that.
    pub(super) async fn tell(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.machine.apply(event, &mut actions);
        tracing::debug!(?event, state = ?self.machine.state(), "hand-over");
        self.perform_all(actions).await;
    }

    pub(super) async fn perform_all(&mut self, actions: Vec<Action>) {
        let mut todo = VecDeque::from(actions);
        while let Some(action) = todo.pop_front() {
            let fatal = matches!(action, Action::Persist(_));
            let name = action.name();
            crate::marks::pass("destination", "before", name).await;
            let performed = self.perform(action).await;
            crate::marks::pass("destination", "after", name).await;
            match performed {
                Ok(None) => {}
                Ok(Some(event)) => {
                    let mut more = Vec::new();
                    self.machine.apply(event, &mut more);
                    todo.extend(more);
                }
                Err(failure) => {
                    tracing::error!(error = %failure.line(), "hand-over step failed");
                    self.progress.update(|progress| progress.reason = failure.line());
                    if fatal {
                        // Nothing that rests on this record may happen; the one on the disk is
                        // still in force.
                        self.reload().await;
                        return;
                    }
                }
            }
        }
    }

    async fn reload(&mut self) {
        loop {
            match self.context.store.read(&self.vm) {
                Ok(record) => {
                    let lives = self.context.guests.lives(&self.vm);
                    let mut ignored = Vec::new();
                    let machine =
                        record.and_then(|record| Destination::resume(&record, lives, &mut ignored));
                    if let Some(machine) = machine {
                        self.machine = machine;
                    }
                    return;
                }
                Err(error) => {
                    tracing::error!(%error, "ownership record cannot be read; trying again");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    async fn perform(&mut self, action: Action) -> Result<Option<Event>, Failure> {
        match action {
            Action::Persist(record) => {
                let (store, vm) = (self.context.store.clone(), self.vm.clone());
                crate::tasks::blocking(move || store.write(&vm, &record)).await?;
                self.pause.lap("recorded");
            }
            Action::SendLoaded(generation) => {
                if let Some(writer) = &mut self.writer {
                    // A source that does not hear it gives up, and says so when asked.
                    let _ = writer.send(&Frame::Loaded(generation)).await;
                }
            }
            Action::StartGuest => return Ok(Some(self.start_guest().await)),
            Action::SendRunning(generation) => self.answer(Frame::Running(generation)).await,
            Action::SendRefused => {
                let reason = self.progress.now().reason;
                self.answer(Frame::Refused(reason)).await;
            }
            Action::DiscardGuest => {
                self.gathering = None;
                self.context.guests.end(&self.vm, true).await?;
                self.context.store.end_gathering(&self.vm)?;
                self.context.store.end_rest(&self.vm)?;
                if let Some(disks) = &self.disks {
                    disks.discard().await?;
                }
            }
            // `settle` asks for as long as the machine is in doubt.
            Action::Ask => {}
        }
        Ok(None)
    }

    /// Says the outcome wherever somebody waits for it. To who asked with COMMIT, RUNNING is the end of
    /// the hand-over; of a guest whose pages follow it, it is not.
    async fn answer(&mut self, frame: Frame) {
        if let Some(waiting) = self.waiting.take() {
            let follows = self.gathering.is_some() || self.disks_follow();
            let gathers = follows && matches!(frame, Frame::Running(_));
            let _ = waiting.send(match gathers {
                true => Frame::Standing(Standing::Gathering),
                false => frame.clone(),
            });
        }
        if let Some(writer) = &mut self.writer {
            let _ = writer.send(&frame).await;
        }
    }

    /// Resumes the loaded guest. What is returned is proof only where it can be: a QEMU that was
    /// gone before it was told never ran the guest.
    async fn start_guest(&mut self) -> Event {
        let qmp = match &self.qmp {
            Some(qmp) if !qmp.is_closed() => qmp.clone(),
            _ => return Event::NotStarted,
        };
        if let Err(failure) = self.commit_gathering().await {
            tracing::error!(reason = %failure.line(), "the guest could not run here");
            self.progress.update(|progress| progress.reason = failure.line());
            return Event::NotStarted;
        }
        if let Some(disks) = &self.disks
            && let Err(error) = disks.settle().await
        {
            // Its QEMU was not told anything yet.
            tracing::error!(error = crate::vms::chain(&error), "its disks cannot be kept");
            return Event::NotStarted;
        }
        self.pause.lap("disks kept");
        let mut events = qmp.events();
        let deadline = clock::now() + RESUME_LIMIT;
        loop {
            let resumed = {
                let qmp = qmp.clone();
                self.meanwhile(async move { qmp.cont().await }).await
            };
            match resumed {
                Ok(()) => break,
                // It may have been carried out, and a silent QEMU is not a dead one.
                Err(error @ QmpError::Deadline { .. }) if !qmp.is_closed() => {
                    tracing::warn!(%error, "resumed? asking again");
                }
                Err(error) if qmp.is_closed() || clock::now() > deadline => {
                    tracing::error!(%error, "the guest could not be resumed");
                    return Event::GuestDied;
                }
                Err(error) => {
                    tracing::warn!(%error, "resume refused; trying again");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
        self.pause.lap("resumed");
        if !self.runs(&qmp).await {
            return Event::GuestDied;
        }
        self.pause.lap("runs");
        tracing::info!(pause = %self.pause, "the guest runs");
        while let Ok(event) = events.try_recv() {
            if event.name == "RESUME" {
                let micros =
                    event.seconds.saturating_mul(1_000_000).saturating_add(event.microseconds);
                self.progress.update(|progress| progress.resume_unix_us = micros);
            }
        }
        crate::tasks::spawn("announce", async move {
            if let Err(error) = qmp.announce_self().await {
                tracing::warn!(%error, "the guest runs, but could not be announced");
            }
        });
        Event::GuestRuns
    }

    /// Whether the guest runs. A QEMU that is silent is asked on for as long as it lives.
    async fn runs(&mut self, qmp: &Qmp) -> bool {
        let deadline = clock::now() + RESUME_LIMIT;
        loop {
            let asked = qmp.clone();
            match self.meanwhile(async move { asked.query_status().await }).await {
                Ok(status) if status.status == RunState::Running => return true,
                Ok(_) if clock::now() > deadline => return false,
                Ok(_) => tokio::time::sleep(Duration::from_millis(1)).await,
                Err(_) if qmp.is_closed() => return false,
                Err(error) => tracing::warn!(%error, "asked whether the guest runs"),
            }
        }
    }

    /// Waits for QEMU, and hears whoever comes meanwhile: QEMU may wait for a page that the source is
    /// about to bring.
    pub(super) async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> T {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                input = self.inputs.recv() => self.take_input_meanwhile(input).await,
            }
        }
    }

    /// Nothing can be answered now but what stands in the records.
    pub(super) async fn take_input_meanwhile(&mut self, input: Option<Input>) {
        match input {
            // The word follows once the guest has been seen.
            Some(Input::Commit(_, answer)) => self.waiting = Some(answer),
            Some(Input::Cancel { answer, .. } | Input::Claim(answer)) => {
                let _ = answer.send(false);
            }
            Some(Input::Lane(purpose, reader, writer)) => {
                self.take_lane(purpose, reader, writer).await;
            }
            Some(Input::Limit(limit)) => self.limit_gathering(limit).await,
            Some(Input::Stored) => self.source_may_go().await,
            Some(Input::Link(..)) => {}
            None => tokio::time::sleep(WATCH_EVERY).await,
        }
    }
}

/// Returns when the guest's QEMU has closed its QMP.
pub(super) async fn gone(qmp: Option<&Qmp>) {
    let Some(qmp) = qmp else { return std::future::pending().await };
    while !qmp.is_closed() {
        tokio::time::sleep(WATCH_EVERY).await;
    }
}
