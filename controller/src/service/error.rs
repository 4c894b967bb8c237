//! Why a command was not carried out: what was asked, what stood in the way, what to do.

use lifeboat_protocol::ids::{EvacuationId, HostId, NameError, VmId};
use lifeboat_protocol::terms::{UnknownTermError, UrgencyError};

use crate::agents::AgentError;
use crate::audit::AuditError;
use crate::driver::Stopped;
use crate::evacuation::AdmissionError;
use crate::journal::JournalError;
use crate::planner::PlannerError;

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// No such host.
    #[error("there is no host `{host}`; the hosts are {known}")]
    UnknownHost {
        /// What was given.
        host: HostId,
        /// Those that there are.
        known: String,
    },
    /// No such VM, on any host that answers.
    #[error("there is no VM `{vm}` on any connected host; `lifeboat vms` lists them")]
    UnknownVm {
        /// What was given.
        vm: VmId,
    },
    /// No such evacuation.
    #[error("there is no evacuation `{id}`; known are {known}")]
    UnknownEvacuation {
        /// What was given.
        id: String,
        /// The newest ones.
        known: String,
    },
    /// A command without a host.
    #[error("no host was named; name at least one, as `lifeboat hosts` lists them")]
    NoHost,
    /// A text that is no name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A mode or another word that is none.
    #[error(transparent)]
    Word(#[from] UnknownTermError),
    /// An urgency out of range.
    #[error(transparent)]
    Urgency(#[from] UrgencyError),
    /// Disks that cannot follow their VM.
    #[error("no disk can move on demand here: {why}")]
    OnDemand {
        /// Why, and what would do.
        why: &'static str,
    },
    /// `migrate` to where the VM is.
    #[error("VM {vm} is already at {host}; name another host with --to")]
    AlreadyThere {
        /// The VM.
        vm: VmId,
        /// The host.
        host: HostId,
    },
    /// `preseed --forget` of what is not there.
    #[error(
        "{host} has no copy of the disks of {vm}; `lifeboat preseed --list` shows those that there are"
    )]
    NoSeed {
        /// The VM.
        vm: VmId,
        /// The host.
        host: HostId,
    },
    /// `verify` with nobody to compare with.
    #[error(
        "VM {vm} is at {host}, and no other host is connected that it can be compared with; `lifeboat hosts` lists them"
    )]
    NoOtherHost {
        /// The VM.
        vm: VmId,
        /// Where it is.
        host: HostId,
    },
    /// There is no plan.
    #[error(transparent)]
    Plan(#[from] PlannerError),
    /// Another evacuation stands in the way.
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    /// The evacuation has ended.
    #[error(
        "evacuation {id} has ended ({state}); nothing is left to cancel, see `lifeboat report {id}`"
    )]
    Over {
        /// Which.
        id: EvacuationId,
        /// How it ended.
        state: &'static str,
    },
    /// Nothing of it that could be limited.
    #[error(
        "VM {vm} is not being sent now, so there is nothing to limit; `lifeboat status` shows what is"
    )]
    NotUnderWay {
        /// The VM.
        vm: VmId,
    },
    /// Its order sets that limit.
    #[error("the limit of VM {vm} stays as it is: {why}")]
    NotLimited {
        /// The VM.
        vm: VmId,
        /// Why, and what would do.
        why: &'static str,
    },
    /// The evacuation has not ended.
    #[error(
        "evacuation {id} still runs; wait for its end or `lifeboat cancel {id}` before a retry"
    )]
    StillRunning {
        /// Which.
        id: EvacuationId,
    },
    /// Nothing to try again.
    #[error("evacuation {id} has left no VM behind; there is nothing to retry")]
    NothingLeft {
        /// Which.
        id: EvacuationId,
    },
    /// A claim without the operator's word.
    #[error(
        "claiming VM {vm} needs your word that the other host cannot run it: fence it off (power, network), then add --fenced"
    )]
    NotFenced {
        /// The VM.
        vm: VmId,
    },
    /// Nobody can claim it.
    #[error("VM {vm} is not uncertain on any connected host; `lifeboat vms` shows its state")]
    NothingToClaim {
        /// The VM.
        vm: VmId,
    },
    /// Both sides could claim it.
    #[error("VM {vm} can be claimed at {hosts}; say which with --host")]
    WhichSide {
        /// The VM.
        vm: VmId,
        /// The hosts.
        hosts: String,
    },
    /// An agent did not do it.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The journal did not take it.
    #[error("the command was not carried out: its journal failed")]
    Journal(#[from] JournalError),
    /// The audit log did not take it.
    #[error("the command could not be audited; look at its effect with `lifeboat status`")]
    Audit(#[from] AuditError),
    /// The controller is going down.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// An error with all its causes in one line.
#[must_use]
pub fn sentence(error: &CommandError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
