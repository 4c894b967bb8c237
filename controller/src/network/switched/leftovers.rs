//! What a controller that was killed left behind: of migrations that still live it is taken over
//! into the ledger, the rest is taken away.
//!
//! Used by [`super::SwitchNetwork`] some times after a start. Everything is told apart by cookies
//! and marks alone.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use lifeboat_ovs::openflow::multipart::{Reply, Request};
use lifeboat_ovs::openflow::{Message, SwitchHandle};
use lifeboat_ovs::qos;
use lifeboat_protocol::ids::{EvacuationId, MigrationId, SwitchId};
use lifeboat_protocol::terms::ReservationKind;
use lifeboat_protocol::units::BitsPerSec;

use super::hold::METER;
use super::mark::{self, Cookie, FoundPage, Kind, OWNER_COOKIE, OWNER_MASK};
use super::queues::FoundQueue;
use super::{Inner, WITHIN, locked, of_openflow, queues};
use crate::network::{Hop, NetworkError, PortRef, ReleaseFailure, ReleaseReport};

/// The queues that were found: whose, and where.
type Queues = BTreeMap<(EvacuationId, PortRef), FoundQueue>;

/// What is ours on a switch.
struct Seen {
    cookies: Vec<Cookie>,
    pages: Vec<FoundPage>,
    /// What everybody else may send, where our meter holds them back.
    meter: Option<BitsPerSec>,
}

/// The migrations that live, by the tags in their cookies.
struct Alive(BTreeMap<(u64, u64), (EvacuationId, MigrationId)>);

impl Alive {
    fn new(keep: &[MigrationId]) -> Self {
        let tagged = |migration: &MigrationId| {
            let evacuation = mark::evacuation_of(migration)?;
            let tags = (mark::evacuation_tag(&evacuation), mark::migration_tag(migration));
            Some((tags, (evacuation, migration.clone())))
        };
        Self(keep.iter().filter_map(tagged).collect())
    }

    fn evacuations(&self) -> BTreeSet<&EvacuationId> {
        self.0.values().map(|(evacuation, _)| evacuation).collect()
    }
}

impl Inner {
    /// See [`crate::network::Network::release_leftovers`].
    pub(super) async fn release_leftovers(&self, keep: Vec<MigrationId>) -> ReleaseReport {
        let _changing = self.changing.lock().await;
        let alive = Alive::new(&keep);
        let mut report = ReleaseReport::default();
        let found = self.found_queues().await;
        let switches: Vec<SwitchId> =
            self.connections.switches().map(|(switch, _)| switch.clone()).collect();
        let mut pages: BTreeMap<(EvacuationId, MigrationId), (FoundPage, BTreeSet<SwitchId>)> =
            BTreeMap::new();
        let seen = switches.iter().map(|switch| async move { (switch, self.ours(switch).await) });
        let mut doomed: Vec<(SwitchId, Vec<Cookie>)> = Vec::new();
        let mut meters = BTreeMap::new();
        for (switch, seen) in join_all(seen).await {
            let Seen { cookies, pages: here, meter } = match seen {
                Ok(seen) => seen,
                Err(error) => {
                    report.failures.push(ReleaseFailure { switch: switch.clone(), error });
                    continue;
                }
            };
            meters.extend(meter.map(|others| (switch.clone(), others)));
            for page in here {
                let tags = (page.cookie.evacuation, page.cookie.migration);
                if let Some(whose) = alive.0.get(&tags) {
                    let new = || (page, BTreeSet::new());
                    pages.entry(whose.clone()).or_insert_with(new).1.insert(switch.clone());
                }
            }
            let dead = cookies.into_iter().filter(|cookie| !self.is_wanted(*cookie, &alive));
            doomed.push((switch.clone(), dead.collect()));
        }
        self.adopt(&found, &pages, &meters);
        for (switch, cookies) in doomed {
            if let Err(error) = self.delete_all(&switch, cookies).await {
                report.failures.push(ReleaseFailure { switch, error });
            }
        }
        let kept = alive.evacuations();
        for database in self.connections.databases() {
            let doomed = |whose: &EvacuationId, at: &PortRef| {
                !kept.contains(whose) && !locked(&self.ledger).ports_of(whose).contains(at)
            };
            self.remove_queues(&database, doomed, &mut report).await;
        }
        self.pay_debts().await;
        report
    }

    async fn found_queues(&self) -> Queues {
        let mut found = Queues::new();
        for database in self.connections.databases() {
            if let Ok(snapshot) = qos::read(&database.client, WITHIN).await {
                found.extend(queues::held(&snapshot));
            }
        }
        found
    }

