//! The VMs of this host: which there are, which run, how they start and end.
//!
//! ```text
//!   definitions (operator's files, arrivals)  --start/arrive-->  running --stop/end--> gone
//!                                                 ^                 |
//!                            agent restarts: adopt'-----------------'-- QEMU gone: crashed
//! ```
//!
//! Used by the gRPC server, and through [`crate::guests::Guests`] by migrations. A QEMU outlives
//! the agent; what a restarted agent needs to find it again is in its run directory. Whether a VM
//! *may* start is asked of [`ownership`] each time; nothing here changes who owns it.
//!
//! Migration, and the choice of what runs where, are not here.

pub mod bases;
pub mod definition;
pub mod files;
mod guests;
pub mod host_files;
mod lifecycle;
pub mod ownership;
pub mod pinned;
mod running;
pub mod taps;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lifeboat_protocol::ids::VmId;
use lifeboat_protocol::units::Bytes;

use crate::programs::ProgramError;
use crate::qemu::launch::Accelerator;
use crate::qemu::process::{ProcessError, QemuProcess, User};
use crate::qemu::qcow2::Qcow2Error;
use crate::qemu::qmp::{QmpError, RunState};
use crate::qemu::run_dir::RunDir;
use definition::{Definition, DefinitionError, Disk};
use files::VmFileError;
use host_files::{HostFileError, Storage};
use ownership::{Ownership, OwnershipRefusal};
pub use running::MonitorError;
use running::Running;

/// Whether a hand-over is settled that an autostart waits for is looked at so often.
const SETTLED_EVERY: Duration = Duration::from_secs(1);

/// What the VMs of a host need of it.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The operator's definitions, `*.toml`.
    pub vms_dir: PathBuf,
    /// Definitions of VMs that arrived.
    pub arrived_dir: PathBuf,
    /// Run-time files; does not survive a reboot.
    pub run_dir: PathBuf,
    /// Kernels and initial RAM disks.
    pub images_dir: PathBuf,
    /// Argument profiles.
    pub profiles_dir: PathBuf,
    /// Where disks arrive; the first is where those are that a definition gives a name only.
    pub disk_dirs: Vec<PathBuf>,
    /// Storages that other hosts reach too.
    pub storages: Vec<Storage>,
    /// The QEMU program.
    pub qemu: PathBuf,
    /// Whom QEMU runs as.
    pub user: User,
    /// How guests' instructions are run.
    pub accelerator: Accelerator,
    /// This host's Open vSwitch.
    pub ovs: taps::Ovs,
    /// For VMs, with QEMU's overhead.
    pub memory: Bytes,
}

impl Settings {
    /// Where a disk's image is on this host.
    #[must_use]
    pub fn image_of(&self, disk: &Disk) -> PathBuf {
        crate::disk::rooms::place(&self.disk_dirs, &disk.path)
    }
}

