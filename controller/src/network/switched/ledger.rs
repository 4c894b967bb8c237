//! What is reserved for whom, as this controller knows it, and what follows for each port and
//! switch. Pure.
//!
//! Used by `switched`, which makes the switches agree with it. A restarted controller begins with
//! an empty one and fills it from the marks that it finds. Not here: how much an evacuation should
//! want (the planner says, `policy::reserve` divides), and any switch.

use std::collections::{BTreeMap, BTreeSet};

use lifeboat_ovs::openflow::PortNo;
use lifeboat_ovs::openflow::flow::FlowMod;
use lifeboat_policy::reserve::{Claim, Floor, Terms, admit};
use lifeboat_protocol::ids::{EvacuationId, MigrationId, SwitchId};
use lifeboat_protocol::terms::{ReservationKind, Urgency};
use lifeboat_protocol::units::BitsPerSec;

use super::hold::METER;
use super::mark::{self, FoundPage, Link, SLOTS, hold_flows};
use super::queues::FoundQueue;
use crate::network::{Hop, PortRef};

/// All reservations.
#[derive(Debug, Clone, Default)]
pub(super) struct Ledger {
    floor: Floor,
    evacuations: BTreeMap<EvacuationId, Holding>,
}

/// What an evacuation holds.
#[derive(Debug, Clone)]
struct Holding {
    queue: u32,
    terms: Terms,
    wishes: BTreeMap<PortRef, Wish>,
    migrations: BTreeMap<MigrationId, Held>,
}

/// What an evacuation wants of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wish {
    capacity: BitsPerSec,
    wanted: BitsPerSec,
    /// Whether others are held back by a meter there, in place of a queue for us.
    metered: bool,
}

/// What a migration needs of it.
#[derive(Debug, Clone)]
struct Held {
    slot: u16,
    link: Link,
    ports: BTreeSet<PortRef>,
    /// Whether its flows name the ports of its way.
    pinned: bool,
}

/// What pinned flows need to know of the network: a port's OpenFlow number, and the port at the
/// other end of its link.
pub(super) struct Ground<'a> {
    /// Of a port.
    pub(super) number: &'a dyn Fn(&PortRef) -> Option<u32>,
    /// Of a port.
    pub(super) peer: &'a dyn Fn(&PortRef) -> Option<PortRef>,
}

/// How a port is divided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shares {
    /// What the link carries.
    pub(super) capacity: BitsPerSec,
    /// What everybody without a queue is guaranteed: the rest, at least the floor.
    pub(super) others: BitsPerSec,
    /// What they may have at most: all that is not reserved strictly.
    pub(super) others_most: BitsPerSec,
    /// Per evacuation.
    pub(super) queues: Vec<Share>,
}

/// One evacuation's part of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Share {
    /// Whose.
    pub(super) evacuation: EvacuationId,
    /// The number of its queue.
    pub(super) queue: u32,
    /// What it is guaranteed.
    pub(super) rate: BitsPerSec,
    /// Its urgency, and whether it may have more than its rate.
    pub(super) terms: Terms,
}

impl Share {
    /// What it may have at most on a link of `capacity`.
    pub(super) fn most(&self, capacity: BitsPerSec) -> BitsPerSec {
        match self.terms.kind {
            ReservationKind::Borrow => capacity,
            ReservationKind::Strict => self.rate,
        }
    }
}

impl Ledger {
    /// An empty one.
    pub(super) fn new(floor: Floor) -> Self {
        Self { floor, evacuations: BTreeMap::new() }
    }

    /// The queue number of an evacuation.
    pub(super) fn queue(&self, evacuation: &EvacuationId) -> Option<u32> {
        self.evacuations.get(evacuation).map(|holding| holding.queue)
    }

    /// Whether a migration holds something.
    pub(super) fn holds(&self, evacuation: &EvacuationId, migration: &MigrationId) -> bool {
        let holding = self.evacuations.get(evacuation);
        holding.is_some_and(|holding| holding.migrations.contains_key(migration))
    }

    /// A queue number that neither we nor `taken` have.
    pub(super) fn free_queue(&self, taken: &BTreeSet<u32>) -> Option<u32> {
        let ours = |number: &u32| self.evacuations.values().any(|held| held.queue == *number);
        mark::queue_numbers().find(|number| !ours(number) && !taken.contains(number))
    }

