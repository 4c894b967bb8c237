//! The socket of a QMP connection: one task that reads and writes until either side ends.
//!
//! Started by `Qmp::over`. It ends when QEMU closes the socket, sends what is not QMP, or when
//! the last handle is dropped; then everybody who waits for an answer or an event learns it.

use std::sync::{Arc, PoisonError};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

use super::Shared;
use super::codec::Decoder;
use super::session::Incoming;
use super::types::VersionInfo;
use crate::tasks;

const READ_BYTES: usize = 16 << 10;

/// Starts the task. `greeted` is told QEMU's version when it introduces itself.
pub(super) fn start(
    socket: UnixStream,
    to_write: mpsc::Receiver<Vec<u8>>,
    greeted: oneshot::Sender<VersionInfo>,
    shared: Arc<Shared>,
) {
    tasks::spawn("qmp connection", async move {
        let (reading, writing) = socket.into_split();
        // Reading must go on while a write waits: a QEMU that does not read us may still
        // have events to tell.
        tokio::select! {
            () = read(reading, greeted, &shared) => (),
            () = write(writing, to_write) => (),
        }
        shared.session.lock().unwrap_or_else(PoisonError::into_inner).close();
        *shared.events.lock().unwrap_or_else(PoisonError::into_inner) = None;
    });
}

async fn write(mut socket: OwnedWriteHalf, mut to_write: mpsc::Receiver<Vec<u8>>) {
    while let Some(line) = to_write.recv().await {
        if let Err(error) = socket.write_all(&line).await {
            tracing::debug!(%error, "QMP connection lost while writing");
            return;
        }
    }
}

async fn read(mut socket: OwnedReadHalf, greeted: oneshot::Sender<VersionInfo>, shared: &Shared) {
    let mut greeted = Some(greeted);
    let mut decoder = Decoder::default();
    let mut bytes = vec![0; READ_BYTES];
    loop {
        match socket.read(&mut bytes).await {
            Ok(0) => return,
            Ok(length) => decoder.push(&bytes[..length]),
            Err(error) => {
                tracing::debug!(%error, "QMP connection lost while reading");
                return;
            }
        }
        loop {
            match decoder.next() {
                Ok(Some(message)) => deliver(message, &mut greeted, shared),
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "QEMU sent what is not QMP; connection given up");
                    return;
                }
            }
        }
    }
}

fn deliver(message: Value, greeted: &mut Option<oneshot::Sender<VersionInfo>>, shared: &Shared) {
    let incoming = shared.session.lock().unwrap_or_else(PoisonError::into_inner).receive(message);
    // A send fails when the other end was given up in the meantime: then nobody misses it.
    match incoming {
        Incoming::Greeting(version) => {
            if let Some(greeted) = greeted.take() {
                let _ = greeted.send(version);
            }
        }
        Incoming::Answer(waiter, answer) => {
            let _ = waiter.send(answer);
        }
        Incoming::Event(event) => {
            tracing::trace!(name = %event.name, data = %event.data, "QMP event");
            let events = shared.events.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(events) = events.as_ref() {
                let _ = events.send(event);
            }
        }
        Incoming::Ignored => tracing::trace!("QMP message that nobody waits for"),
    }
}
