//! What the destination has of a disk: which blocks are there, which content is newer, what its guest
//! has written on top.
//!
//! `receive` is its driver before the hand-over, the destination's FUSE hook after it. Pure: ranges
//! in, ranges out; the file is the driver's.
//!
//! # A guest that writes where nothing has arrived yet
//!
//! After an early hand-over (LiveFS, phase 5) a guest writes to blocks that are still at the source.
//! The paper keeps such writes in memory and replays them. Here they go straight into the image, noted
//! as newer than anything that can arrive: the block's arrival then fills only what lies around them.
//! No queue grows, and a flush needs no more than this map beside the image ([`Incoming::save`]).

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::{Buf, BufMut};
use xxhash_rust::xxh3::xxh3_64;

use super::versions::{Version, Versions};
use crate::disk::track::{BlockSet, BlockSize};

/// Newer than every update of the source.
const OWN: Version = Version(u64::MAX);

/// What is wrong with a saved map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Cut off or damaged.
    #[error("the saved map of a disk's blocks is damaged")]
    Damaged,
    /// It belongs to another image.
    #[error("the saved map is of an image of {found} bytes, not of {expected}")]
    Length {
        /// What it says.
        found: u64,
        /// What it should be.
        expected: u64,
    },
}

/// What a read has to wait for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// Nothing.
    Ready,
    /// These blocks; those that nobody has asked for yet are in `ask`.
    Missing {
        /// All that are missing.
        blocks: Vec<u64>,
        /// To be asked for now.
        ask: Vec<u64>,
    },
    /// A write of this side's guest to what it reads. Nothing older will fill that place, so until the write has
    /// landed there is nothing in it.
    UnderWay,
}

/// One disk at its destination.
#[derive(Debug, Clone)]
pub struct Incoming {
    block: BlockSize,
    length: u64,
    missing: BlockSet,
    asked: BTreeSet<u64>,
    /// The source changes nothing any more: what arrives is a missing block, or a repetition.
    sealed: bool,
    own: BTreeSet<(u64, u64)>,
    /// Writes of this side's guest to blocks that were missing, which have not landed.
    under_way: Vec<Range<u64>>,
    versions: Versions,
    newest: Version,
}

impl Incoming {
    /// Nothing of an image of `length` bytes is there. A hole reads as zeroes: whatever is not sent
    /// is all zeroes at the source, so before the hand-over no block counts as missing.
    #[must_use]
    pub fn new(block: BlockSize, length: u64) -> Self {
        let (missing, asked, own, under_way) = Default::default();
        let (versions, newest, sealed) = Default::default();
        Self { block, length, missing, asked, sealed, own, under_way, versions, newest }
    }

    /// Its length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The size of its blocks.
    #[must_use]
    pub fn block(&self) -> BlockSize {
        self.block
    }

    /// It has become so long.
    pub fn resize(&mut self, length: u64) {
        self.length = length;
        let end = self.block.count(length);
        self.missing.truncate(end);
    }

    /// The source says with `version` how long it is. Returns what is to be zeroed within the length that it
    /// has now: content that came before, and is newer, stays and keeps it as long as that reaches.
    pub fn resized(&mut self, length: u64, version: Version) -> Vec<Range<u64>> {
        self.newest = self.newest.max(version);
        let old = self.length;
        if length > old {
            let grows = self.versions.open(&(old..length), version);
            self.resize(grows.last().map_or(old, |part| part.end));
            return vec![];
        }
        // All beyond it is as of this version; what is older and still on its way is nothing any more.
        let mut parts = self.versions.admit(length..u64::MAX, version);
        match parts.pop_if(|last| last.end == u64::MAX) {
            Some(end) => self.resize(end.start.clamp(length, old)),
            // Something newer has said how long it is.
            None => parts.iter_mut().for_each(|part| part.end = part.end.min(old)),
        }
        parts.retain(|part| part.start < part.end);
        parts
    }

    /// The source has sealed, and these runs of blocks are still there. Runs beyond the end are cut.
    pub fn seal(&mut self, runs: &[Range<u64>]) {
        let end = self.block.count(self.length);
        self.sealed = true;
        for block in runs.iter().flat_map(|run| run.start.min(end)..run.end.min(end)) {
            self.missing.insert(block);
        }
    }

    /// The source goes on: nothing is missing that will not come.
    pub fn unseal(&mut self) {
        self.sealed = false;
        self.missing.clear();
        self.asked.clear();
    }

