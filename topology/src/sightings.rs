//! Which ports face each other, by frames that were sent out of one and arrived at another. Pure.
//!
//! The controller has its switches send a probe out of every port once an interval, tells what it
//! sent and what arrived, and compares what was seen with what the configuration says. Not here:
//! the frames (`ovs/` has the codec), the interval, and capacities: no cable tells what it carries,
//! so those come from configuration.
//!
//! One direction of a link, as its probes tell it:
//!
//! ```text
//!               arrives where configured               3 probes in a row unanswered
//!   NotSeen ──────────────────────────────▶ Seen ◀──────────────────────────────▶ Lost
//!      │                                      ▲   arrives                          ▲
//!      └── arrives elsewhere ──▶ Elsewhere ───┘── 3 unanswered ────────────────────┘
//! ```
//!
//! **Unanswered probes are counted, not seconds.** A controller that stood still, or a switch whose
//! session is gone, has sent nothing and so has lost nothing. And a link that was never seen is not
//! lost: where another controller's flows keep probes from arriving it carries traffic all the same.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::names::End;

/// So many probes in a row without an answer, and a link that was seen is lost.
pub const PROBES_LOST: u32 = 3;

/// What is known of one direction of a link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum Sighting {
    /// No probe that left there was ever seen.
    NotSeen,
    /// Probes arrive where the configuration says.
    Seen,
    /// They did, and do not any more.
    Lost,
    /// They arrive somewhere else: the cabling is not as it was configured.
    Elsewhere {
        /// There.
        at: End,
    },
}

/// What has been sent and seen by each port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sightings {
    ports: BTreeMap<End, Probed>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Probed {
    token: [u8; 16],
    unanswered: u32,
    last: Option<End>,
}

impl Sightings {
    /// A probe with this token has been sent out of `from`. Tokens are drawn afresh for each probe,
    /// so that nobody can answer who has not seen it.
    pub fn sent(&mut self, from: End, token: [u8; 16]) {
        let new = Probed { token, unanswered: 0, last: None };
        let probed = self.ports.entry(from).or_insert(new);
        probed.token = token;
        probed.unanswered = probed.unanswered.saturating_add(1);
    }

    /// A probe that says it left by `from` with this token has arrived at `at`. Answers whether it
    /// is the one that was sent last; any other is not believed.
    pub fn arrived(&mut self, from: &End, token: [u8; 16], at: End) -> bool {
        let Some(probed) = self.ports.get_mut(from).filter(|probed| probed.token == token) else {
            return false;
        };
        if *from == at {
            return false;
        }
        probed.unanswered = 0;
        probed.last = Some(at);
        true
    }

    /// Nobody probes these any more: their switch is gone, and what it said with it.
    pub fn forget(&mut self, gone: impl Fn(&End) -> bool) {
        self.ports.retain(|from, _| !gone(from));
    }

    /// What is known of the direction from `from` to the port that the configuration says it leads
    /// to.
    #[must_use]
    pub fn of(&self, from: &End, to: &End) -> Sighting {
        let Some(Probed { unanswered, last: Some(at), .. }) = self.ports.get(from) else {
            return Sighting::NotSeen;
        };
        match () {
            () if *unanswered >= PROBES_LOST => Sighting::Lost,
            () if at == to => Sighting::Seen,
            () => Sighting::Elsewhere { at: at.clone() },
        }
    }

    /// Whether anything was ever sent out of a port.
    #[must_use]
    pub fn is_probed(&self, from: &End) -> bool {
        self.ports.contains_key(from)
    }

    /// Where the probes of a port arrive; `None` when they never did, or are lost.
    #[must_use]
    pub fn leads_to(&self, from: &End) -> Option<&End> {
        let probed = self.ports.get(from).filter(|probed| probed.unanswered < PROBES_LOST);
        probed?.last.as_ref()
    }

    /// All directions that were seen and are not lost: from, and to.
    pub fn links(&self) -> impl Iterator<Item = (&End, &End)> {
        let live = self.ports.iter().filter(|(_, probed)| probed.unanswered < PROBES_LOST);
        live.filter_map(|(from, probed)| Some((from, probed.last.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use lifeboat_protocol::ids::SwitchId;
    use proptest::prelude::*;

    use super::*;
    use crate::names::PortName;

    fn end(switch: u8) -> End {
        let switch = SwitchId::new(format!("s{switch}")).unwrap();
        End::new(switch, PortName::new("p1").unwrap())
    }

    fn sent(sightings: &mut Sightings, times: u8) {
        for token in 0..times {
            sightings.sent(end(1), [token; 16]);
        }
    }

    #[test]
    fn a_link_is_seen_lost_after_three_probes_and_seen_again() {
        let mut sightings = Sightings::default();
        assert_eq!(sightings.of(&end(1), &end(2)), Sighting::NotSeen);
        sent(&mut sightings, 9);
        assert_eq!(sightings.of(&end(1), &end(2)), Sighting::NotSeen);
        assert!(sightings.arrived(&end(1), [8; 16], end(2)));
        assert_eq!(sightings.of(&end(1), &end(2)), Sighting::Seen);
        sent(&mut sightings, 2);
        assert_eq!(sightings.of(&end(1), &end(2)), Sighting::Seen);
        sent(&mut sightings, 1);
        assert_eq!(sightings.of(&end(1), &end(2)), Sighting::Lost);
        assert_eq!(sightings.links().count(), 0);
        assert!(sightings.arrived(&end(1), [0; 16], end(2)));
        assert_eq!(sightings.of(&end(1), &end(2)), Sighting::Seen);
    }

    #[test]
    fn a_probe_that_was_not_sent_like_this_is_not_believed() {
        let mut sightings = Sightings::default();
        sent(&mut sightings, 2);
        assert!(!sightings.arrived(&end(1), [0; 16], end(2)), "an old token");
        assert!(!sightings.arrived(&end(3), [1; 16], end(2)), "a port that sent nothing");
        assert!(!sightings.arrived(&end(1), [1; 16], end(1)), "its own port");
        assert_eq!(sightings.of(&end(1), &end(2)), Sighting::NotSeen);
    }

    #[test]
    fn a_cable_in_the_wrong_port_is_named() {
        let mut sightings = Sightings::default();
        sent(&mut sightings, 1);
        assert!(sightings.arrived(&end(1), [0; 16], end(3)));
        assert_eq!(sightings.of(&end(1), &end(2)), Sighting::Elsewhere { at: end(3) });
        assert_eq!(sightings.links().collect::<Vec<_>>(), [(&end(1), &end(3))]);
        sightings.forget(|from| *from == end(1));
        assert_eq!(sightings.of(&end(1), &end(2)), Sighting::NotSeen);
    }

    proptest! {
        #[test]
        fn a_link_is_seen_if_and_only_if_one_of_its_last_three_probes_arrived(
            arrivals in prop::collection::vec(any::<bool>(), 0..40)
        ) {
            let mut sightings = Sightings::default();
            for (n, arrives) in arrivals.iter().enumerate() {
                let token = [u8::try_from(n).unwrap(); 16];
                sightings.sent(end(1), token);
                if *arrives {
                    prop_assert!(sightings.arrived(&end(1), token, end(2)));
                }
            }
            let recent = arrivals.iter().rev().take(3).any(|arrived| *arrived);
            let ever = arrivals.contains(&true);
            let found = sightings.of(&end(1), &end(2));
            let wanted = match (ever, recent || arrivals.len() < 3) {
                (false, _) => Sighting::NotSeen,
                (true, true) => Sighting::Seen,
                (true, false) => Sighting::Lost,
            };
            prop_assert_eq!(found, wanted);
        }
    }
}
