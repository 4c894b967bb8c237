//! `lifeboat-disk arrive`: takes the disks of one VM in that may follow it, and answers its guest's
//! reads and writes while some of them are still at the source.
//!
//! ```text
//!   source's mover ==> agent ==blocks==> receive ──> image <── FUSE <── QEMU
//!                                           '──── [Arriving]: reads wait here
//! ```
//!
//! Started by `client` before the first block comes; lives until QEMU is back on the images themselves.
//! Killed, it is started again with the same setting, takes its mounts over from the holder, and goes
//! on with what was kept (`sync::kept`). Killed before the disks were sealed, it has lost what had
//! come, and ends: so does the migration, with its guest at the source.
//!
//! The agent hands it the connections of the source by a socket: the page listener, TLS and the
//! token are the agent's. Deliberately not here: QMP, and who owns the VM.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::UnixListener;

use super::answering::{Answers, answer_on, listen};
use super::control::{Reply, Report, Request, Stage};
use super::mounts::{Mounts, alone};
use super::mover::MoverError;
use super::setting::{Folder, Setting};
use crate::disk::fuse::{Hook, Server};
use crate::disk::rooms::DiskRooms;
use crate::disk::sync::arriving::{Arriving, READ_DEADLINE};
use crate::disk::sync::kept::{Before, Kept};
use crate::disk::sync::receive::{Received, receive};
use crate::tasks;

/// To whoever takes it for the other process.
const ARRIVES: &str = "the disks arrive here; they do not leave";

/// Everything that requests act on.
struct Arrival {
    setting: Setting,
    received: Arc<Received>,
    mounts: Mounts,
}

/// Receives and serves what the setting `file` says, until it is told to finish. `ready` is called once
/// requests and the agent are answered.
///
/// # Errors
/// When it cannot; nothing stays mounted that was not before.
pub async fn run(file: &Path, ready: impl FnOnce()) -> Result<(), MoverError> {
    let folder = Folder::of_setting(file);
    let missing = || MoverError::NoSetting(folder.path().display().to_string());
    let setting = folder.read()?.ok_or_else(missing)?;
    let _alone = alone(&folder, &setting.vm)?;
    let (received, hook) = take_up(&setting, missing)?;
    let served: Arc<dyn Hook> = Arc::clone(&hook) as _;
    let (mounts, _) = Mounts::serve(&setting, &folder, &served)?;
    tasks::spawn("reads that wait", async move { hook.run().await });
    let blocks = listen(&folder.blocks()).map_err(MoverError::Listen)?;
    tasks::spawn("blocks", take_connections(blocks, Arc::clone(&received)));
    let listener = listen(&folder.control()).map_err(MoverError::Listen)?;
    ready();
    let arrival = Arc::new(Arrival { setting, received, mounts });
    answer_on(arrival, listener).await.map_err(MoverError::Listen)
}

/// What has arrived, as far as a process before us has kept it.
fn take_up(
    setting: &Setting,
    missing: impl Fn() -> MoverError,
) -> Result<(Arc<Received>, Arc<Arriving>), MoverError> {
    let maps = setting.maps.clone().ok_or_else(missing)?;
    let (kept, before) = Kept::open(maps, setting.disks.len()).map_err(MoverError::Kept)?;
    let arriving = |disk| DiskRooms::arriving(&setting.vm, &setting.paths(disk).0);
    let paths: Vec<PathBuf> = setting.disks.iter().map(arriving).collect();
    if before == Before::Nothing && paths.iter().any(|path| path.exists()) {
        return Err(MoverError::Unsealed(setting.vm.clone()));
    }
    let names: Vec<OsString> = setting.disks.iter().map(|disk| disk.name.clone().into()).collect();
    let received = Received::following(paths, names, kept, before).map_err(MoverError::Kept)?;
    let hook = Arriving::new(Arc::clone(&received), READ_DEADLINE);
    Ok((received, hook))
}

/// Each is one of the source's streams, which the agent has let in.
async fn take_connections(listener: UnixListener, received: Arc<Received>) {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                let received = Arc::clone(&received);
                tasks::spawn("blocks of one connection", async move {
                    if let Err(error) = receive(received, socket.into_split()).await {
                        tracing::warn!(%error, "a connection about disks ends");
                    }
                });
            }
            Err(error) => tracing::error!(%error, "no connection about disks can be taken"),
        }
    }
}

impl Arrival {
    fn report(&self) -> Report {
        let received = &self.received;
        let missing = received.missing_bytes();
        let stage = match received.is_owned() {
            true if missing > 0 => Stage::Rest,
            true => Stage::Complete,
            false if received.is_sealed() => Stage::Sealed,
            false => Stage::Bulk,
        };
        let (sent, mirrored, written, comparing) = (received.allocated(), 0, 0, false);
        Report {
            stage,
            left: missing,
            dirty: missing,
            sent,
            mirrored,
            written,
            comparing,
            failed: None,
        }
    }

    async fn settle(&self) -> Result<(), String> {
        let received = Arc::clone(&self.received);
        match tasks::blocking(move || received.settle()).await {
            Ok(true) => Ok(()),
            Ok(false) => Err("something of the disks is missing still".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Answers for Arrival {
    async fn answer(&self, request: Request) -> Result<Reply, String> {
        let (mounts, setting) = (&self.mounts, &self.setting);
        match request {
            Request::BeginSwap { disk } => {
                mounts.with_server(setting, disk, |server, name| server.begin_swap(name)).await?;
            }
            Request::EndSwap { disk, on_mount } => {
                let end = |server: &Server, name: &std::ffi::OsStr| server.end_swap(name, on_mount);
                mounts.with_server(setting, disk, end).await?;
            }
            Request::Progress => return Ok(Reply::Progress(self.report())),
            Request::Own if !self.received.is_sealed() => {
                return Err("the disks are not sealed, and nobody's here".to_owned());
            }
            Request::Own => self.received.own(),
            Request::Settle => self.settle().await?,
            Request::Finish => mounts.take_away().await?,
            Request::Send(_)
            | Request::Limit(_)
            | Request::GoInStep
            | Request::Seal
            | Request::Stop
            | Request::Cede => return Err(ARRIVES.to_owned()),
        }
        Ok(Reply::Done)
    }
}
