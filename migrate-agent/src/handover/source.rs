//! The source's side of the hand-over: pure. Driven by `crate::source`; the picture is in
//! [`super`].
//!
//! ```text
//!               Loaded                    Running | Heard(Owned)
//!   Sending ------------------> Ceded -----------------------------> Confirmed
//!      |                          |                                     ^  |
//!      | GiveUp, NoWord,          | NoWord          Running,            |  (QEMU quits)
//!      | Refused                  v                 Heard(Owned)        |
//!      v                      Uncertain --------------------------------+
//!   Aborted                     |    |  \  Heard(Died)
//!   (guest runs here, g)        |    |   `-----------> DestinationDied
//!                       Refused |    | Claim                | Claim
//!                               v    v                      v
//!                        Returned    Claimed  <-------------'
//!                        (guest runs here again, g+2)
//! ```
//!
//! A source that comes back from a power cut with `Sending` on its disk has no guest left, and does
//! not know whether the destination had loaded it, or an operator claimed it there meanwhile. It is
//! `Returning`: it asks. A destination that stands loaded gets COMMIT, and the guest lives.

use lifeboat_protocol::ids::{Generation, HostId, MigrationId};

use super::{Record, Standing};

/// What the source is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// LOADED came, and every veto has been asked.
    Loaded(Generation),
    /// The migration failed or was cancelled.
    GiveUp,
    /// RUNNING came.
    Running(Generation),
    /// REFUSED came.
    Refused,
    /// The link broke, or the deadline for an answer passed.
    NoWord,
    /// The destination answered a question.
    Heard(Standing),
    /// An operator says that the destination is fenced off.
    Claim,
}

/// What the driver does, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Return only when the record is on the disk.
    Persist(Record),
    /// Deliver COMMIT, on the link or on a connection made for it.
    SendCommit(Generation),
    /// Tell the destination that the migration is over; best effort.
    SendAbort,
    /// Cancel what QEMU still does for the migration, resume the guest, announce it.
    ResumeGuest,
    /// The guest lives elsewhere: end the stopped QEMU and its taps.
    QuitGuest,
    /// Ask the destination for its standing, after a pause.
    Ask,
}

impl Action {
    /// Its name in logs and marks.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Persist(record) => record.name(),
            Self::SendCommit(_) => "send-commit",
            Self::SendAbort => "send-abort",
            Self::ResumeGuest => "resume-guest",
            Self::QuitGuest => "quit-guest",
            Self::Ask => "ask",
        }
    }
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The destination runs the guest.
    Confirmed,
    /// It never left.
    Aborted,
    /// Ceded, and durably refused by the destination: it runs here again.
    Returned(Generation),
    /// Taken back by an operator's word.
    Claimed(Generation),
}

/// Where the source stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Owns, sends.
    Sending,
    /// Was sending when its guest vanished with the host's power; asking.
    Returning,
    /// Past the point of no return, waiting for RUNNING on the link.
    Ceded,
    /// Past it, without word; asking.
    Uncertain,
    /// Past it; the destination owned and lost its QEMU. The stopped source guest is a
    /// checkpoint of the switchover, resumed only on demand.
    DestinationDied,
    /// Nothing more to decide.
    Over(Outcome),
}

/// The source's side of one hand-over.
#[derive(Debug, Clone)]
pub struct Source {
    state: State,
    migration: MigrationId,
    destination: HostId,
    page_address: String,
    /// The generation that the destination will own.
    next: Generation,
}

impl Source {
    /// Begins to send a VM owned at `generation`: what to persist first is in the actions.
    pub fn begin(
        generation: Generation,
        migration: MigrationId,
        destination: HostId,
        page_address: String,
        actions: &mut Vec<Action>,
    ) -> Self {
        actions.push(Action::Persist(Record::Sending {
            generation,
            migration: migration.clone(),
            destination: destination.clone(),
            page_address: page_address.clone(),
        }));
        let next = generation.next();
        Self { state: State::Sending, migration, destination, page_address, next }
    }

