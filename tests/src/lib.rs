//! The rig that the integration tests and the experiments drive the real components with, and the
//! experiments.
//!
//! ```text
//!   tests/*.rs, bin/lifeboat-experiment --> experiments/ --> rig/ (namespaces, switches, traffic,
//!                                                                  guests, agents)
//! ```
//!
//! This package may depend on every room, and no room depends on it. What needs no real component
//! is tested in its own room; the convention of experiments (samples, checks, record) is in
//! `lab/src/experiment`. The house rules are `tests/tests/tidy/`.

pub mod chance;
pub mod clock;
pub mod experiments;
pub mod rig;
pub mod world;
