//! What the agent and `lifeboat-disk move` say to each other, and its bytes. Pure.
//!
//! `client` asks, `mover` answers; one answer for each question, in order. The socket is root's.
//! JSON inside a small frame: a person can read it with `socat`, and nothing here is hot.
//!
//! ```text
//!  0               4           6
//!  | length be32   | version   | JSON, `length` bytes
//! ```

use bytes::{Buf, BufMut, BytesMut};
use lifeboat_protocol::ids::{Generation, HostId, MigrationId, VmId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::disk::sync::phases::Phase;

/// The version of these words.
pub const PROTOCOL: u16 = 1;
/// Bytes of a frame's header.
const HEADER: usize = 6;
/// The longest message, bytes.
const LONGEST: usize = 64 << 10;

/// Bytes on the control socket that are none of ours.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A newer or older program.
    #[error(
        "the disk process speaks version {theirs} of its control protocol, this agent version {PROTOCOL}"
    )]
    Protocol {
        /// The peer's.
        theirs: u16,
    },
    /// A length that no message has.
    #[error("a message of {0} bytes is announced on a disk process's control socket")]
    TooLong(u32),
    /// No message that this version knows.
    #[error("a message on a disk process's control socket makes no sense")]
    Malformed(#[from] serde_json::Error),
}

/// Where the disks go.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Destination {
    /// Its page listener.
    pub page_address: String,
    /// Its name, which its certificate must show.
    pub host: HostId,
    /// This host's name.
    pub own_host: HostId,
    /// The migration.
    pub migration: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// The generation that the destination will own.
    pub generation: Generation,
    /// The destination's proof that the controller sent us.
    pub token: Vec<u8>,
    /// The destination may have blocks of an earlier attempt: compare hashes first.
    pub compares: bool,
    /// Of disks that may follow their VM: so many bytes of what goes before may be left when the two
    /// sides go in step (LiveFS' handover-size); 0: the mover's default.
    #[serde(default)]
    pub handover_size: u64,
    /// The VM is the destination's already: a mover before this one was killed. What is missing there
    /// is sent.
    #[serde(default)]
    pub rests: bool,
}

impl std::fmt::Debug for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { host, migration, vm, compares, rests, .. } = self;
        // Its token is nobody's to read.
        write!(f, "Destination({vm} to {host}, {migration}, compares {compares}, rests {rests})")
    }
}

/// How fast it may go, both in bytes/s; `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// What the transfer may send.
    pub network: Option<u64>,
    /// What the guest may change on its disks, together.
    pub disk: Option<u64>,
    /// Nothing is held back longer for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_at_most_ms: Option<u64>,
}

/// What the agent asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// QEMU is about to move disk `disk` onto the mount or off it.
    BeginSwap {
        /// Its number.
        disk: u16,
    },
    /// It has moved, or has not.
    EndSwap {
        /// Its number.
        disk: u16,
        /// Where it is now.
        on_mount: bool,
    },
    /// Begin to send, and go on after each lost connection.
    Send(Destination),
    /// Set both limits.
    Limit(Limits),
    /// Have writes go to both sides at once, whatever is left. Nothing where they do.
    GoInStep,
    /// How far is it?
    Progress,
    /// The guest is paused and QEMU writes nothing more: seal. Answered when the destination has
    /// everything durably, or with a refusal.
    Seal,
    /// The VM is this host's, whatever was sealed: end the transfer, answer every write.
    Stop,
    /// The VM is the destination's (COMMIT), and what is missing there follows it.
    Cede,
    /// Of disks that arrive: the VM is about to run here, so nothing but what is missing is taken in.
    Own,
    /// Of disks that arrive: nothing is missing; answered when that is durable.
    Settle,
    /// Nobody uses the mounts any more: unmount and end.
    Finish,
}

/// How far the disks are, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Nothing is being sent.
    Idle,
    /// One pass over all blocks.
    Bulk,
    /// What was written since.
    Dirty,
    /// Every write goes to both sides.
    Synchronous,
    /// The destination is being told that nothing changes any more.
    Sealing,
    /// It has everything, durably; or, of disks that follow their VM, all that goes before.
    Sealed,
    /// The VM runs at the destination, and what is missing there follows.
    Rest,
    /// Nothing is missing there.
    Complete,
}

impl From<Phase> for Stage {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Monitoring | Phase::Bulk => Self::Bulk,
            Phase::Dirty => Self::Dirty,
            Phase::Synchronous => Self::Synchronous,
            Phase::Sealing => Self::Sealing,
            Phase::Sealed => Self::Sealed,
            Phase::Rest => Self::Rest,
            Phase::Complete => Self::Complete,
        }
    }
}

