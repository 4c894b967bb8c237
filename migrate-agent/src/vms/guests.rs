//! The VMs of this host as migrations see them: [`Guests`] on top of [`Vms`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use futures_util::future::BoxFuture;
use lifeboat_protocol::agent::VmDefinition;
use lifeboat_protocol::ids::VmId;

use super::definition::Definition;
use super::{VmError, Vms};
use crate::guests::{Arrival, GuestError, Guests};
use crate::qemu::launch::{Begin, ram_under};
use crate::qemu::qmp::Qmp;
use crate::qemu::ram::Ram;
use crate::qemu::rescue;
use crate::qemu::run_dir::{RunDir, SOCKET_PATH_BYTES_MAX};

fn while_doing(vm: &VmId, doing: &'static str) -> impl Fn(VmError) -> GuestError {
    let vm = vm.clone();
    move |error| GuestError { vm: vm.clone(), doing, source: Box::new(error) }
}

/// An unusable name is told by the definition's own check; an error needs some name.
fn name_of(definition: &VmDefinition) -> VmId {
    VmId::new(definition.name.as_str())
        .or_else(|_| VmId::new("unnamed"))
        .unwrap_or_else(|_| unreachable!("a constant that is a name"))
}

impl Vms {
    async fn take_in(
        &self,
        message: &VmDefinition,
        arrival: Arrival,
        mounts: &BTreeMap<usize, PathBuf>,
    ) -> Result<Qmp, VmError> {
        let definition = Definition::try_from(message.clone())?;
        self.must_not_run(&definition.name)?;
        let begin = match arrival {
            Arrival::Stream => Begin::Incoming,
            Arrival::Cold => Begin::Boot,
        };
        let qmp = self.launch_on(definition.clone(), begin, mounts).await?;
        // Kept only now: an arrival that cannot even start leaves no trace.
        if let Err(error) = self.keep(&definition) {
            self.end(&definition.name).await?;
            return Err(error);
        }
        Ok(qmp)
    }
}

impl Guests for Vms {
    fn definition(&self, vm: &VmId) -> Option<VmDefinition> {
        self.view(vm).ok().map(|view| VmDefinition::from(&view.definition))
    }

    fn qmp<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<Qmp, GuestError>> {
        Box::pin(async move {
            let qmp = async { Ok(self.running(vm)?.qmp().await?) };
            qmp.await.map_err(while_doing(vm, "reach its monitor"))
        })
    }

    fn lives(&self, vm: &VmId) -> bool {
        self.running(vm).is_ok()
    }

    fn socket_path(&self, vm: &VmId, name: &str) -> Result<PathBuf, GuestError> {
        let path = RunDir::new(&self.settings.run_dir, vm.as_str()).io(name);
        match path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
            true => Ok(path),
            false => Err(while_doing(vm, "place a socket")(VmError::SocketPath { path })),
        }
    }

    fn grant(&self, vm: &VmId, path: &Path) -> Result<(), GuestError> {
        let user = self.settings.user;
        // The directory is QEMU's: what it may have put there in the socket's place is not followed.
        std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid)).map_err(|source| {
            while_doing(vm, "grant QEMU a socket")(VmError::Directory { path: path.into(), source })
        })
    }

    fn could_arrive(&self, definition: &VmDefinition) -> Result<(), GuestError> {
        let vm = name_of(definition);
        let could = || {
            let definition = Definition::try_from(definition.clone())?;
            self.must_not_run(&definition.name)?;
            self.must_fit(&definition)
        };
        could().map_err(while_doing(&vm, "take it in"))
    }

    fn arrive<'a>(
        &'a self,
        definition: &'a VmDefinition,
        arrival: Arrival,
        mounts: &'a BTreeMap<usize, PathBuf>,
    ) -> BoxFuture<'a, Result<Qmp, GuestError>> {
        Box::pin(async move {
            let vm = name_of(definition);
            self.take_in(definition, arrival, mounts).await.map_err(while_doing(&vm, "take it in"))
        })
    }

    fn memory(&self, vm: &VmId) -> Result<Ram, GuestError> {
        let doing = "read its memory";
        let (pid, definition) = self.process(vm).map_err(while_doing(vm, doing))?;
        let size = ram_under(self.settings.accelerator, definition.memory);
        Ram::find(pid, size).map_err(|source| GuestError {
            vm: vm.clone(),
            doing,
            source: Box::new(source),
        })
    }

    fn keep_monitor<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<(), GuestError>> {
        let run_dir = RunDir::new(&self.settings.run_dir, vm.as_str());
        let failed = |source| GuestError {
            vm: vm.clone(),
            doing: "keep a monitor open",
            source: Box::new(source),
        };
        Box::pin(async move { rescue::keep(&run_dir).await.map_err(failed) })
    }

    fn recover_by_kept_monitor<'a>(
        &'a self,
        vm: &'a VmId,
        uri: &'a str,
    ) -> BoxFuture<'a, Result<(), GuestError>> {
        let run_dir = RunDir::new(&self.settings.run_dir, vm.as_str());
        let failed = |source| GuestError {
            vm: vm.clone(),
            doing: "take its stream up out of band",
            source: Box::new(source),
        };
        Box::pin(async move { rescue::recover(&run_dir, uri).await.map_err(failed) })
    }

    fn forget_monitor(&self, vm: &VmId) {
        rescue::forget(&RunDir::new(&self.settings.run_dir, vm.as_str()));
    }

    fn shares_our_mounts(&self, vm: &VmId) -> bool {
        let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
        let Ok((pid, _)) = self.process(vm) else { return false };
        namespace(&pid.to_string()).is_some_and(|theirs| Some(theirs) == namespace("self"))
    }

    fn present(&self) -> Vec<VmId> {
        let inventory = self.inventory();
        let arrived = inventory.known.iter().filter(|(_, known)| known.arrived).map(|(vm, _)| vm);
        let all = inventory.running.keys().chain(&inventory.crashed).chain(arrived);
        let all: BTreeSet<&VmId> = all.collect();
        all.into_iter().cloned().collect()
    }

    fn start_again<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<Qmp, GuestError>> {
        Box::pin(async move {
            let again = async {
                let qmp = self.launch(self.known(vm)?, Begin::Boot).await?;
                qmp.cont().await?;
                Ok(qmp)
            };
            again.await.map_err(while_doing(vm, "start it again"))
        })
    }

    fn end<'a>(&'a self, vm: &'a VmId, forget: bool) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(async move {
            Vms::end(self, vm).await.map_err(while_doing(vm, "end it"))?;
            match forget {
                true => self.forget(vm).map_err(while_doing(vm, "forget it")),
                false => Ok(()),
            }
        })
    }
}
