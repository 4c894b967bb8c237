//! The states and choices that several rooms speak of: mode, urgency, reason, phase.
//!
//! What belongs to one room (the hand-over's persisted states, the evacuation's machine) stays
//! in that room; here is only what crosses a wire or a room's wall.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How a VM's memory moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The policy chooses per VM.
    Auto,
    /// All memory before the switchover, in iterations.
    PreCopy,
    /// Memory after the switchover, from the source's agent.
    PostCopy,
    /// Memory after the switchover, from stores at intermediaries.
    ScatterGather,
    /// Stopped at the source, moved, started at the destination: memory is not kept.
    Cold,
}

impl Mode {
    /// Every mode, in the order in which help texts list them.
    pub const ALL: [Self; 5] =
        [Self::Auto, Self::PreCopy, Self::PostCopy, Self::ScatterGather, Self::Cold];

    /// The mode's name on command lines and in files.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::PreCopy => "pre-copy",
            Self::PostCopy => "post-copy",
            Self::ScatterGather => "scatter-gather",
            Self::Cold => "cold",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A text that is none of the wanted words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not a {kind}; choose one of {choices}")]
pub struct UnknownTermError {
    /// What was given.
    pub given: String,
    /// What it should have been.
    pub kind: &'static str,
    /// The words that are known.
    pub choices: &'static str,
}

impl FromStr for Mode {
    type Err = UnknownTermError;
    fn from_str(text: &str) -> Result<Self, UnknownTermError> {
        Self::ALL.into_iter().find(|mode| mode.as_str() == text).ok_or_else(|| UnknownTermError {
            given: text.to_owned(),
            kind: "mode",
            choices: "auto, pre-copy, post-copy, scatter-gather, cold",
        })
    }
}

/// When a VM's local disks move.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum DiskMode {
    /// As a whole, before the VM.
    #[default]
    Copy,
    /// What is busy before the VM, the rest after it: eagerly, and what its guest reads first.
    OnDemand,
    /// The same, and meanwhile all of it to an intermediary, from which the destination then has the
    /// rest: the source is rid of the VM as soon as its own link allows.
    Scatter,
}

impl DiskMode {
    /// The name on command lines and in files.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::OnDemand => "on-demand",
            Self::Scatter => "scatter",
        }
    }

    /// Whether the VM runs at its destination before all of its disks is there.
    #[must_use]
    pub const fn follows(self) -> bool {
        matches!(self, Self::OnDemand | Self::Scatter)
    }
}

impl fmt::Display for DiskMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for DiskMode {
    type Err = UnknownTermError;
    fn from_str(text: &str) -> Result<Self, UnknownTermError> {
        let all = [Self::Copy, Self::OnDemand, Self::Scatter];
        all.into_iter().find(|mode| mode.as_str() == text).ok_or_else(|| UnknownTermError {
            given: text.to_owned(),
            kind: "way for disks to move",
            choices: "copy, on-demand, scatter",
        })
    }
}

/// Why a host is being evacuated. It sets the urgency when none is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// Planned work: applications come first (urgency 30).
    Maintenance,
    /// The host is about to fail: the VMs come first (urgency 90).
    Failing,
}

impl Reason {
    /// The urgency that this reason stands for when the operator names none. SOLive V-A gives the
    /// direction (high upon impending failure, low for maintenance); the figures are ours.
    #[must_use]
    pub const fn urgency(self) -> Urgency {
        match self {
            Self::Maintenance => Urgency(30),
            Self::Failing => Urgency(90),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Maintenance => "maintenance",
            Self::Failing => "failing",
        })
    }
}

/// What a reservation means to the others on the same link.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum ReservationKind {
    /// A minimum is guaranteed; what is not used of it is lent, and what others do not use may be
    /// borrowed.
    #[default]
    Borrow,
    /// A ceiling, too: the migration sends no more than what is reserved, and the applications no
    /// more than what remains, as in SOLive (section V-A).
    Strict,
}

impl ReservationKind {
    /// The kind's name on command lines and in files.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Borrow => "borrow",
            Self::Strict => "strict",
        }
    }
}

impl fmt::Display for ReservationKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for ReservationKind {
    type Err = UnknownTermError;
    fn from_str(text: &str) -> Result<Self, UnknownTermError> {
        let all = [Self::Borrow, Self::Strict];
        all.into_iter().find(|kind| kind.as_str() == text).ok_or_else(|| UnknownTermError {
            given: text.to_owned(),
            kind: "kind of reservation",
            choices: "borrow, strict",
        })
    }
}

