//! The kill points: at which moment of a hand-over, what blow falls, and where the VM may be found
//! afterwards. How they are played is in `play`.

/// A side of the migration under way, or the host that has no part in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// When the blow falls.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Moment {
    /// The evacuation has just been asked for.
    Asked,
    /// The controller says that it is in this phase.
    Phase(&'static str),
    /// Pages travel.
    Copying,
    /// That side's agent stands at this mark (`before/ACTION` or `after/ACTION`).
    At(Side, &'static str),
    /// As `At`, on a way that is only taken because the evacuation is cancelled while pages travel.
    GivingUp(Side, &'static str),
    /// As `At`, on a way that is only taken because the destination's QEMU died before it was told
    /// to resume the guest, after COMMIT.
    TakingBack(&'static str),
}

/// What falls. The dead are started again and cuts are healed after a while, some before the
/// evacuation has ended and some when it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blow {
    /// kill -9 of an agent.
    Agent(Side),
    /// kill -9 of both agents.
    BothAgents,
    /// kill -9 of the destination's QEMU.
    Qemu,
    /// kill -9 of the controller.
    Controller,
    /// The link between the two agents closes its connections and takes no new ones.
    LinkClosed,
    /// Nothing comes through the link between the two agents, and nobody is told.
    LinkSilent,
    /// Ctrl-C to `lifeboat evacuate`.
    CtrlC,
    /// A host loses its power: agent and QEMU die, and what a reboot clears is gone. When it is
    /// back, it starts the VMs that are to be started with it.
    Power(Side),
}

/// Where the VM runs in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Where it was to go; the evacuation is done.
    Arrived,
    /// At the third host: the evacuation went on.
    Elsewhere,
    /// Where it was: cancelled, or left behind with a reason.
    Stayed,
}

/// One kill point.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) moment: Moment,
    pub(crate) blow: Blow,
    pub(crate) ends: &'static [End],
    /// The VM must be shown as uncertain until the damage is repaired.
    pub(crate) uncertain: bool,
    /// Before the damage is repaired, the operator claims the VM for this side.
    pub(crate) claim: Option<Side>,
    /// No other host than that destination may take the VM.
    pub(crate) only_there: bool,
}

const fn case(moment: Moment, blow: Blow, ends: &'static [End]) -> Case {
    Case { moment, blow, ends, uncertain: false, claim: None, only_there: false }
}

const fn uncertain(moment: Moment, blow: Blow, ends: &'static [End]) -> Case {
    Case { uncertain: true, ..case(moment, blow, ends) }
}

const fn claimed(moment: Moment, blow: Blow, by: Side, ends: &'static [End]) -> Case {
    Case { claim: Some(by), ..uncertain(moment, blow, ends) }
}

const fn left_behind(moment: Moment, blow: Blow) -> Case {
    Case { only_there: true, ..case(moment, blow, STAYED) }
}

const ARRIVED: &[End] = &[End::Arrived];
const ELSEWHERE: &[End] = &[End::Elsewhere];
const STAYED: &[End] = &[End::Stayed];
/// The evacuation is done, wherever that is.
const MOVED: &[End] = &[End::Arrived, End::Elsewhere];

/// Taken back by the operator's word; the evacuation may have gone on with it.
const CLAIMED_BACK: &[End] = &[End::Stayed, End::Elsewhere];

use Blow::{Agent, BothAgents, Controller, CtrlC, LinkClosed, LinkSilent, Power, Qemu};
use Moment::{Asked, At, Copying, GivingUp, Phase, TakingBack};
use Side::{Destination, Source};

