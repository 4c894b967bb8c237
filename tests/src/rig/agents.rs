//! Real `lifeboat-agent` processes, each in its host's namespace, driven over gRPC.
//!
//! Used by the experiments. Certificates are made by `lifeboat certs init`, so page links are
//! encrypted as they are in production. Not here: a controller; whoever drives an agent here plays
//! its part.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use lifeboat_protocol::agent::agent_client::AgentClient;
use lifeboat_protocol::agent::{
    Command as Ordered, ListVmsRequest, MigrationProgress, Mode, PageStore,
    PrepareDestinationRequest, PrepareStoreRequest, QueryMigrationRequest, ReleaseStoreRequest,
    ScatterPlan, SetLimitRequest, StartMigrationRequest, StartVmRequest, StopVmRequest, VmStatus,
};
use lifeboat_protocol::units::{BitsPerSec, Bytes};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use super::RigError;
use super::network::Namespace;
use super::private::built;
use super::program::{Running, run};
use crate::clock;

const PAGE_PORT: u16 = 7445;
const PATIENCE: Duration = Duration::from_secs(20);

/// A host's agent.
#[derive(Debug)]
pub struct Agent {
    host: String,
    address: Ipv4Addr,
    folder: PathBuf,
    process: Running,
    client: AgentClient<Channel>,
    operations: u64,
}

/// Makes the certificates of all hosts in `folder`/certs.
///
/// # Errors
/// When `lifeboat` is not built or refuses.
pub fn make_certificates(folder: &Path, hosts: &[(&str, Ipv4Addr)]) -> Result<(), RigError> {
    let agents: Vec<String> =
        hosts.iter().map(|(host, address)| format!("{host}={address}")).collect();
    let mut command = Command::new(built("lifeboat")?);
    command.args(["certs", "init"]).arg(folder.join("certs"));
    run(command.args(["--agent", &agents.join(",")])).map(drop)
}

