//! Disks that may follow their VM (`--disk on-demand`, LiveFS): what is busy is watched before they
//! go, and after RUNNING what is missing at the destination is sent until that says RELEASED.
//!
//! ```text
//!   watch_what_is_hot      QEMU is on the mount; a few seconds
//!   (disk.rs, copying.rs   hot segments, memory, seal, LOADED, COMMIT: as with any disk)
//!   until_disks_released   the mover serves and sends; one that was killed is started again
//!   rest_on                the same, found again by asking: after a lost link, or a restart
//!   (storing.rs            --disk scatter: all of it goes to an intermediary meanwhile)
//! ```
//!
//! As with pages that are here, the hand-over's machine stays at "ceded" meanwhile: QEMU, whose
//! images these are, is this host's until the destination durably wants nothing more (`serving`).
//! Deliberately not here: which block goes next (`disk::sync`).

use std::time::Duration;

use lifeboat_protocol::agent::Phase;
use lifeboat_protocol::ids::Generation;
use lifeboat_scatter_gather::link::Frame;

use super::copying::heard;
use super::disk::{DiskFailure, Leaving};
use super::{Failure, Input, SourceTask};
use crate::clock;
use crate::disk::process::client::ANSWER_LIMIT;
use crate::disk::process::control::{Report, Request, Stage};
use crate::handover::source::Event;

/// The mover is looked after this often.
const LOOK_EVERY: Duration = Duration::from_millis(200);

impl SourceTask {
    /// Whether the disks may follow their VM.
    pub(super) fn disks_follow(&self) -> bool {
        self.order.disks_follow
    }

    /// Lets the mover see what the guest uses; nothing where all of it goes before.
    pub(super) async fn watch_what_is_hot(&mut self) -> Result<(), Failure> {
        if !self.disks_follow() {
            return Ok(());
        }
        let until = clock::now() + self.order.disk_watch;
        loop {
            let left = until.saturating_duration_since(clock::now());
            tokio::select! {
                () = tokio::time::sleep(left) => return Ok(()),
                input = self.inputs.recv() => self.take_input(input, None).await?,
            }
        }
    }

    /// Has what is missing sent until RELEASED, or until the link is lost: then it is asked for.
    pub(super) async fn until_disks_released(&mut self, generation: Generation) {
        self.rest_on().await;
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let word = tokio::select! {
                word = heard(&mut self.words) => word,
                input = self.inputs.recv() => {
                    self.take_input_resting(input).await;
                    continue;
                }
                _ = look.tick() => {
                    self.look_after_rest().await;
                    continue;
                }
            };
            match word {
                Ok(Frame::Released(released)) if released == generation => {
                    self.progress.update(|progress| progress.disk_bytes_left = 0);
                    return self.tell(Event::Running(generation)).await;
                }
                Ok(_) => {}
                Err(error) => {
                    // The guest runs there; its disks have connections of their own.
                    tracing::warn!(%error, "the destination's word that it has all is asked for");
                    self.words = None;
                    return;
                }
            }
        }
    }

    /// The destination runs the guest, and wants what is missing of its disks.
    pub(super) async fn rest_on(&mut self) {
        if self.progress.now().phase() != Phase::DiskRest {
            self.progress.enter(Phase::DiskRest);
            self.progress.update(|progress| progress.reason.clear());
        }
        self.look_after_rest().await;
    }

    async fn look_after_rest(&mut self) {
        match self.serve_rest().await {
            Ok(report) => {
                let rate = self.disks.as_mut().map_or(0, |leaving| leaving.rate(&report));
                let to_store = self.go_on_to_store();
                self.progress.update(|progress| {
                    // What keeps this host: either way rids it of the VM.
                    progress.disk_bytes_left = report.left.min(to_store.left);
                    progress.disk_bytes_per_sec = (rate / 8).max(to_store.rate / 8);
                    progress.disk_bytes_sent = report.sent.saturating_add(to_store.sent);
                    progress.rate_bits_per_sec = rate.saturating_add(to_store.rate);
                    progress.reason.clone_from(&to_store.failed);
                });
            }
            Err(error) => {
                // The next look reaches another one.
                self.disks = None;
                let (vm, error) = (&self.order.vm, crate::vms::chain(&error));
                tracing::error!(%vm, error, "what is missing of its disks is not sent");
                self.progress.update(|progress| {
                    progress.reason =
                        format!("what is missing of its disks is not sent yet: {error}");
                });
            }
        }
    }

    /// Sees to it that the mover sends what is missing, whatever it knows, and says how far it is.
    async fn serve_rest(&mut self) -> Result<Report, DiskFailure> {
        let target = self.disks_go(true);
        if self.disks.is_none() {
            let mover = self.context.movers.reach(&self.order.vm).await?;
            self.disks = Some(Leaving::new(mover.ok_or(DiskFailure::NoDisks)?, None));
            self.limit_rest().await;
        }
        let Some(leaving) = &mut self.disks else { return Err(DiskFailure::NoDisks) };
        let report = leaving.mover().report().await?;
        match report.stage {
            // Started again: it knows nothing of the transfer.
            Stage::Idle => {
                leaving.mover().ask(&Request::Send(target), ANSWER_LIMIT).await?;
            }
            Stage::Sealed => {
                leaving.mover().ask(&Request::Cede, ANSWER_LIMIT).await?;
            }
            _ => {}
        }
        Ok(report)
    }

    /// Tells the mover what it may send.
    pub(super) async fn limit_rest(&mut self) {
        let network = self.limit;
        if let Some(leaving) = self.disks.as_mut().filter(|_| self.order.disks_follow) {
            let limits = leaving.limits(network);
            if let Err(error) = leaving.mover().ask(&Request::Limit(limits), ANSWER_LIMIT).await {
                tracing::warn!(%error, "the mover does not hear of its limit");
            }
        }
    }

    async fn take_input_resting(&mut self, input: Option<Input>) {
        match input {
            Some(Input::Limit(limit)) => {
                self.limit = limit;
                self.limit_rest().await;
            }
            // Nothing is written here any more that it could hold back.
            Some(Input::DiskLimit(_)) => {}
            Some(Input::Cancel { answer, .. } | Input::Claim(answer)) => {
                let _ = answer.send(false);
            }
            None => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}