/// All of them, by what is struck.
pub(crate) const CASES: &[&[Case]] = &[
    // The source's agent. Until `ceded` is durable the VM is the source's, and a host that failed
    // is not tried again; from then on it is the destination's, however often anybody dies.
    &[
        case(At(Source, "before/persist-sending"), Agent(Source), ELSEWHERE),
        case(At(Source, "after/persist-sending"), Agent(Source), ELSEWHERE),
        case(Copying, Agent(Source), ELSEWHERE),
        case(At(Source, "before/persist-ceded"), Agent(Source), ELSEWHERE),
        case(At(Source, "after/persist-ceded"), Agent(Source), ARRIVED),
        case(At(Source, "before/send-commit"), Agent(Source), ARRIVED),
        case(At(Source, "after/send-commit"), Agent(Source), ARRIVED),
        case(At(Source, "before/persist-confirmed"), Agent(Source), ARRIVED),
        case(At(Source, "after/persist-confirmed"), Agent(Source), ARRIVED),
        case(At(Source, "before/quit-guest"), Agent(Source), ARRIVED),
        case(At(Source, "after/quit-guest"), Agent(Source), ARRIVED),
    ],
    &[
        case(GivingUp(Source, "before/resume-guest"), Agent(Source), STAYED),
        case(GivingUp(Source, "after/resume-guest"), Agent(Source), STAYED),
        case(GivingUp(Source, "before/persist-resumed"), Agent(Source), STAYED),
        case(GivingUp(Source, "after/persist-resumed"), Agent(Source), STAYED),
        case(TakingBack("before/persist-owner"), Agent(Source), MOVED),
        case(TakingBack("after/persist-owner"), Agent(Source), MOVED),
        case(TakingBack("after/resume-guest"), Agent(Source), MOVED),
        case(TakingBack("after/persist-resumed"), Agent(Source), MOVED),
    ],
    // The destination's agent.
    &[
        case(Copying, Agent(Destination), ELSEWHERE),
        case(At(Destination, "before/persist-loaded"), Agent(Destination), ELSEWHERE),
        case(At(Destination, "after/persist-loaded"), Agent(Destination), ELSEWHERE),
        case(At(Destination, "before/send-loaded"), Agent(Destination), ELSEWHERE),
        case(At(Destination, "after/send-loaded"), Agent(Destination), ARRIVED),
        case(At(Destination, "before/persist-owner"), Agent(Destination), ARRIVED),
        case(At(Destination, "after/persist-owner"), Agent(Destination), ARRIVED),
        case(At(Destination, "before/start-guest"), Agent(Destination), ARRIVED),
        case(At(Destination, "after/start-guest"), Agent(Destination), ARRIVED),
        case(At(Destination, "before/send-running"), Agent(Destination), ARRIVED),
        case(At(Destination, "after/send-running"), Agent(Destination), ARRIVED),
        case(At(Destination, "after/persist-resumed"), Agent(Destination), ARRIVED),
    ],
    &[
        case(GivingUp(Destination, "before/discard-guest"), Agent(Destination), STAYED),
        case(GivingUp(Destination, "after/discard-guest"), Agent(Destination), STAYED),
        case(GivingUp(Destination, "before/persist-refused"), Agent(Destination), STAYED),
        case(GivingUp(Destination, "after/persist-refused"), Agent(Destination), STAYED),
    ],
    // The destination's QEMU: whatever was promised, it has not run, and the source takes it back.
    &[
        case(Copying, Qemu, ELSEWHERE),
        case(At(Destination, "before/persist-loaded"), Qemu, ELSEWHERE),
        case(At(Destination, "after/send-loaded"), Qemu, ELSEWHERE),
        case(At(Destination, "before/persist-owner"), Qemu, ELSEWHERE),
        case(At(Destination, "before/start-guest"), Qemu, ELSEWHERE),
    ],
    // Both agents at once.
    &[
        case(Copying, BothAgents, ELSEWHERE),
        case(At(Source, "before/persist-ceded"), BothAgents, ELSEWHERE),
        case(At(Source, "after/persist-ceded"), BothAgents, ARRIVED),
        case(At(Destination, "before/persist-owner"), BothAgents, ARRIVED),
        case(At(Destination, "after/start-guest"), BothAgents, ARRIVED),
    ],
    // The controller.
    &[
        case(Asked, Controller, MOVED),
        case(Phase("preparing"), Controller, MOVED),
        case(Copying, Controller, MOVED),
        case(At(Source, "before/persist-ceded"), Controller, MOVED),
        case(At(Source, "after/send-commit"), Controller, ARRIVED),
        case(At(Destination, "before/start-guest"), Controller, ARRIVED),
    ],
    // The link between the agents. After COMMIT it stays uncertain until it is healed.
    &[
        case(Copying, LinkClosed, ELSEWHERE),
        case(Copying, LinkSilent, MOVED),
        case(At(Destination, "before/send-loaded"), LinkClosed, ELSEWHERE),
        uncertain(At(Source, "after/persist-ceded"), LinkClosed, ARRIVED),
        uncertain(At(Source, "before/persist-ceded"), LinkSilent, ARRIVED),
        uncertain(At(Destination, "before/persist-owner"), LinkClosed, ARRIVED),
        uncertain(At(Destination, "after/start-guest"), LinkSilent, ARRIVED),
    ],
    // The operator's Ctrl-C: before COMMIT the VM stays, after it the VM arrives all the same.
    &[
        case(Copying, CtrlC, STAYED),
        case(At(Destination, "before/persist-loaded"), CtrlC, STAYED),
        case(At(Destination, "before/start-guest"), CtrlC, ARRIVED),
    ],
    // A host's power. A destination that comes back without the guest that it had loaded proves that
    // it never ran; a source that ceded may not start it at its next boot.
    &[
        case(At(Destination, "after/send-loaded"), Power(Destination), ELSEWHERE),
        case(At(Source, "after/persist-ceded"), Power(Destination), ELSEWHERE),
        case(At(Source, "before/persist-confirmed"), Power(Source), ARRIVED),
        case(At(Source, "after/send-commit"), Power(Source), ARRIVED),
    ],
    // A claim, where the other host is off and comes back later: it has to find out.
    &[
        claimed(At(Source, "after/persist-ceded"), Power(Destination), Source, CLAIMED_BACK),
        claimed(At(Destination, "before/persist-owner"), Power(Destination), Source, CLAIMED_BACK),
        claimed(At(Destination, "after/persist-owner"), Power(Destination), Source, CLAIMED_BACK),
        claimed(At(Source, "after/persist-ceded"), Power(Source), Destination, ARRIVED),
        claimed(At(Source, "before/persist-ceded"), Power(Source), Destination, ARRIVED),
    ],
    // Nowhere else to go: left behind at the source, with the reason.
    &[
        left_behind(Copying, Agent(Destination)),
        left_behind(At(Destination, "before/persist-loaded"), Qemu),
        left_behind(At(Destination, "before/start-guest"), Qemu),
    ],
];
