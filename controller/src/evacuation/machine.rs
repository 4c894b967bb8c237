//! The rules: what each event does to an evacuation. The picture is in the module's doc.
//!
//! An event that means nothing in the present phase changes nothing: it is a late word about an
//! older attempt, or a second answer. `tests` walk every pair of phase and event.

use lifeboat_protocol::agent::{MigrationProgress, Phase};
use lifeboat_protocol::ids::{EvacuationId, HostId, MigrationId, VmId};
use serde::{Deserialize, Serialize};

use super::elsewhere::StoresOwed;
use super::event::{Action, Change, Choice, Event, PageTicket, Settlement, Waiting};
use super::leg::{
    CANCELLED, ON_ITS_WAY, arrived, blame, cancel_again, commit_seen, cut_off, end_leg, follow,
    new_leg, new_way, prove_uncertain, release, resolve_uncertain, settle, watch,
};
use super::order::EvacuationOrder;
use super::progress::leg_share;
use super::vm::{Leg, Outcome, VmPhase, VmRecord};
use crate::clock::UnixMs;
use crate::network::Reserved;

/// Where an evacuation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EvacuationState {
    /// Asked for; the plan is not there yet.
    Planning,
    /// VMs are moving.
    Running,
    /// The operator wants no more of it; what cannot be undone is finished.
    Cancelling,
    /// Every VM has moved.
    Done,
    /// Some have moved.
    Partial,
    /// Ended because asked.
    Cancelled,
    /// None has moved.
    Failed,
}

impl EvacuationState {
    /// Whether nothing more will happen by itself.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Partial | Self::Cancelled | Self::Failed)
    }

    /// The state's name as operators read it.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Planning => "planning",
            Self::Running => "running",
            Self::Cancelling => "cancelling",
            Self::Done => "done",
            Self::Partial => "partial",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
}

/// How often, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Legs per VM before it is left behind.
    pub attempts: u32,
    /// How long `uncertain` may last before the evacuation goes on without that VM, milliseconds.
    pub uncertain_ms: u64,
    /// How long a VM waits for stores whose hosts have been told to release them, milliseconds.
    #[serde(default = "stores_ms")]
    pub stores_ms: u64,
    /// Between two looks for a place while there is none, milliseconds.
    #[serde(default = "look_ms")]
    pub look_ms: u64,
}

const fn stores_ms() -> u64 {
    30_000
}

const fn look_ms() -> u64 {
    2_000
}

impl Default for Limits {
    fn default() -> Self {
        Self { attempts: 3, uncertain_ms: 60_000, stores_ms: stores_ms(), look_ms: look_ms() }
    }
}

/// One evacuation, from order to report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evacuation {
    /// Its id.
    pub id: EvacuationId,
    /// What was asked for.
    pub order: EvacuationOrder,
    /// Where it stands.
    pub state: EvacuationState,
    /// Every VM of it, in the plan's order.
    pub vms: Vec<VmRecord>,
    /// When it was asked for.
    pub started: UnixMs,
    /// When it ended.
    pub finished: Option<UnixMs>,
    /// What the plan predicted for all of it, milliseconds.
    pub predicted_ms: u64,
    /// What an operator should know about it now.
    pub detail: String,
    /// Stores that were opened, or were about to be, and are not known to have gone.
    #[serde(default)]
    pub(super) stores_owed: Vec<StoresOwed>,
    /// Whether the plan has been there.
    planned: bool,
    /// Whether an answer to `Choose` is awaited.
    choosing: bool,
    /// Room has been made since it was asked for: what it says of room may be from before.
    #[serde(skip)]
    outdated: bool,
    /// No place was found: it is looked for again then, or when something has ended.
    #[serde(default)]
    look_after: UnixMs,
    /// Migrations begun so far; names the next one.
    legs_begun: u32,
    pub(super) limits: Limits,
}

