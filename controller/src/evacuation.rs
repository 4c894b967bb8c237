//! The evacuation as a pure machine: what has been asked, where each VM stands, what to do next.
//!
//! The driver turns the world into [`Event`]s, calls [`Evacuation::apply`], makes the new state
//! durable, and only then performs the [`Action`]s. No clock, socket, task or random number is in
//! here, and no policy either: *which* VM goes next and where to is asked for by
//! [`Action::Choose`] and answered by [`Event::Chosen`].
//!
//! One evacuation:
//!
//! ```text
//!   Planning --Planned--> Running --every VM at its end--> Done      all moved
//!       |                    |                             Partial   some moved
//!       |                    | CancelRequested             Failed    none moved
//!       |                    v
//!       +--CancelRequested-> Cancelling ------------------> Cancelled, or Done if all had moved
//! ```
//!
//! One VM in it. The way down the middle is the good one; every leg, however it ends, passes
//! through Releasing exactly once, so what it reserved is given back exactly once:
//!
//! ```text
//!   Waiting <-------------------------------------------------------------+
//!     | Choose (the VMs still waiting are measured and ordered afresh)    |
//!   Measuring -- nothing fits, nothing is under way --> LeftBehind        |
//!     | Chosen                                                            |
//!   Reserving -- ReserveFailed ---------------------------+               |
//!     | Reserved                                          |               |
//!   Preparing -- PrepareFailed --> Settling               |               |
//!     | Prepared                      ^  |                |               |
//!   Sending --- StartFailed, Failed, -+  |                |               |
//!     |         WatchLost             |  | Settled        |               |
//!     | COMMIT sent                   |  v                v               |
//!   Committing ---------- WatchLost --+ Releasing <-------+               |
//!     | Completed                        ^  |  stayed, tries left: -------+
//!     +----------------------------------+  |  stayed: LeftBehind
//!                                           +--> Moved | Uncertain | Lost
//! ```
//!
//! A scattered VM goes from Releasing to Gathering before it has Moved: its source is rid of it, its
//! slot is free, and its stores hold the only copy of what the destination has not fetched yet.
//!
//! Settling is where doubt is resolved before anything else happens to the VM: the agents are told
//! to cancel and asked what became of the migration, until they have answered. Only then may
//! another attempt begin; that is why a VM never has two live migrations.

mod elsewhere;
mod event;
mod fleet;
mod leg;
mod machine;
mod order;
mod progress;
mod vm;

pub use elsewhere::StoresOwed;
pub use event::{Action, Change, Choice, Event, PageTicket, PlannedLeg, Settlement, Waiting};
pub use fleet::{AdmissionError, Fleet};
pub use machine::{Evacuation, EvacuationState, Limits};
pub use order::EvacuationOrder;
pub use progress::{done_share, time_to_go, vm_time_to_go};
pub use vm::{
    ChosenDiskStore, DiskDate, Leg, Outcome, Prediction, VmPhase, VmRecord, gather_names,
};

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
