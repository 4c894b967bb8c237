//! Where the devices' state of a pre-copy ends. Used before it is packed for a post-copy.
//!
//! ```text
//!  FULL sections, no lengths ... 7e sid | 00 | 06 be32 n '{' ... '}'
//!  '---------- devices --------------'        '---- description ---'
//! ```
//!
//! QEMU's reader stops at `00` and then wants the description or nothing. Sections have no length,
//! so the end is found from behind: a description whose length runs exactly to the last byte and
//! that is JSON, behind an end mark, behind a footer. No other place can satisfy all of that at once
//! unless a device's state were built to; two such places are an error, not a guess.

use serde_json::Value;

use super::error::StreamError;
use super::wire;

/// Bytes of a footer.
const FOOTER_BYTES: usize = 5;
/// Bytes from the end mark to where the description's text begins.
const HEAD_BYTES: usize = 6;

/// The parts of what follows the last RAM section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail<'a> {
    /// The devices' sections, with their footers, without an end mark.
    pub devices: &'a [u8],
    /// QEMU's description of them, JSON; not every machine type sends it.
    pub description: Option<&'a [u8]>,
}

/// Takes the tail apart; all of it must be there.
///
/// # Errors
/// [`StreamError::NoEnd`] where QEMU has not ended it, or where two ends are possible.
pub fn split(tail: &[u8]) -> Result<Tail<'_>, StreamError> {
    let no_end = StreamError::NoEnd { bytes: tail.len() as u64 };
    let mut found = None;
    for end in 0..tail.len().saturating_sub(HEAD_BYTES) {
        if is_end(tail, end) && found.replace(end).is_some() {
            return Err(no_end);
        }
    }
    if let Some(end) = found {
        let description = Some(&tail[end + HEAD_BYTES..]);
        return Ok(Tail { devices: &tail[..end], description });
    }
    match tail.split_last() {
        Some((&wire::SECTION_EOF, devices)) if ends_with_footer(devices) => {
            Ok(Tail { devices, description: None })
        }
        _ => Err(no_end),
    }
}

/// Is `tail[end..]` an end mark with a description that fills the rest?
fn is_end(tail: &[u8], end: usize) -> bool {
    let Some(([wire::SECTION_EOF, wire::DESCRIPTION, length @ ..], text)) =
        tail[end..].split_first_chunk::<HEAD_BYTES>()
    else {
        return false;
    };
    u64::from(u32::from_be_bytes(*length)) == text.len() as u64
        && text.first() == Some(&b'{')
        && ends_with_footer(&tail[..end])
        && serde_json::from_slice::<Value>(text).is_ok_and(|json| json.get("devices").is_some())
}

fn ends_with_footer(devices: &[u8]) -> bool {
    let first = devices.first().copied();
    let mark = devices.len().checked_sub(FOOTER_BYTES).map(|at| devices[at]);
    mark == Some(wire::FOOTER) && matches!(first, Some(wire::SECTION_FULL | wire::COMMAND))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: &[u8] = b"\x04\0\0\0\x03\x03apm\0\0\0\0\0\0\0\x01xy\x7e\0\0\0\x03";

    fn tail(json: &[u8], length: u32) -> Vec<u8> {
        [DEVICE, b"\0\x06", &length.to_be_bytes(), json].concat()
    }

    #[test]
    fn devices_end_before_the_mark_and_the_description() {
        let json = br#"{"devices": []}"#;
        let whole = tail(json, 15);
        let split = split(&whole).unwrap();
        assert_eq!(split, Tail { devices: DEVICE, description: Some(json) });
    }

    #[test]
    fn a_machine_that_describes_nothing_ends_with_the_mark() {
        let whole = [DEVICE, b"\0"].concat();
        assert_eq!(split(&whole).unwrap(), Tail { devices: DEVICE, description: None });
    }

    #[test]
    fn no_end_is_guessed() {
        let json = br#"{"devices": []}"#;
        let cut = &tail(json, 15)[..30];
        let wrong_length = tail(json, 14);
        let no_footer = [b"\x04 no footer", &wrong_length[DEVICE.len()..]].concat();
        let no_devices = tail(br#"{"device": []}"#, 14);
        for bad in [&b""[..], b"\0", DEVICE, cut, &wrong_length, &no_footer, &no_devices] {
            assert_eq!(split(bad), Err(StreamError::NoEnd { bytes: bad.len() as u64 }), "{bad:?}");
        }
    }
}
