//! A power cut at either side leaves what the guest was promised: both images lie on a disk with a cache
//! of its own ([`Volatile`]), of which a cut leaves nothing, or a part, that was not made durable.
//!
//! Four writers work on an image, each in its part of it, and flush now and then. Whatever a flush was
//! answered for has to be at the source at any time, at the destination while both are in step; and all
//! of the image at the destination once it is sealed. By seed, as in `promised`; tests/soak does more.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use lifeboat_agent::disk::fuse::{Expiry, Hook, Image, Op, Request};
use lifeboat_agent::disk::sync::phases::Phase;
use lifeboat_agent::disk::sync::receive::Received;
use lifeboat_agent::{clock, tasks};
use lifeboat_protocol::units::BytesPerSec;

use crate::disk_lab::Mounted;
use crate::model::Random;
use crate::world::{LENGTH, Way, World, punch};

const UNIT: u64 = 4096;
const WRITERS: u64 = 4;
const SOURCE: &str = "a.raw";
const DESTINATION: &str = "arrived";

/// Something that was done to an image.
enum Change {
    Data(u64, Vec<u8>),
    Zeroes(Range<u64>),
    Length(u64),
}

impl Change {
    fn land(&self, on: &mut Vec<u8>) {
        match self {
            Self::Data(at, data) => {
                let (start, end) = (*at as usize, *at as usize + data.len());
                on.resize(on.len().max(end), 0);
                on[start..end].copy_from_slice(data);
            }
            Self::Zeroes(range) => {
                let end = (range.end as usize).min(on.len());
                on[(range.start as usize).min(end)..end].fill(0);
            }
            Self::Length(length) => on.resize(*length as usize, 0),
        }
    }
}

/// An image as its disk has it, and what is in the disk's cache.
#[derive(Default)]
struct Cached {
    durable: Vec<u8>,
    since: Vec<Change>,
}

/// The disk, by its images' names.
#[derive(Default)]
struct Volatile(Mutex<HashMap<OsString, Cached>>);

impl Volatile {
    fn images(&self) -> MutexGuard<'_, HashMap<OsString, Cached>> {
        self.0.lock().unwrap()
    }

    /// What is there from the beginning is durable.
    fn has(&self, name: &str, durable: Vec<u8>) {
        self.images().insert(name.into(), Cached { durable, since: vec![] });
    }

    /// What a power cut leaves of an image: of what is in the cache, each change by chance or none.
    fn cut(&self, name: &str, random: Option<&mut Random>) -> Vec<u8> {
        let images = self.images();
        let cached = &images[OsStr::new(name)];
        let mut left = cached.durable.clone();
        if let Some(random) = random {
            let landed = cached.since.iter().filter(|_| random.below(3) == 0);
            landed.for_each(|change| change.land(&mut left));
        }
        left
    }
}

impl Hook for Volatile {
    /// One after the other: what was done before a flush is in the cache before it.
    fn arrived(&self, request: Request) {
        let image = Arc::clone(request.image());
        let mut images = self.images();
        let cached = images.entry(image.name().to_owned()).or_default();
        let data = request.data();
        if request.perform().is_ok() {
            match request.op() {
                Op::Read { .. } => {}
                Op::Write { offset, .. } => cached.since.push(Change::Data(offset, data)),
                Op::Allocate { mode, offset, length }
                    if mode.cast_signed() & libc::FALLOC_FL_PUNCH_HOLE != 0 =>
                {
                    cached.since.push(Change::Zeroes(offset..offset + length));
                }
                Op::Allocate { .. } | Op::Resize { .. } => {
                    cached.since.push(Change::Length(image.length().unwrap()));
                }
                Op::Flush { .. } => {
                    let Cached { durable, since } = cached;
                    since.drain(..).for_each(|change| change.land(durable));
                }
            }
        }
        drop(images);
        request.answer();
    }

    fn expired(&self, _: &Image, _: &Op) -> Expiry {
        Expiry::Answer
    }
}

/// A writer's part of the image: what it has to find after a cut.
struct Part {
    start: u64,
    /// As it was when the last flush was answered.
    flushed: Vec<u8>,
    /// What its units, by number, were all written with since then.
    since: BTreeMap<u64, Vec<u8>>,
}

impl Part {
    fn wrote(&mut self, at: u64, length: u64, content: u8) {
        let first = (at - self.start) / UNIT;
        (first..first + length / UNIT)
            .for_each(|unit| self.since.entry(unit).or_default().push(content));
    }