    /// An update of `range` has arrived; returns the parts that are to be written, in order.
    pub fn arrived(&mut self, range: &Range<u64>, version: Version) -> Vec<Range<u64>> {
        self.newest = self.newest.max(version);
        let parts = match self.sealed {
            // A block that was there may have been changed by this side's guest since. What is missing has one
            // content, whoever sends it.
            true => {
                let open = self.versions.open(range, version);
                open.iter().flat_map(|part| self.within_missing(part)).collect()
            }
            false => self.versions.admit(range.clone(), version),
        };
        if self.sealed && self.versions.is_repetition(version) {
            return parts;
        }
        for block in self.block.touched(range) {
            let whole = self.block.range(block, self.length);
            if range.start <= whole.start && range.end >= whole.end {
                self.missing.remove(block);
                self.asked.remove(&block);
            }
        }
        parts
    }

    /// The newest version that has arrived: a source that starts anew goes on after it.
    #[must_use]
    pub fn newest(&self) -> Version {
        self.newest
    }

    fn within_missing(&self, part: &Range<u64>) -> Vec<Range<u64>> {
        let clipped = |block| {
            let whole = self.block.range(block, self.length);
            whole.start.max(part.start)..whole.end.min(part.end)
        };
        self.missing.within(self.block.touched(part)).map(clipped).collect()
    }

    /// Every update up to `version` is applied. Once it is sealed that is no news: more than one may send
    /// what is missing, each with versions of its own, and none is a repetition for another one's.
    pub fn settle(&mut self, version: Version) {
        self.newest = self.newest.max(version);
        if !self.sealed {
            // The guest's own writes stay: what they are newer than may come until nothing is missing.
            self.versions.settle(version.min(Version(u64::MAX - 1)));
        }
    }

    /// This side's guest is about to write `range`; [`Self::ended`] is called when it has.
    pub fn begins(&mut self, range: &Range<u64>) {
        let inside = range.start..range.end.min(self.length);
        if !inside.is_empty() && self.missing.within(self.block.touched(&inside)).next().is_some() {
            self.under_way.push(range.clone());
        }
        self.wrote(range);
    }

    /// A write that was begun with [`Self::begins`] has landed, or failed. Whether a read may have waited for it.
    pub fn ended(&mut self, range: &Range<u64>) -> bool {
        let place = self.under_way.iter().position(|other| other == range);
        place.map(|place| self.under_way.swap_remove(place)).is_some()
    }

    /// This side's guest has written `range`, or is about to. Beyond the image nothing is missing.
    pub fn wrote(&mut self, range: &Range<u64>) {
        let range = &(range.start..range.end.min(self.length));
        if range.is_empty() {
            return;
        }
        let touched = self.block.touched(range);
        if self.missing.within(touched).next().is_some() {
            self.versions.admit(range.clone(), OWN);
            self.own.insert((range.start, range.end));
        }
    }

    /// A write of `range` by this side's guest, noted before by [`Self::wrote`], has landed. Returns the blocks
    /// that are not missing any more, because all of each is what the guest wrote.
    pub fn landed(&mut self, range: &Range<u64>) -> Vec<u64> {
        let is_all_of = |block: &u64| {
            let whole = self.block.range(*block, self.length);
            range.start <= whole.start && range.end >= whole.end
        };
        let blocks: Vec<u64> =
            self.missing.within(self.block.touched(range)).filter(is_all_of).collect();
        for block in &blocks {
            self.missing.remove(*block);
            self.asked.remove(block);
        }
        blocks
    }

    /// What a read of `range` has to wait for.
    pub fn readiness(&mut self, range: &Range<u64>) -> Readiness {
        let blocks: Vec<u64> = self.missing.within(self.block.touched(range)).collect();
        if blocks.is_empty() {
            let meets = |write: &Range<u64>| write.start < range.end && range.start < write.end;
            return match self.under_way.iter().any(meets) {
                true => Readiness::UnderWay,
                false => Readiness::Ready,
            };
        }
        let ask = blocks.iter().copied().filter(|block| self.asked.insert(*block)).collect();
        Readiness::Missing { blocks, ask }
    }

    /// The connection is gone: whoever waits has to ask again.
    pub fn forget_questions(&mut self) {
        self.asked.clear();
    }

    /// Whether `block` is missing.
    #[must_use]
    pub fn lacks(&self, block: u64) -> bool {
        self.missing.contains(block)
    }

