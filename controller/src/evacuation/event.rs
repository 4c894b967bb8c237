//! What can happen to an evacuation, and what it can want done.
//!
//! Every event of a migration carries its id, so that a late word about an older attempt changes
//! nothing.

use std::fmt;

use lifeboat_protocol::agent::MigrationProgress;
use lifeboat_protocol::ids::{EvacuationId, HostId, MigrationId, VmId};
use lifeboat_protocol::terms::Mode;

use lifeboat_policy::intermediary::ChosenStores;
use lifeboat_protocol::agent::{DiskStore, ScatterPlan};

use super::vm::{ChosenDiskStore, DiskDate, Leg, Prediction, VmRecord};
use crate::network::{Hop, Reserved};

/// Where the source is to send the pages, and the secret that opens the door. Passed through, never
/// kept: the journal holds no secret, and after a restart a migration that had not begun is settled
/// and tried afresh.
#[derive(Clone, PartialEq)]
pub struct PageTicket {
    /// `host:port` of the destination's page listener.
    pub address: String,
    /// What the source shows there.
    pub token: Vec<u8>,
    /// The destination has a copy of the disks: only what differs is to be sent.
    pub seeded: bool,
    /// The VM's disks that nobody writes to and that the destination has, by their places.
    pub disks_there: Vec<u32>,
    /// The open stores, with what opens them.
    pub scatter: Option<ScatterPlan>,
    /// Where its disks go on to, with what opens the door there.
    pub disk_store: Option<DiskStore>,
}

impl fmt::Debug for PageTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTicket").field("address", &self.address).finish_non_exhaustive()
    }
}

/// A VM's turn has come: where to and which way.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Who goes.
    pub vm: VmId,
    /// Where it is now.
    pub source: HostId,
    /// The rest of the leg.
    pub leg: PlannedLeg,
}

/// A leg as the planner describes it, before it has an id.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedLeg {
    /// Where to.
    pub destination: HostId,
    /// How.
    pub mode: Mode,
    /// Which way, with the wish for each port.
    pub hops: Vec<Hop>,
    /// How long it should take.
    pub prediction: Prediction,
    /// How its guest is held back for the date; `None`: not at all.
    pub disk_date: Option<DiskDate>,
    /// Where its pages wait; `None`: nowhere.
    pub stores: Option<ChosenStores>,
    /// Where its disks go on to; `None`: nowhere.
    pub disk_store: Option<ChosenDiskStore>,
}

/// What the agents agree to have happened to a migration.
#[derive(Debug, Clone, PartialEq)]
pub enum Settlement {
    /// The VM runs at the destination; the last progress of the source, where there is one.
    Moved(Option<Box<MigrationProgress>>),
    /// The VM is at the source.
    Stayed {
        /// Why it did not move.
        reason: String,
        /// The intermediary whose fault it was.
        store: Option<HostId>,
    },
    /// The destination failed after COMMIT.
    Lost {
        /// What is known.
        reason: String,
    },
    /// The agents that could tell have not answered for too long.
    Uncertain {
        /// Who did not answer, and what to do.
        reason: String,
    },
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The plan is there: who will move, who cannot.
    Planned {
        /// Every VM of the hosts.
        vms: Vec<VmRecord>,
    },
    /// Answer to [`Action::Choose`].
    Chosen {
        /// Who goes now; `None` when nothing that waits can go at present.
        choice: Option<Box<Choice>>,
        /// VMs for which there is no place now, each with the reason.
        no_place: Vec<(VmId, String)>,
    },
    /// The path is reserved.
    Reserved {
        /// Which migration.
        migration: MigrationId,
        /// What it got.
        reserved: Reserved,
    },
    /// The path is not reserved; what was begun is undone.
    ReserveFailed {
        /// Which migration.
        migration: MigrationId,
        /// Why.
        reason: String,
    },
    /// A port of its way went down, and the reservation was moved to another way.
    Rerouted {
        /// Which migration.
        migration: MigrationId,
        /// The new way.
        hops: Vec<Hop>,
        /// What it got there.
        reserved: Reserved,
    },
    /// A port of its way went down, and there is no other way, or none that could be reserved.
    CutOff {
        /// Which migration.
        migration: MigrationId,
        /// Which links cut it, or what stood in the way.
        reason: String,
    },
    /// The destination has made room.
    Prepared {
        /// Which migration.
        migration: MigrationId,
        /// Where the source is to send to.
        ticket: PageTicket,
    },
    /// The destination said no, or nothing.
    PrepareFailed {
        /// Which migration.
        migration: MigrationId,
        /// Why.
        reason: String,
        /// The intermediary whose fault it was.
        store: Option<HostId>,
    },
    /// The source has begun.
    Started {
        /// Which migration.
        migration: MigrationId,
    },
    /// The source said no, or nothing: it may have begun all the same.
    StartFailed {
        /// Which migration.
        migration: MigrationId,
        /// Why.
        reason: String,
    },
    /// The source's agent tells how far it is. Also how an end is heard.
    Progress(Box<MigrationProgress>),
    /// The source's agent has not been heard for too long, or knows nothing of the migration.
    WatchLost {
        /// Which migration.
        migration: MigrationId,
        /// What was heard last.
        reason: String,
    },
    /// Answer to [`Action::Settle`], or an operator's claim.
    Settled {
        /// Which migration.
        migration: MigrationId,
        /// What the agents agree on.
        settlement: Settlement,
    },
    /// Answer to [`Action::Release`].
    Released {
        /// Which migration.
        migration: MigrationId,
        /// What may remain on which switch; empty when all is gone.
        failures: Vec<String>,
    },
    /// The destination tells how much it has gathered.
    Gathering(Box<MigrationProgress>),
    /// Answer to [`Action::Gather`].
    Gathered {
        /// Which migration.
        migration: MigrationId,
        /// Why the VM is lost, if it is.
        lost: Option<String>,
    },
    /// Answer to [`Action::ReleaseStores`]: none of them is left.
    StoresReleased {
        /// Whose stores.
        migration: MigrationId,
    },
    /// The operator wants no more of it.
    CancelRequested,
    /// A controller has loaded it from the journal.
    Restarted,
    /// Time has passed.
    Tick,
}

