//! The role *intermediary*: keeps others' pages, one store for each migration
//! (`docs/decisions/0012-redis-stores.md`, `0026-stores-at-intermediaries.md`).
//!
//! ```text
//!   prepare: room? -> memory set aside -> record -> redis-server as an unprivileged user -> record
//!   release: server ended -> files, control group, memory, record: gone
//!   start of the agent: each record -> its server answers: adopted | it does not: released
//! ```
//!
//! Used by the gRPC server. A store outlives the agent, as a guest does. It ends when the controller
//! releases it; one that nobody has used for [`ABANDONED_AFTER`], empty and without a connection,
//! ends by itself. One with pages never does: after the source has gone they are the only copy.
//!
//! Not here: pages (they go from agent to store), and who keeps whose (the controller's choice).

mod cgroup;
mod existing;
mod record;
mod server;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lifeboat_protocol::agent::{PageStore, PrepareStoreRequest, StoreStatus};
use lifeboat_protocol::ids::{HostId, MigrationId, NameError, VmId};
use lifeboat_protocol::units::Bytes;
use lifeboat_scatter_gather::store::{
    RedisStore, ServerError, Settings as StoreSettings, StoreError, StoreServer,
};

use crate::clock;
use crate::qemu::process::User;
use crate::tls::TlsIdentity;
use crate::vms::Vms;
use record::Record;

/// How long a store's server may take to start, to answer, and to end.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks at the stores.
const GLANCE: Duration = Duration::from_secs(2);
/// An empty store that no agent is connected to is given up after so long.
pub const ABANDONED_AFTER: Duration = Duration::from_secs(6 * 3600);
/// Left to the machine beside what is set aside.
const LEFT_FREE: Bytes = Bytes::from_mib(256);

/// A Redis that somebody else runs, as the configuration names it.
#[derive(Clone, PartialEq, Eq)]
pub struct Existing {
    /// `host:port`.
    pub address: String,
    /// Its user for us.
    pub user: String,
    /// That user's password.
    pub password: String,
    /// Without TLS.
    pub plain: bool,
}

impl std::fmt::Debug for Existing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Existing({} at {})", self.user, self.address)
    }
}

/// How stores are kept on this host.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The most that all stores may take of the host's memory.
    pub memory: Bytes,
    /// redis-server.
    pub program: PathBuf,
    /// Whom it runs as.
    pub user: User,
    /// Its ports, one for each store.
    pub ports: RangeInclusive<u16>,
    /// Used in place of servers of our own.
    pub existing: Option<Existing>,
    /// Records, and a folder for each server.
    pub directory: PathBuf,
    /// Certificates; without them stores are reached on loopback only.
    pub tls_dir: Option<PathBuf>,
}

/// Why a store was not prepared or released.
#[derive(Debug, thiserror::Error)]
pub enum IntermediaryError {
    /// Not a name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The same migration with another wish.
    #[error("migration `{0}` has a store here already, with another room; release it first")]
    Other(MigrationId),
    /// Too little of what stores may take.
    #[error(
        "{needed} are needed for the store and its own needs, {free} of {most} for stores are free"
    )]
    Full {
        /// Wanted.
        needed: Bytes,
        /// Still free of what stores may take.
        free: Bytes,
        /// That.
        most: Bytes,
    },
    /// Too little of what VMs and stores may take together.
    #[error("{needed} are needed for a store, and VMs leave {free} of this host's memory")]
    VmsFirst {
        /// Wanted.
        needed: Bytes,
        /// What is left.
        free: Bytes,
    },
    /// Too little of what the machine really has: stores must not swap.
    #[error("{needed} are needed for a store, and the machine has {available} to spare")]
    Machine {
        /// Wanted, with what is left to the machine.
        needed: Bytes,
        /// What the kernel could give without swapping.
        available: Bytes,
    },
    /// No store can run here at all.
    #[error("no store can be kept here: {0}")]
    Unable(String),
    /// All ports are taken.
    #[error("ports {first} to {last} of {address} are all taken; set intermediary.ports")]
    Ports {
        /// The first.
        first: u16,
        /// The last.
        last: u16,
        /// Where.
        address: IpAddr,
    },
    /// The Redis that the configuration names cannot be used.
    #[error(
        "{0} is no store: {1}; it needs `maxmemory-policy noeviction` and a limit that is far enough"
    )]
    Unsuitable(String, String),
    /// The server.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// Redis.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file of ours.
    #[error("cannot {doing} in {}", path.display())]
    File {
        /// What.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A server that is not to be ended.
    #[error("the store's process {0} was killed and has not ended; ask again")]
    Survives(u32),
}

