//! The agent's hand on its movers: starts one for a VM, starts it again when it has died, asks it.
//!
//! `source/disk.rs` uses it. Both processes outlive the agent: a guest's writes go through them.
//! Deliberately not here: QMP, and what is asked when.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bytes::BytesMut;
use lifeboat_protocol::ids::VmId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::control::{self, ControlError, Reply, Report, Request};
use super::setting::{Folder, Setting, SettingError};
use crate::clock;
use crate::disk::fuse;
use crate::disk::fuse::holder::Serving;
use crate::disk::local::LocalDisk;
use crate::disk::parameters::Parameters;
use crate::disk::track::BlockSize;

/// A process is reached within this time after its start, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(20);
/// An answer that waits for nothing but the process comes within this time.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// One that has finished has nothing left to do and ends within this time.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Why a mover cannot be had, or does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum MoverClientError {
    /// Its files.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// The program.
    #[error("cannot start {}; it belongs beside the agent's program", program.display())]
    Start {
        /// Which.
        program: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It ended instead of serving.
    #[error("the disk process of VM `{vm}` ended at once: {said}")]
    Ended {
        /// The VM.
        vm: VmId,
        /// The end of its log.
        said: String,
    },
    /// It does not answer.
    #[error("the disk process of VM `{vm}` does not answer within {} s", .limit.as_secs())]
    Silent {
        /// The VM.
        vm: VmId,
        /// How long we waited.
        limit: Duration,
    },
    /// It has gone.
    #[error("the disk process of VM `{0}` has gone")]
    Gone(VmId),
    /// It answers with something else.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// It did not do it.
    #[error("the disk process of VM `{vm}` refuses: {reason}")]
    Refused {
        /// The VM.
        vm: VmId,
        /// Its words.
        reason: String,
    },
}

/// Where movers are, and what they are started from. Cheap enough to clone.
#[derive(Debug, Clone)]
pub struct Movers {
    /// The agent's run directory.
    pub run_dir: PathBuf,
    /// `lifeboat-disk`.
    pub program: PathBuf,
    /// The agent's certificates.
    pub tls_dir: Option<PathBuf>,
    /// How disks go that leave from now on.
    pub parameters: Parameters,
}

impl Movers {
    fn folder(&self, vm: &VmId) -> Folder {
        Folder::new(&self.run_dir, vm)
    }

    /// Those of disks that arrive here and may follow their VM: a VM can arrive while what is left of
    /// its departure is still here.
    #[must_use]
    pub fn of_arrivals(&self) -> Self {
        Self { run_dir: self.run_dir.join(".arriving"), ..self.clone() }
    }

    /// Those of disks that go on to an intermediary, or are brought on by it: beside the one that serves
    /// them.
    #[must_use]
    pub fn of_stores(&self) -> Self {
        Self { run_dir: self.run_dir.join(".storing"), ..self.clone() }
    }

    /// The same, in blocks of this size: those of a destination that has a part already.
    #[must_use]
    pub fn in_blocks_of(&self, block: BlockSize) -> Self {
        Self { parameters: self.parameters.in_blocks_of(block), ..self.clone() }
    }

    /// What the one of `vm` was started with; `None` where there is none.
    #[must_use]
    pub fn setting(&self, vm: &VmId) -> Option<Setting> {
        self.folder(vm).read().ok().flatten()
    }

    /// Where the one of `vm` takes connections of its disks' source.
    #[must_use]
    pub fn blocks(&self, vm: &VmId) -> PathBuf {
        self.folder(vm).blocks()
    }

    /// Whether something of a mover of `vm` is here.
    #[must_use]
    pub fn knows(&self, vm: &VmId) -> bool {
        self.folder(vm).path().exists()
    }

    /// Whether the mounts of the one of `vm` are still held: then this host has not been down since,
    /// and what was written to them is there, flushed or not.
    #[must_use]
    pub fn are_held(&self, vm: &VmId) -> bool {
        is_listening(&self.folder(vm).holder())
    }

