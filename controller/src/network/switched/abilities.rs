//! What each port can do: whether a queue may be put there, or others held back by a meter, or only
//! the source can keep to a rate.
//!
//! Used by the reservation, the discovery and the status. A kernel without HTB, or on a userspace
//! datapath without the filter beside it, cannot (the agent of the switch is asked, because Open vSwitch
//! does not say). Three things forbid us a port. A link of
//! 25 Gbit/s and more must not carry HTB, whose one lock costs such a link its speed. Of a bond each
//! stream takes one member, and which one is the bond's business. And on a bridge
//! with another controller's pipeline (OVN, Neutron, a learning controller) a flow of ours that says
//! NORMAL would lead pages past what that controller decided, so there we install nothing, not even
//! a probe.
//!
//! What a plain switch is: every flow that is not ours is in table 0 and drops, or marks and then
//! forwards NORMAL. Flows are looked at when a switch has connected, and again now and then; a
//! pipeline of many thousand flows is not asked for often.
//!
//! A meter instead of a queue takes more than a plain switch (see `hold`): a host's own bridge with
//! one link, where everything that does not come in by that link may leave by it, and no flow of
//! anybody that does more than forward, because ours come first.

use std::collections::BTreeMap;
use std::sync::Mutex;

use lifeboat_ovs::openflow::multipart::{FlowStats, Reply, Request};
use lifeboat_ovs::openflow::{Action, Instruction, PortNo};
use lifeboat_protocol::ids::{HostId, SwitchId};
use lifeboat_protocol::units::BitsPerSec;

use super::mark::Cookie;
use super::queues::WITHIN;
use super::{Inner, hold, locked, of_openflow};
use crate::clock::{self, UnixMs};
use crate::network::{Ability, Hop, NetworkError, PaceOnly, PortRef, Shaping};

/// From here on a link carries no HTB.
const TOO_FAST: BitsPerSec = BitsPerSec::from_mbit(25_000);
/// After so long a plain switch is looked at again, in milliseconds.
const PLAIN_AGAIN: u64 = 30_000;
/// After so long another controller's is.
const FOREIGN_AGAIN: u64 = 300_000;

/// What was seen of every switch's flows.
pub(super) type Pipelines = Mutex<BTreeMap<SwitchId, Pipeline>>;

/// What agents have said of their kernels.
pub(super) type Shapers = Mutex<BTreeMap<HostId, Shaping>>;

/// The ports of a way by what they can do.
#[derive(Debug, Default)]
pub(super) struct Divided {
    /// Those that get a queue.
    pub(super) queued: Vec<Hop>,
    /// Those where others are held back by a meter; the source keeps to the rate.
    pub(super) metered: Vec<Hop>,
    /// Those where only the source keeps to the rate.
    pub(super) paced: Vec<Hop>,
}

/// What was seen of a switch's flows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pipeline {
    seen: UnixMs,
    /// The first flow of another controller's pipeline.
    foreign: Option<String>,
    /// Whether nobody's flow does more than forward, and the switch can have our meter.
    meters: bool,
}

impl Pipeline {
    fn is_due(&self, now: UnixMs) -> bool {
        let again = if self.foreign.is_some() { FOREIGN_AGAIN } else { PLAIN_AGAIN };
        now.since(self.seen) >= again
    }
}

/// The first flow that shows another controller's pipeline; `None` on a plain switch.
fn foreign(flows: &[FlowStats]) -> Option<String> {
    let theirs = flows.iter().filter(|flow| Cookie::from_bits(flow.cookie).is_none());
    let mut theirs = theirs.filter(|flow| flow.table != 0 || !is_plain(&flow.instructions));
    theirs.next().map(|flow| {
        format!(
            "flow in table {}, priority {}, cookie {:#x}",
            flow.table, flow.priority, flow.cookie
        )
    })
}

/// Whether a meter of ours could stand before all flows of others and change nothing else: they do
/// nothing but forward.
fn is_bare(flows: &[FlowStats]) -> bool {
    let theirs = flows.iter().filter(|flow| Cookie::from_bits(flow.cookie).is_none());
    let forwards = |instruction: &Instruction| match instruction {
        Instruction::ApplyActions(actions) => {
            matches!(actions[..], [Action::Output { port: PortNo::NORMAL, .. }])
        }
        _ => false,
    };
    theirs.into_iter().all(|flow| match &flow.instructions[..] {
        [one] => flow.table == 0 && forwards(one),
        _ => false,
    })
}

/// Drops, or marks and then forwards NORMAL.
fn is_plain(instructions: &[Instruction]) -> bool {
    instructions.iter().all(|instruction| match instruction {
        Instruction::ApplyActions(actions) | Instruction::WriteActions(actions) => {
            actions.iter().all(|action| match action {
                Action::Output { port, .. } => *port == PortNo::NORMAL,
                Action::SetQueue(_) | Action::SetField(_) => true,
                _ => false,
            })
        }
        Instruction::ClearActions | Instruction::Meter(_) => true,
        _ => false,
    })
}

