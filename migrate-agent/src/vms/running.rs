//! One VM that has a QEMU here: its process, its monitor, what its guest does.
//!
//! Used by `vms/` alone. The guest's state is kept by listening to QEMU's events, so that asking
//! for it costs nothing and never waits for a QEMU that hangs.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;

use super::definition::Definition;
use crate::qemu::process::QemuProcess;
use crate::qemu::qmp::{Qmp, QmpError, RunState};
use crate::qemu::run_dir::RunDir;
use crate::tasks;

/// How long a new QEMU may take until its monitor answers. Emulation on a busy host has been seen
/// to take 2 s.
const MONITOR_LIMIT: Duration = Duration::from_secs(20);
const MONITOR_POLL: Duration = Duration::from_millis(20);

/// A VM with a QEMU.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) definition: Definition,
    pub(super) process: QemuProcess,
    pub(super) run_dir: RunDir,
    qmp: tokio::sync::Mutex<Option<Qmp>>,
    heard: Arc<Mutex<Heard>>,
}

#[derive(Debug, Default)]
struct Heard {
    state: Option<RunState>,
    version: String,
}

/// Why the monitor of a QEMU could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// QEMU ended before it answered: nearly always it did not like its command line.
    #[error("QEMU ended before it answered; it said: {said}")]
    Ended {
        /// The end of its standard error.
        said: String,
    },
    /// It runs and does not answer.
    #[error("QEMU has not opened its monitor within {MONITOR_LIMIT:?}")]
    Silent,
    /// Something else answered.
    #[error("the QEMU at this monitor is called `{found}`, not `{wanted}`; it was left alone")]
    Name {
        /// Its name.
        found: String,
        /// The VM's.
        wanted: String,
    },
    /// The monitor said no.
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

impl Running {
    pub(super) fn new(definition: Definition, process: QemuProcess, run_dir: RunDir) -> Self {
        let (qmp, heard) = (tokio::sync::Mutex::default(), Arc::default());
        Self { definition, process, run_dir, qmp, heard }
    }

    /// The monitor: the connection that there is, or a new one. Waits while QEMU is starting.
    pub(super) async fn qmp(&self) -> Result<Qmp, MonitorError> {
        let mut held = self.qmp.lock().await;
        if let Some(qmp) = held.as_ref().filter(|qmp| !qmp.is_closed()) {
            return Ok(qmp.clone());
        }
        let opened = tokio::time::timeout(MONITOR_LIMIT, self.open());
        let qmp = opened.await.unwrap_or(Err(MonitorError::Silent))?;
        self.listen(&qmp).await?;
        *held = Some(qmp.clone());
        Ok(qmp)
    }

    async fn open(&self) -> Result<Qmp, MonitorError> {
        loop {
            match Qmp::connect(&self.run_dir.qmp_socket()).await {
                Ok(qmp) => {
                    let (found, wanted) = (qmp.query_name().await?, self.definition.name.as_str());
                    if found == wanted {
                        return Ok(qmp);
                    }
                    return Err(MonitorError::Name { found, wanted: wanted.to_owned() });
                }
                Err(_) if !self.process.is_alive() => {
                    return Err(MonitorError::Ended { said: self.run_dir.log_tail() });
                }
                // Not there yet, or not listening yet.
                Err(QmpError::Connect { .. }) => tokio::time::sleep(MONITOR_POLL).await,
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn listen(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let mut events = qmp.events();
        let heard = Arc::clone(&self.heard);
        let note = move |state| {
            heard.lock().unwrap_or_else(PoisonError::into_inner).state = state;
        };
        let first = qmp.query_status().await?.status;
        note(Some(first));
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).version =
            qmp.version().to_string();
        // Not a clone of the monitor: the task must not keep alive what it listens to.
        tasks::spawn("guest state", async move {
            loop {
                match events.recv().await {
                    Ok(event) => match event.name.as_str() {
                        "RESUME" => note(Some(RunState::Running)),
                        "STOP" => note(Some(RunState::Paused)),
                        "SHUTDOWN" => note(Some(RunState::Shutdown)),
                        "GUEST_PANICKED" => note(Some(RunState::GuestPanicked)),
                        _ => (),
                    },
                    Err(RecvError::Lagged(_)) => note(None),
                    Err(RecvError::Closed) => return note(None),
                }
            }
        });
        Ok(())
    }

    /// Asks QEMU what the guest does, for an answer that cannot wait for the events.
    pub(super) async fn refresh(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let status = qmp.query_status().await?.status;
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).state = Some(status);
        Ok(())
    }

    /// What the guest does, as last heard; `None` when that is not known at the moment.
    pub(super) fn state(&self) -> Option<RunState> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).state
    }

    /// QEMU's version; empty until its monitor has been reached.
    pub(super) fn version(&self) -> String {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).version.clone()
    }
}
