//! The two connections on which the source serves pages: what is asked on them, and asked again on
//! the next one when they break.

use std::time::{Duration, Instant};

use lifeboat_scatter_gather::link::pages::{PAGES_MOST, runs};
use lifeboat_scatter_gather::link::{Frame, Purpose};
use lifeboat_scatter_gather::page::PageAt;

use super::{Batch, Driver};
use crate::clock;
use crate::link::{FrameReader, FrameWriter, LinkError};

/// The source says something on each connection once a second; one that is silent for so long is
/// dead, as that of a host without power.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);

/// One connection, welcomed.
pub(super) struct Lane {
    reader: FrameReader,
    writer: FrameWriter,
    heard_at: Instant,
}

/// The next word on a connection; for ever where there is none.
pub(super) async fn word(lane: &mut Option<Lane>) -> Result<Frame, LinkError> {
    match lane {
        Some(lane) => {
            let deadline = (lane.heard_at + SILENCE_LIMIT).into();
            let word = tokio::time::timeout_at(deadline, lane.reader.next()).await;
            lane.heard_at = clock::now();
            word.unwrap_or(Err(LinkError::Silent(SILENCE_LIMIT)))
        }
        None => std::future::pending().await,
    }
}

impl Driver {
    pub(super) fn lane(&mut self, purpose: Purpose) -> &mut Option<Lane> {
        match purpose {
            Purpose::ServeBackground => &mut self.background,
            _ => &mut self.demands,
        }
    }

    /// A new connection takes the place of the one before, and hears what is still wanted.
    pub(super) async fn take_lane(
        &mut self,
        purpose: Purpose,
        reader: FrameReader,
        writer: FrameWriter,
    ) {
        *self.lane(purpose) = Some(Lane { reader, writer, heard_at: clock::now() });
        match purpose {
            Purpose::ServeBackground => {
                for batch in self.batches.clone() {
                    self.ask_batch(&batch).await;
                }
            }
            _ => {
                let wanted: Vec<PageAt> = self.asked.iter().copied().collect();
                self.ask(&wanted).await;
            }
        }
    }

    /// Asks for pages that the guest waits for. Without a connection they wait for the next one.
    pub(super) async fn ask(&mut self, pages: &[PageAt]) {
        for some in pages.chunks(PAGES_MOST) {
            let fetch = Frame::Fetch(runs(some));
            send(&mut self.demands, &fetch).await;
        }
    }

    /// Asks for a batch of the background's, if it is one of the source's.
    pub(super) async fn ask_batch(&mut self, batch: &Batch) {
        if let Batch::Source(pages) = batch {
            let fetch = Frame::Fetch(runs(pages));
            send(&mut self.background, &fetch).await;
        }
    }

    pub(super) async fn answer_ping(&mut self, purpose: Purpose, number: u64) {
        send(self.lane(purpose), &Frame::Pong(number)).await;
    }
}

/// Sends where there is a connection; one that fails is none any more.
async fn send(lane: &mut Option<Lane>, frame: &Frame) {
    if let Some(open) = lane
        && let Err(error) = open.writer.send(frame).await
    {
        tracing::warn!(%error, "a connection for pages broke; the source opens another");
        *lane = None;
    }
}