    /// Takes up a hand-over after a restart; `None` where the record holds none for a source.
    /// `guest_lives`: whether the guest's QEMU is still there.
    #[must_use]
    pub fn resume(record: &Record, guest_lives: bool, actions: &mut Vec<Action>) -> Option<Self> {
        match record {
            Record::Sending { generation, migration, destination, page_address } => {
                let mut source = Self {
                    state: State::Sending,
                    migration: migration.clone(),
                    destination: destination.clone(),
                    page_address: page_address.clone(),
                    next: generation.next(),
                };
                if guest_lives {
                    // The stream died with the agent, and nothing was ceded.
                    source.apply(Event::GiveUp, actions);
                } else {
                    source.state = State::Returning;
                    actions.push(Action::Ask);
                }
                Some(source)
            }
            Record::Ceded { generation, migration, destination, page_address, confirmed } => {
                let state = if *confirmed {
                    actions.push(Action::QuitGuest);
                    State::Over(Outcome::Confirmed)
                } else {
                    actions.push(Action::Ask);
                    State::Uncertain
                };
                Some(Self {
                    state,
                    migration: migration.clone(),
                    destination: destination.clone(),
                    page_address: page_address.clone(),
                    next: *generation,
                })
            }
            Record::Owner { generation, via: None, resumed: false, .. } => {
                // Taken back, and the crash came before the guest was resumed. Which migration it
                // was does not matter any more.
                actions.push(Action::ResumeGuest);
                actions.push(Action::Persist(owner(*generation, true)));
                let migration = MigrationId::new("taken-back").ok()?;
                let destination = HostId::new("unknown").ok()?;
                Some(Self {
                    state: State::Over(Outcome::Returned(*generation)),
                    migration,
                    destination,
                    page_address: String::new(),
                    next: *generation,
                })
            }
            Record::Owner { .. } | Record::Loaded { .. } | Record::Refused { .. } => None,
        }
    }

    /// Where it stands.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// The generation that the destination owns, or will own.
    #[must_use]
    pub const fn next_generation(&self) -> Generation {
        self.next
    }

    /// The migration.
    #[must_use]
    pub const fn migration(&self) -> &MigrationId {
        &self.migration
    }

    /// The destination's host and where it answers.
    #[must_use]
    pub fn destination(&self) -> (&HostId, &str) {
        (&self.destination, &self.page_address)
    }

    /// Takes one event; appends what is to be done, in order.
    pub fn apply(&mut self, event: Event, actions: &mut Vec<Action>) {
        match self.state {
            State::Sending => self.sending(event, actions),
            State::Returning => self.returning(event, actions),
            State::Ceded | State::Uncertain | State::DestinationDied => self.ceded(event, actions),
            State::Over(_) => {}
        }
    }

