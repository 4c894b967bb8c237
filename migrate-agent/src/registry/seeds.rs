//! Copies of disks ahead of a migration: those that this host takes in, and those that it sends.
//!
//! A copy lasts as long as the call that asked for it: whoever holds [`Arriving`] or [`Sending`] drops
//! it when the call ends, however it ends. A migration of the same VM goes first and ends both. What has
//! arrived stays, complete or not: it is only ever compared with. Deliberately not here: the copying
//! (`source::seeding`), and where seeds lie (`disk::rooms`).

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use lifeboat_protocol::agent::{ReceiveSeedReply, ReceiveSeedRequest, Seed, SendSeedRequest};
use lifeboat_protocol::ids::{Generation, HostId, MigrationId, VmId};
use lifeboat_protocol::units::{BitsPerSec, BytesPerSec};
use lifeboat_scatter_gather::link::Hello;
use lifeboat_scatter_gather::link::frame::TOKEN_BYTES;
use tokio::sync::watch;

use super::links::same;
use super::{Registry, RegistryError, random_token};
use crate::clock;
use crate::disk::local::written_disks;
use crate::disk::rooms::{DiskRooms, RoomError};
use crate::disk::sync::receive::Received;
use crate::source::Failure;
use crate::source::disk::DiskFailure;
use crate::source::seeding::{self, Told};
use crate::tasks;

/// A copy that a migration ends has gone within this time.
const END_LIMIT: Duration = Duration::from_secs(20);

/// All copies that are going on.
#[derive(Default)]
pub(super) struct Seeds {
    arriving: HashMap<MigrationId, Expected>,
    /// Per VM: told to end, and gone once its receivers are.
    sending: HashMap<VmId, watch::Sender<bool>>,
}

struct Expected {
    vm: VmId,
    from: HostId,
    token: [u8; TOKEN_BYTES],
    received: Arc<Received>,
}

/// A copy that is expected here, until this is dropped.
pub struct Arriving {
    registry: Registry,
    seed: MigrationId,
}

impl Drop for Arriving {
    fn drop(&mut self) {
        let expected = self.registry.seeds().arriving.remove(&self.seed);
        if let Some(expected) = expected {
            expected.received.close();
        }
    }
}

/// A copy that is being sent; ended when this is dropped.
pub struct Sending {
    registry: Registry,
    vm: VmId,
    ended: watch::Receiver<bool>,
    order: seeding::Order,
}

impl Sending {
    /// Sends it, telling how far it is; ends early when nobody listens, or a migration begins.
    ///
    /// # Errors
    /// With its words, when it cannot be sent.
    pub async fn run(self, told: tokio::sync::mpsc::Sender<Told>) -> Result<(), String> {
        let mut ended = self.ended.clone();
        let context = self.registry.context.clone();
        let stopped = async move {
            // An error: the registry has forgotten it, which is an end as well.
            let _ = ended.wait_for(|ended| *ended).await;
        };
        let sent = seeding::send(&context, &self.order, &told, stopped).await;
        sent.map_err(|error| crate::vms::chain(&error))
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.registry.seeds().sending.remove(&self.vm);
    }
}

impl Registry {
    fn seeds(&self) -> MutexGuard<'_, Seeds> {
        self.seeds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Expects a copy of a VM's disks.
    ///
    /// # Errors
    /// When the VM is moving, has no local disks, or they cannot lie here.
    pub async fn receive_seed(
        &self,
        request: &ReceiveSeedRequest,
    ) -> Result<(ReceiveSeedReply, Arriving), RegistryError> {
        let seed = MigrationId::new(request.seed.as_str())?;
        let from = HostId::new(request.source_host.as_str())?;
        let missing = RegistryError::Invalid { field: "definition", problem: "is missing" };
        let definition = request.definition.as_ref().ok_or(missing)?;
        let vm = VmId::new(definition.name.as_str())?;
        self.must_be_idle(&vm)?;
        let rooms = Arc::clone(&self.context.rooms);
        let disks = written_disks(definition, &rooms.directories).into_iter();
        let images: Vec<_> = disks.map(|disk| disk.path).collect();
        if images.is_empty() {
            return Err(no_disks(&vm));
        }
        let (named, now) = (vm.clone(), clock::unix_now());
        let paths = tasks::blocking(move || {
            rooms.make_way_for_seeds(&named, &images, now)?;
            Ok(images.iter().map(|image| DiskRooms::seed(&named, image)).collect())
        });
        let paths =
            paths.await.map_err(|error: RoomError| Failure::from(DiskFailure::from(error)))?;
        let token = random_token().map_err(|error| Failure::Socket(error.into()))?;
        let received = Received::going_on(paths);
        {
            let mut seeds = self.seeds();
            if let Some((_, other)) = seeds.arriving.iter().find(|(_, other)| other.vm == vm) {
                let migration = seed_of(&seeds.arriving, &other.vm).unwrap_or(seed);
                return Err(RegistryError::Busy { vm, migration });
            }
            let expected = Expected { vm, from, token, received };
            seeds.arriving.insert(seed.clone(), expected);
        }
        let reply =
            ReceiveSeedReply { page_address: self.page_address.to_string(), token: token.to_vec() };
        Ok((reply, Arriving { registry: self.clone(), seed }))
    }

