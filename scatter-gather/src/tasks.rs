//! The one place in this room that starts tasks. Used by the store's client, whose connection has
//! to be read while nobody asks.

use std::future::Future;

/// Starts a task on the runtime; it ends when what it serves is dropped.
#[expect(clippy::disallowed_methods, reason = "the one place that starts tasks")]
pub(crate) fn spawn<F>(work: F)
where
    F: Future<Output = ()> + Send + 'static,
{
    drop(tokio::spawn(work));
}
