//! Turns the world into events and performs actions, around the pure machines of `evacuation/`.
//!
//! ```text
//!   agents, switches, operators --Input--> one loop --> Evacuation::apply
//!                                             |  1. the new state goes into the journal (fsync)
//!                                             |  2. then each action is performed by a task of its own
//!                                             v
//!                          Hands::perform --Event--> back into the loop
//! ```
//!
//! One loop owns all changes, so two commands never race; each action is a task, so a slow agent
//! holds up nobody else. A journal that cannot be written stops all actions until it can: a state
//! that is not durable must not have consequences. Deliberately not here: what to do next.

mod elsewhere;
mod hands;
mod proof;
mod settle;
mod watch;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lifeboat_protocol::ids::EvacuationId;
use tokio::sync::{mpsc, oneshot, watch as latest};

use crate::clock;
use crate::evacuation::{
    AdmissionError, Change, Evacuation, EvacuationState, Event, Fleet, VmRecord,
};
use crate::journal::Journal;
use crate::tasks;

pub use hands::{Hands, Patience};

/// Between two ticks of the machines.
const TICK: Duration = Duration::from_millis(500);
/// Between two tries to write the journal.
const JOURNAL_AGAIN: Duration = Duration::from_secs(1);
/// Inputs that may wait for the loop; whoever is faster waits.
const INPUTS: usize = 1024;

/// What comes into the loop.
#[derive(Debug)]
pub enum Input {
    /// Something happened to an evacuation.
    Event(EvacuationId, Box<Event>),
    /// A new evacuation with the records of its plan.
    Begin {
        /// The evacuation, in Planning.
        evacuation: Box<Evacuation>,
        /// Who moves and who stays.
        records: Vec<VmRecord>,
        /// Told when it is durable: its id, or that of the same operation's earlier evacuation.
        reply: oneshot::Sender<Result<EvacuationId, AdmissionError>>,
    },
}

/// How the rest of the controller reaches the driver.
#[derive(Debug, Clone)]
pub struct Driver {
    inputs: mpsc::Sender<Input>,
    fleet: Arc<Mutex<Fleet>>,
    changed: latest::Receiver<u64>,
}

/// The driver's loop is gone: the controller is shutting down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the controller is shutting down; ask again when it is back")]
pub struct Stopped;

impl Driver {
    /// Starts the loop over what the journal holds. Unfinished evacuations go on at once.
    #[must_use]
    pub fn start(fleet: Fleet, journal: Arc<Journal>, hands: Hands) -> Self {
        let (inputs, inbox) = mpsc::channel(INPUTS);
        let (bump, changed) = latest::channel(0);
        let unfinished: Vec<EvacuationId> = fleet.to_take_up().map(|e| e.id.clone()).collect();
        let fleet = Arc::new(Mutex::new(fleet));
        let hands = Arc::new(hands.wired(inputs.clone(), Arc::clone(&fleet)));
        tasks::spawn(proof::prove_forever(Arc::clone(&hands), inputs.clone()));
        let state = Loop { fleet: Arc::clone(&fleet), journal, hands, bump };
        tasks::spawn(state.run(inbox));
        tasks::spawn(restart(inputs.clone(), unfinished));
        Self { inputs, fleet, changed }
    }

    /// What all evacuations look like now. Hold it briefly: the loop waits.
    pub fn fleet(&self) -> MutexGuard<'_, Fleet> {
        lock(&self.fleet)
    }

    /// Begins an evacuation. It is durable when this returns.
    ///
    /// # Errors
    /// When another evacuation stands in the way (inner), or the driver has stopped (outer).
    pub async fn begin(
        &self,
        evacuation: Evacuation,
        records: Vec<VmRecord>,
    ) -> Result<Result<EvacuationId, AdmissionError>, Stopped> {
        let (reply, answer) = oneshot::channel();
        let begin = Input::Begin { evacuation: Box::new(evacuation), records, reply };
        self.inputs.send(begin).await.map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }

    /// Tells an evacuation what happened.
    ///
    /// # Errors
    /// When the driver has stopped.
    pub async fn tell(&self, evacuation: EvacuationId, event: Event) -> Result<(), Stopped> {
        self.inputs.send(Input::Event(evacuation, Box::new(event))).await.map_err(|_| Stopped)
    }

    /// Changes whenever something worth showing did.
    #[must_use]
    pub fn changes(&self) -> latest::Receiver<u64> {
        self.changed.clone()
    }
}

