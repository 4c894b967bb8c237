//! What has happened to an image: which blocks are dirty, and how busy each segment is.
//!
//! `sync/` marks and takes; the request threads mark too, so everything is atomic and nothing waits.
//! Deliberately not here: versions (an update's number is `sync`'s), and what is done about it.

mod activity;
mod block_set;
mod dirty;

pub use activity::{Activity, SEGMENT, SegmentSize, Traffic};
pub use block_set::BlockSet;
pub use dirty::{BLOCK, BlockSize, DirtyMap, GeometryError};
