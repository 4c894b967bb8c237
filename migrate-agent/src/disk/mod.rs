//! Disks of a migrating VM: seen, limited, copied, kept in step.
//!
//! `fuse/` is where a VM's reads and writes pass; `track` notes what they change; `sync/` brings an
//! image to another host while it is written. Deliberately not here: QMP (`qemu::swap` moves a
//! running QEMU onto the mount and back) and when a VM may be handed over (`handover/`).

pub mod fuse;
pub mod sync;
pub mod track;
