//! The kernel's FUSE messages as values: requests out of bytes, replies into bytes.
//!
//! Used by `serve` alone. Pure: no descriptor, no file. Layout: linux/fuse.h, protocol 7.31 (kernel
//! 5.4, the oldest that we serve); the kernel and we are on one machine, so numbers are native.
//! Deliberately not here: the requests that a directory of disk images has no use for (links,
//! extended attributes, locks, ioctl); they decode to [`Body::Other`] and are answered `ENOSYS`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use rustix::io::Errno;

/// Bytes of the header of a request.
pub const HEADER_IN: usize = 40;
/// Bytes of the header of a reply.
pub const HEADER_OUT: usize = 16;
/// Bytes before the data of a write: its header and `fuse_write_in`.
pub const BEFORE_WRITE_DATA: usize = HEADER_IN + 40;
/// The one protocol version that we speak, major number.
pub const MAJOR: u32 = 7;
/// The newest minor number whose messages we know.
pub const MINOR: u32 = 31;
/// The oldest minor number that we can serve: lseek, max_pages.
pub const OLDEST_MINOR: u32 = 28;
/// The file system's root.
pub const ROOT: u64 = 1;

/// Reads and writes of an open file come to the server and pass by the kernel's page cache.
pub const FOPEN_DIRECT_IO: u32 = 1;
/// Direct writes of an open file may come side by side.
pub const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

const ASYNC_READ: u32 = 1;
const BIG_WRITES: u32 = 1 << 5;
const ASYNC_DIO: u32 = 1 << 15;
const PARALLEL_DIROPS: u32 = 1 << 18;
const MAX_PAGES: u32 = 1 << 22;
// Not ATOMIC_O_TRUNC: the kernel empties a file that is opened so by a change of its length, which hooks hear of.
const WANTED: u32 = ASYNC_READ | BIG_WRITES | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES;

/// What about a request from the kernel cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AbiError {
    /// Shorter than its header, or than the header says.
    #[error("a FUSE request of {len} bytes is cut off")]
    CutOff {
        /// Bytes that are there.
        len: usize,
    },
    /// The body is shorter than this operation's.
    #[error("the body of FUSE request {opcode} is too short")]
    Body {
        /// The operation's number.
        opcode: u32,
    },
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// The kernel's number of this request; the reply carries it.
    pub unique: u64,
    /// The file that it is about.
    pub node: u64,
    /// The caller's user.
    pub uid: u32,
    /// The caller's group.
    pub gid: u32,
    /// What is asked.
    pub body: Body<'a>,
}

/// What a request asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the operations and fields of linux/fuse.h")]
pub enum Body<'a> {
    Init {
        major: u32,
        minor: u32,
        readahead: u32,
        flags: u32,
    },
    Destroy,
    Lookup {
        name: &'a OsStr,
    },
    /// No reply is expected.
    Forget,
    /// No reply is expected.
    Interrupt,
    GetAttr,
    SetAttr(Changes),
    Open {
        flags: u32,
    },
    Create {
        flags: u32,
        mode: u32,
        name: &'a OsStr,
    },
    Unlink {
        name: &'a OsStr,
    },
    Read {
        handle: u64,
        offset: u64,
        size: u32,
    },
    Write {
        handle: u64,
        offset: u64,
        data: &'a [u8],
    },
    Flush,
    Release {
        handle: u64,
    },
    Fsync {
        handle: u64,
        data_only: bool,
    },
    FsyncDir,
    ReadDir {
        offset: u64,
        size: u32,
    },
    StatFs,
    Fallocate {
        handle: u64,
        offset: u64,
        length: u64,
        mode: u32,
    },
    Seek {
        handle: u64,
        offset: u64,
        whence: u32,
    },
    Other {
        opcode: u32,
    },
}

/// The attributes that a `setattr` changes and that we follow; others are passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Changes {
    /// A new length in bytes.
    pub size: Option<u64>,
    /// New permission bits.
    pub mode: Option<u32>,
}

/// Takes fields from the front of a body.
struct Fields<'a> {
    rest: &'a [u8],
    opcode: u32,
}

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], AbiError> {
        let short = AbiError::Body { opcode: self.opcode };
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(short)?;
        self.rest = rest;
        Ok(*head)
    }

    fn u32(&mut self) -> Result<u32, AbiError> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, AbiError> {
        self.take().map(u64::from_ne_bytes)
    }

    /// A name up to its zero byte, which must be there.
    fn name(&mut self) -> Result<&'a OsStr, AbiError> {
        let short = AbiError::Body { opcode: self.opcode };
        let end = self.rest.iter().position(|b| *b == 0).ok_or(short)?;
        Ok(OsStr::from_bytes(&self.rest[..end]))
    }

    fn bytes(&mut self, len: u32) -> Result<&'a [u8], AbiError> {
        let short = AbiError::Body { opcode: self.opcode };
        self.rest.get(..len as usize).ok_or(short)
    }
}

