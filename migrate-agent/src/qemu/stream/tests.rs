//! Properties of the stream's codec: what is written is what is read, however the bytes are cut;
//! no bytes make it panic or hold more than it was given; what is not carried is refused by name.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::arbitrary::{layouts, messages, streams};
use super::compose::joined;
use super::return_path::{Message, ReturnReader, encode};
use super::*;

/// Reads `bytes` in pieces of these lengths, over and over; pieces of devices' state are joined.
pub(super) fn read_all(bytes: &Bytes, pieces: &[usize]) -> (Vec<Record>, Result<(), StreamError>) {
    let (mut reader, mut records) = (StreamReader::new(), Vec::new());
    let (mut rest, mut piece) = (bytes.clone(), pieces.iter().cycle());
    loop {
        match reader.read() {
            Ok(Some(Record::DeviceState(more))) => add_state(&mut records, &more),
            Ok(Some(record)) => records.push(record),
            Ok(None) if rest.is_empty() => return (records, reader.finish()),
            Ok(None) => {
                let length = piece.next().copied().unwrap_or(rest.len()).clamp(1, rest.len());
                reader.feed(rest.split_to(length));
            }
            Err(error) => {
                assert_eq!(reader.read(), Err(error.clone()), "an error stays");
                return (records, Err(error));
            }
        }
        assert!(reader.waiting() <= bytes.len(), "more is held than was given");
    }
}

fn add_state(records: &mut Vec<Record>, more: &Bytes) {
    match records.last_mut() {
        Some(Record::DeviceState(state)) => {
            *state = joined(&[state.clone(), more.clone()]);
        }
        _ => records.push(Record::DeviceState(more.clone())),
    }
}

pub(super) fn write_all(records: &[Record]) -> Bytes {
    let mut writer = StreamWriter::new();
    records.iter().for_each(|record| writer.write(record));
    let length = writer.length();
    let whole = joined(&writer.take());
    assert_eq!((length, writer.length()), (whole.len(), 0));
    whole
}

fn read_messages(bytes: &Bytes, layout: &RamLayout, piece: usize) -> Vec<Message> {
    let (mut reader, mut found) = (ReturnReader::new(layout.clone()), Vec::new());
    let mut rest = bytes.clone();
    loop {
        match reader.read() {
            Ok(Some(message)) => found.push(message),
            Ok(None) if rest.is_empty() => return found,
            Ok(None) => reader.feed(rest.split_to(piece.clamp(1, rest.len()))),
            Err(error) => panic!("{error}"),
        }
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_however_it_is_cut(
        records in streams(),
        pieces in prop::collection::vec(1_usize..6000, 1..5),
    ) {
        let bytes = write_all(&records);
        let (found, end) = read_all(&bytes, &pieces);
        prop_assert_eq!(end, Ok(()));
        prop_assert_eq!(&found, &records);
        prop_assert_eq!(write_all(&found), bytes);
    }

    #[test]
    fn a_stream_that_stops_early_is_cut_and_never_refused(
        records in streams(),
        at in any::<prop::sample::Index>(),
    ) {
        let whole = write_all(&records);
        let part = whole.slice(..at.index(whole.len()));
        let (found, end) = read_all(&part, &[4096]);
        let in_tail = matches!(found.last(), Some(Record::DeviceState(_)));
        let at_tail = end.is_ok() && matches!(found.last(), Some(Record::Footer { .. }));
        prop_assert!(
            in_tail || at_tail || matches!(end, Err(StreamError::Cut { .. })),
            "{end:?}"
        );
    }

    #[test]
    fn changed_bytes_never_panic(
        records in streams(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        piece in 1_usize..5000,
    ) {
        let mut bytes = BytesMut::from(&write_all(&records)[..]);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = read_all(&bytes.freeze(), &[piece]);
    }

    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), begun in any::<bool>()) {
        let mut whole = BytesMut::new();
        if begun {
            whole.extend_from_slice(&write_all(&[
                Record::Header,
                Record::Configuration { machine: "pc".to_owned() },
            ]));
        }
        whole.extend_from_slice(&bytes);
        let _ = read_all(&whole.freeze(), &[7]);
        let _ = tail::split(&bytes);
        let layout = RamLayout::new(vec![RamBlock { name: "pc.ram".to_owned(), pages: 3 }], 0);
        let mut reader = ReturnReader::new(layout.unwrap());
        reader.feed(bytes.into());
        while let Ok(Some(_)) = reader.read() {}
    }

    #[test]
    fn answers_are_read_as_they_were_written(
        (layout, sent) in layouts().prop_flat_map(|layout| {
            let sent = prop::collection::vec(messages(layout.clone()), 0..6);
            (Just(layout), sent)
        }),
        piece in 1_usize..300,
    ) {
        let mut bytes = BytesMut::new();
        sent.iter().for_each(|message| encode(message, &layout, &mut bytes));
        prop_assert_eq!(read_messages(&bytes.freeze(), &layout, piece), sent);
    }

    #[test]
    fn discards_cover_exactly_what_is_absent(
        layout in layouts(),
        absent in prop::collection::btree_set((0_u16..4, 0_u32..5000), 0..300),
    ) {
        let inside = |at: &PageAt| {
            layout.blocks().get(usize::from(at.block)).is_some_and(|b| at.page < b.pages)
        };
        let absent: Vec<PageAt> = absent
            .into_iter()
            .map(|(block, page)| PageAt { block, page })
            .filter(inside)
            .collect();
        let mut writer = StreamWriter::new();
        compose::opening(&mut writer, "pc", &[], &layout);
        compose::discards(&mut writer, absent.iter().copied());
        let (records, _) = read_all(&joined(&writer.take()), &[100_000]);
        let found: Vec<PageAt> = records.iter().flat_map(discarded).collect();
        prop_assert_eq!(found, absent);
    }
}