impl Agent {
    /// Starts it, with the VMs that are defined in `folder`/HOST/vms, and waits until it answers.
    ///
    /// # Errors
    /// When it does not start; its log is `folder`/HOST/agent.log.
    pub async fn start(
        namespace: &Namespace,
        host: &str,
        address: Ipv4Addr,
        folder: &Path,
        images: &Path,
    ) -> Result<Self, RigError> {
        let own = folder.join(host);
        for name in ["vms", "profiles", "disks"] {
            fs::create_dir_all(own.join(name)).map_err(RigError::io("cannot make folders"))?;
        }
        let certificates = folder.join(format!("certs/agent-{host}"));
        let text = configuration(host, address, &own, &certificates, images);
        let file = own.join("agent.toml");
        fs::write(&file, text).map_err(RigError::io("cannot write an agent's configuration"))?;
        let mut command = namespace.command(&built("lifeboat-agent")?.to_string_lossy());
        let mut process =
            Running::start(command.arg("--config").arg(&file), &own.join("agent.log"))?;
        let client = connect(&own, &mut process).await?;
        Ok(Self { host: host.to_owned(), address, folder: own, process, client, operations: 0 })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The name of its host.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// What a VM has said on its serial line while it was here.
    #[must_use]
    pub fn serial_log(&self, vm: &str) -> PathBuf {
        self.folder.join("qemu").join(vm).join("io/serial.log")
    }

    fn command(&mut self) -> Option<Ordered> {
        self.operations += 1;
        let operation_id = format!("{}-{}", self.host, self.operations);
        Some(Ordered { operation_id, term: 1 })
    }

    /// Starts a defined VM.
    ///
    /// # Errors
    /// With the agent's words.
    pub async fn start_vm(&mut self, vm: &str) -> Result<(), RigError> {
        let request = StartVmRequest { command: self.command(), vm: vm.to_owned() };
        let started = self.client.start_vm(request).await;
        started.map(drop).map_err(RigError::refused("to start a VM"))
    }

    /// Ends a VM, without asking its guest.
    ///
    /// # Errors
    /// With the agent's words.
    pub async fn stop_vm(&mut self, vm: &str) -> Result<(), RigError> {
        let command = self.command();
        let request = StopVmRequest { command, vm: vm.to_owned(), grace_ms: 0 };
        let stopped = self.client.stop_vm(request).await;
        stopped.map(drop).map_err(RigError::refused("to stop a VM"))
    }

    /// A VM as this host sees it.
    ///
    /// # Errors
    /// When it is not here.
    pub async fn vm(&mut self, vm: &str) -> Result<VmStatus, RigError> {
        let list = self.client.list_vms(ListVmsRequest {}).await;
        let list = list.map_err(RigError::refused("the list of VMs"))?.into_inner().vms;
        let is_it =
            |status: &VmStatus| status.definition.as_ref().is_some_and(|own| own.name == vm);
        list.into_iter()
            .find(is_it)
            .ok_or_else(|| RigError::refused("a VM's status")(format!("no VM {vm} here")))
    }

    /// Keeps pages of a migration from now on.
    ///
    /// # Errors
    /// With the agent's words.
    pub async fn store(
        &mut self,
        migration: &str,
        vm: &str,
        room: Bytes,
    ) -> Result<PageStore, RigError> {
        let request = PrepareStoreRequest {
            command: self.command(),
            migration: migration.to_owned(),
            vm: vm.to_owned(),
            memory_bytes: room.0,
            ..PrepareStoreRequest::default()
        };
        let prepared = self.client.prepare_store(request).await;
        let prepared = prepared.map_err(RigError::refused("a store"))?.into_inner();
        prepared.store.ok_or_else(|| RigError::refused("a store")("none was given"))
    }

    /// Ends what it keeps of a migration.
    ///
    /// # Errors
    /// With the agent's words.
    pub async fn release(&mut self, migration: &str) -> Result<(), RigError> {
        let command = self.command();
        let request = ReleaseStoreRequest { command, migration: migration.to_owned() };
        let released = self.client.release_store(request).await;
        released.map(drop).map_err(RigError::refused("to release a store"))
    }

    /// A migration as this side sees it.
    ///
    /// # Errors
    /// When it is not known here.
    pub async fn progress(&mut self, migration: &str) -> Result<MigrationProgress, RigError> {
        let request = QueryMigrationRequest { migration: migration.to_owned() };
        let progress = self.client.query_progress(request).await;
        Ok(progress.map_err(RigError::refused("a migration's progress"))?.into_inner())
    }

    /// Has the guest of a migration change at most so much of its disks per second from now on, in bytes.
    ///
    /// # Errors
    /// When it is not known here.
    pub async fn hold_writes(
        &mut self,
        migration: &str,
        bytes_per_sec: u64,
    ) -> Result<(), RigError> {
        let command = self.command();
        let request = SetLimitRequest { command, migration: migration.to_owned(), bytes_per_sec };
        let held = self.client.set_disk_limit(request).await;
        held.map(drop).map_err(RigError::refused("to hold a guest's writes back"))
    }

    /// Waits until a migration has ended on this side, for better or worse.
    ///
    /// # Errors
    /// When it is not known here, or has not ended in time.
    pub async fn ended(
        &mut self,
        migration: &str,
        within: Duration,
    ) -> Result<MigrationProgress, RigError> {
        let deadline = clock::now() + within;
        loop {
            let progress = self.progress(migration).await?;
            if progress.phase().is_final() {
                return Ok(progress);
            }
            if clock::now() > deadline {
                let what = format!("the end of migration {migration} ({:?})", progress.phase());
                return Err(RigError::TooLate { what, seconds: within.as_secs() });
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// How a guest moves.
#[derive(Debug, Clone)]
pub struct Manner {
    /// The mode.
    pub mode: Mode,
    /// Where its pages wait; of scatter-gather.
    pub scatter: Option<ScatterPlan>,
    /// At what pace the destination fetches in the background; zero: as fast as it goes.
    pub gather_limit: BitsPerSec,
}

impl Manner {
    /// Without stores, and as fast as it goes.
    #[must_use]
    pub fn of(mode: Mode) -> Self {
        Self { mode, scatter: None, gather_limit: BitsPerSec::ZERO }
    }
}

/// A migration that the destination is ready for; [`Prepared::start`] sets it going.
#[derive(Debug)]
pub struct Prepared {
    request: StartMigrationRequest,
}

impl Prepared {
    /// Has the destination start a QEMU that waits.
    ///
    /// # Errors
    /// With the destination's words.
    pub async fn at(
        source: &mut Agent,
        destination: &mut Agent,
        vm: &str,
        migration: &str,
        manner: Manner,
    ) -> Result<Self, RigError> {
        let status = source.vm(vm).await?;
        let request = PrepareDestinationRequest {
            command: destination.command(),
            migration: migration.to_owned(),
            definition: status.definition,
            mode: manner.mode.into(),
            generation: status.generation,
            source_host: source.host.clone(),
            source_page_address: format!("{}:{PAGE_PORT}", source.address),
            scatter: manner.scatter.clone(),
            gather_limit_bits_per_sec: manner.gather_limit.0,
            ..PrepareDestinationRequest::default()
        };
        let reply = destination.client.prepare_destination(request).await;
        let reply = reply.map_err(RigError::refused("to prepare the destination"))?.into_inner();
        let request = StartMigrationRequest {
            command: source.command(),
            migration: migration.to_owned(),
            vm: vm.to_owned(),
            mode: manner.mode.into(),
            scatter: manner.scatter,
            destination_host: destination.host.clone(),
            page_address: reply.page_address,
            token: reply.token,
            ..StartMigrationRequest::default()
        };
        Ok(Self { request })
    }

    /// Has the guest change at most so much of its disks per second, in bytes, until it is paused.
    pub fn hold_writes(&mut self, bytes_per_sec: u64) {
        self.request.disk_limit_bytes_per_sec = bytes_per_sec;
    }

    /// Sets it going, with this aim for the pause and this limit in bit/s.
    ///
    /// # Errors
    /// With the source's words.
    pub async fn start(
        mut self,
        source: &mut Agent,
        downtime: Duration,
        limit: Option<u64>,
    ) -> Result<(), RigError> {
        self.request.network_limit_bits_per_sec = limit.unwrap_or(0);
        self.request.downtime_limit_ms = u32::try_from(downtime.as_millis()).unwrap_or(u32::MAX);
        let started = source.client.start_migration(self.request).await;
        started.map(drop).map_err(RigError::refused("to start the migration"))
    }
}

fn configuration(
    host: &str,
    address: Ipv4Addr,
    own: &Path,
    certificates: &Path,
    images: &Path,
) -> String {
    let (own, images) = (own.display(), images.display());
    format!(
        "host = \"{host}\"\n\
         listen = [\"unix:{own}/agent.sock\"]\n\
         page_listen = \"{address}:{PAGE_PORT}\"\n\
         roles = [\"hypervisor\", \"intermediary\"]\n\
         tls_dir = \"{}\"\n\
         state_dir = \"{own}/state\"\n\
         run_dir = \"{own}/qemu\"\n\
         images_dir = \"{images}\"\n\
         vms_dir = \"{own}/vms\"\n\
         profiles_dir = \"{own}/profiles\"\n\
         memory = \"4 GiB\"\n\
         disk_dirs = [\"{own}/disks\"]\n\
         [qemu]\n\
         user = \"nobody\"\n\
         accelerator = \"tcg\"\n\
         [ovs]\n\
         database = \"unix:{own}/no-switch-here.sock\"\n",
        certificates.display()
    )
}

async fn connect(own: &Path, process: &mut Running) -> Result<AgentClient<Channel>, RigError> {
    let socket = own.join("agent.sock");
    let deadline = clock::now() + PATIENCE;
    loop {
        if let Ok(client) = connect_once(socket.clone()).await {
            return Ok(client);
        }
        if process.has_ended() || clock::now() > deadline {
            let log = fs::read_to_string(own.join("agent.log")).unwrap_or_default();
            let said = log.lines().last().unwrap_or_default();
            let what = format!("an answer of the agent in {} ({said})", own.display());
            return Err(RigError::TooLate { what, seconds: PATIENCE.as_secs() });
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn connect_once(socket: PathBuf) -> Result<AgentClient<Channel>, tonic::transport::Error> {
    let open = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The address is for the HTTP header only.
    let endpoint = Endpoint::from_static("http://agent");
    Ok(AgentClient::new(endpoint.connect_with_connector(open).await?))
}
