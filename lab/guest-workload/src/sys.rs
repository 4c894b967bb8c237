//! What the program needs of Linux beyond the standard library: waiting on several sockets,
//! connecting without blocking, discarding, and hearing a signal.
//!
//! Used by the drivers. The one file with unsafe code; everything here is a thin wrapper around
//! one system call. No logic.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::net::{SocketAddrV4, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_signal: libc::c_int) {
    STOP.store(true, Ordering::Relaxed);
}

/// From now on SIGTERM and SIGINT are asked for by [`stop_requested`] instead of ending the
/// program. A wait that a signal interrupts returns early, so the caller sees it at once.
pub(crate) fn catch_stop_signals() -> io::Result<()> {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: an all-zero sigaction is valid (empty mask, no flags); the handler only
        // stores to an atomic, which is async-signal-safe, and lives as long as the program.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
            libc::sigaction(signal, &action, std::ptr::null_mut())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// True once SIGTERM or SIGINT came.
pub(crate) fn stop_requested() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// Tells a block device that nobody wants `length` bytes from `at` on any more (BLKDISCARD).
pub(crate) fn discard(device: &File, at: u64, length: u64) -> io::Result<()> {
    /// `_IO(0x12, 119)` of linux/fs.h.
    const BLKDISCARD: libc::c_ulong = 0x1277;
    let range = [at, length];
    // SAFETY: the request reads two u64 from its argument, which lives until it returns.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD as _, range.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What a descriptor is watched for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Watch {
    /// The descriptor.
    pub(crate) fd: RawFd,
    /// Wake up when it can be written to as well, not only when it can be read.
    pub(crate) writable: bool,
}

/// Waits until one of `watched` is ready, a signal comes, or `timeout` has passed. Which one it
/// was is not told: the sockets are non-blocking and are all tried.
pub(crate) fn wait(watched: &[Watch], timeout: Duration) -> io::Result<()> {
    let mut set: Vec<libc::pollfd> = watched
        .iter()
        .map(|watch| libc::pollfd {
            fd: watch.fd,
            events: libc::POLLIN | if watch.writable { libc::POLLOUT } else { 0 },
            revents: 0,
        })
        .collect();
    let timeout = libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(timeout.subsec_nanos()),
    };
    // SAFETY: the pointer and length describe `set`, which outlives the call; the time-out is
    // a local; a null signal mask means "leave the mask as it is".
    let ready = unsafe {
        libc::ppoll(set.as_mut_ptr(), set.len() as libc::nfds_t, &timeout, std::ptr::null())
    };
    match io::Error::last_os_error() {
        error if ready < 0 && error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

/// Begins a TCP connection and returns at once. Until it stands, writes answer `WouldBlock`;
/// if it fails, the next read or write tells why.
pub(crate) fn connect_without_blocking(to: SocketAddrV4) -> io::Result<TcpStream> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers are passed; the result is checked below.
    let fd = unsafe { libc::socket(libc::AF_INET, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened here and nobody else owns it.
    let socket = TcpStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: to.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(to.ip().octets()) },
        sin_zero: [0; 8],
    };
    let length = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    // SAFETY: `address` is a properly filled sockaddr_in that outlives the call, and `length`
    // is its size.
    let result = unsafe { libc::connect(fd, (&raw const address).cast(), length) };
    let error = io::Error::last_os_error();
    if result != 0 && error.raw_os_error() != Some(libc::EINPROGRESS) {
        return Err(error);
    }
    Ok(socket)
}
