//! A guest whose pages follow it: begun with what came before END, and seen through after RUNNING
//! until QEMU has everything.
//!
//! What the destination must remember of it is on its disk before LOADED is said
//! (`handover::gathering`), so that it tells the source to stay for as long as pages are wanted there.

use std::time::Duration;

use lifeboat_protocol::agent::Phase;
use lifeboat_protocol::terms::Mode;
use lifeboat_protocol::units::BytesPerSec;
use lifeboat_scatter_gather::link::pages::NOTES_MOST;
use lifeboat_scatter_gather::link::{Frame, Purpose, Standing};
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::arriving::{Arrived, Arriving};
use super::gathering::journal::{Journal, JournalError};
use super::gathering::{BATCH_PAGES, Gathering, Known, Order, Reachable, Seen};
use super::settling::gone;
use super::{DestinationTask, Input};
use crate::clock;
use crate::handover::destination::Outcome;
use crate::handover::gathering as kept;
use crate::link::{FrameReader, FrameWriter};
use crate::progress::RateMeter;
use crate::source::Failure;

/// Figures are shown this often.
const SHOW_EVERY: Duration = Duration::from_millis(200);
/// The source hears of this side at least so often.
const ACK_EVERY: Duration = Duration::from_secs(1);

/// What ended the wait for the last page.
enum End {
    /// QEMU has everything.
    Whole,
    /// QEMU has gone.
    Died,
}

/// Whether QEMU has everything; false when that cannot come any more.
async fn is_done(seen: &mut watch::Receiver<Seen>) -> bool {
    seen.wait_for(|seen| seen.done).await.is_ok()
}

impl DestinationTask {
    /// Everything before END has come: gives it to QEMU, and remembers it.
    pub(super) async fn begin_gathering(
        &mut self,
        arriving: Arriving,
        qemu: UnixStream,
    ) -> Result<(), Failure> {
        let arrived = arriving.finish(BATCH_PAGES)?;
        self.pause.lap("put together");
        let block = |block: &crate::qemu::stream::RamBlock| kept::Block {
            name: block.name.clone(),
            pages: block.pages,
        };
        let gathering = kept::Gathering {
            migration: self.machine.migration().clone(),
            layout: arrived.layout.blocks().iter().map(block).collect(),
            ram: arrived.ram,
            scattered: self.in_stores(&arrived)?,
            released: false,
        };
        let remembered = self.remember(gathering);
        let known = Known { journal: self.begin_journal(&arrived)?, again: None, committed: false };
        let reachable = self.reachable.take();
        let limit = self.gather_limit;
        self.gathering = Some(Gathering::start(arrived, qemu, limit, reachable, known));
        for (purpose, reader, writer) in std::mem::take(&mut self.lanes) {
            self.take_lane(purpose, reader, writer).await;
        }
        // While QEMU loads: nothing is promised before both are done.
        self.while_loading(remembered).await?;
        self.pause.lap("remembered");
        Ok(())
    }

    fn begin_journal(&self, arrived: &Arrived) -> Result<Journal, Failure> {
        let path = self.context.store.journal_path(&self.vm);
        let mut journal = Journal::begin(&path).map_err(JournalError::from)?;
        for notes in arrived.notes.chunks(NOTES_MOST) {
            journal.add(&Frame::Notes(notes.to_vec())).map_err(JournalError::from)?;
        }
        Ok(journal)
    }

    fn remember(
        &self,
        gathering: kept::Gathering,
    ) -> impl Future<Output = Result<(), Failure>> + use<> {
        let (store, vm) = (self.context.store.clone(), self.vm.clone());
        async move { Ok(crate::tasks::blocking(move || store.write_gathering(&vm, &gathering)).await?) }
    }

    /// Where the pages of a scattered guest will be, and what opens them.
    fn in_stores(&self, arrived: &Arrived) -> Result<Option<kept::InStores>, Failure> {
        match (&self.reachable, &arrived.key) {
            (Some(reachable), Some(key)) => {
                let key = key.0.iter().map(|byte| format!("{byte:02x}")).collect();
                Ok(Some(kept::InStores { stores: reachable.places().to_vec(), key }))
            }
            (None, None) => Ok(None),
            (Some(_), None) => {
                Err(Failure::Refused("the source sent no key for the pages in stores".into()))
            }
            (None, Some(_)) => {
                Err(Failure::Refused("the source scatters, and no stores are named here".into()))
            }
        }
    }

