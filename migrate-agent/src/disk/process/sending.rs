//! The transfer of a mover: connects to the destination's agent, sends, and connects again when the
//! connection is lost, until it is told to stop or nothing helps any more.
//!
//! Used by `mover`. Two connections, each opened with the page link's HELLO, so that there is one
//! listener, one TLS and one token for all that an agent receives; after WELCOME they carry the disk
//! frames. Deliberately not here: what is sent when (`sync::send`).

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use lifeboat_protocol::units::BytesPerSec;
use lifeboat_scatter_gather::link::frame::TOKEN_BYTES;
use lifeboat_scatter_gather::link::{Frame, Hello, Purpose};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};

use super::control::{Destination, Stage};
use crate::disk::sync::phases::{Phase, Veto};
use crate::disk::sync::send::{Command, Outgoing, Progress};
use crate::link::LinkError;
use crate::link::io::frame_name;
use crate::tls::TlsIdentity;

/// From a lost connection to the next attempt: first, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// The destination says WELCOME within this time.
const WELCOME_LIMIT: Duration = Duration::from_secs(5);

/// What the mover sees of a transfer.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) progress: watch::Receiver<Progress>,
    pub(super) failed: watch::Receiver<Option<String>>,
    pub(super) counts: Arc<Counts>,
}

impl Seen {
    pub(super) fn stage(&self) -> Stage {
        self.progress.borrow().phase.into()
    }
}

/// Bytes that were given to connections so far.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// Guests' writes, and control.
    pub(super) control: AtomicU64,
    /// Blocks.
    pub(super) blocks: AtomicU64,
}

/// A transfer's ends for whoever runs it.
pub(super) struct Transfer {
    pub(super) outgoing: Outgoing,
    pub(super) to: Destination,
    pub(super) identity: Option<TlsIdentity>,
    pub(super) rate: watch::Receiver<Option<BytesPerSec>>,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) progress: watch::Sender<Progress>,
    pub(super) failed: watch::Sender<Option<String>>,
    pub(super) counts: Arc<Counts>,
}

impl Transfer {
    /// Runs until nothing helps any more. Whoever ends it earlier drops the future; the guest is
    /// answered then by the mirror's `disarm` and `give_up`, which are the caller's.
    pub(super) async fn run(mut self) {
        let mut pause = PAUSE.0;
        loop {
            let reason = match self.attempt().await {
                // Whoever has all of it has the agents end this. One that asks again was killed.
                Ok(()) => {
                    self.outgoing.rest_again();
                    self.wait(PAUSE.1).await;
                    continue;
                }
                Err(Attempt::Again { reason, connected }) => {
                    if connected {
                        pause = PAUSE.0;
                    }
                    reason
                }
                // Its VM runs there: whoever refuses now has just been started again.
                Err(Attempt::Never(reason)) if self.outgoing.phase() >= Phase::Sealed => reason,
                Err(Attempt::Never(reason)) => {
                    tracing::error!(reason, "the disks do not go on");
                    self.failed.send_replace(Some(reason));
                    return self.answer_until_stopped().await;
                }
            };
            tracing::warn!(reason, "the disks' connection is lost; connecting again");
            self.wait(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    async fn attempt(&mut self) -> Result<(), Attempt> {
        let control = self.connect().await?;
        let bulk = self.connect().await?;
        let control = (control.0, Counted { to: control.1, counter: counter(&self.counts, false) });
        let bulk = (bulk.0, Counted { to: bulk.1, counter: counter(&self.counts, true) });
        let rate = self.rate.clone();
        let run = self.outgoing.run(control, bulk, rate, &mut self.commands, &self.progress).await;
        run.map_err(|error| match error.may_retry() {
            true => Attempt::Again { reason: chain(&error), connected: true },
            false => Attempt::Never(chain(&error)),
        })
    }

    async fn connect(&self) -> Result<(impl AsyncRead + use<>, impl AsyncWrite + use<>), Attempt> {
        let lost = |error: LinkError| Attempt::Again { reason: chain(&error), connected: false };
        let to = &self.to;
        let token = <[u8; TOKEN_BYTES]>::try_from(to.token.as_slice())
            .map_err(|_| Attempt::Never("the destination's token has another length".to_owned()))?;
        let link = crate::link::connect(&to.page_address, &to.host, self.identity.as_ref());
        let (mut reader, mut writer) = link.await.map_err(lost)?;
        let hello = Hello {
            purpose: Purpose::Disk,
            migration: to.migration.clone(),
            vm: to.vm.clone(),
            host: to.own_host.clone(),
            generation: to.generation,
            token,
        };
        writer.send(&Frame::Hello(hello)).await.map_err(lost)?;
        match reader.next_within(WELCOME_LIMIT).await.map_err(lost)? {
            Frame::Welcome => Ok((reader.into_stream(), writer.into_stream())),
            Frame::Refused(reason) => Err(Attempt::Never(reason)),
            other => {
                let got = frame_name(&other);
                Err(lost(LinkError::Unexpected { got, wanted: "WELCOME" }))
            }
        }
    }

    /// Between two connections nothing can be sealed; what was sealed can be opened again.
    async fn wait(&mut self, pause: Duration) {
        let pause = tokio::time::sleep(pause);
        tokio::pin!(pause);
        loop {
            tokio::select! {
                () = &mut pause => return,
                Some(command) = self.commands.recv() => self.obey_alone(command, Veto::Lost),
            }
        }
    }

    fn show_phase(&self) {
        let phase = self.outgoing.phase();
        self.progress.send_modify(|progress| progress.phase = phase);
    }

    async fn answer_until_stopped(&mut self) {
        while let Some(command) = self.commands.recv().await {
            self.obey_alone(command, Veto::NotInStep);
        }
    }

    fn obey_alone(&mut self, command: Command, veto: Veto) {
        match command {
            // Who asked may have gone.
            Command::Seal(answer) => drop(answer.send(Err(veto))),
            Command::Unseal => self.outgoing.unseal(),
            Command::Cede => {
                self.outgoing.cede();
                self.show_phase();
            }
            // Asked for again once there is a connection.
            Command::EndMonitoring | Command::GoInStep => {}
        }
    }
}

enum Attempt {
    Again { reason: String, connected: bool },
    Never(String),
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn counter(counts: &Arc<Counts>, blocks: bool) -> impl Fn(u64) + Send + Unpin + use<> {
    let counts = Arc::clone(counts);
    move |bytes| {
        let counter = if blocks { &counts.blocks } else { &counts.control };
        counter.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A stream whose bytes are counted.
struct Counted<W, F> {
    to: W,
    counter: F,
}

impl<W: AsyncWrite + Unpin, F: Fn(u64) + Unpin> AsyncWrite for Counted<W, F> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.to).poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = &written {
            (self.counter)(*count as u64);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.to).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.to).poll_shutdown(context)
    }
}
