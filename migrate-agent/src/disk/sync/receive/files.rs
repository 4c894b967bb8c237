//! The files of a destination's images: made, punched, and the maps beside them.
//!
//! `receive` uses it, and `kept`. Deliberately not here: what is written to them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::disk::sync::frame::MAX_PAYLOAD;

/// Where the map of an image is kept.
pub(super) fn map_path(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".missing");
    name.into()
}

/// Replaces the file at `path` as a whole, durably.
pub(in crate::disk::sync) fn save(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let file = File::create(&new)?;
    file.write_all_at(content, 0)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    let directory = path.parent().map_or(Path::new("."), |parent| parent);
    File::open(directory)?.sync_all()
}

/// Makes the image at `path`; with `seeded`, one that is there is gone on with.
pub(super) fn create(path: &Path, length: u64, seeded: bool) -> io::Result<File> {
    let mut how = File::options();
    how.read(true).write(true).mode(0o600);
    // No link that somebody put there is followed.
    match seeded {
        true => how.create(true).custom_flags(libc::O_NOFOLLOW),
        false => how.create_new(true),
    };
    let file = how.open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    file.set_len(length)?;
    Ok(file)
}

/// Makes a hole; where the file system has none, zeroes.
pub(super) fn zero(file: &File, part: &Range<u64>) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, part.start, part.end - part.start) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let zeroes = vec![0; MAX_PAYLOAD];
            let mut at = part.start;
            while at < part.end {
                let length = (part.end - at).min(MAX_PAYLOAD as u64);
                file.write_all_at(&zeroes[..length as usize], at)?;
                at += length;
            }
            Ok(())
        }
        outcome => outcome.map_err(io::Error::from),
    }
}
