//! The destination's side of the hand-over: pure. Driven by `crate::destination`; the picture is
//! in [`super`].
//!
//! ```text
//!               GuestLoaded             Commit                    GuestRuns
//!   Receiving ---------------> Loaded ----------> Owning -----------------------> Running
//!       |                        |  \                |  \ GuestDied
//!       | Abort, LinkLost,       |   \ LinkLost      |   `----------> Died
//!       | GuestDied              |    v              | NotStarted
//!       |                        |   InDoubt --------+------------.
//!       |                        |    | Heard(Ceded), Commit,     |
//!       |                        |    | Claim: to Owning          |
//!       v                        v    v Heard(Aborted), Abort,    v
//!   Discarded <---------------------------- GuestDied ----- Discarded
//! ```

use lifeboat_protocol::ids::{Generation, HostId, MigrationId};

use super::{Record, Standing};

/// What the destination is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// QEMU has loaded the whole stream and stands paused.
    GuestLoaded,
    /// COMMIT came, on the link or on a connection made for it.
    Commit(Generation),
    /// ABORT came: the source durably runs the guest.
    Abort,
    /// The link broke.
    LinkLost,
    /// This side's QEMU has gone.
    GuestDied,
    /// Resuming was given up before QEMU was told: the guest provably never ran.
    NotStarted,
    /// RESUME was seen and QEMU says that it runs.
    GuestRuns,
    /// The source answered a question.
    Heard(Standing),
    /// An operator says that the source is fenced off.
    Claim,
}

/// What the driver does, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Return only when the record is on the disk.
    Persist(Record),
    /// Tell the source LOADED.
    SendLoaded(Generation),
    /// Resume the loaded guest, announce it.
    StartGuest,
    /// Tell the source RUNNING; best effort, it asks if it does not hear.
    SendRunning(Generation),
    /// Tell the source REFUSED; best effort.
    SendRefused,
    /// End the paused QEMU, take away its taps and files.
    DiscardGuest,
    /// Ask the source for its standing, after a pause.
    Ask,
}

impl Action {
    /// Its name in logs and marks.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Persist(record) => record.name(),
            Self::SendLoaded(_) => "send-loaded",
            Self::StartGuest => "start-guest",
            Self::SendRunning(_) => "send-running",
            Self::SendRefused => "send-refused",
            Self::DiscardGuest => "discard-guest",
            Self::Ask => "ask",
        }
    }
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs here.
    Running,
    /// It never ran here and never will by this migration.
    Discarded,
    /// It was started here and its QEMU has died.
    Died,
}

/// Where the destination stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Takes the stream; nothing is promised.
    Receiving,
    /// Has promised to wait for COMMIT.
    Loaded,
    /// Has promised, and the source cannot be heard; asking.
    InDoubt,
    /// Owns; resuming the guest.
    Owning,
    /// Nothing more to decide.
    Over(Outcome),
}

/// The destination's side of one hand-over.
#[derive(Debug, Clone)]
pub struct Destination {
    state: State,
    migration: MigrationId,
    source: HostId,
    page_address: String,
    generation: Generation,
    /// Taken up after a crash that may have come after the guest was resumed: from then on
    /// nothing this side sees proves that it never ran.
    may_have_run: bool,
}

impl Destination {
    /// Begins to receive; `generation` is the one that this side will own.
    #[must_use]
    pub fn begin(
        generation: Generation,
        migration: MigrationId,
        source: HostId,
        page_address: String,
    ) -> Self {
        Self {
            state: State::Receiving,
            migration,
            source,
            page_address,
            generation,
            may_have_run: false,
        }
    }

    /// A hand-over that is over, and whose guest runs here: of a migration that is not, because the
    /// guest's pages are still on their way.
    #[must_use]
    pub fn running(generation: Generation, migration: MigrationId, source: HostId) -> Self {
        let state = State::Over(Outcome::Running);
        let page_address = String::new();
        Self { state, migration, source, page_address, generation, may_have_run: true }
    }