    /// Writes down a migration's reservation; again is the same.
    pub(super) fn hold(
        &mut self,
        evacuation: &EvacuationId,
        migration: &MigrationId,
        terms: Terms,
        queue: u32,
        hops: &[Hop],
        link: Link,
    ) {
        let slot = self.free_slot(migration, link);
        let new = Holding { queue, terms, wishes: BTreeMap::new(), migrations: BTreeMap::new() };
        let holding = self.evacuations.entry(evacuation.clone()).or_insert(new);
        holding.terms = terms;
        for hop in hops {
            let wish = Wish { capacity: hop.capacity, wanted: hop.rate, metered: false };
            holding.wishes.insert(hop.at.clone(), wish);
        }
        let ports = hops.iter().map(|hop| hop.at.clone()).collect();
        let pinned = holding.migrations.get(migration).is_some_and(|held| held.pinned);
        holding.migrations.insert(migration.clone(), Held { slot, link, ports, pinned });
        holding.forget_unused();
    }

    /// Writes down ports of a migration that holds something where others are held back by a meter.
    pub(super) fn hold_back(
        &mut self,
        evacuation: &EvacuationId,
        migration: &MigrationId,
        hops: &[Hop],
    ) {
        let Some(holding) = self.evacuations.get_mut(evacuation) else { return };
        let Some(held) = holding.migrations.get_mut(migration) else { return };
        for hop in hops {
            let wish = Wish { capacity: hop.capacity, wanted: hop.rate, metered: true };
            holding.wishes.insert(hop.at.clone(), wish);
            held.ports.insert(hop.at.clone());
        }
    }

    /// From now on a migration's flows name the ports of its way.
    pub(super) fn pin(&mut self, evacuation: &EvacuationId, migration: &MigrationId) {
        let holding = self.evacuations.get_mut(evacuation);
        if let Some(held) = holding.and_then(|holding| holding.migrations.get_mut(migration)) {
            held.pinned = true;
        }
    }

    /// Whether they do, of this migration, or with `None` of any of the evacuation's.
    pub(super) fn is_pinned(
        &self,
        evacuation: &EvacuationId,
        migration: Option<&MigrationId>,
    ) -> bool {
        let all = self.evacuations.get(evacuation).into_iter().flat_map(|held| &held.migrations);
        let wanted = |id: &MigrationId| migration.is_none_or(|migration| migration == id);
        all.into_iter().any(|(id, held)| wanted(id) && held.pinned)
    }

    /// The switches that have flows of a migration.
    pub(super) fn switches_of(
        &self,
        evacuation: &EvacuationId,
        migration: &MigrationId,
        ground: &Ground<'_>,
    ) -> BTreeSet<SwitchId> {
        let holding = self.evacuations.get(evacuation);
        let held = holding.and_then(|holding| holding.migrations.get(migration));
        let ports = held.into_iter().flat_map(|held| held.ports_with_flows(ground));
        ports.map(|port| port.switch).collect()
    }

    /// The migration's own slot, else the first that no other migration over this link has.
    fn free_slot(&self, migration: &MigrationId, link: Link) -> u16 {
        let all = || self.evacuations.values().flat_map(|held| held.migrations.iter());
        let mine = all().find(|(id, held)| *id == migration && held.link == link);
        if let Some((_, held)) = mine {
            return held.slot;
        }
        let used: BTreeSet<u16> = all()
            .filter(|(id, held)| *id != migration && held.link == link)
            .map(|(_, held)| held.slot)
            .collect();
        (0..SLOTS).find(|slot| !used.contains(slot)).unwrap_or_default()
    }

    /// Takes over what a controller before this one reserved.
    pub(super) fn adopt(
        &mut self,
        evacuation: &EvacuationId,
        migration: &MigrationId,
        found: FoundQueue,
        hops: &[Hop],
        page: &FoundPage,
    ) {
        // Nobody but the operator's order knows the urgency; what was reserved is its best witness.
        let most = hops.iter().map(|hop| hop.rate.0 * 100 / hop.capacity.0.max(1)).max();
        let percent = u32::try_from(most.unwrap_or_default().min(100)).unwrap_or_default();
        let Ok(urgency) = Urgency::new(percent) else { return };
        let terms = Terms { urgency, kind: found.kind };
        self.hold(evacuation, migration, terms, found.number, hops, page.link);
        let holding = self.evacuations.get_mut(evacuation);
        if let Some(held) = holding.and_then(|held| held.migrations.get_mut(migration)) {
            (held.slot, held.pinned) = (page.slot, page.pinned);
        }
    }

