//! The source's phases of a disk's way to another host: when it goes on, when it gives up, what it
//! may promise.
//!
//! `send` is its driver. Pure.
//!
//! ```text
//!  Monitoring --over--> Bulk --pass over--> Dirty --left <= goal--> Synchronous --seal--> Sealing
//!                        ^ \________left <= goal, or hurry__________^  |   ^                 |
//!                        |                                             |   |               sealed
//!                  (connected again: next pass)                        |   |                 v
//!                                 Dirty <---unanswered or lost---------'   '----unseal---- Sealed
//!                                   ^----------unanswered or lost---------- Sealing          |
//!                                                                                          ceded
//!                                                               Complete <--all there-- Rest <'
//! ```
//!
//! MigrateFS (section 4) is: no monitoring, every segment before the hand-over, a goal of one round
//! trip's worth (the paper: zero). LiveFS (section III) is: monitoring, the hot segments, its
//! `handover-size` as the goal, and the rest after. Both are this machine with other numbers.
//!
//! # A guest that writes faster than blocks are sent
//!
//! Its 4 KiB write makes 64 KiB dirty, so a few scattered writes outrun any link, and the dirty phase
//! would never end. In the synchronous phase nothing becomes dirty any more: a write to a clean block is
//! sent as it is, one to a dirty block is answered at once and goes with that block. So when a pass
//! leaves three quarters of what it has sent or more, the phase is entered with whatever is left, and
//! drained: further passes would take four times as long at least. The guest pays with its latency, from
//! then on only, and what it rewrites has been sent at most twice.
//!
//! Whoever has a date to keep ([`Event::Hurry`]) does not wait for the end of a pass: what is left then
//! takes what it takes on the link, and no write adds more to it than its own bytes.
//!
//! # What synchronous means
//!
//! From then on every write goes to both sides; how long a guest waits for the other one is the mirror's
//! to say. A peer that does not answer in time ends it at once: the guest runs on, what it writes is
//! noted as dirty, and the hand-over is vetoed until the goal is met again. A guest never waits for a
//! network that is gone.
//!
//! # After the seal
//!
//! `Sealed` does not end by a lost connection: COMMIT may have been sent, and only who decides about
//! the hand-over knows. It says [`Event::Ceded`] or [`Event::Unseal`].
//!
//! Deliberately not here: which block is next, rates, and the wire.

/// How much of the disk goes before the VM, and when the two sides go in step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Goal {
    /// The synchronous phase begins when at most so many blocks are left: one round trip's worth, or
    /// LiveFS' handover-size.
    pub left: u64,
    /// The VM may move while blocks are left (LiveFS); else only when none is (MigrateFS).
    pub early: bool,
}

/// Where a disk is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Reads and writes are counted; nothing is sent.
    Monitoring,
    /// The one pass over all blocks, or all hot ones.
    Bulk,
    /// What was written since is sent.
    Dirty,
    /// Every write goes to both sides; what is left is drained.
    Synchronous,
    /// The destination was told that nothing changes any more.
    Sealing,
    /// It has everything up to then, durably. The VM may move.
    Sealed,
    /// The VM runs at the destination; what is missing there is sent.
    Rest,
    /// The destination needs nothing from here.
    Complete,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Self; 8] = [
        Self::Monitoring,
        Self::Bulk,
        Self::Dirty,
        Self::Synchronous,
        Self::Sealing,
        Self::Sealed,
        Self::Rest,
        Self::Complete,
    ];
}

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The monitoring time is over.
    MonitoringOver,
    /// Every block that was to be sent in this pass is sent, and so many that must go before the
    /// hand-over are dirty again or not acknowledged.
    PassOver {
        /// So many blocks.
        left: u64,
        /// So many blocks went.
        sent: u64,
    },
    /// What writes make dirty would not be sent in time.
    Hurry,
    /// A write to both sides was not answered in time.
    Unanswered,
    /// The connection is gone, or the peer is silent.
    Lost,
    /// There is a connection (again), and what is missing there is marked.
    Connected,
    /// The VM is paused: seal.
    Seal,
    /// The destination has sealed.
    SealAcknowledged,
    /// The VM runs on here after all.
    Unseal,
    /// The VM is the destination's, and so many blocks are missing there.
    Ceded {
        /// So many, also of those that were never to go before.
        missing: u64,
    },
    /// The destination has every block.
    AllThere,
}

impl Event {
    /// One of each, for tests.
    pub const ALL: [Self; 13] = [
        Self::MonitoringOver,
        Self::PassOver { left: 0, sent: 9 },
        Self::PassOver { left: u64::MAX, sent: u64::MAX },
        Self::Hurry,
        Self::Unanswered,
        Self::Lost,
        Self::Connected,
        Self::Seal,
        Self::SealAcknowledged,
        Self::Unseal,
        Self::Ceded { missing: 0 },
        Self::Ceded { missing: 9 },
        Self::AllThere,
    ];
}

/// What its driver does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Order the segments by what was seen.
    Rank,
    /// Send every block that is dirty now and goes before the hand-over.
    BeginPass,
    /// From now on writes go to both sides, or no longer do.
    Mirror(bool),
    /// Say that the hand-over may not happen now.
    Veto(Veto),
    /// Tell the destination that nothing changes any more, and what is missing.
    SendSeal,
    /// Tell it that it changes again.
    SendUnseal,
    /// Send what is missing there, what it asks for first.
    SendRest,
    /// Nothing is left to do.
    Finish,
}

