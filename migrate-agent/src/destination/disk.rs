//! The disks of a VM that arrives: way made for them, received beside the page link, named when
//! QEMU is to open them, and this host's alone once the guest runs.
//!
//! QEMU opens an image when it starts, and an image without its head cannot be opened: so the QEMU of
//! a VM with disks is not started before memory begins to arrive, by which time they are in step.
//! The QEMU of a VM whose disks may follow it opens them on a mount (`following`, `resting`).
//! Deliberately not here: what arrives (`disk::sync::receive`), and who owns the VM.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use lifeboat_protocol::agent::VmDefinition;
use lifeboat_protocol::ids::VmId;

use crate::disk::local::local_disks;
use crate::disk::process::client::Movers;
use crate::disk::process::control::Stage;
use crate::disk::rooms::{DiskRooms, RoomError};
use crate::disk::sync::receive::Received;
use crate::source::disk::DiskFailure;
use crate::source::{Context, Failure};

use super::following::Following;

/// The arriving disks of one VM.
#[derive(Clone)]
pub struct ArrivingDisks {
    rooms: Arc<DiskRooms>,
    vm: VmId,
    images: Vec<PathBuf>,
    /// A copy was here ahead of them.
    seeded: bool,
    /// `None` after a restart of this agent: then everything has arrived, or none of it counts.
    received: Option<Arc<Received>>,
    /// Of disks that may follow their VM: the process in which they arrive.
    following: Option<Arc<Following>>,
    /// They arrived so.
    follows: bool,
}

/// Who takes the source's connections.
#[derive(Clone)]
pub enum TakenBy {
    /// This agent.
    Agent(Arc<Received>),
    /// A process of its own, at this socket.
    Process(PathBuf),
}

impl ArrivingDisks {
    /// Makes way for the local disks of `definition`; `None` where it has none.
    ///
    /// # Errors
    /// When one of them cannot be made here. Nothing has been made yet.
    pub fn make_way(
        rooms: &Arc<DiskRooms>,
        vm: &VmId,
        definition: &VmDefinition,
    ) -> Result<Option<Self>, RoomError> {
        let Some(mut disks) = Self::found(rooms, vm, definition) else { return Ok(None) };
        disks.images.iter().try_for_each(|image| rooms.make_way(vm, image))?;
        for image in &disks.images {
            disks.seeded |= rooms.take_seed(vm, image)?;
        }
        let arriving = disks.images.iter().map(|image| DiskRooms::arriving(vm, image)).collect();
        disks.received = Some(match disks.seeded {
            true => Received::going_on(arriving),
            false => Received::new(arriving),
        });
        Ok(Some(disks))
    }

    /// Those of a VM whose hand-over is taken up again; `None` where it has none.
    #[must_use]
    pub fn found(rooms: &Arc<DiskRooms>, vm: &VmId, definition: &VmDefinition) -> Option<Self> {
        let disks = local_disks(definition, &rooms.directories).into_iter();
        let images: Vec<_> = disks.map(|disk| disk.path).collect();
        let (rooms, vm) = (Arc::clone(rooms), vm.clone());
        let (seeded, follows) = (false, false);
        let (received, following) = Default::default();
        (!images.is_empty()).then_some(Self {
            rooms,
            vm,
            images,
            seeded,
            received,
            following,
            follows,
        })
    }

    /// Makes way for the local disks of `definition` that may follow their VM, and starts the process in
    /// which they arrive; `None` where it has none.
    ///
    /// # Errors
    /// When one of them cannot be made here. Nothing has been made yet.
    pub(super) async fn follow(
        context: &Context,
        vm: &VmId,
        definition: &VmDefinition,
    ) -> Result<Option<Self>, Failure> {
        let rooms = &context.rooms;
        let Some(mut disks) = Self::found(rooms, vm, definition) else { return Ok(None) };
        disks.images.iter().try_for_each(|image| rooms.make_way(vm, image))?;
        let local = local_disks(definition, &rooms.directories);
        let following = Following::start(&context.movers, rooms, vm, &local).await;
        disks.following = Some(following.map_err(DiskFailure::from)?);
        disks.follows = true;
        Ok(Some(disks))
    }

