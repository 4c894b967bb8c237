//! A small world of agents and switches that answers actions in any order and any way that real
//! ones could, kills the controller in between, and watches what must never happen.

use std::collections::{BTreeMap, BTreeSet};

use lifeboat_protocol::ids::VmId;
use proptest::prelude::*;

use super::*;

/// What is really the case with a migration, whatever the controller believes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truth {
    NotBegun,
    Copying,
    Committed,
    Ended { moved: bool },
}

struct World {
    evacuation: Evacuation,
    pending: Vec<Action>,
    truth: BTreeMap<MigrationId, (VmId, Truth)>,
    reserved: BTreeSet<MigrationId>,
    released: BTreeMap<MigrationId, u32>,
    gathered: BTreeSet<MigrationId>,
    restarts: u32,
    now: u64,
}

impl World {
    fn new(vms: usize, parallel: u32) -> Self {
        let names: Vec<String> = (0..vms).map(|n| format!("v{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (evacuation, pending) = begun(&names, EvacuationOrder { parallel, ..order("h1") });
        Self {
            evacuation,
            pending,
            truth: BTreeMap::new(),
            reserved: BTreeSet::new(),
            released: BTreeMap::new(),
            gathered: BTreeSet::new(),
            restarts: 0,
            now: 0,
        }
    }

    fn tell(&mut self, event: Event) {
        self.now += 100;
        let mut actions = Vec::new();
        let change = self.evacuation.apply(UnixMs(self.now), event, &mut actions);
        assert!(actions.is_empty() || change == Change::State, "acts before it is durable");
        for action in &actions {
            self.check(action);
        }
        self.pending.extend(actions);
        self.check_state();
    }

    /// What must hold of each action when it is wanted.
    fn check(&mut self, action: &Action) {
        match action {
            Action::Reserve { vm, leg, .. } => {
                let live = |(other, truth): &(VmId, Truth)| {
                    other == vm && matches!(truth, Truth::Copying | Truth::Committed)
                };
                assert!(!self.truth.values().any(live), "{vm} has a live migration already");
                assert!(self.reserved.insert(leg.migration.clone()), "an id is used once");
                self.truth.insert(leg.migration.clone(), (vm.clone(), Truth::NotBegun));
            }
            Action::Release { migration } => {
                assert!(self.reserved.contains(migration));
                *self.released.entry(migration.clone()).or_default() += 1;
            }
            Action::ReleaseStores { migration, .. } => {
                let truth = self.truth[migration].1;
                assert!(!matches!(truth, Truth::Copying | Truth::Committed), "{migration}: in use");
                if truth == (Truth::Ended { moved: true }) {
                    assert!(self.gathered.contains(migration), "{migration}: the only copy");
                }
            }
            _ => {}
        }
    }

    fn check_state(&self) {
        for record in &self.evacuation.vms {
            if record.phase == VmPhase::LeftBehind {
                assert!(!record.reason.is_empty(), "{} stays without a reason", record.vm);
            }
            assert!((0.0..=1.0).contains(&record.done));
        }
        let live = self.evacuation.live().count();
        assert!(live <= self.evacuation.order.parallel as usize, "{live} at a time");
    }

    /// One thing happens, chosen by `dice`.
    fn step(&mut self, dice: u16) {
        match dice % 64 {
            0 => return self.tell(Event::CancelRequested),
            1 => return self.restart(),
            2 => {
                self.now += 30_000;
                return self.tell(Event::Tick);
            }
            _ => {}
        }
        if self.pending.is_empty() {
            return self.tell(Event::Tick);
        }
        let at = usize::from(dice / 64) % self.pending.len();
        let action = self.pending.remove(at);
        self.perform(action, dice / 7 % 8);
    }

    /// Killed between its journal and its actions: what was pending is forgotten.
    fn restart(&mut self) {
        self.restarts += 1;
        self.pending.clear();
        let text = serde_json::to_string(&self.evacuation).unwrap();
        self.evacuation = serde_json::from_str(&text).unwrap();
        self.tell(Event::Restarted);
    }

    fn perform(&mut self, action: Action, luck: u16) {
        let reason = "bad luck".to_owned();
        match action {
            Action::Choose { waiting } => {
                let first = waiting.first().filter(|_| luck != 7);
                // Every other one by way of stores.
                let way = if luck.is_multiple_of(2) { choice } else { scattered };
                let choice =
                    first.map(|one| way(one.vm.as_str(), &format!("h{}", one.tried.len() + 2)));
                self.tell(Event::Chosen { choice, no_place: vec![] });
            }
            Action::Reserve { leg, .. } if luck == 1 => {
                self.tell(Event::ReserveFailed { migration: leg.migration, reason });
            }
            Action::Reserve { leg, .. } => {
                let reserved = Reserved::default();
                self.tell(Event::Reserved { migration: leg.migration, reserved });
            }
            Action::Prepare { leg, .. } if luck == 1 => {
                let store = leg.store_hosts().pop();
                self.tell(Event::PrepareFailed { migration: leg.migration, reason, store });
            }
            Action::Prepare { leg, .. } => {
                self.tell(Event::Prepared { migration: leg.migration, ticket: ticket() });
            }
            Action::Start { leg, .. } => self.start(leg.migration.clone(), luck),
            Action::Watch { ref migration, .. } => {
                let migration = migration.clone();
                self.watch(action, &migration, luck);
            }
            Action::Cancel { migration, .. } => self.cancel_at_agent(&migration),
            Action::Settle { ref migration, .. } => {
                let migration = migration.clone();
                self.settle(&migration, luck);
            }
            Action::Release { migration } => {
                self.tell(Event::Released { migration, failures: vec![] });
            }
            Action::Gather { migration, .. } => {
                self.gathered.insert(migration.clone());
                self.tell(Event::Gathered { migration, lost: None });
            }
            Action::ReleaseStores { migration, .. } => {
                self.tell(Event::StoresReleased { migration });
            }
            Action::Plan | Action::Follow { .. } | Action::Finished { .. } => {}
        }
    }

    fn start(&mut self, migration: MigrationId, luck: u16) {
        // The answer may be lost although it began.
        let began = luck != 1;
        let entry = self.truth.get_mut(&migration).unwrap();
        if began && entry.1 == Truth::NotBegun {
            entry.1 = Truth::Copying;
        }
        let reason = "no answer".to_owned();
        match luck {
            1 | 2 => self.tell(Event::StartFailed { migration, reason }),
            _ => self.tell(Event::Started { migration }),
        }
    }

    fn cancel_at_agent(&mut self, migration: &MigrationId) {
        let entry = self.truth.get_mut(migration).unwrap();
        if matches!(entry.1, Truth::NotBegun | Truth::Copying) {
            entry.1 = Truth::Ended { moved: false };
        }
    }

    /// The source's agent tells what is true, and time goes on there.
    fn watch(&mut self, again: Action, migration: &MigrationId, luck: u16) {
        let n: u32 = migration.as_str().trim_start_matches("e1-m").parse().unwrap();
        let entry = self.truth.get_mut(migration).unwrap();
        entry.1 = match (entry.1, luck) {
            (Truth::Copying, 0 | 3) => Truth::Committed,
            (Truth::Copying, 4) => Truth::Ended { moved: false },
            (Truth::Committed, 0 | 5) => Truth::Ended { moved: true },
            (same, _) => same,
        };
        let truth = entry.1;
        let lost = Event::WatchLost { migration: migration.clone(), reason: "gone".to_owned() };
        match (truth, luck) {
            (Truth::NotBegun, _) | (_, 6) => self.tell(lost),
            (Truth::Copying, _) => {
                self.pending.push(again);
                self.tell(progress(n, Phase::MemoryCopy));
            }
            (Truth::Committed, 2) => {
                self.pending.push(again);
                self.tell(progress(n, Phase::Uncertain));
            }
            (Truth::Committed, _) => {
                self.pending.push(again);
                self.tell(progress(n, Phase::Committing));
            }
            (Truth::Ended { moved: true }, _) => self.tell(progress(n, Phase::Completed)),
            (Truth::Ended { moved: false }, _) => self.tell(progress(n, Phase::Cancelled)),
        }
    }

    fn settle(&mut self, migration: &MigrationId, luck: u16) {
        self.cancel_at_agent(migration);
        let entry = self.truth.get_mut(migration).unwrap();
        let settlement = match entry.1 {
            Truth::Committed if luck == 3 => Settlement::Uncertain { reason: "silent".to_owned() },
            Truth::Committed | Truth::Ended { moved: true } => {
                entry.1 = Truth::Ended { moved: true };
                Settlement::Moved(None)
            }
            _ => Settlement::Stayed { reason: "cancelled".to_owned(), store: None },
        };
        self.tell(Event::Settled { migration: migration.clone(), settlement });
    }

    /// From here on everybody answers.
    fn drain(&mut self) {
        for _ in 0..2_000 {
            match self.pending.is_empty() {
                true => break,
                false => {
                    let action = self.pending.remove(0);
                    self.perform(action, 0);
                }
            }
        }
        assert!(self.evacuation.state.is_final(), "{:?}", self.evacuation);
        assert!(self.evacuation.finished.is_some());
    }

    /// What must hold when all is over.
    fn check_end(&self) {
        for migration in &self.reserved {
            let times = self.released.get(migration).copied().unwrap_or(0);
            assert!(times >= 1, "{migration} keeps its reservation");
            // A release whose answer died with the controller is asked for again.
            assert!(times <= 1 + self.restarts, "{migration} released {times} times");
        }
        for record in &self.evacuation.vms {
            assert!(record.phase.is_final());
            let moved = self
                .truth
                .values()
                .any(|(vm, truth)| *vm == record.vm && *truth == Truth::Ended { moved: true });
            match record.phase {
                VmPhase::Moved => assert!(moved, "{} is said to have moved", record.vm),
                VmPhase::LeftBehind => assert!(!moved, "{} is said to have stayed", record.vm),
                _ => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_events_ends_well(
        vms in 0_usize..6,
        parallel in 1_u32..4,
        dice in proptest::collection::vec(any::<u16>(), 0..120),
    ) {
        let mut world = World::new(vms, parallel);
        for throw in dice {
            world.step(throw);
        }
        world.drain();
        world.check_end();
    }
}
