//! The words of the page link that are about single pages: which there are, which are wanted, and
//! where they wait. Bytes to words and back; pure. Used by [`super::frame`], which frames them.
//!
//! ```text
//!  NOTES   n x (kind u8 | block be16 | first be32 | count be32)        kind: 0 zero, 1 at the source
//!  FETCH   n x (block be16 | first be32 | count be32)
//!  PAGES   count be16 | n x (block be16 | page be32) | n x 4096 bytes
//!  COMPRESSED  length be32 | LZ4 block of a PAGES payload of that length
//!  PACK    pack be64 | width u8 | store u8 | kind u8 | value be64 | n x (block be16 | page be32)
//!          kind: 0 no protection, 1 mirrored in store `value`, 2 in stripe `value`
//!          block ffff: what is in this slot does not count
//! ```
//!
//! Whether a page is the guest's is for whoever keeps its ledger; here only lengths are checked.

use std::fmt;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::frame::PAYLOAD_BYTES_MAX;
use crate::pack::Width;
use crate::page::{PAGE_BYTES, PackId, PageAt};
use crate::redundancy::StoreId;
use crate::redundancy::directory::Protection;
use crate::seal::KEY_BYTES;

/// The most pages that one PAGES frame carries, and so the most that one FETCH may ask for.
pub const PAGES_MOST: usize = 250;
/// The most notes of one NOTES frame.
pub const NOTES_MOST: usize = 4096;
/// The most runs of one FETCH.
pub const RUNS_MOST: usize = PAGES_MOST;
/// The most slots of one announced pack: those of the largest batch.
pub const SLOTS_MOST: usize = crate::pack::Batch::MOST as usize;

const NOTE_BYTES: usize = 11;
const RUN_BYTES: usize = 10;
const AT_BYTES: usize = 6;
const PACK_HEAD_BYTES: usize = 8 + 1 + 1 + 1 + 8;
const LENGTH_BYTES: usize = 4;
/// The block of a slot that does not count: no guest has so many.
const NO_BLOCK: u16 = u16::MAX;

/// Some pages in a row of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// The block.
    pub block: u16,
    /// The first page.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl PageRun {
    /// Its pages, in order; what lies beyond the last number that a page can have is left out.
    pub fn pages(self) -> impl Iterator<Item = PageAt> {
        let block = self.block;
        (self.first..self.first.saturating_add(self.count)).map(move |page| PageAt { block, page })
    }
}

/// Pages in ascending order as runs.
#[must_use]
pub fn runs(pages: &[PageAt]) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for at in pages {
        match runs.last_mut() {
            Some(run)
                if run.block == at.block && run.first.checked_add(run.count) == Some(at.page) =>
            {
                run.count += 1;
            }
            _ => runs.push(PageRun { block: at.block, first: at.page, count: 1 }),
        }
    }
    runs
}

/// What the source says of some pages before COMMIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Note {
    /// The pages.
    pub run: PageRun,
    /// They hold nothing but zeroes; otherwise the source has them.
    pub zero: bool,
}

/// A pack that stores have acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackNote {
    /// Its number.
    pub pack: PackId,
    /// How wide its slots are.
    pub width: Width,
    /// Where it is.
    pub store: StoreId,
    /// What protects it.
    pub protection: Protection,
    /// Its pages, by slot; `None` for one that was written to after it had been read, and is elsewhere.
    pub pages: Vec<Option<PageAt>>,
}

/// The key of a migration's pages, on its way to the destination.
#[derive(Clone, PartialEq, Eq)]
pub struct PageKey(pub [u8; KEY_BYTES]);

impl fmt::Debug for PageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PageKey(..)")
    }
}

/// Bytes of a payload, the most that each word may have.
pub(super) const fn notes_bytes_most() -> usize {
    NOTES_MOST * NOTE_BYTES
}

pub(super) const fn fetch_bytes_most() -> usize {
    RUNS_MOST * RUN_BYTES
}

pub(super) const fn pages_bytes_most() -> usize {
    2 + PAGES_MOST * (AT_BYTES + PAGE_BYTES)
}

pub(super) const fn pack_bytes_most() -> usize {
    PACK_HEAD_BYTES + SLOTS_MOST * AT_BYTES
}

const _: () = assert!(pages_bytes_most() <= PAYLOAD_BYTES_MAX);

fn put_run(run: PageRun, to: &mut BytesMut) {
    to.put_u16(run.block);
    to.put_u32(run.first);
    to.put_u32(run.count);
}

fn get_run(from: &mut Bytes) -> PageRun {
    PageRun { block: from.get_u16(), first: from.get_u32(), count: from.get_u32() }
}

fn put_at(at: PageAt, to: &mut BytesMut) {
    to.put_u16(at.block);
    to.put_u32(at.page);
}