    /// Makes ready to send a copy of a VM's disks.
    ///
    /// # Errors
    /// When the VM is not here, is moving, or is being copied already.
    pub fn send_seed(&self, request: &SendSeedRequest) -> Result<Sending, RegistryError> {
        let seed = MigrationId::new(request.seed.as_str())?;
        let vm = VmId::new(request.vm.as_str())?;
        let invalid = |field, problem| RegistryError::Invalid { field, problem };
        let token = <[u8; TOKEN_BYTES]>::try_from(request.token.as_slice())
            .map_err(|_| invalid("token", "is not 32 bytes long"))?;
        self.must_be_idle(&vm)?;
        let limit = BitsPerSec(request.network_limit_bits_per_sec).bytes_per_sec();
        let order = seeding::Order {
            seed: seed.clone(),
            vm: vm.clone(),
            destination: HostId::new(request.destination_host.as_str())?,
            page_address: request.page_address.clone(),
            token,
            limit: Some(limit).filter(|limit| *limit > BytesPerSec::ZERO),
            generation: Generation(0),
            compares: true,
        };
        let (end, ended) = watch::channel(false);
        let mut seeds = self.seeds();
        if seeds.sending.contains_key(&vm) {
            return Err(RegistryError::Busy { vm, migration: seed });
        }
        seeds.sending.insert(vm.clone(), end);
        drop(seeds);
        Ok(Sending { registry: self.clone(), vm, ended, order })
    }

    /// A migration of `vm` begins: copies of its disks come to an end first, here and now.
    pub(super) async fn end_seeds_of(&self, vm: &VmId) {
        let sending = {
            let mut seeds = self.seeds();
            let arriving = seeds.arriving.extract_if(|_, expected| expected.vm == *vm);
            arriving.for_each(|(_, expected)| expected.received.close());
            seeds.sending.get(vm).cloned()
        };
        if let Some(sending) = sending {
            tracing::info!(%vm, "the copying of its disks ends, because it moves");
            sending.send_replace(true);
            if tokio::time::timeout(END_LIMIT, sending.closed()).await.is_err() {
                tracing::warn!(%vm, "the copying of its disks does not end");
            }
        }
    }

    pub(super) fn expected_seed(&self, hello: &Hello) -> Option<Arc<Received>> {
        let seeds = self.seeds();
        let expected = seeds.arriving.get(&hello.migration)?;
        let is_it = expected.from == hello.host
            && expected.vm == hello.vm
            && hello.generation == Generation(0)
            && same(&expected.token, &hello.token);
        is_it.then(|| Arc::clone(&expected.received))
    }

    /// The copies that are kept here.
    #[must_use]
    pub fn kept_seeds(&self) -> Vec<Seed> {
        let now = clock::unix_now();
        let age_ms =
            |since| u64::try_from(now.saturating_sub(since).as_millis()).unwrap_or(u64::MAX);
        let told = |seed: crate::disk::rooms::Seed| Seed {
            vm: seed.vm.to_string(),
            bytes: seed.bytes.0,
            age_ms: age_ms(seed.since),
        };
        self.context.rooms.seeds().into_iter().map(told).collect()
    }

    /// Deletes the copy of a VM's disks; whether there was one.
    ///
    /// # Errors
    /// When one is arriving, or it cannot be deleted.
    pub async fn forget_seed(&self, vm: &VmId) -> Result<bool, RegistryError> {
        self.must_be_idle(vm)?;
        if let Some(migration) = seed_of(&self.seeds().arriving, vm) {
            return Err(RegistryError::Busy { vm: vm.clone(), migration });
        }
        let (rooms, vm) = (Arc::clone(&self.context.rooms), vm.clone());
        let forgotten = tasks::blocking(move || rooms.forget_seeds(&vm)).await;
        Ok(forgotten.map_err(|error: RoomError| Failure::from(DiskFailure::from(error)))?)
    }
}

fn seed_of(arriving: &HashMap<MigrationId, Expected>, vm: &VmId) -> Option<MigrationId> {
    let found = arriving.iter().find(|(_, expected)| expected.vm == *vm);
    found.map(|(seed, _)| seed.clone())
}

fn no_disks(vm: &VmId) -> RegistryError {
    let why = "has no disks that only its host has; there is nothing to copy ahead".to_owned();
    RegistryError::Record { vm: vm.clone(), why }
}
