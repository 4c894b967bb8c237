//! Frames of the page link: bytes to words and back; pure. Used by `migrate-agent`'s link.
//!
//! ```text
//!  0      1      2      3      4                    8
//!  +------+------+------+------+--------------------+------------- - - -
//!  | type |  0   |  0   |  0   | payload length be32 | payload
//!  +------+------+------+------+--------------------+------------- - - -
//! ```
//!
//! Everything a peer sends is hostile until decoded: lengths are bounded before anything is
//! allocated, names are checked names, an unknown type or a byte too many is an error. A frame
//! that is not all there yet is `Ok(None)`. STREAM payloads are slices of the receive buffer:
//! page bytes are not copied here.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use lifeboat_protocol::ids::{Generation, HostId, MigrationId, NAME_BYTES_MAX, VmId};

use super::pages::{self, Note, PackNote, PageKey, PageRun};
use crate::page::PageAt;
use crate::redundancy::StoreId;
use crate::seal::KEY_BYTES;

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 8;
/// Longest payload: large enough that a header costs nothing, small enough that a demand can
/// overtake between two frames.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// The link's version; a peer of another one is refused at HELLO.
pub const LINK_VERSION: u16 = 3;
/// Bytes of the token that the destination gives to the controller and the source shows.
pub const TOKEN_BYTES: usize = 32;
/// Longest reason, in bytes; a longer one is cut at a character.
const REASON_BYTES_MAX: usize = 1024;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Moves a VM.
    Migrate,
    /// The source asks the destination what became of a hand-over; COMMIT may follow.
    AskDestination,
    /// The destination asks the source.
    AskSource,
    /// Carries the VM's disks: after WELCOME, frames about disks, and no more of these.
    Disk,
    /// The source offers pages that the guest waits for (FETCH, PAGES).
    ServeDemands,
    /// The source offers pages in the background, and tells which packs are in stores.
    ServeBackground,
}

/// The numbers of purposes: place in the list, counted from 1.
const PURPOSES: [Purpose; 6] = [
    Purpose::Migrate,
    Purpose::AskDestination,
    Purpose::AskSource,
    Purpose::Disk,
    Purpose::ServeDemands,
    Purpose::ServeBackground,
];

/// The first frame of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// What the connection is for.
    pub purpose: Purpose,
    /// The migration that it is about.
    pub migration: MigrationId,
    /// The VM that moves.
    pub vm: VmId,
    /// The host that speaks.
    pub host: HostId,
    /// The generation that the destination owns after COMMIT.
    pub generation: Generation,
    /// Proof that the controller sent this connection; zeroes when asking.
    pub token: [u8; TOKEN_BYTES],
}

/// What END says about the stream, so that a lost or changed byte is noticed before LOADED.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Bytes of all STREAM payloads.
    pub total: u64,
    /// xxh3-64 of them in order.
    pub digest: u64,
}

/// How a host stands to a hand-over, durably: an answer is given only when the record behind it
/// cannot change without the asker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nothing is recorded here. Proves nothing.
    Unknown,
    /// The source still decides; ask again.
    Pending,
    /// The source gave it up before COMMIT and runs the VM; the destination must discard.
    Aborted,
    /// The source has ceded; the destination may own.
    Ceded,
    /// The destination has everything and waits for COMMIT.
    Loaded,
    /// The destination owns and the guest runs, or is about to.
    Owned,
    /// The destination will never own it in this migration; its guest never ran.
    Refused,
    /// The destination owned it, the guest may have run, and its QEMU is gone.
    Died,
    /// The destination owns and the guest runs, and pages of it are still wanted from the source.
    Gathering,
}

/// One word of the page link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// First on every connection.
    Hello(Hello),
    /// The destination is ready for the stream.
    Welcome,
    /// Bytes of QEMU's migration stream.
    Stream(Bytes),
    /// The stream is complete.
    End(Ended),
    /// So many stream bytes have been written to the destination's QEMU.
    Ack(u64),
    /// The destination's QEMU has loaded everything and stands paused.
    Loaded(Generation),
    /// The point of no return, already durable at the source.
    Commit(Generation),
    /// The guest runs at the destination.
    Running(Generation),
    /// Before COMMIT: the migration is given up.
    Abort(String),
    /// The destination will never own it in this migration.
    Refused(String),
    /// The answer to a connection that asks.
    Standing(Standing),
    /// Is the other side there? Answered by [`Frame::Pong`] with the same number.
    Ping(u64),
    /// It is.
    Pong(u64),
    /// What the source says of pages that the stream did not carry; before END.
    Notes(Vec<Note>),
    /// The destination wants these pages, at most [`pages::PAGES_MOST`] of them.
    Fetch(Vec<PageRun>),
    /// Pages with their bytes.
    Pages(Vec<(PageAt, Bytes)>),
    /// The same, compressed: [`pages::compressed`] makes it, [`pages::decompressed`] reads it.
    Compressed(Bytes),
    /// What opens the pages in stores; before END.
    Key(PageKey),
    /// A pack that stores have acknowledged.
    Pack(PackNote),
    /// The parity of a stripe that a store has acknowledged.
    Parity {
        /// The stripe.
        stripe: u64,
        /// Where it is.
        store: StoreId,
    },
    /// Everything is in stores and told.
    Scattered,
    /// The destination wants nothing of the source any more: its QEMU may go.
    Released(Generation),
}

