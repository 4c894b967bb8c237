//! `lifeboat-disk move`: serves one VM's images at mounts of their own, and sends them to another
//! host when it is told to.
//!
//! Started by `client`; lives from before QEMU is swapped onto its mounts until after it was swapped
//! off, whether or not an agent is there. Killed, it is started again with the same setting, takes
//! its mounts over from the holder, and whatever it knew of the transfer is found again by comparing
//! hashes.
//!
//! The mirror is the hook of every mount from the first moment, and marks: a block that changes
//! after QEMU's first write through the mount is known as dirty, whenever the transfer begins.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::BytesMut;
use lifeboat_protocol::ids::VmId;
use lifeboat_protocol::units::BytesPerSec;
use rustix::io::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, mpsc, oneshot, watch};

use super::control::{self, ControlError, Destination, Limits, Reply, Report, Request, Stage};
use super::sending::{Counts, Seen, Transfer};
use super::setting::{Alone, Folder, Setting, SettingError};
use crate::disk::fuse::holder::{HolderError, Serving};
use crate::disk::fuse::{Image, ServeError, Server};
use crate::disk::sync::mirror::{DEADLINE, Mirror};
use crate::disk::sync::phases::{Goal, Phase};
use crate::disk::sync::rank::{Strategy, Weights};
use crate::disk::sync::send::{Choice, Command, Outgoing, Progress};
use crate::disk::track::{BlockSize, SegmentSize};
use crate::tls::{TlsError, TlsIdentity};
use crate::{clock, tasks};

/// The two sides go in step when at most so much is left, bytes: about one round trip's worth at 1
/// Gbit/s and 30 ms.
const LEFT_FOR_STEP: u64 = 4 << 20;
/// The kernel tells of a closed file late; an unmount waits for it so long.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);
/// A mover that was killed has gone within this time, on a busy machine.
const ENDING_LIMIT: Duration = Duration::from_secs(5);

