//! What is kept of disks that may follow their VM, so that the process in which they arrive can be
//! killed at any time: which blocks are missing, and what the guest has written since.
//!
//! ```text
//!   FOLDER/N.missing   of disk N, as of its seal or the guest's last flush, durable (`Incoming::save`)
//!   FOLDER/N.own       what the guest has written since the seal: pairs of be64, begin and end
//!   FOLDER/whole       nothing was missing any more, and all of it was durable
//! ```
//!
//! A guest outlives that process, so it must find *every* write again that was answered, flushed or
//! not: the page cache has the content, and `N.own` says that it is newer than what a block brings
//! which the map still calls missing. It is written before the write lands and need not be durable:
//! what a power cut takes of it was never flushed. `receive` uses it. Deliberately not here: content.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::receive::save;

/// Bytes of one entry of `N.own`.
const ENTRY: usize = 16;

/// A disk's map, and what its guest has written since.
pub type Mapped = (Vec<u8>, Vec<Range<u64>>);

/// What a process before this one has kept.
#[derive(Debug, PartialEq, Eq)]
pub enum Before {
    /// Nothing that counts: not every disk had been sealed.
    Nothing,
    /// The map of each disk, and what its guest wrote since.
    Sealed(Vec<Mapped>),
    /// Everything had arrived.
    Whole,
}

/// The folder.
#[derive(Debug)]
pub struct Kept {
    folder: PathBuf,
    own: Vec<File>,
    whole: AtomicBool,
    /// An older map must not take a newer one's place.
    saving: Mutex<()>,
}

impl Kept {
    /// Opens `folder` for so many disks, and says what is there.
    ///
    /// # Errors
    /// When it cannot be made or read.
    pub fn open(folder: PathBuf, disks: usize) -> io::Result<(Self, Before)> {
        fs::create_dir_all(&folder)?;
        let before = before(&folder, disks)?;
        if before == Before::Nothing {
            for disk in 0..disks {
                remove(&missing(&folder, disk))?;
                remove(&own(&folder, disk))?;
            }
        }
        let open = |disk| File::options().create(true).append(true).open(own(&folder, disk));
        let own = (0..disks).map(open).collect::<io::Result<_>>()?;
        let whole = AtomicBool::new(before == Before::Whole);
        Ok((Self { folder, own, whole, saving: Mutex::default() }, before))
    }

