//! Algorithm 1 for a whole path, second by second.
//!
//! SOLive runs the algorithm on the source's outgoing link and "tries to reserve the same bandwidth
//! on the source and on the destination, if possible" (V-A-b). Here every port of the way runs it
//! with its own figures, and then no port keeps more than the narrowest other port of the ways over
//! it lets through: what cannot arrive need not be kept free. So the same is reserved along a way
//! wherever it is feasible, and the port where it is not decides.
//!
//! The controller asks once a second for each evacuation, then [`super::admit`] divides each port
//! among evacuations. Not here: queues, counters, and the second itself.

use std::collections::BTreeMap;

use lifeboat_protocol::terms::{ReservationKind, Urgency};
use lifeboat_protocol::units::BitsPerSec;

use super::{Floor, LEAST_SHARE, Readings, ReserveParameters, Step, initial, next};

/// A port on which an evacuation holds a reservation, as the counters have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// What the link carries, bit/s.
    pub capacity: BitsPerSec,
    /// What is guaranteed to the evacuation now, bit/s.
    pub reserved: BitsPerSec,
    /// What passed in the last second; `None` while that is not known.
    pub readings: Option<Readings>,
}

/// What the administrator has set for all links.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rules {
    /// SOLive's threshold, as a share of the link.
    pub threshold: f64,
    /// What everybody else keeps.
    pub floor: Floor,
}

/// What an evacuation asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// The share of each link that it is entitled to.
    pub urgency: Urgency,
    /// Whether more than what is reserved can be had while nobody else needs it.
    pub kind: ReservationKind,
}

impl Rules {
    fn parameters(&self, capacity: BitsPerSec, terms: Terms) -> ReserveParameters {
        let alone = ReserveParameters::alone(capacity, terms.urgency, self.floor);
        ReserveParameters { threshold: self.threshold, kind: terms.kind, ..alone }
    }
}

/// What to begin with on a port of `capacity` (lines 2-4). While nobody knows what passes there,
/// nothing counts as available: the urgency decides.
#[must_use]
pub fn begin(
    rules: &Rules,
    terms: Terms,
    capacity: BitsPerSec,
    used: Option<BitsPerSec>,
) -> BitsPerSec {
    initial(&rules.parameters(capacity, terms), used.unwrap_or(capacity))
}

/// The rates for the next second of an evacuation's ports (named by `P`), whose migrations take
/// `ways`. A port whose readings are not known keeps what it has. Only ports whose rate changes are
/// in the answer, with the branch of the algorithm that led there.
#[must_use]
pub fn adapt<P: Ord + Clone>(
    rules: &Rules,
    terms: Terms,
    ports: &BTreeMap<P, Held>,
    ways: &[Vec<P>],
) -> BTreeMap<P, (BitsPerSec, Step)> {
    let stepped: BTreeMap<&P, (BitsPerSec, Step)> = ports
        .iter()
        .map(|(port, held)| {
            let parameters = rules.parameters(held.capacity, terms);
            let kept = (held.reserved, Step::Kept);
            (port, held.readings.map_or(kept, |read| next(&parameters, held.reserved, read)))
        })
        .collect();
    let mut changed = BTreeMap::new();
    for (port, held) in ports {
        let (rate, step) = stepped[port];
        let most = useful(port, &stepped, ways).unwrap_or(rate);
        let least = held.capacity.scale(LEAST_SHARE).min(rate);
        let wanted = rate.min(most).max(least);
        if wanted != held.reserved {
            let step = if wanted < held.reserved { Step::GaveBack } else { step };
            changed.insert(port.clone(), (wanted, step));
        }
    }
    changed
}

