//! What a destination says of its blocks when the source asks: their hashes, or which are missing.
//!
//! Used by `receive`. Deliberately not here: what follows from it (`connection`).

use std::io;
use std::os::unix::fs::FileExt;

use xxhash_rust::xxh3::xxh3_64;

use super::{Answers, Disk};
use crate::disk::sync::frame::{Frame, Kind, MAX_PAYLOAD};

/// The hash of a block as both sides compute it; never 0, which stands for "not there".
#[must_use]
pub fn block_hash(content: &[u8]) -> u64 {
    xxh3_64(content).max(1)
}

/// Hashes of all blocks, as many frames as it takes. Each is also a sign of life, and so is at most
/// what a slow disk reads in a second.
pub(super) fn send_map(disk: &Disk, number: u16, answers: &Answers) -> io::Result<()> {
    const AT_A_TIME: u64 = 64 << 20;
    let (size, length) = {
        let incoming = disk.incoming();
        (incoming.block(), incoming.length())
    };
    let at_a_time = (AT_A_TIME / size.bytes()).clamp(1, MAX_PAYLOAD as u64 / 8);
    let mut first = 0;
    while first < size.count(length) {
        let until = (first + at_a_time).min(size.count(length));
        let mut hashes = Vec::new();
        for block in first..until {
            let range = size.range(block, length);
            let mut content = vec![0; (range.end - range.start) as usize];
            disk.file.read_exact_at(&mut content, range.start)?;
            hashes.extend_from_slice(&block_hash(&content).to_be_bytes());
        }
        let (offset, length) = (first * size.bytes(), (until - first) * size.bytes());
        let payload = hashes.into();
        let _ = answers.send(Frame { offset, length, payload, ..Frame::new(Kind::Map, number) });
        first = until;
    }
    // The end of the map: an empty one, with the version to go on after.
    let version = disk.incoming().newest();
    let _ = answers.send(Frame { offset: length, version, ..Frame::new(Kind::Map, number) });
    Ok(())
}

/// What is missing, for the source of a VM that runs here: 0 for a block that is not there, as if it
/// were its hash, and 1 for one that is.
pub(super) fn send_missing(disk: &Disk, number: u16, answers: &Answers) {
    const AT_A_TIME: u64 = 1 << 10;
    let incoming = disk.incoming();
    let (size, length) = (incoming.block(), incoming.length());
    let mut first = 0;
    while first < size.count(length) {
        let until = (first + AT_A_TIME).min(size.count(length));
        let marks =
            (first..until).flat_map(|block| u64::from(!incoming.lacks(block)).to_be_bytes());
        let payload = marks.collect::<Vec<u8>>().into();
        let (offset, length) = (first * size.bytes(), (until - first) * size.bytes());
        let _ = answers.send(Frame { offset, length, payload, ..Frame::new(Kind::Map, number) });
        first = until;
    }
    let version = incoming.newest();
    let _ = answers.send(Frame { offset: length, version, ..Frame::new(Kind::Map, number) });
}
