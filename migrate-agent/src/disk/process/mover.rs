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

use lifeboat_protocol::ids::VmId;
use lifeboat_protocol::units::BytesPerSec;
use rustix::io::Errno;
use tokio::sync::{Mutex, mpsc, oneshot, watch};

use super::answering::{Answers, answer_on, listen};
use super::control::{Destination, Limits, Reply, Report, Request, Stage};
use super::mounts::{Mounts, alone};
use super::sending::{Counts, Seen, Transfer};
use super::setting::{Folder, Setting, SettingError};
use crate::disk::fuse::holder::HolderError;
use crate::disk::fuse::{Hook, Image, ServeError, Server};
use crate::disk::sync::mirror::{DEADLINE, Mirror};
use crate::disk::sync::phases::Goal;
use crate::disk::sync::rank::Strategy;
use crate::disk::sync::send::{Choice, Command, Outgoing, Progress};
use crate::disk::sync::within::Within;
use crate::disk::track::Traffic;
use crate::tasks;
use crate::tls::{TlsError, TlsIdentity};

/// The two sides go in step when at most so much is left, bytes: about one round trip's worth at 1
/// Gbit/s and 30 ms.
const LEFT_FOR_STEP: u64 = 4 << 20;
/// To whoever takes it for the other process.
const LEAVES: &str = "the disks leave from here; they do not arrive";

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
    /// What is kept of disks that arrive.
    #[error("cannot go on with what was kept of the VM's arriving disks")]
    Kept(#[source] std::io::Error),
    /// A process before this one was killed too early.
    #[error(
        "the process in which the disks of VM `{0}` arrived was killed before they were sealed; the migration has to begin anew"
    )]
    Unsealed(VmId),
    /// Whose images a plain mount shows.
    #[error("cannot see which images there are")]
    Directory(#[source] std::io::Error),
    /// The control socket.
    #[error("cannot listen for whoever asks")]
    Listen(#[source] std::io::Error),
}

/// A transfer that was begun.
struct Begun {
    commands: mpsc::Sender<Command>,
    seen: Seen,
    task: tokio::task::JoinHandle<()>,
    _within: Within,
}

/// Everything that requests act on.
struct Mover {
    setting: Setting,
    mirror: Arc<Mirror>,
    images: Vec<Arc<Image>>,
    identity: Option<TlsIdentity>,
    mounts: Mounts,
    begun: Mutex<Option<Begun>>,
    network: watch::Sender<Option<BytesPerSec>>,
    /// A server before this one was killed: what it had marked is lost.
    took_over: bool,
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
    let listener = listen(&folder.control()).map_err(MoverError::Listen)?;
    ready();
    answer_on(mover, listener).await.map_err(MoverError::Listen)
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
        let (block, segment) = (setting.parameters.block(), setting.parameters.segment());
        let mirror = Arc::new(Mirror::new(&disks, block, segment, DEADLINE));
        let hook: Arc<dyn Hook> = Arc::clone(&mirror) as _;
        let (mut mounts, took_over) = Mounts::serve(&setting, folder, &hook)?;
        let images = mounts.images(&setting)?;
        Ok(Self {
            setting,
            mirror,
            images,
            identity,
            mounts,
            begun: Mutex::default(),
            network: watch::Sender::new(None),
            took_over,
        })
    }

    async fn send(&self, to: Destination) -> Result<(), String> {
        let mut begun = self.begun.lock().await;
        if begun.is_some() {
            return Err("the disks are being sent already".to_owned());
        }
        let choice = self.choice(&to);
        let (mirror, images) = (Arc::clone(&self.mirror), self.images.clone());
        let rests = to.rests;
        let outgoing = tasks::blocking(move || match rests {
            true => Ok(Outgoing::resting(mirror, images, choice)),
            false => Outgoing::new(mirror, images, choice),
        });
        let outgoing = outgoing.await.map_err(|errno| format!("cannot look for data: {errno}"))?;
        let (commands, obeyed) = mpsc::channel(8);
        let comparing = choice.compares;
        let first = Progress { phase: outgoing.phase(), dirty: 0, on_the_way: 0, comparing };
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
        let limit = self.mounts.limit().clone();
        let within = Within::keep(limit, &self.mirror, self.network.subscribe());
        *begun = Some(Begun { commands, seen, task, _within: within });
        Ok(())
    }

    /// What has been watched since QEMU is on the mounts says which segments are hot.
    fn choice(&self, to: &Destination) -> Choice {
        let (follow, parameters) = (self.setting.follow, &self.setting.parameters);
        let traffic: Vec<Traffic> =
            self.mirror.disks().iter().flat_map(|disk| disk.activity.traffic()).collect();
        let left = match to.handover_size {
            bytes @ 1.. if follow => bytes,
            _ => LEFT_FOR_STEP,
        };
        Choice {
            goal: Goal { left: left / parameters.block().bytes(), early: follow },
            strategy: match follow {
                true => parameters.busy(&traffic),
                false => Strategy::Whole,
            },
            weights: parameters.weights(),
            segment: parameters.segment(),
            transfer: parameters.transfer(),
            monitors: false,
            compares: to.compares || self.took_over,
        }
    }

    async fn cede(&self) -> Result<(), String> {
        let begun = self.begun.lock().await;
        let begun = begun.as_ref().ok_or("nothing is being sent")?;
        let gone = |_| "the transfer has ended".to_owned();
        begun.commands.send(Command::Cede).await.map_err(gone)
    }

    async fn go_in_step(&self) -> Result<(), String> {
        let begun = self.begun.lock().await;
        let begun = begun.as_ref().ok_or("nothing is being sent")?;
        // One that is not obeyed yet is as good.
        let _ = begun.commands.try_send(Command::GoInStep);
        Ok(())
    }

    fn limit(&self, limits: Limits) {
        self.network.send_replace(limits.network.map(BytesPerSec));
        let disk = self.mounts.limit();
        disk.hold_at_most(limits.held_at_most_ms.map(Duration::from_millis));
        disk.set(limits.disk.map(BytesPerSec));
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
        let dirty = dirty * self.setting.parameters.block().bytes();
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
        self.limit(Limits::default());
    }

    async fn finish(&self) -> Result<(), String> {
        if let Some(begun) = self.begun.lock().await.take() {
            begun.task.abort();
        }
        self.mounts.take_away().await
    }
}

impl Answers for Mover {
    async fn answer(&self, request: Request) -> Result<Reply, String> {
        let (mounts, setting) = (&self.mounts, &self.setting);
        match request {
            Request::BeginSwap { disk } => {
                mounts.with_server(setting, disk, |server, name| server.begin_swap(name)).await?;
            }
            Request::EndSwap { disk, on_mount } => {
                let end = |server: &Server, name: &OsStr| server.end_swap(name, on_mount);
                mounts.with_server(setting, disk, end).await?;
            }
            Request::Send(to) => self.send(to).await?,
            Request::Limit(limits) => self.limit(limits),
            Request::GoInStep => self.go_in_step().await?,
            Request::Progress => return Ok(Reply::Progress(self.report().await)),
            Request::Seal => self.seal().await?,
            Request::Stop => self.stop().await,
            Request::Cede => self.cede().await?,
            Request::Finish => self.finish().await?,
            Request::Own | Request::Settle => return Err(LEAVES.to_owned()),
        }
        Ok(Reply::Done)
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
