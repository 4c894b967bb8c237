//! The one place of this room that starts tasks.

use std::future::Future;

use tokio::task::JoinHandle;

/// Starts a task. Dropping the handle leaves it running; abort it to end it.
#[expect(clippy::disallowed_methods, reason = "the one place that starts tasks")]
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::spawn(future)
}
