//! The seeds of every corpus, made of captured bytes where there are any: QEMU's streams in
//! `migrate-agent/testdata/stream`, a switch's messages in `ovs/rust-openflow/testdata`. What only our
//! own agents say (frames, packs) is one of each kind, as they write it.
//!
//! Captured streams are shortened: a fuzzer changes small inputs quickly. What is left is a whole
//! stream, from its header to its end. Nothing here is by chance: the same captures give the same seeds.

use std::fs;
use std::io;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use lifeboat_agent::disk::sync::{frame as disk, versions};
use lifeboat_agent::qemu::stream::return_path::{Message, bitmap_bytes};
use lifeboat_agent::qemu::stream::{
    Command, RamRecord, Record, StreamReader, StreamWriter, compose, return_path, tail,
};
use lifeboat_ovs::lldp;
use lifeboat_protocol::ids::{Generation, HostId, MigrationId, VmId};
use lifeboat_scatter_gather::link::frame::{self as page, Ended, Frame, Hello, Purpose, Standing};
use lifeboat_scatter_gather::link::pages::{Note, PackNote, PageKey, PageRun, compressed};
use lifeboat_scatter_gather::pack::{Batch, Coder, PackBuilder, Width};
use lifeboat_scatter_gather::page::{PackId, PageAt, Version};
use lifeboat_scatter_gather::redundancy::StoreId;
use lifeboat_scatter_gather::redundancy::directory::Protection;
use lifeboat_scatter_gather::seal::KEY_BYTES;

/// One seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seed {
    /// The target whose corpus it belongs to.
    pub target: &'static str,
    /// Its file there.
    pub name: String,
    /// The input.
    pub bytes: Vec<u8>,
}

/// Pages that stay in a shortened stream, with data and of zeroes.
const PAGES_KEPT: usize = 2;
const ZEROES_KEPT: usize = 6;
/// Bytes that stay of what has no structure to us: devices before and inside of a package.
const DEVICES_KEPT: usize = 700;

/// How an input is cut into pieces; see `pieces`.
const CUTS: [u8; 2] = [0, 200];

/// Every seed. `root` is the checkout.
///
/// # Errors
/// When a capture is not there.
///
/// # Panics
/// When a capture is none.
pub fn all(root: &Path) -> io::Result<Vec<Seed>> {
    let mut seeds = Vec::new();
    streams(&root.join("migrate-agent/testdata/stream"), &mut seeds)?;
    messages(&root.join("ovs/rust-openflow/testdata"), &mut seeds)?;
    seeds.extend(cut_ways("page_frame", "each", &page_frames()));
    seeds.extend(cut_ways("disk_frame", "each", &disk_frames()));
    seeds.extend(discovery());
    Ok(seeds)
}

/// The same bytes, cut in each way.
fn cut_ways(target: &'static str, name: &str, bytes: &[u8]) -> Vec<Seed> {
    let seed = |how: u8| Seed {
        target,
        name: format!("seed-{name}-{how}"),
        bytes: [&[how], bytes].concat(),
    };
    CUTS.map(seed).to_vec()
}

fn captured(folder: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        found.push((name, fs::read(path)?));
    }
    found.sort();
    Ok(found)
}

fn streams(folder: &Path, seeds: &mut Vec<Seed>) -> io::Result<()> {
    for (name, bytes) in captured(folder)? {
        if let Some(name) = name.strip_suffix(".stream") {
            let short = shortened(bytes.into());
            seeds.extend(cut_ways("stream", name, &short));
            seeds.push(packed(name, &short));
        } else if let Some(name) = name.strip_suffix(".return") {
            seeds.extend(cut_ways("return_path", name, &bytes));
        }
    }
    let mut recovery = BytesMut::new();
    let layout = super::return_path::layout();
    let bits = vec![0xa5; bitmap_bytes(65)].into();
    for message in [Message::ReceivedBitmap { block: 1, bits }, Message::ResumeAck(1)] {
        return_path::encode(&message, &layout, &mut recovery);
    }
    seeds.extend(cut_ways("return_path", "recovery", &recovery));
    Ok(())
}

