//! Puts the agent together, in the one order that is safe, and takes it apart again.
//!
//! ```text
//!   ports bound -> records read -> QEMUs adopted -> open hand-overs taken up
//!       -> stores adopted -> page links served -> gRPC served -> VMs marked so started
//! ```
//!
//! Nothing is served before the records have been taken up: a question answered from half a
//! state could cost a guest. When the agent stops, its guests run on.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::FlockOperation;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::clock;
use crate::config::{AgentRole, Config};
use crate::disk::process::client::Movers;
use crate::disk::rooms::DiskRooms;
use crate::handover::store::{Store, StoreError};
use crate::host::{HostError, QemuProgram, gather};
use crate::intermediary::{Intermediary, IntermediaryError};
use crate::link::{LinkError, Listener};
use crate::registry::{Registry, RegistryError};
use crate::server::listen::{Bound, ListenError, bind};
use crate::server::{Rooms, Service, TermError, Terms};
use crate::source::Context;
use crate::tls::{TlsError, TlsIdentity};
use crate::vms::{VmError, Vms};

/// How long calls that run may take to end when the agent stops.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// An agent that was killed has gone within this time.
const ENDING_LIMIT: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How often it is looked for disks that have been kept long enough.
const EXPIRE_EVERY: Duration = Duration::from_secs(600);

