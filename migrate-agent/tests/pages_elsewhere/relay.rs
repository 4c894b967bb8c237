//! A link between two hosts that can be cut.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lifeboat_agent::tasks;
use tokio::task::AbortHandle;

/// Carries connections, and cuts them.
pub(crate) struct Relay {
    pub(crate) address: String,
    carried: Arc<Mutex<Vec<AbortHandle>>>,
    /// New connections are closed at once.
    is_cut: Arc<AtomicBool>,
    listening: AbortHandle,
}

impl Relay {
    pub(crate) async fn to(address: String) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = listener.local_addr().unwrap().to_string();
        let carried: Arc<Mutex<Vec<AbortHandle>>> = Arc::default();
        let is_cut = Arc::<AtomicBool>::default();
        let (all, refuses) = (Arc::clone(&carried), Arc::clone(&is_cut));
        let listening = tasks::spawn("relay", async move {
            while let Ok((mut near, _)) = listener.accept().await {
                if refuses.load(Ordering::SeqCst) {
                    continue;
                }
                let address = address.clone();
                let carrying = tasks::spawn("carried", async move {
                    let mut far = tokio::net::TcpStream::connect(address).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
                all.lock().unwrap().push(carrying.abort_handle());
            }
        });
        Self { address: own, carried, is_cut, listening: listening.abort_handle() }
    }

    /// Cuts all connections; new ones are taken.
    pub(crate) fn cut(&self) {
        self.carried.lock().unwrap().drain(..).for_each(|carrying| carrying.abort());
    }

    /// Cuts all connections, and none is made for so long.
    pub(crate) async fn cut_for(&self, time: Duration) {
        self.is_cut.store(true, Ordering::SeqCst);
        self.cut();
        tokio::time::sleep(time).await;
        self.is_cut.store(false, Ordering::SeqCst);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.listening.abort();
        self.cut();
    }
}
