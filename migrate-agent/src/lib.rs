//! Runs on each host and takes its VMs through migration, phase by phase.
//!
//! The binary `lifeboat-agent` and the integration tests use this library; nothing else does.
//!
//! ```text
//!   server/ (gRPC) --> vms/ (definitions, start, stop) --> qemu/ (QMP, processes, memory)
//!        |          --> measure/   host.rs   switch/
//!        '--> Migrations --> source.rs, destination.rs --> handover/ (pure), link/
//! ```
//!
//! Sibling modules do not import each other sideways; what must know several is `vms/`,
//! `source.rs` or `destination.rs`. OVSDB, OpenFlow and every choice between VMs, hosts or
//! ways are the controller's.

pub mod clock;
pub mod config;
pub mod destination;
pub mod disk;
pub mod guests;
pub mod handover;
pub mod host;
pub mod intermediary;
pub mod laps;
pub mod link;
pub mod marks;
pub mod measure;
pub mod postcopy;
pub mod programs;
pub mod progress;
pub mod qemu;
pub mod registry;
pub mod run;
pub mod server;
pub mod source;
pub mod stores;
pub mod switch;
pub mod tasks;
pub mod tls;
pub mod toml_file;
pub mod vms;
