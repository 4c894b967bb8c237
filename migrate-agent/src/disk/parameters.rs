//! What an operator may choose about how disks go: sizes, and which segments are busy. Checked.
//!
//! `config` reads them from `[disk]` of agent.toml, `process::setting` hands them to the process in which a
//! VM's disks leave. A destination has none of its own: the size of blocks is the source's to say, with its
//! first frame, and segments and what is sent at once are the source's own affair.
//!
//! docs/disks.md tells what each does. Deliberately not here: what belongs to one migration (`--disk-watch`, `--handover-size`).

use serde::{Deserialize, Serialize};

use super::sync::frame::MAX_PAYLOAD;
use super::sync::rank::{Strategy, Weights};
use super::track::{BLOCK, BlockSize, GeometryError, SEGMENT, SegmentSize, Traffic};

/// What is read and sent at once at most, bytes: MigrateFS' transfer block (section 4).
pub const TRANSFER: u64 = 512 << 10;

/// A value that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum ParameterError {
    /// Of blocks.
    #[error("{0}, and 64 KiB where left out")]
    Block(GeometryError),
    /// Of segments.
    #[error("{0}, and 64 MiB where left out")]
    Segment(GeometryError),
    /// Of what is sent at once.
    #[error(
        "{transfer} bytes at once, in blocks of {block}: it is whole blocks, one at least and 1 MiB at most"
    )]
    Transfer {
        /// What was asked for, bytes.
        transfer: u64,
        /// The block, bytes.
        block: u64,
    },
    /// Of reads beside writes.
    #[error("{0} is no weight: from 0 (only writes count) to 1 (only reads do)")]
    ReadWeight(f64),
    /// Of what is busy.
    #[error(
        "{0} is no threshold: it is times the average, 0 (everything is busy) or more, such as 1"
    )]
    BusyThreshold(f64),
}

impl ParameterError {
    /// The key in `[disk]` that it is about.
    #[must_use]
    pub const fn key(&self) -> &'static str {
        match self {
            Self::Block(_) => "block_size",
            Self::Segment(_) => "segment_size",
            Self::Transfer { .. } => "transfer_size",
            Self::ReadWeight(_) => "read_weight",
            Self::BusyThreshold(_) => "busy_threshold",
        }
    }
}

/// They, as a file has them. What is left out has its default.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Numbers {
    /// What is sent again when a byte of it changes, bytes.
    pub block_size: Option<u64>,
    /// What is read and sent at once at most, bytes.
    pub transfer_size: Option<u64>,
    /// The segments by which it is counted what is busy, bytes.
    pub segment_size: Option<u64>,
    /// The paper's w1 (LiveFS, section III): how much a read counts; a write has what is left of 1.
    pub read_weight: Option<f64>,
    /// So many times the average of all segments is busy.
    pub busy_threshold: Option<f64>,
}

/// How disks go.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Numbers", into = "Numbers")]
pub struct Parameters {
    block: BlockSize,
    transfer: u64,
    segment: SegmentSize,
    weights: Weights,
    busy: f64,
}

impl Default for Parameters {
    fn default() -> Self {
        let (block, segment, weights) = Default::default();
        Self { block, transfer: TRANSFER, segment, weights, busy: 1.0 }
    }
}

impl TryFrom<Numbers> for Parameters {
    type Error = ParameterError;

    fn try_from(given: Numbers) -> Result<Self, ParameterError> {
        let block = BlockSize::new(given.block_size.unwrap_or(BLOCK));
        let block = block.map_err(ParameterError::Block)?;
        let segment = SegmentSize::new(given.segment_size.unwrap_or(SEGMENT));
        let segment = segment.map_err(ParameterError::Segment)?;
        let transfer = given.transfer_size.unwrap_or(TRANSFER.max(block.bytes()));
        let whole = transfer > 0 && transfer.is_multiple_of(block.bytes());
        if !whole || transfer > MAX_PAYLOAD as u64 {
            return Err(ParameterError::Transfer { transfer, block: block.bytes() });
        }
        let weight = given.read_weight.unwrap_or(0.5);
        if !(0.0..=1.0).contains(&weight) {
            return Err(ParameterError::ReadWeight(weight));
        }
        let busy = given.busy_threshold.unwrap_or(1.0);
        // Infinity would not come back from the file that is handed on.
        if !busy.is_finite() || busy < 0.0 {
            return Err(ParameterError::BusyThreshold(busy));
        }
        Ok(Self { block, transfer, segment, weights: Weights::of_reads(weight), busy })
    }
}