    fn flushed(&mut self) {
        for (unit, contents) in std::mem::take(&mut self.since) {
            let bytes = (unit * UNIT) as usize..((unit + 1) * UNIT) as usize;
            self.flushed[bytes].fill(contents[contents.len() - 1]);
        }
    }

    fn assert_in(&self, image: &[u8], what: &str) {
        let (start, length) = (self.start as usize, self.flushed.len());
        assert!(image.len() >= start + length, "{what}: {} bytes are left", image.len());
        let own = image[start..start + length].chunks(UNIT as usize);
        let flushed = self.flushed.chunks(UNIT as usize);
        for (unit, (found, flushed)) in (0..).zip(own.zip(flushed)) {
            let later = self.since.get(&unit).into_iter().flatten();
            let mut later = later.map(|content| found.iter().all(|byte| byte == content));
            let place = self.start + unit * UNIT;
            assert!(found == flushed || later.any(|is| is), "{what}: byte {place} and on is lost");
        }
    }
}

/// The writers, which can be held between two of their requests.
struct Writers {
    parts: Vec<Arc<Mutex<Part>>>,
    held: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    flushes: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Writers {
    fn start(world: &World, image: &[u8], seed: u64) -> Self {
        let (held, stop, flushes) = <(Arc<_>, Arc<_>, Arc<_>)>::default();
        let mut own = Self { parts: vec![], held, stop, flushes, threads: vec![] };
        for (number, flushed) in (0..).zip(image.chunks((LENGTH / WRITERS) as usize)) {
            let start = number * (LENGTH / WRITERS);
            let part = Part { start, flushed: flushed.to_vec(), since: BTreeMap::new() };
            own.parts.push(Arc::new(Mutex::new(part)));
            let path = world.mount.through(SOURCE);
            let file = File::options().read(true).write(true).open(path).unwrap();
            let part = Arc::clone(&own.parts[number as usize]);
            let signs = [&own.held, &own.stop].map(Arc::clone);
            let flushes = Arc::clone(&own.flushes);
            let random = Random(seed * WRITERS + number);
            let work = move || write(&file, &part, &signs, &flushes, random);
            own.threads.push(std::thread::spawn(work));
        }
        own
    }

    /// Holds all of them while `look` sees their parts.
    async fn hold(&self, look: impl FnOnce(&[MutexGuard<'_, Part>]) + Send) {
        self.held.store(true, Ordering::SeqCst);
        let parts = self.parts.clone();
        tokio::task::block_in_place(|| {
            let parts: Vec<_> = parts.iter().map(|part| part.lock().unwrap()).collect();
            look(&parts);
        });
        self.held.store(false, Ordering::SeqCst);
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        // Also when a test fails: as `world::Guest`.
        self.stop.store(true, Ordering::SeqCst);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

fn write(
    file: &File,
    part: &Mutex<Part>,
    [held, stop]: &[Arc<AtomicBool>; 2],
    flushes: &AtomicU64,
    mut random: Random,
) {
    while !stop.load(Ordering::SeqCst) {
        if held.load(Ordering::SeqCst) {
            clock::pause_thread(Duration::from_millis(1));
            continue;
        }
        let mut part = part.lock().unwrap();
        let length = UNIT * (1 + random.below(16));
        let at = part.start + UNIT * random.below((LENGTH / WRITERS - length) / UNIT);
        match random.below(12) {
            0 => {
                file.sync_data().unwrap();
                part.flushed();
                flushes.fetch_add(1, Ordering::SeqCst);
            }
            1 => {
                punch(file, at, length);
                part.wrote(at, length, 0);
            }
            _ => {
                let content = 1 + random.below(255) as u8;
                file.write_all_at(&vec![content; length as usize], at).unwrap();
                part.wrote(at, length, content);
            }
        }
    }
}

/// One run, with what both sides' disks are.
struct Run {
    here: Arc<Volatile>,
    there: Arc<Volatile>,
    world: World,
    writers: Writers,
    random: Random,
}

impl Run {
    /// The source's power is cut; and the destination's, where both are in step.
    async fn cuts(&mut self, in_step: bool) {
        clock_rest(5 + self.random.below(60)).await;
        let Self { here, there, random, .. } = self;
        let by_chance = random.below(2) == 0;
        let mut cut = |disk: &Volatile, name| disk.cut(name, by_chance.then_some(&mut *random));
        self.writers
            .hold(|parts| {
                let left = cut(here, SOURCE);
                parts.iter().for_each(|part| part.assert_in(&left, "the source"));
                if in_step {
                    let left = cut(there, DESTINATION);
                    parts.iter().for_each(|part| part.assert_in(&left, "the destination"));
                }
            })
            .await;
    }

    /// Both have everything, durably, and every flush from now on is for both.
    async fn in_step(&self) {
        self.world.until(Phase::Synchronous).await;
        let drained = async {
            while self.world.mirror.disks()[0].dirty.count() > 0 {
                clock_rest(5).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), drained).await.unwrap();
        let image = File::open(self.world.mount.through(SOURCE)).unwrap();
        tasks::blocking(move || image.sync_data().unwrap()).await;
    }

    /// Cuts while both are in step.
    async fn cuts_in_step(&mut self) {
        self.in_step().await;
        let before = self.writers.flushes.load(Ordering::SeqCst);
        for _ in 0..8 {
            self.cuts(true).await;
        }
        assert!(self.world.mirror.is_mirroring(), "they fell out of step");
        assert!(self.writers.flushes.load(Ordering::SeqCst) > before, "nobody has flushed");
    }
}

async fn clock_rest(milliseconds: u64) {
    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
}

/// The way of an image, with its disks' power cut now and then.
async fn goes(seed: u64) {
    println!("seed {seed}");
    let (here, there) = <(Arc<Volatile>, Arc<Volatile>)>::default();
    let disks = [&here, &there].map(|disk| Mounted::with(Arc::clone(disk) as Arc<dyn Hook>));
    let world = World::on(Some(&disks[0]));
    let image = std::fs::read(disks[0].native(SOURCE)).unwrap();
    here.has(SOURCE, image.clone());
    let arrived = std::path::PathBuf::from(disks[1].through(DESTINATION));
    let world = World { received: Received::new(vec![arrived.clone()]), arrived, ..world };
    world.mount.server.limit().set(Some(BytesPerSec(12_000_000)));
    world.rate.send_replace(Some(BytesPerSec(100_000_000)));
    let writers = Writers::start(&world, &image, seed);
    let way = world.connect(world.outgoing(|_| {}));
    let mut run = Run { here, there, world, writers, random: Random(seed) };
    for _ in 0..3 {
        run.cuts(false).await;
    }
    run.world.rate.send_replace(None);
    run.cuts_in_step().await;
    let way: Way = run.world.connect(way.cut().await);
    run.cuts(false).await;
    run.cuts_in_step().await;
    // The guest pauses.
    tokio::task::block_in_place(|| run.writers.end());
    way.seal().await;
    let left = run.there.cut(DESTINATION, None);
    assert!(left == std::fs::read(disks[0].native(SOURCE)).unwrap(), "the seal is not durable");
    way.cede().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_power_cut_at_either_side_leaves_what_was_flushed_and_all_of_it_after_the_seal() {
    let number = |name: &str, otherwise: u64| {
        std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
    };
    let first = number("LIFEBOAT_SEED", 1);
    // A tenth of what `promised` does: each of them is cut some twenty times.
    let runs = number("LIFEBOAT_DISK_RUNS", 10) / 10;
    for seed in first..first + runs.max(1) {
        goes(seed).await;
    }
}

#[test]
fn the_disk_of_these_tests_forgets_what_was_not_flushed() {
    let disk = Arc::new(Volatile::default());
    let mount = Mounted::with(Arc::clone(&disk) as Arc<dyn Hook>);
    let file = File::create_new(mount.through("image")).unwrap();
    file.set_len(3 * UNIT).unwrap();
    file.write_all_at(&[1; UNIT as usize], UNIT).unwrap();
    file.sync_data().unwrap();
    file.write_all_at(&[2; UNIT as usize], UNIT).unwrap();
    file.write_all_at(&[2; UNIT as usize], 3 * UNIT).unwrap();
    punch(&file, UNIT, UNIT);
    let left = disk.cut("image", None);
    assert_eq!(left.len() as u64, 3 * UNIT);
    assert!(left[UNIT as usize..2 * UNIT as usize].iter().all(|byte| *byte == 1));
    file.sync_all().unwrap();
    assert!(disk.cut("image", None) == std::fs::read(mount.native("image")).unwrap());
}
