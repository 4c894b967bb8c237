//! Errors that a switch reports, with the names that its manual uses (section A.4.4).
//!
//! Used through [`crate::Message`]. Names are those of Open vSwitch's tools, so that what we log
//! can be searched for; a test compares every one of them with `ovs-ofctl ofp-print`.

use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};

use crate::wire::{BodyError, Reader, Wire};

const EXPERIMENTER: u16 = 0xffff;
/// The Open Networking Foundation, whose extensions bring 1.4's bundles to 1.3.
const ONF: u32 = 0x4f4e_4600;
const FIRST_BUNDLE_CODE: u16 = 2300;

/// An error that a switch reports. Its xid is that of the message that was at fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The field of trouble, such as 12 for meter mods.
    pub kind: u16,
    /// Which trouble of that field; of an experimenter error, its own type.
    pub code: u16,
    /// Whose error it is, when `kind` is that of experimenters.
    pub experimenter: Option<u32>,
    /// The beginning of the message at fault, or (for HELLO) text.
    pub data: Bytes,
}

impl Failure {
    /// One of the specification's own errors, without data.
    pub fn new(kind: u16, code: u16) -> Self {
        Self { kind, code, experimenter: None, data: Bytes::new() }
    }

    /// The name as in the specification, such as `OFPMMFC_METER_EXISTS`; `None` for one that
    /// neither 1.3 nor its bundle extension has.
    pub fn name(&self) -> Option<String> {
        if let Some(experimenter) = self.experimenter {
            let code = self.code.checked_sub(FIRST_BUNDLE_CODE)?;
            let name = BUNDLE.get(usize::from(code)).filter(|_| experimenter == ONF)?;
            return Some(format!("OFPBFC_{name}"));
        }
        let (prefix, codes) = FAMILIES.get(usize::from(self.kind))?;
        let name = codes.get(usize::from(self.code))?;
        Some(format!("{prefix}_{name}"))
    }

    /// All errors that have a name.
    pub fn all_named() -> impl Iterator<Item = Self> {
        let plain = (0..).zip(FAMILIES).flat_map(|(kind, (_, codes))| {
            (0..).zip(*codes).map(move |(code, _)| Self::new(kind, code))
        });
        plain.chain(
            (FIRST_BUNDLE_CODE..)
                .zip(BUNDLE)
                .map(|(code, _)| Self { experimenter: Some(ONF), ..Self::new(EXPERIMENTER, code) }),
        )
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name(), self.experimenter) {
            (Some(name), _) => f.write_str(&name),
            (None, Some(who)) => write!(f, "error {} of experimenter {who:#010x}", self.code),
            (None, None) => write!(f, "error of type {} code {}", self.kind, self.code),
        }
    }
}

impl Wire for Failure {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        let (kind, code) = (reader.get()?, reader.get()?);
        let experimenter = if kind == EXPERIMENTER { Some(reader.get()?) } else { None };
        Ok(Self { kind, code, experimenter, data: reader.rest() })
    }

    fn put(&self, out: &mut BytesMut) {
        out.put_u16(self.kind);
        out.put_u16(self.code);
        if self.kind == EXPERIMENTER {
            out.put_u32(self.experimenter.unwrap_or_default());
        }
        out.put_slice(&self.data);
    }
}