/// Reads the one request that `bytes` begin with. Bytes after it are passed over: the buffer that
/// it was read into is larger.
///
/// # Errors
/// When it is cut off.
pub fn decode(bytes: &[u8]) -> Result<Message<'_>, AbiError> {
    let cut_off = AbiError::CutOff { len: bytes.len() };
    let mut head = Fields { rest: bytes, opcode: 0 };
    let field = |fields: &mut Fields<'_>| fields.u32().map_err(|_| cut_off);
    let length = field(&mut head)? as usize;
    let opcode = field(&mut head)?;
    let unique = head.u64().map_err(|_| cut_off)?;
    let node = head.u64().map_err(|_| cut_off)?;
    let (uid, gid) = (field(&mut head)?, field(&mut head)?);
    let rest = bytes.get(HEADER_IN..length).ok_or(cut_off)?;
    let body = decode_body(Fields { rest, opcode })?;
    Ok(Message { unique, node, uid, gid, body })
}

fn decode_body(mut f: Fields<'_>) -> Result<Body<'_>, AbiError> {
    Ok(match f.opcode {
        1 => Body::Lookup { name: f.name()? },
        2 | 42 => Body::Forget,
        3 => Body::GetAttr,
        4 => Body::SetAttr(decode_changes(&mut f)?),
        10 => Body::Unlink { name: f.name()? },
        14 => Body::Open { flags: f.u32()? },
        15 => Body::Read { handle: f.u64()?, offset: f.u64()?, size: f.u32()? },
        16 => decode_write(&mut f)?,
        17 => Body::StatFs,
        18 => Body::Release { handle: f.u64()? },
        20 => Body::Fsync { handle: f.u64()?, data_only: f.u32()? & 1 != 0 },
        25 => Body::Flush,
        26 => {
            let (major, minor) = (f.u32()?, f.u32()?);
            // Of a future major version nothing but the version can be read.
            let (readahead, flags) = if major == MAJOR { (f.u32()?, f.u32()?) } else { (0, 0) };
            Body::Init { major, minor, readahead, flags }
        }
        28 => {
            let (_handle, offset, size) = (f.u64()?, f.u64()?, f.u32()?);
            Body::ReadDir { offset, size }
        }
        30 => Body::FsyncDir,
        35 => {
            let (flags, mode) = (f.u32()?, f.u32()?);
            f.u64()?; // umask: the kernel has applied it to `mode`; and padding.
            Body::Create { flags, mode, name: f.name()? }
        }
        36 => Body::Interrupt,
        38 => Body::Destroy,
        43 => {
            let (handle, offset, length) = (f.u64()?, f.u64()?, f.u64()?);
            Body::Fallocate { handle, offset, length, mode: f.u32()? }
        }
        46 => Body::Seek { handle: f.u64()?, offset: f.u64()?, whence: f.u32()? },
        opcode => Body::Other { opcode },
    })
}

fn decode_write<'a>(f: &mut Fields<'a>) -> Result<Body<'a>, AbiError> {
    let (handle, offset, size) = (f.u64()?, f.u64()?, f.u32()?);
    f.take::<20>()?; // write flags, lock owner, open flags, padding
    Ok(Body::Write { handle, offset, data: f.bytes(size)? })
}

fn decode_changes(f: &mut Fields<'_>) -> Result<Changes, AbiError> {
    const MODE: u32 = 1;
    const SIZE: u32 = 1 << 3;
    let valid = f.u32()?;
    f.take::<12>()?; // padding, handle
    let size = f.u64()?;
    f.take::<44>()?; // lock owner, three times with nanoseconds
    let mode = f.u32()?;
    Ok(Changes {
        size: (valid & SIZE != 0).then_some(size),
        mode: (valid & MODE != 0).then_some(mode),
    })
}

/// What a file looks like, as the kernel is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the fields of stat(2)")]
pub struct Attributes {
    pub inode: u64,
    pub size: u64,
    pub blocks: u64,
    /// Seconds and nanoseconds of last access, modification, change.
    pub times: [(i64, u32); 3],
    pub mode: u32,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
    pub block_size: u32,
}

