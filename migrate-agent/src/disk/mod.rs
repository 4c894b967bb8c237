//! Disks of a migrating VM: seen, limited, copied, kept in step.
//!
//! `fuse/` is where a VM's reads and writes pass. Deliberately not here: QMP (`qemu::swap` moves a
//! running QEMU onto the mount and back) and when a VM may be handed over (`handover/`).

pub mod fuse;
