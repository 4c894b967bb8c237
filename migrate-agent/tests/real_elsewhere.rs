//! Post-copy and scatter-gather with the agent's binary: three agents, their gRPC, QEMU as another
//! user, a store that one of them keeps, and a Linux guest that checks its own memory byte by byte.
//!
//! Needs root, and `lab/image`'s guest. QEMU's user needs userfaultfd: the sysctl is set for as long
//! as the test runs.

#[path = "real_agent/agent.rs"]
#[allow(dead_code, reason = "each test uses its part of it")]
mod agent;
mod qemus;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent::{Agent, status};
use lifeboat_agent::clock;
use lifeboat_protocol::agent::agent_client::AgentClient;
use lifeboat_protocol::agent::{
    MigrationProgress, Mode, PageStore, Phase, PrepareDestinationRequest, PrepareStoreRequest,
    QueryMigrationRequest, ScatterPlan, StartMigrationRequest, StartVmRequest, VmState,
};
use qemus::Qemus;
use tonic::transport::Channel;

const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";
const PATIENCE: Duration = Duration::from_secs(90);

/// Whether an unprivileged QEMU may fetch pages is the machine's setting: put back afterwards.
struct Allowed(String);

impl Allowed {
    fn now() -> Self {
        let before = std::fs::read_to_string(SYSCTL).unwrap_or_default();
        std::fs::write(SYSCTL, "1").expect("needs root");
        Self(before)
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        let _ = std::fs::write(SYSCTL, self.0.trim());
    }
}

fn images() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let made = std::process::Command::new(root.join("lab/image")).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    root.join("lab/build")
}

fn definition(machine: &str) -> String {
    format!(
        "name = \"db\"\nmemory = \"128 MiB\"\nvcpus = 1\nmachine = \"{machine}\"\n\
         cpu_model = \"max\"\nkernel = \"vmlinuz\"\ninitrd = \"initrd\"\n\
         kernel_arguments = \"console=ttyS0 quiet panic=-1 nokaslr tsc=unstable no_timer_check mitigations=off \
         lb.name=db lb.role=idle lb.region={} lb.dirty=100 lb.check=2000\"\n",
        48 << 20
    )
}

struct Host {
    name: &'static str,
    agent: Agent,
    client: AgentClient<Channel>,
    address: String,
}

async fn host(name: &'static str, qemu: &Path, images: &Path, vms: &[(&str, &str)]) -> Host {
    let mut agent = Agent::prepare(vms);
    let file = agent.directory.path().join("agent.toml");
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let own_images = agent.directory.path().join("images").display().to_string();
    let with_qemu = format!(
        "roles = [\"hypervisor\", \"intermediary\"]\n[qemu]\nprogram = \"{}\"",
        qemu.display()
    );
    let text = std::fs::read_to_string(&file).unwrap();
    let text = text
        .replace("host = \"h1\"", &format!("host = \"{name}\""))
        .replace("page_listen = \"127.0.0.1:0\"", &format!("page_listen = \"{address}\""))
        .replace(&own_images, &images.display().to_string())
        .replace("[qemu]", &with_qemu);
    std::fs::write(&file, text).unwrap();
    let client = agent.start().await;
    Host { name, agent, client, address }
}

impl Host {
    /// Lines of the guest's serial line so far that hold these words.
    fn said(&self, words: &str) -> usize {
        let log = std::fs::read(self.agent.run_dir("db").serial_log()).unwrap_or_default();
        String::from_utf8_lossy(&log).lines().filter(|line| line.contains(words)).count()
    }

