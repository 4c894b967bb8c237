//! The one place of this crate that starts tasks: one for each connection and each listener.
//!
//! A task ends when its handles are dropped or its stream ends; nothing else holds it.

use std::future::Future;

use tokio::task::JoinHandle;

#[expect(clippy::disallowed_methods, reason = "tasks of connections, started nowhere else")]
pub(crate) fn start(task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(task)
}

/// A task that ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Owned(JoinHandle<()>);

impl Owned {
    pub(crate) fn start(task: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(start(task))
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.abort();
    }
}
