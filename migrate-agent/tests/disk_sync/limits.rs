//! A slow network limit holds everything back and starves nobody: a guest's small writes pass beside blocks
//! that wait for the same 1 MB/s, and the blocks pass beside them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use lifeboat_agent::disk::sync::mirror::DEADLINE;
use lifeboat_agent::disk::sync::phases::Phase;
use lifeboat_agent::disk::sync::send::Command;
use lifeboat_agent::{clock, tasks};
use lifeboat_protocol::units::BytesPerSec;

use crate::world::{MIB, World};

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

#[tokio::test(flavor = "multi_thread")]
async fn a_guests_small_writes_pass_steadily_beside_blocks_at_1_mb_per_second() {
    let world = World::new();
    world.rate.send_replace(Some(BytesPerSec(20_000_000)));
    let way = world.connect(world.outgoing(|_| {}));
    let left = || world.mirror.disks()[0].dirty.count();
    // The first megabyte is there, and most of the others are not.
    tokio::time::sleep(Duration::from_millis(500)).await;
    world.rate.send_replace(Some(SLOW));
    way.commands.send(Command::GoInStep).await.unwrap();
    world.until(Phase::Synchronous).await;
    let begin = left();
    assert!(begin * (64 << 10) > 12 * MIB, "{begin} blocks are left");
    let path = world.mount.through("a.raw");
    let counts = tasks::blocking(move || write_and_flush(&path)).await;
    println!("{counts:?} flushed writes a second, {begin} blocks were left and {} are", left());
    // Every one of them waited for its turn among the blocks, and none for its deadline.
    assert!(world.mirror.is_mirroring(), "one was not answered within {DEADLINE:?}");
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    // Nor do they keep the blocks from going: at least a quarter of the limit.
    let gone = begin.saturating_sub(left()) * (64 << 10);
    assert!(gone >= SLOW.0 * LOOKED_FOR.as_secs() / 4, "{gone} bytes of blocks");
    world.rate.send_replace(None);
    way.seal().await;
    world.assert_same();
    way.cede().await;
}
