//! The scenario of a lab cloud (what a TOML file says, checked, and what follows from it), and the
//! convention of experiments on it.
//!
//! Used by the binary `lifeboat-lab`, which prints a checked scenario as JSON: `lab/up` (Python,
//! Mininet) and the experiments read that, so there is one parser and one set of rules; and by
//! `lifeboat-experiment`.
//! Deliberately not here: raising anything. No I/O but reading the file the caller names.

pub mod experiment;
pub mod proportions;
pub mod scenario;

pub use scenario::{Scenario, ScenarioError, parse};
