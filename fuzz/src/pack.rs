//! Packs of pages as they lie in stores: what was packed is read again, what was changed is noticed,
//! and what somebody made up, with checks that fit, is refused or read without harm.
//!
//! An input is a list of pages, then what to change. Where it begins with a pack's magic it is a pack as
//! a store might give it back; its checks, which nobody would guess, are made to fit first.

use bytes::BytesMut;
use lifeboat_protocol::ids::MigrationId;
use lifeboat_scatter_gather::pack::{Batch, Coder, Pack, PackBuilder, Reading, Width};
use lifeboat_scatter_gather::page::{PAGE_BYTES, PackId, PageAt, Version};
use lifeboat_scatter_gather::seal::{KEY_BYTES, MigrationKey, MigrationTag};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64, xxh3_64_with_seed};

const MAGIC: &[u8] = b"LBPK";
/// See the format in `scatter-gather/src/pack/mod.rs`.
const HEADER_BYTES: usize = 48;
const CHECKED_BYTES: usize = 40;
const SLOT_HEAD_BYTES: usize = 24;
const SLOT_CHECKED_BYTES: usize = 16;

/// Whatever is packed, and whatever a store gives back.
///
/// # Panics
/// Where something does not hold.
pub fn holds(data: &[u8]) {
    if data.starts_with(MAGIC) {
        return made_up(data);
    }
    let Some((how, rest)) = data.split_first() else { return };
    let (sealed, compress) = (how & 1 != 0, how & 2 != 0);
    let pages = usize::from(how >> 2);
    let (pages, change) = rest.split_at(rest.len().min(pages * 4));
    let (kept, pack) = packed(pages, sealed, compress);
    let Some(pack) = pack else { return };
    let reading = reading(sealed);
    let contents = reading.pack(pack.id, BytesMut::from(&pack.bytes[..])).expect("it was packed");
    let read: Vec<_> = contents.pages.iter().map(|page| (page.at, page.data[0])).collect();
    assert_eq!(read, kept, "what was packed is read again");
    changed(&reading, &pack, change, sealed);
}

/// Each page with what it is filled with.
type Kept = Vec<(PageAt, u8)>;

fn packed(pages: &[u8], sealed: bool, compress: bool) -> (Kept, Option<Pack>) {
    let coder = match sealed {
        true => Coder::Sealed(MigrationKey::new([7; KEY_BYTES]).into_sealers(tag(), 1).remove(0)),
        false => Coder::Plain(Version(0)),
    };
    let mut builder = PackBuilder::new(tag(), Batch::default(), coder, PackId(5));
    builder.compress(compress);
    let mut kept = Vec::new();
    for page in pages.chunks_exact(4) {
        let at = PageAt {
            block: (page[0] & 3).into(),
            page: u16::from_be_bytes([page[1], page[2]]).into(),
        };
        if builder.is_full() {
            break;
        }
        match page[3] {
            0 => drop(builder.zero(at).expect("it is not full")),
            fill => {
                builder.page(at, &[fill; PAGE_BYTES]).expect("it is not full");
                kept.push((at, fill));
            }
        }
    }
    (kept, builder.finish())
}

/// One byte of it is another.
fn changed(reading: &Reading, pack: &Pack, change: &[u8], sealed: bool) {
    let &[high, middle, low, with, ..] = change else { return };
    let mut bytes = BytesMut::from(&pack.bytes[..]);
    let at = u32::from_be_bytes([0, high, middle, low]) as usize % bytes.len();
    bytes[at] ^= with;
    let width = pack.width;
    let slot = at.checked_sub(HEADER_BYTES).map(|at| at / width.slot_bytes(sealed));
    let alone = slot.filter(|slot| *slot < usize::from(pack.slots)).map(|slot| {
        let (slot, from) = (slot as u16, width.slot_offset(slot as u16, sealed));
        (slot, BytesMut::from(&bytes[from..from + width.slot_bytes(sealed)]))
    });
    assert_eq!(reading.pack(pack.id, bytes).is_ok(), with == 0, "a byte was changed at {at}");
    if let Some((slot, bytes)) = alone {
        // Which page it should be is the first thing that its reader knows.
        let whole = reading.pack(pack.id, BytesMut::from(&pack.bytes[..])).expect("it was packed");
        let wanted = whole.pages[usize::from(slot)].at;
        assert_eq!(reading.slot(0, (slot, width), wanted, bytes).is_ok(), with == 0);
    }
}

/// A pack that a store has made up.
fn made_up(data: &[u8]) {
    let mut bytes = BytesMut::from(data);
    fit(&mut bytes);
    let (plain, sealed) = (reading(false), reading(true));
    for reading in [&plain, &sealed] {
        if let Ok(contents) = reading.pack(PackId(5), bytes.clone()) {
            assert!(contents.pages.len() * Width::LEAST.body_bytes() <= bytes.len());
            assert!(contents.pages.iter().all(|page| page.data.len() == PAGE_BYTES));
        }
    }
    let wanted = PageAt { block: 0, page: 1 };
    for width in Width::all() {
        let of = |reading: &Reading| reading.slot(0, (0, width), wanted, bytes.clone()).is_ok();
        let _ = (of(&plain), of(&sealed));
    }
}

/// Makes the checks of a plain pack fit, as whoever has made it up would.
fn fit(bytes: &mut BytesMut) {
    if bytes.len() < HEADER_BYTES {
        return;
    }
    // Of the migration that it is read for: what one of our own says.
    if let (_, Some(own)) = packed(&[0, 0, 1, 1], false, false) {
        bytes[24..CHECKED_BYTES].copy_from_slice(&own.bytes[24..CHECKED_BYTES]);
    }
    let slots = usize::from(u16::from_be_bytes([bytes[6], bytes[7]]));
    let width = Width::eighths(bytes[11]).unwrap_or_default();
    let runs = (HEADER_BYTES + slots * width.slot_bytes(false)).min(bytes.len());
    for slot in bytes[HEADER_BYTES..runs].chunks_exact_mut(width.slot_bytes(false)) {
        let seed = xxh3_64(&slot[..SLOT_CHECKED_BYTES]);
        let check = xxh3_64_with_seed(&slot[SLOT_HEAD_BYTES..], seed);
        slot[SLOT_CHECKED_BYTES..SLOT_HEAD_BYTES].copy_from_slice(&check.to_be_bytes());
    }
    let mut hash = Xxh3Default::new();
    hash.update(&bytes[..CHECKED_BYTES]);
    hash.update(&bytes[runs..]);
    let check = hash.digest();
    bytes[CHECKED_BYTES..HEADER_BYTES].copy_from_slice(&check.to_be_bytes());
}

/// The migration whose packs these are.
///
/// # Panics
/// Never: it has a name.
#[must_use]
pub fn tag() -> MigrationTag {
    MigrationTag::new(&MigrationId::new("fuzz").expect("a short name"))
}

fn reading(sealed: bool) -> Reading {
    let opener = sealed.then(|| MigrationKey::new([7; KEY_BYTES]).opener(tag()));
    Reading { migration: tag(), opener }
}
