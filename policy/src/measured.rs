//! What is known of a VM before it moves: the figures that order, placement and prediction count
//! with.
//!
//! The agents measure (SOLive IV-B: non-zero pages, unique dirty page rate, network use of the
//! taps); this file only gives the figures their names and units.

use lifeboat_protocol::ids::VmId;
use lifeboat_protocol::units::{BitsPerSec, Bytes, Pages, PagesPerSec};
use serde::Serialize;

/// One VM's figures, all from the same short window.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MeasuredVm {
    /// The VM.
    pub id: VmId,
    /// The memory that it was given.
    pub memory: Bytes,
    /// Pages that are not all zeros (SOLive's N).
    pub non_zero: Pages,
    /// Distinct pages dirtied per second (SOLive's S).
    pub dirty_rate: PagesPerSec,
    /// Pages that it writes at all in the long run; the dirty pages of an iteration never exceed
    /// them.
    pub working_set: Pages,
    /// What it sends, bit/s.
    pub network_out: BitsPerSec,
    /// What it receives, bit/s.
    pub network_in: BitsPerSec,
    /// Relative error of pages and rates, as the agent states it: 0.1 means 10 % either way.
    pub error: f64,
}
