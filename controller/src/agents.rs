//! The agents, as the controller calls them: one connection each, every call with a deadline and
//! with a typed error that names the host and what was wanted.
//!
//! Commands carry the controller's term and an operation id made from the migration's: a command
//! that is repeated (after a restart, after an answer that was lost) is the same command. The poll
//! tasks that fill the inventory are in `poll`. Deliberately not here: what to do about an error.

mod poll;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lifeboat_protocol::FAILED_STORE;
use lifeboat_protocol::agent::agent_client::AgentClient;
use lifeboat_protocol::agent::{
    BaseChain, ClaimVmRequest, ClassifierRequest, Command, CommandOnMigration, DescribeHostRequest,
    ForgetSeedRequest, HashBasesRequest, HostDescription, ListMigrationsRequest, ListVmsRequest,
    MeasureVmRequest, MigrationProgress, PortClassifier, PrepareDestinationReply,
    PrepareDestinationRequest, PrepareDiskStoreReply, PrepareDiskStoreRequest, PrepareStoreReply,
    PrepareStoreRequest, ProbeShapingReply, ProbeShapingRequest, ProbeStorageReply,
    ProbeStorageRequest, QueryMigrationRequest, ReceiveSeedReply, ReceiveSeedRequest,
    ReleaseStoreRequest, SeedProgress, SendSeedRequest, SetLimitRequest, StartMigrationRequest,
    VmMeasurement, VmStatus,
};
use lifeboat_protocol::ids::{HostId, MigrationId, Term, VmId};
use lifeboat_protocol::units::{BitsPerSec, BytesPerSec};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status, Streaming};

use crate::clock;
use crate::config::{HostConfig, Listen, SwitchConfig};
use crate::tls::TlsFiles;

pub use poll::poll_forever;

/// For answers that need no work.
const QUICK: Duration = Duration::from_secs(5);
/// For answers that need work: a QEMU started, room made.
const WORK: Duration = Duration::from_secs(30);

/// For reading whole files. The agent reads on when this is over, and knows them the next time.
const READING: Duration = Duration::from_secs(300);

/// What a call to an agent came to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentError {
    /// No such host in the configuration.
    #[error("host {host} is not in the configuration")]
    UnknownHost {
        /// The name that was asked for.
        host: HostId,
    },
    /// No connection, or it broke.
    #[error("the agent of {host} cannot be reached to {doing}: {detail}")]
    Unreachable {
        /// Whose agent.
        host: HostId,
        /// What was wanted.
        doing: &'static str,
        /// What the transport says.
        detail: String,
    },
    /// No answer in time.
    #[error("the agent of {host} did not {doing} within {after:?}")]
    Late {
        /// Whose agent.
        host: HostId,
        /// What was wanted.
        doing: &'static str,
        /// The deadline that passed.
        after: Duration,
    },
    /// It does not know what was asked about.
    #[error("the agent of {host} knows nothing of it when asked to {doing}: {detail}")]
    NotKnown {
        /// Whose agent.
        host: HostId,
        /// What was wanted.
        doing: &'static str,
        /// Its words.
        detail: String,
    },
    /// It said no.
    #[error("the agent of {host} refused to {doing}: {detail}")]
    Refused {
        /// Whose agent.
        host: HostId,
        /// What was wanted.
        doing: &'static str,
        /// Its words.
        detail: String,
        /// The intermediary at which it would have failed.
        store: Option<HostId>,
    },
    /// An address that no connection can be made from.
    #[error(
        "the agent of {host} has an address that cannot be used, or its certificates cannot: {detail}"
    )]
    Address {
        /// Whose agent.
        host: HostId,
        /// What is wrong.
        detail: String,
    },
}

impl AgentError {
    /// Whether nothing is known of what the agent did: it may have done it.
    #[must_use]
    pub const fn is_silence(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Late { .. })
    }

    /// The intermediary whose fault it was.
    #[must_use]
    pub fn failed_store(&self) -> Option<HostId> {
        match self {
            Self::Refused { store, .. } => store.clone(),
            _ => None,
        }
    }

    /// What a stream ended with.
    #[must_use]
    pub fn of_stream(host: &HostId, doing: &'static str, status: &Status) -> Self {
        Self::from_status(host, doing, status)
    }

    fn from_status(host: &HostId, doing: &'static str, status: &Status) -> Self {
        let host = host.clone();
        let detail = shorten(status.message());
        match status.code() {
            Code::Unavailable | Code::Cancelled | Code::Unknown => {
                Self::Unreachable { host, doing, detail }
            }
            Code::DeadlineExceeded => Self::Late { host, doing, after: WORK },
            Code::NotFound => Self::NotKnown { host, doing, detail },
            _ => {
                let store = status.metadata().get(FAILED_STORE);
                let store = store.and_then(|name| HostId::new(name.to_str().ok()?).ok());
                Self::Refused { host, doing, detail, store }
            }
        }
    }
}