    /// Everything that is missing is in stores: the source may go when this is durable.
    async fn release(&mut self) -> Result<(), Failure> {
        let (store, vm) = (self.context.store.clone(), self.vm.clone());
        let kept = crate::tasks::blocking(move || store.gathering(&vm)).await?;
        if let Some(gathering) = kept {
            self.remember(kept::Gathering { released: true, ..gathering }).await?;
        }
        tracing::info!("every page is here or in a store: the source may go");
        self.say_released().await;
        Ok(())
    }

    pub(super) async fn say_released(&mut self) {
        let generation = self.machine.generation();
        if let Some(writer) = &mut self.writer {
            // A source that does not hear it asks.
            let _ = writer.send(&Frame::Released(generation)).await;
        }
    }

    /// Reaches the stores, before anything is begun.
    pub(super) async fn reach_stores(&mut self) -> Result<(), Failure> {
        if let Some(plan) = &self.plan {
            let (places, migration) = (plan.stores.clone(), self.machine.migration());
            let identity = self.context.identity.as_ref();
            self.reachable = Some(Reachable::reach(places, migration, identity).await?);
        }
        Ok(())
    }

    /// Whether QEMU has loaded the devices of a guest whose pages follow.
    pub(super) fn has_loaded(&self) -> Result<bool, Failure> {
        let Some(gathering) = &self.gathering else { return Ok(false) };
        let seen = gathering.seen.borrow();
        match seen.failed {
            None => Ok(seen.standing),
            Some(_) => Err(Failure::ArrivalEnded("while it loaded the devices")),
        }
    }

