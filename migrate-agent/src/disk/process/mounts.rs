//! The mounts of one process: made or taken over from its holder, and taken away at its end.
//!
//! `mover` and `arrival` use it; they differ in the hook that sees the requests. Deliberately not
//! here: what a request means.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::ids::VmId;
use rustix::io::Errno;
use tokio::sync::{Mutex, MutexGuard};

use super::mover::MoverError;
use super::setting::{Alone, Folder, Setting};
use crate::disk::fuse::holder::{HolderError, Serving};
use crate::disk::fuse::{DiskLimit, Hook, Image, ServeError, Server};
use crate::{clock, tasks};

/// The kernel tells of a closed file late; an unmount waits for it so long.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);
/// A process that was killed has gone within this time, on a busy machine.
const ENDING_LIMIT: Duration = Duration::from_secs(5);

/// One mount and its server.
struct Mounted {
    server: Server,
    serving: Serving,
    at: PathBuf,
}

/// One for each folder; none once they were taken away.
pub(super) struct Mounts {
    mounted: Mutex<Vec<Mounted>>,
    limit: DiskLimit,
}

/// One that was killed may still be ending.
pub(super) fn alone(folder: &Folder, vm: &VmId) -> Result<Alone, MoverError> {
    let deadline = clock::now() + ENDING_LIMIT;
    loop {
        match folder.take()? {
            Some(alone) => return Ok(alone),
            None if clock::now() < deadline => clock::pause_thread(Duration::from_millis(5)),
            None => return Err(MoverError::Another(vm.clone())),
        }
    }
}

impl Mounts {
    /// Serves the folders of `setting`; and whether a process before this one did.
    pub(super) fn serve(
        setting: &Setting,
        folder: &Folder,
        hook: &Arc<dyn Hook>,
    ) -> Result<(Self, bool), MoverError> {
        let (mut mounted, mut took_over) = (vec![], false);
        let shared = DiskLimit::start().map_err(ServeError::Threads)?;
        for place in &setting.folders {
            let name = place.at.to_str().ok_or(MoverError::MountPoint)?;
            let (holder, hook, limit) = (folder.holder(), Arc::clone(hook), shared.clone());
            let (server, serving) = match Serving::take(&holder, name) {
                Ok((serving, device, memory)) => {
                    took_over = true;
                    (Server::take_over(&place.images, device, memory, hook, limit)?, serving)
                }
                Err(HolderError::Unknown(_)) => {
                    let server = Server::mount_within(&place.images, &place.at, hook, limit)?;
                    let serving = Serving::park(&holder, name, server.parts())?;
                    (server, serving)
                }
                Err(error) => return Err(error.into()),
            };
            mounted.push(Mounted { server, serving, at: place.at.clone() });
        }
        Ok((Self { mounted: Mutex::new(mounted), limit: shared }, took_over))
    }

    async fn all(&self) -> MutexGuard<'_, Vec<Mounted>> {
        self.mounted.lock().await
    }

    /// What the guest may change on all of its disks together, wherever they lie.
    pub(super) fn limit(&self) -> &DiskLimit {
        &self.limit
    }

    /// The images of `setting`, by number. Before anybody asks for something.
    pub(super) fn images(&mut self, setting: &Setting) -> Result<Vec<Arc<Image>>, MoverError> {
        let mounted = self.mounted.get_mut();
        let image = |disk: &super::setting::ServedDisk| {
            let failed = |source| MoverError::Image { name: disk.name.clone(), source };
            let mounted = mounted.get(disk.folder).ok_or_else(|| failed(Errno::NOENT))?;
            mounted.server.image(OsStr::new(&disk.name)).map_err(failed)
        };
        setting.disks.iter().map(image).collect()
    }

    /// Asks the server of disk `disk` for something.
    pub(super) async fn with_server(
        &self,
        setting: &Setting,
        disk: u16,
        act: impl FnOnce(&Server, &OsStr) -> Result<(), Errno>,
    ) -> Result<(), String> {
        let served = setting.disks.get(usize::from(disk));
        let served = served.ok_or_else(|| format!("there is no disk {disk}"))?;
        let mounted = self.all().await;
        let folder = mounted.get(served.folder).ok_or("the mounts are gone")?;
        act(&folder.server, OsStr::new(&served.name)).map_err(|errno| match errno {
            Errno::BUSY => format!("another program has {} open", served.name),
            errno => format!("{}: {errno}", served.name),
        })
    }

    /// Takes them away; nobody uses them any more. What is still used is served on.
    pub(super) async fn take_away(&self) -> Result<(), String> {
        let mut mounted = self.all().await;
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
