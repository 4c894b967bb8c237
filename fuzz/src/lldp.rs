//! The frames of link discovery, which any neighbour may send.

use bytes::Bytes;
use lifeboat_ovs::lldp::{decode, encode};

/// Whatever a neighbour sends.
///
/// # Panics
/// Where something does not hold.
pub fn holds(data: &[u8]) {
    let Ok(frame) = decode(&Bytes::copy_from_slice(data)) else { return };
    // What others sent may be longer than what we would send.
    if let Ok(written) = encode(&frame) {
        assert_eq!(decode(&written), Ok(frame), "what was written is read again");
    }
}