    fn sending(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Loaded(generation) if generation == self.next => {
                actions.push(Action::Persist(self.ceded_record(false)));
                actions.push(Action::SendCommit(self.next));
                self.state = State::Ceded;
            }
            Event::Loaded(_) | Event::GiveUp | Event::NoWord | Event::Refused => {
                // Resume before the record: the guest has waited long enough, and `Sending`
                // already forbids nothing that `Owner` allows. The abort is told last: it is
                // proof for the destination, so it must be durable first.
                actions.push(Action::ResumeGuest);
                let generation = Generation(self.next.0.saturating_sub(1));
                actions.push(Action::Persist(owner(generation, true)));
                actions.push(Action::SendAbort);
                self.state = State::Over(Outcome::Aborted);
            }
            Event::Running(_) | Event::Heard(Standing::Owned | Standing::Gathering) => {
                // It runs there although we never ceded: an operator claimed it. Resuming here
                // could make it run twice, so ours stays down.
                actions.push(Action::Persist(self.ceded_record(false)));
                actions.push(Action::Ask);
                self.state = State::Uncertain;
            }
            Event::Heard(_) | Event::Claim => {}
        }
    }

    fn returning(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            // It has the whole guest, which we have lost: now it is the destination's.
            Event::Heard(Standing::Loaded) => {
                actions.push(Action::Persist(self.ceded_record(false)));
                actions.push(Action::SendCommit(self.next));
                self.state = State::Uncertain;
            }
            Event::Running(generation) if generation == self.next => self.confirm(actions),
            Event::Heard(Standing::Owned) => self.confirm(actions),
            Event::Heard(Standing::Died) => {
                actions.push(Action::Persist(self.ceded_record(false)));
                actions.push(Action::Ask);
                self.state = State::DestinationDied;
            }
            // It runs there without the memory that was lost here. Ours must stay down.
            Event::Heard(Standing::Gathering) => {
                actions.push(Action::Persist(self.ceded_record(false)));
                actions.push(Action::Ask);
                self.state = State::Uncertain;
            }
            // Never loaded there, or durably refused: it is ours, and down like any VM after a
            // power cut.
            Event::Heard(Standing::Unknown | Standing::Refused) | Event::Refused => {
                let generation = Generation(self.next.0.saturating_sub(1));
                actions.push(Action::Persist(owner(generation, true)));
                self.state = State::Over(Outcome::Aborted);
            }
            Event::Claim => {
                let generation = self.next.next();
                actions.push(Action::Persist(owner(generation, true)));
                self.state = State::Over(Outcome::Claimed(generation));
            }
            Event::Heard(_) | Event::NoWord => actions.push(Action::Ask),
            Event::Loaded(_) | Event::GiveUp | Event::Running(_) => {}
        }
    }

    fn ceded(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Running(generation) if generation == self.next => self.confirm(actions),
            Event::Heard(Standing::Owned) => self.confirm(actions),
            Event::Refused | Event::Heard(Standing::Refused) => {
                let generation = self.take_back(actions);
                self.state = State::Over(Outcome::Returned(generation));
            }
            Event::Claim if self.state != State::Ceded => {
                let generation = self.take_back(actions);
                self.state = State::Over(Outcome::Claimed(generation));
            }
            Event::NoWord => {
                actions.push(Action::Ask);
                if self.state == State::Ceded {
                    self.state = State::Uncertain;
                }
            }
            Event::Heard(Standing::Loaded) => {
                // COMMIT was lost on the way, and its effect can still be had.
                actions.push(Action::SendCommit(self.next));
            }
            Event::Heard(Standing::Died) => {
                actions.push(Action::Ask);
                self.state = State::DestinationDied;
            }
            Event::Heard(Standing::Gathering) => {
                // It runs there, and this QEMU is its memory: nothing is uncertain.
                actions.push(Action::Ask);
                self.state = State::Ceded;
            }
            Event::Heard(_) => {
                actions.push(Action::Ask);
                self.state = State::Uncertain;
            }
            Event::Loaded(_) | Event::GiveUp | Event::Running(_) | Event::Claim => {}
        }
    }

    fn confirm(&mut self, actions: &mut Vec<Action>) {
        actions.push(Action::Persist(self.ceded_record(true)));
        actions.push(Action::QuitGuest);
        self.state = State::Over(Outcome::Confirmed);
    }

    /// Owns it again, one generation above the one that the destination held or was promised.
    fn take_back(&self, actions: &mut Vec<Action>) -> Generation {
        let generation = self.next.next();
        // Owned first, since a ceded guest may not be resumed; and marked as not yet resumed, so
        // that a crash between the two is made good at the restart.
        actions.push(Action::Persist(owner(generation, false)));
        actions.push(Action::ResumeGuest);
        actions.push(Action::Persist(owner(generation, true)));
        generation
    }

    fn ceded_record(&self, confirmed: bool) -> Record {
        Record::Ceded {
            generation: self.next,
            migration: self.migration.clone(),
            destination: self.destination.clone(),
            page_address: self.page_address.clone(),
            confirmed,
        }
    }
}

