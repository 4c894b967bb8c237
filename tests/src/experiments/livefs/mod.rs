//! LiveFS' figures 5 to 7: a guest moves before its disk is complete, by what is sent before it does; and the
//! order in which segments go.
//!
//! ```text
//!   guest ── FUSE mount ── source's driver ══ 240 Mbit/s ══ destination's ── FUSE mount ── guest
//! ```
//!
//! The paper's 6 GB image of 96 segments of 64 MB becomes one of 96 segments of 1 MiB, so that
//! `handover-size` counts as in the paper: 0 to 80 segments are 0 to 83 %. Its whole segments are our
//! blocks of 1 MiB, the largest there are. Our finer blocks, a thousandth of the paper's segments, would be
//! 1 KiB here; there are none below 4 KiB. The link is the limit that the source's driver keeps to by
//! itself, for blocks as for what is fetched on demand.
//!
//! Not here: the VM's memory, which the paper's times contain.

pub mod five;
mod guest;
pub mod order;
mod rig;
pub mod seven;
pub mod six;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use lifeboat_agent::disk::sync::rank::{Strategy, Weights};
use lifeboat_lab::experiment::Record;
use serde_json::Value;

use self::guest::{Load, Step};
use self::rig::Plan;
use super::Setting;
use super::machine::machine;
use crate::clock;

const MIB: u64 = 1 << 20;
/// Segments of the image, each 1 MiB; the paper has as many of 64 MB.
const SEGMENTS: u64 = 96;
/// What the link carries, bytes/s: 240 Mbit/s.
const LINK: u64 = 30_000_000;
/// The block that stands for a whole segment, and our finer one, bytes.
const BLOCKS: [(&str, u64); 2] = [("whole segments", MIB), ("blocks of 4 KiB", 4 << 10)];
/// Where only one size is looked at, bytes.
const BLOCK: u64 = 16 << 10;

/// Bonnie++'s file, in segments, and the busy index before it.
const FILE: std::ops::Range<u64> = 16..48;
const INDEX: std::ops::Range<u64> = 0..8;
/// It is written so long, then read so long, and again.
const STAGES: (Duration, Duration) = (Duration::from_secs(8), Duration::from_secs(4));
/// Threads of that load: one for the file, one for the index.
const BONNIE_THREADS: usize = 2;
/// Between the index' rank and the file's at 0.5 s of watching: 31 reads a segment against 8 writes.
const BONNIE_THRESHOLD_PER_SEC: f64 = 8.0;

/// The migration of a guest that is like Bonnie++; by itself a post-copy.
fn bonnie() -> Plan {
    Plan {
        block: BLOCK,
        strategy: Strategy::Hot { threshold: f64::INFINITY },
        weights: Weights::default(),
        monitoring: Duration::ZERO,
        watched_already: false,
        handover_segments: 0,
        threads: BONNIE_THREADS,
        reads_only: false,
        load: bonnie_load(),
    }
}

/// Like Bonnie++: a file is rewritten at random, 500 times 4 KiB each second (2 MB/s), then read from
/// one end to the other; a small index is read all the while, 1,000 times each second.
fn bonnie_load() -> Load {
    Arc::new(|step: Step<'_>| {
        let within = (STAGES.0 + STAGES.1).as_millis();
        let writes = step.elapsed.as_millis() % within < STAGES.0.as_millis();
        match (step.thread, writes) {
            (0, true) => {
                for _ in 0..10 {
                    let at = somewhere(&FILE, step.chance);
                    step.image.write_all_at(&[0xee; 4096], at)?;
                }
                Ok(Duration::from_millis(20))
            }
            (0, false) => {
                let turn = step.elapsed.as_millis() as u64 / 20 * 65_536;
                let at = FILE.start * MIB + turn % ((FILE.end - FILE.start) * MIB);
                read(step.image, 65_536, at).map(|()| Duration::from_millis(20))
            }
            _ => {
                for _ in 0..10 {
                    read(step.image, 4096, somewhere(&INDEX, step.chance))?;
                }
                Ok(Duration::from_millis(10))
            }
        }
    })
}

fn somewhere(segments: &std::ops::Range<u64>, chance: &mut crate::chance::Chance) -> u64 {
    let pages = (segments.end - segments.start) * MIB / 4096;
    segments.start * MIB + chance.below(pages as usize) as u64 * 4096
}

fn read(image: &File, length: usize, at: u64) -> io::Result<()> {
    image.read_exact_at(&mut vec![0; length], at)
}

fn blank(setting: &Setting<'_>, name: &str, texts: [&str; 2], mut parameters: Value) -> Record {
    parameters["image_bytes"] = (SEGMENTS * MIB).into();
    parameters["segment_bytes"] = MIB.into();
    parameters["link_bytes_per_sec"] = LINK.into();
    parameters["link"] = "the limit that the source's driver keeps to".into();
    let [question, others_show] = texts.map(str::to_owned);
    Record {
        name: name.to_owned(),
        question,
        others_show,
        quick: setting.quick,
        began_unix: clock::unix_now().as_secs(),
        machine: machine(),
        parameters,
        samples: Vec::new(),
        checks: Vec::new(),
    }
}
