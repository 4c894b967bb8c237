//! How fast a guest's memory goes through one core, from QEMU's stream at the source to QEMU's stream
//! at the destination, without sockets and stores. `cargo bench -p lifeboat-agent --bench stream`.
//!
//! `scatter` is parse, encode (with or without encryption) and place: what the source's agent does.
//! `gather` is open, ledger and write: what the destination's does. The stream of 64 MiB is written
//! by our writer in the form in which QEMU writes one (its captures are written back byte for byte,
//! which the tests hold); `captured` parses a real one, which is small and mostly zeroes.

use std::collections::VecDeque;
use std::hint::black_box;

use bytes::{Bytes, BytesMut};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lifeboat_agent::qemu::stream::{
    PAGE_BYTES, PageAt, RamBlock, RamLayout, RamRecord, Record, StreamReader, StreamWriter, compose,
};
use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units;
use lifeboat_scatter_gather::ledger::{Ledger, Placing, Where};
use lifeboat_scatter_gather::pack::{Batch, Coder, Pack, PackBuilder, Reading, pack_bytes_most};
use lifeboat_scatter_gather::page::{PackId, Version};
use lifeboat_scatter_gather::redundancy::Redundancy;
use lifeboat_scatter_gather::redundancy::parity::Stripe;
use lifeboat_scatter_gather::redundancy::placement::{Offer, Placer};
use lifeboat_scatter_gather::seal::{KEY_BYTES, MigrationKey, MigrationTag};

/// Pages of the composed stream: 64 MiB.
const PAGES: u32 = 16_384;
/// Packs that wait for their acknowledgement, each 256 KiB.
const UNDER_WAY: usize = 16;
/// How much is read from a socket at once.
const RECEIVED: usize = 1 << 20;

fn layout() -> RamLayout {
    let block = RamBlock { name: "pc.ram".to_owned(), pages: PAGES };
    RamLayout::new(vec![block], 0).expect("one block")
}

/// The stream in the pieces in which a socket gives it.
fn stream() -> Vec<Bytes> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut writer = StreamWriter::new();
    compose::opening(&mut writer, "pc-i440fx-7.2", &[], &layout());
    for part in 0..PAGES / 256 {
        compose::part(&mut writer, |writer| {
            for page in part * 256..(part + 1) * 256 {
                let data: BytesMut = (0..PAGE_BYTES / 8).flat_map(|_| noise()).collect();
                writer.page(PageAt { block: 0, page }, data.freeze());
            }
        });
    }
    compose::closing(&mut writer);
    let mut whole = compose::joined(&writer.take());
    let mut pieces = Vec::new();
    while !whole.is_empty() {
        pieces.push(whole.split_to(RECEIVED.min(whole.len())));
    }
    pieces
}

fn parse(pieces: &[Bytes], mut page: impl FnMut(PageAt, Option<Bytes>)) {
    let mut reader = StreamReader::new();
    for piece in pieces {
        reader.feed(piece.clone());
        while let Ok(Some(record)) = reader.read() {
            match record {
                Record::Ram(RamRecord::Page { at, data, .. }) => page(at, Some(data)),
                Record::Ram(RamRecord::Zero { at, .. }) => page(at, None),
                _ => {}
            }
        }
    }
}

fn tag() -> MigrationTag {
    MigrationTag::new(&MigrationId::new("bench").expect("a short name"))
}

fn coder(sealed: bool) -> Coder {
    if !sealed {
        return Coder::Plain(Version(0));
    }
    Coder::Sealed(MigrationKey::new([7; KEY_BYTES]).into_sealers(tag(), 1).remove(0))
}

/// What a finished pack goes through at the source before it is sent.
fn placed(placer: &mut Placer, stripe: &mut Option<Stripe>, pack: &Pack, parity: bool) {
    if !parity {
        black_box(placer.next(pack.bytes.len() as u64).expect("room"));
        return;
    }
    let open = stripe.get_or_insert_with(|| {
        black_box(placer.next(pack.bytes.len() as u64).expect("room"));
        Stripe::new(0)
    });
    open.add(pack.id, &pack.bytes).expect("a short stripe");
    if open.members().len() + 1 == placer.width() {
        black_box(stripe.take().map(Stripe::finish));
    }
}

fn scatter_all(pieces: &[Bytes], sealed: bool) -> Vec<Pack> {
    let mut packs = Vec::new();
    scatter_each(pieces, sealed, false, |pack| packs.push(pack));
    packs
}

