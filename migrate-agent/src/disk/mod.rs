//! Disks of a migrating VM: seen, limited, copied, kept in step.
//!
//! `fuse/` is where a VM's reads and writes pass; `track` notes what they change; `sync/` brings an
//! image to another host while it is written; `process/` is the process in which both happen at the
//! source; `rooms` is where images arrive, and what becomes of those that have left; `store`
//! keeps those of VMs between two other hosts; `parameters` is what an operator may choose. Deliberately not
//! here: QMP (`qemu::swap` moves a running QEMU onto the mount and back), what lies beneath overlays
//! (`vms::bases`), and when a VM may be handed over (`handover/`).

pub mod fuse;
pub mod local;
pub mod parameters;
pub mod process;
pub mod rooms;
pub mod store;
pub mod sync;
pub mod track;
