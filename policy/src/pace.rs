//! One rate, one owner: what a migration may send now, and when its next chunk may go.
//!
//! The agent's page link asks. A rate is the smaller of what the path has reserved and what the
//! broker allows (ARCHITECTURE.md: neither loop fights the other). Not here: who changes either of
//! them, and any clock: times are `Duration`s since a moment that the caller chose.

use std::time::Duration;

use lifeboat_protocol::units::{BitsPerSec, Bytes, BytesPerSec};

/// A pacer that was idle may send this much of a second at once, so that a late wake-up costs no
/// throughput. A sixth of what the relay holds: a queue of the path never sees more than that
/// in a row.
pub const BURST: Duration = Duration::from_millis(5);

/// What the relay between two agents holds at most, as time at the current rate: it is sent during
/// the pause. With what waits in the source's socket besides, it stays below 50 ms, a sixth of the
/// 300 ms that a guest may stand still.
pub const RELAY_TIME: Duration = Duration::from_millis(30);

/// The relay never holds less than this: one read of a socket.
pub const RELAY_MIN: Bytes = Bytes(64 << 10);

/// The relay never holds more than this: at 10 Gbit/s, 30 ms are 38 MB.
pub const RELAY_MAX: Bytes = Bytes(40 << 20);

/// Memory keeps at least this part of the limit beside its guest's writes to disks in step.
const MEMORY_SHARE_LEAST: u64 = 4;
/// Memory and those writes together take at most this part of it: what is spared keeps queues on the way
/// short, which a guest's flush waits for.
const MEMORY_SHARE_MOST: f64 = 0.96;

/// What memory may send of `limit` while its guest's disks are in step and it writes `writes` to them,
/// which go over the same link.
#[must_use]
pub fn beside_writes(limit: BytesPerSec, writes: BytesPerSec) -> BytesPerSec {
    let left = limit.scale(MEMORY_SHARE_MOST) - writes;
    left.max(BytesPerSec(limit.0 / MEMORY_SHARE_LEAST))
}

/// How fast a guest may change its disks while they are in step, where the migration may send `limit` and the
/// guest is held to `disk`: each change goes over the link at once. A rate that the link can bear is somebody's
/// promise and counts as it is; else memory, or the blocks that are left, find [`beside_writes`]'s least.
#[must_use]
pub fn writes_in_step(limit: BytesPerSec, disk: Option<BytesPerSec>) -> BytesPerSec {
    let most = limit.scale(MEMORY_SHARE_MOST);
    match disk {
        Some(disk) if disk <= most => disk,
        _ => most - BytesPerSec(limit.0 / MEMORY_SHARE_LEAST),
    }
}

/// What a migration may send: the smaller of the path's reservation and the broker's allowance;
/// `None` sets no limit on its side.
#[must_use]
pub fn owned_rate(
    reserved: Option<BitsPerSec>,
    allowed: Option<BytesPerSec>,
) -> Option<BytesPerSec> {
    let reserved = reserved.map(BitsPerSec::bytes_per_sec);
    match (reserved, allowed) {
        (Some(path), Some(broker)) => Some(path.min(broker)),
        (one, other) => one.or(other),
    }
}

/// How many bytes the relay may hold at `rate`.
#[must_use]
pub fn relay_buffer(rate: BytesPerSec) -> Bytes {
    rate.over(RELAY_TIME).clamp(RELAY_MIN, RELAY_MAX)
}

/// A token bucket, kept as the moment at which everything granted so far will have been paid for.
///
/// Over any span, what was granted is at most `rate * span + rate * burst` and one chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pacer {
    rate: BytesPerSec,
    burst: Duration,
    paid_at: Duration,
    /// Bytes still owed, while the rate is zero and no moment pays for them.
    held: u128,
}

impl Pacer {
    /// A pacer that owes nothing, at `rate` bytes/s. At zero nothing may be sent.
    #[must_use]
    pub const fn new(rate: BytesPerSec) -> Self {
        Self::bursting(rate, BURST)
    }

