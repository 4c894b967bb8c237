//! Two images on a real disk and three ways to them: natively, through `lifeboat-disk move`, and
//! through bindfs.
//!
//! Deliberately not here: an agent, QMP, a destination. The mover is told to send nothing, so it marks
//! what changes, as it does from the first moment.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lifeboat_agent::disk::local::LocalDisk;
use lifeboat_agent::disk::parameters::Parameters;
use lifeboat_agent::disk::process::client::{ANSWER_LIMIT, Mover, Movers};
use lifeboat_agent::disk::process::control::{Limits, Request};
use lifeboat_protocol::ids::VmId;

use super::Setting;
use crate::chance::Chance;
use crate::clock;
use crate::rig::RigError;
use crate::rig::private::built;
use crate::rig::program::{Running, run, words};

/// The image that fio loads, bytes.
pub(super) const IMAGE_BYTES: u64 = 2 << 30;
/// The one with bonnie++'s file system: its file and half as much.
const FILE_SYSTEM_BYTES: u64 = super::BONNIE_MIB << 20 | (super::BONNIE_MIB / 2) << 20;
const IMAGE: &str = "disk.raw";
const FILE_SYSTEM: &str = "bonnie.raw";
const MOUNTED_WITHIN: Duration = Duration::from_secs(10);

/// How an image is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Native,
    Swapped,
    Mirror,
}

impl Way {
    pub(super) const ALL: [Self; 3] = [Self::Native, Self::Swapped, Self::Mirror];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Swapped => "swapped",
            Self::Mirror => "plain FUSE mirror",
        }
    }
}

/// Both images and whoever serves them.
pub(super) struct Rig {
    mover: Mover,
    bindfs: Running,
    at: PathBuf,
    images: tempfile::TempDir,
}

impl Rig {
    /// Fills the images beside the record, because O_DIRECT says nothing on a file system in memory,
    /// and mounts their folder twice.
    ///
    /// # Errors
    /// When a program is missing, or a mount is refused.
    pub(super) async fn raise(setting: &Setting<'_>) -> Result<Self, RigError> {
        let images = images(setting)?;
        fill(&images.path().join(IMAGE), IMAGE_BYTES)?;
        let file_system = images.path().join(FILE_SYSTEM);
        fill(&file_system, FILE_SYSTEM_BYTES)?;
        // All of it is written now, not by the guest's kernel while it is measured.
        let now = "mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0,nodiscard";
        run(words(now).arg(&file_system))?;
        run(words("sync -f").arg(&file_system))?;
        let mover = serve(setting, images.path(), &[IMAGE, FILE_SYSTEM]).await?;
        let at = setting.folder.join("mirror");
        let bindfs = mirror(images.path(), &at, &setting.folder.join("bindfs.log"))?;
        Ok(Self { mover, bindfs, at, images })
    }

    fn path(&self, way: Way, name: &str) -> PathBuf {
        match way {
            Way::Native => self.images.path().join(name),
            Way::Swapped => on_mount(&self.mover, name),
            Way::Mirror => self.at.join(name),
        }
    }

    /// What fio loads.
    pub(super) fn image(&self, way: Way) -> PathBuf {
        self.path(way, IMAGE)
    }

    /// What bonnie++'s file system is in.
    pub(super) fn file_system(&self, way: Way) -> PathBuf {
        self.path(way, FILE_SYSTEM)
    }

    /// Sets how many bytes a second may be changed through our mount.
    ///
    /// # Errors
    /// When the mover does not answer.
    pub(super) async fn limit(&mut self, disk: Option<u64>) -> Result<(), RigError> {
        let limits = Request::Limit(Limits { disk, ..Limits::default() });
        let asked = self.mover.ask(&limits, ANSWER_LIMIT).await;
        asked.map(drop).map_err(RigError::refused("a limit"))
    }

    /// Unmounts.
    ///
    /// # Errors
    /// When somebody still uses a mount.
    pub(super) async fn end(self) -> Result<(), RigError> {
        let Self { mover, bindfs, at, images } = self;
        mover.finish().await.map_err(RigError::refused("the end of a mover"))?;
        run(words("umount").arg(&at))?;
        drop((bindfs, images));
        Ok(())
    }
}

/// A folder for images, on the disk that the record lies on.
///
/// # Errors
/// When it cannot be made.
pub(super) fn images(setting: &Setting<'_>) -> Result<tempfile::TempDir, RigError> {
    let beside = setting.partial.parent().unwrap_or(Path::new("."));
    let beside = std::fs::canonicalize(beside).map_err(RigError::io("no folder for images"))?;
    tempfile::tempdir_in(beside).map_err(RigError::io("cannot make a folder for images"))
}

/// A file of `bytes` in which nothing is zero and everything has its place on the disk.
///
/// # Errors
/// When it cannot be written.
pub(super) fn fill(path: &Path, bytes: u64) -> Result<(), RigError> {
    const PIECE: usize = 4 << 20;
    let failed = || RigError::io("cannot fill an image");
    let mut chance = Chance::from_seed(bytes);
    let piece: Vec<u8> = (0..PIECE).map(|_| chance.below(255) as u8 + 1).collect();
    let mut file = File::create_new(path).map_err(failed())?;
    for _ in 0..bytes / PIECE as u64 {
        file.write_all(&piece).map_err(failed())?;
    }
    file.sync_all().map_err(failed())
}

/// `lifeboat-disk hold` and `move` for the images `names` of one VM.
///
/// # Errors
/// When they do not serve.
pub(super) async fn serve(
    setting: &Setting<'_>,
    images: &Path,
    names: &[&str],
) -> Result<Mover, RigError> {
    let disk = |(number, name): (usize, &&str)| LocalDisk {
        number,
        path: images.join(name),
        format: "raw".to_owned(),
        read_only: false,
    };
    let disks: Vec<LocalDisk> = names.iter().enumerate().map(disk).collect();
    let program = built("lifeboat-disk")?;
    let parameters = Parameters::default();
    let movers = Movers { run_dir: setting.folder.to_owned(), program, tls_dir: None, parameters };
    let vm = VmId::new("measured").map_err(RigError::refused("a name"))?;
    movers.start(&vm, &disks).await.map_err(RigError::refused("a mover"))
}

/// Where image `name` is on the mover's mount.
pub(super) fn on_mount(mover: &Mover, name: &str) -> PathBuf {
    let setting = mover.setting();
    let disk = setting.disks.iter().find(|disk| disk.name == name);
    disk.map_or_else(|| PathBuf::from(name), |disk| setting.paths(disk).1)
}

fn mirror(images: &Path, at: &Path, log: &Path) -> Result<Running, RigError> {
    std::fs::create_dir_all(at).map_err(RigError::io("cannot make a mount point"))?;
    let mut command = words("bindfs -f --multithreaded --forward-odirect=512 -o big_writes");
    let mut bindfs = Running::start(command.arg(images).arg(at), log)?;
    let is_mounted = || {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        mounts.lines().any(|line| line.split(' ').nth(1).map(OsStr::new) == Some(at.as_os_str()))
    };
    let mounted =
        clock::wait_for(MOUNTED_WITHIN, || (is_mounted() || bindfs.has_ended()).then_some(()));
    match mounted {
        Some(()) if is_mounted() => Ok(bindfs),
        Some(()) => {
            let said = std::fs::read_to_string(log).unwrap_or_default();
            Err(RigError::refused("bindfs' mount")(said))
        }
        None => Err(RigError::TooLate {
            what: "bindfs' mount".to_owned(),
            seconds: MOUNTED_WITHIN.as_secs(),
        }),
    }
}
