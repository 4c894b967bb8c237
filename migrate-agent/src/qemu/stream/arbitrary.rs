//! Whole migration streams at random, for the property tests: every record that a stream can hold,
//! in an order that QEMU could send it in.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// A layout of one to four blocks.
pub(super) fn layouts() -> impl Strategy<Value = RamLayout> {
    vec(1_u32..5000, 1..5).prop_map(|sizes| {
        let names = ["pc.ram", "0000:00:02.0/vga.vram", "pc.bios", "/rom@etc/acpi/tables"];
        let block = |(pages, name): (u32, &str)| RamBlock { name: name.to_owned(), pages };
        let blocks = sizes.into_iter().zip(names).map(block).collect();
        RamLayout::new(blocks, 0).unwrap()
    })
}

/// What a test draws for one page, before it is known which blocks there are.
#[derive(Debug, Clone)]
struct Draw {
    block: prop::sample::Index,
    page: prop::sample::Index,
    fill: Option<u8>,
    repeat_name: bool,
}

fn draws() -> impl Strategy<Value = Vec<Draw>> {
    let draw = (any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<Option<u8>>());
    let draw = (draw, any::<bool>()).prop_map(|((block, page, fill), repeat_name)| Draw {
        block,
        page,
        fill,
        repeat_name,
    });
    vec(draw, 0..6)
}

pub(super) fn page_of(layout: &RamLayout, block: usize, page: prop::sample::Index) -> PageAt {
    let pages = layout.blocks()[block].pages as usize;
    PageAt { block: block as u16, page: page.index(pages) as u32 }
}

fn body(layout: &RamLayout, draws: &[Draw], last: &mut Option<u16>) -> Vec<Record> {
    let mut records = Vec::new();
    for draw in draws {
        let at = page_of(layout, draw.block.index(layout.blocks().len()), draw.page);
        let continued = !draw.repeat_name && *last == Some(at.block);
        *last = Some(at.block);
        records.push(Record::Ram(match draw.fill {
            Some(fill) => {
                RamRecord::Page { at, continued, data: Bytes::from(vec![fill; PAGE_BYTES]) }
            }
            None => RamRecord::Zero { at, continued },
        }));
    }
    records.push(Record::Ram(RamRecord::EndOfBody));
    records
}

fn section(kind: Kind, layout: &RamLayout, draws: &[Draw], last: &mut Option<u16>) -> Vec<Record> {
    let mut records = vec![Record::RamSection { section: 2, kind }];
    records.extend(body(layout, draws, last));
    records.push(Record::Footer { section: 2 });
    records
}

fn opening(layout: &RamLayout, uuid: Option<[u8; 16]>, post_copy: bool) -> Vec<Record> {
    let mut records =
        vec![Record::Header, Record::Configuration { machine: "pc-i440fx-7.2".to_owned() }];
    records.extend(uuid.map(|u| Record::ConfigurationField(ConfigurationField::Uuid(u))));
    if post_copy {
        let commands = [Command::OpenReturnPath, Command::Ping(1), Command::PostcopyAdvise];
        records.extend(commands.map(Record::Command));
    }
    records.push(Record::RamStart { section: 2, layout: layout.clone() });
    records.push(Record::Ram(RamRecord::EndOfBody));
    records.push(Record::Footer { section: 2 });
    records
}

fn switch(layout: &RamLayout, discard: &[Draw], package: Vec<u8>) -> Vec<Record> {
    let mut records = Vec::new();
    for draw in discard {
        let at = page_of(layout, draw.block.index(layout.blocks().len()), draw.page);
        let ranges = vec![PageRange { first: at.page, count: 1 }; usize::from(draw.repeat_name)];
        records.push(Record::Command(Command::RamDiscard { block: at.block, ranges }));
    }
    records.push(Record::Command(Command::Ping(2)));
    records.push(Record::Command(Command::Packaged(package.into())));
    records
}

prop_compose! {
    /// A stream, as records. In pre-copy the devices are one record at the end.
    pub(super) fn streams()(
        layout in layouts(),
        uuid in any::<Option<[u8; 16]>>(),
        post_copy in any::<bool>(),
        parts in vec(draws(), 0..4),
        discard in draws(),
        after in vec(draws(), 0..3),
        last_part in draws(),
        devices in vec(any::<u8>(), 1..200),
    ) -> Vec<Record> {
        let mut records = opening(&layout, uuid, post_copy);
        let mut last = None;
        for part in &parts {
            records.extend(section(Kind::Part, &layout, part, &mut last));
        }
        if post_copy {
            records.extend(switch(&layout, &discard, devices.clone()));
            for part in &after {
                records.extend(section(Kind::Part, &layout, part, &mut last));
            }
        } else {
            records.push(Record::Command(Command::SwitchoverStart));
        }
        records.extend(section(Kind::End, &layout, &last_part, &mut last));
        records.push(match post_copy {
            true => Record::EndOfStream,
            false => Record::DeviceState(devices.into()),
        });
        records
    }
}

/// A message of the return path, of pages of `layout`.
pub(super) fn messages(layout: RamLayout) -> impl Strategy<Value = return_path::Message> {
    use return_path::Message;
    let blocks = layout.blocks().len();
    let of = layout.clone();
    prop_oneof![
        any::<u32>().prop_map(Message::Shut),
        any::<u32>().prop_map(Message::Pong),
        any::<u32>().prop_map(Message::ResumeAck),
        Just(Message::SwitchoverAck),
        (0..blocks, any::<prop::sample::Index>()).prop_map(move |(block, page)| {
            let at = page_of(&of, block, page);
            Message::RequestPages { block: at.block, range: PageRange { first: at.page, count: 1 } }
        }),
        (0..blocks, any::<u8>()).prop_map(move |(block, fill)| {
            let length = return_path::bitmap_bytes(layout.blocks()[block].pages);
            Message::ReceivedBitmap { block: block as u16, bits: vec![fill; length].into() }
        }),
    ]
}
