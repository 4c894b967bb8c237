//! What is reserved for whom, as this controller knows it, and what follows for each port and
//! switch. Pure.
//!
//! Used by `switched`, which makes the switches agree with it. A restarted controller begins with
//! an empty one and fills it from the marks that it finds. Not here: how much an evacuation should
//! want (the planner says, `policy::reserve` divides), and any switch.

use std::collections::{BTreeMap, BTreeSet};

use lifeboat_ovs::openflow::flow::FlowMod;
use lifeboat_policy::reserve::{Claim, Floor, admit};
use lifeboat_protocol::ids::{EvacuationId, MigrationId, SwitchId};
use lifeboat_protocol::terms::Urgency;
use lifeboat_protocol::units::BitsPerSec;

use super::mark::{self, Link, SLOTS};
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
    urgency: Urgency,
    wishes: BTreeMap<PortRef, Wish>,
    migrations: BTreeMap<MigrationId, Held>,
}

/// What an evacuation wants of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wish {
    capacity: BitsPerSec,
    wanted: BitsPerSec,
}

/// What a migration needs of it.
#[derive(Debug, Clone)]
struct Held {
    slot: u16,
    link: Link,
    ports: BTreeSet<PortRef>,
}

/// How a port is divided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shares {
    /// What the link carries.
    pub(super) capacity: BitsPerSec,
    /// What everybody without a queue is guaranteed: the rest, at least the floor.
    pub(super) others: BitsPerSec,
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
        urgency: Urgency,
        queue: u32,
        hops: &[Hop],
        link: Link,
    ) {
        let slot = self.free_slot(migration, link);
        let new = Holding { queue, urgency, wishes: BTreeMap::new(), migrations: BTreeMap::new() };
        let holding = self.evacuations.entry(evacuation.clone()).or_insert(new);
        holding.urgency = urgency;
        for hop in hops {
            let wish = Wish { capacity: hop.capacity, wanted: hop.rate };
            holding.wishes.insert(hop.at.clone(), wish);
        }
        let ports = hops.iter().map(|hop| hop.at.clone()).collect();
        holding.migrations.insert(migration.clone(), Held { slot, link, ports });
        holding.forget_unused();
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
        queue: u32,
        hops: &[Hop],
        slot: u16,
        link: Link,
    ) {
        // Nobody but the operator's order knows the urgency; what was reserved is its best witness.
        let most = hops.iter().map(|hop| hop.rate.0 * 100 / hop.capacity.0.max(1)).max();
        let percent = u32::try_from(most.unwrap_or_default().min(100)).unwrap_or_default();
        let Ok(urgency) = Urgency::new(percent) else { return };
        self.hold(evacuation, migration, urgency, queue, hops, link);
        let holding = self.evacuations.get_mut(evacuation);
        if let Some(held) = holding.and_then(|held| held.migrations.get_mut(migration)) {
            held.slot = slot;
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

    /// The ports on which an evacuation holds a queue.
    pub(super) fn ports_of(&self, evacuation: &EvacuationId) -> BTreeSet<PortRef> {
        let holding = self.evacuations.get(evacuation);
        holding.into_iter().flat_map(|holding| holding.wishes.keys().cloned()).collect()
    }

    /// Every port on which anybody holds a queue.
    pub(super) fn ports(&self) -> BTreeSet<PortRef> {
        self.evacuations.values().flat_map(|held| held.wishes.keys().cloned()).collect()
    }

    /// Whether an evacuation holds a queue on any port of a switch.
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
                urgency: holding.urgency,
                wanted: wish.wanted,
            })
            .collect();
        let grants = admit(ours, floor, &claims);
        let granted = grants.iter().map(|grant| grant.rate).sum();
        let queues = holders.iter().zip(grants).map(|((id, holding, _), grant)| Share {
            evacuation: (*id).clone(),
            queue: holding.queue,
            rate: grant.rate,
        });
        Some(Shares { capacity, others: capacity - granted, queues: queues.collect() })
    }

    /// All flows of ours that a switch should have.
    pub(super) fn flows_on(&self, switch: &SwitchId) -> Vec<FlowMod> {
        let mut flows = Vec::new();
        for (id, holding) in &self.evacuations {
            if !self.is_on(id, switch) {
                continue;
            }
            flows.push(mark::clear_flow(id, holding.queue));
            let here = |held: &Held| held.ports.iter().any(|port| port.switch == *switch);
            for (migration, held) in holding.migrations.iter().filter(|(_, held)| here(held)) {
                let (slot, queue) = (held.slot, holding.queue);
                flows.push(mark::page_flow(id, migration, slot, queue, held.link));
            }
        }
        flows
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn evacuation(n: u8) -> EvacuationId {
        EvacuationId::new(format!("e{n}")).unwrap()
    }

    fn migration(e: u8, m: u8) -> MigrationId {
        MigrationId::new(format!("e{e}-m{m}")).unwrap()
    }

    fn port(n: u8) -> PortRef {
        PortRef { switch: SwitchId::new(format!("s{n}")).unwrap(), port: format!("p{n}") }
    }

    fn hop(n: u8, mbit: u64) -> Hop {
        let (capacity, rate) = (BitsPerSec::from_mbit(100), BitsPerSec::from_mbit(mbit));
        Hop { at: port(n), capacity, rate }
    }

    fn link(n: u8) -> Link {
        Link { source: [10, 0, 0, 1].into(), destination: [10, 0, 0, n].into(), port: 7445 }
    }

    fn hold(ledger: &mut Ledger, e: u8, m: u8, urgency: u32, hops: &[Hop]) {
        let id = evacuation(e);
        let queue = ledger.queue(&id).or_else(|| ledger.free_queue(&BTreeSet::new())).unwrap();
        let urgency = Urgency::new(urgency).unwrap();
        ledger.hold(&id, &migration(e, m), urgency, queue, hops, link(2));
    }

    #[test]
    fn migrations_of_an_evacuation_share_its_queue_and_the_last_one_gives_it_back() {
        let mut ledger = Ledger::new(Floor::default());
        hold(&mut ledger, 1, 1, 75, &[hop(1, 75), hop(2, 75)]);
        hold(&mut ledger, 1, 2, 75, &[hop(2, 75), hop(3, 75)]);
        let shares = ledger.shares(&port(2), BitsPerSec::ZERO).unwrap();
        assert_eq!((shares.queues.len(), shares.queues[0].queue), (1, 3));
        assert_eq!(shares.others, BitsPerSec::from_mbit(25));
        assert_eq!(ledger.flows_on(&port(2).switch).len(), 3);
        assert_eq!(ledger.let_go(&evacuation(1), Some(&migration(1, 1))), [port(1)]);
        assert!(ledger.is_on(&evacuation(1), &port(2).switch));
        let rest = ledger.let_go(&evacuation(1), Some(&migration(1, 2)));
        assert_eq!(rest, [port(2), port(3)]);
        assert_eq!((ledger.ports().len(), ledger.queue(&evacuation(1))), (0, None));
    }

    #[test]
    fn over_one_page_link_every_migration_has_a_priority_of_its_own() {
        let mut ledger = Ledger::new(Floor::default());
        hold(&mut ledger, 1, 1, 50, &[hop(1, 50)]);
        hold(&mut ledger, 2, 1, 20, &[hop(1, 20)]);
        hold(&mut ledger, 1, 1, 50, &[hop(1, 50)]);
        let mut priorities: Vec<u16> =
            ledger.flows_on(&port(1).switch).iter().map(|flow| flow.priority).collect();
        priorities.sort_unstable();
        assert_eq!(priorities, [60_000, 60_000, 61_000, 61_001]);
    }

    #[test]
    fn the_more_urgent_takes_from_the_less_urgent_and_the_floor_stays() {
        let mut ledger = Ledger::new(Floor::default());
        hold(&mut ledger, 1, 1, 50, &[hop(1, 50)]);
        hold(&mut ledger, 2, 1, 90, &[hop(1, 90)]);
        let shares = ledger.shares(&port(1), BitsPerSec::ZERO).unwrap();
        let rates: Vec<u64> = shares.queues.iter().map(|s| s.rate.0 / 1_000_000).collect();
        assert_eq!((rates, shares.others), (vec![5, 90], BitsPerSec::from_mbit(5)));
    }

    #[test]
    fn what_foreign_queues_are_promised_is_not_promised_again() {
        let mut ledger = Ledger::new(Floor::default());
        hold(&mut ledger, 1, 1, 90, &[hop(1, 90)]);
        let shares = ledger.shares(&port(1), BitsPerSec::from_mbit(40)).unwrap();
        assert!(shares.queues[0].rate == BitsPerSec::from_mbit(60), "{shares:?}");
        let none = ledger.shares(&port(1), BitsPerSec(u64::MAX)).unwrap();
        assert_eq!(none.queues[0].rate, BitsPerSec::ZERO);
    }

    #[test]
    fn sixteen_evacuations_have_sixteen_numbers_and_the_next_has_none() {
        let mut ledger = Ledger::new(Floor::default());
        for n in 0..16 {
            hold(&mut ledger, n, 1, 5, &[hop(n, 5)]);
        }
        assert_eq!(ledger.free_queue(&BTreeSet::new()), None);
        ledger.let_go(&evacuation(4), None);
        assert_eq!(ledger.free_queue(&BTreeSet::new()), Some(19));
        assert_eq!(ledger.free_queue(&BTreeSet::from([19])), None);
    }

    proptest! {
        #[test]
        fn in_any_order_no_port_is_promised_twice_and_all_of_it_comes_back(
            steps in prop::collection::vec((0u8..3, 0u8..3, 0u8..4, 0u64..200, any::<bool>()), 0..40)
        ) {
            let mut ledger = Ledger::new(Floor::default());
            for (e, m, p, mbit, take) in steps {
                if take {
                    hold(&mut ledger, e, m, 50, &[hop(p, mbit), hop(p + 1, mbit)]);
                } else {
                    ledger.let_go(&evacuation(e), Some(&migration(e, m)));
                }
                for at in ledger.ports() {
                    let shares = ledger.shares(&at, BitsPerSec::ZERO).unwrap();
                    let sum: BitsPerSec = shares.queues.iter().map(|s| s.rate).sum();
                    prop_assert_eq!(sum + shares.others, shares.capacity);
                    prop_assert!(shares.others >= Floor::default().of(shares.capacity));
                    prop_assert!(!ledger.flows_on(&at.switch).is_empty());
                }
            }
            for e in 0..3 {
                ledger.let_go(&evacuation(e), None);
            }
            prop_assert!(ledger.ports().is_empty());
        }
    }
}
