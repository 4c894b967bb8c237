//! The VMs of this host.
pub mod definition;
pub mod files;
mod wire;