    /// Takes up a hand-over after a restart; `None` where the record holds none for a
    /// destination. `guest_lives`: whether the QEMU that was loaded is still there.
    #[must_use]
    pub fn resume(record: &Record, guest_lives: bool, actions: &mut Vec<Action>) -> Option<Self> {
        match record {
            Record::Loaded { generation, migration, source, page_address } => {
                let mut destination = Self {
                    state: State::InDoubt,
                    migration: migration.clone(),
                    source: source.clone(),
                    page_address: page_address.clone(),
                    generation: *generation,
                    may_have_run: false,
                };
                if guest_lives {
                    actions.push(Action::Ask);
                } else {
                    destination.apply(Event::GuestDied, actions);
                }
                Some(destination)
            }
            Record::Owner {
                generation,
                via: Some(migration),
                from: Some(source),
                resumed: false,
            } => {
                let mut destination = Self {
                    state: State::Owning,
                    migration: migration.clone(),
                    source: source.clone(),
                    page_address: String::new(),
                    generation: *generation,
                    may_have_run: true,
                };
                if guest_lives {
                    actions.push(Action::StartGuest);
                } else {
                    destination.apply(Event::GuestDied, actions);
                }
                Some(destination)
            }
            _ => None,
        }
    }

    /// Where it stands.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// The generation that this side owns, or will own.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// The migration.
    #[must_use]
    pub const fn migration(&self) -> &MigrationId {
        &self.migration
    }

    /// The source's host and where it answers.
    #[must_use]
    pub fn source(&self) -> (&HostId, &str) {
        (&self.source, &self.page_address)
    }

    /// Takes one event; appends what is to be done, in order.
    pub fn apply(&mut self, event: Event, actions: &mut Vec<Action>) {
        match self.state {
            State::Receiving => self.receiving(event, actions),
            State::Loaded | State::InDoubt => self.promised(event, actions),
            State::Owning => self.owning(event, actions),
            State::Over(_) => {}
        }
    }