fn discarded(record: &Record) -> Vec<PageAt> {
    let Record::Command(Command::RamDiscard { block, ranges }) = record else { return Vec::new() };
    let page = |page| PageAt { block: *block, page };
    ranges.iter().flat_map(|r| (r.first..r.first + r.count).map(page)).collect()
}

/// The opening of a stream with one block of two pages, then `more`.
fn after_opening(more: &[u8]) -> Result<(), StreamError> {
    let mut writer = StreamWriter::new();
    let blocks = vec![RamBlock { name: "pc.ram".to_owned(), pages: 2 }];
    compose::opening(&mut writer, "pc", &[], &RamLayout::new(blocks, 0).unwrap());
    let opening = joined(&writer.take());
    let length = opening.len() as u64;
    let (_, end) = read_all(&joined(&[opening, Bytes::copy_from_slice(more)]), &[64]);
    end.map_err(|error| relative(error, length))
}

/// The same error with its place counted from where the opening ended.
fn relative(error: StreamError, start: u64) -> StreamError {
    use StreamError as E;
    match error {
        E::Unknown { what, value, at } => E::Unknown { what, value, at: at - start },
        E::OutOfPlace { what, at } => E::OutOfPlace { what, at: at - start },
        E::Field { what, value, at } => E::Field { what, value, at: at - start },
        E::NoSuchBlock { name, at } => E::NoSuchBlock { name, at: at - start },
        E::OutsideBlock { block, page, pages, at } => {
            E::OutsideBlock { block, page, pages, at: at - start }
        }
        other => other,
    }
}

#[test]
fn what_is_not_carried_is_refused_by_name() {
    let unsupported = |feature| Err(StreamError::Unsupported(feature));
    let early = b"\x04\0\0\0\x03\x0avirtio-mem\0\0\0\0\0\0\0\x01";
    assert_eq!(after_opening(early), unsupported(Feature::EarlyDevice("virtio-mem".to_owned())));
    let vfio = b"\x01\0\0\0\x09\x04vfio\0\0\0\0\0\0\0\x01";
    assert_eq!(after_opening(vfio), unsupported(Feature::LiveSection("vfio".to_owned())));
    let bitmaps = b"\x01\0\0\0\x09\x0cdirty-bitmap\0\0\0\0\0\0\0\x01";
    assert_eq!(after_opening(bitmaps), unsupported(Feature::DirtyBitmaps));
    assert_eq!(after_opening(b"\x08\0\x08\0\0"), unsupported(Feature::Colo));
    assert_eq!(after_opening(b"\x08\0\x03\0\0"), unsupported(Feature::DirtyBitmaps));
    let huge = b"\x08\0\x03\0\x10\0\0\0\0\0\x20\x10\0\0\0\0\0\0\0\x10\0";
    assert_eq!(after_opening(huge), unsupported(Feature::HugePages(0x20_1000)));
    for (flags, feature) in [
        (0x40_u64, Feature::Xbzrle),
        (0x60, Feature::Xbzrle),
        (0x80, Feature::Rdma),
        (0x120, Feature::Compress),
        (0x200, Feature::Multifd),
    ] {
        let bytes = [b"\x02\0\0\0\x02", &flags.to_be_bytes()[..]].concat();
        assert_eq!(after_opening(&bytes), unsupported(feature));
    }
}

