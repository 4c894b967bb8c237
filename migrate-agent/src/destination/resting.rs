//! A guest that runs here before its disks are complete (`--disk on-demand`, LiveFS): seen through
//! until nothing is missing, and QEMU is back on the images themselves.
//!
//! ```text
//!   remember_rest   before LOADED: the source stays until that says that all is here
//!   rest_on         RUNNING said: blocks come; a process that was killed is started again
//!   source_may_go   (--disk scatter) an intermediary has all of them: RELEASED, blocks come from there
//!   settle_rest     nothing is missing, durably: images named, RELEASED, QEMU swapped, process ended
//! ```
//!
//! # A guest that ends meanwhile
//!
//! It was shut down, or its QEMU has died. What it wrote is here and nowhere else, so the rest is
//! fetched all the same, and the VM is started from a whole disk, like any that ended. Only a host that has
//! been down meanwhile has lost it: what was not flushed is gone, and nothing is started from the rest.
//!
//! # A source that cannot be reached
//!
//! A read of what is missing waits 20 s and fails; `rerror=stop` pauses the guest then, and it is
//! resumed here each second, so that it goes on when the source is back. A source that is lost for good
//! leaves it standing still: docs/disks.md. Deliberately not here: the blocks (`disk::process::arrival`).

use std::time::Duration;

use lifeboat_protocol::agent::Phase;
use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_scatter_gather::link::Frame;

use super::DestinationTask;
use super::following::{Following, Seen, maps};
use super::settling::gone;
use crate::clock;
use crate::disk::process::control::Stage;
use crate::handover::destination::Outcome;
use crate::handover::rest::Rest;
use crate::progress::RateMeter;
use crate::qemu::qmp::RunState;
use crate::qemu::swap::Side;
use crate::source::disk::{DiskFailure, swap_all};
use crate::source::{Context, Failure};

/// Figures are shown this often.
const SHOW_EVERY: Duration = Duration::from_millis(200);
/// The source hears of this side at least so often, and a guest that stands still is resumed.
const TEND_EVERY: Duration = Duration::from_secs(1);

impl DestinationTask {
    /// Whether the guest's disks may follow it.
    pub(super) fn disks_follow(&self) -> bool {
        self.disks.as_ref().is_some_and(|disks| disks.following().is_some())
    }

    fn following(&self) -> Option<std::sync::Arc<Following>> {
        self.disks.as_ref()?.following()
    }

    /// What an agent before this one began.
    pub(super) fn follow_again(&mut self) {
        let rest = self.context.store.rest(&self.vm).ok().flatten();
        if let (Some(rest), Some(disks)) = (rest, &mut self.disks) {
            disks.follow_again(&self.context.movers);
            (self.disk_store, self.stored) = (rest.store, rest.stored);
        }
    }

    /// That blocks are wanted of the source, before anything is promised to it.
    pub(super) async fn remember_rest(&self) -> Result<(), Failure> {
        if !self.disks_follow() {
            return Ok(());
        }
        let (source, _) = self.machine.source();
        self.note_rest(source.clone(), false).await
    }

    /// Where the disks go by way of an intermediary: it has all, and brings the rest from now on.
    pub(super) async fn source_may_go(&mut self) {
        if self.stored || self.disk_store.is_none() || !self.disks_follow() {
            return;
        }
        (self.store_has_all, self.stored) = (true, true);
        let (source, _) = self.machine.source();
        if let Err(failure) = self.note_rest(source.clone(), false).await {
            // It is tried again.
            tracing::error!(reason = %failure.line(), "the source has to wait");
            self.stored = false;
            return;
        }
        tracing::info!(vm = %self.vm, "what is missing of its disks comes from elsewhere: the source may go");
        self.say_released().await;
    }

    async fn note_rest(&self, source: HostId, whole: bool) -> Result<(), Failure> {
        let migration = self.machine.migration().clone();
        let (store, stored) = (self.disk_store.clone(), self.stored);
        let rest = Rest { migration, source, whole, store, stored };
        let (store, vm) = (self.context.store.clone(), self.vm.clone());
        Ok(crate::tasks::blocking(move || store.write_rest(&vm, &rest)).await?)
    }

    /// The guest runs: sees its disks in, if they follow it.
    pub(super) async fn rest_on(&mut self, outcome: Outcome) -> Outcome {
        let Some(following) = self.following() else { return outcome };
        if outcome == Outcome::Running {
            self.progress.enter(Phase::DiskRest);
            self.until_disks_are_whole(&following).await;
        }
        // Nobody watches it any more, and starts it again: it is about to end.
        drop(following);
        if let Some(disks) = &mut self.disks {
            disks.let_go();
        }
        match outcome {
            Outcome::Running => self.settle_rest().await,
            // It was never seen to run. What there is of its disks stays, and nothing is started from it
            // (`vms::ownership`).
            Outcome::Died => {
                if let Err(error) = bring_arrival_home(&self.context, &self.vm).await {
                    let error = crate::vms::chain(&error);
                    tracing::error!(error, "what served its disks stays");
                }
            }
            Outcome::Discarded => {}
        }
        outcome
    }

