//! How a VM's QEMU begins and ends. Every step of a start has its undo; the end takes away all
//! that is left, whatever of it there is, and goes on past errors.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::ids::VmId;
use lifeboat_protocol::units::Bytes;

use super::definition::{Definition, Disk, DiskFormat, Image, Nic};
use super::running::Running;
use super::{Known, VmError, VmView, Vms, chain, files, host_files, taps};
use crate::qemu::launch::{Begin, DiskSpec, LaunchSpec, NicSpec, command_line};
use crate::qemu::process::QemuProcess;
use crate::qemu::qcow2;
use crate::qemu::qmp::{Qmp, RunState};
use crate::qemu::run_dir::{RunDir, SOCKET_PATH_BYTES_MAX};
use crate::qemu::tap;

/// How long QEMU may take to end after `quit`.
const QUIT_GRACE: Duration = Duration::from_secs(5);

/// The mark that something is being done with a VM; taken away when dropped.
struct Busy {
    vms: Vms,
    vm: VmId,
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.vms.inventory().busy.remove(&self.vm);
    }
}

impl Vms {
    /// Starts a defined VM and lets its guest run.
    ///
    /// # Errors
    /// When it is not defined, runs already, is not this host's, or QEMU does not want it.
    pub async fn start(&self, vm: &VmId) -> Result<VmView, VmError> {
        let definition = self.known(vm)?;
        self.must_not_run(vm)?;
        let generation = self.ownership.may_start(vm)?;
        let qmp = self.launch(definition, Begin::Boot).await?;
        qmp.cont().await?;
        self.running(vm)?.refresh(&qmp).await?;
        tracing::info!(%vm, %generation, "started");
        self.view(vm)
    }

    pub(super) fn known(&self, vm: &VmId) -> Result<Definition, VmError> {
        let inventory = self.inventory();
        let known = inventory.known.get(vm).map(|known| known.definition.clone());
        known.ok_or_else(|| VmError::Unknown(vm.clone()))
    }

    pub(super) fn must_not_run(&self, vm: &VmId) -> Result<(), VmError> {
        match self.running(vm) {
            Ok(running) => Err(VmError::Runs { vm: vm.clone(), pid: running.process.pid() }),
            Err(_) => Ok(()),
        }
    }

    /// Whether it could be started here as things are; nothing is set aside.
    pub(super) fn must_fit(&self, definition: &Definition) -> Result<(), VmError> {
        let (needed, free) = (definition.footprint(), self.memory_free());
        if needed > free {
            let (vm, total) = (definition.name.clone(), self.settings.memory);
            return Err(VmError::Memory { vm, needed, free, total });
        }
        self.spec(definition, Begin::Boot).map(drop)
    }

    /// Sets a VM's memory aside and keeps others from it.
    fn occupy(&self, vm: &VmId, needed: Bytes) -> Result<Busy, VmError> {
        let mut inventory = self.inventory();
        if inventory.busy.contains_key(vm) {
            return Err(VmError::Busy(vm.clone()));
        }
        let total = self.settings.memory;
        let free = total - inventory.memory_taken();
        if needed > free {
            return Err(VmError::Memory { vm: vm.clone(), needed, free, total });
        }
        inventory.busy.insert(vm.clone(), needed);
        Ok(Busy { vms: self.clone(), vm: vm.clone() })
    }

    /// Starts a QEMU whose guest stands. Nothing is left when it fails.
    pub(super) async fn launch(
        &self,
        definition: Definition,
        begin: Begin,
    ) -> Result<Qmp, VmError> {
        self.launch_on(definition, begin, &BTreeMap::new()).await
    }

    /// The same, with these disks, by number, opened elsewhere than where their images are.
    pub(super) async fn launch_on(
        &self,
        definition: Definition,
        begin: Begin,
        mounts: &BTreeMap<usize, PathBuf>,
    ) -> Result<Qmp, VmError> {
        let vm = definition.name.clone();
        self.must_not_run(&vm)?;
        // What a crash left of an earlier run goes first, and its memory with it.
        self.sweep(&vm, &definition).await;
        let _busy = self.occupy(&vm, definition.footprint())?;
        let definition = self.with_digests(definition)?;
        let mut spec = self.spec(&definition, begin)?;
        for (number, disk) in spec.disks.iter_mut().enumerate() {
            disk.mounted = mounts.get(&number).cloned();
        }
        let run_dir = self.run_dir(&vm)?;
        let launched = self.launch_prepared(&definition, &mut spec, &run_dir).await;
        if let Err(error) = &launched {
            tracing::warn!(%vm, error = chain(error), "not launched; taking away what there is");
            self.sweep(&vm, &definition).await;
        }
        launched
    }

