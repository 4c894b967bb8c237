//! Packs: what is put in comes out, page by page or as a whole; nothing that was changed does; no
//! bytes panic.

use bytes::BytesMut;
use lifeboat_protocol::ids::MigrationId;
use proptest::prelude::*;

use super::*;
use crate::page::{PAGE_BYTES, Version};
use crate::seal::{KEY_BYTES, MigrationKey, MigrationTag};

fn tag() -> MigrationTag {
    MigrationTag::new(&MigrationId::new("m1").unwrap())
}

fn both(sealed: bool) -> (Coder, Reading) {
    if !sealed {
        return (Coder::Plain(Version(0)), Reading { migration: tag(), opener: None });
    }
    let key = MigrationKey::new([1; KEY_BYTES]);
    let reading = Reading { migration: tag(), opener: Some(key.opener(tag())) };
    (Coder::Sealed(key.into_sealers(tag(), 1).remove(0)), reading)
}

/// What is put into packs: a page filled with a byte, or a page of zeroes.
fn inputs() -> impl Strategy<Value = Vec<(PageAt, Option<u8>)>> {
    let at = (0_u16..3, 0_u32..60).prop_map(|(block, page)| PageAt { block, page });
    prop::collection::vec((at, any::<Option<u8>>()), 0..200)
}

fn packed(builder: &mut PackBuilder, inputs: &[(PageAt, Option<u8>)]) -> Vec<Pack> {
    let mut packs = Vec::new();
    for (index, (at, fill)) in inputs.iter().enumerate() {
        // Now and then pages are compressed, as with a source that has time for it in between.
        if index % 7 == 3 {
            builder.compress(index % 2 == 1);
        }
        while builder.is_full() {
            packs.extend(builder.finish());
        }
        match fill {
            Some(fill) => drop(builder.page(*at, &[*fill; PAGE_BYTES]).unwrap()),
            None => drop(builder.zero(*at).unwrap()),
        }
    }
    packs.extend(std::iter::from_fn(|| builder.finish()));
    packs
}

/// The newest content of each page, as an index would be rebuilt from packs in any order.
fn rebuilt(reading: &Reading, packs: &[Pack]) -> std::collections::BTreeMap<PageAt, Option<u8>> {
    let mut newest = std::collections::BTreeMap::new();
    let mut note = |at, version, content| {
        let entry = newest.entry(at).or_insert((version, content));
        if version >= entry.0 {
            *entry = (version, content);
        }
    };
    for pack in packs.iter().rev() {
        let contents = reading.pack(pack.id, BytesMut::from(&pack.bytes[..])).unwrap();
        for page in contents.pages {
            assert_eq!(page.data.len(), PAGE_BYTES);
            assert!(page.data.iter().all(|byte| *byte == page.data[0]));
            note(page.at, page.version, Some(page.data[0]));
        }
        for run in contents.zeroes {
            for back in 0..run.count {
                let at = PageAt { block: run.block, page: run.first + run.count - 1 - back };
                note(at, Version(run.version.0 - u64::from(back)), None);
            }
        }
    }
    newest.into_iter().map(|(at, (_, content))| (at, content)).collect()
}

proptest! {
    #[test]
    fn an_index_is_rebuilt_from_packs_alone(
        inputs in inputs(),
        batch in 1_u16..20,
        sealed in any::<bool>(),
    ) {
        let (coder, reading) = both(sealed);
        let mut builder = PackBuilder::new(tag(), Batch::new(batch).unwrap(), coder, PackId(5));
        let packs = packed(&mut builder, &inputs);
        let mut numbers: Vec<u64> = packs.iter().map(|pack| pack.id.0).collect();
        numbers.sort_unstable();
        prop_assert!(numbers.into_iter().eq(5..5 + packs.len() as u64));
        let most = pack_bytes_most(Batch::new(batch).unwrap(), sealed);
        prop_assert!(packs.iter().all(|pack| pack.bytes.len() <= most));
        let expected = inputs.iter().copied().collect();
        prop_assert_eq!(rebuilt(&reading, &packs), expected);
    }

    #[test]
    fn a_changed_byte_is_noticed(
        inputs in inputs().prop_filter("something to change", |inputs| !inputs.is_empty()),
        sealed in any::<bool>(),
        at in any::<prop::sample::Index>(),
        change in 1_u8..=255,
    ) {
        let (coder, reading) = both(sealed);
        let mut builder = PackBuilder::new(tag(), Batch::new(9).unwrap(), coder, PackId(0));
        let pack = packed(&mut builder, &inputs).remove(0);
        let mut bytes = BytesMut::from(&pack.bytes[..]);
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        prop_assert!(reading.pack(pack.id, bytes).is_err());
    }

    #[test]
    fn any_bytes_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        headed in any::<bool>(),
        sealed in any::<bool>(),
    ) {
        let (_, reading) = both(sealed);
        let mut whole = BytesMut::new();
        if headed {
            whole.extend_from_slice(&MAGIC);
            whole.extend_from_slice(&[FORMAT, sealed.into()]);
        }
        whole.extend_from_slice(&bytes);
        prop_assert!(reading.pack(PackId(0), whole.clone()).is_err());
        let at = PageAt { block: 0, page: 0 };
        prop_assert!(reading.slot(0, (0, Width::WHOLE), at, whole).is_err());
        let long = BytesMut::from(&[bytes.first().copied().unwrap_or(1); 4136][..]);
        let _ = reading.slot(0, (0, Width::WHOLE), at, long);
    }
}