impl Evacuation {
    /// An evacuation that waits for its plan.
    #[must_use]
    pub fn new(id: EvacuationId, order: EvacuationOrder, limits: Limits, now: UnixMs) -> Self {
        Self {
            id,
            order,
            state: EvacuationState::Planning,
            vms: Vec::new(),
            started: now,
            finished: None,
            predicted_ms: 0,
            detail: String::new(),
            stores_owed: Vec::new(),
            planned: false,
            choosing: false,
            outdated: false,
            look_after: UnixMs(0),
            legs_begun: 0,
            limits,
        }
    }

    /// What `event` does, and what it makes necessary. Actions are appended in the order in which
    /// they are to be performed, after the state is durable if [`Change::State`] is returned.
    pub fn apply(&mut self, now: UnixMs, event: Event, actions: &mut Vec<Action>) -> Change {
        let change = match event {
            Event::Planned { vms } => self.planned(vms),
            Event::Chosen { choice, no_place } => self.chosen(now, choice, no_place, actions),
            Event::Reserved { migration, reserved } => self.reserved(&migration, reserved, actions),
            Event::Rerouted { migration, hops, reserved } => {
                let record = self.at(&migration, &ON_ITS_WAY);
                record.map_or(Change::Nothing, |record| new_way(record, hops, reserved))
            }
            Event::CutOff { migration, reason } => {
                let record = self.at(&migration, &ON_ITS_WAY);
                record.map_or(Change::Nothing, |record| cut_off(record, reason))
            }
            Event::ReserveFailed { migration, reason } => {
                self.reserve_failed(&migration, reason, actions)
            }
            Event::Prepared { migration, ticket } => self.prepared(&migration, ticket, actions),
            Event::PrepareFailed { migration, reason, store } => {
                self.blame(&migration, store);
                self.doubt(&migration, &[VmPhase::Preparing], &reason, actions)
            }
            Event::Started { .. } => Change::Nothing,
            Event::StartFailed { migration, reason } => {
                self.doubt(&migration, &[VmPhase::Sending], &reason, actions)
            }
            Event::Progress(progress) => self.progressed(now, *progress, actions),
            Event::WatchLost { migration, reason } => {
                self.doubt(&migration, &[VmPhase::Sending, VmPhase::Committing], &reason, actions)
            }
            Event::Settled { migration, settlement } => {
                self.settled(&migration, settlement, actions)
            }
            Event::Released { migration, failures } => self.released(&migration, &failures),
            Event::Gathering(progress) => self.gathering(&progress),
            Event::Gathered { migration, lost } => self.gathered(now, &migration, lost),
            Event::StoresReleased { migration } => self.stores_released(&migration),
            Event::CancelRequested => self.cancel(actions),
            Event::Restarted => self.restarted(actions),
            Event::Tick => self.tick(now, actions),
        };
        if change == Change::State {
            self.see_to_stores(now, actions);
            self.schedule(now, actions);
        }
        change
    }

    /// Legs that hold a slot now.
    pub fn live(&self) -> impl Iterator<Item = (&VmRecord, &Leg)> {
        let live = self.vms.iter().filter(|record| record.phase.is_live());
        live.filter_map(|record| Some((record, record.leg.as_ref()?)))
    }

    /// The record of a VM.
    #[must_use]
    pub fn record(&self, vm: &VmId) -> Option<&VmRecord> {
        self.vms.iter().find(|record| record.vm == *vm)
    }

    pub(super) fn find(&mut self, migration: &MigrationId) -> Option<&mut VmRecord> {
        let is_this = |record: &VmRecord| record.has_leg(migration);
        self.vms.iter_mut().find(|record| is_this(record))
    }

    /// The record whose current leg this is, if it stands in one of `phases`.
    pub(super) fn at(
        &mut self,
        migration: &MigrationId,
        phases: &[VmPhase],
    ) -> Option<&mut VmRecord> {
        self.find(migration).filter(|record| phases.contains(&record.phase))
    }

