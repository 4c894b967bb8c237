//! How full a link is, smoothed and with a memory: known or unknown, calm or a hot spot; and, apart
//! from it, MigrateFS' saturation ratio.
//!
//! The controller observes each link once a second with its own clock (what a queue says of its own
//! age is not to be believed) and tells operators, planner and brokers what comes out. Not here:
//! counters, ports, and what anybody does about a hot spot.
//!
//! ```text
//!              first sample                   smoothed >= enter
//!   Unknown ──────────────────▶ Calm ◀═══════════════════════════▶ HotSpot
//!      ▲                         │         smoothed <= leave          │
//!      └──── no sample for `stale_after` ─────────────────────────────┘
//! ```
//!
//! **Unknown is not idle.** A link that has not been heard of has no figure at all, and whoever
//! reads it has to say what that means: a planner counts it as it was configured, a table shows a
//! question mark, an alarm stays silent. What was known before the silence does not come back with
//! the next sample: it begins afresh.
//!
//! Two measures of different things are kept apart. [`Saturation`] is how full a link is with
//! everything that passes (SOLive V-A speaks of used and available bandwidth). [`ratio`] is what
//! MigrateFS (section 5.1) computes for a switch, `S_r = B_a / B_m`: what its migrations consume of
//! the budget that was configured for migrations there. A switch may be full and its ratio small, or
//! the other way round.

use std::time::Duration;

use lifeboat_protocol::units::BitsPerSec;
use serde::{Deserialize, Serialize};

/// When a link counts as a hot spot, and how fast that changes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SaturationParameters {
    /// A link becomes a hot spot at this share of its capacity.
    pub enter: f64,
    /// It stays one until it has fallen to this share; never above `enter`.
    pub leave: f64,
    /// Time constant of the smoothing: after this long a step is followed to 63 %.
    pub smoothing: Duration,
    /// Without a sample for this long a link is unknown.
    pub stale_after: Duration,
}

impl Default for SaturationParameters {
    /// Hot from 90 % to 75 %, followed within about two seconds, unknown after four without a
    /// word (samples come each second).
    fn default() -> Self {
        Self {
            enter: 0.9,
            leave: 0.75,
            smoothing: Duration::from_secs(2),
            stale_after: Duration::from_secs(4),
        }
    }
}

/// How full a link is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum Saturation {
    /// Nobody has said for too long, or ever.
    Unknown,
    /// Below the thresholds.
    Calm {
        /// Smoothed share of the capacity that is used; 1 is full.
        share: f64,
    },
    /// Full enough that whatever is added is felt.
    HotSpot {
        /// Smoothed share of the capacity that is used; 1 is full.
        share: f64,
    },
}

impl Saturation {
    /// The smoothed share; `None` while it is not known.
    #[must_use]
    pub const fn share(self) -> Option<f64> {
        match self {
            Self::Unknown => None,
            Self::Calm { share } | Self::HotSpot { share } => Some(share),
        }
    }

    /// Whether it is known to be a hot spot.
    #[must_use]
    pub const fn is_hot(self) -> bool {
        matches!(self, Self::HotSpot { .. })
    }
}

/// What is remembered of one direction of a link.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Gauge {
    seen: Option<Seen>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Seen {
    at: Duration,
    share: f64,
    hot: bool,
}

impl Gauge {
    /// Takes what passed along a link of `capacity` up to `now` (time since any fixed moment).
    /// A capacity of zero says nothing, and a moment before the last one is taken for the last.
    pub fn observe(
        &mut self,
        parameters: &SaturationParameters,
        now: Duration,
        used: BitsPerSec,
        capacity: BitsPerSec,
    ) {
        if capacity == BitsPerSec::ZERO {
            return;
        }
        let sample = used.0 as f64 / capacity.0 as f64;
        let before = self.seen.filter(|seen| !is_stale(parameters, seen.at, now));
        let (at, share) = match before {
            None => (now, sample),
            Some(seen) => {
                let weight = weight(now.saturating_sub(seen.at), parameters.smoothing);
                (now.max(seen.at), seen.share + (sample - seen.share) * weight)
            }
        };
        let was_hot = before.is_some_and(|seen| seen.hot);
        let leave = parameters.leave.min(parameters.enter);
        let hot = if was_hot { share > leave } else { share >= parameters.enter };
        self.seen = Some(Seen { at, share, hot });
    }

