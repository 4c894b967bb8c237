//! Decides who leaves, where to, which way, how fast, in what order, and sees it done.
//!
//! The binary `lifeboat` (`main.rs`) is the daemon and the operator's commands; both are thin over
//! this library. Deliberately not here: anything that touches a guest (the agents do), and any
//! policy (`policy/` decides, this room acts).

pub mod agents;
pub mod audit;
pub mod bases;
pub mod chance;
pub mod cli;
pub mod clock;
pub mod config;
pub mod daemon;
pub mod driver;
pub mod evacuation;
pub mod grpc;
pub mod inventory;
pub mod journal;
pub mod metrics;
pub mod network;
pub mod planner;
pub mod report;
pub mod reroute;
pub mod reservations;
pub mod service;
pub mod tasks;
pub mod tls;