    fn planned(&mut self, vms: Vec<VmRecord>) -> Change {
        match self.state {
            EvacuationState::Planning => {
                self.vms = vms;
                self.state = EvacuationState::Running;
            }
            EvacuationState::Cancelling if !self.planned => {
                self.vms = vms;
                self.keep_those_who_wait();
            }
            _ => return Change::Nothing,
        }
        self.planned = true;
        Change::State
    }

    fn chosen(
        &mut self,
        now: UnixMs,
        choice: Option<Box<Choice>>,
        no_place: Vec<(VmId, String)>,
        actions: &mut Vec<Action>,
    ) -> Change {
        if !self.choosing {
            return Change::Nothing;
        }
        self.choosing = false;
        for record in self.vms.iter_mut().filter(|record| record.phase == VmPhase::Measuring) {
            record.phase = VmPhase::Waiting;
        }
        if let Some(choice) = choice {
            self.begin_leg(now, *choice, actions);
        } else if self.outdated {
            self.look_again();
        } else if self.live().next().is_some() || self.stores_will_go(now) {
            // The end of what is under way may make room.
            self.look_after = UnixMs(now.0.saturating_add(self.limits.look_ms));
            for (vm, why) in no_place {
                let of = |record: &&mut VmRecord| record.vm == vm;
                self.vms.iter_mut().filter(of).for_each(|record| record.no_place.clone_from(&why));
            }
        } else {
            // Nothing is left whose end could make room: waiting would be for ever.
            self.leave_behind(&no_place);
        }
        Change::State
    }

    fn begin_leg(&mut self, now: UnixMs, choice: Choice, actions: &mut Vec<Action>) {
        let Ok(migration) = MigrationId::new(format!("{}-m{}", self.id, self.legs_begun + 1))
        else {
            return;
        };
        let waiting = |record: &&mut VmRecord| record.phase == VmPhase::Waiting;
        let Some(record) =
            self.vms.iter_mut().filter(waiting).find(|record| record.vm == choice.vm)
        else {
            return;
        };
        self.legs_begun += 1;
        record.attempts += 1;
        record.no_place.clear();
        record.source = choice.source;
        record.phase = VmPhase::Reserving;
        record.done = 0.0;
        record.progress = None;
        let leg = new_leg(migration, choice.leg, now);
        self.stores_owed.extend(StoresOwed::by(&leg));
        let (vm, source) = (record.vm.clone(), record.source.clone());
        actions.push(Action::Reserve { vm, source, leg: Box::new(leg.clone()) });
        record.leg = Some(leg);
    }

    fn leave_behind(&mut self, no_place: &[(VmId, String)]) {
        for record in self.vms.iter_mut().filter(|record| record.phase == VmPhase::Waiting) {
            let said = no_place.iter().find(|(vm, _)| *vm == record.vm);
            let why = said.map_or("no destination was found for it", |(_, why)| why.as_str());
            record.reason = match record.reason.as_str() {
                "" => why.to_owned(),
                before => format!("{why}; its last attempt: {before}"),
            };
            record.phase = VmPhase::LeftBehind;
        }
    }

    fn reserved(
        &mut self,
        migration: &MigrationId,
        reserved: Reserved,
        actions: &mut Vec<Action>,
    ) -> Change {
        let cancelling = self.state == EvacuationState::Cancelling;
        let Some(record) = self.at(migration, &[VmPhase::Reserving]) else {
            return Change::Nothing;
        };
        let (vm, source) = (record.vm.clone(), record.source.clone());
        let Some(leg) = record.leg.as_mut() else { return Change::Nothing };
        leg.reserved = reserved;
        if cancelling {
            let stayed = Outcome::Stayed(CANCELLED.to_owned());
            return end_leg(record, stayed, actions);
        }
        actions.push(Action::Prepare { vm, source, leg: Box::new(leg.clone()) });
        record.phase = VmPhase::Preparing;
        Change::State
    }