    /// The guest is about to write `range` of disk `disk`.
    ///
    /// # Errors
    /// When that cannot be noted: then it must not be written.
    pub(super) fn note(&self, disk: u16, range: &Range<u64>) -> io::Result<()> {
        if self.whole.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut entry = [0; ENTRY];
        entry[..8].copy_from_slice(&range.start.to_be_bytes());
        entry[8..].copy_from_slice(&range.end.to_be_bytes());
        match self.own.get(usize::from(disk)) {
            // One call for each entry: the kernel appends it as a whole.
            Some(mut file) => file.write_all(&entry),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Makes what `map` says of disk `disk` durable.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub(super) fn save(&self, disk: u16, map: impl FnOnce() -> Vec<u8>) -> io::Result<()> {
        let _alone = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        match self.whole.load(Ordering::SeqCst) {
            true => Ok(()),
            false => save(&missing(&self.folder, disk.into()), &map()),
        }
    }

    /// The source of disk `disk` goes on changing it: its map counts no more.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(super) fn unseal(&self, disk: u16) -> io::Result<()> {
        let _alone = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        remove(&missing(&self.folder, disk.into()))
    }

    /// Nothing is missing, and all of it is durable: no map counts any more.
    ///
    /// # Errors
    /// When the disk does not take that.
    pub(super) fn settle(&self) -> io::Result<()> {
        let _alone = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        save(&self.folder.join("whole"), b"")?;
        self.whole.store(true, Ordering::SeqCst);
        for disk in 0..self.own.len() {
            remove(&missing(&self.folder, disk))?;
        }
        Ok(())
    }
}

fn missing(folder: &Path, disk: usize) -> PathBuf {
    folder.join(format!("{disk}.missing"))
}

fn own(folder: &Path, disk: usize) -> PathBuf {
    folder.join(format!("{disk}.own"))
}

fn before(folder: &Path, disks: usize) -> io::Result<Before> {
    if folder.join("whole").exists() {
        return Ok(Before::Whole);
    }
    let mut kept = Vec::new();
    for disk in 0..disks {
        match fs::read(missing(folder, disk)) {
            Ok(map) => kept.push((map, ranges(&own(folder, disk))?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Before::Nothing),
            Err(error) => return Err(error),
        }
    }
    Ok(Before::Sealed(kept))
}

/// What was noted. A last entry that is cut off was of a write that never landed.
fn ranges(path: &Path) -> io::Result<Vec<Range<u64>>> {
    let mut bytes = Vec::new();
    match File::open(path) {
        Ok(mut file) => file.read_to_end(&mut bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(error),
    };
    let (entries, _) = bytes.as_chunks::<ENTRY>();
    let number = |half: &[u8]| half.iter().fold(0, |all, byte| all << 8 | u64::from(*byte));
    Ok(entries.iter().map(|entry| number(&entry[..8])..number(&entry[8..])).collect())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a list of ranges that has one")]
mod tests {
    use std::sync::Arc;

    use super::super::frame::{Frame, Kind, encode_runs};
    use super::super::receive::{Received, receive};
    use super::super::stream::FrameWriter;
    use super::super::versions::Version;
    use super::*;
    use crate::tasks;

    #[test]
    fn what_is_kept_counts_from_the_last_seal_on_and_until_all_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("vm");
        let open = || Kept::open(folder.clone(), 2).unwrap();
        let (kept, before) = open();
        assert_eq!(before, Before::Nothing);
        kept.save(0, || b"first".to_vec()).unwrap();
        kept.note(0, &(1..9)).unwrap();
        assert_eq!(open().1, Before::Nothing, "the other disk was not sealed");
        let (kept, _) = open();
        kept.save(0, || b"map 0".to_vec()).unwrap();
        kept.save(1, || b"map 1".to_vec()).unwrap();
        kept.unseal(0).unwrap();
        assert_eq!(super::before(&folder, 2).unwrap(), Before::Nothing, "its source writes on");
        kept.save(0, || b"map 0".to_vec()).unwrap();
        kept.note(1, &(4096..8192)).unwrap();
        kept.note(1, &(7..u64::MAX)).unwrap();
        // Killed half way through an entry.
        File::options().append(true).open(own(&folder, 1)).unwrap().write_all(b"xyz").unwrap();
        let written = vec![4096..8192, 7..u64::MAX];
        let sealed =
            Before::Sealed(vec![(b"map 0".to_vec(), vec![]), (b"map 1".to_vec(), written)]);
        let (kept, before) = open();
        assert_eq!(before, sealed);
        kept.settle().unwrap();
        kept.save(0, || b"stale".to_vec()).unwrap();
        kept.note(0, &(0..1)).unwrap();
        assert_eq!(open().1, Before::Whole);
    }

    const K: u64 = 64 << 10;

    async fn feed(received: &Arc<Received>, frames: Vec<Frame>) {
        let (near, far) = tokio::io::duplex(1 << 20);
        let (reader, to) = tokio::io::split(near);
        let (from, writer) = tokio::io::split(far);
        let receiving = tasks::spawn("test", receive(Arc::clone(received), (from, writer)));
        let mut to = FrameWriter::new(to);
        for frame in &frames {
            to.write(frame).await.unwrap();
        }
        drop((reader, to));
        receiving.await.unwrap().unwrap();
    }

    fn block(number: u64) -> Frame {
        let (offset, payload) = (number * K, vec![1; K as usize].into());
        let version = Version(5 + number);
        Frame { version, offset, length: K, payload, ..Frame::new(Kind::Data, 0) }
    }

    #[tokio::test]
    async fn a_process_that_is_killed_is_followed_by_one_that_knows_what_its_guest_wrote() {
        use std::os::unix::fs::FileExt;
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.arriving-vm");
        let begin = || {
            let (kept, before) = Kept::open(directory.path().join("kept"), 1).unwrap();
            let (paths, names) = (vec![image.clone()], vec!["disk".into()]);
            Received::following(paths, names, kept, before).unwrap()
        };
        let received = begin();
        let hello = Frame { offset: K, length: 4 * K, ..Frame::new(Kind::Hello, 0) };
        let (payload, _) = encode_runs(&[1..2, 3..4]);
        let seal = Frame { version: Version(4), payload, ..Frame::new(Kind::Seal, 0) };
        feed(&received, vec![hello.clone()]).await;
        received.make_durable(0).unwrap();
        assert!(!missing(&directory.path().join("kept"), 0).exists(), "it is not sealed");
        feed(&received, vec![seal]).await;
        assert!(received.is_sealed() && !received.is_owned());
        received.own();
        let own = File::options().write(true).open(&image).unwrap();
        // Nobody flushes it.
        received.wrote(0, &(K + 10..K + 20)).unwrap();
        own.write_all_at(&[9; 10], K + 10).unwrap();
        // This one comes, and is written to afterwards.
        feed(&received, vec![block(3)]).await;
        received.wrote(0, &(3 * K..3 * K + 5)).unwrap();
        own.write_all_at(&[9; 5], 3 * K).unwrap();
        drop(received);
        let received = begin();
        assert!(received.is_owned() && received.is_sealed());
        assert_eq!(received.missing(), 2, "nothing was flushed, so both are asked for again");
        assert!(!received.settle().unwrap());
        feed(&received, vec![hello, block(1), block(3), block(0)]).await;
        let found = fs::read(&image).unwrap();
        let at = |range: Range<u64>| &found[range.start as usize..range.end as usize];
        assert!(at(0..K).iter().all(|byte| *byte == 0), "it was not missing");
        assert!(at(K + 10..K + 20) == [9; 10] && at(K + 9..K + 10) == [1]);
        assert!(at(3 * K..3 * K + 5) == [9; 5] && at(3 * K + 5..3 * K + 6) == [1]);
        assert!(received.settle().unwrap());
        fs::rename(&image, directory.path().join("disk")).unwrap();
        assert_eq!(begin().missing(), 0);
    }
}