    /// What is known at `now`.
    #[must_use]
    pub fn read(&self, parameters: &SaturationParameters, now: Duration) -> Saturation {
        match self.seen.filter(|seen| !is_stale(parameters, seen.at, now)) {
            None => Saturation::Unknown,
            Some(Seen { share, hot: true, .. }) => Saturation::HotSpot { share },
            Some(Seen { share, .. }) => Saturation::Calm { share },
        }
    }
}

fn is_stale(parameters: &SaturationParameters, at: Duration, now: Duration) -> bool {
    now.saturating_sub(at) > parameters.stale_after
}

/// How much of a new sample counts after `elapsed`: all of it without smoothing, none without time.
fn weight(elapsed: Duration, smoothing: Duration) -> f64 {
    if smoothing.is_zero() {
        return 1.0;
    }
    1.0 - (-elapsed.as_secs_f64() / smoothing.as_secs_f64()).exp()
}

/// A switch is as full as its fullest link. It is a hot spot as soon as one link is; but calm only
/// when every link is known to be.
#[must_use]
pub fn of_switch(links: impl IntoIterator<Item = Saturation>) -> Saturation {
    let (mut fullest, mut unknown) = (Saturation::Unknown, false);
    for link in links {
        unknown |= link == Saturation::Unknown;
        let rank = |s: Saturation| (s.is_hot(), s.share().unwrap_or(-1.0));
        if rank(link) > rank(fullest) {
            fullest = link;
        }
    }
    if unknown && !fullest.is_hot() { Saturation::Unknown } else { fullest }
}