impl Inner {
    /// What can be done at a port, as far as that is known now.
    pub(super) fn ability(&self, at: &PortRef) -> Ability {
        if self.links.get(at).is_some_and(|link| link.capacity >= TOO_FAST) {
            return Ability::PaceOnly(PaceOnly::TooFast);
        }
        let bridge = self.connections.bridge(&at.switch);
        let port = bridge.as_ref().and_then(|bridge| bridge.ports.get(&at.port));
        if port.is_some_and(|port| port.bond) {
            return Ability::PaceOnly(PaceOnly::Bond);
        }
        let Some(pipeline) = locked(&self.pipelines).get(&at.switch).cloned() else {
            return Ability::Unknown;
        };
        if let Some(flow) = pipeline.foreign {
            return Ability::PaceOnly(PaceOnly::ForeignPipeline { flow });
        }
        let unshaped = |why| match pipeline.meters && self.has_one_link(&at.switch) {
            true => Ability::Metered(why),
            false => Ability::PaceOnly(why),
        };
        match (bridge, self.shaping(&at.switch)) {
            (None, _) => Ability::Unknown,
            (Some(_), Some(shaping)) if !shaping.htb => unshaped(PaceOnly::NoShaper),
            (Some(bridge), Some(shaping)) if bridge.needs_classifier() && !shaping.classifier => {
                unshaped(PaceOnly::NoFilter)
            }
            (Some(bridge), _) if !bridge.needs_classifier() => Ability::Queue,
            (Some(_), _) => {
                let known = self.connections.known(&at.switch);
                match known.is_ok_and(|known| known.agent.is_some()) {
                    true => Ability::ClassifiedQueue,
                    false => Ability::NoClassifier,
                }
            }
        }
    }

    /// Whether a switch is a host's own bridge, and has one link: what does not come in by it may
    /// leave by it.
    fn has_one_link(&self, switch: &SwitchId) -> bool {
        let known = self.connections.known(switch);
        let links = self.links.keys().filter(|at| at.switch == *switch);
        known.is_ok_and(|known| known.host.is_some()) && links.count() == 1
    }

    /// What the kernel of a switch's machine can do, as far as its agent has said.
    pub(super) fn shaping(&self, switch: &SwitchId) -> Option<Shaping> {
        let agent = self.connections.known(switch).ok()?.agent.as_ref()?;
        locked(&self.shapers).get(agent).copied()
    }

    /// Has the agent of a switch say what its kernel can do, once.
    async fn ask_kernel(&self, switch: &SwitchId) {
        let (Ok(known), Some(agents)) = (self.connections.known(switch), self.classifiers.get())
        else {
            return;
        };
        let Some(agent) = known.agent.as_ref().filter(|_| self.shaping(switch).is_none()) else {
            return;
        };
        match agents.shaping(agent).await {
            Ok(shaping) => drop(locked(&self.shapers).insert(agent.clone(), shaping)),
            // An older agent, or one that is away: a reservation that fails will say why.
            Err(error) => tracing::debug!(%agent, %error, "its kernel was not asked"),
        }
    }

    /// Whether no flow of ours may be on a switch; what is not known may not.
    pub(super) async fn is_foreign(&self, switch: &SwitchId) -> bool {
        let known = || locked(&self.pipelines).get(switch).map(|seen| seen.foreign.is_some());
        if known().is_none()
            && let Err(error) = self.look_at(switch).await
        {
            tracing::debug!(%switch, %error, "flows not looked at");
        }
        known().unwrap_or(true)
    }

    /// Looks at the flows of every switch that is connected and has not been looked at lately.
    pub(super) async fn look_at_pipelines(&self) {
        let now = clock::now();
        for (switch, _) in self.connections.switches() {
            let due = locked(&self.pipelines).get(switch).is_none_or(|seen| seen.is_due(now));
            if due && let Err(error) = self.look_at(switch).await {
                tracing::debug!(%switch, %error, "flows not looked at");
            }
            if due {
                self.ask_kernel(switch).await;
            }
        }
    }

    /// A switch has connected again: what its flows were says nothing.
    pub(super) fn forget_pipeline(&self, switch: &SwitchId) {
        locked(&self.pipelines).remove(switch);
    }