fn get_at(from: &mut Bytes) -> PageAt {
    PageAt { block: from.get_u16(), page: from.get_u32() }
}

pub(super) fn encode_notes(notes: &[Note]) -> BytesMut {
    assert!(notes.len() <= NOTES_MOST, "a NOTES frame holds at most {NOTES_MOST} notes");
    let mut to = BytesMut::with_capacity(notes.len() * NOTE_BYTES);
    for note in notes {
        to.put_u8(u8::from(!note.zero));
        put_run(note.run, &mut to);
    }
    to
}

pub(super) fn decode_notes(mut from: Bytes) -> Option<Vec<Note>> {
    if !from.len().is_multiple_of(NOTE_BYTES) {
        return None;
    }
    let mut notes = Vec::with_capacity(from.len() / NOTE_BYTES);
    while from.has_remaining() {
        let zero = match from.get_u8() {
            0 => true,
            1 => false,
            _ => return None,
        };
        notes.push(Note { run: get_run(&mut from), zero });
    }
    Some(notes)
}

pub(super) fn encode_fetch(runs: &[PageRun]) -> BytesMut {
    assert!(runs.len() <= RUNS_MOST, "a FETCH frame holds at most {RUNS_MOST} runs");
    let mut to = BytesMut::with_capacity(runs.len() * RUN_BYTES);
    runs.iter().for_each(|run| put_run(*run, &mut to));
    to
}

pub(super) fn decode_fetch(mut from: Bytes) -> Option<Vec<PageRun>> {
    if !from.len().is_multiple_of(RUN_BYTES) {
        return None;
    }
    let (mut runs, mut pages) = (Vec::new(), 0_u64);
    while from.has_remaining() {
        let run = get_run(&mut from);
        pages += u64::from(run.count);
        runs.push(run);
    }
    // What is asked for at once must fit into one answer.
    (pages <= PAGES_MOST as u64).then_some(runs)
}

pub(super) fn encode_pages(pages: &[(PageAt, Bytes)]) -> BytesMut {
    assert!(pages.len() <= PAGES_MOST, "a PAGES frame holds at most {PAGES_MOST} pages");
    let mut to = BytesMut::with_capacity(2 + pages.len() * (AT_BYTES + PAGE_BYTES));
    to.put_u16(pages.len() as u16);
    pages.iter().for_each(|(at, _)| put_at(*at, &mut to));
    for (_, data) in pages {
        assert_eq!(data.len(), PAGE_BYTES, "a page has the size of a page");
        to.put_slice(data);
    }
    to
}

pub(super) fn decode_pages(mut from: Bytes) -> Option<Vec<(PageAt, Bytes)>> {
    if from.remaining() < 2 {
        return None;
    }
    let count = usize::from(from.get_u16());
    if count > PAGES_MOST || from.remaining() != count * (AT_BYTES + PAGE_BYTES) {
        return None;
    }
    let mut names = from.split_to(count * AT_BYTES);
    let page = |_| (get_at(&mut names), from.split_to(PAGE_BYTES));
    Some((0..count).map(page).collect())
}

/// The payload of a COMPRESSED frame with these pages; `None` where that would hardly be shorter.
///
/// # Panics
/// For more than [`PAGES_MOST`] pages, or what is no page.
#[must_use]
pub fn compressed(pages: &[(PageAt, Bytes)]) -> Option<Bytes> {
    let plain = encode_pages(pages);
    let most = LENGTH_BYTES + lz4_flex::block::get_maximum_output_size(plain.len());
    let mut to = BytesMut::zeroed(most);
    (&mut to[..LENGTH_BYTES]).put_u32(plain.len() as u32);
    let length = lz4_flex::block::compress_into(&plain, &mut to[LENGTH_BYTES..]).ok()?;
    to.truncate(LENGTH_BYTES + length);
    (to.len() <= plain.len() / 16 * 15).then(|| to.freeze())
}

/// The pages of a COMPRESSED frame's payload; `None` where it holds none.
#[must_use]
pub fn decompressed(mut payload: Bytes) -> Option<Vec<(PageAt, Bytes)>> {
    if payload.remaining() < LENGTH_BYTES {
        return None;
    }
    let length = payload.get_u32() as usize;
    // Stated by the peer: no more memory is taken than a PAGES frame may have.
    if length > pages_bytes_most() {
        return None;
    }
    let mut plain = BytesMut::zeroed(length);
    let found = lz4_flex::block::decompress_into(&payload, &mut plain).ok()?;
    (found == length).then(|| decode_pages(plain.freeze())).flatten()
}