/// The body of a reply, built field by field.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reply {
    bytes: Vec<u8>,
}

impl Reply {
    fn u32(mut self, value: u32) -> Self {
        self.bytes.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.bytes.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// The bytes after the header.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// No body.
    #[must_use]
    pub fn empty() -> Self {
        Self::default()
    }

    /// To `init` of a kernel that knows `flags` and offers `readahead`; writes and reads of at most
    /// `max_write` bytes. A kernel that is newer than 7.31 keeps to 7.31 with us.
    #[must_use]
    pub fn init(flags: u32, readahead: u32, max_write: u32) -> Self {
        const BACKGROUND: u32 = 64 | (48 << 16);
        let pages = max_write.div_ceil(4096);
        let known = Self::default().u32(MAJOR).u32(MINOR).u32(readahead).u32(flags & WANTED);
        let mut reply = known.u32(BACKGROUND).u32(max_write).u32(1).u32(pages & 0xffff);
        reply.bytes.resize(64, 0);
        reply
    }

    /// To `init` of a kernel with another major version: it asks again with ours.
    #[must_use]
    pub fn version_only() -> Self {
        Self::default().u32(MAJOR).u32(MINOR)
    }

    /// Attributes that the kernel may not keep: the file's length can change behind it.
    #[must_use]
    pub fn attributes(attributes: &Attributes) -> Self {
        Self::default().u64(0).u64(0).attr(attributes)
    }

    /// A name's node with its attributes.
    #[must_use]
    pub fn entry(attributes: &Attributes) -> Self {
        let head = Self::default().u64(attributes.inode).u64(0);
        head.u64(0).u64(0).u64(0).attr(attributes)
    }

    fn attr(self, a: &Attributes) -> Self {
        let mut reply = self.u64(a.inode).u64(a.size).u64(a.blocks);
        for (seconds, _) in a.times {
            reply = reply.u64(seconds.cast_unsigned());
        }
        for (_, nanos) in a.times {
            reply = reply.u32(nanos);
        }
        reply.u32(a.mode).u32(a.links).u32(a.uid).u32(a.gid).u32(0).u32(a.block_size).u32(0)
    }

    /// An open file.
    #[must_use]
    pub fn opened(self, handle: u64, flags: u32) -> Self {
        self.u64(handle).u32(flags).u32(0)
    }

    /// Bytes that were written.
    #[must_use]
    pub fn written(bytes: u32) -> Self {
        Self::default().u32(bytes).u32(0)
    }

    /// Where a seek ended.
    #[must_use]
    pub fn sought(offset: u64) -> Self {
        Self::default().u64(offset)
    }

    /// The file system's figures: blocks, free, available, files, free files; then the block's
    /// bytes and the longest name.
    #[must_use]
    pub fn statfs(counts: [u64; 5], block: u32, name: u32) -> Self {
        let mut reply = counts.into_iter().fold(Self::default(), Self::u64);
        reply = reply.u32(block).u32(name).u32(block);
        reply.bytes.resize(80, 0);
        reply
    }

    /// Adds a directory's entry, unless the reply would get longer than `limit` bytes; `false`
    /// then. `next` is where the listing goes on after it.
    pub fn push_entry(&mut self, limit: usize, inode: u64, next: u64, name: &OsStr) -> bool {
        const REGULAR: u32 = 8;
        let name = name.as_bytes();
        let padded = (24 + name.len()).next_multiple_of(8);
        if self.bytes.len() + padded > limit {
            return false;
        }
        let end = self.bytes.len() + padded;
        let Ok(length) = u32::try_from(name.len()) else { return false };
        let mut grown = std::mem::take(self).u64(inode).u64(next).u32(length).u32(REGULAR);
        grown.bytes.extend_from_slice(name);
        grown.bytes.resize(end, 0);
        *self = grown;
        true
    }
}

/// The header of a reply to `unique`, with a body of `body` bytes or with an error.
#[must_use]
pub fn header_out(unique: u64, outcome: Result<usize, Errno>) -> [u8; HEADER_OUT] {
    let (body, error) = match outcome {
        Ok(body) => (body, 0),
        Err(errno) => (0, -errno.raw_os_error()),
    };
    let length = u32::try_from(HEADER_OUT + body).unwrap_or(u32::MAX);
    let mut bytes = [0; HEADER_OUT];
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes[4..8].copy_from_slice(&error.to_ne_bytes());
    bytes[8..].copy_from_slice(&unique.to_ne_bytes());
    bytes
}

#[cfg(test)]
#[path = "abi_tests.rs"]
mod tests;