    /// What is ours on a switch.
    async fn ours(&self, switch: &SwitchId) -> Result<Seen, NetworkError> {
        let handle = self.connections.openflow(switch)?;
        let flows = handle.flow_stats(OWNER_COOKIE, OWNER_MASK, WITHIN).await;
        let flows = flows.map_err(|error| of_openflow(switch, "list its flows", error))?;
        let cookies = flows.iter().filter_map(|flow| Cookie::from_bits(flow.cookie));
        let cookies: Vec<Cookie> = cookies.collect();
        let meter = match cookies.iter().any(|cookie| cookie.kind == Kind::Hold) {
            true => self.found_meter(switch, &handle).await?,
            false => None,
        };
        Ok(Seen { cookies, pages: flows.iter().filter_map(FoundPage::of).collect(), meter })
    }

    /// What the meter that flows of ours use lets pass. From now on it is known to be there.
    async fn found_meter(
        &self,
        switch: &SwitchId,
        handle: &SwitchHandle,
    ) -> Result<Option<BitsPerSec>, NetworkError> {
        locked(&self.meters).insert(switch.clone());
        let reply = handle.question(Request::MeterConfig(METER), WITHIN).await;
        let reply = reply.map_err(|error| of_openflow(switch, "show its meter", error))?;
        let Reply::MeterConfig(meters) = reply else { return Ok(None) };
        let band = meters.into_iter().flat_map(|meter| meter.bands).next();
        Ok(band.map(|band| BitsPerSec(u64::from(band.rate) * 1000)))
    }

    /// Whether a flow belongs to a reservation of the ledger, or of a migration that lives.
    fn is_wanted(&self, cookie: Cookie, alive: &Alive) -> bool {
        let ledger = locked(&self.ledger);
        let mut known = ledger.evacuations().chain(alive.evacuations());
        match cookie.kind {
            // Goes by a rule of its own: see `delete_forward`.
            Kind::Forward => true,
            // A lease that goes by itself.
            Kind::Probe => true,
            // Goes with its meter: see `settle_meter`.
            Kind::Hold => true,
            Kind::Clear => known.any(|id| mark::evacuation_tag(id) == cookie.evacuation),
            Kind::Page => {
                let tags = (cookie.evacuation, cookie.migration);
                alive.0.contains_key(&tags) || ledger.has_page(tags)
            }
        }
    }

    /// Takes over what was found of migrations that live and that the ledger does not have.
    fn adopt(
        &self,
        found: &Queues,
        pages: &BTreeMap<(EvacuationId, MigrationId), (FoundPage, BTreeSet<SwitchId>)>,
        meters: &BTreeMap<SwitchId, BitsPerSec>,
    ) {
        for ((evacuation, migration), (page, switches)) in pages {
            if locked(&self.ledger).holds(evacuation, migration) {
                continue;
            }
            let mine = found
                .iter()
                .filter(|((whose, at), _)| whose == evacuation && switches.contains(&at.switch));
            let hops = mine.clone().filter_map(|((_, at), queue)| {
                let capacity = self.links.get(at)?.capacity;
                Some(Hop { at: at.clone(), capacity, rate: queue.rate })
            });
            let hops: Vec<Hop> = hops.collect();
            // Where others are held back, what is not left to them is reserved.
            let metered = self.links.iter().filter_map(|(at, link)| {
                let others = switches.get(&at.switch).and_then(|switch| meters.get(switch))?;
                let rate = link.capacity - *others;
                Some(Hop { at: at.clone(), capacity: link.capacity, rate })
            });
            let metered: Vec<Hop> = metered.collect();
            let queue = mine.clone().map(|(_, queue)| *queue).next();
            let marked = metered.first().map(|hop| FoundQueue {
                number: page.queue,
                rate: hop.rate,
                kind: ReservationKind::Borrow,
            });
            if let Some(queue) = queue.or(marked)
                && !(hops.is_empty() && metered.is_empty())
            {
                let number = queue.number;
                tracing::info!(%evacuation, %migration, number, "reservation taken over");
                let mut ledger = locked(&self.ledger);
                ledger.adopt(evacuation, migration, queue, &hops, page);
                ledger.hold_back(evacuation, migration, &metered);
            }
        }
    }

    async fn delete_all(
        &self,
        switch: &SwitchId,
        cookies: Vec<Cookie>,
    ) -> Result<(), NetworkError> {
        if !cookies.is_empty() {
            let handle = self.connections.openflow(switch)?;
            let changes = cookies.into_iter().map(|cookie| Message::FlowMod(cookie.delete()));
            let deleted = handle.change(changes.collect(), WITHIN).await;
            deleted.map_err(|error| of_openflow(switch, "delete flows", error))?;
        }
        self.settle_meter(switch).await?;
        self.delete_forward(switch).await
    }
}
