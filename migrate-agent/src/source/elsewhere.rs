//! After RUNNING, where the guest's pages are still here: they are served until the destination says
//! that it wants nothing of this host any more. Then the hand-over is confirmed and QEMU may go.
//!
//! For as long as that lasts the hand-over's machine stays at "ceded": were this agent to die now, the
//! next one finds that record, asks the destination, hears "gathering" and serves on.

use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::agent::Phase;
use lifeboat_protocol::ids::Generation;
use lifeboat_protocol::terms::Mode;
use lifeboat_protocol::units::BytesPerSec;
use lifeboat_scatter_gather::link::Frame;

use super::copying::heard;
use super::scattering::Stored;
use super::{Input, SourceTask};
use crate::clock;
use crate::guests::GuestError;
use crate::handover::source::Event;
use crate::progress::RateMeter;

/// Figures are shown this often.
const SHOW_EVERY: Duration = Duration::from_millis(200);

impl SourceTask {
    /// Serves until RELEASED, or until the link is lost: then it is asked for.
    pub(super) async fn until_released(&mut self, generation: Generation) {
        self.enter_elsewhere();
        self.begin_scattering();
        let mut meter = RateMeter::default();
        let mut show = tokio::time::interval(SHOW_EVERY);
        loop {
            let word = tokio::select! {
                word = heard(&mut self.words) => word,
                input = self.inputs.recv() => {
                    self.take_input_elsewhere(input).await;
                    continue;
                }
                _ = show.tick() => {
                    self.show_served(&mut meter);
                    self.say_if_its_memory_went();
                    continue;
                }
            };
            match word {
                Ok(Frame::Released(released)) if released == generation => {
                    self.show_served(&mut meter);
                    return self.tell(Event::Running(generation)).await;
                }
                Ok(_) => {}
                Err(error) => {
                    // The guest runs there; its pages have connections of their own.
                    tracing::warn!(%error, "the destination's word that it has all is asked for");
                    self.words = None;
                    return;
                }
            }
        }
    }

    /// The destination runs the guest and gathers.
    pub(super) fn enter_elsewhere(&mut self) {
        let phase = match self.order.mode {
            Mode::ScatterGather => Phase::Gather,
            _ => Phase::PostCopy,
        };
        if self.progress.now().phase() != phase {
            self.progress.enter(phase);
            self.progress.update(|progress| progress.reason.clear());
        }
    }

    async fn take_input_elsewhere(&mut self, input: Option<Input>) {
        match input {
            Some(Input::Limit(limit)) => {
                self.limit = limit;
                self.limit_serving(limit);
            }
            // Nothing is written here any more that it could hold back.
            Some(Input::DiskLimit(_)) => {}
            Some(Input::Cancel { answer, .. }) => {
                let _ = answer.send(false);
            }
            Some(Input::Claim(answer)) => {
                let _ = answer.send(false);
            }
            None => tokio::time::sleep(SHOW_EVERY).await,
        }
    }

    /// What is served keeps to this limit from now on.
    pub(super) fn limit_serving(&self, limit: Option<BytesPerSec>) {
        if let Some(serving) = &self.serving {
            serving.pace.set_limit(limit);
        }
    }

    fn show_served(&mut self, meter: &mut RateMeter) {
        let Some(serving) = &self.serving else { return };
        let rate = meter.read(clock::now(), serving.pace.sent());
        let limit = self.limit.map_or(0, |limit| limit.bits_per_sec().0);
        self.show_sent();
        self.progress.update(|progress| {
            progress.rate_bits_per_sec = rate;
            progress.limit_bits_per_sec = limit;
        });
    }

    /// What has gone so far. Also without a word of the destination's: pages have connections of their own.
    pub(super) fn show_sent(&mut self) {
        let Some(serving) = &self.serving else { return };
        let (sent, stored) = (serving.pace.sent(), self.stored());
        self.progress.update(|progress| {
            progress.pages_stored = progress.pages_stored.max(stored.pages);
            progress.pages_ahead = progress.pages_ahead.max(stored.ahead);
            let all = progress.pages_total.saturating_mul(4096);
            progress.bytes_sent = progress.bytes_sent.max(sent);
            progress.bytes_remaining = all.saturating_sub(sent);
        });
    }

    /// Pages that are in stores.
    fn stored(&self) -> Stored {
        self.scattering.as_ref().map_or_else(Stored::default, |one| *one.stored.borrow())
    }

    fn say_if_its_memory_went(&mut self) {
        if let Some(error) = self.memory_went() {
            self.say_memory_lost(&error);
        }
    }

    /// Its QEMU may die while pages are wanted that are in no store.
    fn memory_went(&self) -> Option<GuestError> {
        let (vm, all) = (&self.order.vm, self.progress.now().pages_total);
        let all_stored = all > 0 && self.stored().pages >= all;
        if all_stored || self.context.guests.lives(vm) {
            return None;
        }
        self.context.guests.memory(vm).err()
    }

    /// After a restart: the destination runs the guest and this host has its pages.
    pub(super) fn serve_again(&mut self) {
        match self.open_again().err().or_else(|| self.memory_went()) {
            None => self.enter_elsewhere(),
            Some(error) => self.say_memory_lost(&error),
        }
    }

    /// After a restart: the destination has the guest, and is about to let it run. That may wait for a page
    /// which is here; where pages do not follow, nobody asks for one.
    pub(super) fn serve_who_starts(&mut self) {
        if let Err(error) = self.open_again() {
            tracing::warn!(%error, "pages of a guest that starts at the destination cannot be served");
        }
    }

    fn open_again(&mut self) -> Result<(), GuestError> {
        if self.serving.is_some() {
            return Ok(());
        }
        let memory = self.context.guests.memory(&self.order.vm)?;
        tracing::warn!("the guest is at the destination; its pages are served again");
        self.start_serving();
        if let Some(serving) = &self.serving {
            serving.open(Arc::new(memory));
            // What was under way to stores is not known any more.
            let reason = "the source's agent was started again".to_owned();
            serving.teller().tell(Frame::Abort(reason));
        }
        Ok(())
    }

    fn say_memory_lost(&mut self, error: &GuestError) {
        let (vm, destination) = (self.order.vm.clone(), self.order.destination.clone());
        let reason = format!(
            "{destination} runs {vm} and still wants pages that were in this host's memory, which cannot be read any \
             more ({error}). What {destination} has not fetched is lost: end it there and start it anew"
        );
        if self.progress.now().phase() != Phase::Lost {
            self.end_with(Phase::Lost, reason);
        }
    }
}
