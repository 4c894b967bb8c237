//! `--by TIME` for disks: how fast a VM may write so that its disks arrive in time.
//!
//! `plan` asks before a migration, the broker again and again during it; both set what they get as
//! the disk limit. MigrateFS section 5, inequality (1):
//!
//! ```text
//!        Disk_size
//!   -------------------- + VMM_time <= finish_time
//!   Net_Rate - Dirty_Rate
//! ```
//!
//! Two things are made precise. *Dirty_Rate* counts whole blocks that have to be sent again, but a
//! limit holds back bytes that the guest writes: a 4 KiB write can make 512 KiB dirty, a rewrite of a
//! dirty block nothing. Their measured ratio is the [`Need::spread`]. And *finish_time* is what is left
//! of the window now, so that asking again corrects what was estimated wrongly.
//!
//! Deliberately not here: the network's rate (`reserve`), the memory's time (`predict`), and who yields
//! when several are late.

use std::time::Duration;

use lifeboat_protocol::units::{Bytes, BytesPerSec};

/// The slowest that a guest is ever held to. Below it, its own timeouts strike.
pub const SLOWEST: BytesPerSec = BytesPerSec(1_000_000);

/// What has to be done by when. All of it as of now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Need {
    /// Blocks still to be sent: those of the bulk pass and the dirty ones. Holes and zeroes left out.
    pub left: Bytes,
    /// What the disks may use of the network. With memory beside it, what is left of it.
    pub network: BytesPerSec,
    /// From the synchronous phase's begin to the guest running at the destination: the predicted time
    /// for memory at the reserved rate, plus the measured set-up ("VMM_time").
    pub vmm_time: Duration,
    /// Until the time that was asked for.
    pub window: Duration,
    /// Dirty bytes for each byte that the guest writes, measured; 1 where nothing is known.
    pub spread: f64,
}

/// What the guest does and what its owner was promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writes {
    /// What it writes when nobody holds it back; `None` when it was not measured.
    pub wanted: Option<BytesPerSec>,
    /// The disk rate that its owner was promised; zero for none.
    pub promised: BytesPerSec,
}

/// Whether a window can be kept, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is kept without a limit.
    Free,
    /// It is kept when the guest writes at most so fast.
    Limit(BytesPerSec),
    /// It and the promised disk rate cannot both be kept. The operator chooses between these.
    Conflict(Choices),
}

/// What would resolve a conflict; each alone does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choices {
    /// Holding the guest to this breaks the promise and keeps the window. `None`: not even a guest
    /// that writes at [`SLOWEST`] keeps it.
    pub limit: Option<BytesPerSec>,
    /// With this window the promise is kept; `None` when no window is long enough.
    pub window: Option<Duration>,
    /// With this network rate both are kept; `None` when memory alone takes longer than the window.
    pub network: Option<BytesPerSec>,
}

/// The limit that keeps the window, if there is one.
///
/// ```
/// # use std::time::Duration;
/// # use lifeboat_policy::disk::{Need, Verdict, Writes, verdict};
/// # use lifeboat_protocol::units::{Bytes, BytesPerSec};
/// // MigrateFS figure 4: 10 GB in 550 s, a guest that wants to write 20 MB/s.
/// let need = Need {
///     left: Bytes(10_000_000_000),
///     network: BytesPerSec(25_000_000),
///     vmm_time: Duration::from_secs(24),
///     window: Duration::from_secs(550),
///     spread: 1.0,
/// };
/// let writes = Writes { wanted: Some(BytesPerSec(20_000_000)), promised: BytesPerSec(0) };
/// assert_eq!(verdict(&need, writes), Verdict::Limit(BytesPerSec(5_988_593)));
/// ```
#[must_use]
pub fn verdict(need: &Need, writes: Writes) -> Verdict {
    let least = writes.promised.max(SLOWEST);
    let most = affordable(need);
    match (most, writes.wanted) {
        (Some(most), Some(wanted)) if wanted <= most => Verdict::Free,
        (Some(most), _) if most >= least => Verdict::Limit(most),
        _ => Verdict::Conflict(Choices {
            limit: most.filter(|most| *most >= SLOWEST),
            window: time_needed(need, least),
            network: network_needed(need, least),
        }),
    }
}

/// How long everything takes while the guest writes at `rate`: the inequality's left side. `None`
/// where blocks get dirty as fast as they are sent.
#[must_use]
pub fn time_needed(need: &Need, rate: BytesPerSec) -> Option<Duration> {
    if need.left == Bytes::ZERO {
        return Some(need.vmm_time);
    }
    let net = need.network - dirty_rate(need, rate);
    need.left.time_at(net)?.checked_add(need.vmm_time)
}

/// The fastest writing with which the window is kept; `None` when not even none keeps it.
fn affordable(need: &Need) -> Option<BytesPerSec> {
    let copying = need.window.checked_sub(need.vmm_time)?;
    if need.left == Bytes::ZERO {
        return Some(scaled(need.network, 1.0 / spread(need)));
    }
    let required = rate_over(need.left, copying)?;
    (required <= need.network).then(|| scaled(need.network - required, 1.0 / spread(need)))
}

