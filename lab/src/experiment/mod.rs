//! One convention for every experiment: raw samples, checks with their bounds, one record.
//!
//! Used by `lifeboat-experiment` (in the package `tests`, which may drive the real components;
//! `lab/experiment` starts it). Everything here is pure: measuring is the experiments' business.

mod check;
mod record;
pub mod statistics;

pub use check::{Bound, Check};
pub use record::{Machine, Record, Sample};