/// MigrateFS' saturation ratio of a switch (section 5.1): what its migrations consume there,
/// divided by the bandwidth that it has for migrations. Above 1 they consume more than they should.
/// `None` without a budget.
#[must_use]
pub fn ratio(migrations: BitsPerSec, budget: BitsPerSec) -> Option<f64> {
    (budget > BitsPerSec::ZERO).then(|| migrations.0 as f64 / budget.0 as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FULL: BitsPerSec = BitsPerSec(100_000_000);

    fn parameters() -> SaturationParameters {
        SaturationParameters { smoothing: Duration::ZERO, ..SaturationParameters::default() }
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn after(samples: &[u64]) -> Saturation {
        let mut gauge = Gauge::default();
        for (second, mbit) in (1..).zip(samples) {
            let used = BitsPerSec::from_mbit(*mbit);
            gauge.observe(&parameters(), seconds(second), used, FULL);
        }
        gauge.read(&parameters(), seconds(samples.len() as u64))
    }

    #[test]
    fn a_hot_spot_is_entered_high_and_left_low() {
        assert_eq!(after(&[]), Saturation::Unknown);
        assert_eq!(after(&[0]), Saturation::Calm { share: 0.0 });
        assert!(!after(&[89]).is_hot());
        assert!(after(&[90]).is_hot());
        assert!(after(&[90, 80, 76]).is_hot());
        assert!(!after(&[90, 80, 75]).is_hot());
        assert!(!after(&[90, 75, 89]).is_hot());
    }

    #[test]
    fn silence_is_unknown_and_what_was_known_does_not_come_back() {
        let mut gauge = Gauge::default();
        let parameters = SaturationParameters::default();
        gauge.observe(&parameters, seconds(1), FULL, FULL);
        assert!(gauge.read(&parameters, seconds(5)).is_hot());
        assert_eq!(gauge.read(&parameters, seconds(6)), Saturation::Unknown);
        gauge.observe(&parameters, seconds(6), BitsPerSec::from_mbit(80), FULL);
        assert_eq!(gauge.read(&parameters, seconds(6)), Saturation::Calm { share: 0.8 });
    }

    #[test]
    fn a_short_burst_is_no_hot_spot_and_a_long_one_is() {
        let parameters = SaturationParameters::default();
        let mut gauge = Gauge::default();
        gauge.observe(&parameters, seconds(0), BitsPerSec::ZERO, FULL);
        let mut first_hot = None;
        for second in 1..20 {
            gauge.observe(&parameters, seconds(second), FULL, FULL);
            if gauge.read(&parameters, seconds(second)).is_hot() {
                first_hot.get_or_insert(second);
            }
        }
        // 1 - e^(-t/2 s) passes 90 % after 4.6 s.
        assert_eq!(first_hot, Some(5));
    }

    #[test]
    fn a_switch_is_calm_only_when_all_of_it_is_known() {
        let (calm, hot) = (Saturation::Calm { share: 0.4 }, Saturation::HotSpot { share: 0.9 });
        assert_eq!(of_switch([calm, Saturation::Calm { share: 0.2 }]), calm);
        assert_eq!(of_switch([calm, hot]), hot);
        assert_eq!(of_switch([Saturation::Unknown, hot]), hot);
        assert_eq!(of_switch([Saturation::Unknown, calm]), Saturation::Unknown);
        assert_eq!(of_switch([]), Saturation::Unknown);
        // A link that has cooled down to 0.8 is fuller than a hot one at 0.76, and not the news.
        let cooling = Saturation::Calm { share: 0.8 };
        let hot = Saturation::HotSpot { share: 0.76 };
        assert_eq!(of_switch([cooling, hot]), hot);
    }

    #[test]
    fn the_ratio_of_migrate_fs_is_of_the_budget_and_not_of_the_link() {
        // Section 5.1: each switch has 1.6 Gbit/s for migrations.
        let budget = BitsPerSec::from_mbit(1600);
        assert_eq!(ratio(BitsPerSec::from_mbit(400), budget), Some(0.25));
        assert_eq!(ratio(BitsPerSec::from_mbit(2000), budget), Some(1.25));
        assert_eq!(ratio(BitsPerSec::from_mbit(1), BitsPerSec::ZERO), None);
    }

    proptest! {
        #[test]
        fn the_share_stays_between_the_samples_and_hysteresis_holds(
            samples in prop::collection::vec((0u64..3_000, 0u64..300_000_000), 1..60),
            smoothing in 0u64..5_000,
        ) {
            let smoothing = Duration::from_millis(smoothing);
            let parameters = SaturationParameters { smoothing, ..SaturationParameters::default() };
            let (mut gauge, mut now) = (Gauge::default(), Duration::ZERO);
            let (mut low, mut high) = (f64::MAX, f64::MIN);
            let mut was = Saturation::Unknown;
            for (pause, used) in samples {
                now += Duration::from_millis(pause);
                gauge.observe(&parameters, now, BitsPerSec(used), FULL);
                let sample = used as f64 / FULL.0 as f64;
                (low, high) = (low.min(sample), high.max(sample));
                let is = gauge.read(&parameters, now);
                let share = is.share().unwrap();
                prop_assert!(share >= low - 1e-9 && share <= high + 1e-9);
                if was.is_hot() != is.is_hot() {
                    let crossed = if is.is_hot() { share >= 0.9 } else { share <= 0.75 };
                    prop_assert!(crossed, "{was:?} -> {is:?}");
                }
                was = is;
            }
            prop_assert_eq!(gauge.read(&parameters, now + seconds(5)), Saturation::Unknown);
        }

        #[test]
        fn no_figure_of_a_counter_or_clock_makes_nonsense(
            samples in prop::collection::vec((any::<u32>(), any::<u64>(), any::<u64>()), 0..30),
        ) {
            let (parameters, mut gauge) = (SaturationParameters::default(), Gauge::default());
            for (at, used, capacity) in samples {
                let now = Duration::from_millis(at.into());
                gauge.observe(&parameters, now, BitsPerSec(used), BitsPerSec(capacity));
                let share = gauge.read(&parameters, now).share();
                prop_assert!(share.is_none_or(|share| share.is_finite() && share >= 0.0));
            }
        }
    }
}
