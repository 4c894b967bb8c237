//! A gather that an agent before us began: QEMU says which pages it has, the journal where the others
//! are, and it goes on from there. The guest has stood still only where it missed a page.
//!
//! ```text
//!  QMP migrate-recover -> socket -> per block: RECV_BITMAP ->   <- its bitmap
//!                                   POSTCOPY_RESUME        ->   <- RESUME_ACK    -> RAM parts ..
//! ```
//!
//! (notes on QEMU's protocol: docs/migration in its sources, "postcopy recovery".)

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use lifeboat_scatter_gather::ledger::Where;
use lifeboat_scatter_gather::link::Frame;
use lifeboat_scatter_gather::page::PageAt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::{BATCH_PAGES, Event};
use crate::destination::arriving::{Arrived, gather};
use crate::qemu::stream::return_path::{Message, ReturnReader};
use crate::qemu::stream::{Command, RamLayout, Record, StreamWriter};
use crate::source::Failure;

/// How long QEMU may take for each of its answers.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// What each block's pages are to QEMU: 1 is "here".
type Bitmaps = Vec<Bytes>;

/// Takes up the stream to a QEMU that waits for it: asks what it has.
pub(in crate::destination) async fn shake_hands(
    qemu: &mut UnixStream,
    layout: &RamLayout,
) -> Result<Bitmaps, Failure> {
    let talking = tokio::time::timeout(ANSWER_LIMIT, ask_all(qemu, layout));
    let slow = || Failure::Slow { what: "take the guest's pages up again", limit: ANSWER_LIMIT };
    talking.await.map_err(|_| slow())?
}

async fn ask_all(qemu: &mut UnixStream, layout: &RamLayout) -> Result<Bitmaps, Failure> {
    let mut talk = Talk { qemu, answers: ReturnReader::new(layout.clone()), layout };
    let mut bitmaps = Vec::new();
    for (block, _) in (0_u16..).zip(layout.blocks()) {
        talk.say(Command::RecvBitmap { block }).await?;
        bitmaps.push(talk.bitmap(block).await?);
    }
    talk.say(Command::PostcopyResume).await?;
    loop {
        match talk.next().await? {
            Message::ResumeAck(1) => return Ok(bitmaps),
            Message::ResumeAck(_) => return Err(Failure::ArrivalEnded("it does not go on")),
            // Pages that it misses are known by its bitmaps.
            _ => {}
        }
    }
}

struct Talk<'a> {
    qemu: &'a mut UnixStream,
    answers: ReturnReader,
    layout: &'a RamLayout,
}

impl Talk<'_> {
    async fn say(&mut self, command: Command) -> Result<(), Failure> {
        let mut writer = StreamWriter::with_layout(self.layout.clone());
        writer.write(&Record::Command(command));
        for slice in writer.take() {
            self.qemu.write_all(&slice).await.map_err(Failure::Socket)?;
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Message, Failure> {
        loop {
            if let Some(message) = self.answers.read()? {
                return Ok(message);
            }
            let mut buffer = BytesMut::with_capacity(64 << 10);
            if self.qemu.read_buf(&mut buffer).await.map_err(Failure::Socket)? == 0 {
                return Err(Failure::ArrivalEnded("it closed the stream that was taken up"));
            }
            self.answers.feed(buffer.freeze());
        }
    }

    async fn bitmap(&mut self, wanted: u16) -> Result<Bytes, Failure> {
        loop {
            match self.next().await? {
                Message::ReceivedBitmap { block, bits } if block == wanted => return Ok(bits),
                _ => {}
            }
        }
    }
}

fn is_here(bitmaps: &Bitmaps, at: PageAt) -> bool {
    let bits = bitmaps.get(usize::from(at.block));
    let byte = bits.and_then(|bits| bits.get(at.page as usize / 8)).copied().unwrap_or(0);
    byte >> (at.page % 8) & 1 == 1
}

/// A guest as it stands: what QEMU has, and what was told of the rest. `ram`: the block whose pages
/// are elsewhere; of the others everything but zeroes was there before the guest ran.
pub(in crate::destination) fn arrived_again(
    layout: RamLayout,
    ram: u16,
    bitmaps: &Bitmaps,
    told: &[Frame],
) -> Result<Arrived, Failure> {
    let mut gather = gather(&layout, BATCH_PAGES)?;
    let mut ignored = Vec::new();
    for (block, named) in (0_u16..).zip(layout.blocks()) {
        let place = if block == ram { Where::AtSource } else { Where::Zero };
        for page in 0..named.pages {
            gather.apply(Event::Noted(PageAt { block, page }, place), &mut ignored)?;
        }
    }
    for frame in told {
        let Frame::Notes(notes) = frame else { continue };
        for at in notes.iter().filter(|note| note.zero).flat_map(|note| note.run.pages()) {
            gather.apply(Event::Noted(at, Where::Zero), &mut ignored)?;
        }
    }
    gather.apply(Event::Complete, &mut ignored)?;
    let mut elsewhere = 0;
    for (block, named) in (0_u16..).zip(layout.blocks()) {
        for at in (0..named.pages).map(|page| PageAt { block, page }) {
            if is_here(bitmaps, at) {
                gather.apply(Event::Came(at), &mut ignored)?;
            } else {
                elsewhere += u64::from(gather.ledger().find(at) == Ok(Where::AtSource));
            }
        }
    }
    gather.apply(Event::Loaded, &mut ignored)?;
    Ok(Arrived {
        machine: String::new(),
        fields: Vec::new(),
        layout,
        ram,
        devices: Bytes::new(),
        gather,
        in_hand: Default::default(),
        notes: Vec::new(),
        elsewhere,
        key: None,
    })
}