/// Why a mover cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum MoverError {
    /// Its setting.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// There is none.
    #[error("there is no setting beside {0}")]
    NoSetting(String),
    /// Two would serve the same mounts.
    #[error("another process serves the disks of VM `{0}`")]
    Another(VmId),
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A mount.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The holder.
    #[error(transparent)]
    Holder(#[from] HolderError),
    /// An image.
    #[error("cannot open the image {name}")]
    Image {
        /// Its name.
        name: String,
        /// What the system said.
        source: Errno,
    },
    /// A mount point whose path cannot be a mount's name.
    #[error("the mount point's path is not UTF-8")]
    MountPoint,
    /// The control socket.
    #[error("cannot listen for the agent")]
    Listen(#[source] std::io::Error),
}

struct Mounted {
    server: Server,
    serving: Serving,
    at: std::path::PathBuf,
}

/// A transfer that was begun.
struct Begun {
    commands: mpsc::Sender<Command>,
    seen: Seen,
    task: tokio::task::JoinHandle<()>,
}

/// Everything that requests act on.
struct Mover {
    setting: Setting,
    mirror: Arc<Mirror>,
    images: Vec<Arc<Image>>,
    identity: Option<TlsIdentity>,
    /// One for each folder; none once finished.
    mounted: Mutex<Vec<Mounted>>,
    begun: Mutex<Option<Begun>>,
    network: watch::Sender<Option<BytesPerSec>>,
    /// A server before this one was killed: what it had marked is lost.
    took_over: bool,
    finished: watch::Sender<bool>,
}

/// Serves what the setting `file` says, until it is told to finish. `ready` is called once requests
/// and the agent are answered.
///
/// # Errors
/// When the images cannot be served; nothing stays mounted that was not before.
pub async fn run(file: &Path, ready: impl FnOnce()) -> Result<(), MoverError> {
    let folder = Folder::of_setting(file);
    let missing = || MoverError::NoSetting(folder.path().display().to_string());
    let setting = folder.read()?.ok_or_else(missing)?;
    let _alone = alone(&folder, &setting.vm)?;
    let identity = setting.tls_dir.as_deref().map(TlsIdentity::load).transpose()?;
    let mover = Arc::new(Mover::begin(setting, identity, &folder)?);
    let control = folder.control();
    // What a mover before us left.
    let _ = std::fs::remove_file(&control);
    let listener = UnixListener::bind(&control).map_err(MoverError::Listen)?;
    ready();
    let mut finished = mover.finished.subscribe();
    loop {
        tokio::select! {
            connection = listener.accept() => {
                let (socket, _) = connection.map_err(MoverError::Listen)?;
                let own = Arc::clone(&mover);
                tasks::spawn("control", async move {
                    if let Err(error) = own.answer_all(socket).await {
                        tracing::warn!(%error, "a control connection ends");
                    }
                });
            }
            _ = finished.wait_for(|finished| *finished) => return Ok(()),
        }
    }
}

/// One that was killed may still be ending.
fn alone(folder: &Folder, vm: &VmId) -> Result<Alone, MoverError> {
    let deadline = clock::now() + ENDING_LIMIT;
    loop {
        match folder.take()? {
            Some(alone) => return Ok(alone),
            None if clock::now() < deadline => clock::pause_thread(Duration::from_millis(5)),
            None => return Err(MoverError::Another(vm.clone())),
        }
    }
}

impl Mover {
    fn begin(
        setting: Setting,
        identity: Option<TlsIdentity>,
        folder: &Folder,
    ) -> Result<Self, MoverError> {
        let lengths = lengths(&setting)?;
        let disks: Vec<(&OsStr, u64)> =
            setting.disks.iter().zip(&lengths).map(|(d, l)| (OsStr::new(&d.name), *l)).collect();
        let (block, segment) = (BlockSize::default(), SegmentSize::default());
        let mirror = Arc::new(Mirror::new(&disks, block, segment, DEADLINE));
        let (mut mounted, mut took_over) = (vec![], false);
        for place in &setting.folders {
            let name = place.at.to_str().ok_or(MoverError::MountPoint)?;
            let holder = folder.holder();
            let hook = Arc::clone(&mirror);
            let (server, serving) = match Serving::take(&holder, name) {
                Ok((serving, device, memory)) => {
                    took_over = true;
                    (Server::take_over(&place.images, device, memory, hook)?, serving)
                }
                Err(HolderError::Unknown(_)) => {
                    let server = Server::mount(&place.images, &place.at, hook)?;
                    let serving = Serving::park(&holder, name, server.parts())?;
                    (server, serving)
                }
                Err(error) => return Err(error.into()),
            };
            mounted.push(Mounted { server, serving, at: place.at.clone() });
        }
        let image = |disk: &super::setting::ServedDisk| {
            let failed = |source| MoverError::Image { name: disk.name.clone(), source };
            let mounted = mounted.get(disk.folder).ok_or_else(|| failed(Errno::NOENT))?;
            mounted.server.image(OsStr::new(&disk.name)).map_err(failed)
        };
        let images = setting.disks.iter().map(image).collect::<Result<_, _>>()?;
        Ok(Self {
            setting,
            mirror,
            images,
            identity,
            mounted: Mutex::new(mounted),
            begun: Mutex::default(),
            network: watch::Sender::new(None),
            took_over,
            finished: watch::Sender::new(false),
        })
    }

    async fn answer_all(&self, mut socket: UnixStream) -> Result<(), ControlError> {
        let (mut buffer, mut out) = (BytesMut::new(), BytesMut::new());
        loop {
            while let Some(request) = control::decode::<Request>(&mut buffer)? {
                let ends = request == Request::Finish;
                let reply = match self.answer(request).await {
                    Ok(reply) => reply,
                    Err(refused) => Reply::Refused(refused),
                };
                let ended = ends && reply == Reply::Done;
                out.clear();
                control::encode(&reply, &mut out)?;
                // Whoever asked may have gone: then so has the connection.
                let written = socket.write_all(&out).await;
                if ended {
                    self.finished.send_replace(true);
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

    async fn answer(&self, request: Request) -> Result<Reply, String> {
        tracing::debug!(?request, "asked");
        match request {
            Request::BeginSwap { disk } => {
                self.with_server(disk, |server, name| server.begin_swap(name)).await?;
            }
            Request::EndSwap { disk, on_mount } => {
                self.with_server(disk, |server, name| server.end_swap(name, on_mount)).await?;
            }
            Request::Send(to) => self.send(to).await?,
            Request::Limit(limits) => self.limit(limits).await,
            Request::GoInStep => self.go_in_step().await?,
            Request::Progress => return Ok(Reply::Progress(self.report().await)),
            Request::Seal => self.seal().await?,
            Request::Stop => self.stop().await,
            Request::Finish => self.finish().await?,
        }
        Ok(Reply::Done)
    }

    async fn with_server(
        &self,
        disk: u16,
        act: impl FnOnce(&Server, &OsStr) -> Result<(), Errno>,
    ) -> Result<(), String> {
        let served = self.setting.disks.get(usize::from(disk));
        let served = served.ok_or_else(|| format!("there is no disk {disk}"))?;
        let mounted = self.mounted.lock().await;
        let folder = mounted.get(served.folder).ok_or("the mounts are gone")?;
        act(&folder.server, OsStr::new(&served.name)).map_err(|errno| match errno {
            Errno::BUSY => format!("another program has {} open", served.name),
            errno => format!("{}: {errno}", served.name),
        })
    }

    async fn send(&self, to: Destination) -> Result<(), String> {
        let mut begun = self.begun.lock().await;
        if begun.is_some() {
            return Err("the disks are being sent already".to_owned());
        }
        let choice = Choice {
            goal: Goal { left: LEFT_FOR_STEP / BlockSize::default().bytes(), early: false },
            strategy: Strategy::Whole,
            weights: Weights::default(),
            segment: SegmentSize::default(),
            monitors: false,
            compares: to.compares || self.took_over,
        };
        let (mirror, images) = (Arc::clone(&self.mirror), self.images.clone());
        let outgoing = tasks::blocking(move || Outgoing::new(mirror, images, choice)).await;
        let outgoing = outgoing.map_err(|errno| format!("cannot look for data: {errno}"))?;
        let (commands, obeyed) = mpsc::channel(8);
        let comparing = choice.compares;
        let first = Progress { phase: Phase::Bulk, dirty: 0, on_the_way: 0, comparing };
        let (progress, failed) = (watch::Sender::new(first), watch::Sender::new(None));
        let counts = Arc::new(Counts::default());
        let seen = Seen {
            progress: progress.subscribe(),
            failed: failed.subscribe(),
            counts: Arc::clone(&counts),
        };
        let transfer = Transfer {
            outgoing,
            to,
            identity: self.identity.clone(),
            rate: self.network.subscribe(),
            commands: obeyed,
            progress,
            failed,
            counts,
        };
        let task = tasks::spawn("disks", transfer.run());
        *begun = Some(Begun { commands, seen, task });
        Ok(())
    }

    async fn go_in_step(&self) -> Result<(), String> {
        let begun = self.begun.lock().await;
        let begun = begun.as_ref().ok_or("nothing is being sent")?;
        // One that is not obeyed yet is as good.
        let _ = begun.commands.try_send(Command::GoInStep);
        Ok(())
    }

    async fn limit(&self, limits: Limits) {
        self.network.send_replace(limits.network.map(BytesPerSec));
        let mounted = self.mounted.lock().await;
        let share = u64::try_from(mounted.len()).unwrap_or(1).max(1);
        for folder in mounted.iter() {
            // A limit is the VM's: with images in several directories each has its share.
            folder.server.set_disk_limit(limits.disk.map(|rate| BytesPerSec(rate / share)));
        }
    }

    async fn report(&self) -> Report {
        let begun = self.begun.lock().await;
        let Some(begun) = begun.as_ref() else {
            let (left, dirty, sent, mirrored, written) = (0, 0, 0, 0, 0);
            let (stage, comparing, failed) = (Stage::Idle, false, None);
            return Report { stage, left, dirty, sent, mirrored, written, comparing, failed };
        };
        let (seen, now) = (&begun.seen, *begun.seen.progress.borrow());
        // Counted anew: the transfer's own figure is as old as its last event.
        let dirty: u64 = self.mirror.disks().iter().map(|disk| disk.dirty.count()).sum();
        let dirty = dirty * BlockSize::default().bytes();
        let mirrored = seen.counts.control.load(Ordering::Relaxed);
        Report {
            stage: seen.stage(),
            left: dirty + now.on_the_way,
            dirty,
            sent: mirrored + seen.counts.blocks.load(Ordering::Relaxed),
            mirrored,
            written: self.mirror.written(),
            comparing: now.comparing,
            failed: seen.failed.borrow().clone(),
        }
    }

    async fn seal(&self) -> Result<(), String> {
        let commands = {
            let begun = self.begun.lock().await;
            begun.as_ref().map(|begun| begun.commands.clone()).ok_or("nothing is being sent")?
        };
        let (answer, sealed) = oneshot::channel();
        let gone = "the transfer has ended";
        commands.send(Command::Seal(answer)).await.map_err(|_| gone)?;
        sealed.await.map_err(|_| gone)?.map_err(|veto| veto.to_string())
    }

    /// The VM is this host's. The order matters: first nobody sends, then changes are only marked,
    /// then whoever waits is answered.
    async fn stop(&self) {
        if let Some(begun) = self.begun.lock().await.take() {
            begun.task.abort();
            // An aborted task ends with an error, which says just that.
            let _ = begun.task.await;
        }
        self.mirror.retire();
        self.mirror.give_up();
        self.limit(Limits::default()).await;
    }

    async fn finish(&self) -> Result<(), String> {
        if let Some(begun) = self.begun.lock().await.take() {
            begun.task.abort();
        }
        let mut mounted = self.mounted.lock().await;
        while let Some(mut folder) = mounted.pop() {
            let (folder, unmounted) = tasks::blocking(move || {
                let unmounted = unmount(&mut folder);
                (folder, unmounted)
            })
            .await;
            if let Err(errno) = unmounted {
                let at = folder.at.display().to_string();
                mounted.push(folder);
                return Err(format!("cannot unmount {at}: {errno}"));
            }
            if let Err(error) = folder.serving.forget() {
                tracing::warn!(%error, "the holder does not let go");
            }
        }
        Ok(())
    }
}

fn unmount(folder: &mut Mounted) -> Result<(), Errno> {
    let deadline = clock::now() + RELEASE_LIMIT;
    loop {
        match folder.server.unmount(&folder.at) {
            Err(Errno::BUSY) if clock::now() < deadline => {
                clock::pause_thread(Duration::from_millis(5));
            }
            outcome => return outcome,
        }
    }
}

fn lengths(setting: &Setting) -> Result<Vec<u64>, MoverError> {
    let length = |disk: &super::setting::ServedDisk| {
        let failed = |source| MoverError::Image { name: disk.name.clone(), source };
        let folder = setting.folders.get(disk.folder).ok_or_else(|| failed(Errno::NOENT))?;
        let path = folder.images.join(&disk.name);
        let stat = rustix::fs::stat(&path).map_err(failed)?;
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    };
    setting.disks.iter().map(length).collect()
}
