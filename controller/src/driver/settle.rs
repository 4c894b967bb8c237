//! Finds out what became of a migration in doubt: cancels it at both agents and asks both, until
//! one of them knows.
//!
//! The source's agent decides: its record of COMMIT is durable before COMMIT is sent. Where it has
//! none, the VM never left. The destination is asked because it alone knows that it runs the VM
//! when the source cannot be asked any more.

use lifeboat_protocol::agent::{MigrationProgress, Phase};
use lifeboat_protocol::ids::{HostId, MigrationId};

use super::hands::{Hands, elapsed};
use crate::agents::AgentError;
use crate::clock;
use crate::evacuation::{Event, Settlement};

/// What one agent says about a migration.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Said {
    /// How far it is.
    Progress(Box<MigrationProgress>),
    /// It never heard of it.
    NotKnown,
    /// Nothing, or nonsense.
    Silent(String),
}

impl Said {
    fn phase(&self) -> Option<Phase> {
        match self {
            Self::Progress(progress) => Some(progress.phase()),
            Self::NotKnown | Self::Silent(_) => None,
        }
    }

    /// Whether the guest runs elsewhere already, and its pages, or blocks of its disks, are still being brought.
    fn serves_pages(&self) -> bool {
        matches!(self.phase(), Some(Phase::PostCopy | Phase::Gather | Phase::DiskRest))
    }

    fn failed_store(&self) -> Option<HostId> {
        match self {
            Self::Progress(progress) => HostId::new(progress.failed_store_host.as_str()).ok(),
            Self::NotKnown | Self::Silent(_) => None,
        }
    }

    fn reason(&self) -> String {
        match self {
            Self::Progress(progress) => progress.reason.clone(),
            Self::NotKnown => "the source's agent never began it".to_owned(),
            Self::Silent(why) => why.clone(),
        }
    }
}

/// Whether what a destination lacks of a guest that runs there is still coming.
#[derive(Debug, Default)]
struct Coming {
    last: Option<u64>,
}

impl Coming {
    /// Whether less is missing than at the last look. A destination's agent that was started again may know of more
    /// at first, or not how much: then the next looks tell.
    fn look(&mut self, destination: &Said) -> bool {
        let Said::Progress(progress) = destination else { return false };
        if !destination.serves_pages() {
            return false;
        }
        let left = progress.bytes_remaining.saturating_add(progress.disk_bytes_left);
        left > 0 && self.last.replace(left).is_some_and(|before| left < before)
    }
}

impl Hands {
    pub(super) async fn settle(
        &self,
        migration: MigrationId,
        (source, destination): (&HostId, &HostId),
        because: &str,
        committed: bool,
    ) -> Event {
        let mut begun = clock::now();
        let mut coming = Coming::default();
        loop {
            // The source first: once it has let go, the destination's no is final, too.
            let at_source = self.cancel_and_ask(source, &migration, because).await;
            let at_destination = self.cancel_and_ask(destination, &migration, because).await;
            if let Some(settlement) = judge(&at_source, &at_destination, committed) {
                return Event::Settled { migration, settlement };
            }
            // The guest runs at the destination and what is missing follows, from its source or, with that gone,
            // from elsewhere: that ends by itself.
            let comes = coming.look(&at_destination);
            if at_source.serves_pages() || comes {
                begun = clock::now();
            }
            if elapsed(begun) >= self.patience.settle {
                let reason = undecided(source, destination, &at_source, &at_destination);
                let settlement = Settlement::Uncertain { reason };
                return Event::Settled { migration, settlement };
            }
            tokio::time::sleep(self.patience.again).await;
        }
    }

    async fn cancel_and_ask(&self, host: &HostId, migration: &MigrationId, because: &str) -> Said {
        // Refused after COMMIT, and where nothing is to be cancelled: the query tells which.
        if let Err(error) = self.planner.agents.cancel(host, migration, because).await {
            tracing::debug!(%migration, %host, %error, "cancel");
        }
        self.ask(host, migration).await
    }

    /// What an agent says about a migration.
    pub(super) async fn ask(&self, host: &HostId, migration: &MigrationId) -> Said {
        match self.planner.agents.query(host, migration).await {
            Ok(progress) => Said::Progress(Box::new(progress)),
            Err(AgentError::NotKnown { .. }) => Said::NotKnown,
            Err(error) => Said::Silent(error.to_string()),
        }
    }
}

