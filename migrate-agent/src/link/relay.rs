//! The relay at the source: QEMU's stream from its socket to the page link, at a pace.
//!
//! ```text
//!   QEMU --unix socket--> [fill] --> queue --> [drain: pacer, digest] --> page link
//! ```
//!
//! Until the guest is paused the queue is bounded to 30 ms of the rate (the measured one, where
//! that is below the limit): what lies in it is sent while the guest stands still. A full queue blocks QEMU's migration thread, which hurts nobody
//! while the guest runs. Once the guest is paused the same blocking would freeze QEMU's whole
//! main loop and its QMP with it, so then the queue takes everything at memory speed
//! ([`Relay::unbound`]); the rest of a converged guest is small.
//!
//! Used by `source.rs`. The bytes are QEMU's; nothing here reads them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use lifeboat_policy::pace::{self, Pacer};
use lifeboat_protocol::units::BytesPerSec;
use lifeboat_scatter_gather::link::{Ended, Frame};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::Notify;
use xxhash_rust::xxh3::Xxh3Default;

use super::io::{FrameWriter, LinkError};
use crate::clock;

/// Bytes read from QEMU at once, and so the largest STREAM payload.
const CHUNK_BYTES: usize = 128 << 10;
/// A sign of life is sent this often where QEMU has nothing to send.
const PING_EVERY: Duration = Duration::from_millis(500);
/// The queue's bound follows the rate at which the link took what was there; this is what it
/// assumes before that is known, unless a limit says less.
const UNMEASURED: BytesPerSec = BytesPerSec(25_000_000);
/// Over so long is measured.
const MEASURE_OVER: Duration = Duration::from_millis(100);

/// The queue between the two halves of the relay, and its counters.
#[derive(Clone)]
pub struct Relay {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Notify,
    began: Instant,
}

struct State {
    queue: VecDeque<Bytes>,
    queued: usize,
    /// `None`: no bound.
    bound: Option<usize>,
    ended: bool,
    limit: Option<BytesPerSec>,
    pacer: Pacer,
    sent: u64,
    /// When the measuring of the drain's rate last began, and `sent` then.
    measured_at: Duration,
    measured_sent: u64,
    /// Whether the queue ran empty since: then what was sent says nothing about the link.
    starved: bool,
}

impl State {
    /// A link may take less than the limit allows: what lies in the queue is bounded by what it
    /// really took, or the pause would have to send a queue that was meant for a faster link.
    fn measure(&mut self, now: Duration) {
        let span = now.saturating_sub(self.measured_at);
        if span < MEASURE_OVER {
            return;
        }
        let bytes = self.sent.saturating_sub(self.measured_sent);
        let rate = BytesPerSec((bytes as f64 / span.as_secs_f64()) as u64);
        let starved = std::mem::take(&mut self.starved);
        (self.measured_at, self.measured_sent) = (now, self.sent);
        if !starved && self.bound.is_some() {
            self.bound = Some(bound_at(Some(self.limit.map_or(rate, |limit| limit.min(rate)))));
        }
    }
}

impl Relay {
    /// A relay that sends at most at `limit`; `None`: as fast as the link takes it.
    #[must_use]
    pub fn new(limit: Option<BytesPerSec>) -> Self {
        let state = State {
            queue: VecDeque::new(),
            queued: 0,
            bound: Some(bound_at(limit)),
            ended: false,
            limit,
            pacer: Pacer::new(limit.unwrap_or(UNMEASURED)),
            sent: 0,
            measured_at: Duration::ZERO,
            measured_sent: 0,
            starved: false,
        };
        let shared =
            Shared { state: Mutex::new(state), changed: Notify::new(), began: clock::now() };
        Self { shared: Arc::new(shared) }
    }

    /// Changes the limit; what is queued is sent at the new one.
    pub fn set_limit(&self, limit: Option<BytesPerSec>) {
        let now = self.shared.began.elapsed();
        self.with(|state| {
            state.limit = limit;
            if let Some(rate) = limit {
                state.pacer.set_rate(now, rate);
            }
            if state.bound.is_some() {
                state.bound = Some(bound_at(limit));
            }
        });
    }

    /// From now on the queue takes everything: the guest is paused.
    pub fn unbound(&self) {
        self.with(|state| state.bound = None);
    }

