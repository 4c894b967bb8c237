//! Between the wire's enums and ours. An unknown number from a peer is `None`, never a default.

use crate::{
    agent,
    terms::{DiskMode, Mode, Redundancy},
};

impl From<Mode> for agent::Mode {
    /// `Auto` is the controller's business and has no number on this wire: it maps to
    /// `Unspecified`, which an agent refuses.
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Auto => Self::Unspecified,
            Mode::PreCopy => Self::PreCopy,
            Mode::PostCopy => Self::PostCopy,
            Mode::ScatterGather => Self::ScatterGather,
            Mode::Cold => Self::Cold,
        }
    }
}

impl agent::Mode {
    /// The mode that a peer named; `None` for `Unspecified`.
    #[must_use]
    pub fn known(self) -> Option<Mode> {
        match self {
            Self::Unspecified => None,
            Self::PreCopy => Some(Mode::PreCopy),
            Self::PostCopy => Some(Mode::PostCopy),
            Self::ScatterGather => Some(Mode::ScatterGather),
            Self::Cold => Some(Mode::Cold),
        }
    }
}

impl From<DiskMode> for agent::DiskMode {
    fn from(mode: DiskMode) -> Self {
        match mode {
            DiskMode::Copy => Self::Copy,
            DiskMode::OnDemand => Self::OnDemand,
            DiskMode::Scatter => Self::Scatter,
        }
    }
}

impl agent::DiskMode {
    /// What a peer named; `None` for `Unspecified`.
    #[must_use]
    pub fn known(self) -> Option<DiskMode> {
        match self {
            Self::Unspecified => None,
            Self::Copy => Some(DiskMode::Copy),
            Self::OnDemand => Some(DiskMode::OnDemand),
            Self::Scatter => Some(DiskMode::Scatter),
        }
    }
}

impl From<Redundancy> for agent::Redundancy {
    fn from(redundancy: Redundancy) -> Self {
        match redundancy {
            Redundancy::None => Self::None,
            Redundancy::Mirror => Self::Mirror,
            Redundancy::Parity => Self::Parity,
        }
    }
}

impl agent::Phase {
    /// Whether the migration has ended in it: nothing more will happen without a new command.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled | Self::Lost)
    }

    /// The phase's name as operators read it.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Unspecified => "unknown",
            Self::Setup => "setup",
            Self::DiskBulk => "disk bulk",
            Self::MemoryCopy => "memory copy",
            Self::Switchover => "switchover",
            Self::Committing => "committing",
            Self::PostCopy => "post-copy",
            Self::Gather => "gather",
            Self::DiskRest => "disk rest",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Uncertain => "uncertain",
            Self::Lost => "lost",
        }
    }
}

impl agent::VmState {
    /// The state's name as operators read it.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Unspecified => "unknown",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Sending => "sending",
            Self::Incoming => "incoming",
            Self::Ceded => "ceded",
            Self::Uncertain => "uncertain",
            Self::InDoubt => "in doubt",
            Self::Crashed => "crashed",
        }
    }
}
