//! The one place in the agent that starts tasks.
//!
//! A task that is started here lives as long as what it serves: each has an owner whose end
//! ends it (a channel that closes, a connection that breaks, or the returned handle).

use std::future::Future;

use tokio::task::JoinHandle;

/// Starts a task on the runtime. The caller says in `name` what it is; it appears in logs.
#[expect(clippy::disallowed_methods, reason = "the one place that starts tasks")]
pub fn spawn<F>(name: &'static str, work: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tracing::trace!(task = name, "started");
    tokio::spawn(work)
}