pub(super) fn encode_pack(note: &PackNote) -> BytesMut {
    assert!(note.pages.len() <= SLOTS_MOST, "a pack has at most {SLOTS_MOST} slots");
    let mut to = BytesMut::with_capacity(PACK_HEAD_BYTES + note.pages.len() * AT_BYTES);
    to.put_u64(note.pack.0);
    to.put_u8(note.width.number());
    to.put_u8(note.store.0);
    let (kind, value) = match note.protection {
        Protection::None => (0, 0),
        Protection::Mirror(store) => (1, u64::from(store.0)),
        Protection::Stripe(stripe) => (2, stripe),
    };
    to.put_u8(kind);
    to.put_u64(value);
    let nothing = PageAt { block: NO_BLOCK, page: 0 };
    note.pages.iter().for_each(|at| put_at(at.unwrap_or(nothing), &mut to));
    to
}

pub(super) fn decode_pack(mut from: Bytes) -> Option<PackNote> {
    let slots = from.remaining().checked_sub(PACK_HEAD_BYTES)?;
    if !slots.is_multiple_of(AT_BYTES) {
        return None;
    }
    let (pack, width) = (PackId(from.get_u64()), Width::eighths(from.get_u8())?);
    let store = StoreId(from.get_u8());
    let (kind, value) = (from.get_u8(), from.get_u64());
    let protection = match kind {
        0 if value == 0 => Protection::None,
        1 => Protection::Mirror(StoreId(u8::try_from(value).ok()?)),
        2 => Protection::Stripe(value),
        _ => return None,
    };
    let slot = |at: PageAt| (at.block != NO_BLOCK).then_some(at);
    let pages = (0..slots / AT_BYTES).map(|_| slot(get_at(&mut from))).collect();
    Some(PackNote { pack, width, store, protection, pages })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_in_a_row_are_one_run() {
        let at = |block, page| PageAt { block, page };
        let pages = [at(0, 4), at(0, 5), at(0, 7), at(1, 8), at(1, 9)];
        let found = runs(&pages);
        let run = |block, first, count| PageRun { block, first, count };
        assert_eq!(found, [run(0, 4, 2), run(0, 7, 1), run(1, 8, 2)]);
        assert_eq!(found.into_iter().flat_map(PageRun::pages).collect::<Vec<_>>(), pages);
    }

    #[test]
    fn more_than_one_answer_holds_cannot_be_asked_for() {
        let ask = |count| encode_fetch(&[PageRun { block: 0, first: 1, count }]).freeze();
        assert!(decode_fetch(ask(PAGES_MOST as u32)).is_some());
        assert_eq!(decode_fetch(ask(PAGES_MOST as u32 + 1)), None);
        assert_eq!(decode_fetch(ask(u32::MAX)), None);
    }

    #[test]
    fn a_run_beyond_the_last_page_has_an_end() {
        let run = PageRun { block: 0, first: u32::MAX - 1, count: 9 };
        assert_eq!(run.pages().count(), 1);
    }

    #[test]
    fn pages_come_out_of_their_compression_as_they_went_in() {
        let page =
            |page, fill: u8| (PageAt { block: 1, page }, Bytes::from(vec![fill; PAGE_BYTES]));
        let pages: Vec<_> = (0..PAGES_MOST as u32).map(|n| page(n, n as u8)).collect();
        let bytes = compressed(&pages).expect("pages of one byte each");
        assert!(bytes.len() < PAGES_MOST * PAGE_BYTES / 50, "{}", bytes.len());
        assert_eq!(decompressed(bytes), Some(pages));
        let mut state = 1_u32;
        let noise = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        });
        let noise: Bytes = noise.take(PAGE_BYTES).collect();
        assert_eq!(compressed(&[(PageAt { block: 1, page: 1 }, noise)]), None);
    }

    #[test]
    fn no_more_is_decompressed_than_one_answer_holds() {
        let stated = |length: u32, plain: &[u8]| {
            let mut payload = BytesMut::new();
            payload.put_u32(length);
            payload.put_slice(&lz4_flex::block::compress(plain));
            decompressed(payload.freeze())
        };
        let one = encode_pages(&[(PageAt { block: 0, page: 1 }, Bytes::from(vec![1; PAGE_BYTES]))]);
        assert!(stated(one.len() as u32, &one).is_some());
        assert_eq!(stated(one.len() as u32 - 1, &one), None, "more than was stated");
        assert_eq!(stated(one.len() as u32 + 1, &one), None, "less than was stated");
        assert_eq!(stated(u32::MAX, &one), None);
        assert_eq!(stated(pages_bytes_most() as u32 + 1, &vec![0; pages_bytes_most() + 1]), None);
        assert_eq!(decompressed(Bytes::from_static(&[0, 0])), None);
    }

    #[test]
    fn the_key_is_not_printed() {
        assert_eq!(format!("{:?}", PageKey([7; KEY_BYTES])), "PageKey(..)");
    }
}