/// Why something could not be done with a VM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// There is no such VM.
    #[error("VM `{0}` is not defined on this host; `lifeboat vms` lists those that are")]
    Unknown(VmId),
    /// Its QEMU is there already.
    #[error("VM `{vm}` runs already (QEMU is process {pid})")]
    Runs {
        /// The VM.
        vm: VmId,
        /// Its process.
        pid: u32,
    },
    /// It has no QEMU.
    #[error("VM `{0}` does not run on this host")]
    DoesNotRun(VmId),
    /// Something else is being done with it.
    #[error("VM `{0}` is being started or ended at this moment; ask again")]
    Busy(VmId),
    /// Not enough memory.
    #[error(
        "VM `{vm}` needs {needed} with QEMU's own, and {free} of {total} are free on this host"
    )]
    Memory {
        /// The VM.
        vm: VmId,
        /// What it needs.
        needed: Bytes,
        /// What is free.
        free: Bytes,
        /// What there is.
        total: Bytes,
    },
    /// This host may not start it.
    #[error(transparent)]
    Ownership(#[from] OwnershipRefusal),
    /// Its definition is not allowed.
    #[error("the definition is refused: {0}")]
    Definition(#[from] DefinitionError),
    /// A definition file.
    #[error(transparent)]
    File(#[from] VmFileError),
    /// An image, profile or storage.
    #[error(transparent)]
    HostFile(#[from] HostFileError),
    /// What an overlay lies on.
    #[error(transparent)]
    Overlay(#[from] Qcow2Error),
    /// A directory or file of ours.
    #[error("cannot use {}", path.display())]
    Directory {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A socket's path is too long for the kernel.
    #[error("{} is longer than 107 bytes, too long for a socket: choose a shorter run_dir", path.display())]
    SocketPath {
        /// The path.
        path: PathBuf,
    },
    /// A tap.
    #[error("the VM's network cannot be set up or taken down")]
    Tap(#[from] ProgramError),
    /// A tap that was made cannot be opened.
    #[error("tap `{tap}` cannot be opened; is the kernel's tun module there?")]
    OpenTap {
        /// The tap.
        tap: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Its process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// Its monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
}

impl From<QmpError> for VmError {
    fn from(error: QmpError) -> Self {
        Self::Monitor(error.into())
    }
}

/// What a VM does on this host, by its process alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    /// It has a QEMU; what its guest does, where that is known.
    Runs(Option<RunState>),
    /// No QEMU, and none is missing.
    Stopped,
    /// Its QEMU has gone without being asked.
    Crashed,
}

/// A VM of this host as it stands.
#[derive(Debug, Clone)]
pub struct VmView {
    /// What it is.
    pub definition: Definition,
    /// What it does.
    pub doing: Doing,
    /// Its QEMU.
    pub pid: Option<u32>,
    /// Its QEMU's version; empty when not known.
    pub qemu_version: String,
}

struct Known {
    definition: Definition,
    /// It came from another host; its file is ours to remove.
    arrived: bool,
}

#[derive(Default)]
struct Inventory {
    known: BTreeMap<VmId, Known>,
    running: BTreeMap<VmId, Arc<Running>>,
    /// Their QEMU was gone when the agent started.
    crashed: BTreeSet<VmId>,
    /// Being started or ended, with what that takes of the memory.
    busy: BTreeMap<VmId, Bytes>,
    /// Set aside for others' pages, by migration.
    set_aside: BTreeMap<String, Bytes>,
}

/// The VMs of this host. Cheap to clone.
#[derive(Clone)]
pub struct Vms {
    settings: Arc<Settings>,
    ownership: Arc<dyn Ownership>,
    inventory: Arc<Mutex<Inventory>>,
}

impl Vms {
    /// Reads every definition, and finds the QEMUs again that run already.
    ///
    /// # Errors
    /// When a definition cannot be used, or a directory cannot be read.
    pub async fn open(settings: Settings, ownership: Arc<dyn Ownership>) -> Result<Self, VmError> {
        let mut inventory = Inventory::default();
        for (directory, arrived) in [(&settings.vms_dir, false), (&settings.arrived_dir, true)] {
            for definition in definitions_in(directory)? {
                // What arrived is as it runs; an operator's file of the same name is older.
                inventory.known.insert(definition.name.clone(), Known { definition, arrived });
            }
        }
        let vms = Self {
            settings: Arc::new(settings),
            ownership,
            inventory: Arc::new(Mutex::new(inventory)),
        };
        vms.adopt_all().await?;
        Ok(vms)
    }

    /// The settings that the VMs were opened with.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    fn inventory(&self) -> MutexGuard<'_, Inventory> {
        self.inventory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn adopt_all(&self) -> Result<(), VmError> {
        let root = &self.settings.run_dir;
        let failed = |source| VmError::Directory { path: root.clone(), source };
        std::fs::create_dir_all(root).map_err(failed)?;
        for entry in std::fs::read_dir(root).map_err(failed)?.flatten() {
            let Some(vm) = entry.file_name().to_str().and_then(|name| VmId::new(name).ok()) else {
                continue;
            };
            self.adopt(vm).await;
        }
        Ok(())
    }

    /// Takes up one QEMU that an agent before us started. What cannot be taken up is told and
    /// left alone: a guest that runs is worth more than a tidy list.
    async fn adopt(&self, vm: VmId) {
        let run_dir = RunDir::new(&self.settings.run_dir, vm.as_str());
        let definition = match files::read(&run_dir.definition()) {
            Ok(definition) if definition.name == vm => definition,
            Ok(_) => return tracing::error!(%vm, "its run directory holds another VM's definition"),
            Err(error) => return tracing::error!(%vm, %error, "its run directory is not readable"),
        };
        let process = match QemuProcess::adopt(&run_dir) {
            Ok(Some(process)) => process,
            Ok(None) => {
                tracing::warn!(%vm, "its QEMU has gone while no agent ran");
                let mut inventory = self.inventory();
                inventory.crashed.insert(vm.clone());
                // No file defines it any more, or none did yet: then it came with an arrival.
                inventory.known.entry(vm).or_insert(Known { definition, arrived: true });
                return;
            }
            Err(error) => return tracing::error!(%vm, %error, "its QEMU could not be adopted"),
        };
        let pid = process.pid();
        let running = Arc::new(Running::new(definition, process, run_dir));
        match running.qmp().await {
            Ok(_) => tracing::info!(%vm, pid, "adopted"),
            Err(error) => tracing::error!(%vm, pid, %error, "adopted, but its monitor is silent"),
        }
        self.inventory().running.insert(vm, running);
    }

    /// Every VM that this host knows, in the order of their names.
    #[must_use]
    pub fn list(&self) -> Vec<VmView> {
        let inventory = self.inventory();
        let names: BTreeSet<&VmId> =
            inventory.known.keys().chain(inventory.running.keys()).collect();
        names.into_iter().filter_map(|vm| inventory.view(vm)).collect()
    }

    /// One VM.
    ///
    /// # Errors
    /// When this host does not know it.
    pub fn view(&self, vm: &VmId) -> Result<VmView, VmError> {
        self.inventory().view(vm).ok_or_else(|| VmError::Unknown(vm.clone()))
    }

    /// Keeps memory from VMs because a migration's store needs it. What was set aside for it before
    /// is given back.
    ///
    /// # Errors
    /// With what is free, where that is too little.
    pub fn set_aside(&self, migration: &str, memory: Bytes) -> Result<(), Bytes> {
        let mut inventory = self.inventory();
        let before = inventory.set_aside.remove(migration);
        let free = self.settings.memory - inventory.memory_taken();
        if memory > free {
            inventory.set_aside.extend(before.map(|before| (migration.to_owned(), before)));
            return Err(free);
        }
        inventory.set_aside.insert(migration.to_owned(), memory);
        Ok(())
    }

    /// The opposite of [`Self::set_aside`]; again is the same.
    pub fn give_back(&self, migration: &str) {
        self.inventory().set_aside.remove(migration);
    }

    /// Memory that is free for VMs: the configured total less what runs or is arriving, with
    /// QEMU's own overhead, and less what is set aside for stores.
    #[must_use]
    pub fn memory_free(&self) -> Bytes {
        self.settings.memory - self.inventory().memory_taken()
    }

    fn running(&self, vm: &VmId) -> Result<Arc<Running>, VmError> {
        let inventory = self.inventory();
        let running = inventory.running.get(vm).filter(|running| running.process.is_alive());
        running.cloned().ok_or_else(|| VmError::DoesNotRun(vm.clone()))
    }

    /// The process of the VM's QEMU and the names of its taps, for measuring.
    ///
    /// # Errors
    /// When it does not run here.
    pub fn process(&self, vm: &VmId) -> Result<(u32, Definition), VmError> {
        let running = self.running(vm)?;
        Ok((running.process.pid(), running.definition.clone()))
    }

    /// Starts every VM that is marked so, once after each boot of the host. One that cannot be
    /// started does not keep the others from it.
    pub async fn autostart(&self) {
        let mut waiting: Vec<VmId> = {
            let inventory = self.inventory();
            let marked = inventory.known.iter().filter(|(_, known)| known.definition.autostart);
            marked.map(|(vm, _)| vm.clone()).collect()
        };
        loop {
            let mut unsettled = vec![];
            for vm in waiting {
                match self.start(&vm).await {
                    Ok(_) | Err(VmError::Runs { .. }) => (),
                    // Its hand-over is being taken up again: the power went while it was leaving, and
                    // it may stay.
                    Err(VmError::Ownership(OwnershipRefusal::Unsettled { .. })) => {
                        tracing::debug!(%vm, "not autostarted before its hand-over is settled");
                        unsettled.push(vm);
                    }
                    Err(error) => tracing::error!(%vm, error = chain(&error), "not autostarted"),
                }
            }
            if unsettled.is_empty() {
                return;
            }
            waiting = unsettled;
            tokio::time::sleep(SETTLED_EVERY).await;
        }
    }

    /// Ends a VM: asks its guest to power down, and ends QEMU when it has or when `grace` is over.
    ///
    /// # Errors
    /// When it does not run here, or something of it could not be taken away.
    pub async fn stop(&self, vm: &VmId, grace: Duration) -> Result<VmView, VmError> {
        self.power_down(vm, grace).await?;
        self.end(vm).await?;
        self.view(vm)
    }
}

impl Inventory {
    fn view(&self, vm: &VmId) -> Option<VmView> {
        let running = self.running.get(vm);
        let alive = running.filter(|running| running.process.is_alive());
        let doing = match (alive, running) {
            (Some(alive), _) => Doing::Runs(alive.state()),
            (None, Some(_)) => Doing::Crashed,
            (None, None) if self.crashed.contains(vm) => Doing::Crashed,
            (None, None) => Doing::Stopped,
        };
        let known = self.known.get(vm).map(|known| &known.definition);
        let definition = running.map(|running| &running.definition).or(known)?.clone();
        Some(VmView {
            definition,
            doing,
            pid: alive.map(|alive| alive.process.pid()),
            qemu_version: alive.map(|alive| alive.version()).unwrap_or_default(),
        })
    }

    fn memory_taken(&self) -> Bytes {
        let running = self.running.iter().filter(|(vm, _)| !self.busy.contains_key(*vm));
        let running: Bytes = running.map(|(_, running)| running.definition.footprint()).sum();
        running + self.busy.values().copied().sum() + self.set_aside.values().copied().sum()
    }
}

fn definitions_in(directory: &Path) -> Result<Vec<Definition>, VmError> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(source) => return Err(VmError::Directory { path: directory.into(), source }),
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    paths.iter().map(|path| files::read(path).map_err(VmError::from)).collect()
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