    async fn launch_prepared(
        &self,
        definition: &Definition,
        spec: &mut LaunchSpec,
        run_dir: &RunDir,
    ) -> Result<Qmp, VmError> {
        let settings = &self.settings;
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| VmError::Directory { path, source }
        };
        run_dir.create(settings.user.uid, settings.user.gid).map_err(failed(run_dir.path()))?;
        let text = files::to_text(definition);
        std::fs::write(run_dir.definition(), text).map_err(failed(&run_dir.definition()))?;
        taps::create(definition, &settings.ovs, settings.user.uid).await?;
        let mut open = vec![];
        for (nic, name) in spec.nics.iter_mut().zip(taps::names(definition)) {
            let descriptor = tap::open(&name)
                .map_err(|source| VmError::OpenTap { tap: name.clone(), source })?;
            nic.tap = descriptor.as_raw_fd();
            open.push(descriptor);
        }
        let arguments = command_line(spec, run_dir);
        let process =
            QemuProcess::start_with(&settings.qemu, &arguments, settings.user, run_dir, open)?;
        let running = Arc::new(Running::new(definition.clone(), process, run_dir.clone()));
        // Known before it answers, so that whatever happens now, `sweep` finds it.
        self.inventory().running.insert(definition.name.clone(), Arc::clone(&running));
        Ok(running.qmp().await?)
    }

    /// With the digests of its images, so that wherever it goes it is the same kernel.
    fn with_digests(&self, mut definition: Definition) -> Result<Definition, VmError> {
        let directory = &self.settings.images_dir;
        for image in [&mut definition.firmware, &mut definition.kernel, &mut definition.initrd]
            .into_iter()
            .flatten()
        {
            if image.digest.is_none() {
                image.digest = Some(host_files::image_digest(directory, &image.name)?);
            }
        }
        Ok(definition)
    }

    fn run_dir(&self, vm: &VmId) -> Result<RunDir, VmError> {
        let run_dir = RunDir::new(&self.settings.run_dir, vm.as_str());
        let path = run_dir.serial_socket();
        match path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
            true => Ok(run_dir),
            false => Err(VmError::SocketPath { path }),
        }
    }

    fn spec(&self, definition: &Definition, begin: Begin) -> Result<LaunchSpec, VmError> {
        let settings = &self.settings;
        let image = |image: &Option<Image>| match image {
            Some(image) => host_files::image(&settings.images_dir, image).map(Some),
            None => Ok(None),
        };
        for disk in &definition.disks {
            host_files::on_its_storage(disk, &settings.storages)?;
        }
        let profile_arguments = match &definition.profile {
            Some(name) => host_files::profile(&settings.profiles_dir, name)?,
            None => vec![],
        };
        // The taps are opened when they have been made.
        let nic = |nic: &Nic| NicSpec { mac: nic.mac.clone(), tap: -1, mtu: nic.mtu };
        let nics = definition.nics.iter().map(nic);
        let disk = |disk: &Disk| {
            let path = settings.image_of(disk);
            Ok::<_, VmError>(DiskSpec {
                mounted: None,
                format: disk.format.as_str(),
                read_only: disk.read_only,
                nvram: disk.nvram,
                cdrom: disk.cdrom,
                // The overlay of a VM that is to arrive is not here yet; asked again at its launch.
                backing: match disk.format == DiskFormat::Qcow2 && path.exists() {
                    true => qcow2::backing_of(&path)?,
                    false => None,
                },
                path,
            })
        };
        let disks = definition.disks.iter().map(disk).collect::<Result<_, _>>()?;
        Ok(LaunchSpec {
            name: definition.name.to_string(),
            memory: definition.memory,
            vcpus: definition.vcpus,
            machine: definition.machine.clone(),
            cpu_model: definition.cpu_model.clone(),
            accelerator: settings.accelerator,
            firmware: image(&definition.firmware)?,
            kernel: image(&definition.kernel)?,
            initrd: image(&definition.initrd)?,
            kernel_arguments: definition.kernel_arguments.clone(),
            nics: nics.collect(),
            disks,
            profile_arguments,
            begin,
        })
    }

    /// Asks the guest to power down, and waits for it for at most `grace`.
    pub(super) async fn power_down(&self, vm: &VmId, grace: Duration) -> Result<(), VmError> {
        if self.view(vm)?.doing == super::Doing::Crashed {
            return Ok(());
        }
        let running = self.running(vm)?;
        if grace.is_zero() || running.state() != Some(RunState::Running) {
            return Ok(());
        }
        let qmp = running.qmp().await?;
        let mut events = qmp.events();
        qmp.system_powerdown().await?;
        let powered_down = async {
            while let Ok(event) = events.recv().await {
                if event.name == "SHUTDOWN" {
                    return;
                }
            }
        };
        if tokio::time::timeout(grace, powered_down).await.is_err() {
            tracing::warn!(%vm, ?grace, "the guest did not power down in time");
        }
        Ok(())
    }

    /// Ends the VM's QEMU and takes its taps and files away. Succeeds where nothing is left.
    ///
    /// # Errors
    /// The first thing that could not be taken away; the rest was tried all the same.
    pub async fn end(&self, vm: &VmId) -> Result<(), VmError> {
        let definition = match self.view(vm) {
            Ok(view) => view.definition,
            Err(_) => return Ok(()),
        };
        let _busy = self.occupy(vm, Bytes::ZERO)?;
        let errors = self.take_away(vm, &definition).await;
        for error in &errors {
            tracing::error!(%vm, error = chain(error), "something of an ended VM remains");
        }
        match errors.into_iter().next() {
            Some(first) => Err(first),
            None => Ok(()),
        }
    }

    async fn sweep(&self, vm: &VmId, definition: &Definition) {
        let there = RunDir::new(&self.settings.run_dir, vm.as_str()).path().exists();
        if !there && !self.inventory().running.contains_key(vm) {
            return;
        }
        for error in self.take_away(vm, definition).await {
            tracing::error!(%vm, error = chain(&error), "something of an ended VM remains");
        }
    }

    async fn take_away(&self, vm: &VmId, definition: &Definition) -> Vec<VmError> {
        let mut errors = vec![];
        let running = self.inventory().running.get(vm).cloned();
        if let Some(running) = running
            && let Err(error) = end_qemu(&running).await
        {
            // Its QEMU is still there: then its taps and its files stay too.
            return vec![error];
        }
        errors.extend(
            taps::remove(definition, &self.settings.ovs).await.into_iter().map(VmError::Tap),
        );
        let run_dir = RunDir::new(&self.settings.run_dir, vm.as_str());
        if let Err(source) = run_dir.remove() {
            errors.push(VmError::Directory { path: run_dir.path().into(), source });
        }
        let mut inventory = self.inventory();
        inventory.running.remove(vm);
        inventory.crashed.remove(vm);
        errors
    }

    /// Keeps the definition of a VM that arrives, for restarts of the agent and of the host.
    pub(super) fn keep(&self, definition: &Definition) -> Result<(), VmError> {
        let directory = &self.settings.arrived_dir;
        let path = directory.join(format!("{}.toml", definition.name));
        let failed = |source| VmError::Directory { path: path.clone(), source };
        std::fs::create_dir_all(directory).map_err(failed)?;
        let partial = path.with_extension("partial");
        write_durably(&partial, &files::to_text(definition)).map_err(failed)?;
        std::fs::rename(&partial, &path).map_err(failed)?;
        std::fs::File::open(directory).and_then(|dir| dir.sync_all()).map_err(failed)?;
        let known = Known { definition: definition.clone(), arrived: true };
        self.inventory().known.insert(definition.name.clone(), known);
        Ok(())
    }

    /// Forgets the definition of a VM that had arrived. An operator's file stays.
    pub(super) fn forget(&self, vm: &VmId) -> Result<(), VmError> {
        let path = self.settings.arrived_dir.join(format!("{vm}.toml"));
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (),
            Err(source) => return Err(VmError::Directory { path, source }),
            Ok(()) => (),
        }
        let operators = self.settings.vms_dir.join(format!("{vm}.toml"));
        let mut inventory = self.inventory();
        if inventory.known.get(vm).is_some_and(|known| known.arrived) {
            inventory.known.remove(vm);
            if let Ok(definition) = files::read(&operators)
                && definition.name == *vm
            {
                inventory.known.insert(vm.clone(), Known { definition, arrived: false });
            }
        }
        Ok(())
    }
}

fn write_durably(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write;
    let mut file = std::fs::File::create(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// `quit` where QEMU still listens, SIGKILL by its pidfd where it does not.
async fn end_qemu(running: &Running) -> Result<(), VmError> {
    if !running.process.is_alive() {
        return Ok(());
    }
    let asked = async {
        if let Ok(qmp) = running.qmp().await {
            let _ = qmp.quit().await;
        }
    };
    // A monitor that hangs must not keep us: then it is killed.
    let _ = tokio::time::timeout(QUIT_GRACE, asked).await;
    if running.process.end_within(QUIT_GRACE).await? {
        tracing::warn!(vm = %running.definition.name, "QEMU did not quit and was killed");
    }
    Ok(())
}
