//! How fast the background goes: when the next batch may be asked for, under a limit that may change.
//! Pure; times are since a moment that the gather's driver chose. What a guest waits for itself is not
//! held back, and not counted here.

use std::time::Duration;

use lifeboat_policy::pace::Pacer;
use lifeboat_protocol::units::{Bytes, BytesPerSec};
use lifeboat_scatter_gather::page::PAGE_BYTES;

use crate::postcopy::service::Batch;

/// Between two attempts of which the first failed.
const REST: Duration = Duration::from_millis(100);

/// The background's own pace.
pub(super) struct Pace {
    limit: Option<BytesPerSec>,
    pacer: Pacer,
    /// What a batch of the source took on its way, of what its pages have: they may come compressed.
    share: f64,
    /// When the last batch was asked for.
    asked: Duration,
    next: Duration,
}

impl Pace {
    /// `None`: as fast as it goes.
    pub(super) fn new(limit: Option<BytesPerSec>) -> Self {
        let pacer = Pacer::new(limit.unwrap_or(BytesPerSec::ZERO));
        Self { limit, pacer, share: 1.0, asked: Duration::ZERO, next: Duration::ZERO }
    }

    pub(super) fn set(&mut self, now: Duration, limit: Option<BytesPerSec>) {
        self.limit = limit;
        self.pacer.set_rate(now, limit.unwrap_or(BytesPerSec::ZERO));
        self.next = now;
    }

    /// A batch is asked for. The source's is booked at once, and the one behind it may be asked for as
    /// soon as its own time begins; how long a pack is shows when it comes.
    pub(super) fn asks(&mut self, now: Duration, batch: &Batch) {
        self.asked = now;
        if let (Batch::Source(pages), Some(_)) = (batch, self.limit) {
            let bytes = Bytes((pages.len() * PAGE_BYTES) as u64).scale(self.share);
            self.next = self.pacer.ready_at(now, bytes).unwrap_or(now);
        }
    }

    /// A batch of the source has come: `pages` bytes of pages, by `wire` bytes of the link. The next one
    /// will take about as many.
    pub(super) fn came(&mut self, pages: u64, wire: u64) {
        if pages > 0 {
            self.share = (wire as f64 / pages as f64).min(1.0);
        }
    }

    /// A pack of so many bytes has come: the next one waits until this one's time is over, which began
    /// when it was asked for. What it took on its way is not waited for once more.
    pub(super) fn took(&mut self, now: Duration, bytes: u64) {
        if self.limit.is_some() {
            let _ = self.pacer.ready_at(self.asked, Bytes(bytes));
            self.next = self.pacer.ready_at(now, Bytes(0)).unwrap_or(now);
        }
    }

    /// What was tried did not work: not again at once.
    pub(super) fn rest(&mut self, now: Duration) {
        self.next = now + REST;
    }

    /// When the next batch may be asked for.
    pub(super) fn next(&self) -> Duration {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postcopy::service::SOURCE_AHEAD;
    use lifeboat_scatter_gather::page::{PackId, PageAt};

    const BATCHES: u32 = 200;
    const PAGES: u32 = 128;
    const BYTES: u64 = PAGES as u64 * PAGE_BYTES as u64;
    /// What a batch takes at the limit.
    const ONE: Duration = Duration::from_millis(10);

    fn limited() -> Pace {
        Pace::new(Some(BytesPerSec(BYTES * 100)))
    }

    fn from_source() -> Batch {
        Batch::Source((0..PAGES).map(|page| PageAt { block: 0, page }).collect())
    }

    /// How long all batches take over a link on which one takes `link`, with a round trip of `trip`
    /// between a question and the first byte.
    fn source_takes(mut pace: Pace, link: Duration, trip: Duration) -> Duration {
        let (mut now, mut free) = (Duration::ZERO, Duration::ZERO);
        let mut under_way = std::collections::VecDeque::new();
        for _ in 0..BATCHES {
            if under_way.len() == SOURCE_AHEAD {
                now = now.max(under_way.pop_front().unwrap());
            }
            now = now.max(pace.next());
            pace.asks(now, &from_source());
            free = free.max(now + trip) + link;
            under_way.push_back(free);
        }
        free
    }

    fn packs_take(mut pace: Pace, link: Duration) -> Duration {
        let mut now = Duration::ZERO;
        for number in 0..BATCHES {
            now = now.max(pace.next());
            pace.asks(now, &Batch::Pack(PackId(number.into())));
            now += link;
            pace.took(now, BYTES);
        }
        now
    }

    fn about(took: Duration, wanted: Duration) -> bool {
        took >= wanted * 98 / 100 && took <= wanted * 102 / 100
    }

    #[test]
    fn the_limit_is_filled_and_kept_whatever_the_link_takes() {
        let all = ONE * BATCHES;
        let quick = source_takes(limited(), ONE / 10, ONE / 10);
        assert!(about(quick, all), "a faster link: {quick:?}");
        // Asked for one after the other, each would have cost a trip besides.
        let even = source_takes(limited(), ONE, ONE / 4);
        assert!(about(even, all), "a link of the limit's rate: {even:?}");
        let slow = source_takes(limited(), ONE * 2, ONE / 4);
        assert!(about(slow, all * 2), "a slower link: {slow:?}");
        let free = source_takes(Pace::new(None), ONE / 2, ONE / 4);
        assert!(about(free, all / 2), "no limit: {free:?}");
    }

    #[test]
    fn what_a_pack_takes_on_its_way_is_not_waited_for_again() {
        for link in [ONE / 10, ONE * 9 / 10, ONE] {
            let took = packs_take(limited(), link);
            assert!(about(took, ONE * BATCHES), "{link:?} each: {took:?}");
        }
        assert!(about(packs_take(limited(), ONE * 3), ONE * BATCHES * 3));
    }

    #[test]
    fn a_new_limit_holds_from_the_next_batch_on() {
        let mut pace = limited();
        pace.asks(Duration::ZERO, &from_source());
        pace.asks(Duration::ZERO, &from_source());
        assert!(pace.next() > Duration::ZERO);
        pace.set(ONE, None);
        assert_eq!(pace.next(), ONE);
        pace.rest(ONE);
        assert_eq!(pace.next(), ONE + REST);
    }
}