/// An agent's words reach logs, the journal and terminals: one line, of bounded length.
fn shorten(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect()
}

/// Every agent of the configuration.
#[derive(Debug, Clone)]
pub struct Agents {
    channels: BTreeMap<HostId, Channel>,
    term: Term,
    asked: Arc<AtomicU64>,
}

impl Agents {
    /// One connection per host, and one per agent that only serves switches, made when it is first
    /// needed and again whenever it breaks.
    ///
    /// # Errors
    /// With the first address or certificate that cannot be used.
    pub fn new(
        hosts: &[HostConfig],
        switches: &[SwitchConfig],
        tls: Option<&TlsFiles>,
        term: Term,
    ) -> Result<Self, AgentError> {
        let mut channels = BTreeMap::new();
        for host in hosts {
            channels.insert(host.name.clone(), channel(&host.name, &host.agent, tls)?);
        }
        for switch in switches {
            let (Some(name), Some(address)) = (switch.agent_id(), &switch.agent) else { continue };
            if let Entry::Vacant(vacant) = channels.entry(name) {
                let made = channel(vacant.key(), address, tls)?;
                vacant.insert(made);
            }
        }
        Ok(Self { channels, term, asked: Arc::default() })
    }

    fn client(&self, host: &HostId) -> Result<AgentClient<Channel>, AgentError> {
        let channel = self.channels.get(host);
        let channel = channel.ok_or_else(|| AgentError::UnknownHost { host: host.clone() })?;
        Ok(AgentClient::new(channel.clone()))
    }

    /// The head of a command: its own id and this controller's term.
    fn command(&self, migration: &str, verb: &str) -> Option<Command> {
        Some(Command { operation_id: format!("{migration}.{verb}"), term: self.term.0 })
    }