/// As the source does it: a pack's memory is free again once it is acknowledged.
fn scatter_under_way(pieces: &[Bytes], sealed: bool, parity: bool) {
    let mut under_way = VecDeque::with_capacity(UNDER_WAY);
    scatter_each(pieces, sealed, parity, |pack| {
        if under_way.len() == UNDER_WAY {
            under_way.pop_front();
        }
        under_way.push_back(black_box(pack));
    });
}

fn scatter_each(pieces: &[Bytes], sealed: bool, parity: bool, mut each: impl FnMut(Pack)) {
    let batch = Batch::default();
    let mut builder = PackBuilder::new(tag(), batch, coder(sealed), PackId(0));
    let room = units::Bytes(pack_bytes_most(batch, sealed) as u64 * u64::from(PAGES));
    let offer = Offer { room, rate: units::BytesPerSec(1 << 30) };
    let redundancy = if parity { Redundancy::Parity } else { Redundancy::None };
    let source = units::BytesPerSec(1 << 30);
    let mut placer = Placer::new(&[offer; 3], redundancy, source).expect("three stores");
    let mut stripe = None;
    parse(pieces, |at, data| {
        match data {
            Some(data) => drop(builder.page(at, &data).map(black_box)),
            None => drop(builder.zero(at).map(black_box)),
        }
        if builder.is_full()
            && let Some(pack) = builder.finish()
        {
            placed(&mut placer, &mut stripe, &pack, parity);
            each(pack);
        }
    });
    builder.finish().into_iter().for_each(each);
}

fn scatter(c: &mut Criterion) {
    let pieces = stream();
    let mut group = c.benchmark_group("scatter");
    group.throughput(Throughput::Bytes(u64::from(PAGES) * PAGE_BYTES as u64)).sample_size(10);
    group.bench_function("parse", |b| {
        b.iter(|| parse(&pieces, |at, data| drop(black_box((at, data)))));
    });
    for (name, sealed, parity) in [
        ("parse, encode, place", false, false),
        ("parse, encode, seal, place", true, false),
        ("parse, encode, seal, place with parity of 3", true, true),
    ] {
        group.bench_function(name, |b| b.iter(|| scatter_under_way(&pieces, sealed, parity)));
    }
    group.finish();
}

fn gather(c: &mut Criterion) {
    let pieces = stream();
    let mut group = c.benchmark_group("gather");
    group.throughput(Throughput::Bytes(u64::from(PAGES) * PAGE_BYTES as u64)).sample_size(10);
    for sealed in [false, true] {
        let packs = scatter_all(&pieces, sealed);
        let opener = sealed.then(|| MigrationKey::new([7; KEY_BYTES]).opener(tag()));
        let reading = Reading { migration: tag(), opener };
        let fetched = || -> Vec<(PackId, BytesMut)> {
            packs.iter().map(|pack| (pack.id, BytesMut::from(&pack.bytes[..]))).collect()
        };
        group.bench_function(if sealed { "open sealed, place" } else { "open, place" }, |b| {
            let place = |fetched| place_all(&reading, fetched);
            b.iter_batched(fetched, place, criterion::BatchSize::LargeInput);
        });
    }
    group.finish();
}

fn place_all(reading: &Reading, fetched: Vec<(PackId, BytesMut)>) {
    let mut ledger = Ledger::new(&[PAGES], PAGES.into()).expect("a small guest");
    for page in 0..PAGES {
        ledger.note(PageAt { block: 0, page }, Where::AtSource).expect("a known page");
    }
    ledger.close().expect("every page is known");
    let mut writer = StreamWriter::with_layout(layout());
    for (id, bytes) in fetched {
        let contents = reading.pack(id, bytes).expect("a whole pack");
        compose::part(&mut writer, |writer| {
            for page in contents.pages {
                if let Ok(Placing::Now(_)) = ledger.place(page.at) {
                    writer.page(page.at, page.data);
                }
            }
        });
        black_box(writer.take());
    }
    assert_eq!(ledger.counts().waiting(), 0);
}

fn captured(c: &mut Criterion) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/stream/post-copy-7.2.stream");
    let bytes = Bytes::from(std::fs::read(path).expect("the capture is in the checkout"));
    let mut group = c.benchmark_group("captured");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("parse", |b| {
        b.iter(|| parse(std::slice::from_ref(&bytes), |at, data| drop(black_box((at, data)))));
    });
    group.finish();
}

criterion_group!(benches, scatter, gather, captured);
criterion_main!(benches);
