//! QEMU's image locks, taken on the image itself: what is open through the mount cannot be opened
//! natively by another QEMU, nor the other way round.
//!
//! Used by `images`. The kernel keeps the locks that a program takes *through* a FUSE mount on the
//! FUSE file; they never reach the image. So the server takes the same ones for whoever has opened
//! it. QEMU's scheme (block/file-posix.c): a shared OFD lock on byte 100+p says "I use permission
//! p", on byte 200+p "I let nobody else use it"; conflicts are looked for after locking.
//!
//! Deliberately not here: when a lock is taken; a QEMU that is being swapped onto the mount still
//! holds its own (see `images`).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const WRITE: i64 = 1;
const RESIZE: i64 = 3;
const USES: i64 = 100;
const FORBIDS: i64 = 200;

/// What whoever opened the image does with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    /// Reads, and wants nobody to write meanwhile.
    Read,
    /// Reads, writes and resizes, alone.
    Write,
}

impl Use {
    fn locks(self) -> &'static [i64] {
        match self {
            Self::Read => &[FORBIDS + WRITE, FORBIDS + RESIZE],
            Self::Write => &[USES + WRITE, USES + RESIZE, FORBIDS + WRITE, FORBIDS + RESIZE],
        }
    }

    fn conflicts(self) -> &'static [i64] {
        match self {
            Self::Read => &[USES + WRITE, USES + RESIZE],
            Self::Write => Self::Write.locks(),
        }
    }
}

/// Locks `file`'s image for `purpose`; `Ok(false)`, having locked nothing new, where another open
/// file description of this machine stands in the way. The locks go with the file.
///
/// # Errors
/// When the file system knows no locks.
pub(crate) fn lock(file: &File, purpose: Use) -> io::Result<bool> {
    for byte in purpose.locks() {
        set(file, *byte, libc::F_RDLCK)?;
    }
    for byte in purpose.conflicts() {
        if is_locked_by_another(file, *byte)? {
            unlock(file)?;
            return Ok(false);
        }
    }
    Ok(true)
}

/// Gives all of `file`'s locks back.
///
/// # Errors
/// As [`lock`].
pub(crate) fn unlock(file: &File) -> io::Result<()> {
    Use::Write.locks().iter().try_for_each(|byte| set(file, *byte, libc::F_UNLCK))
}

fn description(byte: i64, kind: i32) -> libc::flock {
    // SAFETY: `flock` is plain numbers, for which zero is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

fn set(file: &File, byte: i64, kind: i32) -> io::Result<()> {
    let lock = description(byte, kind);
    // SAFETY: the descriptor is open, and the kernel only reads `lock`.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_locked_by_another(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = description(byte, libc::F_WRLCK);
    // SAFETY: the descriptor is open, and `lock` is ours to be written.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } {
        0 => Ok(i32::from(lock.l_type) != libc::F_UNLCK),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_is_alone_and_readers_share() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (one, other) = (open(), open());
        assert!(lock(&one, Use::Read).unwrap());
        assert!(lock(&other, Use::Read).unwrap());
        assert!(!lock(&other, Use::Write).unwrap());
        assert!(lock(&one, Use::Write).unwrap(), "the other one's lock went with its attempt");
        assert!(!lock(&other, Use::Read).unwrap());
        unlock(&one).unwrap();
        assert!(lock(&other, Use::Write).unwrap());
    }
}
