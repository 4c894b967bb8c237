//! QEMU's pre-copy, absorbed at memory speed: the source's half of post-copy and scatter-gather up to
//! END. What is read here is judged by `postcopy::absorb`; what it leaves of the stream goes to the
//! destination by the same relay as a pre-copy's.

use std::sync::Arc;

use bytes::BytesMut;
use lifeboat_protocol::units::Bytes;
use lifeboat_scatter_gather::link::Frame;
use lifeboat_scatter_gather::link::pages::NOTES_MOST;
use lifeboat_scatter_gather::page::PAGE_BYTES;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::serving::{Calling, Serving};
use super::{Failure, SourceTask};
use crate::link::LinkError;
use crate::link::relay::Relay;
use crate::postcopy::absorb::{Absorbed, Absorber};
use crate::qemu::stream::compose;

/// Bytes read from QEMU at once: pages are dropped, so larger pieces only cost memory.
const READ_BYTES: usize = 512 << 10;
/// What may wait for the link of what cannot be read from outside, where the order says nothing.
const BUDGET_DEFAULT: Bytes = Bytes(64 << 20);

/// Reads QEMU's stream to its end and pushes what is left of it into `relay`.
pub(super) async fn absorb(
    relay: Relay,
    from: UnixStream,
    absorber: Absorber,
    budget: Bytes,
) -> Result<Option<Absorbed>, Failure> {
    let absorbed = read_all(&relay, from, absorber, budget).await;
    relay.end();
    absorbed.map(Some)
}

async fn read_all(
    relay: &Relay,
    mut from: UnixStream,
    mut absorber: Absorber,
    budget: Bytes,
) -> Result<Absorbed, Failure> {
    let mut buffer = BytesMut::new();
    loop {
        relay.wait_for_room().await;
        buffer.reserve(READ_BYTES);
        let read = (&mut from).take(READ_BYTES as u64).read_buf(&mut buffer).await;
        if read.map_err(Failure::Socket)? == 0 {
            return Ok(absorber.finish()?);
        }
        let rest = absorber.feed(buffer.split().freeze())?;
        let mut rest = compose::joined(&rest);
        while !rest.is_empty() {
            relay.push(rest.split_to(rest.len().min(READ_BYTES)));
        }
        if relay.queued() > budget.0 {
            return Err(Failure::Budget { queued: Bytes(relay.queued()), budget });
        }
    }
}

impl SourceTask {
    /// The memory that what is absorbed may take.
    pub(super) fn absorb_budget(&self) -> Bytes {
        match self.order.absorb_budget {
            Bytes(0) => BUDGET_DEFAULT,
            budget => budget,
        }
    }

    /// Opens the connections on which pages will be served.
    pub(super) fn start_serving(&mut self) {
        let hello = self.hello(lifeboat_scatter_gather::link::Purpose::ServeDemands);
        let (destination, address) = self.machine.destination();
        let calling = Calling {
            address: address.to_owned(),
            destination: destination.clone(),
            identity: self.context.identity.clone(),
            hello,
        };
        self.serving = Some(Serving::start(calling, self.limit));
    }

    /// The guest stands still and its stream is complete: tells what is where, and lets its pages be
    /// asked for.
    pub(super) async fn tell_pages(&mut self, absorbed: Absorbed) -> Result<(), Failure> {
        let memory = self.memory.clone().ok_or(Failure::GuestGone)?;
        let compared = Arc::clone(&memory);
        let absorbed = crate::tasks::blocking(move || {
            let read = |page: u32, buffer: &mut [u8]| {
                debug_assert_eq!(buffer.len(), PAGE_BYTES);
                compared.read(page.into(), buffer).map_err(Failure::from)
            };
            absorbed.compare(read).map(|()| absorbed)
        })
        .await?;
        if let Some(stores) = &self.stores {
            stores.must_fit(&absorbed)?;
        }
        let writer = self.writer.as_mut().ok_or(LinkError::Closed)?;
        if let Some(stores) = &self.stores {
            writer.send(&Frame::Key(stores.key())).await?;
        }
        for notes in absorbed.notes().chunks(NOTES_MOST) {
            writer.send(&Frame::Notes(notes.to_vec())).await?;
        }
        if let Some(serving) = &self.serving {
            serving.open(memory);
        }
        let waiting = absorbed.data().count() as u64;
        self.progress.update(|progress| progress.pages_total = waiting);
        self.absorbed = Some(Arc::new(absorbed));
        Ok(())
    }
}
