//! The source's hands on its guest: stop it for a cold migration, bring it back after a failure.

use std::time::Duration;

use lifeboat_protocol::agent::Phase;
use lifeboat_scatter_gather::link::{Ended, Frame};
use xxhash_rust::xxh3::xxh3_64;

use super::{Failure, SourceTask};
use crate::clock;
use crate::qemu::qmp::{Qmp, RunState};

/// A guest that hears the power button has this long to shut down by itself.
const POWER_DOWN_GRACE: Duration = Duration::from_secs(10);
/// A sign of life for the destination meanwhile.
const PING_EVERY: Duration = Duration::from_millis(500);
/// A destination has this long to let go of the guest's disks.
const LET_GO_LIMIT: Duration = Duration::from_secs(10);
/// QEMU has this long to end a migration that it was told to cancel.
const CANCEL_LIMIT: Duration = Duration::from_secs(5);
/// QEMU has this long to let a guest run that it was told to resume.
const RUN_LIMIT: Duration = Duration::from_secs(2);
/// A guest that could not be resumed is tried again, for so long: a QEMU that is busy answers later.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

impl SourceTask {
    /// Cold migration: power down, and only stop where the guest does not listen. Its memory is
    /// not kept either way; its disks are consistent if it listened.
    pub(super) async fn stop_for_cold(&mut self, qmp: &Qmp) -> Result<(), Failure> {
        self.progress.enter(Phase::Switchover);
        let mut events = qmp.events();
        self.lift_disk_limit().await?;
        self.stop_seen = Some(clock::now());
        qmp.system_powerdown().await?;
        let deadline = clock::now() + POWER_DOWN_GRACE;
        while clock::now() < deadline {
            match tokio::time::timeout(PING_EVERY, events.recv()).await {
                Ok(Ok(event)) if event.name == "SHUTDOWN" => break,
                Ok(Ok(_)) => {}
                Ok(Err(_)) => break,
                Err(_) => {
                    if let Some(writer) = &mut self.writer {
                        writer.send(&Frame::Ping(0)).await?;
                    }
                }
            }
        }
        if qmp.is_closed() {
            self.guest_quit_for_cold = true;
        } else {
            qmp.stop().await?;
        }
        self.disks_must_be_in_step().await?;
        // Before END: it is what has the destination's QEMU open them.
        self.seal().await?;
        if let Some(writer) = &mut self.writer {
            writer.send(&Frame::End(Ended { total: 0, digest: xxh3_64(&[]) })).await?;
        }
        Ok(())
    }

    /// Resumes the guest. A destination that loads a guest whose pages follow opens its disks before
    /// COMMIT: it is told to let go of them. That nothing of this is durable yet does no harm: this
    /// host has not ceded, and once told, the destination durably never owns it.
    async fn cont(&mut self, qmp: &Qmp) -> Result<(), Failure> {
        let deadline = clock::now() + LET_GO_LIMIT;
        let mut told = false;
        loop {
            let Err(error) = qmp.cont().await else { return Ok(()) };
            let patient = self.memory.is_some() && !qmp.is_closed();
            if !patient || clock::now() > deadline {
                return Err(error.into());
            }
            if let Some(writer) = self.writer.as_mut().filter(|_| !told) {
                told = true;
                let reason = "the source takes its guest back".to_owned();
                let _ = writer.send(&Frame::Abort(reason)).await;
            }
            tracing::warn!(%error, "the guest cannot be resumed yet");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Has the guest run here again, as soon as its QEMU does what it is told: nobody else would.
    pub(super) async fn bring_guest_back(&mut self) -> Result<(), Failure> {
        let (began, reason) = (clock::now(), self.progress.now().reason);
        loop {
            let Err(failure) = self.resume_guest().await else {
                self.progress.update(|progress| progress.reason = reason);
                return Ok(());
            };
            let lives = self.context.guests.lives(&self.order.vm);
            if !lives || began.elapsed() > AGAIN.1 {
                return Err(failure);
            }
            let line = failure.line();
            tracing::error!(vm = %self.order.vm, error = line, "the guest cannot be resumed yet");
            self.progress.update(|progress| {
                progress.reason = format!(
                    "its guest stands still and cannot be resumed yet ({line}); it is tried on"
                );
            });
            tokio::time::sleep(AGAIN.0).await;
        }
    }

    /// Whatever QEMU was doing for the migration ends, and the guest runs again.
    async fn resume_guest(&mut self) -> Result<(), Failure> {
        let vm = self.order.vm.clone();
        // Before it runs: what was sealed would fail its writes.
        self.free_disks().await;
        if !self.context.guests.lives(&vm) {
            if self.guest_quit_for_cold {
                self.settle_disks_here().await;
                self.context.guests.start_again(&vm).await?;
                return Ok(());
            }
            return Err(Failure::GuestGone);
        }
        let qmp = self.context.guests.qmp(&vm).await?;
        if !qmp.migrate_end(CANCEL_LIMIT).await? {
            return Err(Failure::Slow { what: "cancel the migration", limit: CANCEL_LIMIT });
        }
        match qmp.query_status().await?.status {
            RunState::Running => {}
            // Powered down for a cold migration that failed: it boots again.
            RunState::Shutdown => {
                qmp.system_reset().await?;
                qmp.cont().await?;
            }
            _ => self.cont(&qmp).await?,
        }
        runs(&qmp).await?;
        // The destination may have announced the guest's addresses while it was loading.
        if let Err(error) = qmp.announce_self().await {
            tracing::warn!(%error, "the guest runs, but could not be announced");
        }
        tracing::info!("guest runs at the source again");
        Ok(())
    }
}

/// A QEMU that stops its guest just when its migration ends resumes it by itself, a moment later.
async fn runs(qmp: &Qmp) -> Result<(), Failure> {
    let deadline = clock::now() + RUN_LIMIT;
    while qmp.query_status().await?.status != RunState::Running {
        if clock::now() > deadline {
            return Err(Failure::Slow { what: "let the guest run again", limit: RUN_LIMIT });
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}
