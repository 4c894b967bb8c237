//! What a `lifeboat-disk move` is started with: a file beside its socket, so that the agent, or an
//! agent after it, can start the very same process again when it has died.
//!
//! ```text
//!   RUN_DIR/.disks/VM/          root's
//!       setting.json            this
//!       control  holder         sockets
//!       blocks                  a socket, of disks that arrive: connections of the source
//!       lock                    held by the one mover that serves, from its first moment to its last
//!       log                     what both processes say
//!       0/  1/ ..               mount points, one for each directory with images of the VM
//! ```
//!
//! Written by `client`, read by `mover`. Deliberately not here: secrets, which come by the socket.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use lifeboat_protocol::ids::VmId;
use serde::{Deserialize, Serialize};

use crate::disk::local::LocalDisk;
use crate::disk::parameters::Parameters;

/// Where the files of all movers are, beneath the agent's run directory. No VM's name begins with a
/// dot, so it is no VM's directory.
const FOLDER: &str = ".disks";

/// A directory with images, and where it is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountedFolder {
    /// With the images.
    pub images: PathBuf,
    /// The mount point.
    pub at: PathBuf,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServedDisk {
    /// Which of the folders it is in.
    pub folder: usize,
    /// Its file's name there.
    pub name: String,
    /// Its number among all disks of the VM.
    pub number: usize,
    /// `raw` or `qcow2`.
    pub format: String,
    /// The guest cannot write to it.
    pub read_only: bool,
}

/// What the process is started with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// The VM.
    pub vm: VmId,
    /// The directories with its images.
    pub folders: Vec<MountedFolder>,
    /// Its disks, by number.
    pub disks: Vec<ServedDisk>,
    /// Certificates; without, only loopback is reached.
    pub tls_dir: Option<PathBuf>,
    /// The disks may follow their VM.
    #[serde(default)]
    pub follow: bool,
    /// Of disks that arrive and may follow: where it is kept, durably, which blocks are missing.
    #[serde(default)]
    pub maps: Option<PathBuf>,
    /// Of disks that leave: how.
    #[serde(default)]
    pub parameters: Parameters,
}

/// Why a VM's disks cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum SettingError {
    /// A path that is no file in a directory.
    #[error("the disk {} is no file in a directory with a name in UTF-8", .0.display())]
    Path(PathBuf),
    /// The mirror tells disks apart by their names.
    #[error(
        "two disks of one VM are both called {0}, in different directories; give one another name"
    )]
    SameName(String),
    /// A file or directory of ours.
    #[error("the disk process cannot use {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It was not written by us.
    #[error("{} is no setting of a disk process", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// The proof that no other mover serves a VM, for as long as it is kept.
