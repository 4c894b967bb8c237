//! A cloud without guests: agents that speak the real gRPC on unix sockets and move names about, and
//! switches that only count what they hold. For the controller's logic alone; the real agent and
//! real switches are tested elsewhere.
//!
//! The agents go on by themselves when no controller watches, as real ones do, and write down
//! whatever a controller must never ask for.

mod agent;
mod switches;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use lifeboat_controller::config::Site;
use lifeboat_controller::tasks;
use lifeboat_controller::tls::TlsFiles;
use lifeboat_protocol::agent::agent_server::AgentServer;
use lifeboat_protocol::agent::{MigrationProgress, Phase};
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::Server;

pub(crate) use switches::CountingNetwork;

/// How often a running migration goes one step.
const STEP: Duration = Duration::from_millis(30);
/// Steps of a migration before COMMIT.
const STEPS: u64 = 10;

/// What is true in the cloud.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    /// VM to host.
    pub(crate) at: BTreeMap<String, String>,
    /// Every migration that ever began, as its source knows it.
    pub(crate) migrations: BTreeMap<String, MigrationProgress>,
    /// Stores that are open, by host and migration, and their bytes.
    pub(crate) stores: BTreeMap<(String, String), u64>,
    /// What each host sets aside for stores, bytes.
    pub(crate) store_room: u64,
    /// Whether destinations gather on and on.
    pub(crate) gathers_on: bool,
    /// Hosts that refuse to prepare.
    pub(crate) refusing: BTreeSet<String>,
    /// VMs whose next migration fails half way.
    pub(crate) failing: BTreeSet<String>,
    /// What was limited, and to how many bytes/s, in order.
    pub(crate) limits: Vec<(&'static str, String, u64)>,
    /// Whether migrations stand still.
    pub(crate) frozen: bool,
    /// What should never have been asked.
    pub(crate) violations: Vec<String>,
    /// Highest term that was seen.
    pub(crate) term: u64,
}

impl Truth {
    /// What a host would still set aside for stores, bytes.
    fn store_room_at(&self, host: &str) -> u64 {
        let here = self.stores.iter().filter(|((at, _), _)| at == host);
        self.store_room.saturating_sub(here.map(|(_, bytes)| bytes).sum())
    }
}

/// The whole cloud.
#[derive(Clone)]
pub(crate) struct Cloud {
    pub(crate) dir: Arc<tempfile::TempDir>,
    truth: Arc<Mutex<Truth>>,
}

impl Cloud {
    /// Hosts h1..hN, all VMs at h1.
    pub(crate) fn new(hosts: usize, vms: &[&str]) -> Self {
        let truth = Truth {
            at: vms.iter().map(|vm| (vm.to_string(), "h1".to_owned())).collect(),
            store_room: 2 << 30,
            ..Truth::default()
        };
        let cloud = Self {
            dir: Arc::new(tempfile::tempdir().unwrap()),
            truth: Arc::new(Mutex::new(truth)),
        };
        for n in 1..=hosts {
            cloud.serve(&format!("h{n}"));
        }
        cloud
    }

    pub(crate) fn truth(&self) -> MutexGuard<'_, Truth> {
        self.truth.lock().unwrap()
    }

    fn serve(&self, host: &str) {
        let listener = UnixListener::bind(self.dir.path().join(format!("{host}.sock"))).unwrap();
        let agent = agent::FakeAgent { host: host.to_owned(), cloud: self.clone() };
        let server = Server::builder().add_service(AgentServer::new(agent));
        tasks::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
    }

    /// The same agent once more, on TCP with a certificate.
    pub(crate) async fn serve_tls(&self, host: &str, certificate: &Path) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let agent = agent::FakeAgent { host: host.to_owned(), cloud: self.clone() };
        let tls = TlsFiles::load(certificate).unwrap().server();
        let server =
            Server::builder().tls_config(tls).unwrap().add_service(AgentServer::new(agent));
        tasks::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }

    /// The configuration of a controller of this cloud.
    pub(crate) fn config(&self, hosts: usize) -> String {
        let dir = self.dir.path().display();
        let mut text = format!(
            "[controller]\nlisten = [\"unix:{dir}/c.sock\"]\nstate_dir = \"{dir}/state\"\n\
             [[switch]]\nname = \"s1\"\ndatapath_id = \"1\"\novsdb = \"unix:{dir}/s1.db\"\n"
        );
        for n in 1..=hosts {
            text.push_str(&format!(
                "[[host]]\nname = \"h{n}\"\nagent = \"unix:{dir}/h{n}.sock\"\n\
                 ovsdb = \"unix:{dir}/h{n}.db\"\nbridge = \"br0\"\nuplink = \"h{n}-eth0\"\n\
                 address = \"10.0.0.{n}\"\n\
                 [[link]]\na = \"s1:s1-eth{n}\"\nb = \"h{n}:h{n}-eth0\"\ncapacity = \"200 Mbit/s\"\n"
            ));
        }
        text
    }

    /// The same, read.
    pub(crate) fn site(&self, hosts: usize) -> Site {
        Site::parse(Path::new("test.toml"), &self.config(hosts)).unwrap()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A migration goes on by itself, whoever watches.
    fn run(&self, migration: &str) {
        let (cloud, migration) = (self.clone(), migration.to_owned());
        tasks::spawn(async move {
            for step in 1..=STEPS {
                tokio::time::sleep(STEP).await;
                while cloud.truth().frozen {
                    tokio::time::sleep(STEP).await;
                }
                if !cloud.step(&migration, step) {
                    return;
                }
            }
            cloud.set_phase(&migration, Phase::Committing);
            tokio::time::sleep(STEP).await;
            cloud.complete(&migration);
        });
    }

    fn step(&self, migration: &str, step: u64) -> bool {
        let mut truth = self.truth();
        let vm = truth.migrations[migration].vm.clone();
        let fails = step == STEPS / 2 && truth.failing.remove(&vm);
        let progress = truth.migrations.get_mut(migration).unwrap();
        if progress.phase() != Phase::MemoryCopy {
            return false;
        }
        if fails {
            progress.set_phase(Phase::Failed);
            progress.reason = "the page link broke".to_owned();
            return false;
        }
        progress.bytes_remaining = progress.bytes_total * (STEPS - step) / STEPS;
        progress.bytes_sent = progress.bytes_total - progress.bytes_remaining;
        true
    }

    fn set_phase(&self, migration: &str, phase: Phase) {
        self.truth().migrations.get_mut(migration).unwrap().set_phase(phase);
    }

    fn complete(&self, migration: &str) {
        let mut truth = self.truth();
        let progress = truth.migrations.get_mut(migration).unwrap();
        progress.set_phase(Phase::Completed);
        progress.total_ms = 330;
        progress.eviction_ms = 340;
        progress.downtime_us = 42_000;
        let (vm, to) = (progress.vm.clone(), progress.destination_host.clone());
        truth.at.insert(vm, to);
    }
}