    /// How many blocks are missing.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.missing.count()
    }

    /// What has to be durable beside the image before a flush is answered while blocks are missing.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_u64(self.length);
        out.put_u64(self.block.bytes());
        out.put_u64(self.missing.words().len() as u64);
        self.missing.words().iter().for_each(|word| out.put_u64(*word));
        for (start, end) in &self.own {
            out.put_u64(*start);
            out.put_u64(*end);
        }
        let check = xxh3_64(&out);
        out.put_u64(check);
        out
    }

    /// Goes on from what was saved, for an image of `length` bytes.
    ///
    /// # Errors
    /// When it is damaged or another image's.
    pub fn load(saved: &[u8], length: u64) -> Result<Self, MapError> {
        let (mut body, check) = saved.split_last_chunk::<8>().ok_or(MapError::Damaged)?;
        if xxh3_64(body).to_be_bytes() != *check || body.len() < 24 || !body.len().is_multiple_of(8)
        {
            return Err(MapError::Damaged);
        }
        let (found, block, missing) = (body.get_u64(), body.get_u64(), body.get_u64());
        if found != length {
            return Err(MapError::Length { found, expected: length });
        }
        let block = BlockSize::new(block).map_err(|_| MapError::Damaged)?;
        let mut incoming = Self::new(block, length);
        if missing > body.len() as u64 / 8 {
            return Err(MapError::Damaged);
        }
        let words = (0..missing).map(|_| body.get_u64()).collect();
        incoming.missing = BlockSet::from_words(words);
        incoming.missing.truncate(block.count(length));
        incoming.sealed = true;
        while body.len() >= 16 {
            let (start, end) = (body.get_u64(), body.get_u64());
            incoming.wrote(&(start..end));
        }
        Ok(incoming)
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a list of ranges that has one")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const K: u64 = 4096;

    fn with_missing() -> Incoming {
        let mut incoming = Incoming::new(BlockSize::new(K).unwrap(), 10 * K);
        incoming.seal(&[2..4, 8..99]);
        incoming
    }

    #[test]
    fn a_read_of_what_is_missing_asks_once_and_waits_until_it_is_there() {
        let mut incoming = with_missing();
        assert_eq!(incoming.missing(), 4);
        assert_eq!(incoming.readiness(&(0..K)), Readiness::Ready);
        let wait = Readiness::Missing { blocks: vec![2], ask: vec![2] };
        assert_eq!(incoming.readiness(&(K..3 * K)), wait);
        let both = Readiness::Missing { blocks: vec![2, 3], ask: vec![3] };
        assert_eq!(incoming.readiness(&(2 * K..4 * K)), both);
        assert_eq!(incoming.arrived(&(2 * K..3 * K), Version(5)), [2 * K..3 * K]);
        assert_eq!(incoming.readiness(&(K..3 * K)), Readiness::Ready);
        incoming.forget_questions();
        let again = Readiness::Missing { blocks: vec![3], ask: vec![3] };
        assert_eq!(incoming.readiness(&(2 * K..4 * K)), again);
    }

    /// LiveFS states less than 6 KB for its image of 6 GB, besides what its guest has written.
    #[test]
    fn what_both_sides_keep_of_an_image_is_under_8_kib_per_gib() {
        use super::super::heat::{Heat, Place};
        use super::super::rank::{Strategy, Weights, order};
        use crate::clock;
        use crate::disk::track::{Activity, DirtyMap, SegmentSize};

        const GIB: u64 = 64;
        let (block, length) = (BlockSize::default(), GIB << 30);
        let activity = Activity::new(SegmentSize::default(), length);
        let dirty = DirtyMap::new(block, length);
        let hot = order(&activity.traffic(), Weights::default(), Strategy::Hot { threshold: 0.0 });
        let mut heat = Heat::new(Weights::default());
        heat.look(clock::now(), &[activity.traffic()]);
        let turns = size_of::<Place>() * hot.segments.len();
        let orders = 8 * hot.segments.capacity() + heat.memory() + turns;
        let kept = activity.memory() + dirty.memory() + orders;
        let source = kept as u64;

        let mut incoming = Incoming::new(block, length);
        incoming.seal(&[0..block.count(length)]);
        assert_eq!(incoming.missing(), block.count(length));
        // As many reads at once as a mount takes requests, each of its own block.
        for at in 0..64 {
            incoming.readiness(&(at << 20..(at << 20) + K));
        }
        // A node of a B-tree has 11 keys, and may be less than half full.
        let asked = incoming.asked.len() as u64 * 8 * 3;
        let destination = 8 * incoming.missing.words().len() as u64 + asked;
        assert!(source + destination > GIB * 256, "the bits at least: {source} {destination}");
        assert!(source < GIB * 8192 && destination < GIB * 8192, "{source} {destination}");
    }

    #[test]
    fn a_block_that_arrives_leaves_alone_what_the_guest_has_written() {
        let mut incoming = with_missing();
        incoming.wrote(&(2 * K + 10..2 * K + 20));
        assert_eq!(incoming.missing(), 4);
        let parts = incoming.arrived(&(2 * K..3 * K), Version(77));
        assert_eq!(parts, [2 * K..2 * K + 10, 2 * K + 20..3 * K]);
    }

    #[test]
    fn a_length_that_comes_late_takes_nothing_newer_away() {
        let mut incoming = Incoming::new(BlockSize::new(K).unwrap(), 10 * K);
        // Content of version 7 made it longer, or lies beyond the length of version 6, which comes behind it.
        assert_eq!(incoming.arrived(&(8 * K..9 * K), Version(7)), [8 * K..9 * K]);
        assert_eq!(incoming.resized(5 * K, Version(6)), [5 * K..8 * K]);
        assert_eq!(incoming.length(), 9 * K);
        // Older than that length, and beyond it.
        assert_eq!(incoming.arrived(&(7 * K..8 * K), Version(5)), []);
        assert_eq!(incoming.arrived(&(9 * K..10 * K), Version(4)), []);
        // The next one is the newest, and then one that is not comes late.
        assert_eq!(incoming.resized(2 * K, Version(9)), []);
        assert_eq!(incoming.length(), 2 * K);
        assert_eq!((incoming.resized(4 * K, Version(8)), incoming.length()), (vec![], 2 * K));
        assert_eq!((incoming.resized(4 * K, Version(10)), incoming.length()), (vec![], 4 * K));
        assert_eq!((incoming.resized(3 * K, Version(9)), incoming.length()), (vec![], 4 * K));
    }

    #[test]
    fn a_block_that_the_guest_has_overwritten_is_not_missing_once_that_has_landed() {
        let mut incoming = with_missing();
        let range = 2 * K + 1..4 * K;
        incoming.wrote(&range);
        assert!(incoming.lacks(3), "a read must not find what has not landed");
        assert_eq!(incoming.landed(&range), [3]);
        assert!(incoming.lacks(2) && !incoming.lacks(3));
        assert!(incoming.landed(&range).is_empty());
        // On its way all the same.
        assert_eq!(incoming.arrived(&(3 * K..4 * K), Version(9)), []);
        assert_eq!(incoming.arrived(&(2 * K..3 * K), Version(8)), [2 * K..2 * K + 1]);
        assert_eq!(incoming.missing(), 2);
        // A later write is not noted: nothing can come for it.
        incoming.wrote(&(3 * K..4 * K));
        assert_eq!(incoming.landed(&(9 * K..11 * K)), [9], "the last one, and no further");
    }

    #[test]
    fn a_read_of_what_is_being_written_waits_for_it_where_nothing_else_will_be() {
        let mut incoming = with_missing();
        let write = 2 * K + 10..2 * K + 20;
        incoming.begins(&write);
        incoming.begins(&(8 * K..99 * K));
        // The block comes first, and leaves the write's place as it is: empty.
        assert_eq!(incoming.arrived(&(2 * K..3 * K), Version(77)).len(), 2);
        assert_eq!(incoming.readiness(&(2 * K..2 * K + 11)), Readiness::UnderWay);
        assert_eq!(incoming.readiness(&(2 * K..2 * K + 10)), Readiness::Ready);
        assert_eq!(incoming.readiness(&(2 * K + 20..2 * K + 30)), Readiness::Ready);
        assert!(incoming.ended(&write) && !incoming.ended(&write));
        assert_eq!(incoming.readiness(&(2 * K..3 * K)), Readiness::Ready);
        assert!(incoming.ended(&(8 * K..99 * K)), "as long as it was, whatever the image is now");
        // Nothing was missing there: what a read finds is old or new, as on any disk.
        incoming.begins(&(0..K));
        assert_eq!(incoming.readiness(&(0..K)), Readiness::Ready);
        assert!(!incoming.ended(&(0..K)));
    }

    #[test]
    fn the_last_and_shorter_block_is_complete_when_its_bytes_are_there() {
        let mut incoming = Incoming::new(BlockSize::new(K).unwrap(), K + 5);
        incoming.seal(&[1..2]);
        incoming.arrived(&(K..K + 5), Version(1));
        assert_eq!(incoming.missing(), 0);
    }

    #[test]
    fn two_may_send_what_is_missing_each_with_versions_of_its_own() {
        let mut incoming = with_missing();
        incoming.wrote(&(3 * K + 10..3 * K + 20));
        // The source is far ahead of the intermediary, which began when it was at 50.
        assert_eq!(incoming.arrived(&(2 * K..3 * K), Version(90)).len(), 1);
        incoming.settle(Version(90));
        let parts = incoming.arrived(&(3 * K..4 * K), Version(51));
        assert_eq!(parts, [3 * K..3 * K + 10, 3 * K + 20..4 * K]);
        // What both send is applied once.
        assert!(incoming.arrived(&(2 * K..3 * K), Version(52)).is_empty());
        assert!(incoming.arrived(&(3 * K..4 * K), Version(91)).is_empty());
        assert_eq!(incoming.missing(), 2);
    }

    #[test]
    fn what_a_lost_connection_still_brings_after_the_seal_is_older_than_it() {
        let mut incoming = Incoming::new(BlockSize::new(K).unwrap(), 10 * K);
        incoming.settle(Version(30));
        incoming.seal(&[2..4]);
        assert!(incoming.arrived(&(2 * K..3 * K), Version(30)).is_empty());
        assert!(incoming.lacks(2), "it has not come");
        assert_eq!(incoming.arrived(&(2 * K..3 * K), Version(31)), [2 * K..3 * K]);
    }

    #[test]
    fn an_unseal_and_a_shorter_image_leave_nothing_missing_that_never_comes() {
        let mut incoming = with_missing();
        incoming.resize(3 * K);
        assert_eq!(incoming.missing(), 1);
        incoming.unseal();
        assert_eq!(incoming.missing(), 0);
    }

    #[test]
    fn what_was_saved_protects_the_guests_writes_after_a_crash() {
        let mut incoming = with_missing();
        incoming.wrote(&(2 * K + 10..2 * K + 20));
        let saved = incoming.save();
        let mut again = Incoming::load(&saved, 10 * K).unwrap();
        assert_eq!(again.missing(), 4);
        assert_eq!(again.arrived(&(2 * K..3 * K), Version(9)).len(), 2);
        let length = MapError::Length { found: 10 * K, expected: 5 };
        assert_eq!(Incoming::load(&saved, 5).unwrap_err(), length);
        for at in 0..saved.len() {
            let mut bad = saved.clone();
            bad[at] ^= 1;
            assert_eq!(Incoming::load(&bad, 10 * K).unwrap_err(), MapError::Damaged);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_no_saved_map(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(Incoming::load(&bytes, 10).is_err());
        }

        /// A guest that reads and writes while blocks arrive in any order finds each byte as it
        /// left it, or as it was at the source.
        #[test]
        fn a_guest_finds_what_it_wrote_whenever_blocks_arrive(
            steps in prop::collection::vec((any::<bool>(), 0_u64..8, 0_u64..4096, 1_u64..5000), 0..60),
        ) {
            let mut incoming = Incoming::new(BlockSize::new(K).unwrap(), 8 * K);
            incoming.seal(&[0..8]);
            let mut expected = vec![1_u8; 8 * K as usize];
            let mut found = vec![0_u8; 8 * K as usize];
            let arrive = |incoming: &mut Incoming, found: &mut Vec<u8>, block: u64| {
                for part in incoming.arrived(&(block * K..(block + 1) * K), Version(block + 1)) {
                    found[part.start as usize..part.end as usize].fill(1);
                }
            };
            for (number, (arrives, block, offset, length)) in steps.into_iter().enumerate() {
                if arrives {
                    arrive(&mut incoming, &mut found, block);
                    continue;
                }
                let start = block * K + offset;
                let range = start..(start + length).min(8 * K);
                let bytes = range.start as usize..range.end as usize;
                incoming.wrote(&range);
                expected[bytes.clone()].fill(number as u8 | 0x80);
                found[bytes.clone()].fill(number as u8 | 0x80);
                if incoming.readiness(&range) == Readiness::Ready {
                    prop_assert_eq!(&found[bytes.clone()], &expected[bytes]);
                }
            }
            (0..8).for_each(|block| arrive(&mut incoming, &mut found, block));
            prop_assert_eq!(incoming.missing(), 0);
            prop_assert!(found == expected);
        }
    }
}