    /// Changes what an evacuation wants of a port, where it holds one. Answers whether it does.
    pub(super) fn want(
        &mut self,
        evacuation: &EvacuationId,
        at: &PortRef,
        wanted: BitsPerSec,
    ) -> bool {
        let holding = self.evacuations.get_mut(evacuation);
        let wish = holding.and_then(|holding| holding.wishes.get_mut(at));
        wish.map(|wish| wish.wanted = wanted).is_some()
    }

    /// Forgets a migration, or with `None` the whole evacuation. Answers the ports that the
    /// evacuation held because of it and does not hold any more.
    pub(super) fn let_go(
        &mut self,
        evacuation: &EvacuationId,
        migration: Option<&MigrationId>,
    ) -> Vec<PortRef> {
        let before = self.ports_of(evacuation);
        if let Some(holding) = self.evacuations.get_mut(evacuation) {
            match migration {
                Some(migration) => drop(holding.migrations.remove(migration)),
                None => holding.migrations.clear(),
            }
            holding.forget_unused();
            if holding.migrations.is_empty() {
                self.evacuations.remove(evacuation);
            }
        }
        let after = self.ports_of(evacuation);
        before.into_iter().filter(|port| !after.contains(port)).collect()
    }

    /// The ports on which an evacuation holds a queue, or has others held back.
    pub(super) fn ports_of(&self, evacuation: &EvacuationId) -> BTreeSet<PortRef> {
        let holding = self.evacuations.get(evacuation);
        holding.into_iter().flat_map(|holding| holding.wishes.keys().cloned()).collect()
    }

    /// The migrations of an evacuation whose pages leave by a port.
    pub(super) fn migrations_at(
        &self,
        evacuation: &EvacuationId,
        at: &PortRef,
    ) -> Vec<MigrationId> {
        let held = self.evacuations.get(evacuation).into_iter().flat_map(|h| &h.migrations);
        held.filter(|(_, held)| held.ports.contains(at)).map(|(id, _)| id.clone()).collect()
    }

    /// Every port on which anybody holds a queue, or has others held back.
    pub(super) fn ports(&self) -> BTreeSet<PortRef> {
        self.evacuations.values().flat_map(|held| held.wishes.keys().cloned()).collect()
    }

    /// Whether others are held back at a port by a meter.
    pub(super) fn is_metered(&self, at: &PortRef) -> bool {
        let wishes = self.evacuations.values().filter_map(|holding| holding.wishes.get(at));
        wishes.into_iter().any(|wish| wish.metered)
    }

    /// The port of a switch where others are held back, and how it is divided.
    pub(super) fn metered_on(&self, switch: &SwitchId) -> Option<(PortRef, Shares)> {
        let ports = self.ports().into_iter().filter(|at| at.switch == *switch);
        let at = ports.into_iter().find(|at| self.is_metered(at))?;
        let shares = self.shares(&at, BitsPerSec::ZERO)?;
        Some((at, shares))
    }

    /// Whether an evacuation holds something on any port of a switch.
    pub(super) fn is_on(&self, evacuation: &EvacuationId, switch: &SwitchId) -> bool {
        self.ports_of(evacuation).iter().any(|port| port.switch == *switch)
    }

    /// Whether the migration with these tags (evacuation's and its own) holds something.
    pub(super) fn has_page(&self, tags: (u64, u64)) -> bool {
        let holds = |(id, holding): (&EvacuationId, &Holding)| {
            let mut migrations = holding.migrations.keys().map(mark::migration_tag);
            mark::evacuation_tag(id) == tags.0 && migrations.any(|tag| tag == tags.1)
        };
        self.evacuations.iter().any(holds)
    }

    /// The evacuations that hold anything.
    pub(super) fn evacuations(&self) -> impl Iterator<Item = &EvacuationId> {
        self.evacuations.keys()
    }

