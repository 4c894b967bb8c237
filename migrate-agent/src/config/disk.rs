//! The section `[disk]` of `agent.toml`, checked: how disks leave this host. Used by `config`.
//!
//! ```toml
//! [disk]
//! block_size = "64 KiB"               # what is sent again when a byte of it changes: 4 KiB to 1 MiB
//! transfer_size = "512 KiB"           # what is read and sent at once at most: whole blocks, up to 1 MiB
//! segment_size = "64 MiB"             # by which it is counted what is busy: from 1 MiB
//! read_weight = 0.5                   # how much a read counts there, 0 to 1; a write has the rest
//! busy_threshold = 1.0                # busy is what ranks so many times above the average
//! ```
//!
//! Not here: the keys about disks outside of it (`disk_dirs`), and what belongs to one migration.

use std::path::PathBuf;
use std::time::Duration;

use lifeboat_protocol::units::Bytes;
use serde::Deserialize;

use super::intermediary::optional;
use super::{Checked, ConfigProblem};
pub(super) use crate::disk::parameters::ParameterError;
use crate::disk::parameters::{Numbers, Parameters};

/// What becomes of local disks.
#[derive(Debug, Clone)]
pub struct DiskSettings {
    /// Where disks may arrive; the first is where those are that a definition gives a name only.
    pub directories: Vec<PathBuf>,
    /// How long a disk is kept whose VM has left.
    pub kept_for: Duration,
    /// How they leave.
    pub parameters: Parameters,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawDisk {
    #[serde(default, with = "optional")]
    block_size: Option<Bytes>,
    #[serde(default, with = "optional")]
    transfer_size: Option<Bytes>,
    #[serde(default, with = "optional")]
    segment_size: Option<Bytes>,
    read_weight: Option<f64>,
    busy_threshold: Option<f64>,
}

impl RawDisk {
    /// The section.
    pub(super) fn check(&self) -> Checked<Parameters> {
        let bytes = |size: Option<Bytes>| size.map(|size| size.0);
        let numbers = Numbers {
            block_size: bytes(self.block_size),
            transfer_size: bytes(self.transfer_size),
            segment_size: bytes(self.segment_size),
            read_weight: self.read_weight,
            busy_threshold: self.busy_threshold,
        };
        let wrong = |problem: ParameterError| {
            (format!("disk.{}", problem.key()), ConfigProblem::Disk(problem))
        };
        numbers.try_into().map_err(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toml_file;

    fn parse(text: &str) -> Result<Parameters, String> {
        let raw: RawDisk =
            toml_file::parse("agent.toml".as_ref(), text).map_err(|e| e.to_string())?;
        raw.check().map_err(|(key, problem)| format!("{key}: {problem}"))
    }

    #[test]
    fn what_is_said_is_taken_and_what_is_left_out_is_as_before() {
        assert_eq!(parse("").unwrap(), Parameters::default());
        let own = parse(
            "block_size = \"16 KiB\"\nsegment_size = \"1 MiB\"\nread_weight = 1\nbusy_threshold = 2.5",
        );
        let own = Numbers::from(own.unwrap());
        assert_eq!((own.block_size, own.segment_size), (Some(16 << 10), Some(1 << 20)));
        assert_eq!((own.transfer_size, own.read_weight), (Some(512 << 10), Some(1.0)));
        assert_eq!(own.busy_threshold, Some(2.5));
    }

    #[test]
    fn what_does_not_pass_names_the_key_and_what_would() {
        let cases = [
            (
                "block_size = \"2 MiB\"",
                "disk.block_size: a block of 2097152 bytes: blocks are powers",
            ),
            ("segment_size = \"3 MiB\"", "disk.segment_size: a segment of 3145728 bytes: segments"),
            (
                "block_size = \"128 KiB\"\ntransfer_size = \"192 KiB\"",
                "disk.transfer_size: 196608 bytes at once, in blocks of 131072: it is whole blocks",
            ),
            ("read_weight = 2", "disk.read_weight: 2 is no weight: from 0"),
            ("busy_threshold = inf", "disk.busy_threshold: inf is no threshold: it is times"),
            ("block_size = 65536", "invalid type: integer `65536`"),
            ("blocksize = \"64 KiB\"", "unknown field `blocksize`"),
        ];
        for (text, wanted) in cases {
            let said = parse(text).unwrap_err();
            assert!(said.contains(wanted), "{said}\n  wanted: {wanted}");
        }
    }
}