    /// The same, which may send `burst` of a second at once after it was idle instead of [`BURST`].
    #[must_use]
    pub const fn bursting(rate: BytesPerSec, burst: Duration) -> Self {
        Self { rate, burst, paid_at: Duration::ZERO, held: 0 }
    }

    /// The current rate, bytes/s.
    #[must_use]
    pub const fn rate(&self) -> BytesPerSec {
        self.rate
    }

    /// Changes the rate at `now`. What is still owed is owed in bytes: it is paid at the new rate.
    pub fn set_rate(&mut self, now: Duration, rate: BytesPerSec) {
        let owed = match self.rate {
            BytesPerSec::ZERO => self.held,
            old => bytes_in(self.paid_at.saturating_sub(now), old),
        };
        self.rate = rate;
        match time_for(owed, rate) {
            None => self.held = owed,
            Some(time) if owed > 0 => self.paid_at = now.saturating_add(time),
            // Nothing is owed: the credit of an idle time stays.
            Some(_) => self.paid_at = self.paid_at.min(now),
        }
    }

    /// Grants `bytes` and says from when on they may be sent (`now` or later); `None`, granting
    /// nothing, while the rate is zero. Ask once for each chunk.
    pub fn ready_at(&mut self, now: Duration, bytes: Bytes) -> Option<Duration> {
        let time = time_for(u128::from(bytes.0), self.rate)?;
        let start = self.paid_at.max(now.saturating_sub(self.burst));
        self.paid_at = start.saturating_add(time);
        Some(start.max(now))
    }
}

/// How long `bytes` take, rounded up so that rounding never lends; `None` at a rate of zero.
fn time_for(bytes: u128, rate: BytesPerSec) -> Option<Duration> {
    let nanos = bytes.saturating_mul(1_000_000_000).checked_div(u128::from(rate.0))?;
    Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX).saturating_add(1)))
}

