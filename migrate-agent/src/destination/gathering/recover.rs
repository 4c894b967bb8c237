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
use lifeboat_scatter_gather::link::pages::PageRun;
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

/// A stream to QEMU that was taken up.
pub(in crate::destination) struct TakenUp {
    /// Which pages it has.
    pub(in crate::destination) bitmaps: Bitmaps,
    /// Its answers, read as far as they were needed: the next request may be of the block that the last
    /// one named, and may be here by half.
    pub(in crate::destination) answers: ReturnReader,
    /// What the guest waits for: QEMU asks for it again before it says that it goes on.
    pub(in crate::destination) wanted: Vec<PageAt>,
}

/// Takes up the stream to a QEMU that waits for it: asks what it has.
pub(in crate::destination) async fn shake_hands(
    qemu: &mut UnixStream,
    layout: &RamLayout,
) -> Result<TakenUp, Failure> {
    let talking = tokio::time::timeout(ANSWER_LIMIT, ask_all(qemu, layout));
    let slow = || Failure::Slow { what: "take the guest's pages up again", limit: ANSWER_LIMIT };
    talking.await.map_err(|_| slow())?
}

async fn ask_all(qemu: &mut UnixStream, layout: &RamLayout) -> Result<TakenUp, Failure> {
    let answers = ReturnReader::new(layout.clone());
    let mut talk = Talk { qemu, answers, layout, wanted: Vec::new() };
    let mut bitmaps = Vec::new();
    for (block, _) in (0_u16..).zip(layout.blocks()) {
        talk.say(Command::RecvBitmap { block }).await?;
        bitmaps.push(talk.bitmap(block).await?);
    }
    talk.say(Command::PostcopyResume).await?;
    loop {
        match talk.next().await? {
            Message::ResumeAck(1) => {
                let Talk { answers, wanted, .. } = talk;
                return Ok(TakenUp { bitmaps, answers, wanted });
            }
            Message::ResumeAck(_) => return Err(Failure::ArrivalEnded("it does not go on")),
            _ => {}
        }
    }
}

struct Talk<'a> {
    qemu: &'a mut UnixStream,
    answers: ReturnReader,
    layout: &'a RamLayout,
    wanted: Vec<PageAt>,
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
            match self.answers.read()? {
                Some(Message::RequestPages { block, range }) => {
                    let pages = range.first..range.first + range.count;
                    self.wanted.extend(pages.map(|page| PageAt { block, page }));
                    continue;
                }
                Some(message) => return Ok(message),
                None => {}
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
        let all = PageRun { block, first: 0, count: named.pages };
        gather.apply(Event::NotedRun(all, place), &mut ignored)?;
    }
    for frame in told {
        let Frame::Notes(notes) = frame else { continue };
        for note in notes.iter().filter(|note| note.zero) {
            gather.apply(Event::NotedRun(note.run, Where::Zero), &mut ignored)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::stream::RamBlock;
    use crate::qemu::stream::return_path::{bitmap_bytes, encode};

    /// QEMU asks again for what its guest waits for, by name, before it says that it goes on; the
    /// next request may come in the same breath, without a name, and be cut in two.
    #[tokio::test]
    async fn what_is_asked_for_while_hands_are_shaken_is_not_lost() {
        let block = |name: &str| RamBlock { name: name.to_owned(), pages: 64 };
        let layout = RamLayout::new(vec![block("pc.bios"), block("pc.ram")], 0).unwrap();
        let (mut ours, mut qemu) = UnixStream::pair().unwrap();
        let mut said = BytesMut::new();
        for block in 0..2 {
            let bits = Bytes::from(vec![0xf0; bitmap_bytes(64)]);
            encode(&Message::ReceivedBitmap { block, bits }, &layout, &mut said);
        }
        let range = |first| crate::qemu::stream::PageRange { first, count: 1 };
        encode(&Message::RequestPages { block: 1, range: range(7) }, &layout, &mut said);
        encode(&Message::ResumeAck(1), &layout, &mut said);
        let nameless = b"\0\x04\0\x0c\0\0\0\0\0\0\x10\0\0\0\x10\0";
        said.extend_from_slice(&nameless[..9]);
        qemu.write_all(&said).await.unwrap();
        let mut taken = shake_hands(&mut ours, &layout).await.unwrap();
        assert_eq!(taken.wanted, [PageAt { block: 1, page: 7 }]);
        assert!(is_here(&taken.bitmaps, PageAt { block: 1, page: 4 }));
        taken.answers.feed(Bytes::from_static(&nameless[9..]));
        let next = taken.answers.read().unwrap();
        assert_eq!(next, Some(Message::RequestPages { block: 1, range: range(1) }));
    }
}