    /// Who the host is and what it runs.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn describe(
        &self,
        host: &HostId,
    ) -> Result<(HostDescription, Vec<VmStatus>), AgentError> {
        let mut client = self.client(host)?;
        let doing = "describe its host";
        let description =
            call(host, doing, QUICK, client.describe_host(DescribeHostRequest {})).await?;
        let vms = call(host, "list its VMs", QUICK, client.list_vms(ListVmsRequest {})).await?;
        Ok((description, vms.vms))
    }

    /// Measures a VM over a window (0: the agent's own).
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn measure(
        &self,
        host: &HostId,
        vm: &VmId,
        window_ms: u32,
    ) -> Result<VmMeasurement, AgentError> {
        let request = MeasureVmRequest { vm: vm.to_string(), window_ms };
        let deadline = WORK + Duration::from_millis(u64::from(window_ms));
        let mut client = self.client(host)?;
        call(host, "measure a VM", deadline, client.measure_vm(request)).await
    }

    /// Asks a destination to make room.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn prepare(
        &self,
        host: &HostId,
        mut request: PrepareDestinationRequest,
    ) -> Result<PrepareDestinationReply, AgentError> {
        request.command = self.command(&request.migration, "prepare");
        let mut client = self.client(host)?;
        call(host, "make room for a VM", WORK, client.prepare_destination(request)).await
    }

    /// Has an intermediary open a store.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn prepare_store(
        &self,
        host: &HostId,
        mut request: PrepareStoreRequest,
    ) -> Result<PrepareStoreReply, AgentError> {
        request.command = self.command(&request.migration, "store");
        let mut client = self.client(host)?;
        call(host, "open a store", WORK, client.prepare_store(request)).await
    }

    /// Has an intermediary make room for a VM's disks.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn prepare_disk_store(
        &self,
        host: &HostId,
        mut request: PrepareDiskStoreRequest,
    ) -> Result<PrepareDiskStoreReply, AgentError> {
        request.command = self.command(&request.migration, "disk-store");
        let mut client = self.client(host)?;
        call(host, "make room for disks", WORK, client.prepare_disk_store(request)).await
    }

    /// Has an intermediary end a migration's stores, and says whether they held anything.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn release_store(
        &self,
        host: &HostId,
        migration: &MigrationId,
    ) -> Result<bool, AgentError> {
        let command = self.fresh_command("release-store");
        let request = ReleaseStoreRequest { command, migration: migration.to_string() };
        let mut client = self.client(host)?;
        let reply = call(host, "release a store", WORK, client.release_store(request)).await?;
        Ok(reply.held_pages || reply.held_disks)
    }

    /// Tells a source to send.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn start(
        &self,
        host: &HostId,
        mut request: StartMigrationRequest,
    ) -> Result<(), AgentError> {
        request.command = self.command(&request.migration, "start");
        let mut client = self.client(host)?;
        call(host, "start a migration", WORK, client.start_migration(request)).await?;
        Ok(())
    }

    /// Cancels a migration at one side. After COMMIT the agent refuses.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn cancel(
        &self,
        host: &HostId,
        migration: &MigrationId,
        reason: &str,
    ) -> Result<Option<MigrationProgress>, AgentError> {
        let request = CommandOnMigration {
            command: self.command(migration.as_str(), "cancel"),
            migration: migration.to_string(),
            reason: reason.to_owned(),
        };
        let mut client = self.client(host)?;
        let reply = call(host, "cancel a migration", WORK, client.cancel_migration(request));
        Ok(reply.await?.progress)
    }

    /// Says what a migration may send from now on.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn set_network_limit(
        &self,
        host: &HostId,
        migration: &MigrationId,
        limit: BitsPerSec,
    ) -> Result<(), AgentError> {
        let request = self.limit(migration, limit.bytes_per_sec());
        let mut client = self.client(host)?;
        call(host, "limit a migration", WORK, client.set_network_limit(request)).await?;
        Ok(())
    }

    /// Says what the guest of a migration may change on its disks from now on; 0: whatever it likes.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn set_disk_limit(
        &self,
        host: &HostId,
        migration: &MigrationId,
        limit: BytesPerSec,
    ) -> Result<(), AgentError> {
        let request = self.limit(migration, limit);
        let mut client = self.client(host)?;
        call(host, "limit a guest's disks", WORK, client.set_disk_limit(request)).await?;
        Ok(())
    }

    fn limit(&self, migration: &MigrationId, limit: BytesPerSec) -> SetLimitRequest {
        SetLimitRequest {
            // Limits may come back to an earlier one, so that none repeats another.
            command: self.command(migration.as_str(), &format!("limit-{}", clock::now().0)),
            migration: migration.to_string(),
            bytes_per_sec: limit.0,
        }
    }

    /// How far a migration is, as one side sees it.
    ///
    /// # Errors
    /// As [`AgentError`] says; [`AgentError::NotKnown`] when it never heard of it.
    pub async fn query(
        &self,
        host: &HostId,
        migration: &MigrationId,
    ) -> Result<MigrationProgress, AgentError> {
        let request = QueryMigrationRequest { migration: migration.to_string() };
        let mut client = self.client(host)?;
        call(host, "tell how far a migration is", QUICK, client.query_progress(request)).await
    }

    /// Progress as it changes, until the migration has ended.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn watch(
        &self,
        host: &HostId,
        migration: &MigrationId,
    ) -> Result<Streaming<MigrationProgress>, AgentError> {
        let request = QueryMigrationRequest { migration: migration.to_string() };
        let mut client = self.client(host)?;
        call(host, "report a migration", QUICK, client.watch_migration(request)).await
    }

    /// Every migration that an agent remembers.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn migrations(&self, host: &HostId) -> Result<Vec<MigrationProgress>, AgentError> {
        let mut client = self.client(host)?;
        let request = ListMigrationsRequest {};
        let reply = call(host, "list its migrations", QUICK, client.list_migrations(request));
        Ok(reply.await?.migrations)
    }

    /// Ends `uncertain` by an operator's word. `operation` makes a repeated claim the same one.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn claim(
        &self,
        host: &HostId,
        vm: &VmId,
        operation: &str,
    ) -> Result<Option<VmStatus>, AgentError> {
        let command = self.command(operation, "claim");
        let request = ClaimVmRequest { command, vm: vm.to_string(), fenced: true };
        let mut client = self.client(host)?;
        Ok(call(host, "claim a VM", WORK, client.claim_vm(request)).await?.status)
    }

    /// Writes, reads or removes a probe file on a shared storage.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn probe(
        &self,
        host: &HostId,
        request: ProbeStorageRequest,
    ) -> Result<ProbeStorageReply, AgentError> {
        let mut client = self.client(host)?;
        call(host, "probe a storage", QUICK, client.probe_storage(request)).await
    }

    /// What the files beneath a VM's overlays hold at its host.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn bases_of(&self, host: &HostId, vm: &VmId) -> Result<Vec<BaseChain>, AgentError> {
        self.hash_bases(host, HashBasesRequest { vm: vm.to_string(), chains: Vec::new() }).await
    }

    /// What the same files hold at another host.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn bases_at(
        &self,
        host: &HostId,
        chains: Vec<BaseChain>,
    ) -> Result<Vec<BaseChain>, AgentError> {
        self.hash_bases(host, HashBasesRequest { vm: String::new(), chains }).await
    }

    /// Has a host expect a copy of a VM's disks, for as long as the answer is kept.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn receive_seed(
        &self,
        host: &HostId,
        mut request: ReceiveSeedRequest,
    ) -> Result<Streaming<ReceiveSeedReply>, AgentError> {
        request.command = self.fresh_command("receive-seed");
        let mut client = self.client(host)?;
        call(host, "take a copy of disks", WORK, client.receive_seed(request)).await
    }

    /// Has a host send that copy; how far it is.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn send_seed(
        &self,
        host: &HostId,
        mut request: SendSeedRequest,
    ) -> Result<Streaming<SeedProgress>, AgentError> {
        request.command = self.fresh_command("send-seed");
        let mut client = self.client(host)?;
        call(host, "send a copy of disks", WORK, client.send_seed(request)).await
    }

    /// Has a host delete its copy of a VM's disks; whether it had one.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn forget_seed(&self, host: &HostId, vm: &VmId) -> Result<bool, AgentError> {
        let request =
            ForgetSeedRequest { command: self.fresh_command("forget-seed"), vm: vm.to_string() };
        let mut client = self.client(host)?;
        let reply = call(host, "delete a copy of disks", WORK, client.forget_seed(request)).await?;
        Ok(reply.was_there)
    }

    async fn hash_bases(
        &self,
        host: &HostId,
        request: HashBasesRequest,
    ) -> Result<Vec<BaseChain>, AgentError> {
        let mut client = self.client(host)?;
        let doing = "say what overlays lie on";
        Ok(call(host, doing, READING, client.hash_bases(request)).await?.chains)
    }

    /// Has the classifier beside the queues of each of these ports. Answers for each port.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn ensure_classifier(
        &self,
        host: &HostId,
        ports: Vec<String>,
    ) -> Result<Vec<PortClassifier>, AgentError> {
        let request = ClassifierRequest { command: self.fresh_command("classify"), ports };
        let mut client = self.client(host)?;
        let reply = call(host, "classify ports", QUICK, client.ensure_classifier(request));
        Ok(reply.await?.ports)
    }

    /// Takes the classifier away from each of these ports. Answers for each port.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn remove_classifier(
        &self,
        host: &HostId,
        ports: Vec<String>,
    ) -> Result<Vec<PortClassifier>, AgentError> {
        let request = ClassifierRequest { command: self.fresh_command("unclassify"), ports };
        let mut client = self.client(host)?;
        let reply = call(host, "release ports", QUICK, client.remove_classifier(request));
        Ok(reply.await?.ports)
    }

    /// What the kernel of a switch's agent can do with a port.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn probe_shaping(&self, host: &HostId) -> Result<ProbeShapingReply, AgentError> {
        let mut client = self.client(host)?;
        let asked = client.probe_shaping(ProbeShapingRequest {});
        call(host, "say what its kernel can shape", QUICK, asked).await
    }

    /// The head of a command that has to be done each time it is given: what it makes goes with the
    /// port's queues, and is made again with them.
    fn fresh_command(&self, verb: &str) -> Option<Command> {
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        self.command(&format!("t{}-{}-{number}", self.term.0, clock::now().0), verb)
    }
}