/// A VM that waits for its turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Which.
    pub vm: VmId,
    /// Where it is.
    pub source: HostId,
    /// Destinations that failed it.
    pub tried: Vec<HostId>,
    /// Intermediaries that failed it.
    pub failed_stores: Vec<HostId>,
}

/// What to do. The driver performs it after the state that wanted it is durable.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Make the plan anew (after a restart in Planning); answered by [`Event::Planned`].
    Plan,
    /// Measure these VMs, order them, and say who goes next.
    Choose {
        /// Who waits.
        waiting: Vec<Waiting>,
    },
    /// Reserve the leg's path.
    Reserve {
        /// Whose.
        vm: VmId,
        /// From where.
        source: HostId,
        /// The leg.
        leg: Box<Leg>,
    },
    /// Ask the destination to make room.
    Prepare {
        /// Who comes.
        vm: VmId,
        /// From where.
        source: HostId,
        /// The leg.
        leg: Box<Leg>,
    },
    /// Tell the source to send.
    Start {
        /// Who goes.
        vm: VmId,
        /// From where.
        source: HostId,
        /// The leg.
        leg: Box<Leg>,
        /// The way in at the destination.
        ticket: PageTicket,
    },
    /// Follow the gathering at the destination's agent to its end.
    Gather {
        /// Which migration.
        migration: MigrationId,
        /// Whose.
        vm: VmId,
        /// Who gathers.
        destination: HostId,
    },
    /// End a migration's stores, until all of them have gone.
    ReleaseStores {
        /// Which migration.
        migration: MigrationId,
        /// Where they are, or may be.
        hosts: Vec<HostId>,
    },
    /// Follow the migration at the source's agent to its end.
    Watch {
        /// Which migration.
        migration: MigrationId,
        /// Whose agent tells.
        source: HostId,
        /// Who is asked for the rest at the end.
        destination: HostId,
    },
    /// Tell the agents to cancel; the watch hears what comes of it.
    Cancel {
        /// Which migration.
        migration: MigrationId,
        /// Where the VM runs.
        source: HostId,
    },
    /// Cancel at both agents and ask both until it is known what happened.
    Settle {
        /// Which migration.
        migration: MigrationId,
        /// Which VM.
        vm: VmId,
        /// The one agent.
        source: HostId,
        /// The other agent.
        destination: HostId,
        /// What led here.
        because: String,
        /// Whether COMMIT was seen: then a source that knows nothing proves nothing.
        committed: bool,
    },
    /// Move what flows there are for the VM's MAC addresses.
    Follow {
        /// Which VM.
        vm: VmId,
        /// Where it runs now.
        to: HostId,
    },
    /// Give back what the migration has reserved.
    Release {
        /// Which migration.
        migration: MigrationId,
    },
    /// The evacuation has ended: write its report, tell who watches.
    Finished {
        /// Which evacuation.
        evacuation: EvacuationId,
    },
}

/// How much an event has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Nothing.
    Nothing,
    /// Figures of progress: worth showing, not worth a write to the disk.
    Progress,
    /// The state: durable before any action is performed.
    State,
}
