//! Opens a tap for a QEMU that could not open it itself.
//!
//! Used by `vms/`: the agent attaches to the tap as root and hands the open descriptor down, so
//! that QEMU's user needs no access to `/dev/net/tun`, and can reach this one tap and no other.
//! Making taps and plugging them in is `vms/taps`.
//!
//! Beside `process/detach` the only `unsafe` of this room: one ioctl.

#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Attaches to the tap `name`, without the header for offloads: frames as they are on the wire.
///
/// # Errors
/// When there is no such tap, somebody else holds it, or the kernel has no taps.
pub fn open(name: &str) -> io::Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: all-zero bytes are a valid ifreq, which is plain C data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.as_bytes();
    // The last byte stays zero: the kernel reads a string.
    if bytes.is_empty() || bytes.len() >= request.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(bytes) {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one ifreq, which lives on.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(file.into()),
    }
}
