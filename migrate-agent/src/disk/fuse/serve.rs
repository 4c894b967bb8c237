//! What each FUSE request is answered with: decode, call, reply.
//!
//! `server`'s threads call [`serve`] with every request that they read, and with those that an
//! earlier server had not answered. What is about an image's content becomes a
//! [`Request`](super::request::Request) and goes through the limit to the hook; all else is
//! answered here and now.

use std::ffi::OsStr;
use std::sync::{Arc, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::abi::{
    self, Body, Changes, FOPEN_DIRECT_IO, FOPEN_PARALLEL_DIRECT_WRITES, Message, Reply,
};
use super::images::Image;
use super::memory::{MAX_DATA, OpenFile, Slot, State};
use super::request::{Op, Request, send};
use super::server::Shared;

/// Every open goes past the kernel's page cache: each read and write comes to us, and QEMU's own
/// cache mode decides about O_DIRECT below.
const OPEN_FLAGS: u32 = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;

/// What fallocate(2) is asked for: space, a hole, zeroes, with or without a new length.
const ALLOCATE_MODES: u32 =
    (libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE)
        .cast_unsigned();

/// Serves the request in `slot`. `again`: an earlier server may have begun with it.
pub(super) fn serve(server: &Arc<Shared>, slot: Slot, again: bool) {
    let message = match abi::decode(slot.request()) {
        Ok(message) => message,
        Err(error) => {
            tracing::error!(%error, "the kernel sent what we cannot read");
            return;
        }
    };
    let unique = message.unique;
    match content_of(server, &message) {
        Some(Ok((op, image, direct))) => {
            let request = Request::new(Arc::clone(server), image, (op, direct), (unique, slot));
            server.limit.admit(request);
        }
        Some(Err(errno)) => send(&server.device, unique, Err(errno)),
        None => {
            if let Some(reply) = answer(server, &message, again) {
                let body = reply.as_ref().map(Reply::as_bytes).map_err(|errno| *errno);
                send(&server.device, unique, body);
            }
        }
    }
}

type Content = (Op, Arc<Image>, bool);

/// The request as one about an image's content, if it is one.
fn content_of(server: &Shared, message: &Message<'_>) -> Option<Result<Content, Errno>> {
    let limit = |size: u32| u64::from(size).min(MAX_DATA as u64);
    let (handle, op) = match message.body {
        Body::Read { handle, offset, size } => (handle, Op::Read { offset, length: limit(size) }),
        Body::Write { handle, offset, data } => {
            (handle, Op::Write { offset, length: data.len() as u64 })
        }
        // Collapsing or inserting moves what lies behind: no image is treated so.
        Body::Fallocate { mode, .. } if mode & !ALLOCATE_MODES != 0 => {
            return Some(Err(Errno::OPNOTSUPP));
        }
        Body::Fallocate { handle, offset, length, mode } => {
            (handle, Op::Allocate { mode, offset, length })
        }
        Body::Fsync { handle, data_only } => (handle, Op::Flush { data_only }),
        Body::SetAttr(Changes { size: Some(length), .. }) => {
            let image = server.images.image(message.node);
            return Some(image.map(|image| (Op::Resize { length }, image, false)));
        }
        _ => return None,
    };
    let open = || {
        let file = server.memory.file_of(handle).ok_or(Errno::BADF)?;
        let writable = file.flags.cast_signed() & libc::O_ACCMODE != libc::O_RDONLY;
        if op.changes().is_some() && !writable {
            return Err(Errno::BADF);
        }
        let direct = file.flags.cast_signed() & libc::O_DIRECT != 0;
        Ok((op, server.images.image(file.node)?, direct))
    };
    Some(open())
}

/// Everything else; `None` where the kernel expects no reply.
fn answer(server: &Shared, message: &Message<'_>, again: bool) -> Option<Result<Reply, Errno>> {
    let images = &server.images;
    let node = if message.node == images.inode() { abi::ROOT } else { message.node };
    Some(match message.body {
        Body::Init { major, minor, readahead, flags } => greet((major, minor), readahead, flags),
        Body::Forget | Body::Interrupt => return None,
        Body::Destroy | Body::Flush => Ok(Reply::empty()),
        Body::Lookup { name } => images.look_up(name).map(|a| Reply::entry(&a)),
        Body::GetAttr => images.attributes(node).map(|a| Reply::attributes(&a)),
        Body::SetAttr(changes) => set_attributes(server, node, changes),
        Body::Open { flags } => {
            let _alone = alone(server);
            let image = images.image(node);
            let handle = image.and_then(|image| open(server, message.unique, &image, flags));
            handle.map(|handle| Reply::empty().opened(handle, OPEN_FLAGS))
        }
        Body::Create { flags, mode, name } => {
            create(server, message.unique, (flags, mode, again), name)
        }
        Body::Unlink { name } => match delete(server, name) {
            Err(Errno::NOENT) if again => Ok(Reply::empty()),
            outcome => outcome.map(|()| Reply::empty()),
        },
        Body::Release { handle } => {
            release(server, handle);
            Ok(Reply::empty())
        }
        Body::FsyncDir => images.sync().map(|()| Reply::empty()),
        Body::ReadDir { offset, size } => list(server, offset, size),
        Body::StatFs => statfs(server),
        Body::Seek { handle, offset, whence } => seek(server, handle, offset, whence),
        // Content: never here. Unknown: the kernel remembers and does without.
        Body::Read { .. } | Body::Write { .. } | Body::Fallocate { .. } | Body::Fsync { .. } => {
            Err(Errno::INVAL)
        }
        Body::Other { opcode } => {
            tracing::trace!(opcode, "not served");
            Err(Errno::NOSYS)
        }
    })
}

fn greet((major, minor): (u32, u32), readahead: u32, flags: u32) -> Result<Reply, Errno> {
    if major > abi::MAJOR {
        return Ok(Reply::version_only());
    }
    if major < abi::MAJOR || minor < abi::OLDEST_MINOR {
        tracing::error!(major, minor, "this kernel's FUSE is too old");
        return Err(Errno::PROTO);
    }
    Ok(Reply::init(flags, readahead, MAX_DATA as u32))
}

fn set_attributes(server: &Shared, node: u64, changes: Changes) -> Result<Reply, Errno> {
    if let Some(mode) = changes.mode {
        server.images.set_mode(node, mode)?;
    }
    server.images.attributes(node).map(|a| Reply::attributes(&a))
}

fn alone(server: &Shared) -> MutexGuard<'_, ()> {
    server.opening.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open(server: &Shared, unique: u64, image: &Image, flags: u32) -> Result<u64, Errno> {
    let admitted = server.images.admit(image, flags).and_then(|()| {
        let file = OpenFile { node: image.node(), flags };
        server.memory.open(unique, file).ok_or(Errno::NFILE)
    });
    if admitted.is_err() {
        close_if_unused(server, image.node());
    }
    admitted
}

fn create(
    server: &Shared,
    unique: u64,
    (flags, mode, again): (u32, u32, bool),
    name: &OsStr,
) -> Result<Reply, Errno> {
    // Done again after a takeover, it finds its own file, perhaps with data in it already.
    let flags = if again { flags & !(libc::O_TRUNC.cast_unsigned()) } else { flags };
    let exclusive = flags.cast_signed() & libc::O_EXCL != 0 && !again;
    let _alone = alone(server);
    let image = server.images.create(name, exclusive, mode)?;
    let handle = open(server, unique, &image, flags)?;
    let attributes = server.images.attributes(image.node())?;
    Ok(Reply::entry(&attributes).opened(handle, OPEN_FLAGS))
}

fn release(server: &Shared, handle: u64) {
    let _alone = alone(server);
    let Some(file) = server.memory.file_of(handle) else { return };
    server.memory.close(handle);
    close_if_unused(server, file.node);
}

fn delete(server: &Shared, name: &OsStr) -> Result<(), Errno> {
    let _alone = alone(server);
    server.images.delete(name, |node| is_open(server, node))
}

fn is_open(server: &Shared, node: u64) -> bool {
    server.memory.open_files().iter().any(|file| file.node == node)
}

/// Closes an image that nobody has open through the mount. The caller holds `opening`.
pub(super) fn close_if_unused(server: &Shared, node: u64) {
    if !is_open(server, node) {
        server.images.close(node);
    }
}

fn list(server: &Shared, offset: u64, size: u32) -> Result<Reply, Errno> {
    let limit = (size as usize).min(MAX_DATA);
    let mut reply = Reply::empty();
    let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
    for (place, (name, node)) in server.images.list()?.iter().enumerate().skip(skipped) {
        if !reply.push_entry(limit, *node, place as u64 + 1, name) {
            break;
        }
    }
    Ok(reply)
}

fn statfs(server: &Shared) -> Result<Reply, Errno> {
    let s = server.images.statfs()?;
    let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let counts = [s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree];
    Ok(Reply::statfs(counts, narrow(s.f_frsize), narrow(s.f_namemax)))
}

fn seek(server: &Shared, handle: u64, offset: u64, whence: u32) -> Result<Reply, Errno> {
    let file = server.memory.file_of(handle).ok_or(Errno::BADF)?;
    server.images.image(file.node)?.seek(whence, offset).map(Reply::sought)
}

/// Whether a slot that an earlier server left has been done already, for the log.
pub(super) fn is_done(slot: &Slot) -> bool {
    matches!(slot.state(), State::Done(_))
}