    fn receiving(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::GuestLoaded => {
                actions.push(Action::Persist(Record::Loaded {
                    generation: self.generation,
                    migration: self.migration.clone(),
                    source: self.source.clone(),
                    page_address: self.page_address.clone(),
                }));
                actions.push(Action::SendLoaded(self.generation));
                self.state = State::Loaded;
            }
            Event::Abort | Event::LinkLost | Event::GuestDied | Event::Commit(_) => {
                self.discard(actions);
            }
            Event::NotStarted | Event::GuestRuns | Event::Heard(_) | Event::Claim => {}
        }
    }

    fn promised(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Commit(generation) if generation == self.generation => self.own(actions),
            Event::Heard(Standing::Ceded) => self.own(actions),
            Event::Claim if self.state == State::InDoubt => self.own(actions),
            Event::Abort | Event::Heard(Standing::Aborted) | Event::GuestDied => {
                self.discard(actions);
            }
            Event::LinkLost | Event::Heard(_) => {
                actions.push(Action::Ask);
                self.state = State::InDoubt;
            }
            Event::Commit(_)
            | Event::GuestLoaded
            | Event::NotStarted
            | Event::GuestRuns
            | Event::Claim => {}
        }
    }

    fn owning(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::GuestRuns => {
                // RUNNING first: the source holds a whole guest's memory until it hears it.
                actions.push(Action::SendRunning(self.generation));
                actions.push(Action::Persist(self.owner_record(true)));
                self.state = State::Over(Outcome::Running);
            }
            Event::NotStarted if !self.may_have_run => self.discard(actions),
            Event::NotStarted | Event::GuestDied => self.state = State::Over(Outcome::Died),
            Event::GuestLoaded
            | Event::Commit(_)
            | Event::Abort
            | Event::LinkLost
            | Event::Heard(_)
            | Event::Claim => {}
        }
    }

    fn own(&mut self, actions: &mut Vec<Action>) {
        actions.push(Action::Persist(self.owner_record(false)));
        actions.push(Action::StartGuest);
        self.state = State::Owning;
    }

    /// The guest is gone before the word about it is durable, and the word is durable before it
    /// is told: so "refused" always means "and it does not exist here".
    fn discard(&mut self, actions: &mut Vec<Action>) {
        actions.push(Action::DiscardGuest);
        actions.push(Action::Persist(Record::Refused {
            generation: self.generation,
            migration: self.migration.clone(),
            source: self.source.clone(),
        }));
        actions.push(Action::SendRefused);
        self.state = State::Over(Outcome::Discarded);
    }

    fn owner_record(&self, resumed: bool) -> Record {
        Record::Owner {
            generation: self.generation,
            via: Some(self.migration.clone()),
            from: Some(self.source.clone()),
            resumed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 5] = [
        State::Receiving,
        State::Loaded,
        State::InDoubt,
        State::Owning,
        State::Over(Outcome::Discarded),
    ];

    fn events() -> Vec<Event> {
        let mut events = vec![
            Event::GuestLoaded,
            Event::Commit(Generation(2)),
            Event::Commit(Generation(9)),
            Event::Abort,
            Event::LinkLost,
            Event::GuestDied,
            Event::NotStarted,
            Event::GuestRuns,
            Event::Claim,
        ];
        events.extend(super::super::simulation::STANDINGS.map(Event::Heard));
        events
    }

    fn row(state: State, event: Event) -> (State, String) {
        let mut machine = Destination::begin(
            Generation(2),
            MigrationId::new("m1").unwrap(),
            HostId::new("h1").unwrap(),
            "h1:7000".into(),
        );
        machine.state = state;
        let mut actions = Vec::new();
        machine.apply(event, &mut actions);
        let words = actions.iter().map(|action| match action {
            Action::Persist(Record::Owner { resumed: true, .. }) => "resumed",
            Action::Persist(Record::Owner { .. }) => "own",
            Action::Persist(Record::Loaded { .. }) => "loaded",
            Action::Persist(Record::Refused { .. }) => "refused",
            Action::Persist(other) => panic!("a destination never writes {other:?}"),
            Action::SendLoaded(_) => "LOADED",
            Action::StartGuest => "start",
            Action::SendRunning(_) => "RUNNING",
            Action::SendRefused => "REFUSED",
            Action::DiscardGuest => "discard",
            Action::Ask => "ask",
        });
        (machine.state(), words.collect::<Vec<_>>().join(", "))
    }

    #[test]
    fn the_table_is_whole() {
        use Event as E;
        use Standing as S;
        let discarded = (State::Over(Outcome::Discarded), "discard, refused, REFUSED");
        let owning = (State::Owning, "own, start");
        for state in STATES {
            for event in events() {
                let expected = match (state, event) {
                    (State::Over(_), _) => (state, ""),
                    (State::Receiving, E::GuestLoaded) => (State::Loaded, "loaded, LOADED"),
                    (State::Receiving, E::Abort | E::LinkLost | E::GuestDied | E::Commit(_)) => {
                        discarded
                    }
                    (State::Receiving, _) => (state, ""),
                    (State::Owning, E::GuestRuns) => {
                        (State::Over(Outcome::Running), "RUNNING, resumed")
                    }
                    (State::Owning, E::NotStarted) => discarded,
                    (State::Owning, E::GuestDied) => (State::Over(Outcome::Died), ""),
                    (State::Owning, _) => (state, ""),
                    (_, E::Commit(Generation(2)) | E::Heard(S::Ceded)) => owning,
                    (State::InDoubt, E::Claim) => owning,
                    (_, E::Abort | E::Heard(S::Aborted) | E::GuestDied) => discarded,
                    (_, E::LinkLost | E::Heard(_)) => (State::InDoubt, "ask"),
                    (_, _) => (state, ""),
                };
                let (after, actions) = row(state, event);
                assert_eq!((after, actions.as_str()), expected, "{state:?} x {event:?}");
            }
        }
    }

    #[test]
    fn once_loaded_silence_discards_nothing() {
        for state in [State::Loaded, State::InDoubt] {
            for event in [E::LinkLost, E::Heard(Standing::Unknown), E::Heard(Standing::Pending)] {
                assert_eq!(row(state, event), (State::InDoubt, "ask".into()));
            }
        }
        use Event as E;
    }
}
