//! A client of QMP, QEMU's control protocol (docs/interop/qmp-spec in QEMU's sources).
//!
//! [`Qmp`] is a handle on one connection; clone it freely. The bytes are in `codec`, the meaning
//! of the messages in `session` (both pure), the socket in `io`, the commands that we use with
//! their types in `commands`. Nothing is retried here: a command that may have been taken is the
//! caller's to judge. Why not the crate `qapi`: docs/decisions/0003-qmp-client.md.
//!
//! Every command has a deadline, because QMP can fall silent for ever: it is served by QEMU's
//! main loop, and a `stop` that waits for a disk which does not answer never returns. A command
//! whose deadline has passed may still be carried out later.

mod cancel;
mod codec;
mod commands;
mod io;
mod session;
mod types;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};

pub use codec::MESSAGE_BYTES_MAX;
pub use session::{QmpEvent, Refusal};
pub use types::{
    BlockStats, CpuModel, CpuThread, MachineType, MigrateInfo, MigrateParameters, MigrationStatus,
    RamInfo, RunState, Slowing, StatusInfo, VersionInfo,
};

use session::Session;

/// How long an ordinary command may take. Main loops of busy guests under emulation have been
/// seen to answer after hundreds of milliseconds; seconds mean that QEMU is stuck.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// Events that a slow reader may lag behind before it loses the oldest.
const EVENTS_KEPT: usize = 256;

/// Commands that may wait for the socket at once.
const COMMANDS_QUEUED: usize = 32;

/// Why a QMP command gave no result.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket cannot be reached: QEMU has gone, or was never there.
    #[error("cannot connect to the QMP socket {path}")]
    Connect {
        /// The socket.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Connected, but QEMU did not introduce itself.
    #[error(
        "no QMP greeting from {path} within {waited:?}: another client holds this monitor, or QEMU hangs"
    )]
    NoGreeting {
        /// The socket.
        path: String,
        /// How long we waited.
        waited: Duration,
    },
    /// No answer in time. The command may still take effect.
    #[error(
        "QEMU did not answer `{command}` within {waited:?}; it may still carry it out: look at the VM before you repeat it"
    )]
    Deadline {
        /// The command.
        command: String,
        /// How long we waited.
        waited: Duration,
    },
    /// The connection ended before the answer: QEMU has exited, or closed its monitor.
    #[error("the connection to QEMU ended before `{command}` was answered")]
    Disconnected {
        /// The command.
        command: String,
    },
    /// QEMU refused.
    #[error("QEMU refused `{command}`: {refusal}")]
    Refused {
        /// The command.
        command: String,
        /// Its words.
        refusal: Refusal,
    },
    /// QEMU answered with something that we cannot read.
    #[error("QEMU's answer to `{command}` is not what its schema promises")]
    Unexpected {
        /// The command.
        command: String,
        /// Where reading it failed.
        #[source]
        source: serde_json::Error,
    },
}

impl QmpError {
    /// Whether the VM behind this connection can be assumed to have heard nothing of the command.
    #[must_use]
    pub const fn had_no_effect(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::NoGreeting { .. } | Self::Refused { .. })
    }
}

/// One connection to a QEMU; a handle that can be cloned. The connection ends with the last one.
#[derive(Clone)]
pub struct Qmp {
    outgoing: mpsc::Sender<Vec<u8>>,
    shared: Arc<Shared>,
    greeting: Arc<VersionInfo>,
}

/// What the handles and the connection's task hold together.
struct Shared {
    session: Mutex<Session<oneshot::Sender<Result<Value, Refusal>>>>,
    /// `None` once the connection has ended, so that readers of events see the end.
    events: Mutex<Option<broadcast::Sender<QmpEvent>>>,
}

impl Qmp {
    /// Connects to the monitor socket at `path` and negotiates.
    ///
    /// # Errors
    /// When nobody listens, when there is no greeting within [`DEADLINE`], or when the
    /// negotiation is refused.
    pub async fn connect(path: &Path) -> Result<Self, QmpError> {
        let shown = || path.display().to_string();
        let connect_error = |source| QmpError::Connect { path: shown(), source };
        let socket = UnixStream::connect(path).await.map_err(connect_error)?;
        Self::over(socket, &shown()).await
    }

    /// As [`Self::connect`], over a socket that is already there; `name` is for error texts.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn over(socket: UnixStream, name: &str) -> Result<Self, QmpError> {
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let shared = Arc::new(Shared {
            session: Mutex::new(Session::default()),
            events: Mutex::new(Some(events)),
        });
        let (outgoing, to_write) = mpsc::channel(COMMANDS_QUEUED);
        let (greeted, greeting) = oneshot::channel();
        io::start(socket, to_write, greeted, Arc::clone(&shared));
        let no_greeting = || QmpError::NoGreeting { path: name.to_owned(), waited: DEADLINE };
        let greeting = match tokio::time::timeout(DEADLINE, greeting).await {
            Ok(Ok(greeting)) => greeting,
            Ok(Err(_)) => return Err(QmpError::Disconnected { command: "greeting".to_owned() }),
            Err(_) => return Err(no_greeting()),
        };
        let qmp = Self { outgoing, shared, greeting: Arc::new(greeting) };
        qmp.execute("qmp_capabilities", Value::Null, DEADLINE).await?;
        Ok(qmp)
    }

    /// Executes a command and waits for its answer. `arguments` is an object, or null for none.
    ///
    /// # Errors
    /// When QEMU refuses, does not answer within `deadline`, or goes away.
    pub async fn execute(
        &self,
        command: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        let (reply, answer) = oneshot::channel();
        let gone = || QmpError::Disconnected { command: command.to_owned() };
        let (id, line) = {
            let mut session = self.session();
            session.request(command, &arguments, reply).ok_or_else(gone)?
        };
        let exchange = async {
            self.outgoing.send(line).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())
        };
        let Ok(outcome) = tokio::time::timeout(deadline, exchange).await else {
            self.session().forget(id);
            return Err(QmpError::Deadline { command: command.to_owned(), waited: deadline });
        };
        let refused = |refusal| QmpError::Refused { command: command.to_owned(), refusal };
        outcome?.map_err(refused)
    }

    /// Events from now on. The receiver closes when the connection ends.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<QmpEvent> {
        let events = self.shared.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Of a connection that has ended: a receiver whose sender is gone is closed at once.
        events.as_ref().map_or_else(|| broadcast::channel(1).1, broadcast::Sender::subscribe)
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.session().is_closed()
    }

    /// The version that QEMU stated in its greeting.
    #[must_use]
    pub fn version(&self) -> &VersionInfo {
        &self.greeting
    }

    fn session(
        &self,
    ) -> std::sync::MutexGuard<'_, Session<oneshot::Sender<Result<Value, Refusal>>>> {
        self.shared.session.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Qmp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qmp").field("version", &self.greeting).finish_non_exhaustive()
    }
}
