//! How much of a link a migration has reserved: SOLive's Algorithm 1, and who gets what where
//! several meet.
//!
//! The controller calls [`adapt`] once a second for each evacuation, which takes the [`next`] step of
//! each link, then [`admit`] for each link, and sets the queues. The rate that comes out is one of the two that `pace` takes the
//! smaller of. Not here: queues, ports and the seconds in between.
//!
//! Algorithm 1 (SOLive V-A), in shares of the link, with `available` = what nobody uses:
//!
//! ```text
//! begin                                               -> max(available, urgency)  lines 2-4
//! available > threshold                               -> reserved + available     9-10  raise
//! reserved - migration < 1 % and urgency > reserved   -> urgency                  11-12 to urgency
//! reserved - migration > threshold                    -> migration                13-14 give back
//! others fill what they are left, reserved > urgency  -> urgency                        yield
//! otherwise                                           -> reserved                       keep
//! ```
//!
//! Three corrections of ours. Line 10 as printed passes 100 % when it is repeated (75 % reserved and
//! idle, 60 % available: 135 %), and no queue can have such a rate: whatever comes out is clamped
//! to the *ceiling*, which is what admission grants and never touches the floor of everybody else.
//! And line 14 as printed gives an idle migration's reservation away to 0, where line 12 finds it
//! "fully used" a second later and raises it again, up and down each second: a reservation keeps at
//! least [`LEAST_SHARE`], so that only a migration that really sends asks for more. And as printed
//! nothing that lines 9-10 have raised beyond the urgency ever comes back while the migration uses
//! it, so that each second in which an application pauses costs it a part of its share for good:
//! where the others fill what they are left on a full link, a reservation beyond its urgency
//! [yields](Step::Yielded) to it. That costs a borrowing migration nothing while nobody else needs
//! the link. A strict one would lose by it what no application wants, and stays as printed.

mod adapt;
mod admit;

pub use adapt::{Held, Rules, Terms, adapt, begin};
pub use admit::{Claim, Grant, admit};

use lifeboat_protocol::terms::{ReservationKind, Urgency};
use lifeboat_protocol::units::BitsPerSec;
use serde::{Deserialize, Serialize};

/// The share of its link that a reservation keeps in any case, so that a migration can begin to
/// send.
pub const LEAST_SHARE: f64 = 0.01;

/// "All that is reserved is used": less than this share of the link is left (SOLive, line 11).
pub const ALL_USED: f64 = 0.01;

/// What everybody else keeps of a link, whatever the urgency.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// As a share of the link.
    pub share: f64,
    /// At least so much, bit/s; but never more than half of the link.
    pub at_least: BitsPerSec,
}

impl Default for Floor {
    /// 5 % of the link, at least 2 Mbit/s: enough for control traffic and heartbeats on a slow
    /// link.
    fn default() -> Self {
        Self { share: 0.05, at_least: BitsPerSec(2_000_000) }
    }
}

impl Floor {
    /// What the floor is on a link of `capacity`, bit/s.
    #[must_use]
    pub fn of(self, capacity: BitsPerSec) -> BitsPerSec {
        capacity.scale(self.share.clamp(0.0, 1.0)).max(self.at_least).min(capacity.scale(0.5))
    }
}

/// What does not change from second to second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReserveParameters {
    /// What the link carries in this direction, bit/s.
    pub capacity: BitsPerSec,
    /// The share that the evacuation is entitled to.
    pub urgency: Urgency,
    /// The administrator's threshold, as a share of the link (SOLive gives no figure; 0.1 is our
    /// default).
    pub threshold: f64,
    /// The most that this evacuation may have here, bit/s: capacity less the floor, or what
    /// [`admit`] left it.
    pub ceiling: BitsPerSec,
    /// Whether more than what is reserved can be had while nobody else needs it.
    pub kind: ReservationKind,
}

impl ReserveParameters {
    /// For an evacuation that has the link to itself.
    #[must_use]
    pub fn alone(capacity: BitsPerSec, urgency: Urgency, floor: Floor) -> Self {
        let ceiling = capacity - floor.of(capacity);
        Self { capacity, urgency, threshold: 0.1, ceiling, kind: ReservationKind::Borrow }
    }

    /// What the urgency stands for on this link, bit/s.
    #[must_use]
    pub fn entitled(&self) -> BitsPerSec {
        entitled(self.capacity, self.urgency)
    }