/// What two agents' words amount to; `None` while neither knows.
///
/// A source that never heard of the migration never began it. Not so once COMMIT was seen: then it
/// has lost its records, and only the destination can tell.
pub(super) fn judge(source: &Said, destination: &Said, committed: bool) -> Option<Settlement> {
    let moved = |said: &Said| match said {
        Said::Progress(progress) if progress.phase() == Phase::Completed => Some(progress.clone()),
        _ => None,
    };
    if let Some(progress) = moved(source) {
        return Some(Settlement::Moved(Some(progress)));
    }
    if moved(destination).is_some() {
        return Some(Settlement::Moved(None));
    }
    for said in [source, destination] {
        if said.phase() == Some(Phase::Lost) {
            return Some(Settlement::Lost { reason: said.reason() });
        }
    }
    match (source, source.phase()) {
        // After COMMIT, a destination fails only by refusing, durably; and a source that were still
        // waiting for its word would know the migration. It has taken its guest back.
        (Said::NotKnown, _) if committed && destination.phase() == Some(Phase::Failed) => {
            Some(Settlement::Stayed { reason: destination.reason(), store: None })
        }
        (Said::NotKnown, _) if committed => None,
        (Said::NotKnown, _) | (_, Some(Phase::Failed | Phase::Cancelled)) => {
            // Either side may have met an intermediary that is of no use.
            let store = source.failed_store().or_else(|| destination.failed_store());
            Some(Settlement::Stayed { reason: source.reason(), store })
        }
        _ => None,
    }
}

fn undecided(
    source: &HostId,
    destination: &HostId,
    at_source: &Said,
    at_destination: &Said,
) -> String {
    let words = |said: &Said| match said {
        Said::Progress(progress) => progress.phase().words().to_owned(),
        Said::NotKnown => "it never heard of it".to_owned(),
        Said::Silent(why) => why.clone(),
    };
    format!(
        "{source} says: {}; {destination} says: {}; bring the agents back, or fence one host off and use `lifeboat claim VM --fenced`",
        words(at_source),
        words(at_destination)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(phase: Phase) -> Said {
        Said::Progress(Box::new(MigrationProgress {
            phase: phase.into(),
            ..MigrationProgress::default()
        }))
    }

    fn silent() -> Said {
        Said::Silent("refused".to_owned())
    }

    #[test]
    fn the_vm_is_where_somebody_proves_it_to_be() {
        let moved = |s: &Said, d: &Said| matches!(judge(s, d, true), Some(Settlement::Moved(_)));
        assert!(moved(&said(Phase::Completed), &silent()));
        assert!(moved(&silent(), &said(Phase::Completed)));
        assert!(moved(&said(Phase::Uncertain), &said(Phase::Completed)));
    }

    #[test]
    fn a_source_that_serves_pages_is_waited_for() {
        for phase in [Phase::PostCopy, Phase::Gather, Phase::DiskRest] {
            assert!(said(phase).serves_pages());
            assert_eq!(judge(&said(phase), &silent(), true), None);
        }
        assert!(!said(Phase::Committing).serves_pages() && !silent().serves_pages());
    }

    #[test]
    fn a_destination_that_gathers_is_waited_for_as_long_as_something_comes() {
        let gathers = |phase: Phase, left| {
            Said::Progress(Box::new(MigrationProgress {
                phase: phase.into(),
                disk_bytes_left: left,
                ..MigrationProgress::default()
            }))
        };
        let mut coming = Coming::default();
        assert!(!coming.look(&gathers(Phase::DiskRest, 100)), "nothing to compare with");
        assert!(
            coming.look(&gathers(Phase::DiskRest, 90)) && coming.look(&gathers(Phase::Gather, 80))
        );
        assert!(!coming.look(&gathers(Phase::DiskRest, 80)), "it stands still");
        assert!(!coming.look(&gathers(Phase::DiskRest, 0)) && !coming.look(&silent()));
        // It was killed, and asks for some of it again.
        assert!(!coming.look(&gathers(Phase::DiskRest, 500)));
        assert!(!coming.look(&gathers(Phase::Failed, 10)));
        assert!(coming.look(&gathers(Phase::DiskRest, 499)));
    }

    #[test]
    fn it_stayed_when_the_source_says_so_whatever_the_destination_does() {
        for source in [said(Phase::Failed), said(Phase::Cancelled), Said::NotKnown] {
            for destination in [said(Phase::Setup), Said::NotKnown, silent()] {
                let found = judge(&source, &destination, false);
                assert!(matches!(found, Some(Settlement::Stayed { .. })), "{source:?}");
            }
        }
    }

    #[test]
    fn a_source_that_lost_its_records_after_commit_proves_nothing() {
        assert_eq!(judge(&Said::NotKnown, &silent(), true), None);
        assert_eq!(judge(&Said::NotKnown, &said(Phase::Cancelled), true), None);
        let refused = judge(&Said::NotKnown, &said(Phase::Failed), true);
        assert!(matches!(refused, Some(Settlement::Stayed { .. })));
    }

    /// A destination that cancelled proves nothing: the source may have committed before.
    #[test]
    fn nothing_is_decided_while_the_source_may_have_committed() {
        for source in [silent(), said(Phase::Uncertain), said(Phase::Committing)] {
            for destination in [silent(), Said::NotKnown, said(Phase::Cancelled)] {
                assert_eq!(judge(&source, &destination, false), None, "{source:?} {destination:?}");
            }
        }
    }
}
