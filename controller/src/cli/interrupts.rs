//! Ctrl-C, from the moment at which a command has consequences.
//!
//! Left alone, Ctrl-C ends the command and nothing else: an evacuation whose beginning was asked for
//! would go on without the operator who wanted it stopped. So the commands that begin one listen
//! before they ask. The first Ctrl-C cancels, as soon as there is something to cancel; the second
//! one leaves it alone.

use std::future::Future;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::CliError;

/// Hears Ctrl-C from when it was made.
pub(super) struct Interrupts {
    signal: Signal,
    heard: u32,
}

impl Interrupts {
    /// Listens from now on; Ctrl-C no longer ends the program.
    pub(super) fn listen() -> Result<Self, CliError> {
        let signal = signal(SignalKind::interrupt()).map_err(CliError::Signals)?;
        Ok(Self { signal, heard: 0 })
    }

    /// The next Ctrl-C, and how many there were with it. Cancel-safe.
    pub(super) async fn next(&mut self) -> u32 {
        if self.signal.recv().await.is_none() {
            return std::future::pending().await;
        }
        self.heard += 1;
        self.heard
    }

    /// How many there were so far.
    pub(super) const fn heard(&self) -> u32 {
        self.heard
    }

    /// Awaits the beginning of something. One Ctrl-C is kept for when it has begun; `None` after a
    /// second one.
    pub(super) async fn through<T>(&mut self, beginning: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(beginning);
        loop {
            tokio::select! {
                begun = &mut beginning => return Some(begun),
                heard = self.next() => {
                    if heard > 1 {
                        return None;
                    }
                    eprintln!("it is cancelled as soon as it has begun; Ctrl-C again leaves it alone");
                }
            }
        }
    }
}