    async fn look_at(&self, switch: &SwitchId) -> Result<(), NetworkError> {
        let handle = self.connections.openflow(switch)?;
        let flows = handle.flow_stats(0, 0, WITHIN).await;
        let flows = flows.map_err(|error| of_openflow(switch, "list its flows", error))?;
        let meters = is_bare(&flows)
            && match handle.question(Request::MeterFeatures, WITHIN).await {
                Ok(Reply::MeterFeatures(features)) => features.max_meters >= hold::METER,
                // A switch that does not know the question has none.
                _ => false,
            };
        let pipeline = Pipeline { seen: clock::now(), foreign: foreign(&flows), meters };
        let before = locked(&self.pipelines).insert(switch.clone(), pipeline.clone());
        if let Some(flow) = pipeline.foreign
            && before.is_none_or(|before| before.foreign.is_none())
        {
            tracing::info!(%switch, flow, "another controller decides here; nothing is installed");
        }
        Ok(())
    }

    /// The ports of a way by what they can do.
    ///
    /// # Errors
    /// When a switch that was never looked at does not answer.
    pub(super) async fn divide(&self, hops: Vec<Hop>) -> Result<Divided, NetworkError> {
        for hop in &hops {
            if self.ability(&hop.at) == Ability::Unknown {
                self.look_at(&hop.at.switch).await?;
            }
            self.ask_kernel(&hop.at.switch).await;
        }
        let mut divided = Divided::default();
        for hop in hops {
            let kind = match self.ability(&hop.at) {
                Ability::Metered(_) => &mut divided.metered,
                Ability::PaceOnly(_) => &mut divided.paced,
                _ => &mut divided.queued,
            };
            kind.push(hop);
        }
        Ok(divided)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lifeboat_ovs::openflow::{Match, Oxm};

    use super::*;

    fn flow(table: u8, cookie: u64, instructions: Vec<Instruction>) -> FlowStats {
        FlowStats {
            table,
            age: Duration::ZERO,
            priority: 7,
            idle_timeout: 0,
            hard_timeout: 0,
            flags: 0,
            cookie,
            packets: 0,
            bytes: 0,
            matching: Match::any(),
            instructions,
        }
    }

    fn apply(actions: Vec<Action>) -> Vec<Instruction> {
        vec![Instruction::ApplyActions(actions)]
    }

    #[test]
    fn dropping_and_marking_before_normal_is_what_a_plain_switch_does() {
        let normal = || Action::output(PortNo::NORMAL);
        let plain = [
            flow(0, 0, vec![]),
            flow(0, 0, apply(vec![normal()])),
            flow(
                0,
                5,
                apply(vec![Action::SetQueue(3), Action::SetField(Oxm::IpDscp(3)), normal()]),
            ),
            flow(0, 5, vec![Instruction::Meter(1), apply(vec![normal()]).remove(0)]),
        ];
        assert_eq!(foreign(&plain), None);
        assert_eq!(foreign(&[]), None);
    }

    #[test]
    fn anything_else_is_another_controller_s_and_is_named() {
        let others = [
            flow(1, 9, apply(vec![Action::output(PortNo::NORMAL)])),
            flow(0, 9, vec![Instruction::GotoTable(1)]),
            flow(0, 9, apply(vec![Action::output(PortNo(4))])),
            flow(0, 9, apply(vec![Action::output(PortNo::CONTROLLER)])),
            flow(0, 9, apply(vec![Action::Group(1)])),
            flow(0, 9, apply(vec![Action::Raw { kind: 0xffff, body: vec![0; 4].into() }])),
        ];
        for other in others {
            let said = foreign(std::slice::from_ref(&other)).unwrap();
            assert!(said.contains("priority 7, cookie 0x9"), "{said}");
        }
    }

    #[test]
    fn a_meter_stands_only_before_flows_that_do_nothing_but_forward() {
        let normal = || apply(vec![Action::output(PortNo::NORMAL)]);
        let ours = super::super::mark::forward_flow().cookie;
        assert!(is_bare(&[flow(0, 0, normal()), flow(0, ours, vec![])]));
        let marks = apply(vec![Action::SetQueue(3), Action::output(PortNo::NORMAL)]);
        let metered = vec![Instruction::Meter(1), normal().remove(0)];
        for other in
            [flow(0, 0, vec![]), flow(1, 0, normal()), flow(0, 0, marks), flow(0, 0, metered)]
        {
            assert!(!is_bare(&[flow(0, 0, normal()), other]));
        }
    }

    #[test]
    fn flows_of_ours_say_nothing_of_others() {
        let ours = super::super::mark::forward_flow().cookie;
        assert_eq!(foreign(&[flow(0, ours, apply(vec![Action::output(PortNo(4))]))]), None);
    }

    #[test]
    fn another_controller_s_pipeline_is_not_asked_for_often() {
        let seen = |foreign: Option<&str>| Pipeline {
            seen: UnixMs(1000),
            foreign: foreign.map(str::to_owned),
            meters: false,
        };
        assert!(seen(None).is_due(UnixMs(31_000)) && !seen(None).is_due(UnixMs(30_999)));
        assert!(!seen(Some("flow")).is_due(UnixMs(31_000)));
        assert!(seen(Some("flow")).is_due(UnixMs(301_000)));
    }
}