fn bytes_in(time: Duration, rate: BytesPerSec) -> u128 {
    time.as_nanos().saturating_mul(u128::from(rate.0)).div_ceil(1_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_smaller_of_reservation_and_allowance_counts() {
        let (path, broker) = (BitsPerSec(80), BytesPerSec(7));
        assert_eq!(owned_rate(Some(path), Some(broker)), Some(BytesPerSec(7)));
        assert_eq!(owned_rate(Some(path), Some(BytesPerSec(11))), Some(BytesPerSec(10)));
        assert_eq!(owned_rate(Some(path), None), Some(BytesPerSec(10)));
        assert_eq!(owned_rate(None, Some(broker)), Some(broker));
        assert_eq!(owned_rate(None, None), None);
    }

    #[test]
    fn memory_has_what_writes_leave_and_a_quarter_at_least() {
        let limit = BytesPerSec(100);
        assert_eq!(beside_writes(limit, BytesPerSec(0)), BytesPerSec(96));
        assert_eq!(beside_writes(limit, BytesPerSec(30)), BytesPerSec(66));
        assert_eq!(beside_writes(limit, BytesPerSec(500)), BytesPerSec(25));
    }

    #[test]
    fn writes_in_step_leave_memory_its_least_unless_a_rate_is_promised_that_fits() {
        let limit = BytesPerSec(100);
        let writes = writes_in_step(limit, None);
        assert_eq!(writes, BytesPerSec(71));
        assert!(writes + beside_writes(limit, writes) <= limit);
        assert_eq!(writes_in_step(limit, Some(BytesPerSec(200))), writes);
        assert_eq!(writes_in_step(limit, Some(BytesPerSec(30))), BytesPerSec(30));
        assert_eq!(writes_in_step(limit, Some(BytesPerSec(90))), BytesPerSec(90));
    }

    #[test]
    fn the_relay_holds_thirty_milliseconds_within_bounds() {
        assert_eq!(relay_buffer(BytesPerSec(25_000_000)), Bytes(750_000));
        assert_eq!(relay_buffer(BytesPerSec(0)), RELAY_MIN);
        assert_eq!(relay_buffer(BytesPerSec(u64::MAX)), RELAY_MAX);
    }

    #[test]
    fn a_second_of_chunks_takes_a_second() {
        let mut pacer = Pacer::new(BytesPerSec(1_000_000));
        let start = Duration::from_secs(5);
        let mut now = start;
        for _ in 0..100 {
            now = pacer.ready_at(now, Bytes(10_000)).unwrap();
        }
        let took = now - start;
        assert!(took > 980 * MS && took < 1000 * MS, "{took:?}");
    }

    #[test]
    fn a_rate_of_zero_holds_everything_and_owes_nothing() {
        let mut pacer = Pacer::new(BytesPerSec(0));
        assert_eq!(pacer.ready_at(MS, Bytes(1)), None);
        pacer.set_rate(2 * MS, BytesPerSec(1000));
        assert_eq!(pacer.ready_at(2 * MS, Bytes(1)), Some(2 * MS));
    }

    #[test]
    fn a_debt_is_in_bytes_and_is_paid_at_the_new_rate() {
        let mut pacer = Pacer::new(BytesPerSec(1000));
        let now = Duration::from_secs(1);
        pacer.ready_at(now, Bytes(1005)).unwrap();
        pacer.set_rate(now, BytesPerSec(10_000));
        let next = pacer.ready_at(now, Bytes(1)).unwrap() - now;
        assert!(next > 99 * MS && next < 101 * MS, "{next:?}");
    }

    #[test]
    fn a_debt_made_at_a_crawl_does_not_outlive_a_stop() {
        let mut pacer = Pacer::new(BytesPerSec(1));
        pacer.ready_at(Duration::from_secs(1), Bytes(65_536)).unwrap();
        pacer.set_rate(Duration::from_secs(2), BytesPerSec::ZERO);
        let now = Duration::from_secs(3);
        pacer.set_rate(now, BytesPerSec(65_536_000));
        let next = pacer.ready_at(now, Bytes(1)).unwrap() - now;
        assert!(next > Duration::ZERO && next <= MS + Duration::from_nanos(1), "{next:?}");
    }

    proptest! {
        #[test]
        fn whatever_the_rate_was_a_debt_is_paid_at_the_last_one(
            rates in prop::collection::vec(0u64..1_000_000_000, 1..20), bytes in 1u64..1_000_000,
        ) {
            let mut pacer = Pacer::new(BytesPerSec(rates[0]));
            let now = Duration::from_secs(1);
            let granted = pacer.ready_at(now, Bytes(bytes)).map_or(0, |_| bytes);
            for rate in &rates {
                pacer.set_rate(now, BytesPerSec(*rate));
            }
            let last = *rates.last().unwrap();
            if let Some(ready) = pacer.ready_at(now, Bytes(1)) {
                let owed = (ready - now).as_secs_f64() * last as f64;
                prop_assert!(owed <= granted as f64 + 1.0 + rates.len() as f64 * (1.0 + last as f64 * 1e-9));
            }
        }

        #[test]
        fn never_more_than_the_rate_a_burst_and_a_chunk(
            rate in 1_000u64..10_000_000,
            steps in prop::collection::vec((0u64..20_000_000, 1u64..50_000), 1..60),
        ) {
            let mut pacer = Pacer::new(BytesPerSec(rate));
            let (mut now, mut granted) = (Duration::ZERO, 0u64);
            let mut first = None;
            for (wait, bytes) in steps {
                now += Duration::from_nanos(wait);
                let at = pacer.ready_at(now, Bytes(bytes)).unwrap();
                prop_assert!(at >= now);
                now = at;
                let begin = *first.get_or_insert(at);
                let span = (at - begin + BURST).as_secs_f64();
                prop_assert!(granted as f64 <= rate as f64 * span + 1.0);
                granted += bytes;
            }
        }
    }
}