/// Why bytes are no frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A type that this version does not know.
    #[error("frame type {0} is unknown")]
    UnknownType(u8),
    /// A payload longer than any frame's.
    #[error("frame states {stated} bytes, more than the {max} allowed")]
    TooLong {
        /// What the header states.
        stated: u32,
        /// What is allowed for its type.
        max: usize,
    },
    /// The reserved header bytes are not zero: another protocol, or another version.
    #[error("frame header has reserved bytes set")]
    Reserved,
    /// The payload of this type is cut short, too long, or holds a value that it cannot.
    #[error("payload of a {0} frame is malformed")]
    Malformed(&'static str),
    /// A peer of another version.
    #[error("the peer speaks page link version {theirs}, this agent speaks {LINK_VERSION}")]
    Version {
        /// The peer's version.
        theirs: u16,
    },
}

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const STREAM: u8 = 3;
const END: u8 = 4;
const ACK: u8 = 5;
const LOADED: u8 = 6;
const COMMIT: u8 = 7;
const RUNNING: u8 = 8;
const ABORT: u8 = 9;
const REFUSED: u8 = 10;
const STANDING: u8 = 11;
const PING: u8 = 12;
const PONG: u8 = 13;
const NOTES: u8 = 14;
const FETCH: u8 = 15;
const PAGES: u8 = 16;
const KEY: u8 = 17;
const PACK: u8 = 18;
const PARITY: u8 = 19;
const SCATTERED: u8 = 20;
const RELEASED: u8 = 21;
const COMPRESSED: u8 = 22;

/// The header of a STREAM frame of `payload` bytes, for writers that send the payload itself
/// from where it lies. `payload` must not exceed [`PAYLOAD_BYTES_MAX`].
#[must_use]
pub fn stream_header(payload: usize) -> [u8; HEADER_BYTES] {
    assert!(payload <= PAYLOAD_BYTES_MAX, "a stream frame holds at most {PAYLOAD_BYTES_MAX} bytes");
    header(STREAM, payload)
}

fn header(kind: u8, payload: usize) -> [u8; HEADER_BYTES] {
    let length = (payload as u32).to_be_bytes();
    [kind, 0, 0, 0, length[0], length[1], length[2], length[3]]
}

/// Appends `frame` to `to`.
///
/// # Panics
/// When a STREAM payload exceeds [`PAYLOAD_BYTES_MAX`], or a list the most that its frame holds: the
/// caller cuts them.
pub fn encode(frame: &Frame, to: &mut BytesMut) {
    let number = |kind: u8, value: u64, to: &mut BytesMut| {
        to.put_slice(&header(kind, 8));
        to.put_u64(value);
    };
    match frame {
        Frame::Hello(hello) => encode_hello(hello, to),
        Frame::Welcome => to.put_slice(&header(WELCOME, 0)),
        Frame::Stream(bytes) => {
            to.put_slice(&stream_header(bytes.len()));
            to.put_slice(bytes);
        }
        Frame::End(ended) => {
            to.put_slice(&header(END, 16));
            to.put_u64(ended.total);
            to.put_u64(ended.digest);
        }
        Frame::Ack(bytes) => number(ACK, *bytes, to),
        Frame::Loaded(generation) => number(LOADED, generation.0, to),
        Frame::Commit(generation) => number(COMMIT, generation.0, to),
        Frame::Running(generation) => number(RUNNING, generation.0, to),
        Frame::Abort(reason) => encode_reason(ABORT, reason, to),
        Frame::Refused(reason) => encode_reason(REFUSED, reason, to),
        Frame::Standing(standing) => {
            to.put_slice(&header(STANDING, 1));
            to.put_u8(standing_number(*standing));
        }
        Frame::Ping(value) => number(PING, *value, to),
        Frame::Pong(value) => number(PONG, *value, to),
        Frame::Released(generation) => number(RELEASED, generation.0, to),
        Frame::Notes(notes) => whole(NOTES, &pages::encode_notes(notes), to),
        Frame::Fetch(runs) => whole(FETCH, &pages::encode_fetch(runs), to),
        Frame::Pages(all) => whole(PAGES, &pages::encode_pages(all), to),
        Frame::Compressed(bytes) => whole(COMPRESSED, bytes, to),
        Frame::Key(key) => whole(KEY, &key.0, to),
        Frame::Pack(note) => whole(PACK, &pages::encode_pack(note), to),
        Frame::Parity { stripe, store } => {
            to.put_slice(&header(PARITY, 9));
            to.put_u64(*stripe);
            to.put_u8(store.0);
        }
        Frame::Scattered => to.put_slice(&header(SCATTERED, 0)),
    }
}