/// A store that is kept.
struct Kept {
    record: Record,
    /// `None` for an existing one, and for one that does not answer.
    server: Option<StoreServer>,
    owner: Option<RedisStore>,
    seen: Seen,
}

/// What was seen of a store last.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    used: Bytes,
    values: u64,
    connections: u64,
}

/// The stores of this host. Cheap to clone.
#[derive(Clone)]
pub struct Intermediary {
    inner: Arc<Inner>,
}

struct Inner {
    host: HostId,
    settings: Settings,
    address: IpAddr,
    identity: Option<TlsIdentity>,
    vms: Vms,
    /// Why nothing can be kept; empty where it can.
    obstacle: String,
    cgroups: Option<cgroup::Root>,
    kept: Mutex<BTreeMap<MigrationId, Kept>>,
    /// One change at a time: preparing takes tens of milliseconds.
    changing: tokio::sync::Mutex<()>,
}

impl Intermediary {
    /// The stores that an agent before us left are adopted; what cannot be adopted is taken away.
    ///
    /// # Errors
    /// When the directory of records cannot be used.
    pub async fn open(
        host: HostId,
        settings: Settings,
        address: IpAddr,
        identity: Option<TlsIdentity>,
        vms: Vms,
    ) -> Result<Self, IntermediaryError> {
        let directory = settings.directory.clone();
        let failed = |source| IntermediaryError::File {
            doing: "make the stores' directory",
            path: directory.clone(),
            source,
        };
        server::make_passable(&settings.directory).map_err(failed)?;
        let obstacle = match &settings.existing {
            Some(_) => String::new(),
            None => server::obstacle(&settings, address).await,
        };
        let cgroups = cgroup::Root::find();
        let inner = Inner {
            host,
            settings,
            address,
            identity,
            vms,
            obstacle,
            cgroups,
            kept: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        };
        let this = Self { inner: Arc::new(inner) };
        for record in Record::read_all(&directory).map_err(failed)? {
            this.adopt(record).await;
        }
        Ok(this)
    }

    /// Sets memory aside and starts a store; again is the same store.
    ///
    /// # Errors
    /// [`IntermediaryError`]; nothing is left then.
    pub async fn prepare(
        &self,
        request: &PrepareStoreRequest,
    ) -> Result<PageStore, IntermediaryError> {
        let migration = MigrationId::new(request.migration.as_str())?;
        let vm = VmId::new(request.vm.as_str())?;
        let room = Bytes(request.memory_bytes);
        let _changing = self.inner.changing.lock().await;
        let known = self.kept().get(&migration).map(|kept| kept.record.clone());
        match known {
            Some(record) if record.room == room && record.vm == vm => return Ok(self.told(&record)),
            Some(_) => return Err(IntermediaryError::Other(migration)),
            None => (),
        }
        if !self.inner.obstacle.is_empty() {
            return Err(IntermediaryError::Unable(self.inner.obstacle.clone()));
        }
        let kept = match &self.inner.settings.existing {
            Some(existing) => self.prepare_existing(existing, migration, vm, room).await?,
            None => self.prepare_own(migration, vm, room).await?,
        };
        let record = kept.record.clone();
        tracing::info!(
            migration = %record.migration, vm = %record.vm, room = %record.room,
            address = record.address, "store prepared"
        );
        self.kept().insert(record.migration.clone(), kept);
        Ok(self.told(&record))
    }

    /// Ends a store, whatever it holds. Answers whether it held pages; one that is not there did not.
    ///
    /// # Errors
    /// [`IntermediaryError`] where something of it may remain; ask again.
    pub async fn release(&self, migration: &str) -> Result<bool, IntermediaryError> {
        let migration = MigrationId::new(migration)?;
        let _changing = self.inner.changing.lock().await;
        self.look_at(&migration).await;
        let Some(kept) = self.kept().remove(&migration) else { return Ok(false) };
        let held = kept.seen.values > 0;
        let record = kept.record.clone();
        if let Err(error) = self.end(kept).await {
            // Still ours to answer for, so that it can be tried again.
            let seen = Seen { values: u64::from(held), ..Seen::default() };
            self.kept().insert(migration, Kept { record, server: None, owner: None, seen });
            return Err(error);
        }
        tracing::info!(%migration, held_pages = held, "store released");
        Ok(held)
    }

