//! A network limit holds everything back and starves nobody: a guest's small writes pass beside blocks that wait
//! for the same 1 MB/s, and the blocks pass beside them; a guest that writes more than the link takes is held, too.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use lifeboat_agent::disk::sync::mirror::DEADLINE;
use lifeboat_agent::disk::sync::phases::Phase;
use lifeboat_agent::disk::sync::send::Command;
use lifeboat_agent::{clock, tasks};
use lifeboat_protocol::units::BytesPerSec;

use crate::world::{MIB, Way, World};

const SLOW: BytesPerSec = BytesPerSec(1_000_000);
/// For so long it is looked at.
const LOOKED_FOR: Duration = Duration::from_secs(6);

/// Writes 4 KiB and flushes, some forty times a second, which is less than the link takes; how many came
/// through in each second.
fn write_and_flush(path: &str) -> Vec<u32> {
    let image = File::options().write(true).open(path).unwrap();
    let (begin, mut counts) = (clock::now(), vec![0; LOOKED_FOR.as_secs() as usize]);
    for number in 0_u64.. {
        // In blocks that have gone already, and anywhere in them.
        image.write_all_at(&[number as u8; 4096], number * 7919 % 256 * 4096).unwrap();
        image.sync_data().unwrap();
        let second = begin.elapsed().as_secs() as usize;
        match counts.get_mut(second) {
            Some(count) => *count += 1,
            None => return counts,
        }
        clock::pause_thread(Duration::from_millis(25));
    }
    counts
}

/// In step, with most of the blocks still to go.
async fn early_in_step(world: &World, rate: BytesPerSec) -> (Way, u64) {
    world.rate.send_replace(Some(BytesPerSec(20_000_000)));
    let way = world.connect(world.outgoing(|_| {}));
    // The first megabyte is there, and most of the others are not.
    tokio::time::sleep(Duration::from_millis(500)).await;
    world.rate.send_replace(Some(rate));
    way.commands.send(Command::GoInStep).await.unwrap();
    world.until(Phase::Synchronous).await;
    let begin = left(world);
    assert!(begin > 12 * MIB, "{begin} bytes are left");
    (way, begin)
}

/// Bytes in blocks that are to go.
fn left(world: &World) -> u64 {
    world.mirror.disks()[0].dirty.count() * (64 << 10)
}

async fn arrives_whole(world: &World, way: Way) {
    world.rate.send_replace(None);
    way.seal().await;
    world.assert_same();
    way.cede().await;
}

/// Writes as fast as it can, into blocks that have gone already; how many bytes.
fn write_only(path: &str) -> u64 {
    let image = File::options().write(true).open(path).unwrap();
    let (begin, content) = (clock::now(), vec![7; 64 << 10]);
    for number in 0_u64.. {
        if begin.elapsed() > LOOKED_FOR {
            return number * content.len() as u64;
        }
        image.write_all_at(&content, number % 16 * content.len() as u64).unwrap();
    }
    0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_writes_more_than_the_link_takes_is_held_and_blocks_pass_beside_it() {
    let (world, link) = (World::new(), BytesPerSec(8_000_000));
    let (way, begin) = early_in_step(&world, link).await;
    let path = world.mount.through("a.raw");
    let wrote = tasks::blocking(move || write_only(&path)).await;
    let gone = begin - left(&world);
    let all = link.0 * LOOKED_FOR.as_secs();
    println!("{wrote} bytes written and {gone} of blocks gone, of {all} that the link takes");
    assert!(world.mirror.is_mirroring(), "one was not answered within {DEADLINE:?}");
    assert!(wrote < all * 3 / 4, "{wrote} bytes of {all}");
    assert!(wrote > all / 4, "{wrote} bytes of {all}");
    assert!(gone > all / 8, "{gone} bytes of blocks, of {all}");
    arrives_whole(&world, way).await;
    assert_eq!(world.mount.server.limit().rate(), None, "nothing holds it any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guests_small_writes_pass_steadily_beside_blocks_at_1_mb_per_second() {
    let world = World::new();
    let (way, begin) = early_in_step(&world, SLOW).await;
    let path = world.mount.through("a.raw");
    let counts = tasks::blocking(move || write_and_flush(&path)).await;
    let gone = begin - left(&world);
    println!("{counts:?} flushed writes a second, and {gone} bytes of blocks gone");
    // Every one of them waited for its turn among the blocks, and none for its deadline.
    assert!(world.mirror.is_mirroring(), "one was not answered within {DEADLINE:?}");
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    // Nor do they keep the blocks from going: at least a quarter of the limit.
    assert!(gone >= SLOW.0 * LOOKED_FOR.as_secs() / 4, "{gone} bytes of blocks");
    arrives_whole(&world, way).await;
}