    /// The VMs of which there is a mover, or something of one.
    #[must_use]
    pub fn all(&self) -> Vec<VmId> {
        Folder::all(&self.run_dir)
    }

    /// Starts one for `vm`, with these disks.
    ///
    /// # Errors
    /// When it cannot be started; nothing of it is left.
    pub async fn start(&self, vm: &VmId, disks: &[LocalDisk]) -> Result<Mover, MoverClientError> {
        self.start_as(vm, disks, |_| ()).await
    }

    /// The same, for disks that may follow their VM.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_following(
        &self,
        vm: &VmId,
        disks: &[LocalDisk],
    ) -> Result<Mover, MoverClientError> {
        self.start_as(vm, disks, |setting| setting.follow = true).await
    }

    /// Starts one for disks that arrive and may follow their VM; `maps` is a directory for it alone.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_arriving(
        &self,
        vm: &VmId,
        disks: &[LocalDisk],
        maps: PathBuf,
    ) -> Result<Mover, MoverClientError> {
        // QEMU's user passes through to the mount points.
        let open = || {
            std::fs::create_dir_all(&self.run_dir)?;
            std::fs::set_permissions(&self.run_dir, std::fs::Permissions::from_mode(0o755))
        };
        open().map_err(|source| SettingError::File { path: self.run_dir.clone(), source })?;
        self.start_as(vm, disks, |setting| setting.maps = Some(maps)).await
    }

    /// Ends one that nobody needs, whatever state it is in; nobody uses its mounts.
    ///
    /// # Errors
    /// When its files cannot be removed.
    pub async fn give_up(&self, vm: &VmId) -> Result<(), MoverClientError> {
        let finished = match self.reach(vm).await {
            Ok(Some(mover)) => mover.finish().await,
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        match finished {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::warn!(%vm, %error, "its disk process is given up");
                self.abandon(vm)
            }
        }
    }

    /// Takes away what is left of one that cannot be started again; nobody uses its mounts.
    ///
    /// # Errors
    /// When its files cannot be removed.
    fn abandon(&self, vm: &VmId) -> Result<(), MoverClientError> {
        let folder = self.folder(vm);
        for place in folder.read()?.map(|setting| setting.folders).unwrap_or_default() {
            // Nothing is mounted where it had not come so far.
            let _ = fuse::unmount(&place.at);
            if let Some(name) = place.at.to_str()
                && let Ok((serving, ..)) = Serving::take(&folder.holder(), name)
                && let Err(error) = serving.forget()
            {
                tracing::warn!(%vm, %error, "the holder keeps what nobody needs");
            }
        }
        Ok(folder.remove()?)
    }

    async fn start_as(
        &self,
        vm: &VmId,
        disks: &[LocalDisk],
        change: impl FnOnce(&mut Setting),
    ) -> Result<Mover, MoverClientError> {
        let folder = self.folder(vm);
        let mut setting = folder.setting_for(vm, disks, self.tls_dir.as_deref())?;
        setting.parameters = self.parameters;
        change(&mut setting);
        let setting = folder.make(setting)?;
        match self.start_both(vm, &folder, setting).await {
            Ok(mover) => Ok(mover),
            Err(error) => {
                if let Err(error) = folder.remove() {
                    tracing::warn!(%vm, %error, "what was begun could not all be undone");
                }
                Err(error)
            }
        }
    }

    /// The mover of `vm`, started again if it has died; `None` when there was none.
    ///
    /// # Errors
    /// When it cannot be reached or started.
    pub async fn reach(&self, vm: &VmId) -> Result<Option<Mover>, MoverClientError> {
        let folder = self.folder(vm);
        let Some(setting) = folder.read()? else { return Ok(None) };
        // One that an agent before us has just started, or that was killed just now, has its folder and
        // does not listen.
        let deadline = clock::now() + START_LIMIT;
        loop {
            if let Ok(socket) = UnixStream::connect(folder.control()).await {
                return Ok(Some(Mover::new(vm, folder, setting, socket)));
            }
            if folder.take()?.is_some() {
                break;
            }
            if clock::now() > deadline {
                return Err(MoverClientError::Silent { vm: vm.clone(), limit: START_LIMIT });
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        tracing::warn!(%vm, "the disk process has gone; starting it again");
        self.start_both(vm, &folder, setting).await.map(Some)
    }

    /// Takes away what is left of a mover of `vm` that has finished, or never served.
    ///
    /// # Errors
    /// When a mount of it is still there.
    pub fn forget(&self, vm: &VmId) -> Result<(), MoverClientError> {
        Ok(self.folder(vm).remove()?)
    }

    async fn start_both(
        &self,
        vm: &VmId,
        folder: &Folder,
        setting: Setting,
    ) -> Result<Mover, MoverClientError> {
        let mut holder = None;
        // A holder that lives has what must not be lost. Asking it costs a connection.
        if !is_listening(&folder.holder()) {
            let _ = std::fs::remove_file(folder.holder());
            let arguments = [
                "hold".as_ref(),
                "--until-forgotten".as_ref(),
                "--socket".as_ref(),
                folder.holder().as_os_str(),
            ]
            .map(std::ffi::OsStr::to_owned);
            let mut child = self.spawn(folder, &arguments)?;
            self.await_listening(vm, folder, &mut child, &folder.holder()).await?;
            holder = Some(child);
        }
        let started = self.start_mover(vm, folder, &setting).await;
        match (started, holder) {
            (Ok(socket), _) => Ok(Mover::new(vm, folder.clone(), setting, socket)),
            (Err(error), Some(mut holder)) => {
                // It holds nothing yet, or what nobody can use.
                let _ = holder.kill().await;
                Err(error)
            }
            (Err(error), None) => Err(error),
        }
    }

    async fn start_mover(
        &self,
        vm: &VmId,
        folder: &Folder,
        setting: &Setting,
    ) -> Result<UnixStream, MoverClientError> {
        let _ = std::fs::remove_file(folder.control());
        let does = if setting.maps.is_some() { "arrive" } else { "move" };
        let arguments = [does.as_ref(), "--setting".as_ref(), folder.setting().as_os_str()]
            .map(std::ffi::OsStr::to_owned);
        let mut child = self.spawn(folder, &arguments)?;
        let connected = async {
            self.await_listening(vm, folder, &mut child, &folder.control()).await?;
            let socket = UnixStream::connect(folder.control()).await;
            socket.map_err(|_| MoverClientError::Gone(vm.clone()))
        };
        match connected.await {
            Ok(socket) => Ok(socket),
            Err(error) => {
                let _ = child.kill().await;
                Err(error)
            }
        }
    }

    fn spawn(
        &self,
        folder: &Folder,
        arguments: &[std::ffi::OsString],
    ) -> Result<Child, MoverClientError> {
        let path = folder.log();
        let open = || {
            let log = std::fs::OpenOptions::new().create(true).append(true).open(&path)?;
            Ok((log.try_clone()?, log))
        };
        let (log, again) =
            open().map_err(|source| SettingError::File { path: path.clone(), source })?;
        // A group of its own: what is typed at the agent's terminal does not reach it.
        let mut command = Command::new(&self.program);
        command.args(arguments).current_dir("/").process_group(0);
        command.stdin(Stdio::null()).stdout(log).stderr(again).env("NO_COLOR", "1");
        let failed = |source| MoverClientError::Start { program: self.program.clone(), source };
        command.spawn().map_err(failed)
    }

    async fn await_listening(
        &self,
        vm: &VmId,
        folder: &Folder,
        child: &mut Child,
        socket: &Path,
    ) -> Result<(), MoverClientError> {
        let deadline = clock::now() + START_LIMIT;
        while !is_listening(socket) {
            if let Ok(Some(_)) = child.try_wait() {
                return Err(MoverClientError::Ended { vm: vm.clone(), said: tail(&folder.log()) });
            }
            if clock::now() > deadline {
                return Err(MoverClientError::Silent { vm: vm.clone(), limit: START_LIMIT });
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }
}

/// Whether somebody listens there, by the kernel's list of sockets: asking costs no connection.
///
/// The list still has the path of one that is ending when its file has gone, or is another's by now.
fn is_listening(path: &Path) -> bool {
    path.exists() && is_listed(path)
}

fn is_listed(path: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let ends = path.to_string_lossy();
    sockets.lines().any(|line| {
        let mut fields = line.split_whitespace();
        fields.nth(3) == Some(ACCEPTS) && fields.nth(3) == Some(&*ends)
    })
}

fn tail(log: &Path) -> String {
    const TAIL_BYTES: usize = 600;
    let text = std::fs::read(log).unwrap_or_default();
    let tail = &text[text.len().saturating_sub(TAIL_BYTES)..];
    String::from_utf8_lossy(tail).trim().to_owned()
}

/// A mover that was reached.
pub struct Mover {
    vm: VmId,
    folder: Folder,
    setting: Setting,
    socket: UnixStream,
    buffer: BytesMut,
}

impl Mover {
    fn new(vm: &VmId, folder: Folder, setting: Setting, socket: UnixStream) -> Self {
        Self { vm: vm.clone(), folder, setting, socket, buffer: BytesMut::new() }
    }

    /// What it serves.
    #[must_use]
    pub fn setting(&self) -> &Setting {
        &self.setting
    }

    /// Asks for something, and waits for at most `limit` until it is done.
    ///
    /// # Errors
    /// When it is not done. After [`MoverClientError::Silent`] this connection is of no use.
    pub async fn ask(
        &mut self,
        request: &Request,
        limit: Duration,
    ) -> Result<Reply, MoverClientError> {
        let asked = self.ask_now(request);
        match tokio::time::timeout(limit, asked).await {
            Ok(Ok(Reply::Refused(reason))) => {
                Err(MoverClientError::Refused { vm: self.vm.clone(), reason })
            }
            Ok(outcome) => outcome,
            Err(_) => Err(MoverClientError::Silent { vm: self.vm.clone(), limit }),
        }
    }

    async fn ask_now(&mut self, request: &Request) -> Result<Reply, MoverClientError> {
        let gone = || MoverClientError::Gone(self.vm.clone());
        let mut out = BytesMut::new();
        control::encode(request, &mut out)?;
        self.socket.write_all(&out).await.map_err(|_| gone())?;
        loop {
            if let Some(reply) = control::decode(&mut self.buffer)? {
                return Ok(reply);
            }
            match self.socket.read_buf(&mut self.buffer).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => return Err(gone()),
            }
        }
    }

    /// How far it is.
    ///
    /// # Errors
    /// As [`Mover::ask`].
    pub async fn report(&mut self) -> Result<Report, MoverClientError> {
        match self.ask(&Request::Progress, ANSWER_LIMIT).await? {
            Reply::Progress(report) => Ok(report),
            other => {
                let reason = format!("asked how far it is, it says {other:?}");
                Err(MoverClientError::Refused { vm: self.vm.clone(), reason })
            }
        }
    }

    /// Ends it: nobody uses its mounts any more. Its files are gone then, and both processes, so that
    /// others can be started at once.
    ///
    /// # Errors
    /// When a mount is still used; it serves on then.
    pub async fn finish(mut self) -> Result<(), MoverClientError> {
        self.ask(&Request::Finish, ANSWER_LIMIT).await?;
        let deadline = clock::now() + END_LIMIT;
        while [self.folder.control(), self.folder.holder()].iter().any(|path| is_listed(path)) {
            if clock::now() > deadline {
                tracing::warn!(vm = %self.vm, "its disk process has finished and does not end");
                break;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(self.folder.remove()?)
    }
}
