//! The hook of a plain mount: notes which blocks of which image are changed through it.
//!
//! `plain` serves it to whatever is not QEMU, such as a program for backups. As in a migration, a block is
//! marked after the change has landed and before it is answered, and unmarked before anybody is told of it: so
//! who is told first and reads then has every answered change, or is told of it the next time.
//!
//! Images come and go with the directory. One that nothing was changed of since the mount began is not known
//! here. Deliberately not here: what is changed past the mount, which nobody sees.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use crate::disk::fuse::{Expiry, Hook, Image, Op, Request};
use crate::disk::track::DirtyMap;

/// What has changed, by image.
pub(super) struct Tracked {
    directory: PathBuf,
    images: RwLock<BTreeMap<OsString, Arc<DirtyMap>>>,
}

impl Tracked {
    /// Nothing has changed of the images in `directory`.
    pub(super) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), images: RwLock::default() }
    }

    /// All of every image may have changed: a server before this one knew, and was killed.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub(super) fn knowing_nothing(directory: &Path) -> io::Result<Self> {
        let own = Self::new(directory);
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            let data = entry.metadata()?;
            if data.is_file() {
                note(&own.map_of(entry.file_name()), &(0..data.len()));
            }
        }
        Ok(own)
    }

    fn map_of(&self, name: OsString) -> Arc<DirtyMap> {
        let known = self.images.read().unwrap_or_else(PoisonError::into_inner).get(&name).cloned();
        known.unwrap_or_else(|| {
            let mut images = self.images.write().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(images.entry(name).or_default())
        })
    }

    /// Writes a line for each run of blocks that have changed: begin and length in bytes, and the image's name.
    /// With `reset` they count as unchanged from then on, if whoever asked has them ([`Taken::has_arrived`]).
    ///
    /// # Errors
    /// When they cannot be written.
    pub(super) fn tell(&self, reset: bool, to: &mut impl Write) -> io::Result<Taken> {
        let images = self.images.read().unwrap_or_else(PoisonError::into_inner).clone();
        let mut taken = Taken(Vec::new());
        for (name, map) in images {
            // Gone, or under another name.
            let Ok(file) = std::fs::symlink_metadata(self.directory.join(&name)) else { continue };
            let (block, length, name) = (map.block(), file.len(), name.to_string_lossy());
            let mut from = 0;
            while let Some(run) = next_run(&map, from, block.count(length)) {
                from = run.end;
                let bytes =
                    block.range(run.start, length).start..block.range(run.end - 1, length).end;
                if reset {
                    // Before it is told: what is changed from here on is told the next time.
                    for block in run {
                        map.take_one(block);
                    }
                    taken.0.push((Arc::clone(&map), bytes.clone()));
                }
                writeln!(to, "{} {} {name}", bytes.start, bytes.end - bytes.start)?;
            }
        }
        Ok(taken)
    }
}

/// What was unmarked to be told. Dropped, it counts as changed still.
pub(super) struct Taken(Vec<(Arc<DirtyMap>, Range<u64>)>);

impl Taken {
    /// Whoever asked has it.
    pub(super) fn has_arrived(mut self) {
        self.0.clear();
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.iter().for_each(|(map, bytes)| map.mark(bytes));
    }
}

/// Marks `range` in the map of an image that reaches so far, or did.
fn note(map: &DirtyMap, range: &Range<u64>) {
    map.grow(range.end);
    map.mark(range);
}

/// Neighbouring blocks that are dirty, from `from` on and before `end`.
fn next_run(map: &DirtyMap, from: u64, end: u64) -> Option<Range<u64>> {
    let start = (from..end).find(|block| map.holds(*block))?;
    let until = (start..end).find(|block| !map.holds(*block)).unwrap_or(end);
    Some(start..until)
}

impl Hook for Tracked {
    fn arrived(&self, request: Request) {
        let Some(changes) = request.op().changes() else { return request.answer() };
        let before = request.image().length().unwrap_or(0);
        // One that failed may have changed something all the same.
        let _ = request.perform();
        let after = request.image().length().unwrap_or(before);
        let map = self.map_of(request.image().name().to_owned());
        // What is beyond an image's end is not its content, and becomes zeroes where it grows again.
        let last = before.max(after);
        note(&map, &(before.min(after)..last));
        note(&map, &(changes.start.min(last)..changes.end.min(last)));
        request.answer();
    }

    fn expired(&self, _: &Image, _: &Op) -> Expiry {
        Expiry::Answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::track::BLOCK;

    fn told(tracked: &Tracked, reset: bool) -> String {
        let mut text = Vec::new();
        tracked.tell(reset, &mut text).unwrap().has_arrived();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn runs_are_told_up_to_the_end_of_the_image_and_forgotten_when_that_is_asked() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.raw"), vec![1; 3 * BLOCK as usize + 100]).unwrap();
        let tracked = Tracked::new(folder.path());
        assert_eq!(told(&tracked, false), "");
        let map = tracked.map_of("a.raw".into());
        note(&map, &(0..1));
        note(&map, &(2 * BLOCK + 5..9 * BLOCK));
        note(&tracked.map_of("gone.raw".into()), &(0..1));
        let wanted = format!("0 65536 a.raw\n131072 {} a.raw\n", BLOCK + 100);
        assert_eq!(told(&tracked, false), wanted);
        assert_eq!(told(&tracked, true), wanted);
        assert_eq!(told(&tracked, false), "");
    }

    #[test]
    fn what_did_not_arrive_counts_as_changed_still() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.raw"), vec![1; BLOCK as usize]).unwrap();
        let tracked = Tracked::knowing_nothing(folder.path()).unwrap();
        let mut nowhere: &mut [u8] = &mut [];
        assert!(tracked.tell(true, &mut nowhere).is_err());
        drop(tracked.tell(true, &mut Vec::new()).unwrap());
        assert_eq!(told(&tracked, true), "0 65536 a.raw\n");
        assert_eq!(told(&tracked, true), "");
    }
}