impl From<Parameters> for Numbers {
    fn from(own: Parameters) -> Self {
        Self {
            block_size: Some(own.block.bytes()),
            transfer_size: Some(own.transfer),
            segment_size: Some(own.segment.bytes()),
            read_weight: Some(own.weights.reads()),
            busy_threshold: Some(own.busy),
        }
    }
}

impl Parameters {
    /// The same, in blocks of this size: those of a destination that has a part already.
    #[must_use]
    pub fn in_blocks_of(self, block: BlockSize) -> Self {
        let transfer = self.transfer.max(block.bytes());
        let transfer = transfer - transfer % block.bytes();
        Self { block, transfer, ..self }
    }

    /// What is sent again when a byte of it changes.
    #[must_use]
    pub const fn block(&self) -> BlockSize {
        self.block
    }

    /// What is read and sent at once at most, bytes.
    #[must_use]
    pub const fn transfer(&self) -> u64 {
        self.transfer
    }

    /// By what it is counted what is busy.
    #[must_use]
    pub const fn segment(&self) -> SegmentSize {
        self.segment
    }

    /// How reads count beside writes.
    #[must_use]
    pub const fn weights(&self) -> Weights {
        self.weights
    }

    /// What goes before a VM that its disks may follow, of segments with this traffic.
    #[must_use]
    pub fn busy(&self, traffic: &[Traffic]) -> Strategy {
        Strategy::above_average(traffic, self.weights, self.busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(change: impl FnOnce(&mut Numbers)) -> Result<Parameters, ParameterError> {
        let mut numbers = Numbers::default();
        change(&mut numbers);
        Parameters::try_from(numbers)
    }

    #[test]
    fn what_is_left_out_is_as_in_the_papers_with_finer_blocks() {
        assert_eq!(of(|_| ()).unwrap(), Parameters::default());
        let large = of(|given| given.block_size = Some(1 << 20)).unwrap();
        assert_eq!((large.transfer(), large.block().bytes()), (1 << 20, 1 << 20));
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_key() {
        let key = |change: fn(&mut Numbers)| of(change).unwrap_err().key();
        assert_eq!(key(|given| given.block_size = Some(5000)), "block_size");
        assert_eq!(key(|given| given.segment_size = Some(1 << 19)), "segment_size");
        for bad in [0, 100 << 10, 2 << 20] {
            let said = of(|given| given.transfer_size = Some(bad)).unwrap_err();
            assert_eq!(said.key(), "transfer_size");
            assert!(said.to_string().contains(&format!("{bad} bytes at once")), "{said}");
        }
        assert_eq!(key(|given| given.read_weight = Some(1.1)), "read_weight");
        assert_eq!(key(|given| given.read_weight = Some(f64::NAN)), "read_weight");
        assert_eq!(key(|given| given.busy_threshold = Some(-1.0)), "busy_threshold");
        assert_eq!(key(|given| given.busy_threshold = Some(f64::INFINITY)), "busy_threshold");
    }

    #[test]
    fn they_come_back_from_the_file_that_is_handed_on() {
        let given = Numbers {
            block_size: Some(16 << 10),
            transfer_size: Some(256 << 10),
            segment_size: Some(1 << 20),
            read_weight: Some(0.9),
            busy_threshold: Some(0.0),
        };
        let own = Parameters::try_from(given).unwrap();
        assert_eq!(Numbers::from(own), given);
        let text = serde_json::to_string(&own).unwrap();
        assert_eq!(serde_json::from_str::<Parameters>(&text).unwrap(), own);
        assert!(serde_json::from_str::<Parameters>("{\"block_size\":1}").is_err());
    }

    #[test]
    fn in_other_blocks_whole_ones_are_sent() {
        let block = |bytes| BlockSize::new(bytes).unwrap();
        let own = of(|given| given.transfer_size = Some(192 << 10)).unwrap();
        assert_eq!(own.in_blocks_of(block(128 << 10)).transfer(), 128 << 10);
        assert_eq!(own.in_blocks_of(block(1 << 20)).transfer(), 1 << 20);
        assert_eq!(own.in_blocks_of(block(4096)).transfer(), 192 << 10);
    }
}