/// A whole stream with few pages and little of its devices. One that is refused ends as it was, a little
/// after where that is seen.
fn shortened(bytes: Bytes) -> Bytes {
    let mut reader = StreamReader::new();
    reader.feed(bytes.clone());
    let (mut writer, mut pages, mut zeroes) = (StreamWriter::new(), 0, 0);
    let mut state = Vec::new();
    while let Ok(Some(record)) = reader.read() {
        match record {
            Record::Ram(RamRecord::Page { at, data, .. }) => {
                pages += 1;
                if pages <= PAGES_KEPT {
                    writer.page(at, data);
                }
            }
            Record::Ram(RamRecord::Zero { at, .. }) => {
                zeroes += 1;
                if zeroes <= ZEROES_KEPT {
                    writer.zero(at);
                }
            }
            Record::Command(Command::Packaged(inside)) => {
                let inside = inside.slice(..inside.len().min(DEVICES_KEPT));
                writer.write(&Record::Command(Command::Packaged(inside)));
            }
            Record::DeviceState(bytes) => state.extend_from_slice(&bytes),
            other => writer.write(&other),
        }
    }
    let mut short = compose::joined(&writer.take()).to_vec();
    if let Ok(found) = tail::split(&state) {
        let devices = found.devices;
        let half = (devices.len() / 2).min(DEVICES_KEPT / 2);
        short.extend_from_slice(&devices[..half]);
        // Its last bytes are a footer, which the end of a stream is known by.
        short.extend_from_slice(&devices[devices.len() - half..]);
        short.push(0);
        if found.description.is_some() {
            short.extend_from_slice(b"\x06\0\0\0\x0f{\"devices\": []}");
        }
    }
    let unread = &bytes[bytes.len() - reader.waiting()..];
    short.extend_from_slice(&unread[..unread.len().min(DEVICES_KEPT)]);
    short.into()
}

/// A pack of a captured stream's pages, as a store gives it back.
fn packed(name: &str, stream: &Bytes) -> Seed {
    let coder = Coder::Plain(Version(0));
    let mut builder = PackBuilder::new(super::pack::tag(), Batch::default(), coder, PackId(5));
    builder.compress(name.len().is_multiple_of(2));
    let mut reader = StreamReader::new();
    reader.feed(stream.clone());
    while let Ok(Some(record)) = reader.read() {
        match record {
            Record::Ram(RamRecord::Page { at, data, .. }) => {
                builder.page(at, &data).expect("few pages fit");
            }
            Record::Ram(RamRecord::Zero { at, .. }) => {
                builder.zero(at).expect("few pages fit");
            }
            _ => {}
        }
    }
    match builder.finish() {
        Some(pack) => {
            Seed { target: "pack", name: format!("seed-{name}"), bytes: pack.bytes.to_vec() }
        }
        // Its pages were not read: the other kind of input, a list of pages and a change.
        None => {
            let pages = [[0, 0, 1, 9], [1, 0, 2, 0], [0, 0, 3, 5]];
            let change = [0, 0, 60, 1];
            let how = [3 << 2 | name.len() as u8 & 3];
            let bytes = [&how[..], pages.as_flattened(), &change].concat();
            Seed { target: "pack", name: format!("seed-{name}"), bytes }
        }
    }
}

fn messages(folder: &Path, seeds: &mut Vec<Seed>) -> io::Result<()> {
    for (name, text) in captured(folder)? {
        let Some(name) = name.strip_suffix(".hex") else { continue };
        let text = String::from_utf8_lossy(&text).into_owned();
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| {
            let text = String::from_utf8_lossy(pair);
            u8::from_str_radix(&text, 16).expect("hexadecimal digits")
        };
        let bytes: Vec<u8> = digits.chunks(2).map(byte).collect();
        seeds.extend(cut_ways("openflow", name, &bytes));
    }
    Ok(())
}