fn channel(name: &HostId, address: &Listen, tls: Option<&TlsFiles>) -> Result<Channel, AgentError> {
    let wrong =
        |detail: String| AgentError::Address { host: name.clone(), detail: shorten(&detail) };
    let (uri, tls) = match address {
        // The socket's permissions guard it; nothing to encrypt.
        Listen::Unix(path) => (format!("unix://{}", path.display()), None),
        Listen::Tcp(address) if tls.is_some() => (format!("https://{address}"), tls),
        Listen::Tcp(address) => (format!("http://{address}"), None),
    };
    let mut endpoint = Endpoint::from_shared(uri)
        .map_err(|error| wrong(error.to_string()))?
        .connect_timeout(QUICK)
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5));
    if let Some(files) = tls {
        endpoint = endpoint
            .tls_config(files.client(name.as_str()))
            .map_err(|error| wrong(error.to_string()))?;
    }
    Ok(endpoint.connect_lazy())
}

async fn call<T>(
    host: &HostId,
    doing: &'static str,
    deadline: Duration,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, AgentError> {
    match tokio::time::timeout(deadline, answer).await {
        Err(_) => Err(AgentError::Late { host: host.clone(), doing, after: deadline }),
        Ok(Err(status)) => Err(AgentError::from_status(host, doing, &status)),
        Ok(Ok(reply)) => Ok(reply.into_inner()),
    }
}
