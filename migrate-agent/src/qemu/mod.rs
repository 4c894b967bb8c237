//! All that knows QEMU: its control protocol, its command line, its process and its memory.
//!
//! Used by `source.rs`, `destination.rs`, `vms/` and `measure/`. It knows neither migrations nor
//! ownership; whether a VM *may* start is decided elsewhere before anything here is called.

pub mod foreign;
pub mod launch;
pub mod process;
pub mod procfs;
pub mod qcow2;
pub mod qmp;
pub mod ram;
pub mod rescue;
pub mod run_dir;
pub mod stream;
pub mod swap;
pub mod tap;