    fn reserve_failed(
        &mut self,
        migration: &MigrationId,
        reason: String,
        actions: &mut Vec<Action>,
    ) -> Change {
        match self.at(migration, &[VmPhase::Reserving]) {
            Some(record) => end_leg(record, Outcome::Stayed(reason), actions),
            None => Change::Nothing,
        }
    }

    fn prepared(
        &mut self,
        migration: &MigrationId,
        ticket: PageTicket,
        actions: &mut Vec<Action>,
    ) -> Change {
        if self.state == EvacuationState::Cancelling {
            return self.doubt(migration, &[VmPhase::Preparing], CANCELLED, actions);
        }
        let Some(record) = self.at(migration, &[VmPhase::Preparing]) else {
            return Change::Nothing;
        };
        let (vm, source) = (record.vm.clone(), record.source.clone());
        let Some(leg) = record.leg.clone() else { return Change::Nothing };
        record.phase = VmPhase::Sending;
        let destination = leg.destination.clone();
        actions.push(Action::Start { vm, source: source.clone(), leg: Box::new(leg), ticket });
        actions.push(Action::Watch { migration: migration.clone(), source, destination });
        Change::State
    }

    fn blame(&mut self, migration: &MigrationId, store: Option<HostId>) {
        if let Some(record) = self.find(migration) {
            blame(record, store);
        }
    }

    /// What became of the leg is not certain: the agents are asked before anything else happens.
    fn doubt(
        &mut self,
        migration: &MigrationId,
        phases: &[VmPhase],
        because: &str,
        actions: &mut Vec<Action>,
    ) -> Change {
        let Some(record) = self.at(migration, phases) else { return Change::Nothing };
        record.phase = VmPhase::Settling;
        record.reason = because.to_owned();
        actions.extend(settle(record));
        Change::State
    }

    fn progressed(
        &mut self,
        now: UnixMs,
        progress: MigrationProgress,
        actions: &mut Vec<Action>,
    ) -> Change {
        let Ok(migration) = MigrationId::new(progress.migration.clone()) else {
            return Change::Nothing;
        };
        let phase = progress.phase();
        let heard = [VmPhase::Sending, VmPhase::Committing, VmPhase::Uncertain];
        let Some(record) = self.at(&migration, &heard) else { return Change::Nothing };
        if record.phase == VmPhase::Uncertain {
            return prove_uncertain(record, progress);
        }
        record.done = leg_share(record.leg.as_ref(), &progress, record.done);
        let reason = progress.reason.clone();
        let before = record.progress.as_ref().map(MigrationProgress::phase);
        record.progress = Some(progress);
        match phase {
            Phase::Completed => {
                actions.push(follow(record));
                end_leg(record, Outcome::Moved, actions)
            }
            Phase::Lost => end_leg(record, Outcome::Lost(reason), actions),
            Phase::Failed | Phase::Cancelled => {
                self.doubt(&migration, &heard[..2], &reason, actions)
            }
            Phase::Uncertain => {
                let first = record.leg_of(&migration).and_then(|leg| {
                    leg.uncertain_since.is_none().then(|| leg.uncertain_since = Some(now))
                });
                record.reason = reason;
                commit_seen(record).max(first.map_or(Change::Progress, |()| Change::State))
            }
            Phase::Committing => commit_seen(record),
            Phase::PostCopy | Phase::Gather | Phase::DiskRest => {
                // The guest runs there, long before the rest of it has come: so does its traffic.
                if before != Some(phase) {
                    actions.push(follow(record));
                }
                // A destination that is silent, and what to do.
                record.reason = reason;
                commit_seen(record)
            }
            Phase::Unspecified
            | Phase::Setup
            | Phase::DiskBulk
            | Phase::MemoryCopy
            | Phase::Switchover => Change::Progress,
        }
    }

