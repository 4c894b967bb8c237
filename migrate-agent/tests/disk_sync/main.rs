//! An image that is written through the real mount, brought to another file by the real drivers, and
//! compared byte for byte. Takes root and /dev/fuse.

mod ahead;
#[path = "../disk_lab/mod.rs"]
mod disk_lab;
mod hostile;
mod limits;
mod model;
mod power;
mod promised;
mod world;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use disk_lab::Mounted;
use lifeboat_agent::disk::fuse::{Expiry, Hook, Image, Op, Request};
use lifeboat_agent::disk::sync::arriving::{Arriving, READ_DEADLINE};
use lifeboat_agent::disk::sync::incoming::Readiness;
use lifeboat_agent::disk::sync::mirror::DEADLINE;
use lifeboat_agent::disk::sync::phases::{Goal, Phase};
use lifeboat_agent::disk::sync::rank::Strategy;
use lifeboat_agent::disk::sync::receive::{Held, ReceiveError};
use lifeboat_agent::disk::sync::send::{Choice, Command, SendError};
use lifeboat_agent::{clock, tasks};
use lifeboat_protocol::units::BytesPerSec;
use tokio::sync::oneshot;
use world::{Guest, LENGTH, MIB, Way, World};

#[tokio::test(flavor = "multi_thread")]
async fn three_phases_bring_an_image_that_is_written_all_the_while() {
    let world = World::new();
    world.mount.server.limit().set(Some(BytesPerSec(10_000_000)));
    let guest = Guest::start(&world, 1);
    let way = world.connect(world.outgoing(|_| {}));
    world.until(Phase::Synchronous).await;
    let before = guest.writes.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(guest.writes.load(Ordering::Relaxed) > before + 20, "writes go on in step");
    world.mount.server.limit().set(None);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(world.progress.borrow().phase, Phase::Synchronous);
    let writes = tasks::blocking(move || guest.stop()).await;
    println!("{writes} writes");
    way.seal().await;
    world.assert_same();
    // A hole stays one, and zeroes became one.
    let blocks =
        std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&world.arrived).unwrap());
    assert!(blocks * 512 < LENGTH * 9 / 10, "{blocks}");
    // Sealed: whoever writes now is told so.
    let late = File::options().write(true).open(world.mount.through("a.raw")).unwrap();
    assert!(late.write_all_at(b"late", 0).is_err());
    way.cede().await;
    world.assert_same();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_arrives_in_blocks_of_whatever_size_its_source_says() {
    for (block, transfer) in [(16 << 10, 32 << 10), (MIB, MIB)] {
        let world = World::in_blocks_of(block);
        world.mount.server.limit().set(Some(BytesPerSec(10_000_000)));
        let guest = Guest::start(&world, block);
        let way = world.connect(world.outgoing(|choice| choice.transfer = transfer));
        world.until(Phase::Synchronous).await;
        let writes = tasks::blocking(move || guest.stop()).await;
        println!("{writes} writes, blocks of {block}");
        way.seal().await;
        assert_eq!(world.received.block().unwrap().bytes(), block);
        world.assert_same();
        way.cede().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_go_to_both_sides_at_once_where_somebody_is_in_a_hurry() {
    let world = World::new();
    world.rate.send_replace(Some(BytesPerSec(4_000_000)));
    world.mount.server.limit().set(Some(BytesPerSec(2_000_000)));
    let guest = Guest::start(&world, 7);
    let way = world.connect(world.outgoing(|_| {}));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(world.progress.borrow().phase, Phase::Bulk);
    way.commands.send(Command::GoInStep).await.unwrap();
    world.until(Phase::Synchronous).await;
    let left = || world.mirror.disks()[0].dirty.count();
    // The image takes 10 s at that rate.
    let (then, writes) = (left(), guest.writes.load(Ordering::Relaxed));
    assert!(then > 300, "{then}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Nothing that is written adds to what is left, and the guest writes on.
    assert!(left() < then, "{then} {}", left());
    assert!(guest.writes.load(Ordering::Relaxed) > writes + 10);
    world.rate.send_replace(None);
    world.mount.server.limit().set(None);
    let drained = async {
        while left() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), drained).await.unwrap();
    tasks::blocking(move || guest.stop()).await;
    way.seal().await;
    world.assert_same();
    way.cede().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_moves_early_finds_everything_on_demand_and_keeps_what_it_writes() {
    let world = World::new();
    let image = File::options().read(true).write(true).open(world.mount.through("a.raw")).unwrap();
    let change = |choice: &mut Choice| {
        choice.goal = Goal { left: 1, early: true };
        choice.strategy = Strategy::Hot { threshold: 5.0 };
        choice.monitors = true;
    };
    world.rate.send_replace(Some(BytesPerSec(20_000_000)));
    let way = world.connect(world.outgoing(change));
    // Segments 3 and 5 are hot.
    for number in 0..40 {
        image.write_all_at(&[7; 4096], 12 * MIB + number * 4096).unwrap();
        image.read_exact_at(&mut [0; 4096], 20 * MIB + number * 4096).unwrap();
    }
    way.commands.send(Command::EndMonitoring).await.unwrap();
    world.until(Phase::Synchronous).await;
    way.seal().await;
    let missing = world.received.missing();
    assert!(missing > 40, "{missing}");
    for hot in [12 * MIB, 20 * MIB] {
        let is = world.received.readiness(0, &(hot..hot + 4 * MIB)).unwrap();
        assert_eq!(is, Readiness::Ready);
    }
    // The VM runs at the destination, on a mount of its own: it overwrites a part of a missing
    // block, and reads another.
    let (there, answering) = mount_at_destination(&world);
    let mut expected = std::fs::read(world.mount.native("a.raw")).unwrap();
    let own = 39 * MIB + 100..39 * MIB + 300;
    expected[own.start as usize..own.end as usize].fill(99);
    way.commands.send(Command::Cede).await.unwrap();
    let path = there.through("arrived");
    let wanted = 40 * MIB;
    let (content, took) = tasks::blocking(move || {
        let guest = File::options().read(true).write(true).open(path).unwrap();
        guest.write_all_at(&[99; 200], own.start).unwrap();
        guest.sync_data().unwrap();
        let begin = clock::now();
        let mut content = [0; 8192];
        guest.read_exact_at(&mut content, wanted).unwrap();
        (content, begin.elapsed())
    })
    .await;
    println!("on demand after {took:?}, {} left", world.received.missing());
    assert!(world.received.missing() > 20, "it came before its turn");
    assert_eq!(content[..], expected[wanted as usize..wanted as usize + 8192]);
    assert!(there.folders.images().join("arrived.missing").exists(), "a flush keeps the map");
    way.source.await.unwrap().1.unwrap();
    assert_eq!(world.received.missing(), 0);
    assert!(std::fs::read(there.through("arrived")).unwrap() == expected);
    answering.abort();
}

/// What a guest at the destination has its disk on while some of it is missing, and who answers its reads.
fn mount_at_destination(world: &World) -> (Mounted, tokio::task::JoinHandle<()>) {
    let arriving = Arriving::new(Arc::clone(&world.received), READ_DEADLINE);
    let own = Arc::clone(&arriving);
    let answering = tasks::spawn("arriving", async move { own.run().await });
    (Mounted::of(&world.arrived, arriving), answering)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_overwrites_at_its_destination_is_not_sent() {
    let world = World::new();
    let change = |choice: &mut Choice| {
        choice.goal = Goal { left: 1, early: true };
        choice.strategy = Strategy::Hot { threshold: f64::INFINITY };
    };
    world.rate.send_replace(Some(BytesPerSec(4_000_000)));
    let way = world.connect(world.outgoing(change));
    world.until(Phase::Synchronous).await;
    way.seal().await;
    let (there, answering) = mount_at_destination(&world);
    let mut expected = std::fs::read(world.mount.native("a.raw")).unwrap();
    let (overwritten, discarded) = (10 * MIB..LENGTH - 2 * MIB, LENGTH - 2 * MIB..LENGTH - MIB);
    expected[overwritten.start as usize..overwritten.end as usize].fill(99);
    expected[discarded.start as usize..discarded.end as usize].fill(0);
    way.commands.send(Command::Cede).await.unwrap();
    let path = there.through("arrived");
    tasks::blocking(move || {
        let guest = File::options().read(true).write(true).open(path).unwrap();
        for at in overwritten.step_by(MIB as usize) {
            guest.write_all_at(&[99; MIB as usize], at).unwrap();
        }
        world::punch(&guest, discarded.start, MIB);
        // Room is set aside where something is still to come.
        rustix::fs::fallocate(&guest, rustix::fs::FallocateFlags::KEEP_SIZE, 5 * MIB, MIB).unwrap();
    })
    .await;
    // Its last mebibyte and what lies before, or less: that much has to come. 64 KiB each.
    assert!(world.received.missing() <= 11 * 16, "{}", world.received.missing());
    let begin = clock::now();
    while world.mirror.disks()[0].dirty.count() > 11 * 16 {
        assert!(begin.elapsed() < Duration::from_secs(1), "the source still wants to send it");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    way.source.await.unwrap().1.unwrap();
    assert_eq!(world.received.missing(), 0);
    assert!(std::fs::read(there.through("arrived")).unwrap() == expected);
    answering.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_cut_in_any_phase_cost_the_guest_nothing() {
    let world = World::new();
    world.mount.server.limit().set(Some(BytesPerSec(5_000_000)));
    world.rate.send_replace(Some(BytesPerSec(40_000_000)));
    let guest = Guest::start(&world, 2);
    let mut way = world.connect(world.outgoing(|_| {}));
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        way = world.connect(way.cut().await);
    }
    // Its small writes make a block dirty each: 40 MB/s would never catch up.
    world.rate.send_replace(None);
    for _ in 0..5 {
        world.until(Phase::Synchronous).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let outgoing = way.cut().await;
        assert_eq!(outgoing.phase(), Phase::Dirty);
        way = world.connect(outgoing);
    }
    world.until(Phase::Synchronous).await;
    assert!(guest.longest_ms.load(Ordering::Relaxed) < 900);
    let writes = tasks::blocking(move || guest.stop()).await;
    assert!(writes > 100, "{writes}");
    way.seal().await;
    world.assert_same();
    way.cede().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_falls_silent_costs_one_deadline_and_vetoes() {
    let (world, way) = in_step().await;
    // Silent without closing, while its image is locked.
    let held = world.received.hold(0).unwrap();
    let image = File::options().read(true).write(true).open(world.mount.through("a.raw")).unwrap();
    let write = tasks::blocking(move || {
        let begin = clock::now();
        // On its way: nobody waits for it. What comes behind it is more than may be on its way.
        image.write_all_at(&[1; 4096], 0).unwrap();
        let ahead = begin.elapsed();
        image.write_all_at(&[2; 512 << 10], MIB).unwrap();
        let waited = begin.elapsed();
        image.write_all_at(&[3; 4096], 4 * MIB).unwrap();
        (ahead, waited, begin.elapsed() - waited)
    });
    let (ahead, waited, next) = write.await;
    println!("ahead {ahead:?}, waited {waited:?}, next {next:?}");
    assert!(ahead < Duration::from_millis(200) && next < Duration::from_millis(200));
    assert!(waited >= DEADLINE * 9 / 10 && waited < DEADLINE * 2, "{waited:?}");
    cannot_be_sealed_until(held, &way).await;
    world.assert_same();
    way.cede().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flush_waits_for_both_sides_and_no_longer_than_its_deadline() {
    let (world, way) = in_step().await;
    let image = File::options().read(true).write(true).open(world.mount.through("a.raw")).unwrap();
    image.write_all_at(&[1; 4096], 0).unwrap();
    image.sync_data().unwrap();
    assert_eq!(world.at_destination(4096), [1; 4096]);
    let held = world.received.hold(0).unwrap();
    let flushed = tasks::blocking(move || {
        let begin = clock::now();
        image.write_all_at(&[2; 4096], 0).unwrap();
        image.sync_data().unwrap();
        begin.elapsed()
    });
    let took = flushed.await;
    assert!(took >= DEADLINE * 9 / 10 && took < DEADLINE * 2, "{took:?}");
    cannot_be_sealed_until(held, &way).await;
    world.assert_same();
    way.cede().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_that_nobody_waits_for_end_the_step_all_the_same_when_they_stay_away() {
    let (world, way) = in_step().await;
    let held = world.received.hold(0).unwrap();
    let image = File::options().read(true).write(true).open(world.mount.through("a.raw")).unwrap();
    image.write_all_at(&[1; 4096], 0).unwrap();
    let begin = clock::now();
    while world.mirror.is_mirroring() {
        assert!(begin.elapsed() < DEADLINE * 2, "still in step");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(begin.elapsed() >= DEADLINE * 9 / 10);
    cannot_be_sealed_until(held, &way).await;
    world.assert_same();
    way.cede().await;
}

/// An image of which both sides have everything.
async fn in_step() -> (World, Way) {
    let world = World::new();
    let way = world.connect(world.outgoing(|_| {}));
    world.until(Phase::Synchronous).await;
    (world, way)
}

async fn cannot_be_sealed_until(held: Held, way: &Way) {
    let (answer, sealed) = oneshot::channel();
    way.commands.send(Command::Seal(answer)).await.unwrap();
    let soon = tokio::time::timeout(Duration::from_millis(300), sealed).await;
    assert!(!matches!(soon, Ok(Ok(Ok(())))), "{soon:?}");
    drop(held);
    way.seal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_knows_nothing_sends_only_what_differs() {
    let world = World::new();
    let way = world.connect(world.outgoing(|_| {}));
    world.until(Phase::Synchronous).await;
    way.cut().await;
    // What is written while no source listens.
    let image = File::options().write(true).open(world.mount.native("a.raw")).unwrap();
    image.write_all_at(b"different", 30 * MIB).unwrap();
    image.write_all_at(b"different", 50 * MIB).unwrap();
    // Its map is gone with the process: nothing is dirty.
    while world.mirror.disks()[0].dirty.take(0).is_some() {}
    let way = world.connect(world.outgoing(|choice| choice.compares = true));
    way.seal().await;
    world.assert_same();
    way.cede().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_already_there_is_not_overwritten() {
    let world = World::new();
    std::fs::write(&world.arrived, "mine").unwrap();
    let way = world.connect(world.outgoing(|_| {}));
    let [control, _bulk] = <[_; 2]>::try_from(way.destinations).unwrap();
    assert!(matches!(control.await.unwrap(), Err(ReceiveError::Create { .. })));
    assert!(way.source.await.unwrap().1.is_err());
    assert_eq!(std::fs::read(&world.arrived).unwrap(), b"mine");
}

/// A disk of which 4 KiB at 30 MiB cannot be read.
struct BadBlock;

const BAD: std::ops::Range<u64> = 30 * MIB..30 * MIB + 4096;

impl Hook for BadBlock {
    fn arrived(&self, request: Request) {
        match request.op() {
            Op::Read { offset, length } if offset < BAD.end && BAD.start < offset + length => {
                request.fail(rustix::io::Errno::IO);
            }
            _ => request.answer(),
        }
    }

    fn expired(&self, _: &Image, _: &Op) -> Expiry {
        Expiry::Answer
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_that_cannot_be_read_ends_the_transfer_by_name_and_the_guest_runs_on() {
    // Its errors come from the kernel: the image lies on a mount of its own.
    let disk = Mounted::with(Arc::new(BadBlock));
    let world = World::on(Some(&disk));
    let way = world.connect(world.outgoing(|_| {}));
    let (_outgoing, outcome) = way.source.await.unwrap();
    let error = outcome.unwrap_err();
    assert!(!error.may_retry(), "{error}");
    // 64 KiB a block; it was read with seven others.
    assert!(matches!(error, SendError::Read { disk: 0, block: 480, .. }), "{error:?}");
    let (veto, sealed) = oneshot::channel();
    assert!(way.commands.send(Command::Seal(veto)).await.is_err(), "nobody is left to seal");
    drop(sealed);
    // The guest finds the same error there as without us, and none elsewhere.
    let path = world.mount.through("a.raw");
    tasks::blocking(move || {
        let image = File::options().read(true).write(true).open(path).unwrap();
        let error = image.read_exact_at(&mut [0; 4096], BAD.start).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        image.write_all_at(b"goes on", BAD.start - MIB).unwrap();
        image.sync_data().unwrap();
        let mut content = [0; 7];
        image.read_exact_at(&mut content, BAD.start - MIB).unwrap();
        assert_eq!(&content, b"goes on");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_opened_to_be_overwritten_is_emptied_on_both_sides() {
    let world = World::new();
    let way = world.connect(world.outgoing(|_| {}));
    world.until(Phase::Synchronous).await;
    let path = world.mount.through("a.raw");
    let write = move || {
        let image = File::create(&path).unwrap();
        assert_eq!(image.metadata().unwrap().len(), 0);
        image.write_all_at(&[9; 3 * 4096], 4 * MIB).unwrap();
    };
    tasks::blocking(write).await;
    way.seal().await;
    assert_eq!(std::fs::metadata(&world.arrived).unwrap().len(), 4 * MIB + 3 * 4096);
    world.assert_same();
    way.cede().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_resized_on_the_way_arrives_with_its_last_length() {
    let world = World::new();
    world.rate.send_replace(Some(BytesPerSec(20_000_000)));
    let way = world.connect(world.outgoing(|_| {}));
    let image = File::options().read(true).write(true).open(world.mount.through("a.raw")).unwrap();
    let image = Arc::new(image);
    let resized = |length: u64, last: u8| {
        let image = Arc::clone(&image);
        tasks::blocking(move || {
            image.set_len(length).unwrap();
            image.write_all_at(&[last; 4096], length - 4096).unwrap();
        })
    };
    // In the bulk phase larger; smaller while both sides are in step, and larger again.
    resized(LENGTH + 8 * MIB, 1).await;
    world.rate.send_replace(None);
    world.until(Phase::Synchronous).await;
    resized(LENGTH - 8 * MIB, 2).await;
    resized(LENGTH + 3 * MIB, 3).await;
    way.seal().await;
    assert_eq!(std::fs::metadata(&world.arrived).unwrap().len(), LENGTH + 3 * MIB);
    world.assert_same();
    way.cede().await;
}
