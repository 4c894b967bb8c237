//! Post-copy and gathering at the destination: what is done in which order, from the first page
//! record to the last page placed. Pure; driven by `destination.rs`, which owns sockets and stores.
//!
//! It serves both modes, which differ only in where the pages wait: at the source's agent
//! (post-copy) or in stores (scatter-gather). The hand-over itself, with its durable COMMIT, is
//! `handover/`'s; this follows it.
//!
//! ```text
//!  phase      what the destination's QEMU has               pages
//!  Absorbing  nothing; records are noted                    noted
//!  Loading    discards, PACKAGED                            served: devices may read memory
//!  Standing   its devices (PONG 3); stands paused           served
//!  Running    COMMIT is durable; the guest runs             served: demand first
//!  Closing    RAM END: every page is placed                 -
//!  Done       it has said SHUT                              -
//! ```
//!
//! [`phase`] is the machine of the phases, [`service`] decides which page comes next, [`Gather`]
//! joins the two. [`absorb`] is the source's part, with what it knows of each page in [`contents`].

pub mod absorb;
pub mod contents;
pub mod phase;
pub mod service;

use lifeboat_scatter_gather::ledger::{Counts, Ledger, LedgerError, Where};
use lifeboat_scatter_gather::link::pages::PageRun;
use lifeboat_scatter_gather::page::PageAt;
use thiserror::Error;

use phase::{Phase, Step, WrongStep};
use service::{Action, Service};

/// Why an event is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum GatherError {
    /// The phases do not allow it.
    #[error(transparent)]
    Phase(#[from] WrongStep),
    /// The pages do not allow it.
    #[error(transparent)]
    Pages(#[from] LedgerError),
    /// A page was asked for before the guest's memory is complete.
    #[error("{0} is asked for before every page is known")]
    TooEarly(PageAt),
    /// The guest would run here and stand still: it runs on at the source instead.
    #[error("no way leads to {0} pages that the destination waits for; COMMIT is refused")]
    Stuck(usize),
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The source says where the newest version of a page is.
    Noted(PageAt, Where),
    /// The same of many pages: they are zero, or at the source. Only before COMPLETE.
    NotedRun(PageRun, Where),
    /// The source says that it has told everything.
    Complete,
    /// QEMU has loaded the devices (PONG 3).
    Loaded,
    /// COMMIT is durable on this side.
    Committed,
    /// QEMU asks for a page.
    Fault(PageAt),
    /// A page that was fetched on demand has come.
    Came(PageAt),
    /// A page could not be fetched from there; another way may be tried.
    Failed(PageAt),
    /// No way is left to a page; the source may still tell another.
    Gone(PageAt),
    /// A page of the background's batch has come from the source.
    BatchCame(PageAt),
    /// A page has come with the pack that the background asked for, from this place in it.
    PackCame(PageAt, Where),
    /// The background's batch that was asked for first has ended, whether all of it came or not.
    BatchEnded,
    /// The pace allows another batch.
    Turn,
    /// QEMU has all it wants.
    Shut,
    /// The hand-over was given up before COMMIT.
    Abort,
}

/// A destination's memory on its way.
#[derive(Debug)]
pub struct Gather {
    phase: Phase,
    service: Service,
}

impl Gather {
    /// A guest of which nothing is known yet. `batch` is how many pages are asked of the source at
    /// once.
    #[must_use]
    pub fn new(ledger: Ledger, batch: usize) -> Self {
        Self { phase: Phase::Absorbing, service: Service::new(ledger, batch) }
    }

    /// The phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// How many pages are where.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.service.ledger().counts()
    }

    /// The pages that wait on somebody although no way to them is left: the guest may stand still.
    #[must_use]
    pub fn stuck(&self) -> usize {
        self.service.gone()
    }

    /// The ledger, to see which pages have to be discarded before PACKAGED.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        self.service.ledger()
    }

    /// Takes an event in, and says what is to be done, in this order.
    ///
    /// # Errors
    /// [`GatherError`]: the event changes nothing then. Before COMMIT the hand-over is given up.
    pub fn apply(&mut self, event: Event, actions: &mut Vec<Action>) -> Result<(), GatherError> {
        match event {
            Event::Noted(at, place) => self.service.note(at, place, actions)?,
            Event::NotedRun(run, place) => self.service.note_run(run, place)?,
            Event::Complete => {
                let next = self.phase.next(Step::Complete)?;
                self.service.close()?;
                self.phase = next;
                actions.push(Action::Load);
            }
            Event::Loaded => self.phase = self.phase.next(Step::Loaded)?,
            Event::Committed => {
                let next = self.phase.next(Step::Committed)?;
                if self.stuck() > 0 {
                    return Err(GatherError::Stuck(self.stuck()));
                }
                self.phase = next;
                actions.push(Action::Resume);
            }
            Event::Fault(at) if self.serves(at)? => self.service.fault(at, actions)?,
            Event::Came(at) if self.serves(at)? => self.service.came(at, actions)?,
            Event::Failed(at) if self.serves(at)? => self.service.failed(at, actions)?,
            Event::Gone(at) if self.serves(at)? => self.service.lose(at)?,
            Event::BatchCame(at) if self.serves(at)? => self.service.batch_came(at, actions)?,
            Event::PackCame(at, place) if self.serves(at)? => {
                self.service.pack_came(at, place, actions)?;
            }
            // QEMU asks again for what is on its way, and answers come when nobody waits any more.
            Event::Fault(_)
            | Event::Came(_)
            | Event::Failed(_)
            | Event::Gone(_)
            | Event::BatchCame(_)
            | Event::PackCame(..) => {}
            Event::BatchEnded => self.service.batch_ended(),
            Event::Turn if self.phase.is_serving() => self.service.turn(actions),
            Event::Turn => {}
            Event::Shut => {
                self.phase = self.phase.next(Step::Shut)?;
                actions.push(Action::Finish);
            }
            Event::Abort => self.phase = self.phase.next(Step::Abort)?,
        }
        self.close_when_all_is_placed(actions);
        Ok(())
    }

    fn serves(&self, at: PageAt) -> Result<bool, GatherError> {
        match self.phase {
            Phase::Absorbing => Err(GatherError::TooEarly(at)),
            phase => Ok(phase.is_serving()),
        }
    }

    fn close_when_all_is_placed(&mut self, actions: &mut Vec<Action>) {
        if self.phase == Phase::Running && self.counts().waiting() == 0 {
            self.phase = Phase::Closing;
            actions.push(Action::Close);
        }
    }
}

#[cfg(test)]
mod tests;