    /// Bytes that went to the link so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.with_quietly(|state| state.sent)
    }

    /// Bytes that wait in the queue.
    #[must_use]
    pub fn queued(&self) -> u64 {
        self.with_quietly(|state| state.queued as u64)
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = self.with_quietly(change);
        self.shared.changed.notify_waiters();
        result
    }

    fn with_quietly<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.shared.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads QEMU's stream into the queue until its end. Run as a task of its own.
    ///
    /// # Errors
    /// When QEMU's socket fails.
    pub async fn fill(&self, mut from: impl AsyncRead + Unpin) -> Result<(), LinkError> {
        let mut buffer = BytesMut::new();
        let result = loop {
            self.wait_for_room().await;
            buffer.reserve(CHUNK_BYTES);
            // `take` keeps a chunk within one frame, however large the buffer has grown.
            match (&mut from).take(CHUNK_BYTES as u64).read_buf(&mut buffer).await {
                Ok(0) => break Ok(()),
                Ok(_) => {
                    self.push(buffer.split().freeze());
                }
                Err(error) => break Err(error.into()),
            }
        };
        self.end();
        result
    }

    /// Adds bytes of a stream that somebody else reads from QEMU, at most a frame's payload at once.
    pub fn push(&self, chunk: Bytes) {
        self.with(|state| {
            state.queued += chunk.len();
            state.queue.push_back(chunk);
        });
    }

    /// Nothing more will be pushed.
    pub fn end(&self) {
        self.with(|state| state.ended = true);
    }

    /// Returns when the queue takes more.
    pub async fn wait_for_room(&self) {
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let room =
                self.with_quietly(|state| state.bound.is_none_or(|bound| state.queued < bound));
            if room {
                return;
            }
            changed.await;
        }
    }

    /// Sends the queue to the link until the stream has ended and all is sent.
    ///
    /// # Errors
    /// When the link fails.
    pub async fn drain(&self, to: &mut FrameWriter) -> Result<Ended, LinkError> {
        let mut digest = Xxh3Default::new();
        let mut total = 0;
        loop {
            let (chunk, wait) = match tokio::time::timeout(PING_EVERY, self.next_chunk()).await {
                Ok(Some(next)) => next,
                Ok(None) => break,
                Err(_) => {
                    to.send(&Frame::Ping(0)).await?;
                    continue;
                }
            };
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            digest.update(&chunk);
            total += chunk.len() as u64;
            to.send_stream(&chunk).await?;
            let now = self.shared.began.elapsed();
            self.with(|state| {
                state.queued -= chunk.len();
                state.sent = total;
                state.measure(now);
            });
        }
        Ok(Ended { total, digest: digest.digest() })
    }

    /// The next chunk and how long it has to wait; `None` at the end. It counts as queued until
    /// it has been sent. Cancel-safe: a chunk is taken only when it is returned.
    async fn next_chunk(&self) -> Option<(Bytes, Duration)> {
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let now = self.shared.began.elapsed();
            let next = self.with_quietly(|state| match state.queue.pop_front() {
                Some(chunk) => {
                    let bytes = lifeboat_protocol::units::Bytes(chunk.len() as u64);
                    let at = match state.limit {
                        Some(_) => state.pacer.ready_at(now, bytes).unwrap_or(now),
                        None => now,
                    };
                    Ok(Some((chunk, at.saturating_sub(now))))
                }
                None if state.ended => Ok(None),
                None => {
                    state.starved = true;
                    Err(())
                }
            });
            match next {
                Ok(chunk) => return chunk,
                Err(()) => changed.await,
            }
        }
    }
}

fn bound_at(limit: Option<BytesPerSec>) -> usize {
    let bytes = pace::relay_buffer(limit.unwrap_or(UNMEASURED));
    usize::try_from(bytes.0).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::FrameReader;

    #[tokio::test]
    async fn the_stream_arrives_whole_and_its_end_names_it() {
        let (near, far) = tokio::io::duplex(1 << 20);
        let stream: Vec<u8> = (0..1_000_000u32).map(|i| ((i * 31) >> 3) as u8).collect();
        let relay = Relay::new(None);
        let mut writer = FrameWriter::new(near);
        let drained = async {
            let ended = relay.drain(&mut writer).await.unwrap();
            writer.send(&Frame::End(ended)).await.unwrap();
            ended
        };
        let received = async {
            let (mut reader, mut all) = (FrameReader::new(far), Vec::new());
            loop {
                match reader.next().await.unwrap() {
                    Frame::Stream(bytes) => all.extend_from_slice(&bytes),
                    Frame::End(ended) => return (all, ended),
                    other => panic!("{other:?}"),
                }
            }
        };
        let (filled, sent, (all, ended)) = tokio::join!(relay.fill(&stream[..]), drained, received);
        filled.unwrap();
        assert!(all == stream, "the stream was changed");
        assert_eq!(ended, sent);
        assert_eq!(ended.digest, xxhash_rust::xxh3::xxh3_64(&stream));
        assert_eq!((relay.sent(), relay.queued()), (1_000_000, 0));
    }

    #[tokio::test]
    async fn a_full_queue_holds_qemu_back_until_the_guest_is_paused() {
        let limit = BytesPerSec(25_000_000);
        let relay = Relay::new(Some(limit));
        let stream = vec![7u8; 4_000_000];
        let filling = relay.fill(&stream[..]);
        tokio::pin!(filling);
        // Nobody drains: filling stops at the bound, give or take one chunk.
        let blocked = tokio::time::timeout(Duration::from_millis(20), &mut filling).await;
        assert!(blocked.is_err());
        let bound = pace::relay_buffer(limit).0;
        assert!((bound..bound + CHUNK_BYTES as u64).contains(&relay.queued()));
        relay.unbound();
        filling.await.unwrap();
        assert_eq!(relay.queued(), 4_000_000);
    }
}
