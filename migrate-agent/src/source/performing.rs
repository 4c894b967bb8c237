//! What the source's hand-over machine decides is performed here, and nothing else decides.
//!
//! A record that cannot be made durable is not acted on: the machine is taken up again from the one
//! that is on the disk. Deliberately not here: the machine (`handover::source`), and what is done to
//! the guest (`guest`).

use std::time::Duration;

use lifeboat_protocol::ids::Generation;
use lifeboat_scatter_gather::link::Frame;

use super::{Failure, SourceTask};
use crate::handover::source::{Action, Event, Source};
use crate::handover::store::StoreError;

impl SourceTask {
    /// Gives the machine an event and performs what it wants done.
    pub(super) async fn tell(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.machine.apply(event, &mut actions);
        tracing::debug!(?event, state = ?self.machine.state(), "hand-over");
        self.perform_all(actions).await;
    }

    /// Performs actions of which a failed one must not keep the later ones from being tried.
    pub(super) async fn perform_all(&mut self, actions: Vec<Action>) {
        for action in actions {
            let fatal = matches!(action, Action::Persist(_));
            if let Err(failure) = self.perform(vec![action]).await {
                tracing::error!(error = %failure.line(), "hand-over step failed");
                self.progress.update(|progress| progress.reason = failure.line());
                if fatal {
                    // What could not be made durable must not be acted on: the record on the
                    // disk stays in force, and the machine is taken up from it.
                    self.reload().await;
                    return;
                }
            }
        }
    }

    /// After a failed write: the state is what the disk says, whatever was meant.
    async fn reload(&mut self) {
        while let Err(error) = self.reload_once() {
            tracing::error!(%error, "ownership record cannot be read; trying again");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    fn reload_once(&mut self) -> Result<(), StoreError> {
        if let Some(record) = self.context.store.read(&self.order.vm)? {
            let mut ignored = Vec::new();
            if let Some(machine) =
                Source::resume(&record, self.context.guests.lives(&self.order.vm), &mut ignored)
            {
                self.machine = machine;
            }
        }
        Ok(())
    }

    pub(super) async fn perform(&mut self, actions: Vec<Action>) -> Result<(), Failure> {
        for action in actions {
            let name = action.name();
            crate::marks::pass("source", "before", name).await;
            match action {
                Action::Persist(record) => {
                    let (store, vm) = (self.context.store.clone(), self.order.vm.clone());
                    crate::tasks::blocking(move || store.write(&vm, &record)).await?;
                    self.pause.lap("recorded");
                }
                Action::SendCommit(generation) => self.send_commit(generation).await,
                Action::SendAbort => {
                    let reason = self.progress.now().reason;
                    if let Some(writer) = &mut self.writer {
                        // Best effort: a destination that does not hear it asks.
                        let _ = writer.send(&Frame::Abort(reason)).await;
                        writer.close().await;
                    }
                }
                Action::ResumeGuest => self.bring_guest_back().await?,
                Action::QuitGuest => {
                    self.context.guests.end(&self.order.vm, true).await?;
                    let elapsed = self.progress.elapsed_ms();
                    self.progress.update(|progress| progress.eviction_ms = elapsed);
                }
                // `finish` asks for as long as the machine is open.
                Action::Ask => {}
            }
            crate::marks::pass("source", "after", name).await;
        }
        Ok(())
    }

    async fn send_commit(&mut self, generation: Generation) {
        if let Some(writer) = &mut self.writer
            && let Err(error) = writer.send(&Frame::Commit(generation)).await
        {
            tracing::error!(%error, "COMMIT could not be sent on the link");
        }
    }
}