    fn settled(
        &mut self,
        migration: &MigrationId,
        settlement: Settlement,
        actions: &mut Vec<Action>,
    ) -> Change {
        let Some(record) = self.find(migration) else { return Change::Nothing };
        if record.phase == VmPhase::Uncertain {
            return resolve_uncertain(record, settlement);
        }
        if !matches!(record.phase, VmPhase::Settling | VmPhase::Committing) {
            return Change::Nothing;
        }
        let outcome = match settlement {
            Settlement::Moved(progress) => {
                record.progress = progress.map(|progress| *progress).or(record.progress.take());
                actions.push(follow(record));
                Outcome::Moved
            }
            Settlement::Stayed { reason, store } => {
                blame(record, store);
                // What led to the doubt says more than how it was resolved.
                let why = if record.reason.is_empty() { reason } else { record.reason.clone() };
                Outcome::Stayed(why)
            }
            Settlement::Lost { reason } => Outcome::Lost(reason),
            Settlement::Uncertain { reason } => Outcome::Uncertain(reason),
        };
        end_leg(record, outcome, actions)
    }

    fn released(&mut self, migration: &MigrationId, failures: &[String]) -> Change {
        let cancelling = self.state == EvacuationState::Cancelling;
        let attempts = self.limits.attempts;
        let Some(record) = self.at(migration, &[VmPhase::Releasing]) else {
            return Change::Nothing;
        };
        let Some(leg) = record.leg.as_ref() else { return Change::Nothing };
        let (destination, failed_store) = (leg.destination.clone(), leg.failed_store.clone());
        (record.phase, record.reason) = match leg.outcome.clone() {
            Some(Outcome::Moved) => (arrived(record), String::new()),
            Some(Outcome::Lost(reason)) => (VmPhase::Lost, reason),
            Some(Outcome::Uncertain(reason)) => (VmPhase::Uncertain, reason),
            Some(Outcome::Stayed(reason)) if cancelling || record.attempts >= attempts => {
                (VmPhase::LeftBehind, reason)
            }
            Some(Outcome::Stayed(reason)) => (VmPhase::Waiting, reason),
            None => (VmPhase::LeftBehind, "its leg ended without an outcome".to_owned()),
        };
        if record.phase == VmPhase::LeftBehind && record.reason.is_empty() {
            "the agent gave no reason".clone_into(&mut record.reason);
        }
        match failed_store {
            Some(store) => record.failed_stores.push(store),
            None => record.tried.push(destination),
        }
        if !failures.is_empty() {
            self.detail = format!("not all could be given back: {}", failures.join("; "));
        }
        self.look_again();
        Change::State
    }

    fn cancel(&mut self, actions: &mut Vec<Action>) -> Change {
        if self.state.is_final() || self.state == EvacuationState::Cancelling {
            return Change::Nothing;
        }
        self.state = EvacuationState::Cancelling;
        self.keep_those_who_wait();
        for record in self.vms.iter_mut().filter(|record| record.phase == VmPhase::Sending) {
            let source = record.source.clone();
            if let Some(leg) = record.leg.as_mut().filter(|leg| !leg.cancel_sent) {
                leg.cancel_sent = true;
                actions.push(Action::Cancel { migration: leg.migration.clone(), source });
            }
        }
        Change::State
    }

    fn keep_those_who_wait(&mut self) {
        for record in &mut self.vms {
            if matches!(record.phase, VmPhase::Waiting | VmPhase::Measuring) {
                record.phase = VmPhase::LeftBehind;
                CANCELLED.clone_into(&mut record.reason);
            }
        }
    }