/// Position is the error type; inside, position is the code.
const FAMILIES: &[(&str, &[&str])] = &[
    ("OFPHFC", &["INCOMPATIBLE", "EPERM"]),
    (
        "OFPBRC",
        &[
            "BAD_VERSION",
            "BAD_TYPE",
            "BAD_STAT",
            "BAD_VENDOR",
            "BAD_SUBTYPE",
            "EPERM",
            "BAD_LEN",
            "BUFFER_EMPTY",
            "BUFFER_UNKNOWN",
            "BAD_TABLE_ID",
            "IS_SECONDARY",
            "BAD_PORT",
            "BAD_PACKET",
            "MULTIPART_BUFFER_OVERFLOW",
        ],
    ),
    (
        "OFPBAC",
        &[
            "BAD_TYPE",
            "BAD_LEN",
            "BAD_VENDOR",
            "BAD_VENDOR_TYPE",
            "BAD_OUT_PORT",
            "BAD_ARGUMENT",
            "EPERM",
            "TOO_MANY",
            "BAD_QUEUE",
            "BAD_OUT_GROUP",
            "MATCH_INCONSISTENT",
            "UNSUPPORTED_ORDER",
            "BAD_TAG",
            "BAD_SET_TYPE",
            "BAD_SET_LEN",
            "BAD_SET_ARGUMENT",
        ],
    ),
    (
        "OFPBIC",
        &[
            "UNKNOWN_INST",
            "UNSUP_INST",
            "BAD_TABLE_ID",
            "UNSUP_METADATA",
            "UNSUP_METADATA_MASK",
            "BAD_EXPERIMENTER",
            "BAD_EXP_TYPE",
            "BAD_LEN",
            "EPERM",
        ],
    ),
    (
        "OFPBMC",
        &[
            "BAD_TYPE",
            "BAD_LEN",
            "BAD_TAG",
            "BAD_DL_ADDR_MASK",
            "BAD_NW_ADDR_MASK",
            "BAD_WILDCARDS",
            "BAD_FIELD",
            "BAD_VALUE",
            "BAD_MASK",
            "BAD_PREREQ",
            "DUP_FIELD",
            "EPERM",
        ],
    ),
    (
        "OFPFMFC",
        &[
            "UNKNOWN",
            "TABLE_FULL",
            "BAD_TABLE_ID",
            "OVERLAP",
            "EPERM",
            "BAD_TIMEOUT",
            "BAD_COMMAND",
            "BAD_FLAGS",
        ],
    ),
    (
        "OFPGMFC",
        &[
            "GROUP_EXISTS",
            "INVALID_GROUP",
            "WEIGHT_UNSUPPORTED",
            "OUT_OF_GROUPS",
            "OUT_OF_BUCKETS",
            "CHAINING_UNSUPPORTED",
            "WATCH_UNSUPPORTED",
            "LOOP",
            "UNKNOWN_GROUP",
            "CHAINED_GROUP",
            "BAD_TYPE",
            "BAD_COMMAND",
            "BAD_BUCKET",
            "BAD_WATCH",
            "EPERM",
        ],
    ),
    ("OFPPMFC", &["BAD_PORT", "BAD_HW_ADDR", "BAD_CONFIG", "BAD_ADVERTISE", "EPERM"]),
    ("OFPTMFC", &["BAD_TABLE", "BAD_CONFIG", "EPERM"]),
    ("OFPQOFC", &["BAD_PORT", "BAD_QUEUE", "EPERM"]),
    ("OFPSCFC", &["BAD_FLAGS", "BAD_LEN", "EPERM"]),
    ("OFPRRFC", &["STALE", "UNSUP", "BAD_ROLE"]),
    (
        "OFPMMFC",
        &[
            "UNKNOWN",
            "METER_EXISTS",
            "INVALID_METER",
            "UNKNOWN_METER",
            "BAD_COMMAND",
            "BAD_FLAGS",
            "BAD_RATE",
            "BAD_BURST",
            "BAD_BAND",
            "BAD_BAND_VALUE",
            "OUT_OF_METERS",
            "OUT_OF_BANDS",
        ],
    ),
    ("OFPTFFC", &["BAD_TABLE", "BAD_METADATA", "BAD_TYPE", "BAD_LEN", "BAD_ARGUMENT", "EPERM"]),
];

/// Position is the experimenter type less 2300.
const BUNDLE: &[&str] = &[
    "UNKNOWN",
    "EPERM",
    "BAD_ID",
    "BUNDLE_EXIST",
    "BUNDLE_CLOSED",
    "OUT_OF_BUNDLES",
    "BAD_TYPE",
    "BAD_FLAGS",
    "MSG_BAD_LEN",
    "MSG_BAD_XID",
    "MSG_UNSUP",
    "MSG_CONFLICT",
    "MSG_TOO_MANY",
    "MSG_FAILED",
    "TIMEOUT",
    "BUNDLE_IN_PROGRESS",
];
