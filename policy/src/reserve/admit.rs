//! Several evacuations on one link: who gets how much of it.
//!
//! The controller asks for each link on which more than one reservation lies. Three rounds, each by
//! urgency, most urgent first, ties by id, until the link less the floor of everybody else is given
//! away:
//!
//! 1. the least that keeps each of them alive ([`LEAST_SHARE`]), so that nobody's connection dies;
//! 2. up to what each one's urgency entitles it to: here the more urgent takes from the less
//!    urgent;
//! 3. up to what each one wants: more than entitled only while nobody else needs it.

use std::cmp::Reverse;

use lifeboat_protocol::ids::EvacuationId;
use lifeboat_protocol::terms::Urgency;
use lifeboat_protocol::units::BitsPerSec;

use super::{Floor, LEAST_SHARE, entitled};

/// What an evacuation asks of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Whose it is.
    pub evacuation: EvacuationId,
    /// Its urgency.
    pub urgency: Urgency,
    /// What it could use, bit/s.
    pub wanted: BitsPerSec,
}

/// What an evacuation gets of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Whose it is.
    pub evacuation: EvacuationId,
    /// Its rate, bit/s; never more than it wanted.
    pub rate: BitsPerSec,
}

/// Divides a link of `capacity`; one grant for each claim, in the order of the claims. Their sum is
/// at most `capacity` less the floor.
#[must_use]
pub fn admit(capacity: BitsPerSec, floor: Floor, claims: &[Claim]) -> Vec<Grant> {
    let mut room = capacity - floor.of(capacity);
    let mut rates = vec![BitsPerSec::ZERO; claims.len()];
    let mut by_urgency: Vec<usize> = (0..claims.len()).collect();
    by_urgency.sort_by_key(|index| {
        let claim = &claims[*index];
        (Reverse(claim.urgency), &claim.evacuation)
    });
    let least = |_: &Claim| capacity.scale(LEAST_SHARE);
    let entitled = |claim: &Claim| entitled(capacity, claim.urgency);
    let wanted = |claim: &Claim| claim.wanted;
    let rounds: [&dyn Fn(&Claim) -> BitsPerSec; 3] = [&least, &entitled, &wanted];
    for up_to in rounds {
        for index in &by_urgency {
            let claim = &claims[*index];
            let more = (up_to(claim).min(claim.wanted) - rates[*index]).min(room);
            rates[*index] += more;
            room = room - more;
        }
    }
    let grant =
        |(claim, rate): (&Claim, BitsPerSec)| Grant { evacuation: claim.evacuation.clone(), rate };
    claims.iter().zip(rates).map(grant).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mbit(rate: u64) -> BitsPerSec {
        BitsPerSec::from_mbit(rate)
    }

    fn claim(id: &str, urgency: u32, wanted: BitsPerSec) -> Claim {
        let evacuation = EvacuationId::new(id).unwrap();
        Claim { evacuation, urgency: Urgency::new(urgency).unwrap(), wanted }
    }

    fn rates(claims: &[Claim]) -> Vec<u64> {
        let grants = admit(mbit(100), Floor::default(), claims);
        grants.into_iter().map(|grant| grant.rate.0 / 1_000_000).collect()
    }

    #[test]
    fn the_more_urgent_takes_from_the_less_urgent_down_to_its_least() {
        let both = [claim("a", 30, mbit(95)), claim("b", 90, mbit(95))];
        assert_eq!(rates(&both), [5, 90]);
        let three = [claim("a", 90, mbit(95)), claim("b", 90, mbit(95)), claim("c", 0, mbit(95))];
        assert_eq!(rates(&three), [90, 4, 1]);
    }

    #[test]
    fn more_than_entitled_is_given_while_nobody_needs_it() {
        assert_eq!(rates(&[claim("a", 30, mbit(95))]), [95]);
        assert_eq!(rates(&[claim("a", 30, mbit(95)), claim("b", 50, mbit(10))]), [85, 10]);
        assert_eq!(rates(&[]), [] as [u64; 0]);
    }

    fn any_claims() -> impl Strategy<Value = Vec<Claim>> {
        let one = (0u32..=100, prop_oneof![Just(u64::MAX), 0u64..2_000_000_000]);
        prop::collection::vec(one, 0..8).prop_map(|all| {
            let one = |(i, (urgency, wanted)): (usize, (u32, u64))| {
                claim(&format!("e{i}"), urgency, BitsPerSec(wanted))
            };
            all.into_iter().enumerate().map(one).collect()
        })
    }

    proptest! {
        #[test]
        fn the_sum_leaves_the_floor_and_nobody_gets_more_than_wanted(
            claims in any_claims(), capacity in 0u64..10_000_000_000,
        ) {
            let (capacity, floor) = (BitsPerSec(capacity), Floor::default());
            let grants = admit(capacity, floor, &claims);
            let sum: BitsPerSec = grants.iter().map(|grant| grant.rate).sum();
            prop_assert!(sum + floor.of(capacity) <= capacity);
            for (claim, grant) in claims.iter().zip(&grants) {
                prop_assert_eq!(&claim.evacuation, &grant.evacuation);
                prop_assert!(grant.rate <= claim.wanted);
            }
            let unmet = claims.iter().zip(&grants).any(|(claim, grant)| grant.rate < claim.wanted);
            let room = capacity - floor.of(capacity) - sum;
            prop_assert!(!unmet || room == BitsPerSec::ZERO, "room is left although somebody wants it");
        }

        #[test]
        fn who_wants_the_same_and_is_more_urgent_never_gets_less(claims in any_claims()) {
            let greedy: Vec<Claim> =
                claims.into_iter().map(|claim| Claim { wanted: mbit(1000), ..claim }).collect();
            let grants = admit(mbit(1000), Floor::default(), &greedy);
            for (a, grant_a) in greedy.iter().zip(&grants) {
                for (b, grant_b) in greedy.iter().zip(&grants) {
                    prop_assert!(a.urgency <= b.urgency || grant_a.rate >= grant_b.rate);
                }
            }
        }
    }
}