#[test]
fn one_page_is_read_without_its_pack() {
    for sealed in [false, true] {
        let (coder, reading) = both(sealed);
        let mut builder = PackBuilder::new(tag(), Batch::default(), coder, PackId(0));
        for page in 0..5 {
            let at = PageAt { block: 2, page };
            let slot = builder.page(at, &[page as u8; PAGE_BYTES]).unwrap();
            assert_eq!((slot.pack, slot.slot), (PackId(0), page as u16));
        }
        let pack = builder.finish().unwrap();
        let start = Width::WHOLE.slot_offset(3, sealed);
        let bytes = &pack.bytes[start..start + Width::WHOLE.slot_bytes(sealed)];
        let at = PageAt { block: 2, page: 3 };
        let page = reading.slot(0, (3, Width::WHOLE), at, BytesMut::from(bytes)).unwrap();
        assert_eq!(page.data[..], [3; PAGE_BYTES]);
        let other = PageAt { block: 2, page: 4 };
        let wrong = reading.slot(0, (3, Width::WHOLE), other, BytesMut::from(bytes));
        assert_eq!(wrong, Err(PackError::OtherPage { found: at, wanted: other }));
    }
}

#[test]
fn a_compressed_page_is_read_without_its_pack() {
    for sealed in [false, true] {
        let (coder, reading) = both(sealed);
        let mut builder = PackBuilder::new(tag(), Batch::default(), coder, PackId(0));
        builder.compress(true);
        let page = |number: u32| [number as u8; PAGE_BYTES];
        let slots: Vec<Slot> = (0..Width::LEAST.slots_most(Batch::default(), sealed).into())
            .map(|number| builder.page(PageAt { block: 2, page: number }, &page(number)).unwrap())
            .collect();
        assert!(builder.is_full());
        let pack = builder.finish().unwrap();
        assert_eq!((pack.width, usize::from(pack.slots)), (Width::LEAST, slots.len()));
        assert!(pack.bytes.len() <= pack_bytes_most(Batch::default(), sealed));
        let Slot { slot, width, .. } = slots[70];
        let start = width.slot_offset(slot, sealed);
        let bytes = BytesMut::from(&pack.bytes[start..start + width.slot_bytes(sealed)]);
        let at = PageAt { block: 2, page: 70 };
        let read = reading.slot(0, (slot, width), at, bytes.clone()).unwrap();
        assert_eq!(read.data[..], page(70));
        let wrong = reading.slot(0, (slot, Width::WHOLE), at, bytes);
        assert!(matches!(wrong, Err(PackError::Length { .. })));
    }
}

#[test]
fn a_pack_in_anothers_place_is_refused() {
    let (coder, reading) = both(true);
    let mut builder = PackBuilder::new(tag(), Batch::default(), coder, PackId(0));
    builder.page(PageAt { block: 0, page: 0 }, &[7; PAGE_BYTES]).unwrap();
    let bytes = BytesMut::from(&builder.finish().unwrap().bytes[..]);
    let refused = |reading: &Reading, id| reading.pack(id, bytes.clone()).unwrap_err();
    assert_eq!(refused(&reading, PackId(1)), PackError::Other(PackId(1)));
    let plain = Reading { migration: tag(), opener: None };
    assert_eq!(refused(&plain, PackId(0)), PackError::Other(PackId(0)));
    let migration = MigrationTag::new(&MigrationId::new("m2").unwrap());
    let other = Reading { migration, opener: reading.opener };
    assert_eq!(refused(&other, PackId(0)), PackError::Other(PackId(0)));
}

#[test]
fn a_pack_of_zeroes_carries_no_page() {
    let (coder, _) = both(true);
    let mut builder = PackBuilder::new(tag(), Batch::default(), coder, PackId(0));
    for page in 0..1000 {
        builder.zero(PageAt { block: 0, page }).unwrap();
    }
    let pack = builder.finish().unwrap();
    assert_eq!((pack.slots, pack.bytes.len()), (0, HEADER_BYTES + RUN_BYTES));
    assert_eq!(builder.finish(), None, "an empty pack is none");
}

#[test]
fn the_default_pack_fills_its_allocation_class() {
    let most = pack_bytes_most(Batch::default(), true);
    // Redis adds a string header of 17 bytes and a key's entry elsewhere.
    assert!((255 << 10..(256 << 10) - 64).contains(&most), "{most}");
}