const fn owner(generation: Generation, resumed: bool) -> Record {
    Record::Owner { generation, via: None, from: None, resumed }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 6] = [
        State::Sending,
        State::Returning,
        State::Ceded,
        State::Uncertain,
        State::DestinationDied,
        State::Over(Outcome::Confirmed),
    ];

    fn events() -> Vec<Event> {
        let mut events = vec![
            Event::Loaded(Generation(2)),
            Event::Loaded(Generation(9)),
            Event::GiveUp,
            Event::Running(Generation(2)),
            Event::Running(Generation(9)),
            Event::Refused,
            Event::NoWord,
            Event::Claim,
        ];
        events.extend(super::super::simulation::STANDINGS.map(Event::Heard));
        events
    }

    fn source(state: State) -> Source {
        Source {
            state,
            migration: MigrationId::new("m1").unwrap(),
            destination: HostId::new("h2").unwrap(),
            page_address: "h2:7000".into(),
            next: Generation(2),
        }
    }

    /// One row per (state, event): the state after it, and the actions by their first letters.
    fn row(state: State, event: Event) -> (State, String) {
        let (mut machine, mut actions) = (source(state), Vec::new());
        machine.apply(event, &mut actions);
        let words = actions.iter().map(|action| match action {
            Action::Persist(record) => match record {
                Record::Owner { resumed: true, generation, .. } => format!("own {generation}"),
                Record::Owner { generation, .. } => format!("take {generation}"),
                Record::Ceded { confirmed: true, .. } => "ceded confirmed".into(),
                Record::Ceded { .. } => "ceded".into(),
                other => panic!("a source never writes {other:?} in an event"),
            },
            Action::SendCommit(_) => "COMMIT".into(),
            Action::SendAbort => "ABORT".into(),
            Action::ResumeGuest => "resume".into(),
            Action::QuitGuest => "quit".into(),
            Action::Ask => "ask".into(),
        });
        (machine.state(), words.collect::<Vec<_>>().join(", "))
    }

    #[test]
    fn the_table_is_whole() {
        use Event as E;
        use Standing as S;
        let confirmed = (State::Over(Outcome::Confirmed), "ceded confirmed, quit");
        let returned = (State::Over(Outcome::Returned(Generation(3))), "take g3, resume, own g3");
        let claimed = (State::Over(Outcome::Claimed(Generation(3))), "take g3, resume, own g3");
        let aborted = (State::Over(Outcome::Aborted), "resume, own g1, ABORT");
        for state in STATES {
            for event in events() {
                let past =
                    matches!(state, State::Ceded | State::Uncertain | State::DestinationDied);
                let expected = match (state, event) {
                    (State::Over(_), _) => (state, ""),
                    (State::Sending, E::Loaded(Generation(2))) => (State::Ceded, "ceded, COMMIT"),
                    (State::Sending, E::Loaded(_) | E::GiveUp | E::Refused | E::NoWord) => aborted,
                    (State::Sending, E::Running(_) | E::Heard(S::Owned | S::Gathering)) => {
                        (State::Uncertain, "ceded, ask")
                    }
                    (State::Sending, _) => (state, ""),
                    (State::Returning, E::Heard(S::Loaded)) => (State::Uncertain, "ceded, COMMIT"),
                    (State::Returning, E::Running(Generation(2)) | E::Heard(S::Owned)) => confirmed,
                    (State::Returning, E::Heard(S::Gathering)) => (State::Uncertain, "ceded, ask"),
                    (_, E::Heard(S::Gathering)) => (State::Ceded, "ask"),
                    (State::Returning, E::Heard(S::Died)) => (State::DestinationDied, "ceded, ask"),
                    (State::Returning, E::Heard(S::Unknown | S::Refused) | E::Refused) => {
                        (State::Over(Outcome::Aborted), "own g1")
                    }
                    (State::Returning, E::Claim) => {
                        (State::Over(Outcome::Claimed(Generation(3))), "own g3")
                    }
                    (State::Returning, E::Heard(_) | E::NoWord) => (state, "ask"),
                    (State::Returning, _) => (state, ""),
                    (_, E::Running(Generation(2)) | E::Heard(S::Owned)) if past => confirmed,
                    (_, E::Refused | E::Heard(S::Refused)) => returned,
                    (State::Ceded, E::Claim) => (state, ""),
                    (_, E::Claim) => claimed,
                    (State::Ceded, E::NoWord) => (State::Uncertain, "ask"),
                    (_, E::NoWord) => (state, "ask"),
                    (_, E::Heard(S::Loaded)) => (state, "COMMIT"),
                    (_, E::Heard(S::Died)) => (State::DestinationDied, "ask"),
                    (_, E::Heard(_)) => (State::Uncertain, "ask"),
                    (_, E::Loaded(_) | E::GiveUp | E::Running(_)) => (state, ""),
                };
                let (after, actions) = row(state, event);
                assert_eq!((after, actions.as_str()), expected, "{state:?} x {event:?}");
            }
        }
    }

    #[test]
    fn after_the_point_of_no_return_nothing_but_proof_or_a_claim_resumes() {
        for state in [State::Ceded, State::Uncertain, State::DestinationDied] {
            for event in events() {
                let (_, actions) = row(state, event);
                let allowed = matches!(
                    event,
                    Event::Refused | Event::Heard(Standing::Refused) | Event::Claim
                );
                assert!(allowed || !actions.contains("resume"), "{state:?} x {event:?}: {actions}");
            }
        }
    }
}
