//! Taking a reservation back: flows first, then queue rows, on every switch that may hold some.
//!
//! Used by [`super::SwitchNetwork`] at the end of a migration, and by `reserve` as its undo. An
//! error on one switch does not keep the others from theirs; it is told, remembered as a debt, and
//! paid when the switch is back.
//!
//! What is to go is found by its marks, so that a controller that was restarted in between releases
//! as well as the one that reserved. Only whether *others* of the evacuation still need the queue
//! has to be known: by the ledger, else by their page flows.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use lifeboat_ovs::openflow::Message;
use lifeboat_protocol::ids::{EvacuationId, MigrationId, SwitchId};

use super::connections::Database;
use super::mark::{self, Cookie, Kind, OWNER_COOKIE, OWNER_MASK};
use super::{Inner, WITHIN, locked, of_openflow, queues};
use crate::clock::{self, UnixMs};
use crate::network::{NetworkError, PendingRelease, PortRef, ReleaseFailure, ReleaseReport};

/// What could not be released: whose, and of which migration.
pub(super) type Debt = (EvacuationId, Option<MigrationId>);

/// What is known of it.
#[derive(Debug, Clone)]
pub(super) struct Owed {
    since: UnixMs,
    tries: u32,
    failures: Vec<ReleaseFailure>,
}

impl Owed {
    fn switches(&self) -> BTreeSet<SwitchId> {
        self.failures.iter().map(|failure| failure.switch.clone()).collect()
    }
}

impl Inner {
    /// See [`crate::network::Network::release`].
    pub(super) async fn release(
        &self,
        evacuation: EvacuationId,
        migration: Option<MigrationId>,
    ) -> ReleaseReport {
        if migration.as_ref().is_some_and(|migration| locked(&self.empty).remove(migration)) {
            return ReleaseReport::default();
        }
        let _changing = self.changing.lock().await;
        let report = self.release_locked(&evacuation, migration.as_ref()).await;
        if !report.released.is_empty() {
            let ports: Vec<String> = report.released.iter().map(ToString::to_string).collect();
            tracing::info!(%evacuation, ?ports, "released");
        }
        report
    }

    /// The same for who holds `changing` already.
    pub(super) async fn release_locked(
        &self,
        evacuation: &EvacuationId,
        migration: Option<&MigrationId>,
    ) -> ReleaseReport {
        let before = locked(&self.ledger).ports_of(evacuation);
        let known = match migration {
            Some(migration) => locked(&self.ledger).holds(evacuation, migration),
            None => !before.is_empty(),
        };
        let pinned = locked(&self.ledger).is_pinned(evacuation, migration);
        locked(&self.ledger).let_go(evacuation, migration);
        let debt = (evacuation.clone(), migration.cloned());
        // What could not be released before is out there beside what the ledger says.
        let owed = locked(&self.debts).get(&debt).map(Owed::switches);
        // Unknown, or after a change of the way, it may be anywhere.
        let everywhere = pinned || (!known && owed.is_none());
        let all = self.connections.switches().map(|(switch, _)| switch.clone());
        let visited: BTreeSet<SwitchId> = match everywhere {
            true => all.collect(),
            false => {
                let held = before.iter().map(|at| at.switch.clone());
                held.chain(owed.into_iter().flatten()).collect()
            }
        };
        let report = self.clean(evacuation, migration, &visited).await;
        self.owe(debt, &report);
        report
    }

    /// Remembers what a release could not do, until one could.
    fn owe(&self, debt: Debt, report: &ReleaseReport) {
        let mut debts = locked(&self.debts);
        if report.failures.is_empty() {
            if let Some(Owed { tries, .. }) = debts.remove(&debt) {
                tracing::info!(evacuation = %debt.0, tries, "the rest is released");
            }
            return;
        }
        let now = clock::now();
        let owed = debts.entry(debt).or_insert(Owed { since: now, tries: 0, failures: Vec::new() });
        owed.tries = owed.tries.saturating_add(1);
        owed.failures.clone_from(&report.failures);
    }

    /// See [`crate::network::Network::pending`].
    pub(super) fn pending(&self) -> Vec<PendingRelease> {
        let debts = locked(&self.debts);
        let pending = |((evacuation, migration), owed): (&Debt, &Owed)| PendingRelease {
            evacuation: evacuation.clone(),
            migration: migration.clone(),
            failures: owed.failures.clone(),
            since: owed.since,
            tries: owed.tries,
        };
        debts.iter().map(pending).collect()
    }

    async fn clean(
        &self,
        evacuation: &EvacuationId,
        migration: Option<&MigrationId>,
        visited: &BTreeSet<SwitchId>,
    ) -> ReleaseReport {
        let mut report = ReleaseReport::default();
        let shared = self.is_shared(evacuation, migration, visited).await;
        let flows = visited.iter().map(|switch| async move {
            (switch, self.delete_flows(switch, evacuation, migration, shared).await)
        });
        for (switch, result) in join_all(flows).await {
            if let Err(error) = result {
                report.failures.push(ReleaseFailure { switch: switch.clone(), error });
            }
        }
        if shared {
            return report;
        }
        for database in self.connections.databases() {
            if database.switches.iter().any(|switch| visited.contains(switch)) {
                let doomed = |whose: &EvacuationId, at: &PortRef| {
                    whose == evacuation && !locked(&self.ledger).ports_of(evacuation).contains(at)
                };
                self.remove_queues(&database, doomed, &mut report).await;
            }
        }
        report
    }