    /// The guest goes on and finds its memory whole.
    async fn ticks_on(&self, more: usize) {
        let (before, end) = (self.said("LIFEBOAT-TICK"), clock::now() + PATIENCE);
        while self.said("LIFEBOAT-TICK") < before + more {
            assert!(clock::now() < end, "the guest says nothing at {}", self.name);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(self.said("LIFEBOAT-CORRUPT"), 0, "wrong bytes at {}", self.name);
    }

    async fn progress(&mut self, migration: &str) -> MigrationProgress {
        let request = QueryMigrationRequest { migration: migration.to_owned() };
        self.client.query_progress(request).await.unwrap().into_inner()
    }

    async fn ended(&mut self, migration: &str) -> MigrationProgress {
        let end = clock::now() + PATIENCE;
        loop {
            let progress = self.progress(migration).await;
            if progress.phase().is_final() {
                assert_eq!(progress.phase(), Phase::Completed, "{}", progress.reason);
                return progress;
            }
            assert!(clock::now() < end, "{migration} does not end at {}: {progress:?}", self.name);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Keeps pages of a migration.
    async fn store(&mut self, migration: &str) -> PageStore {
        let request = PrepareStoreRequest {
            command: self.agent.command(),
            migration: migration.to_owned(),
            vm: "db".to_owned(),
            memory_bytes: 160 << 20,
            ..PrepareStoreRequest::default()
        };
        self.client.prepare_store(request).await.unwrap().into_inner().store.unwrap()
    }
}

/// Sets a migration going.
async fn begin(
    migration: &str,
    (source, destination): (&mut Host, &mut Host),
    scatter: Option<ScatterPlan>,
) {
    let mode = if scatter.is_some() { Mode::ScatterGather } else { Mode::PostCopy };
    let vm = status(&mut source.client, "db").await;
    let request = PrepareDestinationRequest {
        command: destination.agent.command(),
        migration: migration.to_owned(),
        definition: vm.definition,
        mode: mode.into(),
        generation: vm.generation,
        source_host: source.name.to_owned(),
        source_page_address: source.address.clone(),
        scatter: scatter.clone(),
        gather_limit_bits_per_sec: 100_000_000,
        ..PrepareDestinationRequest::default()
    };
    let prepared = destination.client.prepare_destination(request).await.unwrap().into_inner();
    let request = StartMigrationRequest {
        command: source.agent.command(),
        migration: migration.to_owned(),
        vm: "db".to_owned(),
        mode: mode.into(),
        destination_host: destination.name.to_owned(),
        page_address: prepared.page_address,
        token: prepared.token,
        scatter,
        ..StartMigrationRequest::default()
    };
    source.client.start_migration(request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_linux_guest_finds_its_memory_whole_after_post_copy_and_after_scatter_gather() {
    let _allowed = Allowed::now();
    let images = images();
    for qemus in Qemus::all() {
        qemus.announce();
        there_and_on(&qemus, &images).await;
    }
}

/// From h1 to h2 by post-copy, and from there by scatter-gather back to h1, whose pages the third
/// keeps; to the third, if h1's QEMU is older: nobody promises that a guest can go back to that.
async fn there_and_on(qemus: &Qemus, images: &Path) {
    let definition = definition(qemus.machine);
    let mut h1 = host("h1", &qemus.source, images, &[("db", &definition)]).await;
    let mut h2 = host("h2", &qemus.destination, images, &[]).await;
    let mut h3 = host("h3", &qemus.destination, images, &[]).await;
    let start = StartVmRequest { command: h1.agent.command(), vm: "db".to_owned() };
    h1.client.start_vm(start).await.unwrap();
    h1.ticks_on(3).await;

    begin("m1", (&mut h1, &mut h2), None).await;
    let source = h1.ended("m1").await;
    let destination = h2.ended("m1").await;
    assert!(destination.faults_served > 0 && destination.pages_total > 0, "{destination:?}");
    h2.ticks_on(5).await;
    assert_eq!(status(&mut h1.client, "db").await.state(), VmState::Ceded);
    eprintln!(
        "post-copy: downtime {} us, evicted {} ms, {} pages, {} faults",
        source.downtime_us, source.eviction_ms, destination.pages_total, destination.faults_served
    );

    let (target, keeper) = match qemus.source == qemus.destination {
        true => (&mut h1, &mut h3),
        false => (&mut h3, &mut h1),
    };
    let stores = vec![keeper.store("m2").await];
    let scatter = ScatterPlan { stores, ..ScatterPlan::default() };
    begin("m2", (&mut h2, target), Some(scatter)).await;
    let source = h2.ended("m2").await;
    assert_eq!(target.progress("m2").await.phase(), Phase::Gather, "the source left too late");
    let destination = target.ended("m2").await;
    target.ticks_on(5).await;
    eprintln!(
        "scatter-gather: downtime {} us, evicted {} ms, gathered {} ms, {} pages, {} faults",
        source.downtime_us,
        source.eviction_ms,
        destination.total_ms,
        destination.pages_total,
        destination.faults_served
    );
}