    /// Waits for QEMU while it loads, and takes the source's connections meanwhile: QEMU answers nothing
    /// while a device that it loads waits for a page, which comes on one of them.
    pub(super) async fn while_loading<T>(&mut self, work: impl Future<Output = T>) -> T {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                // Without anybody who could come, QEMU is waited for all the same.
                Some(input) = self.inputs.recv() => self.take_input_loading(input).await,
            }
        }
    }

    async fn take_input_loading(&mut self, input: Input) {
        match input {
            Input::Lane(purpose, reader, writer) => self.take_lane(purpose, reader, writer).await,
            Input::Limit(limit) => self.limit_gathering(limit).await,
            // From END on only the source decides.
            Input::Cancel { answer, .. } | Input::Claim(answer) => {
                let _ = answer.send(false);
            }
            Input::Commit(_, answer) => {
                let refused = Frame::Refused("not everything is loaded yet".into());
                let _ = answer.send(refused);
            }
            Input::Link(..) | Input::Stored => {}
        }
    }

    pub(super) async fn take_lane(
        &mut self,
        purpose: Purpose,
        reader: FrameReader,
        writer: FrameWriter,
    ) {
        match &self.gathering {
            Some(gathering) => gathering.tell(Order::Lane(purpose, reader, writer)).await,
            None => self.lanes.push((purpose, reader, writer)),
        }
    }

    pub(super) async fn limit_gathering(&mut self, limit: Option<BytesPerSec>) {
        self.gather_limit = limit;
        if let Some(gathering) = &self.gathering {
            gathering.tell(Order::Limit(limit)).await;
        }
    }

    /// The guest runs: sees its pages in, if they follow it.
    pub(super) async fn gather_on(&mut self, outcome: Outcome) -> Outcome {
        if outcome != Outcome::Running || self.gathering.is_none() {
            return outcome;
        }
        self.progress.enter(match self.mode {
            Mode::ScatterGather => Phase::Gather,
            _ => Phase::PostCopy,
        });
        let end = self.until_whole().await;
        self.gathering = None;
        match end {
            End::Whole => {
                self.end_gathering().await;
                outcome
            }
            End::Died => {
                let (source, _) = self.machine.source();
                let generation = self.machine.generation();
                if let Err(error) = self.context.store.end_dead(&self.vm, generation, source) {
                    tracing::error!(%error, "what was remembered of a guest that died stays");
                }
                Outcome::Died
            }
        }
    }

    async fn until_whole(&mut self) -> End {
        let mut show = tokio::time::interval(SHOW_EVERY);
        let (mut meter, mut acked, mut released) = (RateMeter::default(), clock::now(), false);
        let Some(gathering) = &self.gathering else { return End::Whole };
        let mut seen = gathering.seen.clone();
        gathering.tell(Order::Runs).await;
        loop {
            tokio::select! {
                done = is_done(&mut seen) => match done {
                    true => {
                        let last = seen.borrow().clone();
                        self.show_gathered(&last, &mut meter);
                        return End::Whole;
                    }
                    // It has ended without: what it said stays to be seen.
                    false => self.until_gone().await,
                },
                input = self.inputs.recv() => {
                    self.take_input_gathering(input).await;
                    continue;
                }
                () = gone(self.qmp.as_ref()) => return End::Died,
                _ = show.tick() => {}
            }
            let now = seen.borrow().clone();
            self.show_gathered(&now, &mut meter);
            if now.released && !released {
                match self.release().await {
                    Ok(()) => released = true,
                    Err(failure) => {
                        tracing::error!(reason = %failure.line(), "the source has to wait");
                    }
                }
            }
            if acked.elapsed() >= ACK_EVERY {
                acked = clock::now();
                if let Some(writer) = &mut self.writer
                    && writer.send(&Frame::Ack(now.bytes)).await.is_err()
                {
                    // A source that wants to know asks.
                    self.writer = None;
                }
            }
        }
    }

    /// Pages can no longer be brought: the guest stands still where it misses one, until somebody
    /// ends it.
    async fn until_gone(&mut self) {
        let reason = self.gathering.as_ref().and_then(|g| g.seen.borrow().failed.clone());
        let (vm, reason) = (self.vm.clone(), reason.unwrap_or_default());
        self.progress.update(|progress| {
            progress.reason = format!(
                "{vm} runs here without all of its memory, and the rest cannot be brought any more ({reason})"
            );
        });
        gone(self.qmp.as_ref()).await;
    }

    pub(super) async fn take_input_gathering(&mut self, input: Option<Input>) {
        match input {
            Some(Input::Lane(purpose, reader, writer)) => {
                self.take_lane(purpose, reader, writer).await;
            }
            Some(Input::Limit(limit)) => self.limit_gathering(limit).await,
            Some(Input::Commit(generation, answer)) => {
                let word = match generation == self.machine.generation() {
                    // RUNNING would end the hand-over, and its pages are not here yet.
                    true => Frame::Standing(Standing::Gathering),
                    false => Frame::Refused("another generation runs here".into()),
                };
                let _ = answer.send(word);
            }
            Some(Input::Cancel { answer, .. } | Input::Claim(answer)) => {
                let _ = answer.send(false);
            }
            Some(Input::Link(..)) => {}
            Some(Input::Stored) => self.source_may_go().await,
            None => tokio::time::sleep(SHOW_EVERY).await,
        }
    }

    fn show_gathered(&mut self, seen: &Seen, meter: &mut RateMeter) {
        let rate = meter.read(clock::now(), seen.bytes);
        let left = seen.total.saturating_sub(seen.arrived).saturating_mul(4096);
        let vm = self.vm.clone();
        self.progress.update(|progress| {
            if let Some(sentence) = seen.missing.sentence(vm.as_str()) {
                progress.reason = sentence;
            } else if seen.stuck > 0 {
                progress.reason = format!(
                    "{vm} stands still: {} pages that it waits for are in no store that answers, and not at the source",
                    seen.stuck
                );
            } else {
                progress.reason.clear();
            }
            progress.pages_total = seen.total;
            progress.pages_arrived = seen.arrived;
            progress.pages_stored = seen.stored;
            progress.faults_served = seen.faults;
            progress.faults_from_stores = seen.waited.served;
            progress.fault_wait_p50_us = seen.waited.p50_us;
            progress.fault_wait_p99_us = seen.waited.p99_us;
            progress.fault_overtaken = seen.waited.overtaken;
            progress.bytes_sent = progress.bytes_sent.max(seen.bytes);
            progress.bytes_remaining = left;
            progress.rate_bits_per_sec = rate;
        });
    }

    /// Nothing is elsewhere any more. The source goes when this is durable and said, not before.
    async fn end_gathering(&mut self) {
        loop {
            let (store, vm) = (self.context.store.clone(), self.vm.clone());
            match crate::tasks::blocking(move || store.end_gathering(&vm)).await {
                Ok(()) => break,
                Err(error) => {
                    tracing::error!(%error, "the source has to wait until this is on the disk");
                    tokio::time::sleep(ACK_EVERY).await;
                }
            }
        }
        self.context.guests.forget_monitor(&self.vm);
        self.say_released().await;
    }
}
