//! What is known of a VM before it moves: the figures that order, placement and prediction count
//! with.
//!
//! The agents measure (SOLive IV-B: non-zero pages, unique dirty page rate, network use of the
//! taps); this file only gives the figures their names and units.

use lifeboat_protocol::agent::VmMeasurement;
use lifeboat_protocol::ids::{NameError, VmId};
use lifeboat_protocol::units::{BitsPerSec, Bytes, BytesPerSec, Pages, PagesPerSec};
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
    /// What its local disks take: they go along.
    pub disk: Bytes,
    /// What it writes to its disks.
    pub disk_writes: BytesPerSec,
    /// Relative error of pages and rates, as the agent states it: 0.1 means 10 % either way.
    pub error: f64,
}

impl TryFrom<&VmMeasurement> for MeasuredVm {
    type Error = NameError;

    /// What an agent measured. Its figures are taken as they are, except that what contradicts
    /// itself (more non-zero pages than memory) is cut to what is possible.
    fn try_from(measured: &VmMeasurement) -> Result<Self, NameError> {
        let memory = Pages(measured.memory_pages);
        Ok(Self {
            id: VmId::new(measured.vm.as_str())?,
            memory: memory.bytes(),
            non_zero: Pages(measured.non_zero_pages).min(memory),
            dirty_rate: PagesPerSec(measured.dirty_pages_per_sec),
            working_set: Pages(measured.working_set_pages).min(memory),
            network_out: BitsPerSec(measured.network_out_bits_per_sec),
            network_in: BitsPerSec(measured.network_in_bits_per_sec),
            disk: Bytes(measured.disk_bytes),
            disk_writes: BytesPerSec(measured.disk_write_bytes_per_sec),
            error: measured.dirty_rate_error,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_that_contradicts_itself_is_cut_to_what_is_possible() {
        let measured = VmMeasurement {
            vm: "web-1".to_owned(),
            memory_pages: 100,
            non_zero_pages: u64::MAX,
            working_set_pages: 101,
            ..VmMeasurement::default()
        };
        let vm = MeasuredVm::try_from(&measured).unwrap();
        assert_eq!((vm.non_zero, vm.working_set), (Pages(100), Pages(100)));
        let nameless = VmMeasurement { vm: "../x".to_owned(), ..measured };
        assert!(MeasuredVm::try_from(&nameless).is_err());
    }
}
