//! From the pause to LOADED, at the source: the tail of QEMU's stream, END, and the wait for a destination
//! that has loaded everything. The guest stands still meanwhile, so nothing is done here that could have
//! been done before (docs/decisions/0048).
//!
//! Deliberately not here: when it is paused (`copying`), and what follows LOADED (`performing`).

use std::time::{Duration, Instant};

use lifeboat_protocol::ids::Generation;
use lifeboat_scatter_gather::link::Frame;
use tokio::sync::broadcast;

use super::copying::{Pump, heard, qemu_failure, unwelcome};
use super::{Failure, Input, SourceTask};
use crate::clock;
use crate::link::LinkError;
use crate::link::relay::Relay;
use crate::qemu::qmp::{MigrateParameters, MigrationStatus, Qmp, QmpEvent};

/// From the pause to the end of QEMU's stream.
const STREAM_END_LIMIT: Duration = Duration::from_secs(30);
/// LOADED may take this long besides the time that the rest takes on the wire.
const LOADED_LIMIT: Duration = Duration::from_secs(20);
/// A sign of life is sent this often where nothing else is.
const PING_EVERY: Duration = Duration::from_millis(500);

impl SourceTask {
    /// The guest is paused and QEMU waits: the last cheap veto has passed. The tail, END.
    pub(super) async fn finish_stream(
        &mut self,
        qmp: &Qmp,
        events: &mut broadcast::Receiver<QmpEvent>,
        pump: &mut Pump,
    ) -> Result<(), Failure> {
        self.catch_stop(events, &pump.relay);
        pump.relay.unbound();
        self.lift_disk_limit().await?;
        let unlimited = MigrateParameters { downtime_limit_ms: None, max_bandwidth_bytes: Some(0) };
        qmp.migrate_set_parameters(unlimited).await?;
        qmp.migrate_continue().await?;
        self.pause.lap("qemu goes on");
        let mut migration_done = false;
        let deadline = clock::now() + STREAM_END_LIMIT;
        let mut poll = tokio::time::interval(Duration::from_millis(5));
        while !migration_done {
            tokio::select! {
                _ = poll.tick() => {}
                word = heard(&mut self.words) => return Err(unwelcome(word)),
                input = self.inputs.recv() => {
                    self.take_input(input, Some((qmp, &pump.relay))).await?;
                    continue;
                }
            }
            let info = qmp.query_migrate().await?;
            match info.status {
                MigrationStatus::Completed => migration_done = true,
                MigrationStatus::Active
                | MigrationStatus::Device
                | MigrationStatus::PreSwitchover => {}
                _ => return Err(qemu_failure(&info)),
            }
            if clock::now() > deadline {
                let limit = STREAM_END_LIMIT;
                return Err(Failure::Slow { what: "end its stream", limit });
            }
        }
        self.pause.lap("qemu's stream ends");
        self.drain_rest(pump).await
    }

    /// The STOP event comes at about the same time as the status that was polled.
    fn catch_stop(&mut self, events: &mut broadcast::Receiver<QmpEvent>, relay: &Relay) {
        while let Ok(event) = events.try_recv() {
            if event.name == "STOP" {
                self.stopped(&event, relay);
            }
        }
        self.stop_seen.get_or_insert_with(clock::now);
        self.progress.update(|progress| progress.throttle_percent = 0);
    }

    async fn drain_rest(&mut self, pump: &mut Pump) -> Result<(), Failure> {
        let (writer, ended) = loop {
            tokio::select! {
                drained = &mut pump.drain => break drained.map_err(|_| LinkError::Closed)?,
                word = heard(&mut self.words) => return Err(unwelcome(word)),
                input = self.inputs.recv() => {
                    self.take_input_paused(input, &pump.relay).await?;
                }
            }
        };
        self.writer = Some(writer);
        let ended = ended?;
        self.pause.lap("it leaves");
        self.progress.update(|progress| {
            progress.bytes_sent = ended.total;
            progress.bytes_remaining = 0;
        });
        let fill = pump.fill.take().ok_or(LinkError::Closed)?;
        let filled = fill.await.map_err(|_| LinkError::Closed)?;
        if let Some(absorbed) = filled? {
            self.tell_pages(absorbed).await?;
            self.pause.lap("pages told");
        }
        if let Some(writer) = &mut self.writer {
            writer.send(&Frame::End(ended)).await?;
        }
        Ok(())
    }

    /// Waits for LOADED, showing that this side is alive.
    pub(super) async fn await_loaded(&mut self, qmp: &Qmp) -> Result<Generation, Failure> {
        let deadline = clock::now() + LOADED_LIMIT;
        loop {
            let until = deadline.min(clock::now() + PING_EVERY);
            tokio::select! {
                word = self.next_word_or_ping(until) => match word? {
                    Some(Frame::Loaded(generation)) => return self.last_veto(qmp, generation),
                    Some(other) => return Err(unwelcome(Ok(other))),
                    None => {}
                },
            }
            if clock::now() >= deadline {
                return Err(LinkError::Silent(LOADED_LIMIT).into());
            }
        }
    }

    /// LOADED is here. Whoever cancels must have done so by now; a guest that died meanwhile, or
    /// runs, must not be ceded.
    fn last_veto(&mut self, qmp: &Qmp, generation: Generation) -> Result<Generation, Failure> {
        self.pause.lap("loaded there");
        if qmp.is_closed() && !self.guest_quit_for_cold {
            return Err(Failure::GuestGone);
        }
        while let Ok(input) = self.inputs.try_recv() {
            if let Input::Cancel { reason, answer } = input {
                let _ = answer.send(true);
                return Err(Failure::Cancelled(reason));
            }
        }
        Ok(generation)
    }

    async fn next_word_or_ping(&mut self, until: Instant) -> Result<Option<Frame>, Failure> {
        match self.next_word(until).await {
            Ok(word) => Ok(Some(word)),
            Err(LinkError::Silent(_)) => {
                if let Some(writer) = &mut self.writer {
                    writer.send(&Frame::Ping(0)).await?;
                }
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// An input while the guest is paused and QEMU's part is over.
    async fn take_input_paused(
        &mut self,
        input: Option<Input>,
        relay: &Relay,
    ) -> Result<(), Failure> {
        match input {
            Some(Input::Limit(limit)) => {
                self.limit = limit;
                relay.set_limit(limit);
                self.limit_serving(limit);
                Ok(())
            }
            // Nothing is written any more that it could hold back.
            Some(Input::DiskLimit(_)) | None => Ok(()),
            other => self.take_input(other, None).await,
        }
    }
}