async fn restart(inputs: mpsc::Sender<Input>, unfinished: Vec<EvacuationId>) {
    for id in unfinished {
        tracing::info!(evacuation = %id, "going on after a restart");
        // The loop is gone only when the controller is.
        let _ = inputs.send(Input::Event(id, Box::new(Event::Restarted))).await;
    }
}

fn lock(fleet: &Mutex<Fleet>) -> MutexGuard<'_, Fleet> {
    // `apply` does not panic; should it ever, the journal still has the last good state.
    fleet.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Loop {
    fleet: Arc<Mutex<Fleet>>,
    journal: Arc<Journal>,
    hands: Arc<Hands>,
    bump: latest::Sender<u64>,
}

impl Loop {
    async fn run(self, mut inbox: mpsc::Receiver<Input>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => self.tick().await,
                input = inbox.recv() => match input {
                    Some(Input::Event(id, event)) => self.event(&id, *event).await,
                    Some(Input::Begin { evacuation, records, reply }) => {
                        let begun = self.begin(*evacuation, records).await;
                        // An operator who has gone away can ask for the status later.
                        let _ = reply.send(begun);
                    }
                    None => return,
                },
            }
        }
    }

    async fn tick(&self) {
        let ids: Vec<EvacuationId> = lock(&self.fleet).unfinished().map(|e| e.id.clone()).collect();
        for id in ids {
            self.event(&id, Event::Tick).await;
        }
    }

    async fn begin(
        &self,
        evacuation: Evacuation,
        records: Vec<VmRecord>,
    ) -> Result<EvacuationId, AdmissionError> {
        let id = evacuation.id.clone();
        {
            let mut fleet = lock(&self.fleet);
            if let Some(same) = fleet.by_operation(&evacuation.order.operation) {
                return Ok(same.id.clone());
            }
            fleet.admit(&evacuation.order)?;
            fleet.insert(evacuation);
        }
        self.event(&id, Event::Planned { vms: records }).await;
        Ok(id)
    }

    async fn event(&self, id: &EvacuationId, event: Event) {
        let mut actions = Vec::new();
        let (change, snapshot) = {
            let mut fleet = lock(&self.fleet);
            let Some(evacuation) = fleet.get_mut(id) else { return };
            let before = phases(evacuation);
            let change = evacuation.apply(clock::now(), event, &mut actions);
            log_changes(evacuation, &before);
            (change, (change == Change::State).then(|| evacuation.clone()))
        };
        if let Some(evacuation) = snapshot {
            self.make_durable(evacuation).await;
        }
        if change > Change::Nothing {
            self.bump.send_modify(|count| *count = count.wrapping_add(1));
        }
        for action in actions {
            let hands = Arc::clone(&self.hands);
            let id = id.clone();
            tasks::spawn(async move { hands.perform(id, action).await });
        }
    }

    /// Returns when the state is on the disk, however long that takes.
    async fn make_durable(&self, evacuation: Evacuation) {
        let evacuation = Arc::new(evacuation);
        loop {
            let (journal, state) = (Arc::clone(&self.journal), Arc::clone(&evacuation));
            let written = tokio::task::spawn_blocking(move || journal.put(&state)).await;
            match written {
                Ok(Ok(())) => return,
                Ok(Err(error)) => {
                    tracing::error!(evacuation = %evacuation.id, %error, cause = ?error, "journal not written; all actions wait");
                }
                Err(error) => tracing::error!(%error, "journal task failed; all actions wait"),
            }
            tokio::time::sleep(JOURNAL_AGAIN).await;
        }
    }
}

type Phases = (EvacuationState, Vec<crate::evacuation::VmPhase>);

fn phases(evacuation: &Evacuation) -> Phases {
    (evacuation.state, evacuation.vms.iter().map(|record| record.phase).collect())
}

/// One line per change that an operator would read.
fn log_changes(evacuation: &Evacuation, before: &Phases) {
    let (state, vms) = before;
    if *state != evacuation.state {
        tracing::info!(evacuation = %evacuation.id, state = evacuation.state.words(), "evacuation");
    }
    for (number, record) in evacuation.vms.iter().enumerate() {
        if vms.get(number) == Some(&record.phase) {
            continue;
        }
        tracing::info!(
            evacuation = %evacuation.id,
            vm = %record.vm,
            phase = record.phase.words(),
            attempt = record.attempts,
            reason = record.reason,
            "migration"
        );
    }
}

/// Sends an action's outcome back; a loop that is gone means that the controller is, too.
async fn report(inputs: &mpsc::Sender<Input>, id: &EvacuationId, event: Event) {
    let _ = inputs.send(Input::Event(id.clone(), Box::new(event))).await;
}
