//! One VM in an evacuation: where it stands, its current leg, what became of it.
//!
//! Pure data, kept in the journal. The rules by which it changes are in `machine`.

use lifeboat_policy::intermediary::ChosenStores;
use lifeboat_protocol::agent::MigrationProgress;
use lifeboat_protocol::ids::{HostId, MigrationId, VmId};
use lifeboat_protocol::terms::Mode;
use lifeboat_protocol::units::{BitsPerSec, Bytes, BytesPerSec};
use serde::{Deserialize, Serialize};

use crate::clock::UnixMs;
use crate::network::{Hop, Reserved};

/// Where a VM stands. The picture is in the module's doc.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmPhase {
    /// Still at its source, its turn has not come.
    Waiting,
    /// Being measured, to choose who goes next.
    Measuring,
    /// A share of the path is being reserved.
    Reserving,
    /// The destination makes room.
    Preparing,
    /// Pages travel; the VM runs at its source.
    Sending,
    /// COMMIT is under way or sent: there is no way back.
    Committing,
    /// The agents are asked what became of it.
    Settling,
    /// What was reserved is being given back.
    Releasing,
    /// Runs at its destination, which gathers its pages; the source is rid of it.
    Gathering,
    /// Runs at its destination.
    Moved,
    /// Runs at its source, with a reason.
    LeftBehind,
    /// Not known where it runs; see `lifeboat claim`.
    Uncertain,
    /// Runs nowhere: the destination failed after COMMIT.
    Lost,
}

impl VmPhase {
    /// Every phase, for tables.
    pub const ALL: [Self; 13] = [
        Self::Waiting,
        Self::Measuring,
        Self::Reserving,
        Self::Preparing,
        Self::Sending,
        Self::Committing,
        Self::Settling,
        Self::Releasing,
        Self::Gathering,
        Self::Moved,
        Self::LeftBehind,
        Self::Uncertain,
        Self::Lost,
    ];

    /// Whether this evacuation does nothing more for the VM.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Moved | Self::LeftBehind | Self::Uncertain | Self::Lost)
    }

    /// Whether a leg is under way: it holds a slot and, perhaps, a reservation.
    #[must_use]
    pub const fn is_live(self) -> bool {
        matches!(
            self,
            Self::Reserving
                | Self::Preparing
                | Self::Sending
                | Self::Committing
                | Self::Settling
                | Self::Releasing
        )
    }

    /// The phase's name as operators read it.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Measuring => "measuring",
            Self::Reserving => "reserving",
            Self::Preparing => "preparing",
            Self::Sending => "sending",
            Self::Committing => "committing",
            Self::Settling => "settling",
            Self::Releasing => "releasing",
            Self::Gathering => "gathering",
            Self::Moved => "moved",
            Self::LeftBehind => "left-behind",
            Self::Uncertain => "uncertain",
            Self::Lost => "lost",
        }
    }
}

/// What the plan said about one migration, to stand beside what was measured.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Prediction {
    /// Order to nothing left to transfer, milliseconds.
    pub total_ms: u64,
    /// Pause at the source to resume at the destination, milliseconds.
    pub downtime_ms: u64,
    /// On the wire.
    pub bytes: u64,
    /// What the path had for it, bit/s; 0 where that was not written down.
    #[serde(default)]
    pub path: u64,
    /// Until its source is rid of it, milliseconds.
    #[serde(default)]
    pub eviction_ms: u64,
    /// From the end of the one before it to its first page, milliseconds.
    #[serde(default)]
    pub between_ms: u64,
}

/// How the guest is held back for the date.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDate {
    /// What it may change on its disks at first.
    pub limit: Option<BytesPerSec>,
    /// When they have to be in step.
    pub in_step_by: UnixMs,
}

/// Where a VM's disks go on to, once it runs at its destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChosenDiskStore {
    /// The intermediary.
    pub host: HostId,
    /// What the disks take at the source.
    pub bytes: Bytes,
    /// What its way from the source can give, as far as the urgency goes; 0: not known.
    pub rate: BitsPerSec,
}

/// One attempt to move one VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Leg {
    /// Its id at the agents and on the switches.
    pub migration: MigrationId,
    /// Where to.
    pub destination: HostId,
    /// How.
    pub mode: Mode,
    /// The path, with what is wanted on each port.
    pub hops: Vec<Hop>,
    /// What was reserved; empty before.
    pub reserved: Reserved,
    /// What the plan said.
    pub prediction: Prediction,
    /// How its guest is held back for the date; `None`: not at all.
    #[serde(default)]
    pub disk_date: Option<DiskDate>,
    /// Where its pages wait; `None`: nowhere.
    #[serde(default)]
    pub stores: Option<ChosenStores>,
    /// Where its disks go on to; `None`: nowhere.
    #[serde(default)]
    pub disk_store: Option<ChosenDiskStore>,
    /// Whether this controller follows its gathering.
    #[serde(skip)]
    pub(super) followed: bool,
    /// When it was chosen.
    pub started: UnixMs,
    /// Whether COMMIT was seen to be under way: from then on only proof says where the VM is.
    pub committed: bool,
    /// Since when nobody has known whether COMMIT arrived.
    pub uncertain_since: Option<UnixMs>,
    /// Whether the agents were told to cancel it.
    pub cancel_sent: bool,
    /// The intermediary whose fault it was that it did not get anywhere.
    #[serde(default)]
    pub failed_store: Option<HostId>,
    /// How it ended, from Releasing on.
    pub outcome: Option<Outcome>,
}

