//! Blocks of an image on their way out: read, looked at, paced, numbered.
//!
//! `send` calls it for each block of a pass. Holes and zeroes are not sent as content: a hole that was
//! never written is not even marked ([`mark_data`]), and a block of zeroes is a frame without
//! payload. The rate is the smaller of reservation and broker's limit, settable at any time.
//!
//! Deliberately not here: which blocks, in which order, and what comes back.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lifeboat_policy::pace::Pacer;
use lifeboat_protocol::units::{Bytes, BytesPerSec};
use rustix::io::Errno;
use tokio::sync::watch;

use super::frame::{Frame, Kind};
use super::ledger::Pending;
use super::mirror::Mirror;
use crate::disk::fuse::Image;
use crate::{clock, tasks};

/// Marks whatever of `image` is not a hole: what a pass has to send.
///
/// # Errors
/// When the file system cannot say.
pub fn mark_data(mirror: &Mirror, disk: u16, image: &Image) -> Result<(), Errno> {
    let Some(own) = mirror.disks().get(usize::from(disk)) else { return Ok(()) };
    let length = image.length()?;
    own.dirty.grow(length);
    own.activity.grow(length);
    let mut at = 0;
    while at < length {
        let start = match image.seek(libc::SEEK_DATA.cast_unsigned(), at) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        // A write between the two questions can leave no hole after `start`: then the end.
        let end = image.seek(libc::SEEK_HOLE.cast_unsigned(), start).unwrap_or(length);
        own.dirty.mark(&(start..end));
        at = end.max(start + 1);
    }
    Ok(())
}

/// Reads neighbouring `blocks` of disk `disk` and makes them a frame with the next version, entered in
/// the ledger. `None` beyond the end of the image.
///
/// # Errors
/// When the disk cannot be read; then the blocks are dirty again.
pub async fn read(
    mirror: &Arc<Mirror>,
    image: &Arc<Image>,
    disk: u16,
    blocks: Range<u64>,
) -> Result<Option<Frame>, Errno> {
    let Some(size) = mirror.disks().get(usize::from(disk)).map(|own| own.dirty.block()) else {
        return Ok(None);
    };
    let end = image.length()?;
    let range = size.range(blocks.start, end).start..size.range(blocks.end, end).start;
    let length = range.end - range.start;
    if length == 0 {
        return Ok(None);
    }
    // The version first: whatever lands while we read gets a later one.
    let pending = Pending { disk, range: range.clone(), bytes: length, waiting: None };
    let version = mirror.ledger().enter(pending);
    let (own, start) = (Arc::clone(image), range.start);
    let content = tasks::blocking(move || {
        let mut bytes = vec![0; length as usize];
        own.read(false, start, &mut bytes).map(|_| bytes)
    });
    let bytes = match content.await {
        Ok(bytes) => bytes,
        Err(errno) => {
            mirror.ledger().acknowledge(version);
            mirror.disks()[usize::from(disk)].dirty.mark(&range);
            return Err(errno);
        }
    };
    let (kind, payload) = match is_zero(&bytes) {
        true => (Kind::Zeroes, vec![]),
        false => (Kind::Data, bytes),
    };
    let settled = mirror.ledger().settled();
    let head = Frame { version, settled, offset: start, length, ..Frame::new(kind, disk) };
    Ok(Some(Frame { payload: payload.into(), ..head }))
}

/// Sixteen bytes at a time.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// The network's limit on one migration's disks.
#[derive(Debug)]
pub struct Pace {
    origin: Instant,
    pacer: Mutex<Pacer>,
    rate: watch::Receiver<Option<BytesPerSec>>,
}

/// No link is faster; stands for no limit.
const UNLIMITED: BytesPerSec = BytesPerSec(1 << 40);

impl Pace {
    /// Follows `rate`; `None` in it is no limit.
    #[must_use]
    pub fn new(rate: watch::Receiver<Option<BytesPerSec>>) -> Self {
        let first = rate.borrow().unwrap_or(UNLIMITED);
        Self { origin: clock::now(), pacer: Mutex::new(Pacer::new(first)), rate }
    }

    /// The rate of now; `None` is no limit.
    #[must_use]
    pub fn rate(&self) -> Option<BytesPerSec> {
        *self.rate.borrow()
    }

    fn pacer(&self) -> MutexGuard<'_, Pacer> {
        self.pacer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When `bytes` more may go, at the rate of now; `None` at a rate of zero.
    fn grant(&self, bytes: u64) -> Option<Duration> {
        let now = clock::now().saturating_duration_since(self.origin);
        let rate = self.rate.borrow().unwrap_or(UNLIMITED);
        let mut pacer = self.pacer();
        if pacer.rate() != rate {
            pacer.set_rate(now, rate);
        }
        pacer.ready_at(now, Bytes(bytes)).map(|due| due.saturating_sub(now))
    }

    /// Counts what goes at once: a guest may wait for it.
    pub fn charge(&self, bytes: u64) {
        self.grant(bytes);
    }

    /// Waits until `bytes` may go. A rate that is changed meanwhile lets at most these go early.
    pub async fn wait(&self, bytes: u64) {
        let mut rate = self.rate.clone();
        rate.mark_unchanged();
        loop {
            match self.grant(bytes) {
                Some(Duration::ZERO) => return,
                Some(due) => {
                    tokio::select! {
                        () = tokio::time::sleep(due) => return,
                        changed = rate.changed() => match changed {
                            Ok(()) => return,
                            // Nobody can change it any more: what was granted is waited for.
                            Err(_) => return tokio::time::sleep(due).await,
                        },
                    }
                }
                None if rate.changed().await.is_ok() => {}
                None => std::future::pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_told_from_content_to_the_last_byte() {
        assert!(is_zero(&[0; 4099]) && is_zero(&[]));
        for at in [0, 15, 16, 4095, 4098] {
            let mut bytes = [0; 4099];
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
        }
    }

    #[tokio::test]
    async fn a_rate_is_followed_and_can_be_changed_while_somebody_waits() {
        let (set, rate) = watch::channel(Some(BytesPerSec(1_000_000)));
        let pace = Arc::new(Pace::new(rate));
        let begin = clock::now();
        for _ in 0..11 {
            pace.wait(10_000).await;
        }
        let took = begin.elapsed();
        assert!(took > Duration::from_millis(90), "{took:?}");
        set.send_replace(Some(BytesPerSec::ZERO));
        let own = Arc::clone(&pace);
        let waiting = tasks::spawn("waits", async move { own.wait(10_000).await });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished());
        set.send_replace(None);
        waiting.await.unwrap();
    }
}