fn page_frames() -> BytesMut {
    let at = |page| PageAt { block: 0, page };
    let run = PageRun { block: 0, first: 7, count: 3 };
    let generation = Generation(2);
    let hello = Hello {
        purpose: Purpose::ServeDemands,
        migration: MigrationId::new("m1").expect("a name"),
        vm: VmId::new("db").expect("a name"),
        host: HostId::new("h1").expect("a name"),
        generation,
        token: [9; page::TOKEN_BYTES],
    };
    let pack = PackNote {
        pack: PackId(4),
        width: Width::LEAST,
        store: StoreId(1),
        protection: Protection::None,
        pages: vec![Some(at(1)), None, Some(at(2))],
    };
    let frames = [
        Frame::Hello(hello),
        Frame::Welcome,
        Frame::Stream(Bytes::from_static(b"QEVM")),
        Frame::Notes(vec![Note { run, zero: true }, Note { run, zero: false }]),
        Frame::Key(PageKey([7; KEY_BYTES])),
        Frame::End(Ended { total: 4, digest: 5 }),
        Frame::Ack(4),
        Frame::Loaded(generation),
        Frame::Commit(generation),
        Frame::Running(generation),
        Frame::Fetch(vec![run]),
        Frame::Pages(vec![(at(7), Bytes::from(vec![3; 4096]))]),
        Frame::Compressed(compressed(&[(at(8), Bytes::from(vec![4; 4096]))]).expect("one byte")),
        Frame::Pack(pack),
        Frame::Parity { stripe: 3, store: StoreId(2) },
        Frame::Scattered,
        Frame::Released(generation),
        Frame::Abort("no room".to_owned()),
        Frame::Refused("too late".to_owned()),
        Frame::Standing(Standing::Gathering),
        Frame::Ping(1),
        Frame::Pong(1),
    ];
    let mut bytes = BytesMut::new();
    frames.iter().for_each(|frame| page::encode(frame, &mut bytes));
    bytes
}

fn disk_frames() -> BytesMut {
    let runs = [4..9, 12..13];
    let mut bytes = BytesMut::new();
    for kind in disk::Kind::ALL {
        let mut frame = disk::Frame::new(kind, 1);
        frame.version = versions::Version(7);
        frame.offset = 4096;
        match kind {
            disk::Kind::Data => frame.payload = Bytes::from_static(b"hello"),
            disk::Kind::Seal => frame.payload = disk::encode_runs(&runs).0,
            disk::Kind::Map => frame.payload = vec![1; 16].into(),
            _ => {}
        }
        frame.length = match kind {
            disk::Kind::Data => 5,
            _ => 4096,
        };
        frame.encode(&mut bytes);
    }
    bytes
}

/// Our own frame, and one made by hand from the standard's figures (IEEE 802.1AB, clause 8), as
/// another maker's switch sends it.
fn discovery() -> Vec<Seed> {
    const BY_HAND: &[u8] = &[
        0x01, 0x80, 0xc2, 0, 0, 0x0e, 2, 0, 0, 0, 0, 1, 0x88, 0xcc, //
        0x02, 0x07, 4, 2, 0, 0, 0, 0, 1, // chassis
        0x04, 0x05, 5, b'e', b't', b'h', b'0', // port
        0x06, 0x02, 0, 120, // time to live
        0x0a, 0x02, b's', b'w', // system name
        0, 0, 0xff, 0xff, // End, and padding
    ];
    let own =
        lldp::Own { organization: [2, 1, 3], subtype: 1, value: Bytes::from_static(b"token") };
    let frame = lldp::Frame {
        source: [2, 0, 0, 0, 0, 7],
        chassis: lldp::Id::local("00000000000000ff"),
        port: lldp::Id::local("12"),
        ttl: 3,
        own: vec![own],
    };
    let ours = lldp::encode(&frame).expect("short names").to_vec();
    let seed = |name: &str, bytes| Seed { target: "lldp", name: format!("seed-{name}"), bytes };
    vec![seed("ours", ours), seed("by-hand", BY_HAND.to_vec())]
}