    fn available(&self, used: BitsPerSec) -> BitsPerSec {
        self.capacity - used
    }

    /// Whether the others fill what they are left beside a reservation beyond its urgency.
    fn squeezes(&self, reserved: BitsPerSec, readings: Readings) -> bool {
        let full = self.available(readings.used) <= self.capacity.scale(self.threshold / 2.0);
        let left = self.capacity - reserved - self.capacity.scale(ALL_USED);
        let others = readings.used - readings.migration;
        let borrows = self.kind == ReservationKind::Borrow;
        borrows && full && reserved > self.entitled() && others >= left
    }

    /// Between the least that a reservation keeps and the ceiling; the ceiling wins.
    fn clamp(&self, rate: BitsPerSec) -> BitsPerSec {
        rate.max(self.capacity.scale(LEAST_SHARE)).min(self.ceiling).min(self.capacity)
    }
}

/// What `urgency` stands for on a link of `capacity`, bit/s, exactly.
#[must_use]
pub fn entitled(capacity: BitsPerSec, urgency: Urgency) -> BitsPerSec {
    let hundredfold = u128::from(capacity.0) * u128::from(urgency.percent());
    BitsPerSec(u64::try_from(hundredfold / 100).unwrap_or(u64::MAX))
}

/// What the counters said of the last second, bit/s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readings {
    /// Everything that passed, the migration included.
    pub used: BitsPerSec,
    /// What of it was the migration.
    pub migration: BitsPerSec,
}

/// Which line of the algorithm was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Lines 9-10.
    Raised,
    /// Lines 11-12.
    RaisedToUrgency,
    /// Lines 13-14.
    GaveBack,
    /// Back to the urgency, because others fill the link.
    Yielded,
    /// None of them.
    Kept,
}

/// The reservation to begin with, bit/s, while `used` passes without the migration (lines 2-4).
#[must_use]
pub fn initial(parameters: &ReserveParameters, used: BitsPerSec) -> BitsPerSec {
    parameters.clamp(parameters.available(used).max(parameters.entitled()))
}