    async fn until_disks_are_whole(&mut self, following: &Following) {
        let mut show = tokio::time::interval(SHOW_EVERY);
        show.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut meter, mut tended) = (RateMeter::default(), clock::now());
        loop {
            tokio::select! {
                input = self.inputs.recv() => {
                    self.take_input_gathering(input).await;
                    continue;
                }
                () = gone(self.qmp.as_ref()) => {
                    tracing::warn!(vm = %self.vm, "it has ended; its disks go on arriving");
                    self.qmp = None;
                    continue;
                }
                _ = show.tick() => {}
            }
            let seen = following.seen();
            self.show_rest(&seen, &mut meter);
            if following.is_at(Stage::Complete) {
                let following = self.following();
                let settled = self.meanwhile(async move {
                    match following {
                        Some(following) => following.settle().await,
                        None => Ok(()),
                    }
                });
                match settled.await {
                    Ok(()) => return,
                    Err(error) => tracing::error!(%error, "the source has to wait"),
                }
            }
            if tended.elapsed() >= TEND_EVERY {
                tended = clock::now();
                self.tend().await;
            }
        }
    }

    async fn tend(&mut self) {
        if self.store_has_all {
            self.source_may_go().await;
        }
        if let Some(writer) = &mut self.writer
            && writer.send(&Frame::Ack(0)).await.is_err()
        {
            // A source that wants to know asks.
            self.writer = None;
        }
        let Some(qmp) = self.qmp.clone() else { return };
        // While it ends a read that nobody answers it says nothing itself.
        let asked = qmp.clone();
        let status = self.meanwhile(async move { asked.query_status().await }).await;
        if status.is_ok_and(|status| status.status == RunState::IoError) {
            tracing::warn!(vm = %self.vm, "it stands still for a block that did not come; resumed");
            if let Err(error) = self.meanwhile(async move { qmp.cont().await }).await {
                tracing::warn!(%error, "not resumed yet");
            }
        }
    }

    fn show_rest(&mut self, seen: &Seen, meter: &mut RateMeter) {
        let Some(report) = &seen.report else { return };
        let rate = meter.read(clock::now(), report.sent);
        let (left, sent) = (report.left, report.sent);
        let reason = match (&seen.lost, &self.qmp) {
            (Some(why), _) => {
                format!("what serves its arriving disks cannot be started again: {why}")
            }
            (None, None) => "it has ended; its disks go on arriving".to_owned(),
            (None, Some(_)) => String::new(),
        };
        self.progress.update(|progress| {
            progress.disk_bytes_left = left;
            progress.disk_bytes_sent = sent;
            progress.disk_bytes_per_sec = rate / 8;
            progress.rate_bits_per_sec = rate;
            progress.reason = reason;
        });
    }

    /// Nothing is missing, durably. The source may go before QEMU is swapped: it is not needed for that.
    async fn settle_rest(&mut self) {
        while let Err(failure) = self.end_rest().await {
            tracing::error!(reason = %failure.line(), "the source has to wait until this is on the disk");
            tokio::time::sleep(TEND_EVERY).await;
        }
        self.say_released().await;
        loop {
            let (context, vm) = (self.context.clone(), self.vm.clone());
            match self.meanwhile(async move { bring_arrival_home(&context, &vm).await }).await {
                Ok(()) => return,
                Err(error) => {
                    let error = crate::vms::chain(&error);
                    tracing::error!(error, "its disks are all here, and stay on their mount");
                    self.progress.update(|progress| {
                        progress.reason =
                            format!("its disks are all here, and stay on their mount: {error}");
                    });
                }
            }
            tokio::time::sleep(TEND_EVERY).await;
        }
    }

    async fn end_rest(&self) -> Result<(), Failure> {
        if let Some(disks) = &self.disks {
            disks.give_last_names().await?;
        }
        let (source, _) = self.machine.source();
        self.note_rest(source.clone(), true).await
    }
}

/// Brings QEMU, if it lives, back to the images themselves, and ends the process that served them; nothing
/// where there is none. Only once nothing is missing, or the guest has gone.
pub(crate) async fn bring_arrival_home(context: &Context, vm: &VmId) -> Result<(), DiskFailure> {
    let movers = context.movers.of_arrivals();
    if !movers.knows(vm) {
        return Ok(());
    }
    if context.guests.lives(vm) {
        let Some(mut mover) = movers.reach(vm).await? else { return Ok(movers.forget(vm)?) };
        // Without it the mount is in use, and stays.
        if let Ok(qmp) = context.guests.qmp(vm).await {
            swap_all(&mut mover, &qmp, Side::Native).await?;
        }
        mover.finish().await?;
    } else {
        movers.give_up(vm).await?;
    }
    if context.store.rest(vm).is_ok_and(|rest| rest.is_none()) {
        let _ = std::fs::remove_dir_all(maps(&context.rooms, vm));
    }
    Ok(())
}
