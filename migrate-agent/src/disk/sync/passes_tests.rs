//! Passes over a real file, with a stream that somebody reads at the other end.

use std::ffi::OsStr;

use tokio::io::DuplexStream;
use tokio::sync::watch;

use super::*;
use crate::disk::fuse::Images;
use crate::disk::parameters::TRANSFER;
use crate::disk::sync::mirror::DEADLINE;
use crate::disk::sync::phases::Goal;
use crate::disk::sync::rank::{Weights, order};
use crate::disk::sync::stream::FrameReader;
use crate::disk::track::{BLOCK, BlockSize, DirtyMap, SegmentSize};

const MIB: u64 = 1 << 20;
/// Segments of the image, each 1 MiB.
const SEGMENTS: u64 = 4;

#[test]
#[allow(clippy::single_range_in_vec_init, reason = "a list of ranges that has one")]
fn dirty_blocks_are_listed_as_runs_up_to_the_end() {
    let map = DirtyMap::new(BlockSize::new(4096).unwrap(), 1 << 20);
    for block in [0, 1, 5, 7, 8, 9, 100] {
        map.mark(&(block * 4096..block * 4096 + 1));
    }
    assert_eq!(runs(&map, 9 * 4096), [0..2, 5..6, 7..9]);
}

/// A pass' parts, and the ends at which somebody listens.
struct World {
    work: Work<DuplexStream>,
    blocks: FrameReader<DuplexStream>,
    said: mpsc::UnboundedReceiver<Frame>,
    _folder: tempfile::TempDir,
}

fn world(strategy: Strategy) -> World {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("disk"), vec![1; (SEGMENTS * MIB) as usize]).unwrap();
    let image = Images::open(folder.path()).unwrap().create(OsStr::new("disk"), false, 0).unwrap();
    let (block, segment) = (BlockSize::default(), SegmentSize::new(MIB).unwrap());
    let disks = [(OsStr::new("disk"), SEGMENTS * MIB)];
    let mirror = Arc::new(Mirror::new(&disks, block, segment, DEADLINE));
    blocks::mark_data(&mirror, 0, &image).unwrap();
    let goal = Goal { left: 0, early: strategy != Strategy::Whole };
    let weights = Weights::default();
    let (monitors, compares, transfer) = (false, false, TRANSFER);
    let choice = Choice { goal, strategy, weights, segment, transfer, monitors, compares };
    let traffic = mirror.disks()[0].activity.traffic();
    let (control, said) = mpsc::unbounded_channel();
    // Less than a run: who writes one waits until it is being read.
    let (here, there) = tokio::io::duplex(BLOCK as usize);
    let work = Work {
        mirror,
        images: vec![image],
        orders: Mutex::new(vec![order(&traffic, weights, strategy)]),
        choice,
        heat: Mutex::new(Heat::new(weights)),
        pace: Arc::new(Pace::new(watch::channel(None).1)),
        bulk: tokio::sync::Mutex::new(FrameWriter::new(here)),
        control,
        stopped: AtomicBool::new(false),
        wanted: Mutex::default(),
    };
    World { work, blocks: FrameReader::new(there), said, _folder: folder }
}

impl World {
    /// One pass; `meanwhile` is called when the first of its blocks have come, which are half a segment.
    /// The segments in the order in which they came.
    async fn pass(&mut self, meanwhile: impl Fn(&Mirror)) -> Vec<u64> {
        let (work, blocks, said) = (&self.work, &mut self.blocks, &mut self.said);
        let mut came = Vec::new();
        let listening = async {
            loop {
                let frame = tokio::select! {
                    Some(frame) = said.recv() => frame,
                    frame = blocks.next() => frame.unwrap().unwrap(),
                };
                if frame.kind == Kind::Data {
                    if came.is_empty() {
                        meanwhile(&work.mirror);
                    }
                    came.push(frame.offset / MIB);
                }
                work.mirror.ledger().acknowledge(frame.version);
            }
        };
        tokio::select! {
            passed = work.pass() => assert!(passed.unwrap().left == 0),
            () = listening => {}
        }
        came.dedup();
        came
    }
}

#[tokio::test]
async fn a_pass_goes_from_the_first_to_the_last_where_nothing_is_written() {
    let mut world = world(Strategy::Whole);
    assert_eq!(world.pass(|_| ()).await, [0, 1, 2, 3]);
}

#[tokio::test]
async fn what_is_written_while_a_pass_goes_on_goes_later_and_each_segment_once() {
    let mut world = world(Strategy::Whole);
    let write = |mirror: &Mirror, segment: u64, times: usize| {
        for _ in 0..times {
            mirror.disks()[0].activity.write(&(segment * MIB..segment * MIB + 1));
        }
    };
    let came = world.pass(|mirror| {
        write(mirror, 1, 9);
        write(mirror, 2, 3);
        // It is on its way already, and has no second turn.
        write(mirror, 0, 1);
    });
    assert_eq!(came.await, [0, 3, 2, 1]);
    // The next pass knows it from the beginning.
    world.work.mirror.disks()[0].dirty.mark(&(0..SEGMENTS * MIB));
    assert_eq!(world.pass(|_| ()).await, [3, 0, 2, 1]);
}

#[tokio::test]
async fn what_goes_before_a_vm_that_its_disk_follows_keeps_its_order() {
    let mut world = world(Strategy::Hot { threshold: 0.0 });
    let busy = |mirror: &Mirror| mirror.disks()[0].activity.write(&(MIB..MIB + 1));
    assert_eq!(world.pass(busy).await, [0, 1, 2, 3]);
}
