//! What is on its way: updates that have a version and no acknowledgement yet.
//!
//! `mirror` and `send` enter updates, `send`'s readers take them out. A version is given and entered
//! in one step, so that [`Ledger::settled`] never passes an update that is about to be sent.
//!
//! Some of a guest's writes are answered before they are acknowledged: those are counted, and timed,
//! because nobody's deadline notices that they stay away.
//!
//! Deliberately not here: sending.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::versions::Version;
use crate::clock;

/// What an update counts at least of those that may be ahead, bytes: a discard carries nothing, and takes the
/// other side as long as a small write.
const LEAST_AHEAD: u64 = 4096;

/// An update on its way.
#[derive(Debug)]
pub struct Pending<T> {
    /// Of which disk.
    pub disk: u16,
    /// What it changes.
    pub range: Range<u64>,
    /// Bytes of content that it carries.
    pub bytes: u64,
    /// Who waits for it; dropped when it is acknowledged or given up.
    pub waiting: Option<T>,
}

#[derive(Debug)]
struct Entry<T> {
    pending: Pending<T>,
    /// When it was entered, if its guest is not kept waiting for it.
    ahead: Option<Instant>,
}

#[derive(Debug)]
struct Entries<T> {
    last: u64,
    pending: BTreeMap<Version, Entry<T>>,
    bytes: u64,
    /// Those of them that are ahead, each at least [`LEAST_AHEAD`].
    ahead: u64,
    quickest: Option<Duration>,
}

impl<T> Entries<T> {
    fn enter(&mut self, entry: Entry<T>) -> Version {
        self.last += 1;
        self.bytes += entry.pending.bytes;
        self.ahead += entry.ahead.map_or(0, |_| entry.pending.bytes.max(LEAST_AHEAD));
        let version = Version(self.last);
        self.pending.insert(version, entry);
        version
    }

    fn take(&mut self, version: Version) -> Option<Pending<T>> {
        let Entry { pending, ahead } = self.pending.remove(&version)?;
        self.bytes -= pending.bytes;
        if let Some(since) = ahead {
            self.ahead -= pending.bytes.max(LEAST_AHEAD);
            let took = clock::now().saturating_duration_since(since);
            self.quickest = Some(self.quickest.map_or(took, |before| before.min(took)));
        }
        Some(pending)
    }
}

/// The updates of one migration's disks.
#[derive(Debug)]
pub struct Ledger<T> {
    entries: Mutex<Entries<T>>,
    changed: Notify,
}

impl<T> Default for Ledger<T> {
    fn default() -> Self {
        let (pending, quickest) = (BTreeMap::new(), None);
        let entries = Entries { last: 0, pending, bytes: 0, ahead: 0, quickest };
        Self { entries: Mutex::new(entries), changed: Notify::new() }
    }
}

impl<T> Ledger<T> {
    fn entries(&self) -> MutexGuard<'_, Entries<T>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters an update and gives it the next version. What it carries must be read after this (a
    /// block) or have been written before it (a guest's write).
    pub fn enter(&self, pending: Pending<T>) -> Version {
        self.entries().enter(Entry { pending, ahead: None })
    }

    /// As [`Self::enter`], for a write of `bytes` to `range` whose guest is not kept waiting; `None` where
    /// more than `window` bytes of those would be on their way then.
    pub fn enter_ahead(
        &self,
        (disk, range): (u16, Range<u64>),
        bytes: u64,
        window: u64,
    ) -> Option<Version> {
        let mut entries = self.entries();
        if entries.ahead.saturating_add(bytes.max(LEAST_AHEAD)) > window {
            return None;
        }
        let pending = Pending { disk, range, bytes, waiting: None };
        Some(entries.enter(Entry { pending, ahead: Some(clock::now()) }))
    }

    /// The next version comes after `version`, at least: one that an earlier process gave.
    pub fn continue_after(&self, version: Version) {
        let mut entries = self.entries();
        entries.last = entries.last.max(version.0);
    }

    /// The update is acknowledged: who waited for it waits no longer. `false`: it was not on its way.
    pub fn acknowledge(&self, version: Version) -> bool {
        // Dropped outside of the lock: it answers a guest.
        let pending = self.entries().take(version);
        self.changed.notify_waiters();
        pending.is_some()
    }

    /// Everything up to this version is acknowledged.
    #[must_use]
    pub fn settled(&self) -> Version {
        let entries = self.entries();
        let first = entries.pending.first_key_value().map_or(entries.last + 1, |(v, _)| v.0);
        Version(first - 1)
    }

