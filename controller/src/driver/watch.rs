//! Follows one migration at the source's agent to its end.

use lifeboat_protocol::agent::{MigrationProgress, Phase};
use lifeboat_protocol::ids::{EvacuationId, HostId, MigrationId};
use tokio_stream::StreamExt;

use super::hands::{Hands, Wiring, elapsed};
use super::report;
use crate::agents::AgentError;
use crate::clock;
use crate::evacuation::Event;

impl Hands {
    /// Reports progress as it comes and returns the last event: the end, or that nobody tells any
    /// more. A stream that breaks is taken up again; an agent that knows nothing of the migration
    /// just after it was started gets the time in which its start may still be on the way.
    pub(super) async fn watch(
        &self,
        wiring: &Wiring,
        id: &EvacuationId,
        migration: &MigrationId,
        source: &HostId,
        destination: &HostId,
    ) -> Event {
        let mut heard = clock::now();
        let mut reason;
        loop {
            match self.planner.agents.watch(source, migration).await {
                Ok(mut stream) => {
                    reason = format!("the agent of {source} broke off its report");
                    while let Some(Ok(progress)) = stream.next().await {
                        heard = clock::now();
                        if progress.phase().is_final() {
                            return self.last_word(progress, destination, migration).await;
                        }
                        let progress = Event::Progress(Box::new(self.named(progress, migration)));
                        report(&wiring.inputs, id, progress).await;
                    }
                }
                Err(error @ AgentError::NotKnown { .. }) => {
                    reason = error.to_string();
                    if elapsed(heard) >= self.patience.again * 5 {
                        return Event::WatchLost { migration: migration.clone(), reason };
                    }
                }
                Err(error) => reason = error.to_string(),
            }
            if elapsed(heard) >= self.patience.watch {
                return Event::WatchLost { migration: migration.clone(), reason };
            }
            tokio::time::sleep(self.patience.again / 2).await;
        }
    }

    /// What an agent reports on a watch is about the migration that was asked for, whatever it says.
    fn named(&self, mut progress: MigrationProgress, migration: &MigrationId) -> MigrationProgress {
        progress.migration = migration.to_string();
        progress
    }

    /// The source's last word, with what only the destination has seen.
    async fn last_word(
        &self,
        progress: MigrationProgress,
        destination: &HostId,
        migration: &MigrationId,
    ) -> Event {
        let mut progress = self.named(progress, migration);
        if progress.phase() == Phase::Completed && progress.resume_unix_us == 0 {
            // Without an answer the report has one figure less.
            if let Ok(other) = self.planner.agents.query(destination, migration).await {
                progress.resume_unix_us = other.resume_unix_us;
            }
        }
        Event::Progress(Box::new(progress))
    }
}
