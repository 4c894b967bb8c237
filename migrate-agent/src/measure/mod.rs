//! Measures one VM over a window: memory, CPU, network, disks. The guest is not disturbed.
//!
//! Used by the gRPC server. Everything is looked at from outside QEMU: its memory through `/proc`
//! (`memory`), its CPU time, its taps' counters; only the disks' counters come over QMP. QEMU's own
//! `calc-dirty-rate` is not used: two of its modes kill a QEMU that emulates, and its sampling
//! scatters more than a migration plan can bear. Estimates are in `estimate`, pure. What the
//! figures mean for an order is the policy's.

mod estimate;
mod memory;

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use lifeboat_protocol::agent::VmMeasurement;
use lifeboat_protocol::ids::VmId;
use xxhash_rust::xxh3::xxh3_64;

use crate::guests::Guests;
use crate::qemu::launch;
use crate::qemu::procfs::{self, TICKS_PER_SECOND};
use crate::qemu::ram::{Ram, RamError};
use crate::tasks;
use crate::vms::definition::{Definition, Disk};
use crate::vms::{Settings, VmError, Vms, pinned, taps};

/// The window where none is asked for.
const WINDOW_DEFAULT: Duration = Duration::from_secs(2);
const WINDOW_MS: std::ops::RangeInclusive<u32> = 200..=60_000;

/// Why a VM could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// It does not run here.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Its memory cannot be read.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Too short to see anything, or too long to wait for.
    #[error("a window of {given} ms cannot be measured: 200 to 60000 ms")]
    Window {
        /// As asked.
        given: u32,
    },
    /// Its QEMU ended meanwhile.
    #[error("the QEMU of VM `{vm}` ended while it was measured")]
    Gone {
        /// The VM.
        vm: VmId,
    },
}

/// Counters that only grow.
#[derive(Debug, Clone, Copy, Default)]
struct Counters {
    cpu_ticks: u64,
    network_out: u64,
    network_in: u64,
    disk_read: u64,
    disk_written: u64,
}

/// Measures `vm` over `window_ms` (0: 2 s).
///
/// # Errors
/// When it does not run here, or ends meanwhile, or the window is not sensible.
pub async fn measure(vms: &Vms, vm: &VmId, window_ms: u32) -> Result<VmMeasurement, MeasureError> {
    let window = match window_ms {
        0 => WINDOW_DEFAULT,
        ms if WINDOW_MS.contains(&ms) => Duration::from_millis(ms.into()),
        given => return Err(MeasureError::Window { given }),
    };
    let (pid, definition) = vms.process(vm)?;
    let size = launch::ram_under(vms.settings().accelerator, definition.memory);
    let (ram, behind) = Ram::find_any(pid, size)?;
    let pages = ram.pages();
    // The same pages each time: two measurements of one VM differ by what it did, not by chance.
    let seed = xxh3_64(vm.as_str().as_bytes());
    let tap_names = taps::names(&definition);
    let before = counters(vms, vm, pid, &tap_names).await?;
    let begun = crate::clock::now();
    let seen = tasks::thread("measure", move || memory::look(&ram, window, seed)).await?;
    let after = counters(vms, vm, pid, &tap_names).await?;
    let span = begun.elapsed().as_secs_f64();
    let dirty = estimate::dirty_rate(seen.changes, pages, seen.window.as_secs_f64());
    let per_sec =
        |count: fn(&Counters) -> u64| estimate::per_sec(count(&before), count(&after), span);
    let cpu_ticks = after.cpu_ticks.saturating_sub(before.cpu_ticks);
    Ok(VmMeasurement {
        vm: vm.to_string(),
        memory_pages: pages,
        non_zero_pages: seen.non_zero_pages,
        dirty_pages_per_sec: dirty.pages_per_sec.round() as u64,
        working_set_pages: estimate::working_set(seen.changes, pages),
        dirty_rate_error: dirty.error,
        cpu_cores: cpu_ticks as f64 / TICKS_PER_SECOND as f64 / span,
        network_out_bits_per_sec: per_sec(|c| c.network_out).saturating_mul(8),
        network_in_bits_per_sec: per_sec(|c| c.network_in).saturating_mul(8),
        disk_write_bytes_per_sec: per_sec(|c| c.disk_written),
        disk_read_bytes_per_sec: per_sec(|c| c.disk_read),
        window_ms: u32::try_from(seen.window.as_millis()).unwrap_or(u32::MAX),
        sampled_pages: seen.changes.sampled,
        disk_bytes: local_disk_bytes(vms.settings(), &definition),
        post_copy_obstacle: pinned::asked(vms, vm, behind).await.unwrap_or_default(),
    })
}

/// What the files of its local disks take: holes are not moved.
fn local_disk_bytes(settings: &Settings, definition: &Definition) -> u64 {
    let local = definition.disks.iter().filter(|disk| disk.shared_storage.is_none());
    let taken = |disk: &Disk| {
        std::fs::metadata(settings.image_of(disk)).map_or(0, |data| data.blocks() * 512)
    };
    local.map(taken).sum()
}

async fn counters(
    vms: &Vms,
    vm: &VmId,
    pid: u32,
    tap_names: &[String],
) -> Result<Counters, MeasureError> {
    let stat = procfs::stat(pid).ok_or_else(|| MeasureError::Gone { vm: vm.clone() })?;
    let mut counters = Counters { cpu_ticks: stat.cpu_ticks, ..Counters::default() };
    for tap in tap_names {
        let Some(carried) = taps::counters(tap) else { continue };
        counters.network_out += carried.from_vm;
        counters.network_in += carried.to_vm;
    }
    // A monitor that is silent costs the disk figures, not the measurement.
    let disks = match vms.qmp(vm).await {
        Ok(qmp) => qmp.query_blockstats().await.unwrap_or_default(),
        Err(error) => {
            tracing::warn!(%vm, %error, "measured without its disks");
            vec![]
        }
    };
    for disk in disks {
        counters.disk_read += disk.read_bytes;
        counters.disk_written += disk.written_bytes;
    }
    Ok(counters)
}