fn whole(kind: u8, payload: &[u8], to: &mut BytesMut) {
    to.put_slice(&header(kind, payload.len()));
    to.put_slice(payload);
}

fn encode_hello(hello: &Hello, to: &mut BytesMut) {
    let names = [hello.migration.as_str(), hello.vm.as_str(), hello.host.as_str()];
    let length = 2 + 1 + 8 + TOKEN_BYTES + names.iter().map(|name| 1 + name.len()).sum::<usize>();
    to.put_slice(&header(HELLO, length));
    to.put_u16(LINK_VERSION);
    to.put_u8(
        PURPOSES.iter().position(|known| *known == hello.purpose).map_or(0, |at| at as u8 + 1),
    );
    to.put_u64(hello.generation.0);
    to.put_slice(&hello.token);
    for name in names {
        to.put_u8(name.len() as u8);
        to.put_slice(name.as_bytes());
    }
}

fn encode_reason(kind: u8, reason: &str, to: &mut BytesMut) {
    let mut end = reason.len().min(REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    to.put_slice(&header(kind, end));
    to.put_slice(&reason.as_bytes()[..end]);
}

/// Takes the next frame out of `from`; `None` when it is not all there yet.
///
/// # Errors
/// [`FrameError`]; the connection is of no use after one.
pub fn decode(from: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
    let Some((head, _)) = from.split_first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let kind = head[0];
    if head[1..4] != [0, 0, 0] {
        return Err(FrameError::Reserved);
    }
    let stated = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
    let max = payload_max(kind)?;
    let length = usize::try_from(stated).unwrap_or(usize::MAX);
    if length > max {
        return Err(FrameError::TooLong { stated, max });
    }
    if from.len() < HEADER_BYTES + length {
        return Ok(None);
    }
    from.advance(HEADER_BYTES);
    let payload = from.split_to(length).freeze();
    decode_payload(kind, payload).map(Some)
}

/// How long a payload of this type may be: a peer that states more is refused at its header.
fn payload_max(kind: u8) -> Result<usize, FrameError> {
    Ok(match kind {
        HELLO => 2 + 1 + 8 + TOKEN_BYTES + 3 * (1 + NAME_BYTES_MAX),
        WELCOME => 0,
        STREAM => PAYLOAD_BYTES_MAX,
        END => 16,
        ACK | LOADED | COMMIT | RUNNING | PING | PONG | RELEASED => 8,
        ABORT | REFUSED => REASON_BYTES_MAX,
        STANDING => 1,
        NOTES => pages::notes_bytes_most(),
        FETCH => pages::fetch_bytes_most(),
        PAGES | COMPRESSED => pages::pages_bytes_most(),
        KEY => KEY_BYTES,
        PACK => pages::pack_bytes_most(),
        PARITY => 9,
        SCATTERED => 0,
        other => return Err(FrameError::UnknownType(other)),
    })
}

fn decode_payload(kind: u8, payload: Bytes) -> Result<Frame, FrameError> {
    let number = |what| match <[u8; 8]>::try_from(&payload[..]) {
        Ok(bytes) => Ok(u64::from_be_bytes(bytes)),
        Err(_) => Err(FrameError::Malformed(what)),
    };
    Ok(match kind {
        HELLO => Frame::Hello(decode_hello(payload)?),
        WELCOME => Frame::Welcome,
        STREAM => Frame::Stream(payload),
        END => {
            let mut rest = payload;
            if rest.len() != 16 {
                return Err(FrameError::Malformed("END"));
            }
            Frame::End(Ended { total: rest.get_u64(), digest: rest.get_u64() })
        }
        ACK => Frame::Ack(number("ACK")?),
        LOADED => Frame::Loaded(Generation(number("LOADED")?)),
        COMMIT => Frame::Commit(Generation(number("COMMIT")?)),
        RUNNING => Frame::Running(Generation(number("RUNNING")?)),
        ABORT => Frame::Abort(reason(&payload)),
        REFUSED => Frame::Refused(reason(&payload)),
        STANDING => Frame::Standing(decode_standing(&payload)?),
        PING => Frame::Ping(number("PING")?),
        PONG => Frame::Pong(number("PONG")?),
        RELEASED => Frame::Released(Generation(number("RELEASED")?)),
        kind => return decode_pages(kind, payload),
    })
}

/// The frames that are about single pages.
fn decode_pages(kind: u8, mut payload: Bytes) -> Result<Frame, FrameError> {
    let malformed = FrameError::Malformed;
    Ok(match kind {
        NOTES => Frame::Notes(pages::decode_notes(payload).ok_or(malformed("NOTES"))?),
        FETCH => Frame::Fetch(pages::decode_fetch(payload).ok_or(malformed("FETCH"))?),
        PAGES => Frame::Pages(pages::decode_pages(payload).ok_or(malformed("PAGES"))?),
        COMPRESSED => Frame::Compressed(payload),
        KEY => match <[u8; KEY_BYTES]>::try_from(&payload[..]) {
            Ok(key) => Frame::Key(PageKey(key)),
            Err(_) => return Err(malformed("KEY")),
        },
        PACK => Frame::Pack(pages::decode_pack(payload).ok_or(malformed("PACK"))?),
        PARITY if payload.len() == 9 => {
            Frame::Parity { stripe: payload.get_u64(), store: StoreId(payload.get_u8()) }
        }
        PARITY => return Err(malformed("PARITY")),
        SCATTERED => Frame::Scattered,
        other => return Err(FrameError::UnknownType(other)),
    })
}

/// A reason is read by people and logged: control characters of a peer do not reach a terminal.
fn reason(payload: &[u8]) -> String {
    String::from_utf8_lossy(payload).chars().filter(|c| !c.is_control()).collect()
}

fn decode_hello(mut rest: Bytes) -> Result<Hello, FrameError> {
    let malformed = || FrameError::Malformed("HELLO");
    if rest.remaining() < 2 {
        return Err(malformed());
    }
    let theirs = rest.get_u16();
    if theirs != LINK_VERSION {
        return Err(FrameError::Version { theirs });
    }
    if rest.remaining() < 1 + 8 + TOKEN_BYTES {
        return Err(malformed());
    }
    let number = usize::from(rest.get_u8());
    let purpose = number.checked_sub(1).and_then(|at| PURPOSES.get(at)).copied();
    let purpose = purpose.ok_or_else(malformed)?;
    let generation = Generation(rest.get_u64());
    let mut token = [0; TOKEN_BYTES];
    rest.copy_to_slice(&mut token);
    let migration = MigrationId::new(decode_name(&mut rest)?).map_err(|_| malformed())?;
    let vm = VmId::new(decode_name(&mut rest)?).map_err(|_| malformed())?;
    let host = HostId::new(decode_name(&mut rest)?).map_err(|_| malformed())?;
    if rest.has_remaining() {
        return Err(malformed());
    }
    Ok(Hello { purpose, migration, vm, host, generation, token })
}

fn decode_name(rest: &mut Bytes) -> Result<String, FrameError> {
    let malformed = || FrameError::Malformed("HELLO");
    if !rest.has_remaining() {
        return Err(malformed());
    }
    let length = usize::from(rest.get_u8());
    if rest.remaining() < length {
        return Err(malformed());
    }
    String::from_utf8(rest.split_to(length).to_vec()).map_err(|_| malformed())
}

const STANDINGS: [Standing; 9] = [
    Standing::Unknown,
    Standing::Pending,
    Standing::Aborted,
    Standing::Ceded,
    Standing::Loaded,
    Standing::Owned,
    Standing::Refused,
    Standing::Died,
    Standing::Gathering,
];

fn standing_number(standing: Standing) -> u8 {
    STANDINGS.iter().position(|known| *known == standing).unwrap_or(0) as u8
}

fn decode_standing(payload: &[u8]) -> Result<Standing, FrameError> {
    match payload {
        [number] => {
            STANDINGS.get(usize::from(*number)).copied().ok_or(FrameError::Malformed("STANDING"))
        }
        _ => Err(FrameError::Malformed("STANDING")),
    }
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
