//! How fast a guest's memory goes through one core, from QEMU's stream at the source to QEMU's stream
//! at the destination, without sockets and stores. `cargo bench -p lifeboat-agent --bench stream`.
//!
//! The stream is a real one, taken when this begins ([`capture`]): a Linux guest of 256 MiB that
//! goes on writing while it is read. `scatter` is parse, encode (with or without encryption) and
//! place: what the source's agent does. `gather` is open, ledger and write: what the destination's
//! does. `both` is one after the other. All rates are bytes of the captured stream by time.
//!
//! Ends with a line for each bound that is promised, and with 1 where one is broken.

mod capture;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::hint::black_box;
use std::process::ExitCode;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use criterion::{Criterion, Throughput};
use lifeboat_agent::clock;
use lifeboat_agent::qemu::stream::{
    PageAt, RamLayout, RamRecord, Record, StreamReader, StreamWriter, compose,
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

/// Packs that wait for their acknowledgement, each 256 KiB.
const UNDER_WAY: usize = 16;
/// What one core has to carry: bytes of the stream per second, plain and sealed.
const PLAIN_LEAST: f64 = 1.2e9;
const SEALED_LEAST: f64 = 0.8e9;

/// What was captured.
struct Captured {
    pieces: Vec<Bytes>,
    bytes: u64,
    layout: RamLayout,
}

impl Captured {
    fn of(pieces: Vec<Bytes>) -> Self {
        let bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
        let (mut pages, mut zeroes) = (0_u64, 0_u64);
        let layout = parse(&pieces, |_, data| match data {
            Some(_) => pages += 1,
            None => zeroes += 1,
        });
        println!("captured {bytes} bytes: {pages} pages, {zeroes} pages of zeroes");
        Self { pieces, bytes, layout }
    }
}

/// Reads all of it, and says which blocks it was about.
fn parse(pieces: &[Bytes], mut page: impl FnMut(PageAt, Option<Bytes>)) -> RamLayout {
    let mut reader = StreamReader::new();
    for piece in pieces {
        reader.feed(piece.clone());
        while let Some(record) = reader.read().expect("a stream that the codec carries") {
            match record {
                Record::Ram(RamRecord::Page { at, data, .. }) => page(at, Some(data)),
                Record::Ram(RamRecord::Zero { at, .. }) => page(at, None),
                _ => {}
            }
        }
    }
    reader.finish().expect("all of it was captured");
    reader.layout().clone()
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

fn scatter_all(captured: &Captured, sealed: bool) -> Vec<Pack> {
    let mut packs = Vec::new();
    scatter_each(captured, sealed, false, |pack| packs.push(pack));
    packs
}

/// As the source does it: a pack's memory is free again once it is acknowledged.
fn scatter_under_way(captured: &Captured, sealed: bool, parity: bool) {
    let mut under_way = VecDeque::with_capacity(UNDER_WAY);
    scatter_each(captured, sealed, parity, |pack| {
        if under_way.len() == UNDER_WAY {
            under_way.pop_front();
        }
        under_way.push_back(black_box(pack));
    });
}

fn scatter_each(captured: &Captured, sealed: bool, parity: bool, mut each: impl FnMut(Pack)) {
    let batch = Batch::default();
    let mut builder = PackBuilder::new(tag(), batch, coder(sealed), PackId(0));
    let room = units::Bytes(pack_bytes_most(batch, sealed) as u64 * captured.bytes);
    let offer = Offer { room, rate: units::BytesPerSec(1 << 30) };
    let redundancy = if parity { Redundancy::Parity } else { Redundancy::None };
    let source = units::BytesPerSec(1 << 30);
    let mut placer = Placer::new(&[offer; 3], redundancy, source).expect("three stores");
    let mut stripe = None;
    parse(&captured.pieces, |at, data| {
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

/// The destination's half: a ledger, and QEMU's stream out of what the packs hold.
struct Placed {
    reading: Reading,
    ledger: Ledger,
    writer: StreamWriter,
}

impl Placed {
    fn new(captured: &Captured, sealed: bool) -> Self {
        let opener = sealed.then(|| MigrationKey::new([7; KEY_BYTES]).opener(tag()));
        let blocks: Vec<u32> = captured.layout.blocks().iter().map(|block| block.pages).collect();
        let mut ledger = Ledger::new(&blocks, captured.layout.pages()).expect("a small guest");
        for (block, pages) in (0..).zip(blocks) {
            for page in 0..pages {
                ledger.note(PageAt { block, page }, Where::AtSource).expect("a known page");
            }
        }
        ledger.close().expect("every page is known");
        let writer = StreamWriter::with_layout(captured.layout.clone());
        Self { reading: Reading { migration: tag(), opener }, ledger, writer }
    }

    fn pack(&mut self, id: PackId, bytes: BytesMut) {
        let contents = self.reading.pack(id, bytes).expect("a whole pack");
        let ledger = &mut self.ledger;
        compose::part(&mut self.writer, |writer| {
            for page in contents.pages {
                if let Ok(Placing::Now(_)) = ledger.place(page.at) {
                    writer.page(page.at, page.data);
                }
            }
            for run in contents.zeroes {
                for page in run.first..run.first + run.count {
                    let at = PageAt { block: run.block, page };
                    if let Ok(Placing::Now(_)) = ledger.place(at) {
                        writer.zero(at);
                    }
                }
            }
        });
        black_box(self.writer.take());
    }

    fn is_whole(&self) {
        assert_eq!(self.ledger.counts().waiting(), 0, "every page was captured");
    }
}

/// The rates that a benchmark's samples had, to compare with what is promised.
#[derive(Default)]
struct Rates(RefCell<Vec<f64>>);

impl Rates {
    /// Criterion's samples, each of which is noted.
    fn time(&self, b: &mut criterion::Bencher<'_>, bytes: u64, mut once: impl FnMut() -> Duration) {
        b.iter_custom(|times| {
            let took: Duration = (0..times).map(|_| once()).sum();
            self.0.borrow_mut().push((bytes * times) as f64 / took.as_secs_f64());
            took
        });
    }

    /// `None` where this run was not about it.
    fn median(&self) -> Option<f64> {
        let mut rates = self.0.borrow().clone();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied()
    }
}

fn timed(work: impl FnOnce()) -> Duration {
    let begun = clock::now();
    work();
    begun.elapsed()
}

/// A bound, and whether it holds. GB are 10^9 bytes.
fn judge(what: &str, least: f64, rates: &Rates) -> bool {
    let (measured, verdict) = match rates.median() {
        Some(rate) if rate >= least => (format!("{:.2} GB/s", rate / 1e9), "holds"),
        Some(rate) => (format!("{:.2} GB/s", rate / 1e9), "broken"),
        None => ("nothing".to_owned(), "not known"),
    };
    println!("bound {what}: at least {:.1} GB/s, measured {measured}: {verdict}", least / 1e9);
    verdict == "holds"
}

fn scatter(c: &mut Criterion, captured: &Captured) -> [Rates; 2] {
    let (plain, sealed, others) = (Rates::default(), Rates::default(), Rates::default());
    let mut group = c.benchmark_group("scatter");
    group.throughput(Throughput::Bytes(captured.bytes)).sample_size(10);
    group.bench_function("parse", |b| {
        b.iter(|| parse(&captured.pieces, |at, data| drop(black_box((at, data)))));
    });
    for (name, seal, parity, rates) in [
        ("parse, encode, place", false, false, &plain),
        ("parse, encode, seal, place", true, false, &sealed),
        ("parse, encode, seal, place with parity of 3", true, true, &others),
    ] {
        let once = || timed(|| scatter_under_way(captured, seal, parity));
        group.bench_function(name, |b| rates.time(b, captured.bytes, once));
    }
    group.finish();
    [plain, sealed]
}

fn gather(c: &mut Criterion, captured: &Captured) {
    let mut group = c.benchmark_group("gather");
    group.throughput(Throughput::Bytes(captured.bytes)).sample_size(10);
    for sealed in [false, true] {
        let packs = scatter_all(captured, sealed);
        let fetched = || {
            let copy = |pack: &Pack| (pack.id, BytesMut::from(&pack.bytes[..]));
            let fetched: Vec<(PackId, BytesMut)> = packs.iter().map(copy).collect();
            (fetched, Placed::new(captured, sealed))
        };
        let place = |(fetched, mut placed): (Vec<(PackId, BytesMut)>, Placed)| {
            fetched.into_iter().for_each(|(id, bytes)| placed.pack(id, bytes));
            placed.is_whole();
        };
        group.bench_function(if sealed { "open sealed, place" } else { "open, place" }, |b| {
            b.iter_batched(fetched, place, criterion::BatchSize::PerIteration);
        });
    }
    group.finish();
}

/// From one QEMU's stream to the other's, all of it on this core.
fn both(c: &mut Criterion, captured: &Captured) -> [Rates; 2] {
    let rates = [Rates::default(), Rates::default()];
    let mut group = c.benchmark_group("both");
    group.throughput(Throughput::Bytes(captured.bytes)).sample_size(10);
    for (sealed, rates) in [false, true].into_iter().zip(&rates) {
        let once = || {
            let mut placed = Placed::new(captured, sealed);
            timed(|| {
                scatter_each(captured, sealed, false, |pack| {
                    // A store gives back a copy.
                    placed.pack(pack.id, BytesMut::from(&pack.bytes[..]));
                });
                placed.is_whole();
            })
        };
        let name = if sealed { "scatter and gather, sealed" } else { "scatter and gather" };
        group.bench_function(name, |b| rates.time(b, captured.bytes, once));
    }
    group.finish();
    rates
}

fn main() -> ExitCode {
    let captured = Captured::of(capture::take());
    let mut criterion = Criterion::default().configure_from_args();
    let [plain, sealed] = scatter(&mut criterion, &captured);
    gather(&mut criterion, &captured);
    let [both_plain, both_sealed] = both(&mut criterion, &captured);
    criterion.final_summary();
    let hold = [
        judge("parse, encode, place", PLAIN_LEAST, &plain),
        judge("parse, encode, seal, place", SEALED_LEAST, &sealed),
        judge("the same, then open, place at the destination", PLAIN_LEAST, &both_plain),
        judge("the same, sealed", SEALED_LEAST, &both_sealed),
    ];
    match hold.iter().all(|holds| *holds) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