impl Leg {
    /// The hosts that keep its pages, or its disks.
    #[must_use]
    pub fn store_hosts(&self) -> Vec<HostId> {
        let stores = self.stores.iter().flat_map(|chosen| &chosen.stores);
        let disks = self.disk_store.iter().map(|store| &store.host);
        stores.map(|store| &store.host).chain(disks).cloned().collect()
    }

    /// Whether its destination has something to gather once its source is rid of it.
    #[must_use]
    pub fn is_gathered(&self) -> bool {
        self.stores.is_some() || self.disk_store.is_some()
    }

    /// The names under which the ways to its stores are reserved, one for each: a reservation has one
    /// way and one pair of addresses.
    #[must_use]
    pub fn store_ways(&self) -> Vec<MigrationId> {
        let names = (1..=self.store_hosts().len()).map(|n| format!("{}.s{n}", self.migration));
        names.filter_map(|name| MigrationId::new(name).ok()).collect()
    }

    /// The same for the ways from its stores to its destination, which are held until it has gathered.
    #[must_use]
    pub fn gather_ways(&self) -> Vec<MigrationId> {
        gather_names(&self.migration, self.store_hosts().len())
    }

    /// What the source has to keep to of what is reserved: all of the way, or where pages go to
    /// stores its own uplink. How fast its destination is must not hold it up then.
    #[must_use]
    pub fn reserved_for_sending(&self) -> Reserved {
        let mut reserved = self.reserved.clone();
        if let (Some(_), Some(uplink)) = (&self.stores, self.hops.first()) {
            reserved.hops.retain(|hop| hop.at == uplink.at);
        }
        reserved
    }

    /// The narrowest link that the source sends over: more than it carries cannot be sent anyway, and
    /// the agent's buffers are measured by it. It may use all of that while nobody else needs it.
    #[must_use]
    pub fn narrowest(&self) -> BitsPerSec {
        let over = if self.stores.is_some() { 1 } else { self.hops.len() };
        let links = self.hops.iter().take(over).map(|hop| hop.capacity);
        links.min().unwrap_or(BitsPerSec::ZERO)
    }

    /// How a lost store is made up for; empty where there is none.
    #[must_use]
    pub fn redundancy_word(&self) -> String {
        self.stores.as_ref().map_or_else(String::new, |chosen| chosen.redundancy.to_string())
    }
}

/// The names under which the ways from so many stores of a migration are reserved.
#[must_use]
pub fn gather_names(migration: &MigrationId, stores: usize) -> Vec<MigrationId> {
    let names = (1..=stores).map(|n| format!("{migration}.g{n}"));
    names.filter_map(|name| MigrationId::new(name).ok()).collect()
}

/// How a leg ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The VM runs at the destination.
    Moved,
    /// The VM never left (or returned to) the source, because of this.
    Stayed(String),
    /// Nobody knows, because of this.
    Uncertain(String),
    /// The VM runs nowhere, because of this.
    Lost(String),
}

/// One VM of an evacuation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Which.
    pub vm: VmId,
    /// Where it was when the evacuation began.
    pub source: HostId,
    /// Where it stands.
    pub phase: VmPhase,
    /// Legs begun so far.
    pub attempts: u32,
    /// Destinations that failed; they are not tried again.
    pub tried: Vec<HostId>,
    /// Intermediaries that failed; nothing of it is put there again.
    #[serde(default)]
    pub failed_stores: Vec<HostId>,
    /// The current leg, or the last one.
    pub leg: Option<Leg>,
    /// The first plan's word, shown while it waits.
    pub prediction: Prediction,
    /// The newest progress of the current or last leg, as the source's agent told it.
    pub progress: Option<MigrationProgress>,
    /// How much is done, 0 to 1; of this leg it never runs backwards.
    pub done: f64,
    /// Why it was left behind, is uncertain, is lost; or what went wrong with its last attempt.
    pub reason: String,
    /// Of one that waits for something to end: why it has no place now.
    #[serde(default)]
    pub no_place: String,
}

impl VmRecord {
    /// A VM whose turn has not come.
    #[must_use]
    pub fn waiting(vm: VmId, source: HostId, prediction: Prediction) -> Self {
        Self {
            vm,
            source,
            phase: VmPhase::Waiting,
            attempts: 0,
            tried: Vec::new(),
            failed_stores: Vec::new(),
            leg: None,
            prediction,
            progress: None,
            done: 0.0,
            reason: String::new(),
            no_place: String::new(),
        }
    }

    /// A VM that does not even begin, with its reason.
    #[must_use]
    pub fn left_behind(vm: VmId, source: HostId, reason: String) -> Self {
        let phase = VmPhase::LeftBehind;
        Self { phase, reason, ..Self::waiting(vm, source, Prediction::default()) }
    }

    /// What an operator should know of it now.
    #[must_use]
    pub fn said(&self) -> String {
        match (self.phase, self.no_place.as_str()) {
            (VmPhase::Waiting | VmPhase::Measuring, why) if !why.is_empty() => {
                format!("no place for it yet: {why}")
            }
            _ => self.reason.clone(),
        }
    }

    /// Whether its leg has this migration id.
    #[must_use]
    pub fn has_leg(&self, migration: &MigrationId) -> bool {
        self.leg.as_ref().is_some_and(|leg| leg.migration == *migration)
    }

    /// Its leg, if that has this migration id. Whatever else arrives is of an older attempt.
    pub(super) fn leg_of(&mut self, migration: &MigrationId) -> Option<&mut Leg> {
        self.leg.as_mut().filter(|leg| leg.migration == *migration)
    }
}