#[test]
fn what_makes_no_sense_is_refused_with_its_place() {
    use StreamError::{Field, NoSuchBlock, OutOfPlace, OutsideBlock, Unknown};
    let page = |word: u64, name: &str| {
        let head = [b"\x02\0\0\0\x02", &word.to_be_bytes()[..]].concat();
        after_opening(&[&head[..], &[name.len() as u8], name.as_bytes(), &[0; 4096]].concat())
    };
    let unknown = |what, value, at| Err(Unknown { what, value, at });
    assert_eq!(page(0x400, ""), unknown("RAM flags", 0x400, 5));
    assert_eq!(page(0x0a, "pc.ram"), unknown("RAM flags", 0x0a, 5));
    assert_eq!(page(0x1010, ""), unknown("RAM flags", 0x10, 5));
    assert_eq!(after_opening(b"\x09"), unknown("section type", 9, 0));
    assert_eq!(after_opening(b"\x08\0\x0c\0\0"), unknown("command", 12, 0));
    let nameless = Err(OutOfPlace { what: "a page of the same block", at: 5 });
    assert_eq!(page(0x28, ""), nameless);
    assert_eq!(page(8, "vram"), Err(NoSuchBlock { name: "vram".to_owned(), at: 5 }));
    let outside = OutsideBlock { block: "pc.ram".to_owned(), page: 2, pages: 2, at: 5 };
    assert_eq!(page(0x2008, "pc.ram"), Err(outside));
    let last = OutsideBlock { block: "pc.ram".to_owned(), page: u64::MAX >> 12, pages: 2, at: 5 };
    assert_eq!(page(!0xfff | 8, "pc.ram"), Err(last));
    assert_eq!(after_opening(b"\0"), Err(OutOfPlace { what: "the end of the stream", at: 0 }));
    let other = Err(Field { what: "a section's number", value: 7, at: 0 });
    assert_eq!(after_opening(b"\x02\0\0\0\x07"), other);
    let package = Err(Field { what: "a package's length", value: u32::MAX.into(), at: 0 });
    assert_eq!(after_opening(b"\x08\0\x07\0\x04\xff\xff\xff\xff"), package);
}

#[test]
fn pages_are_slices_of_what_was_received() {
    let blocks = vec![RamBlock { name: "pc.ram".to_owned(), pages: 2 }];
    let mut writer = StreamWriter::new();
    compose::opening(&mut writer, "pc", &[], &RamLayout::new(blocks, 0).unwrap());
    let at = PageAt { block: 0, page: 1 };
    compose::part(&mut writer, |writer| writer.page(at, Bytes::from(vec![9; PAGE_BYTES])));
    let bytes = joined(&writer.take());
    let (records, _) = read_all(&bytes, &[usize::MAX]);
    let page = records.iter().find_map(|record| match record {
        Record::Ram(RamRecord::Page { data, .. }) => Some(data),
        _ => None,
    });
    let page = page.unwrap();
    assert_eq!(page[..], [9; PAGE_BYTES]);
    assert!(bytes.as_ptr_range().contains(&page.as_ptr()), "the page was copied");
}

#[test]
fn a_request_without_a_name_is_of_the_block_before() {
    let name = |name: &str| RamBlock { name: name.to_owned(), pages: 0xdaf2 };
    let layout = RamLayout::new(vec![name("pc.bios"), name("pc.ram")], 0).unwrap();
    let named = b"\0\x03\0\x13\0\0\0\0\x0d\xaf\x10\0\0\0\x10\0\x06pc.ram";
    let nameless = b"\0\x04\0\x0c\0\0\0\0\0\0\x10\0\0\0\x20\0";
    let bytes = Bytes::from([&named[..], nameless].concat());
    let of = |first, count| Message::RequestPages { block: 1, range: PageRange { first, count } };
    assert_eq!(read_messages(&bytes, &layout, 5), [of(0xdaf1, 1), of(1, 2)]);
    let mut reader = ReturnReader::new(layout);
    reader.feed(Bytes::from_static(nameless));
    let error = StreamError::OutOfPlace { what: "a request without a block", at: 0 };
    assert_eq!(reader.read(), Err(error));
}