/// How a VM's pages survive the loss of one store while they wait there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Redundancy {
    /// They don't: a lost store is a lost VM, once the source has gone.
    None,
    /// Each page is in two stores.
    Mirror,
    /// One more page for every `n - 1`, in another store (an XOR stripe).
    Parity,
}

impl Redundancy {
    /// What fits a number of stores: parity from three on, with two a mirror, with one nothing.
    #[must_use]
    pub const fn of(stores: usize) -> Self {
        match stores {
            0 | 1 => Self::None,
            2 => Self::Mirror,
            _ => Self::Parity,
        }
    }

    /// The fewest stores that it needs.
    #[must_use]
    pub const fn stores_least(self) -> usize {
        match self {
            Self::None => 1,
            Self::Mirror | Self::Parity => 2,
        }
    }

    /// Bytes that go to `stores` stores for each byte of pages.
    #[must_use]
    pub fn factor(self, stores: usize) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Mirror => 2.0,
            Self::Parity => stores.max(2) as f64 / (stores.max(2) - 1) as f64,
        }
    }

    /// The name on command lines and in files.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Mirror => "mirror",
            Self::Parity => "parity",
        }
    }
}

impl fmt::Display for Redundancy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Redundancy {
    type Err = UnknownTermError;
    fn from_str(text: &str) -> Result<Self, UnknownTermError> {
        let all = [Self::None, Self::Mirror, Self::Parity];
        all.into_iter().find(|kind| kind.as_str() == text).ok_or_else(|| UnknownTermError {
            given: text.to_owned(),
            kind: "kind of redundancy",
            choices: "none, mirror, parity",
        })
    }
}

/// The percentage of a link that an evacuation is entitled to (SOLive V-A), 0 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Urgency(u8);

/// An urgency that is no percentage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "urgency {given} is out of range: it is the percentage of each link that the evacuation is entitled to, 0 to 100"
)]
pub struct UrgencyError {
    /// What was given.
    pub given: u32,
}

impl Urgency {
    /// The urgency of `percent`.
    ///
    /// # Errors
    /// When it is more than 100.
    pub fn new(percent: u32) -> Result<Self, UrgencyError> {
        match u8::try_from(percent) {
            Ok(small) if small <= 100 => Ok(Self(small)),
            _ => Err(UrgencyError { given: percent }),
        }
    }

    /// In percent, 0 to 100.
    #[must_use]
    pub const fn percent(self) -> u32 {
        self.0 as u32
    }

    /// As a share, 0.0 to 1.0.
    #[must_use]
    pub fn share(self) -> f64 {
        f64::from(self.0) / 100.0
    }
}

impl TryFrom<u32> for Urgency {
    type Error = UrgencyError;
    fn try_from(percent: u32) -> Result<Self, UrgencyError> {
        Self::new(percent)
    }
}

impl From<Urgency> for u32 {
    fn from(urgency: Urgency) -> u32 {
        urgency.percent()
    }
}

impl fmt::Display for Urgency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_reads_as_it_prints() {
        for mode in Mode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        let error = "warm".parse::<Mode>().unwrap_err().to_string();
        assert!(error.contains("`warm` is not a mode") && error.contains("pre-copy"), "{error}");
    }

    #[test]
    fn both_kinds_of_reservation_read_as_they_print() {
        for kind in [ReservationKind::Borrow, ReservationKind::Strict] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        let error = "lend".parse::<ReservationKind>().unwrap_err().to_string();
        assert!(error.contains("`lend` is not a kind of reservation"), "{error}");
    }

    #[test]
    fn all_ways_for_disks_read_as_they_print() {
        for mode in [DiskMode::Copy, DiskMode::OnDemand, DiskMode::Scatter] {
            assert_eq!(mode.to_string().parse(), Ok(mode));
            assert_eq!(mode.follows(), mode != DiskMode::Copy);
        }
        assert!("later".parse::<DiskMode>().unwrap_err().to_string().contains("copy, on-demand"));
    }

    #[test]
    fn redundancy_follows_the_number_of_stores_and_costs_what_it_costs() {
        use Redundancy::{Mirror, None, Parity};
        assert_eq!([1, 2, 3, 9].map(Redundancy::of), [None, Mirror, Parity, Parity]);
        assert_eq!((None.factor(1), Mirror.factor(2), Parity.factor(3)), (1.0, 2.0, 1.5));
        for kind in [None, Mirror, Parity] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("raid".parse::<Redundancy>().unwrap_err().to_string().contains("mirror"));
    }

    #[test]
    fn an_urgency_of_140_says_what_urgency_is() {
        assert_eq!(Urgency::new(100).unwrap().share(), 1.0);
        let error = Urgency::new(140).unwrap_err().to_string();
        assert!(error.contains("140") && error.contains("0 to 100"), "{error}");
    }
}
