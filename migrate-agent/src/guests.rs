//! What a migration needs of the guests on this host, and no more.
//!
//! `source.rs` and `destination.rs` speak to this trait; `vms/` implements it. It is a trait so
//! that the hand-over's drivers name the little they depend on, and nothing reaches around it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use futures_util::future::BoxFuture;
use lifeboat_protocol::agent::VmDefinition;
use lifeboat_protocol::ids::VmId;

use crate::qemu::qmp::Qmp;
use crate::qemu::ram::Ram;

/// Why something could not be done with a guest.
#[derive(Debug, thiserror::Error)]
#[error("VM `{vm}`: cannot {doing}")]
pub struct GuestError {
    /// The VM.
    pub vm: VmId,
    /// What was being done.
    pub doing: &'static str,
    /// Why not.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// How a destination's QEMU comes up. It stands paused in every case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// Waiting for a migration stream (`-incoming defer`).
    Stream,
    /// Freshly reset: a cold migration.
    Cold,
}

/// The guests on this host.
pub trait Guests: Send + Sync {
    /// The definition of a VM that this host knows.
    fn definition(&self, vm: &VmId) -> Option<VmDefinition>;

    /// A QMP connection to the VM's QEMU.
    fn qmp<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<Qmp, GuestError>>;

    /// Whether the VM has a QEMU process here.
    fn lives(&self, vm: &VmId) -> bool;

    /// Where to bind a socket of this name that the VM's QEMU may connect to.
    fn socket_path(&self, vm: &VmId, name: &str) -> Result<PathBuf, GuestError>;

    /// Lets the VM's QEMU use a socket that was bound at [`Guests::socket_path`].
    fn grant(&self, vm: &VmId, path: &std::path::Path) -> Result<(), GuestError>;

    /// Whether a VM could arrive as things are: nothing is set aside, nothing is started.
    fn could_arrive(&self, definition: &VmDefinition) -> Result<(), GuestError>;

    /// Counts the memory of an arriving VM as taken, checks that the definition can run here,
    /// keeps it for restarts, and starts the VM's QEMU, paused, with its taps attached. The disks in
    /// `mounts`, by number, are opened there: they are not all here.
    fn arrive<'a>(
        &'a self,
        definition: &'a VmDefinition,
        arrival: Arrival,
        mounts: &'a BTreeMap<usize, PathBuf>,
    ) -> BoxFuture<'a, Result<Qmp, GuestError>>;

    /// The memory of the VM's guest, to be read from outside.
    fn memory(&self, vm: &VmId) -> Result<Ram, GuestError>;

    /// Keeps a monitor of the VM's QEMU open that takes `migrate-recover` out of band, also when this agent
    /// has died.
    fn keep_monitor<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<(), GuestError>>;

    /// Has a QEMU whose main loop waits for a page listen for its stream at `uri`, by that monitor.
    fn recover_by_kept_monitor<'a>(
        &'a self,
        vm: &'a VmId,
        uri: &'a str,
    ) -> BoxFuture<'a, Result<(), GuestError>>;

    /// It has not to be kept any more.
    fn forget_monitor(&self, vm: &VmId);

    /// Whether its QEMU is in the agent's own mount namespace, and so certainly sees what is mounted there.
    fn shares_our_mounts(&self, vm: &VmId) -> bool;

    /// Every VM of which something is here that a migration can leave: a QEMU process, what one
    /// left behind when it went, or the definition that came with an arrival.
    fn present(&self) -> Vec<VmId>;

    /// Starts a VM that had been powered down for a cold migration which then failed.
    fn start_again<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<Qmp, GuestError>>;

    /// Ends the VM's QEMU (quit, then by pid), takes its taps and sockets away; with `forget`
    /// also the definition that came with it when it arrived (never a file of the operator's).
    /// Succeeds where nothing is left to end.
    fn end<'a>(&'a self, vm: &'a VmId, forget: bool) -> BoxFuture<'a, Result<(), GuestError>>;
}
