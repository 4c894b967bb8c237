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

/// Runs work that blocks (a disk's fsync) off the runtime's own threads. A panic in it goes on
/// in the caller.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is being shut down: nothing may be answered any more.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Runs blocking work on a thread of its own, which ends with it: for work that changes its
/// thread's priority. A panic in it goes on in the caller.
pub async fn thread<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (done, result) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Whoever asked may have hung up.
        let _ = done.send(work());
    });
    match (result.await, thread) {
        (Ok(result), _) => result,
        (Err(_), Ok(thread)) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("a thread that ends without panic has sent its result"),
        },
        (Err(_), Err(error)) => panic!("this machine has no threads left: {error}"),
    }
}
