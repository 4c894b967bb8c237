//! What the source says on the connections for pages: pages, what is in stores, and that it gives up.

use lifeboat_scatter_gather::link::pages::decompressed;
use lifeboat_scatter_gather::link::{Frame, FrameError, Purpose};
use lifeboat_scatter_gather::page::PAGE_BYTES;

use super::Driver;
use super::stores::Came;
use crate::link::LinkError;
use crate::source::Failure;

impl Driver {
    /// The source tells what is in stores.
    pub(super) async fn take_told(&mut self, told: Frame) -> Result<(), Failure> {
        match told {
            Frame::Pack(note) => self.take_pack(note).await,
            Frame::Parity { stripe, store } => {
                self.take_parity(stripe, store);
                self.seek_the_gone().await
            }
            Frame::Scattered => {
                if let Some(stores) = &mut self.stores {
                    stores.complete = true;
                }
                self.idle = false;
                self.show_what_is_missing();
                self.ask_stores().await
            }
            _ => Ok(()),
        }
    }

    pub(super) async fn take_word(
        &mut self,
        from: Purpose,
        word: Result<Frame, LinkError>,
    ) -> Result<(), Failure> {
        match word {
            Ok(Frame::Pages(pages)) => match from {
                Purpose::ServeBackground => {
                    let wire = (pages.len() * PAGE_BYTES) as u64;
                    self.take_batch(Came { pages, wire }).await
                }
                _ => self.take_demanded(pages).await,
            },
            Ok(Frame::Compressed(payload)) if from == Purpose::ServeBackground => {
                let wire = payload.len() as u64;
                match decompressed(payload) {
                    Some(pages) => self.take_batch(Came { pages, wire }).await,
                    None => {
                        let error = LinkError::from(FrameError::Malformed("COMPRESSED"));
                        self.lose_lane(from, &error).await
                    }
                }
            }
            Ok(told @ (Frame::Pack(_) | Frame::Parity { .. } | Frame::Scattered)) => {
                // Without it an agent that takes over asks the source again, if that is still there.
                if let Err(error) = self.known.journal.add(&told) {
                    tracing::error!(%error, "what was told of the guest's pages is not kept");
                }
                self.take_told(told).await
            }
            Ok(Frame::Abort(reason)) => {
                tracing::warn!(reason, "the rest is fetched from the source");
                if let Some(stores) = &mut self.stores {
                    stores.given_up = true;
                }
                self.idle = false;
                Ok(())
            }
            Ok(Frame::Ping(number)) => {
                self.answer_ping(from, number).await;
                Ok(())
            }
            Ok(other) => {
                tracing::warn!(frame = crate::link::io::frame_name(&other), "has no place here");
                Ok(())
            }
            Err(error) => self.lose_lane(from, &error).await,
        }
    }

    async fn lose_lane(&mut self, from: Purpose, error: &LinkError) -> Result<(), Failure> {
        match error {
            // As it does when nothing is wanted of it any more.
            LinkError::Closed => tracing::info!("the source closed a connection for pages"),
            error => {
                tracing::warn!(%error, "a connection for pages broke; the source opens another")
            }
        }
        *self.lane(from) = None;
        self.ask_stores().await
    }
}