    /// Whether a migration that the ledger does not have leaves others of its evacuation behind.
    async fn is_shared(
        &self,
        evacuation: &EvacuationId,
        migration: Option<&MigrationId>,
        visited: &BTreeSet<SwitchId>,
    ) -> bool {
        let known = locked(&self.ledger).queue(evacuation).is_some();
        let Some(migration) = migration.filter(|_| !known) else { return false };
        let (whole, own) = (mark::evacuation_tag(evacuation), mark::migration_tag(migration));
        let others = visited.iter().map(|switch| async move {
            let Ok(handle) = self.connections.openflow(switch) else { return false };
            let flows = handle.flow_stats(OWNER_COOKIE, OWNER_MASK, WITHIN).await;
            let cookies = flows.unwrap_or_default().into_iter().map(|flow| flow.cookie);
            cookies.filter_map(Cookie::from_bits).any(|cookie| {
                cookie.kind == Kind::Page && cookie.evacuation == whole && cookie.migration != own
            })
        });
        join_all(others).await.contains(&true)
    }

    pub(super) async fn delete_flows(
        &self,
        switch: &SwitchId,
        evacuation: &EvacuationId,
        migration: Option<&MigrationId>,
        shared: bool,
    ) -> Result<(), NetworkError> {
        let handle = self.connections.openflow(switch)?;
        let mut changes = vec![match migration {
            Some(migration) => mark::delete_page(evacuation, migration),
            None => mark::delete_pages(evacuation),
        }];
        if !shared && !locked(&self.ledger).is_on(evacuation, switch) {
            changes.push(mark::delete_clear(evacuation));
        }
        let changes = changes.into_iter().map(Message::FlowMod).collect();
        let doing = "delete flows";
        handle.change(changes, WITHIN).await.map_err(|e| of_openflow(switch, doing, e))?;
        self.settle_meter(switch).await?;
        self.delete_forward(switch).await
    }

    /// Takes back the flow that let a switch forward, once nothing of ours needs it and somebody
    /// else's flow forwards. Where it is the only one, it stays: to take it would cut off every VM
    /// behind that switch. (`ovs-ofctl del-flows BRIDGE cookie=0x4c42300000000000/-1` does.)
    pub(super) async fn delete_forward(&self, switch: &SwitchId) -> Result<(), NetworkError> {
        if !locked(&self.ledger).flows_on(switch, &self.ground()).is_empty() {
            return Ok(());
        }
        let handle = self.connections.openflow(switch)?;
        let flows = handle.flow_stats(0, 0, WITHIN).await;
        let flows = flows.map_err(|error| of_openflow(switch, "list its flows", error))?;
        let is_ours = |cookie| Cookie::from_bits(cookie).is_some_and(|c| c.kind == Kind::Forward);
        let ours = flows.iter().any(|flow| is_ours(flow.cookie));
        let foreign = flows.iter().any(|flow| Cookie::from_bits(flow.cookie).is_none());
        if !(ours && foreign) {
            return Ok(());
        }
        let deleted = handle.flow_mod(mark::delete_forward(), WITHIN).await;
        deleted.map_err(|error| of_openflow(switch, "delete flows", error))
    }

    /// Takes queue rows away, and gives what they were promised to those who stay.
    pub(super) async fn remove_queues(
        &self,
        database: &Database,
        doomed: impl Fn(&EvacuationId, &PortRef) -> bool,
        report: &mut ReleaseReport,
    ) {
        let Some(first) = database.switches.first() else { return };
        let mut fail = |switch: &SwitchId, error| {
            report.failures.push(ReleaseFailure { switch: switch.clone(), error });
        };
        let removed = match queues::remove(&database.client, doomed).await {
            Ok(removed) => removed,
            Err(error) => return fail(first, queues::of_database(first, error)),
        };
        for at in &removed.ports {
            let stays = locked(&self.ledger).shares(at, Default::default());
            let stays = stays.and_then(|shares| shares.queues.into_iter().next());
            if let Some(share) = stays
                && let Err(error) = self.apply_queues(&share.evacuation, at).await
            {
                fail(&at.switch, error);
            } else if removed.foreign.contains(at)
                && !locked(&self.ledger).ports().contains(at)
                && let Err(error) = self.unclassify(at).await
            {
                // The port's queues are not ours and stay, with our classifier beside them.
                fail(&at.switch, error);
            }
        }
        report.released.extend(removed.ports);
    }

    async fn unclassify(&self, at: &PortRef) -> Result<(), NetworkError> {
        let bridge = self.connections.bridge(&at.switch);
        if !bridge.is_some_and(|bridge| bridge.needs_classifier()) {
            return Ok(());
        }
        let (installer, agent) = self.classifier(&at.switch)?;
        let removed = installer.remove(&agent, vec![at.port.clone()]).await;
        removed.map_err(|error| Self::unclassified(&at.switch, &error))
    }

    /// Tries again what could not be released.
    pub(super) async fn pay_debts(&self) {
        let debts: Vec<Debt> = locked(&self.debts).keys().cloned().collect();
        for (evacuation, migration) in debts {
            self.release_locked(&evacuation, migration.as_ref()).await;
        }
    }
}
