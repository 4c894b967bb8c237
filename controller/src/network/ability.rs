//! What a reservation can do at a port, in words for operators.
//!
//! Found out by `switched`, shown by `lifeboat switches`, and told by `plan` where it is less than a
//! queue. Not here: how it is found out.

use std::fmt;

/// What can be done at a port so that a migration gets its share there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Ability {
    /// Not asked yet.
    #[default]
    Unknown,
    /// A queue, which the datapath itself leads packets to.
    Queue,
    /// A queue, and a classifier beside it that an agent with the role switch installs.
    ClassifiedQueue,
    /// It would need that classifier, and no agent is configured that could install it.
    NoClassifier,
    /// No queue; but a meter holds everybody else to what a migration leaves, and the source keeps to
    /// its rate.
    Metered(PaceOnly),
    /// Nothing at the port itself: the source keeps to the rate.
    PaceOnly(PaceOnly),
}

/// Why a port gets no queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PaceOnly {
    /// Its link is too fast for a software shaper.
    TooFast,
    /// The kernel there has no HTB.
    NoShaper,
    /// The kernel there cannot tell queues apart beside HTB, which a userspace datapath needs.
    NoFilter,
    /// It is a bond, of which each stream takes one member.
    Bond,
    /// Another controller's flows decide there; what of them says so.
    ForeignPipeline {
        /// The first flow that does more than forward as a plain switch.
        flow: String,
    },
}

/// What the kernel of a switch's machine can do with a port, as its agent found out by doing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shaping {
    /// Queues.
    pub htb: bool,
    /// The filter beside them that a userspace datapath needs.
    pub classifier: bool,
    /// Policing of what comes in by a port; Open vSwitch's `ingress_policing_rate` does nothing
    /// without it, and says nothing.
    pub policing: bool,
}

impl fmt::Display for Shaping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts =
            [(self.htb, "HTB"), (self.classifier, "cls_bpf"), (self.policing, "act_police")];
        let named = |wanted: bool| {
            let names = parts.iter().filter(|(there, _)| *there == wanted).map(|(_, name)| *name);
            names.collect::<Vec<_>>().join(", ")
        };
        match (named(true), named(false)) {
            (all, none) if none.is_empty() => f.write_str(&all),
            (none, all) if none.is_empty() => write!(f, "no {all}"),
            (some, others) => write!(f, "{some}; no {others}"),
        }
    }
}

impl Ability {
    /// Why only the source can keep to a rate; `None` where the port can do more, or may.
    #[must_use]
    pub const fn pace_only(&self) -> Option<&PaceOnly> {
        match self {
            Self::PaceOnly(why) => Some(why),
            _ => None,
        }
    }

    /// Why the port gets no queue, whether or not others are held back there; `None` where it does, or
    /// may.
    #[must_use]
    pub const fn no_queue(&self) -> Option<&PaceOnly> {
        match self {
            Self::Metered(why) | Self::PaceOnly(why) => Some(why),
            _ => None,
        }
    }
}

impl fmt::Display for Ability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("?"),
            Self::Queue => f.write_str("queues"),
            Self::ClassifiedQueue => f.write_str("queues, by classifier"),
            Self::NoClassifier => f.write_str("none: no agent with the role switch"),
            Self::Metered(why) => write!(f, "pacing, and a meter on the others: {why}"),
            Self::PaceOnly(why) => write!(f, "pacing only: {why}"),
        }
    }
}

impl fmt::Display for PaceOnly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooFast => f.write_str("25 Gbit/s and more are not shaped in software"),
            Self::NoShaper => f.write_str("its kernel has no HTB (sch_htb)"),
            Self::NoFilter => f.write_str("its kernel has no filter for queues (cls_bpf)"),
            Self::Bond => f.write_str("of a bond each stream takes one member"),
            Self::ForeignPipeline { flow } => write!(f, "another controller's {flow}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Shaping;

    #[test]
    fn what_a_kernel_has_and_what_it_lacks_is_said() {
        let said = |htb, classifier, policing| Shaping { htb, classifier, policing }.to_string();
        assert_eq!(said(true, true, true), "HTB, cls_bpf, act_police");
        assert_eq!(said(true, true, false), "HTB, cls_bpf; no act_police");
        assert_eq!(said(false, false, false), "no HTB, cls_bpf, act_police");
    }
}
