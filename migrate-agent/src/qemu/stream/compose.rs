//! The sentences that turn a plain pre-copy into a post-copy at the destination ("conversion"):
//! which records come in which order. Used by the destination's driver.
//!
//! ```text
//!  opening:  Header, Configuration, OPEN_RETURN_PATH, POSTCOPY_ADVISE, RAM START
//!  parts:    RAM PART {pages} as often as there are pages to load before the guest runs
//!  switch:   RAM_DISCARD {all that is still elsewhere}, PACKAGED {LISTEN, devices, PING 3, RUN}
//!  parts:    RAM PART {pages}, each page once
//!  closing:  RAM END, 00
//! ```
//!
//! Why pages that were never loaded are discarded, too: a huge page that a neighbour brought in
//! makes them present, and placing them later would end the destination's QEMU (EEXIST).

use bytes::{Bytes, BytesMut};

use lifeboat_scatter_gather::page::PageAt;

use super::block::{PageRange, RamLayout};
use super::command::{Command, DISCARD_RANGES_MOST};
use super::record::{ConfigurationField, Kind, RamRecord, Record};
use super::wire::PING_IN_PACKAGE;
use super::writer::StreamWriter;

/// The number that the RAM section has in streams of our own.
pub const RAM_SECTION: u32 = 2;

/// Everything before the first page. `machine` and `fields` are those of the source's stream.
pub fn opening(
    writer: &mut StreamWriter,
    machine: &str,
    fields: &[ConfigurationField],
    layout: &RamLayout,
) {
    writer.write(&Record::Header);
    writer.write(&Record::Configuration { machine: machine.to_owned() });
    fields.iter().for_each(|field| writer.write(&Record::ConfigurationField(*field)));
    writer.write(&Record::Command(Command::OpenReturnPath));
    writer.write(&Record::Command(Command::PostcopyAdvise));
    writer.write(&Record::RamStart { section: RAM_SECTION, layout: layout.clone() });
    end_body(writer);
}

/// One part of the RAM section; `fill` writes its pages.
pub fn part(writer: &mut StreamWriter, fill: impl FnOnce(&mut StreamWriter)) {
    writer.write(&Record::RamSection { section: RAM_SECTION, kind: Kind::Part });
    fill(writer);
    end_body(writer);
}

/// RAM_DISCARD for pages that are still elsewhere. `absent` is in ascending order; pages in a row
/// become one range.
pub fn discards(writer: &mut StreamWriter, absent: impl IntoIterator<Item = PageAt>) {
    let mut open: Option<(u16, Vec<PageRange>)> = None;
    for at in absent {
        let fits = open
            .as_mut()
            .is_some_and(|(block, ranges)| *block == at.block && extend(ranges, at.page));
        if !fits {
            flush(writer, open.take());
            open = Some((at.block, vec![PageRange { first: at.page, count: 1 }]));
        }
    }
    flush(writer, open);
}

/// Adds a page to the last range or as a new one; `false` where a command holds no more.
fn extend(ranges: &mut Vec<PageRange>, page: u32) -> bool {
    if let Some(last) = ranges.last_mut().filter(|r| r.first.checked_add(r.count) == Some(page)) {
        last.count += 1;
        return true;
    }
    let room = ranges.len() < DISCARD_RANGES_MOST;
    if room {
        ranges.push(PageRange { first: page, count: 1 });
    }
    room
}

fn flush(writer: &mut StreamWriter, open: Option<(u16, Vec<PageRange>)>) {
    if let Some((block, ranges)) = open {
        writer.write(&Record::Command(Command::RamDiscard { block, ranges }));
    }
}

/// PACKAGED: the devices' state, and the order to run. QEMU answers PONG 3 once it has loaded it;
/// started with `-S` it then stands paused until `cont`.
pub fn package(writer: &mut StreamWriter, devices: &[u8]) {
    let mut inside = BytesMut::with_capacity(devices.len() + 32);
    let layout = RamLayout::default();
    Command::PostcopyListen.encode(&layout, &mut inside);
    inside.extend_from_slice(devices);
    Command::Ping(PING_IN_PACKAGE).encode(&layout, &mut inside);
    Command::PostcopyRun.encode(&layout, &mut inside);
    writer.write(&Record::Command(Command::Packaged(inside.freeze())));
}

/// The end, once every page is there.
pub fn closing(writer: &mut StreamWriter) {
    writer.write(&Record::RamSection { section: RAM_SECTION, kind: Kind::End });
    end_body(writer);
    writer.write(&Record::EndOfStream);
}

fn end_body(writer: &mut StreamWriter) {
    writer.write(&Record::Ram(RamRecord::EndOfBody));
    writer.write(&Record::Footer { section: RAM_SECTION });
}

/// All slices in one piece, for small streams and tests.
#[must_use]
pub fn joined(slices: &[Bytes]) -> Bytes {
    let mut whole = BytesMut::with_capacity(slices.iter().map(Bytes::len).sum());
    slices.iter().for_each(|slice| whole.extend_from_slice(slice));
    whole.freeze()
}