/// The network rate that keeps window and `rate` both.
fn network_needed(need: &Need, rate: BytesPerSec) -> Option<BytesPerSec> {
    let copying = need.window.checked_sub(need.vmm_time)?;
    Some(rate_over(need.left, copying)? + dirty_rate(need, rate))
}

fn dirty_rate(need: &Need, rate: BytesPerSec) -> BytesPerSec {
    scaled(rate, spread(need))
}

/// Neither zero nor without bounds: a guest that only rewrites dirty blocks may stop doing so, and a
/// 4 KiB write makes at most 1 MiB dirty.
fn spread(need: &Need) -> f64 {
    if need.spread.is_finite() { need.spread.clamp(0.1, 256.0) } else { 1.0 }
}

fn scaled(rate: BytesPerSec, by: f64) -> BytesPerSec {
    rate.scale(by)
}

/// `bytes` within `time`, rounded up; `None` without time.
fn rate_over(bytes: Bytes, time: Duration) -> Option<BytesPerSec> {
    let nanos = u128::from(bytes.0).checked_mul(1_000_000_000)?;
    if time.is_zero() {
        return None;
    }
    u64::try_from(nanos.div_ceil(time.as_nanos())).ok().map(BytesPerSec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MB: u64 = 1_000_000;

    fn need(left_mb: u64, network_mb: u64, window_s: u64) -> Need {
        Need {
            left: Bytes(left_mb * MB),
            network: BytesPerSec(network_mb * MB),
            vmm_time: Duration::from_secs(10),
            window: Duration::from_secs(window_s),
            spread: 1.0,
        }
    }

    fn writes(wanted_mb: u64, promised_mb: u64) -> Writes {
        Writes {
            wanted: Some(BytesPerSec(wanted_mb * MB)),
            promised: BytesPerSec(promised_mb * MB),
        }
    }

    #[test]
    fn a_guest_that_writes_little_is_left_alone() {
        assert_eq!(verdict(&need(1000, 100, 30), writes(50, 0)), Verdict::Free);
    }

    #[test]
    fn a_heavy_writer_gets_what_the_network_can_carry_besides() {
        // 1000 MB in 20 s take 50 MB/s of 100.
        let limit = Verdict::Limit(BytesPerSec(50 * MB));
        assert_eq!(verdict(&need(1000, 100, 30), writes(80, 0)), limit);
        assert_eq!(verdict(&need(1000, 100, 30), writes(80, 50)), limit);
        let unknown = Writes { wanted: None, promised: BytesPerSec(0) };
        assert_eq!(verdict(&need(1000, 100, 30), unknown), limit);
    }

    #[test]
    fn small_writes_that_dirty_large_blocks_get_less() {
        let need = Need { spread: 4.0, ..need(1000, 100, 30) };
        assert_eq!(verdict(&need, writes(80, 0)), Verdict::Limit(BytesPerSec(12_500_000)));
    }

    #[test]
    fn a_promise_that_cannot_be_kept_is_the_operators_to_break() {
        let Verdict::Conflict(choices) = verdict(&need(1000, 100, 30), writes(80, 60)) else {
            panic!("60 MB/s and 30 s do not fit");
        };
        assert_eq!(choices.limit, Some(BytesPerSec(50 * MB)));
        assert_eq!(choices.window, Some(Duration::from_secs(35)));
        assert_eq!(choices.network, Some(BytesPerSec(110 * MB)));
    }

    #[test]
    fn a_window_shorter_than_the_memory_takes_has_no_answer_but_a_longer_one() {
        let Verdict::Conflict(choices) = verdict(&need(1000, 100, 5), writes(80, 0)) else {
            panic!("memory alone takes 10 s");
        };
        assert_eq!((choices.limit, choices.network), (None, None));
        assert!(choices.window.unwrap() > Duration::from_secs(20));
    }

    #[test]
    fn a_window_without_a_second_to_copy_and_nothing_left_is_fine() {
        assert_eq!(verdict(&need(0, 100, 10), writes(80, 0)), Verdict::Free);
    }

    proptest! {
        #[test]
        fn a_limit_keeps_the_window_and_no_faster_one_does(
            left in 1_u64..100_000, network in 1_u64..2000, window in 11_u64..3600,
            spread in 0.2_f64..100.0, wanted in 0_u64..5000,
        ) {
            let need = Need { spread, ..need(left, network, window) };
            let slack = Duration::from_millis(1);
            match verdict(&need, writes(wanted, 0)) {
                Verdict::Limit(limit) => {
                    prop_assert!(limit >= SLOWEST);
                    let time = time_needed(&need, limit).unwrap();
                    prop_assert!(time <= need.window + slack, "{time:?}");
                    let more = time_needed(&need, limit.scale(1.1) + BytesPerSec(1000));
                    prop_assert!(more.is_none_or(|time| time + slack > need.window));
                }
                Verdict::Free => {
                    let time = time_needed(&need, BytesPerSec(wanted * MB)).unwrap();
                    prop_assert!(time <= need.window + slack);
                }
                Verdict::Conflict(choices) => {
                    if let Some(network) = choices.network {
                        let better = Need { network, ..need };
                        let time = time_needed(&better, SLOWEST).unwrap();
                        prop_assert!(time <= need.window + slack, "{time:?}");
                    }
                }
            }
        }
    }
}