/// Why a hand-over may not happen now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Veto {
    /// The disks were never in step.
    #[error("the disks are not in step yet")]
    NotInStep,
    /// Blocks are left that have to go before.
    #[error("blocks that must go before the VM are still on their way")]
    BlocksLeft,
    /// A write was not answered.
    #[error("the destination did not answer a write in time")]
    Unanswered,
    /// No connection.
    #[error("the connection to the destination's disks is gone")]
    Lost,
}

/// One disk's way, at its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Phases {
    phase: Phase,
    connected: bool,
    goal: Goal,
    /// Blocks left when last asked.
    left: u64,
}

impl Phases {
    /// A way that begins with watching, or at once.
    #[must_use]
    pub fn new(goal: Goal, monitors: bool) -> Self {
        let phase = if monitors { Phase::Monitoring } else { Phase::Bulk };
        Self { phase, connected: false, goal, left: u64::MAX }
    }

    /// The way of a disk whose VM is the destination's already: only what is missing there goes.
    #[must_use]
    pub fn resting(goal: Goal) -> Self {
        Self { phase: Phase::Rest, connected: false, goal, left: 0 }
    }

    /// Where it is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the peer is there.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// Applies what happened; an event that does not belong to the phase changes nothing.
    pub fn apply(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Connected => return self.connected_again(),
            Event::Lost => {
                self.connected = false;
                return self.out_of_step(Veto::Lost);
            }
            Event::Unanswered => return self.out_of_step(Veto::Unanswered),
            _ => {}
        }
        if let Event::PassOver { left, .. } = event {
            self.left = left;
        }
        match (self.phase, event) {
            (Phase::Monitoring, Event::MonitoringOver) => {
                let mut actions = vec![Action::Rank];
                actions.extend(self.enter(Phase::Bulk, Action::BeginPass));
                actions
            }
            (Phase::Bulk | Phase::Dirty, Event::PassOver { left, sent }) if self.connected => {
                let outrun = !self.goal.early && left >= sent - sent / 4;
                if left <= self.goal.left || outrun {
                    self.phase = Phase::Synchronous;
                    // Mirroring first: what is written from here on never adds to what is left.
                    return vec![Action::Mirror(true), Action::BeginPass];
                }
                self.enter(Phase::Dirty, Action::BeginPass)
            }
            (Phase::Bulk | Phase::Dirty, Event::Hurry) if self.connected && !self.goal.early => {
                (self.phase, self.left) = (Phase::Synchronous, u64::MAX);
                // The pass that is going on goes on.
                vec![Action::Mirror(true), Action::BeginPass]
            }
            (Phase::Synchronous, Event::PassOver { left: 1.., .. }) => vec![Action::BeginPass],
            (Phase::Synchronous, Event::Seal) if self.left == 0 || self.goal.early => {
                self.enter(Phase::Sealing, Action::SendSeal)
            }
            (Phase::Synchronous, Event::Seal) => vec![Action::Veto(Veto::BlocksLeft)],
            (_, Event::Seal) if self.phase < Phase::Synchronous => {
                vec![Action::Veto(Veto::NotInStep)]
            }
            (Phase::Sealing, Event::SealAcknowledged) => {
                self.phase = Phase::Sealed;
                vec![]
            }
            (Phase::Sealing | Phase::Sealed, Event::Unseal) => self.unseal(),
            (Phase::Sealed, Event::Ceded { missing: 0 }) => {
                self.enter(Phase::Complete, Action::Finish)
            }
            (Phase::Sealed, Event::Ceded { .. }) => self.enter(Phase::Rest, Action::SendRest),
            (Phase::Rest, Event::AllThere) => self.enter(Phase::Complete, Action::Finish),
            _ => vec![],
        }
    }

    /// Enters `phase` and does `action`, which waits for a connection if there is none.
    fn enter(&mut self, phase: Phase, action: Action) -> Vec<Action> {
        self.phase = phase;
        if self.connected || action == Action::Finish { vec![action] } else { vec![] }
    }

    fn connected_again(&mut self) -> Vec<Action> {
        if std::mem::replace(&mut self.connected, true) {
            return vec![];
        }
        match self.phase {
            Phase::Bulk | Phase::Dirty => vec![Action::BeginPass],
            Phase::Rest => vec![Action::SendRest],
            _ => vec![],
        }
    }

    fn out_of_step(&mut self, veto: Veto) -> Vec<Action> {
        match self.phase {
            Phase::Synchronous | Phase::Sealing => {
                self.phase = Phase::Dirty;
                self.left = u64::MAX;
                let mut actions = vec![Action::Mirror(false), Action::Veto(veto)];
                actions.extend(self.connected.then_some(Action::BeginPass));
                actions
            }
            _ => vec![],
        }
    }

    fn unseal(&mut self) -> Vec<Action> {
        if self.connected {
            self.phase = Phase::Synchronous;
            return vec![Action::SendUnseal];
        }
        self.phase = Phase::Dirty;
        self.left = u64::MAX;
        vec![Action::Mirror(false)]
    }
}

#[cfg(test)]
#[path = "phases_tests.rs"]
mod tests;