    /// How a port is divided among those who hold a queue there; `foreign` of it is promised to
    /// queues that are not ours. `None` when nobody holds one.
    pub(super) fn shares(&self, at: &PortRef, foreign: BitsPerSec) -> Option<Shares> {
        let holders = self
            .evacuations
            .iter()
            .filter_map(|(id, holding)| Some((id, holding, holding.wishes.get(at)?)));
        let holders: Vec<_> = holders.collect();
        let capacity = holders.iter().map(|(_, _, wish)| wish.capacity).min()?;
        // Foreign promises serve everybody else, as the floor does; the larger of the two stays.
        let (ours, floor) = match foreign > self.floor.of(capacity) {
            true => (capacity - foreign, Floor { share: 0.0, at_least: BitsPerSec::ZERO }),
            false => (capacity, self.floor),
        };
        let claims: Vec<Claim> = holders
            .iter()
            .map(|(id, holding, wish)| Claim {
                evacuation: (*id).clone(),
                urgency: holding.terms.urgency,
                wanted: wish.wanted,
            })
            .collect();
        let grants = admit(ours, floor, &claims);
        let granted = grants.iter().map(|grant| grant.rate).sum();
        let queues = holders.iter().zip(grants).map(|((id, holding, _), grant)| Share {
            evacuation: (*id).clone(),
            queue: holding.queue,
            rate: grant.rate,
            terms: holding.terms,
        });
        let queues: Vec<Share> = queues.collect();
        let strict = queues.iter().filter(|share| share.terms.kind == ReservationKind::Strict);
        let others_most = capacity - strict.map(|share| share.rate).sum();
        Some(Shares { capacity, others: capacity - granted, others_most, queues })
    }

    /// All flows of ours that a switch should have.
    pub(super) fn flows_on(&self, switch: &SwitchId, ground: &Ground<'_>) -> Vec<FlowMod> {
        let mut flows = Vec::new();
        let metered = self.metered_on(switch).and_then(|(at, _)| (ground.number)(&at));
        flows.extend(metered.into_iter().flat_map(|link| hold_flows(PortNo(link), METER)));
        let meter = metered.map(|_| METER);
        for (id, holding) in &self.evacuations {
            if self.is_on(id, switch) {
                flows.push(mark::clear_flow(id, holding.queue, meter));
            }
            for (migration, held) in &holding.migrations {
                let (slot, link) = (held.slot, held.link);
                if let Some(out) = held.out_on(switch, ground) {
                    flows.push(mark::page_flow(id, migration, slot, holding.queue, link, out));
                }
                if let Some(out) = held.back_on(switch, ground) {
                    flows.push(mark::back_flow(id, migration, slot, link, out));
                }
            }
        }
        flows
    }
}

impl Held {
    /// Where its pages leave a switch; `None` when they do not pass it.
    fn out_on(&self, switch: &SwitchId, ground: &Ground<'_>) -> Option<PortNo> {
        let port = self.ports.iter().find(|port| port.switch == *switch)?;
        // A number that is not known yet comes with the switch's next report, which mends this.
        let pinned = || (ground.number)(port).map(PortNo);
        Some(self.pinned.then(pinned).flatten().unwrap_or(PortNo::NORMAL))
    }

    /// Where its acknowledgements leave a switch, if they are told where.
    fn back_on(&self, switch: &SwitchId, ground: &Ground<'_>) -> Option<PortNo> {
        let entered = self.ports.iter().filter_map(|port| (ground.peer)(port));
        let port = entered.filter(|_| self.pinned).find(|port| port.switch == *switch)?;
        (ground.number)(&port).map(PortNo)
    }

    fn ports_with_flows(&self, ground: &Ground<'_>) -> Vec<PortRef> {
        let entered = self.ports.iter().filter_map(|port| (ground.peer)(port));
        self.ports.iter().cloned().chain(entered.filter(|_| self.pinned)).collect()
    }
}

impl Holding {
    fn forget_unused(&mut self) {
        let used: BTreeSet<&PortRef> =
            self.migrations.values().flat_map(|held| held.ports.iter()).collect();
        self.wishes.retain(|port, _| used.contains(port));
    }
}

#[cfg(test)]
mod tests;