/// What can pass a port at most, by the other ports of the ways over it; `None` where no other port
/// limits it.
fn useful<P: Ord>(
    port: &P,
    rates: &BTreeMap<&P, (BitsPerSec, Step)>,
    ways: &[Vec<P>],
) -> Option<BitsPerSec> {
    let over = ways.iter().filter(|way| way.contains(port));
    let narrowest = over.map(|way| {
        let others = way.iter().filter(|other| *other != port);
        others.filter_map(|other| rates.get(other)).map(|(rate, _)| *rate).min()
    });
    let mut sum = None;
    for limit in narrowest {
        sum = Some(sum.unwrap_or(BitsPerSec::ZERO) + limit?);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mbit(rate: u64) -> BitsPerSec {
        BitsPerSec::from_mbit(rate)
    }

    fn rules() -> Rules {
        Rules { threshold: 0.05, floor: Floor::default() }
    }

    fn urgency(percent: u32) -> Terms {
        Terms { urgency: Urgency::new(percent).unwrap(), kind: ReservationKind::Borrow }
    }

    fn held(reserved: u64, used: u64, migration: u64) -> Held {
        let readings = Some(Readings { used: mbit(used), migration: mbit(migration) });
        Held { capacity: mbit(100), reserved: mbit(reserved), readings }
    }

    fn wanted(
        ports: &[(&'static str, Held)],
        ways: &[&[&'static str]],
    ) -> Vec<(&'static str, u64)> {
        let ports: BTreeMap<&str, Held> = ports.iter().copied().collect();
        let ways: Vec<Vec<&str>> = ways.iter().map(|way| way.to_vec()).collect();
        let changed = adapt(&rules(), urgency(50), &ports, &ways);
        changed.into_iter().map(|(port, (rate, _))| (port, rate.0 / 1_000_000)).collect()
    }

    #[test]
    fn it_begins_with_what_is_available_and_with_the_urgency_while_that_is_unknown() {
        assert_eq!(begin(&rules(), urgency(50), mbit(100), Some(mbit(20))), mbit(80));
        assert_eq!(begin(&rules(), urgency(50), mbit(100), Some(mbit(90))), mbit(50));
        assert_eq!(begin(&rules(), urgency(50), mbit(100), None), mbit(50));
    }

    #[test]
    fn no_port_keeps_what_another_of_its_way_cannot_let_through() {
        // The destination's link is full of an application: 30 there, so 30 at the source.
        let way: &[&str] = &["source", "destination"];
        let ports = [("source", held(50, 40, 30)), ("destination", held(30, 100, 28))];
        assert_eq!(wanted(&ports, &[way]), [("source", 30)]);
        // Both idle links are raised together.
        let ports = [("source", held(50, 60, 50)), ("destination", held(50, 70, 50))];
        assert_eq!(wanted(&ports, &[way]), [("destination", 80), ("source", 80)]);
    }

    #[test]
    fn a_port_that_several_ways_share_is_let_what_they_need_together() {
        let ways: [&[&str]; 2] = [&["up", "left"], &["up", "right"]];
        let ports =
            [("up", held(50, 50, 50)), ("left", held(20, 97, 20)), ("right", held(25, 97, 25))];
        // left and right are raised to their urgency, and up may be as much as the two.
        assert_eq!(wanted(&ports, &ways), [("left", 50), ("right", 50), ("up", 95)]);
    }

    #[test]
    fn what_is_not_known_is_kept() {
        let unknown = Held { readings: None, ..held(40, 0, 0) };
        assert_eq!(wanted(&[("a", unknown)], &[&["a"]]), []);
    }

    proptest! {
        #[test]
        fn whatever_is_read_every_port_keeps_its_floor_and_lives(
            rates in prop::collection::vec((1u64..200, 0u64..200, 0u64..200, any::<bool>()), 1..6),
            percent in 0u32..=100,
        ) {
            let ports: BTreeMap<usize, Held> = rates
                .iter()
                .map(|(reserved, used, migration, known)| {
                    let held = held((*reserved).min(95), *used, *migration);
                    Held { readings: held.readings.filter(|_| *known), ..held }
                })
                .enumerate()
                .collect();
            let ways = vec![ports.keys().copied().collect()];
            for (port, (rate, _)) in adapt(&rules(), urgency(percent), &ports, &ways) {
                prop_assert!(rate <= mbit(95));
                prop_assert!(rate >= mbit(1));
                prop_assert_ne!(rate, ports[&port].reserved);
            }
        }
    }
}