    /// Every store, for the host's description.
    #[must_use]
    pub fn statuses(&self) -> Vec<StoreStatus> {
        let now = unix_ms();
        let status = |kept: &Kept| StoreStatus {
            migration: kept.record.migration.to_string(),
            vm: kept.record.vm.to_string(),
            memory_bytes: kept.record.set_aside.0,
            used_bytes: kept.seen.used.0,
            holds_pages: kept.seen.values > 0,
            age_ms: now.saturating_sub(kept.record.prepared_unix_ms),
        };
        self.kept().values().map(status).collect()
    }

    /// What could still be set aside for pages, and why nothing can (empty where something can).
    #[must_use]
    pub fn free(&self) -> (Bytes, String) {
        if !self.inner.obstacle.is_empty() {
            return (Bytes::ZERO, self.inner.obstacle.clone());
        }
        if self.inner.settings.existing.is_some() {
            // Whoever runs it knows; a store that finds no room there is refused when it is prepared.
            return (self.inner.settings.memory, String::new());
        }
        let spare = available().map_or(Bytes(u64::MAX), |available| available - LEFT_FREE);
        let memory = self.unpromised().min(self.inner.vms.memory_free()).min(spare);
        (StoreSettings::room_within(memory), String::new())
    }

    /// Looks after the stores, for as long as the agent lives.
    pub async fn tend(self) {
        loop {
            tokio::time::sleep(GLANCE).await;
            let all: Vec<MigrationId> = self.kept().keys().cloned().collect();
            for migration in all {
                self.look_at(&migration).await;
                let abandoned = self.kept().get(&migration).is_some_and(|kept| {
                    let age = unix_ms().saturating_sub(kept.record.prepared_unix_ms);
                    is_abandoned(Duration::from_millis(age), kept.seen)
                });
                if abandoned {
                    tracing::warn!(%migration, "nobody has used this store; released");
                    if let Err(error) = self.release(migration.as_str()).await {
                        tracing::warn!(%migration, %error, "not released; tried again");
                    }
                }
            }
        }
    }

    async fn look_at(&self, migration: &MigrationId) {
        let Some(owner) = self.kept().get(migration).and_then(|kept| kept.owner.clone()) else {
            return;
        };
        let seen = async {
            let (usage, connections) = (owner.usage().await?, owner.connections().await?);
            let values = match self.inner.settings.existing.is_some() {
                true => owner.packs().await?.len() as u64,
                false => owner.values().await?,
            };
            Ok::<_, StoreError>(Seen { used: usage.used, values, connections })
        };
        let seen = seen.await;
        let mut all = self.kept();
        let Some(kept) = all.get_mut(migration) else { return };
        match seen {
            Ok(seen) => kept.seen = seen,
            Err(StoreError::Late) => (),
            Err(error) => {
                tracing::error!(%migration, %error, "a store does not answer: its pages may be lost");
                kept.owner = None;
            }
        }
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Kept>> {
        self.inner.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of what stores may take, what none has.
    fn unpromised(&self) -> Bytes {
        let taken: Bytes = self.kept().values().map(|kept| kept.record.set_aside).sum();
        self.inner.settings.memory - taken
    }

    fn told(&self, record: &Record) -> PageStore {
        PageStore {
            host: self.inner.host.to_string(),
            address: record.address.clone(),
            user: record.user.clone(),
            secret: record.secret.clone(),
            memory_bytes: record.room.0,
            plain: record.plain,
            rate_bits_per_sec: 0,
            // A server of ours shows this host's certificate.
            certificate: match record.existing {
                true => record.named().to_owned(),
                false => String::new(),
            },
        }
    }
}

/// Whether a store can go though nobody has released it: nothing is in it, and no agent is
/// connected that could put something there (our own connection is one).
fn is_abandoned(age: Duration, seen: Seen) -> bool {
    age >= ABANDONED_AFTER && seen.values == 0 && seen.connections == 1
}

/// What the kernel could give without swapping; `None` where it does not say.
fn available() -> Option<Bytes> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(Bytes(kib.saturating_mul(1024)))
}

fn unix_ms() -> u64 {
    u64::try_from(clock::unix_now().as_millis()).unwrap_or(u64::MAX)
}

#[test]
fn a_store_with_pages_or_a_connection_is_never_abandoned() {
    let seen = |values, connections| Seen { values, connections, ..Seen::default() };
    assert!(is_abandoned(ABANDONED_AFTER, seen(0, 1)));
    assert!(!is_abandoned(ABANDONED_AFTER * 9, seen(1, 1)));
    assert!(!is_abandoned(ABANDONED_AFTER * 9, seen(0, 2)));
    // One that does not answer: who knows what it holds.
    assert!(!is_abandoned(ABANDONED_AFTER * 9, seen(0, 0)));
    assert!(!is_abandoned(ABANDONED_AFTER / 2, seen(0, 1)));
}
