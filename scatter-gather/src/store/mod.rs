//! Stores: Redis servers in which packs wait. Used by the agents of source and destination, which
//! put and get, and by an intermediary's agent, which runs the server.
//!
//! ```text
//!  settings (pure) --> server (a redis-server of one migration) <-- socket -- client (put, get)
//! ```
//!
//! One server holds one migration (docs/decisions/0012): its memory has a limit of its own, ends with
//! it, and is one thread of its own. It never drops a page by itself: no expiry, no eviction, nothing
//! on disk. When it is full it says so, and when it has been restarted, which is the same as having
//! lost everything, its run id says so.
//!
//! Sockets and their encryption are the caller's; a client takes any stream of bytes.

mod client;
mod error;
mod keys;
mod server;
mod settings;

pub use client::{Login, RedisStore, RunId, Usage};
pub use error::{ServerError, StoreError};
pub use keys::{Key, KeySpace};
pub use server::{Launch, StoreServer};
pub use settings::{Secret, Settings, TlsListen, User};