    /// Gives everything up: what was on its way has to be sent again.
    pub fn give_up(&self) -> Vec<Pending<T>> {
        let mut entries = self.entries();
        (entries.bytes, entries.ahead) = (0, 0);
        let pending = std::mem::take(&mut entries.pending);
        drop(entries);
        self.changed.notify_waiters();
        pending.into_values().map(|entry| entry.pending).collect()
    }

    /// Bytes on their way.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.entries().bytes
    }

    /// For how long the oldest of those has been on its way.
    #[must_use]
    pub fn ahead_for(&self) -> Option<Duration> {
        let since = self.entries().pending.values().find_map(|entry| entry.ahead);
        since.map(|since| clock::now().saturating_duration_since(since))
    }

    /// The shortest time that one of those took: how far away the other side is.
    #[must_use]
    pub fn quickest(&self) -> Option<Duration> {
        self.entries().quickest
    }

    /// Updates on their way.
    #[must_use]
    pub fn count(&self) -> usize {
        self.entries().pending.len()
    }

    /// Waits until at most `bytes` are on their way.
    pub async fn until_at_most(&self, bytes: u64) {
        self.until(|entries| entries.bytes <= bytes).await;
    }

    /// Waits until nothing is on its way.
    pub async fn until_empty(&self) {
        self.until(|entries| entries.pending.is_empty()).await;
    }

    /// Waits until nothing up to `version` is on its way.
    pub async fn until_settled(&self, version: Version) {
        self.until(|entries| entries.pending.keys().next().is_none_or(|v| *v > version)).await;
    }

    async fn until(&self, holds: impl Fn(&Entries<T>) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before looking, so that no change is missed in between.
            changed.as_mut().enable();
            if holds(&self.entries()) {
                return;
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(bytes: u64) -> Pending<()> {
        Pending { disk: 0, range: 0..bytes, bytes, waiting: None }
    }

    #[test]
    fn what_is_settled_is_everything_below_the_oldest_on_its_way() {
        let ledger = Ledger::default();
        assert_eq!(ledger.settled(), Version(0));
        let versions: Vec<Version> = (0..3).map(|_| ledger.enter(pending(10))).collect();
        assert_eq!(ledger.settled(), Version(0));
        assert!(ledger.acknowledge(versions[1]));
        assert_eq!((ledger.settled(), ledger.bytes()), (Version(0), 20));
        assert!(ledger.acknowledge(versions[0]) && !ledger.acknowledge(versions[0]));
        assert_eq!(ledger.settled(), Version(2));
        assert_eq!(ledger.give_up().len(), 1);
        assert_eq!((ledger.settled(), ledger.bytes()), (Version(3), 0));
    }

    #[test]
    fn what_is_ahead_is_counted_and_timed_until_it_is_acknowledged_or_given_up() {
        let ledger = Ledger::default();
        ledger.enter(pending(1));
        assert_eq!((ledger.ahead_for(), ledger.quickest()), (None, None));
        let ahead = |bytes, window| ledger.enter_ahead((0, 0..bytes), bytes, window);
        assert!(ahead(5000, 4999).is_none() && ahead(0, 4095).is_none());
        // A discard, and a write.
        let first = ahead(0, 4096).unwrap();
        assert!(ahead(5000, 4096 + 4999).is_none());
        assert!(ahead(5000, 4096 + 5000).is_some());
        assert_eq!(ledger.bytes(), 5001);
        clock::pause_thread(Duration::from_millis(5));
        assert!(ledger.ahead_for().unwrap() >= Duration::from_millis(5));
        assert!(ledger.acknowledge(first));
        assert!(ledger.quickest().unwrap() >= Duration::from_millis(5));
        assert!(ahead(1, 5000 + 4095).is_none());
        assert_eq!(ledger.give_up().len(), 2);
        assert!(ledger.ahead_for().is_none() && ahead(1, 4096).is_some());
    }

    #[tokio::test]
    async fn whoever_waits_for_room_gets_it() {
        let ledger = std::sync::Arc::new(Ledger::default());
        let version = ledger.enter(pending(10));
        let own = std::sync::Arc::clone(&ledger);
        let waiting = crate::tasks::spawn("waits", async move { own.until_empty().await });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        ledger.acknowledge(version);
        waiting.await.unwrap();
        ledger.until_at_most(0).await;
    }
}