#[derive(Debug)]
pub struct Alone(#[expect(dead_code, reason = "it is kept, and closed at the end")] fs::File);

/// The directory of one VM's mover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder(PathBuf);

impl Folder {
    /// That of `vm` beneath the agent's run directory.
    #[must_use]
    pub fn new(run_dir: &Path, vm: &VmId) -> Self {
        Self(run_dir.join(FOLDER).join(vm.as_str()))
    }

    /// The one that holds the setting `file`.
    #[must_use]
    pub fn of_setting(file: &Path) -> Self {
        Self(file.parent().unwrap_or(Path::new("/")).to_owned())
    }

    /// The VMs for which there is one, of whatever age.
    #[must_use]
    pub fn all(run_dir: &Path) -> Vec<VmId> {
        let entries = fs::read_dir(run_dir.join(FOLDER)).into_iter().flatten().flatten();
        entries.filter_map(|entry| VmId::new(entry.file_name().to_str()?).ok()).collect()
    }

    /// Itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What the process was started with.
    #[must_use]
    pub fn setting(&self) -> PathBuf {
        self.0.join("setting.json")
    }

    /// Makes the calling process the mover of this VM; `None` while there is another, be it one that
    /// does not listen yet or one that was killed and is still ending.
    ///
    /// # Errors
    /// When the lock's file cannot be used.
    pub fn take(&self) -> Result<Option<Alone>, SettingError> {
        let path = self.0.join("lock");
        let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let locked = file.and_then(|file| match file.try_lock() {
            Ok(()) => Ok(Some(Alone(file))),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(source)) => Err(source),
        });
        locked.map_err(|source| SettingError::File { path, source })
    }

    /// Where it listens.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.0.join("control")
    }

    /// Where one of disks that arrive takes connections of their source.
    #[must_use]
    pub fn blocks(&self) -> PathBuf {
        self.0.join("blocks")
    }

    /// Where its holder listens.
    #[must_use]
    pub fn holder(&self) -> PathBuf {
        self.0.join("holder")
    }

    /// What both say.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    /// Makes it, with the mount points and the setting for `disks`.
    ///
    /// # Errors
    /// When it is there already, or an image's path cannot be served.
    pub fn create(
        &self,
        vm: &VmId,
        disks: &[LocalDisk],
        tls_dir: Option<&Path>,
    ) -> Result<Setting, SettingError> {
        self.make(self.setting_for(vm, disks, tls_dir)?)
    }

    /// Makes it, with the mount points and this setting.
    ///
    /// # Errors
    /// When it is there already.
    pub(super) fn make(&self, setting: Setting) -> Result<Setting, SettingError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| SettingError::File { path, source }
        };
        let parent = self.0.parent().unwrap_or(Path::new("/"));
        // QEMU's user passes through to the mount points.
        fs::create_dir_all(parent).and_then(|()| open(parent)).map_err(failed(parent))?;
        let mount_points = setting.folders.iter().map(|folder| folder.at.as_path());
        for path in std::iter::once(self.path()).chain(mount_points) {
            fs::create_dir(path).and_then(|()| open(path)).map_err(failed(path))?;
        }
        let path = self.setting();
        let text = serde_json::to_vec_pretty(&setting)
            .map_err(|source| SettingError::Malformed { path: path.clone(), source })?;
        fs::write(&path, text).map_err(failed(&path))?;
        Ok(setting)
    }

    /// The setting for `disks`.
    ///
    /// # Errors
    /// When an image's path cannot be served.
    pub(super) fn setting_for(
        &self,
        vm: &VmId,
        disks: &[LocalDisk],
        tls_dir: Option<&Path>,
    ) -> Result<Setting, SettingError> {
        let mut setting = Setting {
            vm: vm.clone(),
            folders: vec![],
            disks: vec![],
            tls_dir: tls_dir.map(Path::to_owned),
            follow: false,
            maps: None,
            parameters: Parameters::default(),
        };
        for disk in disks {
            let bad = || SettingError::Path(disk.path.clone());
            let name = disk.path.file_name().and_then(|name| name.to_str()).ok_or_else(bad)?;
            let parent = disk.path.parent().ok_or_else(bad)?;
            if setting.disks.iter().any(|other| other.name == name) {
                return Err(SettingError::SameName(name.to_owned()));
            }
            let known = setting.folders.iter().position(|folder| folder.images == parent);
            let folder = known.unwrap_or_else(|| {
                let at = self.0.join(setting.folders.len().to_string());
                setting.folders.push(MountedFolder { images: parent.to_owned(), at });
                setting.folders.len() - 1
            });
            setting.disks.push(ServedDisk {
                folder,
                name: name.to_owned(),
                number: disk.number,
                format: disk.format.clone(),
                read_only: disk.read_only,
            });
        }
        Ok(setting)
    }

    /// What the process was started with; `None` when there is none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self) -> Result<Option<Setting>, SettingError> {
        let path = self.setting();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(SettingError::File { path, source }),
        };
        let setting = serde_json::from_slice(&text);
        setting.map(Some).map_err(|source| SettingError::Malformed { path, source })
    }

    /// Takes it away. Never follows into a mount: the mount points must be free.
    ///
    /// # Errors
    /// When something of it is still mounted or cannot be removed.
    pub fn remove(&self) -> Result<(), SettingError> {
        let failed = |path: PathBuf| move |source| SettingError::File { path, source };
        for folder in self.read()?.map(|setting| setting.folders).unwrap_or_default() {
            match fs::remove_dir(&folder.at) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                outcome => outcome.map_err(failed(folder.at))?,
            }
        }
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            outcome => outcome.map_err(failed(self.0.clone())),
        }
    }
}

/// The umask may have taken bits away.
fn open(folder: &Path) -> io::Result<()> {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
}