/// Why the agent could not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The ownership records.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Who is obeyed.
    #[error(transparent)]
    Term(#[from] TermError),
    /// The VMs.
    #[error(transparent)]
    Vms(#[from] VmError),
    /// The host's facts.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Open hand-overs.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// gRPC.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Page links.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// Stores.
    #[error(transparent)]
    Intermediary(#[from] IntermediaryError),
    /// Another agent.
    #[error("another agent runs with this state directory: {} is locked", path.display())]
    Second {
        /// The lock.
        path: PathBuf,
    },
    /// A directory or file of ours.
    #[error("the agent cannot use its {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Signals.
    #[error("cannot listen for signals")]
    Signal(#[source] std::io::Error),
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// When a part cannot be set up, or one that must not end does.
pub async fn run(config: Config) -> Result<(), RunError> {
    let identity = config.tls_dir.as_deref().map(TlsIdentity::load).transpose()?;
    let _lock = lock(&config.state_dir).await?;
    let terms = Terms::open(config.state_dir.join("term"))?;
    let pages = TcpListener::bind(config.page_listen)
        .await
        .map_err(|source| ListenError::Tcp { address: config.page_listen, source })?;
    let mut bound = vec![];
    for listen in &config.listen {
        bound.push(bind(listen, identity.clone()).await?);
    }

    let store = Store::open(config.state_dir.join("ownership"))?;
    let vms = Vms::open(config.vms.clone(), Arc::new(store.clone())).await?;
    let context = Context {
        host: config.host.clone(),
        guests: Arc::new(vms.clone()),
        store: store.clone(),
        identity: identity.clone(),
        movers: movers(&config),
        rooms: Arc::new(rooms(&config)),
    };
    crate::tasks::spawn("disks left behind", expire_disks(Arc::clone(&context.rooms)));
    let registry = Registry::new(context, &config.page_address);
    registry.recover().await?;
    let listener = Listener::new(pages, identity.clone());
    let links = crate::tasks::spawn("page links", registry.clone().serve_links(listener));

    let intermediary = open_stores(&config, identity, &vms).await?;
    let hypervisor = config.roles.contains(&AgentRole::Hypervisor);
    let program = QemuProgram {
        program: &config.vms.qemu,
        user: config.vms.user,
        accelerator: config.vms.accelerator,
    };
    let facts = gather(hypervisor.then_some(program)).await?;
    let first_since_boot = is_first_since_boot(&config.state_dir, &facts.boot_id)?;
    let service = Service::new(Rooms {
        host: config.host.clone(),
        roles: config.roles.clone(),
        facts,
        page_address: config.page_address.clone(),
        vms: vms.clone(),
        intermediary,
        registry,
        store,
        terms,
    });
    if hypervisor && first_since_boot {
        crate::tasks::spawn("autostart", async move { vms.autostart().await });
    }
    serve_all(service, bound, links).await
}

async fn open_stores(
    config: &Config,
    identity: Option<TlsIdentity>,
    vms: &Vms,
) -> Result<Option<Intermediary>, RunError> {
    if !config.roles.contains(&AgentRole::Intermediary) {
        return Ok(None);
    }
    let (settings, address) = (config.intermediary.clone(), config.page_listen.ip());
    let opened =
        Intermediary::open(config.host.clone(), settings, address, identity, vms.clone()).await?;
    crate::tasks::spawn("stores", opened.clone().tend());
    Ok(Some(opened))
}

fn movers(config: &Config) -> Movers {
    // Programs of one release lie together.
    let name = "lifeboat-disk";
    let beside = std::env::current_exe().map(|own| own.with_file_name(name));
    Movers {
        run_dir: config.vms.run_dir.clone(),
        program: beside.unwrap_or_else(|_| name.into()),
        tls_dir: config.tls_dir.clone(),
        parameters: config.disks.parameters,
    }
}

fn rooms(config: &Config) -> DiskRooms {
    let user = config.vms.user;
    DiskRooms {
        directories: config.disks.directories.clone(),
        owner: (user.uid, user.gid),
        notes: config.state_dir.join("left-disks"),
        kept_for: config.disks.kept_for,
    }
}

/// Keeps a second agent from this state directory, for as long as the file is open.
///
/// One that was killed while it was starting a process has left a copy of itself that is about to become
/// that process, and has the file open until it is.
async fn lock(state_dir: &Path) -> Result<File, RunError> {
    let failed = |path: &Path, source| RunError::Directory { path: path.to_owned(), source };
    std::fs::create_dir_all(state_dir).map_err(|source| failed(state_dir, source))?;
    let path = state_dir.join("lock");
    let file = File::create(&path).map_err(|source| failed(&path, source))?;
    let deadline = clock::now() + ENDING_LIMIT;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if clock::now() < deadline => {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(RunError::Second { path }),
            Err(errno) => return Err(failed(&path, errno.into())),
        }
    }
}

/// Whether no agent has run since the host's boot `boot_id`: VMs are autostarted once per boot,
/// so that one which an operator stopped is not started by an upgrade of the agent.
fn is_first_since_boot(state_dir: &Path, boot_id: &str) -> Result<bool, RunError> {
    let path = state_dir.join("boot");
    if std::fs::read_to_string(&path).is_ok_and(|known| known.trim() == boot_id) {
        return Ok(false);
    }
    std::fs::write(&path, boot_id).map_err(|source| RunError::Directory { path, source })?;
    Ok(true)
}

/// Deletes what was kept long enough; as long as the agent lives.
async fn expire_disks(rooms: Arc<DiskRooms>) {
    let mut look = tokio::time::interval(EXPIRE_EVERY);
    loop {
        look.tick().await;
        let rooms = Arc::clone(&rooms);
        crate::tasks::blocking(move || rooms.expire(clock::unix_now())).await;
    }
}

type Links = tokio::task::JoinHandle<Result<(), LinkError>>;

async fn serve_all(service: Service, bound: Vec<Bound>, links: Links) -> Result<(), RunError> {
    let (stop, stopped) = watch::channel(false);
    let mut servers = tokio::task::JoinSet::new();
    for bound in bound {
        let (service, mut stopped) = (service.clone(), stopped.clone());
        servers.spawn(async move {
            let shutdown = async move {
                let _ = stopped.wait_for(|stop| *stop).await;
            };
            bound.serve(service, shutdown).await
        });
    }
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signal)?;
    tracing::info!("ready");
    let ended = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        Some(ended) = servers.join_next() => ended.unwrap_or(Ok(())).map_err(RunError::from),
        ended = links => ended.unwrap_or(Ok(())).map_err(RunError::from),
    };
    // Watchers of progress may stay connected for ever: those are cut, not waited for.
    let _ = stop.send(true);
    tracing::info!("stopping; guests run on");
    let all = async { while servers.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(STOP_GRACE, all).await;
    ended
}