/// The answer to [`Request::Progress`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Where it is.
    pub stage: Stage,
    /// Bytes that have still to be sent or acknowledged, whole blocks.
    pub left: u64,
    /// Those of them that are not on their way.
    pub dirty: u64,
    /// Bytes that were given to the connection so far.
    pub sent: u64,
    /// The guest's changes that went to both sides so far, bytes.
    pub mirrored: u64,
    /// What the guest has written so far, bytes; a mover of an older version does not say.
    #[serde(default)]
    pub written: u64,
    /// Hashes are being compared: what is left is what was found so far.
    #[serde(default)]
    pub comparing: bool,
    /// Why it will not go on, however often it connects.
    pub failed: Option<String>,
}

/// What the process answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Done.
    Done,
    /// How far it is.
    Progress(Report),
    /// Not done, and why.
    Refused(String),
}

/// Appends `message` to `out`.
///
/// # Errors
/// When it is longer than a message may be.
pub fn encode<T: Serialize>(message: &T, out: &mut BytesMut) -> Result<(), ControlError> {
    let text = serde_json::to_vec(message)?;
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    if text.len() > LONGEST {
        return Err(ControlError::TooLong(length));
    }
    out.put_u32(length);
    out.put_u16(PROTOCOL);
    out.put_slice(&text);
    Ok(())
}

/// Takes the next message out of `buffer`; `Ok(None)` when it is not complete yet.
///
/// # Errors
/// When it is none of ours. The socket is of no use after it.
pub fn decode<T: DeserializeOwned>(buffer: &mut BytesMut) -> Result<Option<T>, ControlError> {
    let Some(mut header) = buffer.get(..HEADER) else { return Ok(None) };
    let (stated, theirs) = (header.get_u32(), header.get_u16());
    if theirs != PROTOCOL {
        return Err(ControlError::Protocol { theirs });
    }
    let length = stated as usize;
    if length > LONGEST {
        return Err(ControlError::TooLong(stated));
    }
    if buffer.len() < HEADER + length {
        return Ok(None);
    }
    let whole = buffer.split_to(HEADER + length);
    Ok(Some(serde_json::from_slice(&whole[HEADER..])?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn destination() -> Destination {
        Destination {
            page_address: "10.0.0.2:7001".into(),
            host: HostId::new("h2").unwrap(),
            own_host: HostId::new("h1").unwrap(),
            migration: MigrationId::new("m1").unwrap(),
            vm: VmId::new("web").unwrap(),
            generation: Generation(2),
            token: vec![7; 32],
            compares: false,
            handover_size: 0,
            rests: false,
        }
    }

    fn requests() -> Vec<Request> {
        vec![
            Request::BeginSwap { disk: 1 },
            Request::EndSwap { disk: 1, on_mount: true },
            Request::Send(destination()),
            Request::Limit(Limits { network: Some(1), disk: None, held_at_most_ms: Some(15) }),
            Request::Progress,
            Request::Seal,
            Request::Stop,
            Request::Cede,
            Request::Own,
            Request::Settle,
            Request::Finish,
        ]
    }

    #[test]
    fn messages_come_back_however_they_are_cut() {
        let mut bytes = BytesMut::new();
        requests().iter().for_each(|request| encode(request, &mut bytes).unwrap());
        for cut in 1..20 {
            let (mut buffer, mut found) = (BytesMut::new(), vec![]);
            for piece in bytes.chunks(cut) {
                buffer.extend_from_slice(piece);
                while let Some(request) = decode::<Request>(&mut buffer).unwrap() {
                    found.push(request);
                }
            }
            assert_eq!(found, requests());
        }
    }

    #[test]
    fn a_message_is_readable_and_its_header_where_the_picture_says() {
        let mut bytes = BytesMut::new();
        encode(&Request::BeginSwap { disk: 3 }, &mut bytes).unwrap();
        assert_eq!(&bytes[..], b"\0\0\0\x19\0\x01{\"begin-swap\":{\"disk\":3}}");
    }

    #[test]
    fn what_is_stated_is_not_believed() {
        let mut bytes = BytesMut::from(&b"\xff\xff\xff\xff\0\x01"[..]);
        assert!(matches!(decode::<Reply>(&mut bytes), Err(ControlError::TooLong(u32::MAX))));
        let mut bytes = BytesMut::from(&b"\0\0\0\0\0\x09"[..]);
        assert!(matches!(decode::<Reply>(&mut bytes), Err(ControlError::Protocol { theirs: 9 })));
        let long = Reply::Refused("x".repeat(LONGEST));
        assert!(matches!(encode(&long, &mut BytesMut::new()), Err(ControlError::TooLong(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_incomplete(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(&[0, 0, 0, 40, 0, 1][..]);
            buffer.extend_from_slice(&bytes);
            prop_assert!(!matches!(decode::<Request>(&mut buffer), Ok(Some(_))));
            let mut buffer = BytesMut::from(&bytes[..]);
            prop_assert!(!matches!(decode::<Request>(&mut buffer), Ok(Some(_))));
        }
    }
}