    /// A new controller has it: whatever was under way is asked about, nothing is assumed.
    fn restarted(&mut self, actions: &mut Vec<Action>) -> Change {
        let owing = self.ask_again();
        if self.state.is_final() {
            return if owing { Change::State } else { Change::Nothing };
        }
        if !self.planned {
            actions.push(Action::Plan);
        }
        self.choosing = false;
        let cancelling = self.state == EvacuationState::Cancelling;
        for record in &mut self.vms {
            match record.phase {
                VmPhase::Measuring => record.phase = VmPhase::Waiting,
                VmPhase::Reserving | VmPhase::Preparing => {
                    record.phase = VmPhase::Settling;
                    "the controller was restarted before it had begun"
                        .clone_into(&mut record.reason);
                    actions.extend(settle(record));
                }
                VmPhase::Sending | VmPhase::Committing => {
                    actions.extend(watch(record));
                    if cancelling && record.phase == VmPhase::Sending {
                        actions.extend(cancel_again(record));
                    }
                }
                VmPhase::Settling => actions.extend(settle(record)),
                VmPhase::Releasing => actions.extend(release(record)),
                VmPhase::Waiting
                | VmPhase::Gathering
                | VmPhase::Moved
                | VmPhase::LeftBehind
                | VmPhase::Uncertain
                | VmPhase::Lost => {}
            }
        }
        Change::State
    }

    fn tick(&mut self, now: UnixMs, actions: &mut Vec<Action>) -> Change {
        let patience = self.limits.uncertain_ms;
        let mut change = Change::Nothing;
        for record in self.vms.iter_mut().filter(|record| record.phase == VmPhase::Committing) {
            let since = record.leg.as_ref().and_then(|leg| leg.uncertain_since);
            if since.is_some_and(|since| now.since(since) >= patience) {
                let why = Outcome::Uncertain(record.reason.clone());
                change = change.max(end_leg(record, why, actions));
            }
        }
        // A look that is due is a reason to go on.
        if self.may_choose(now) { Change::State } else { change }
    }

    /// Fills free slots, and notices the end.
    fn schedule(&mut self, now: UnixMs, actions: &mut Vec<Action>) {
        if !self.planned {
            return;
        }
        if self.may_choose(now) {
            self.choose(actions);
        }
        if self.vms.iter().all(|record| record.phase.is_final()) {
            self.finish(now, actions);
        }
    }

    fn may_choose(&self, now: UnixMs) -> bool {
        let slots = self.order.parallel.max(1) as usize;
        let wanted = self.vms.iter().any(|record| record.phase == VmPhase::Waiting);
        let free = self.planned && !self.choosing && self.live().count() < slots;
        wanted && free && now >= self.look_after
    }

    /// Something has ended that may have made room.
    pub(super) fn look_again(&mut self) {
        self.outdated |= self.choosing;
        self.look_after = UnixMs(0);
    }

    fn choose(&mut self, actions: &mut Vec<Action>) {
        (self.choosing, self.outdated) = (true, false);
        let mut waiting = Vec::new();
        for record in self.vms.iter_mut().filter(|record| record.phase == VmPhase::Waiting) {
            record.phase = VmPhase::Measuring;
            waiting.push(Waiting {
                vm: record.vm.clone(),
                source: record.source.clone(),
                tried: record.tried.clone(),
                failed_stores: record.failed_stores.clone(),
            });
        }
        actions.push(Action::Choose { waiting });
    }

    /// Also called when an uncertain VM has been proven after the end: the state may get better.
    fn finish(&mut self, now: UnixMs, actions: &mut Vec<Action>) {
        let moved = self.vms.iter().filter(|record| record.phase == VmPhase::Moved).count();
        let cancelled =
            matches!(self.state, EvacuationState::Cancelling | EvacuationState::Cancelled);
        self.state = if moved == self.vms.len() {
            EvacuationState::Done
        } else if cancelled {
            EvacuationState::Cancelled
        } else if moved > 0 {
            EvacuationState::Partial
        } else {
            EvacuationState::Failed
        };
        self.finished.get_or_insert(now);
        actions.push(Action::Finished { evacuation: self.id.clone() });
    }
}
