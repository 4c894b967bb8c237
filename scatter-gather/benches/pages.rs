//! How fast pages go through this room on one core: into packs and out of them, plain and sealed,
//! by batch size, with parity and through the ledger. `cargo bench -p lifeboat-scatter-gather`.
//!
//! The stores themselves are not here: their rate is Redis'.

use std::collections::VecDeque;
use std::hint::black_box;

use bytes::BytesMut;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lifeboat_protocol::ids::MigrationId;
use lifeboat_scatter_gather::ledger::{Ledger, Where};
use lifeboat_scatter_gather::pack::{Batch, Coder, Pack, PackBuilder, Reading};
use lifeboat_scatter_gather::page::{PAGE_BYTES, PackId, PageAt, Version};
use lifeboat_scatter_gather::redundancy::parity::Stripe;
use lifeboat_scatter_gather::seal::{KEY_BYTES, MigrationKey, MigrationTag};

/// Pages of one run: 16 MiB, more than the processor's caches keep.
const PAGES: u32 = 4096;

/// Not zero; with `shift` 0 not compressible, with 40 to about a half.
fn memory(shift: u32) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut memory = Vec::with_capacity(PAGES as usize * PAGE_BYTES);
    while memory.len() < PAGES as usize * PAGE_BYTES {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        memory.extend_from_slice(&(state >> shift).to_le_bytes());
    }
    memory
}

fn tag() -> MigrationTag {
    MigrationTag::new(&MigrationId::new("bench").expect("a short name"))
}

fn coder(sealed: bool) -> Coder {
    match sealed {
        false => Coder::Plain(Version(0)),
        true => {
            let mut sealers = MigrationKey::new([7; KEY_BYTES]).into_sealers(tag(), 1);
            Coder::Sealed(sealers.remove(0))
        }
    }
}

fn reading(sealed: bool) -> Reading {
    let opener = sealed.then(|| MigrationKey::new([7; KEY_BYTES]).opener(tag()));
    Reading { migration: tag(), opener }
}

fn pack_all(memory: &[u8], batch: u16, sealed: bool) -> Vec<Pack> {
    let batch = Batch::new(batch).expect("a batch");
    let mut builder = PackBuilder::new(tag(), batch, coder(sealed), PackId(0));
    let mut packs = Vec::new();
    for (page, data) in (0..).zip(memory.chunks_exact(PAGE_BYTES)) {
        builder.page(PageAt { block: 0, page }, data).expect("a page");
        if builder.is_full() {
            packs.extend(builder.finish());
        }
    }
    packs.extend(builder.finish());
    packs
}

/// Packs all of it and lets each pack go once eight more are there, as acknowledgements do.
fn pack_and_send(memory: &[u8], batch: u16, sealed: bool, compress: bool) {
    let batch = Batch::new(batch).expect("a batch");
    let mut builder = PackBuilder::new(tag(), batch, coder(sealed), PackId(0));
    builder.compress(compress);
    let mut under_way = VecDeque::new();
    for (page, data) in (0..).zip(memory.chunks_exact(PAGE_BYTES)) {
        builder.page(PageAt { block: 0, page }, data).expect("a page");
        if builder.is_full() {
            under_way.extend(builder.finish());
            if under_way.len() > 8 {
                black_box(under_way.pop_front());
            }
        }
    }
    black_box(std::iter::from_fn(|| builder.finish()).count());
}

fn packing(c: &mut Criterion) {
    let memory = memory(0);
    let mut group = c.benchmark_group("pack");
    group.throughput(Throughput::Bytes(memory.len() as u64)).sample_size(10);
    for sealed in [false, true] {
        for batch in [1, 4, 16, 63, 256] {
            let name = if sealed { "sealed" } else { "plain" };
            group.bench_with_input(BenchmarkId::new(name, batch), &batch, |b, batch| {
                b.iter(|| pack_and_send(&memory, *batch, sealed, false));
            });
        }
    }
    group.finish();
}

/// What a core compresses, of pages that gain by it and of pages that do not.
fn compressing(c: &mut Criterion) {
    let mut group = c.benchmark_group("compress");
    for (name, shift) in [("to a half", 40), ("in vain", 0)] {
        let memory = memory(shift);
        group.throughput(Throughput::Bytes(memory.len() as u64)).sample_size(10);
        group.bench_function(name, |b| b.iter(|| pack_and_send(&memory, 63, true, true)));
    }
    group.finish();
}

fn opening(c: &mut Criterion) {
    let memory = memory(0);
    let mut group = c.benchmark_group("open");
    group.throughput(Throughput::Bytes(memory.len() as u64)).sample_size(10);
    for sealed in [false, true] {
        let (packs, reading) = (pack_all(&memory, 63, sealed), reading(sealed));
        let copies = || -> Vec<(PackId, BytesMut)> {
            packs.iter().map(|pack| (pack.id, BytesMut::from(&pack.bytes[..]))).collect()
        };
        group.bench_function(if sealed { "sealed" } else { "plain" }, |b| {
            let open = |copies: Vec<(PackId, BytesMut)>| {
                for (id, bytes) in copies {
                    black_box(reading.pack(id, bytes).expect("a whole pack"));
                }
            };
            b.iter_batched(copies, open, criterion::BatchSize::LargeInput);
        });
    }
    group.finish();
}

fn parity(c: &mut Criterion) {
    let memory = memory(0);
    let packs = pack_all(&memory, 63, false);
    let mut group = c.benchmark_group("parity");
    group.throughput(Throughput::Bytes(memory.len() as u64)).sample_size(10);
    group.bench_function("stripes of 3", |b| {
        b.iter(|| {
            for pair in packs.chunks(2) {
                let mut stripe = Stripe::new(0);
                for pack in pair {
                    stripe.add(pack.id, &pack.bytes).expect("a short stripe");
                }
                black_box(stripe.finish());
            }
        });
    });
    group.finish();
}

fn ledger(c: &mut Criterion) {
    let mut group = c.benchmark_group("ledger");
    group.throughput(Throughput::Elements(PAGES.into())).sample_size(10);
    group.bench_function("index and place", |b| {
        b.iter(|| {
            let mut ledger = Ledger::new(&[PAGES], 1 << 20).expect("a small guest");
            for page in 0..PAGES {
                let pack = PackId(u64::from(page / 63));
                let place = Where::InPack { pack, slot: (page % 63) as u16 };
                ledger.note(PageAt { block: 0, page }, place).expect("a known page");
            }
            ledger.close().expect("every page is known");
            for page in 0..PAGES {
                black_box(ledger.place(PageAt { block: 0, page }).expect("a known page"));
            }
        });
    });
    group.finish();
}

criterion_group!(benches, packing, compressing, opening, parity, ledger);
criterion_main!(benches);
