//! The disks of a VM that arrives: way made for them, received beside the page link, named when
//! QEMU is to open them, and this host's alone once the guest runs.
//!
//! QEMU opens an image when it starts, and an image without its head cannot be opened: so the QEMU of
//! a VM with disks is not started before memory begins to arrive, by which time they are in step.
//! Deliberately not here: what arrives (`disk::sync::receive`), and who owns the VM.

use std::path::PathBuf;
use std::sync::Arc;

use lifeboat_protocol::agent::VmDefinition;
use lifeboat_protocol::ids::VmId;

use crate::disk::local::local_disks;
use crate::disk::rooms::{DiskRooms, RoomError};
use crate::disk::sync::receive::Received;

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
        (!images.is_empty()).then_some(Self { rooms, vm, images, seeded: false, received: None })
    }

    /// What the source's connections write to.
    #[must_use]
    pub fn received(&self) -> Option<Arc<Received>> {
        self.received.clone()
    }

    /// Whether a copy was here: then the source has to send only what differs.
    #[must_use]
    pub fn are_seeded(&self) -> bool {
        self.seeded
    }

    /// Whether this side may promise to run the VM: everything is here, durably.
    #[must_use]
    pub fn are_sealed(&self) -> bool {
        self.received.as_ref().is_none_or(|received| received.is_sealed())
    }

    /// Bytes that have arrived.
    #[must_use]
    pub fn arrived(&self) -> u64 {
        self.received.as_ref().map_or(0, |received| received.allocated())
    }

    /// Gives the images their names: QEMU is about to open them.
    ///
    /// # Errors
    /// When one has not arrived, or its name has been taken meanwhile.
    pub async fn name(&self) -> Result<(), RoomError> {
        self.each(DiskRooms::name).await
    }

    /// The VM is about to run here: nobody else writes to its disks, and they are whole.
    ///
    /// # Errors
    /// When that cannot be made durable.
    pub async fn settle(&self) -> Result<(), RoomError> {
        if let Some(received) = &self.received {
            received.close();
        }
        self.each(DiskRooms::settle).await?;
        if self.seeded {
            // There is nothing left of it but a note.
            let (rooms, vm) = (Arc::clone(&self.rooms), self.vm.clone());
            crate::tasks::blocking(move || rooms.forget_seeds(&vm)).await?;
        }
        Ok(())
    }

    /// The VM will not run here: what has arrived goes, or is kept as the copy that it was before.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub async fn discard(&self) -> Result<(), RoomError> {
        if let Some(received) = &self.received {
            received.close();
        }
        match self.seeded {
            true => self.each(DiskRooms::put_back).await,
            false => self.each(DiskRooms::discard).await,
        }
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
