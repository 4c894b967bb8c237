//! The answers of QMP commands as types: only the fields that we use.
//!
//! Fields and enum values that other versions of QEMU add are passed over, never an error;
//! what a version lacks has a default. Field meanings: qapi/*.json in QEMU's sources.

use std::fmt;

use serde::Deserialize;

/// QEMU's version.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct VersionInfo {
    /// The numbers.
    pub qemu: VersionNumbers,
    /// The distribution's package, empty when built by hand.
    pub package: String,
}

/// The numbers of a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Deserialize)]
#[serde(default)]
pub struct VersionNumbers {
    /// 7 of 7.2.22.
    pub major: u32,
    /// 2 of 7.2.22.
    pub minor: u32,
    /// 22 of 7.2.22.
    pub micro: u32,
}

impl fmt::Display for VersionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.qemu.major, self.qemu.minor, self.qemu.micro)
    }
}

/// Whether the guest runs, and if not why (`query-status`).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct StatusInfo {
    /// The virtual CPUs run.
    pub running: bool,
    /// More exactly.
    pub status: RunState,
}

/// QEMU's run state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// The guest runs.
    Running,
    /// Stopped by `stop`.
    Paused,
    /// Started with `-S`, never run.
    Prelaunch,
    /// Waits for an incoming migration.
    Inmigrate,
    /// Stopped at the switchover of an outgoing migration.
    FinishMigrate,
    /// An outgoing migration is complete.
    Postmigrate,
    /// A disk error stopped it.
    IoError,
    /// The guest powered down (`-no-shutdown`).
    Shutdown,
    /// The guest crashed (panic device).
    GuestPanicked,
    /// QEMU's own error stopped it.
    InternalError,
    /// The watchdog stopped it.
    Watchdog,
    /// The guest sleeps.
    Suspended,
    /// Being restored from a snapshot.
    RestoreVm,
    /// Being saved to a snapshot.
    SaveVm,
    /// Stopped by a debugger.
    Debug,
    /// A state that we have no name for.
    #[serde(other)]
    Unknown,
}

/// How far a migration is (`query-migrate`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// None was ever begun.
    #[default]
    None,
    /// Being set up.
    Setup,
    /// Being cancelled.
    Cancelling,
    /// Cancelled: the guest runs on at the source.
    Cancelled,
    /// Iterating.
    Active,
    /// Stopped before the switchover, waiting for `migrate-continue`.
    PreSwitchover,
    /// Sending the device state.
    Device,
    /// Post-copy runs.
    PostcopyActive,
    /// Post-copy has lost its connection.
    PostcopyPaused,
    /// Post-copy is being resumed.
    PostcopyRecover,
    /// Done.
    Completed,
    /// Failed: see `error_desc`.
    Failed,
    /// Waits for a device to be unplugged.
    WaitUnplug,
    /// A state that we have no name for.
    #[serde(other)]
    Unknown,
}

/// `query-migrate`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct MigrateInfo {
    /// How far it is.
    pub status: MigrationStatus,
    /// Memory; `None` before it has begun.
    pub ram: Option<RamInfo>,
    /// Since its beginning, in milliseconds.
    pub total_time: u64,
    /// QEMU's forecast of the downtime, in milliseconds.
    pub expected_downtime: u64,
    /// The downtime once completed, in milliseconds, as the source sees it.
    pub downtime: u64,
    /// By how much the guest's CPUs are slowed down for it, in percent.
    pub cpu_throttle_percentage: u32,
    /// Why it failed.
    pub error_desc: Option<String>,
}

/// The memory part of `query-migrate`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct RamInfo {
    /// Bytes sent so far.
    pub transferred: u64,
    /// Bytes still to send, as of the last look at the dirty bitmap.
    pub remaining: u64,
    /// Bytes of all RAM blocks.
    pub total: u64,
    /// Pages that were a single byte repeated.
    pub duplicate: u64,
    /// Pages sent as they are.
    pub normal: u64,
    /// The same in bytes.
    pub normal_bytes: u64,
    /// Pages/s dirtied between the last two looks.
    pub dirty_pages_rate: u64,
    /// Times that the dirty bitmap was read: the iteration.
    pub dirty_sync_count: u64,
    /// Rate in Mbit/s.
    pub mbps: f64,
    /// Bytes of a page.
    pub page_size: u64,
}

/// What `migrate-set-parameters` shall change; `None` stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MigrateParameters {
    /// The longest stop that QEMU may aim for, in milliseconds. 1 holds the switchover off
    /// (0 does not: it lets it through at once).
    pub downtime_limit_ms: Option<u64>,
    /// Bytes/s; 0 is no limit.
    pub max_bandwidth_bytes: Option<u64>,
}

/// How a guest is slowed down that dirties its memory faster than it is sent (capability `auto-converge`).
/// QEMU looks at each iteration of a second or more; percentages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slowing {
    /// It is slowed where it dirties more than this part of what was sent, twice.
    pub threshold: u32,
    /// By how much of its CPUs' time at first.
    pub first: u32,
    /// And by how much more each time that was not enough.
    pub more: u32,
    /// At most.
    pub most: u32,
}

/// A virtual CPU (`query-cpus-fast`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuThread {
    /// Its index.
    pub cpu_index: u32,
    /// The thread of this host that runs it.
    pub thread_id: u32,
}

/// Counters of one disk since QEMU began (`query-blockstats`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlockStats {
    /// The device's path or its drive's name.
    pub device: String,
    /// Bytes read by the guest.
    pub read_bytes: u64,
    /// Bytes written by the guest.
    pub written_bytes: u64,
}

/// A machine type (`query-machines`).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineType {
    /// With its version: `pc-i440fx-7.2`.
    pub name: String,
    /// A shorter name for it: `pc`.
    #[serde(default)]
    pub alias: Option<String>,
}

/// A CPU model (`query-cpu-definitions`).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuModel {
    /// Its name.
    pub name: String,
    /// Why it cannot run here; absent when QEMU cannot tell, empty when nothing is in the way.
    #[serde(default)]
    pub unavailable_features: Option<Vec<String>>,
}