/// The reservation for the next second, bit/s, and the branch that led to it (lines 6-17).
#[must_use]
pub fn next(
    parameters: &ReserveParameters,
    reserved: BitsPerSec,
    readings: Readings,
) -> (BitsPerSec, Step) {
    let available = parameters.available(readings.used);
    let threshold = parameters.capacity.scale(parameters.threshold);
    let unused = reserved - readings.migration;
    let (rate, step) = if available > threshold {
        (reserved + available, Step::Raised)
    } else if unused < parameters.capacity.scale(ALL_USED) && parameters.entitled() > reserved {
        (parameters.entitled(), Step::RaisedToUrgency)
    } else if unused > threshold {
        (readings.migration, Step::GaveBack)
    } else if parameters.squeezes(reserved, readings) {
        (parameters.entitled().min(reserved), Step::Yielded)
    } else {
        (reserved, Step::Kept)
    };
    (parameters.clamp(rate), step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mbit(rate: u64) -> BitsPerSec {
        BitsPerSec::from_mbit(rate)
    }

    fn at(urgency: u32) -> ReserveParameters {
        let urgency = Urgency::new(urgency).unwrap();
        ReserveParameters::alone(mbit(100), urgency, Floor::default())
    }

    #[test]
    fn it_begins_with_the_larger_of_available_and_urgency_below_the_floor_of_others() {
        assert_eq!(initial(&at(75), mbit(90)), mbit(75));
        assert_eq!(initial(&at(30), mbit(40)), mbit(60));
        assert_eq!(initial(&at(100), mbit(0)), mbit(95));
        assert_eq!(initial(&at(0), mbit(100)), mbit(1));
    }

    #[test]
    fn each_branch_of_algorithm_1_does_as_printed_but_for_the_corrections() {
        // urgency, reserved, used, migration -> next, branch; a link of 100 Mbit/s, threshold 10.
        let table = [
            (75, 40, 80, 30, 60, Step::Raised),
            (75, 80, 60, 20, 95, Step::Raised), // printed: 120
            (75, 40, 95, 40, 75, Step::RaisedToUrgency),
            (75, 40, 95, 39, 40, Step::Kept), // exactly 1 % unused is not "less than"
            (30, 40, 95, 40, 40, Step::Kept),
            (30, 60, 99, 60, 30, Step::Yielded), // printed: 60, however long others wait
            (30, 60, 95, 45, 45, Step::GaveBack),
            (30, 60, 90, 50, 60, Step::Kept), // available and unused equal the threshold
            (75, 60, 95, 0, 1, Step::GaveBack), // printed: 0
            (75, 1, 95, 0, 1, Step::Kept),    // printed: 75, and 0 again a second later
            (75, 1, 95, 1, 75, Step::RaisedToUrgency),
        ];
        for (urgency, reserved, used, migration, wanted, step) in table {
            let readings = Readings { used: mbit(used), migration: mbit(migration) };
            let result = next(&at(urgency), mbit(reserved), readings);
            assert_eq!(result, (mbit(wanted), step), "{reserved} reserved, {readings:?}");
        }
    }

    /// A link of 100 Mbit/s under an application that floods it: the migration gets its queue, the
    /// application the rest. `wants` is what the migration could send in each second.
    fn beside_a_flood(urgency: u32, wants: &[u64]) -> Vec<u64> {
        let parameters = at(urgency);
        let mut reserved = initial(&parameters, mbit(100));
        let second = |wanted: &u64| {
            let migration = mbit(*wanted).min(reserved);
            reserved = next(&parameters, reserved, Readings { used: mbit(100), migration }).0;
            reserved.0 / 1_000_000
        };
        wants.iter().map(second).collect()
    }

    #[test]
    fn beside_a_flood_a_migration_keeps_its_urgency_lends_it_while_idle_and_has_it_back_at_once() {
        assert_eq!(beside_a_flood(75, &[200; 5]), [75; 5]);
        assert_eq!(beside_a_flood(75, &[200, 0, 0, 200, 200]), [75, 1, 1, 75, 75]);
        // A steady demand below the urgency is probed every other second, as printed: the queue
        // lends what is reserved and unused, so nobody loses by it.
        assert_eq!(beside_a_flood(30, &[12; 4]), [12, 30, 12, 30]);
    }

    #[test]
    fn a_ceiling_from_admission_wins_over_urgency() {
        let narrow = ReserveParameters { ceiling: mbit(20), ..at(75) };
        assert_eq!(initial(&narrow, mbit(50)), mbit(20));
        let readings = Readings { used: mbit(95), migration: mbit(20) };
        assert_eq!(next(&narrow, mbit(20), readings).0, mbit(20));
    }

    #[test]
    fn the_floor_is_a_share_with_a_minimum_and_never_more_than_half() {
        assert_eq!(Floor::default().of(mbit(1000)), mbit(50));
        assert_eq!(Floor::default().of(mbit(10)), mbit(2));
        assert_eq!(Floor::default().of(mbit(2)), mbit(1));
    }

    proptest! {
        #[test]
        fn whatever_the_counters_say_the_floor_of_others_is_kept(
            capacity in 1u64..1_000_000_000_000,
            urgency in 0u32..=100,
            readings in prop::collection::vec((any::<u64>(), any::<u64>()), 1..40),
        ) {
            let (capacity, floor) = (BitsPerSec(capacity), Floor::default());
            let parameters = ReserveParameters::alone(capacity, Urgency::new(urgency).unwrap(), floor);
            let mut reserved = initial(&parameters, BitsPerSec(readings[0].0));
            for (used, migration) in readings {
                let readings = Readings { used: BitsPerSec(used), migration: BitsPerSec(migration) };
                let (following, step) = next(&parameters, reserved, readings);
                prop_assert!(following + floor.of(capacity) <= capacity);
                prop_assert!(following >= capacity.scale(LEAST_SHARE).min(parameters.ceiling));
                match step {
                    Step::Raised | Step::RaisedToUrgency => prop_assert!(following >= reserved),
                    Step::GaveBack | Step::Yielded => prop_assert!(following <= reserved),
                    Step::Kept => prop_assert_eq!(following, reserved),
                }
                reserved = following;
            }
        }

        #[test]
        fn beside_others_that_fill_the_link_a_migration_that_uses_all_it_has_gets_its_urgency(
            urgency in 1u32..=95, reserved in 1u64..=95,
        ) {
            let parameters = at(urgency);
            let readings = Readings { used: mbit(100), migration: mbit(reserved) };
            let (following, _) = next(&parameters, mbit(reserved), readings);
            prop_assert_eq!(following, mbit(urgency.into()));
        }
    }
}
