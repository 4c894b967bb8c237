//! `lifeboat controller`: puts the parts together, in the order in which they may be trusted.
//!
//! The journal first (it proves that no other controller runs on this state), then the term, then
//! the connections, then the unfinished evacuations, and the operators last: nobody can ask before
//! everything is there. Deliberately not here: anything that decides.

use std::collections::BTreeSet;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::ids::HostId;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::agents::{AgentError, Agents, poll_forever};
use crate::audit::{AuditError, AuditLog};
use crate::clock;
use crate::config::{MetricsListen, Site};
use crate::driver::{Driver, Hands, Patience};
use crate::evacuation::Fleet;
use crate::grpc::{ServeError, serve};
use crate::inventory::Inventory;
use crate::journal::{Journal, JournalError};
use crate::metrics;
use crate::network::Network;
use crate::planner::Planner;
use crate::reroute::reroute_forever;
use crate::reservations::adapt_forever;
use crate::service::Service;
use crate::tasks;
use crate::tls::{TlsError, TlsFiles};

/// How long open calls may take to end once the controller is told to stop.
const GRACE: Duration = Duration::from_secs(2);
/// When leftovers on switches are looked for again, after the first look at once; from then on
/// after as long as the last pause: a switch may be away for days.
const SWEEP_AGAIN: [Duration; 4] = [
    Duration::from_secs(5),
    Duration::from_secs(15),
    Duration::from_secs(60),
    Duration::from_secs(300),
];

/// Why the controller does not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The state directory cannot be made.
    #[error("state_dir {dir} cannot be made")]
    StateDir {
        /// The directory.
        dir: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The audit log.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// An agent's address.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A socket.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// Signals cannot be heard.
    #[error("signals cannot be handled")]
    Signal(#[source] std::io::Error),
}

/// A controller that runs: its machines, its connections.
pub struct Daemon {
    /// What operators can ask.
    pub service: Arc<Service>,
    tls: Option<TlsFiles>,
    background: Vec<JoinHandle<()>>,
}

impl Daemon {
    /// Opens the state, counts the term, connects, and takes up what was unfinished.
    ///
    /// # Errors
    /// When the state is in use, cannot be read, or an address or certificate cannot be used.
    pub fn start(
        site: Site,
        network: Arc<dyn Network>,
        patience: Patience,
    ) -> Result<Self, DaemonError> {
        let site = Arc::new(site);
        let controller = &site.config.controller;
        let dir = &controller.state_dir;
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|source| DaemonError::StateDir { dir: dir.clone(), source })?;
        let journal = Arc::new(Journal::open(dir)?);
        let audit = AuditLog::open(dir)?;
        let term = journal.next_term()?;
        let tls = controller.tls_dir.as_deref().map(TlsFiles::load).transpose()?;
        let agents =
            Arc::new(Agents::new(&site.config.hosts, &site.config.switches, tls.as_ref(), term)?);
        network.meet_agents(&agents);
        let hosts: Vec<HostId> = site.config.hosts.iter().map(|host| host.name.clone()).collect();
        let cordoned: BTreeSet<HostId> = journal.cordoned()?.into_iter().collect();
        let inventory = Arc::new(Inventory::new(&hosts, &cordoned, clock::now()));
        let planner = Planner {
            site: Arc::clone(&site),
            inventory: Arc::clone(&inventory),
            agents: Arc::clone(&agents),
            network: Arc::clone(&network),
        };
        let fleet = Fleet::new(journal.evacuations()?);
        tracing::info!(term = term.0, hosts = hosts.len(), "controller starts");
        let mut background = Vec::new();
        for host in hosts {
            let poll = poll_forever(Arc::clone(&agents), Arc::clone(&inventory), host);
            background.push(tasks::spawn(poll));
        }
        let hands = Hands::new(planner.clone(), patience);
        let driver = Driver::start(fleet, Arc::clone(&journal), hands);
        let rules = site.config.policy.rules();
        background.push(tasks::spawn(adapt_forever(
            rules,
            Arc::clone(&network),
            Arc::clone(&agents),
            driver.clone(),
        )));
        background.push(tasks::spawn(reroute_forever(planner.clone(), driver.clone())));
        background.push(tasks::spawn(sweep(Arc::clone(&network), driver.clone())));
        let service =
            Service { site, inventory, agents, network, journal, audit, driver, planner, term };
        Ok(Self { service: Arc::new(service), tls, background })
    }

    /// Serves operators until `stop` becomes true, or the process is told to end.
    ///
    /// # Errors
    /// When a socket cannot be opened or breaks.
    pub async fn serve(mut self) -> Result<(), DaemonError> {
        let (stop, stopped) = watch::channel(false);
        let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Signal)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Signal)?;
        let service = Arc::clone(&self.service);
        let addresses = self.service.site.config.controller.listen.clone();
        let tls = self.tls.clone();
        if let MetricsListen::At(at) = service.site.config.controller.metrics_listen {
            self.background.push(tasks::spawn(metrics::serve(Arc::clone(&service), at)));
        }
        let mut serving =
            tasks::spawn(async move { serve(service, &addresses, tls.as_ref(), stopped).await });
        tokio::select! {
            ended = &mut serving => return Ok(ended.unwrap_or(Ok(()))?),
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("controller stops; migrations go on at the agents");
        stop.send_replace(true);
        // A watch never ends by itself: it is cut off.
        let _ = tokio::time::timeout(GRACE, serving).await;
        for task in &self.background {
            task.abort();
        }
        Ok(())
    }
}

/// Takes away what a killed controller left on the switches. Switches connect in their own time, so
/// it looks several times.
async fn sweep(network: Arc<dyn Network>, driver: Driver) {
    let last = SWEEP_AGAIN[SWEEP_AGAIN.len() - 1];
    let pauses = [Duration::ZERO].into_iter().chain(SWEEP_AGAIN);
    for pause in pauses.chain(std::iter::repeat(last)) {
        tokio::time::sleep(pause).await;
        let keep = driver.fleet().live_migrations();
        let report = network.release_leftovers(keep).await;
        if !report.released.is_empty() {
            let ports: Vec<String> = report.released.iter().map(ToString::to_string).collect();
            tracing::info!(?ports, "leftovers released");
        }
        for failure in &report.failures {
            tracing::debug!(switch = %failure.switch, error = %failure.error, "leftovers unknown");
        }
    }
}
