//! The agent's connections to a disk process: its questions are answered one after the other, until
//! it is told to finish.
//!
//! `mover` and `arrival` are what answers. Deliberately not here: the words (`control`).

use std::path::Path;
use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use super::control::{self, ControlError, Reply, Request};
use crate::tasks;

/// Whoever answers.
pub(super) trait Answers: Send + Sync + 'static {
    /// Does what is asked for, or says why not.
    fn answer(&self, request: Request) -> impl Future<Output = Result<Reply, String>> + Send;
}

/// Listens at `path`, where a process before us may have listened.
pub(super) fn listen(path: &Path) -> std::io::Result<UnixListener> {
    let _ = std::fs::remove_file(path);
    UnixListener::bind(path)
}

/// Answers on `listener` until it was told to finish.
pub(super) async fn answer_on<A: Answers>(
    own: Arc<A>,
    listener: UnixListener,
) -> std::io::Result<()> {
    let finished = watch::Sender::new(false);
    let mut over = finished.subscribe();
    loop {
        tokio::select! {
            connection = listener.accept() => {
                let (socket, _) = connection?;
                let (own, finished) = (Arc::clone(&own), finished.clone());
                tasks::spawn("control", async move {
                    if let Err(error) = answer_all(&*own, socket, &finished).await {
                        tracing::warn!(%error, "a control connection ends");
                    }
                });
            }
            _ = over.wait_for(|finished| *finished) => return Ok(()),
        }
    }
}

async fn answer_all<A: Answers>(
    own: &A,
    mut socket: UnixStream,
    finished: &watch::Sender<bool>,
) -> Result<(), ControlError> {
    let (mut buffer, mut out) = (BytesMut::new(), BytesMut::new());
    loop {
        while let Some(request) = control::decode::<Request>(&mut buffer)? {
            let ends = request == Request::Finish;
            tracing::debug!(?request, "asked");
            let reply = match own.answer(request).await {
                Ok(reply) => reply,
                Err(refused) => Reply::Refused(refused),
            };
            let ended = ends && reply == Reply::Done;
            out.clear();
            control::encode(&reply, &mut out)?;
            // Whoever asked may have gone: then so has the connection.
            let written = socket.write_all(&out).await;
            if ended {
                finished.send_replace(true);
            }
            if written.is_err() {
                return Ok(());
            }
        }
        match socket.read_buf(&mut buffer).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => return Ok(()),
        }
    }
}