    /// Finds the process that an agent before this one started.
    pub(super) fn follow_again(&mut self, movers: &Movers) {
        self.following = Following::found(movers, &self.vm);
        self.follows = self.following.is_some();
    }

    /// The process in which they arrive, of disks that may follow their VM.
    pub(super) fn following(&self) -> Option<Arc<Following>> {
        self.following.clone()
    }

    /// It is not watched any more.
    pub(super) fn let_go(&mut self) {
        self.following = None;
    }

    /// Where QEMU opens them, by their numbers, where that is not where they are.
    #[must_use]
    pub fn mounted(&self) -> BTreeMap<usize, PathBuf> {
        self.following.as_ref().map_or_else(BTreeMap::new, |following| following.mounted())
    }

    /// Who takes the source's connections.
    #[must_use]
    pub fn taken_by(&self) -> Option<TakenBy> {
        match &self.following {
            Some(following) => Some(TakenBy::Process(following.blocks())),
            None => self.received.clone().map(TakenBy::Agent),
        }
    }

    /// Whether a copy was here: then the source has to send only what differs.
    #[must_use]
    pub fn are_seeded(&self) -> bool {
        self.seeded
    }

    /// Whether this side may promise to run the VM: everything is here, durably.
    #[must_use]
    pub fn are_sealed(&self) -> bool {
        if let Some(following) = &self.following {
            return following.is_at(Stage::Sealed);
        }
        self.received.as_ref().is_none_or(|received| received.is_sealed())
    }

    /// Bytes that have arrived.
    #[must_use]
    pub fn arrived(&self) -> u64 {
        if let Some(following) = &self.following {
            return following.seen().report.map_or(0, |report| report.sent);
        }
        self.received.as_ref().map_or(0, |received| received.allocated())
    }

    /// Gives the images their names: QEMU is about to open them.
    ///
    /// # Errors
    /// When one has not arrived, or its name has been taken meanwhile.
    pub async fn name(&self) -> Result<(), RoomError> {
        self.each(DiskRooms::name).await
    }

    /// The VM is about to run here: nobody else writes to its disks, and they are whole, or will be.
    ///
    /// # Errors
    /// When that cannot be made durable.
    pub(super) async fn settle(&self) -> Result<(), Failure> {
        if let Some(following) = &self.following {
            return Ok(following.own().await.map_err(DiskFailure::from)?);
        }
        if let Some(received) = &self.received {
            received.close();
        }
        Ok(self.give_last_names().await?)
    }

    /// They are whole.
    ///
    /// # Errors
    /// When that cannot be made durable.
    pub(super) async fn give_last_names(&self) -> Result<(), RoomError> {
        self.each(DiskRooms::settle).await?;
        if self.seeded || self.follows {
            // There is nothing left of it but a note; or a copy that was not used, and is old now.
            let (rooms, vm) = (Arc::clone(&self.rooms), self.vm.clone());
            crate::tasks::blocking(move || rooms.forget_seeds(&vm)).await?;
        }
        Ok(())
    }

    /// The VM will not run here: what has arrived goes, or is kept as the copy that it was before.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(super) async fn discard(&self) -> Result<(), Failure> {
        if let Some(following) = &self.following {
            following.end().await.map_err(DiskFailure::from)?;
        }
        if let Some(received) = &self.received {
            received.close();
        }
        match self.seeded {
            true => self.each(DiskRooms::put_back).await?,
            false => self.each(DiskRooms::discard).await?,
        }
        Ok(())
    }

    async fn each(
        &self,
        act: fn(&DiskRooms, &VmId, &std::path::Path) -> Result<(), RoomError>,
    ) -> Result<(), RoomError> {
        let own = self.clone();
        crate::tasks::blocking(move || {
            own.images.iter().try_for_each(|image| act(&own.rooms, &own.vm, image))
        })
        .await
    }
}