impl Setting {
    /// Where `disk` is: natively, and on its mount.
    #[must_use]
    pub fn paths(&self, disk: &ServedDisk) -> (PathBuf, PathBuf) {
        let folder = self.folders.get(disk.folder);
        let below =
            |of: fn(&MountedFolder) -> &Path| folder.map_or(Path::new("/"), of).join(&disk.name);
        (below(|folder| &folder.images), below(|folder| &folder.at))
    }

    /// Where a read of each disk is answered, by the disk's number among all disks of the VM.
    #[must_use]
    pub fn mounted(&self) -> std::collections::BTreeMap<usize, PathBuf> {
        self.disks.iter().map(|disk| (disk.number, self.paths(disk).1)).collect()
    }

    /// The images that the guest could write.
    #[must_use]
    pub fn writable_images(&self) -> Vec<PathBuf> {
        let writable = self.disks.iter().filter(|disk| !disk.read_only);
        writable.map(|disk| self.paths(disk).0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::parameters::Numbers;

    fn vm() -> VmId {
        VmId::new("web").unwrap()
    }

    fn disks(paths: &[&str]) -> Vec<LocalDisk> {
        let disk = |(number, path): (usize, &&str)| LocalDisk {
            number,
            path: (*path).into(),
            format: "raw".into(),
            read_only: number == 2,
        };
        paths.iter().enumerate().map(disk).collect()
    }

    #[test]
    fn disks_of_one_directory_share_a_mount_and_the_setting_comes_back() {
        let run_dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(run_dir.path(), &vm());
        assert_eq!(folder.read().unwrap(), None);
        let images = disks(&["/d/a", "/e/b", "/d/c"]);
        let setting = folder.create(&vm(), &images, None).unwrap();
        assert_eq!(setting.folders.len(), 2);
        let through = |number: usize| setting.paths(&setting.disks[number]).1;
        assert_eq!(through(2), folder.path().join("0/c"));
        assert_eq!(through(1), folder.path().join("1/b"));
        assert_eq!(setting.writable_images(), ["/d/a", "/e/b"].map(PathBuf::from));
        assert_eq!(folder.read().unwrap(), Some(setting));
        assert_eq!(Folder::all(run_dir.path()), [vm()]);
        assert!(matches!(folder.create(&vm(), &images, None), Err(SettingError::File { .. })));
        folder.remove().unwrap();
        assert!(!folder.path().exists());
        folder.remove().unwrap();
    }

    #[test]
    fn what_was_chosen_comes_back_and_a_setting_without_it_has_what_was_before() {
        let run_dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(run_dir.path(), &vm());
        let mut setting = folder.setting_for(&vm(), &disks(&["/d/a"]), None).unwrap();
        let numbers = Numbers { block_size: Some(16 << 10), ..Numbers::default() };
        setting.parameters = numbers.try_into().unwrap();
        folder.make(setting.clone()).unwrap();
        assert_eq!(folder.read().unwrap().unwrap(), setting);
        let mut older: serde_json::Value =
            serde_json::from_slice(&fs::read(folder.setting()).unwrap()).unwrap();
        older.as_object_mut().unwrap().remove("parameters").unwrap();
        fs::write(folder.setting(), older.to_string()).unwrap();
        let found = folder.read().unwrap().unwrap();
        assert_eq!(found, Setting { parameters: Parameters::default(), ..setting });
    }

    #[test]
    fn a_vm_has_one_mover_at_a_time() {
        let run_dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(run_dir.path(), &vm());
        assert!(folder.take().is_err(), "it is not there");
        folder.create(&vm(), &disks(&["/d/a"]), None).unwrap();
        let first = folder.take().unwrap();
        assert!(first.is_some() && folder.take().unwrap().is_none());
        drop(first);
        assert!(folder.take().unwrap().is_some());
    }

    #[test]
    fn images_that_cannot_be_told_apart_are_refused_before_anything_is_made() {
        let run_dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(run_dir.path(), &vm());
        let said =
            |images: &[&str]| folder.create(&vm(), &disks(images), None).unwrap_err().to_string();
        assert!(said(&["/d/a", "/e/a"]).contains("both called a"));
        assert!(said(&["/"]).contains("no file"));
        assert!(!folder.path().exists());
    }
}
