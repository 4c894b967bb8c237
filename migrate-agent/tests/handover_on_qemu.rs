//! The hand-over on real QEMUs: both ends' drivers in one process, a guest that ticks, a relay
//! over loopback. Each test ends with exactly one running guest. Crashes of whole agents are
//! tested with real agent processes in the package `tests/`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use lifeboat_agent::disk::process::client::Movers;
use lifeboat_agent::disk::rooms::DiskRooms;
use lifeboat_agent::guests::{Arrival, GuestError, Guests};
use lifeboat_agent::handover::Record;
use lifeboat_agent::handover::store::Store;
use lifeboat_agent::link::Listener;
use lifeboat_agent::qemu::qmp::{Qmp, RunState};
use lifeboat_agent::registry::Registry;
use lifeboat_agent::source::Context;
use lifeboat_protocol::agent::{
    MigrationProgress, Mode, Phase, PrepareDestinationRequest, StartMigrationRequest, VmDefinition,
};
use lifeboat_protocol::ids::{Generation, HostId, VmId};
use tokio::net::TcpListener;

/// A boot sector that dirties 32 pages around and around, and writes `T` to the serial port now
/// and then. Assembled from:
///
/// ```text
/// cli; xor ax,ax; mov ds,ax; mov bx,0x1000
/// next: mov es,bx; inc dword [es:0]; add bx,0x100; cmp bx,0x9000; jb same; mov bx,0x1000
///       inc dword [0x600]; mov eax,[0x600]; test eax,0x3fff; jnz same
///       mov dx,0x3f8; mov al,'T'; out dx,al
/// same: jmp next
/// ```
const TICKING: [u8; 53] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0xbb, 0x00, 0x10, 0x8e, 0xc3, 0x26, 0x66, 0xff, 0x06, 0x00, 0x00,
    0x81, 0xc3, 0x00, 0x01, 0x81, 0xfb, 0x00, 0x90, 0x72, 0x1a, 0xbb, 0x00, 0x10, 0x66, 0xff, 0x06,
    0x00, 0x06, 0x66, 0xa1, 0x00, 0x06, 0x66, 0xa9, 0xff, 0x3f, 0x00, 0x00, 0x75, 0x06, 0xba, 0xf8,
    0x03, 0xb0, 0x54, 0xee, 0xeb,
];

/// Guests that are nothing but QEMU processes of one binary with one machine.
struct Bare {
    directory: PathBuf,
    running: Mutex<HashMap<VmId, Child>>,
}

impl Bare {
    fn new(directory: &Path) -> Self {
        let mut sector = TICKING.to_vec();
        sector.push(0xd2);
        sector.resize(510, 0);
        sector.extend([0x55, 0xaa]);
        std::fs::create_dir_all(directory).unwrap();
        std::fs::write(directory.join("boot"), sector).unwrap();
        Self { directory: directory.to_owned(), running: Mutex::default() }
    }

    fn start(&self, vm: &VmId, extra: &[&str]) {
        let path = |name: &str| self.directory.join(name).display().to_string();
        let _ = std::fs::remove_file(path("qmp"));
        let child = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-machine", "pc-i440fx-7.2", "-m", "128", "-nodefaults"])
            .args(["-display", "none", "-serial", &format!("file:{}", path("serial"))])
            .args(["-drive", &format!("file={},format=raw,if=floppy,read-only=on", path("boot"))])
            .args(["-qmp", &format!("unix:{},server,nowait", path("qmp"))])
            .args(extra)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 must be installed (lab/install)");
        self.running.lock().unwrap().insert(vm.clone(), child);
    }

    fn ticks(&self) -> usize {
        std::fs::read(self.directory.join("serial")).map_or(0, |bytes| bytes.len())
    }

    fn kill(&self, vm: &VmId) {
        if let Some(mut child) = self.running.lock().unwrap().remove(vm) {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        for (_, mut child) in self.running.lock().unwrap().drain() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Guests for Bare {
    fn definition(&self, _: &VmId) -> Option<VmDefinition> {
        None
    }

    fn qmp<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<Qmp, GuestError>> {
        async move {
            let path = self.directory.join("qmp");
            for _ in 0..200 {
                match Qmp::connect(&path).await {
                    Ok(qmp) => return Ok(qmp),
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
            let source = "no QMP".into();
            Err(GuestError { vm: vm.clone(), doing: "reach its QEMU", source })
        }
        .boxed()
    }

    fn lives(&self, vm: &VmId) -> bool {
        let mut running = self.running.lock().unwrap();
        running.get_mut(vm).is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    fn socket_path(&self, _: &VmId, name: &str) -> Result<PathBuf, GuestError> {
        Ok(self.directory.join(name))
    }

    fn grant(&self, _: &VmId, _: &Path) -> Result<(), GuestError> {
        Ok(())
    }

    fn could_arrive(&self, _: &VmDefinition) -> Result<(), GuestError> {
        Ok(())
    }

    fn arrive<'a>(
        &'a self,
        definition: &'a VmDefinition,
        arrival: Arrival,
    ) -> BoxFuture<'a, Result<Qmp, GuestError>> {
        async move {
            let vm = VmId::new(definition.name.as_str()).unwrap();
            match arrival {
                Arrival::Stream => self.start(&vm, &["-S", "-incoming", "defer"]),
                Arrival::Cold => self.start(&vm, &["-S"]),
            }
            self.qmp(&vm).await
        }
        .boxed()
    }

    fn present(&self) -> Vec<VmId> {
        self.running.lock().unwrap().keys().cloned().collect()
    }

    fn start_again<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<Qmp, GuestError>> {
        async move {
            self.start(vm, &[]);
            self.qmp(vm).await
        }
        .boxed()
    }

    fn end<'a>(&'a self, vm: &'a VmId, _: bool) -> BoxFuture<'a, Result<(), GuestError>> {
        async move {
            self.kill(vm);
            Ok(())
        }
        .boxed()
    }
}

struct Host {
    guests: Arc<Bare>,
    registry: Registry,
    store: Store,
    address: String,
}

async fn host(name: &str, directory: &Path) -> Host {
    let directory = directory.join(name);
    let guests = Arc::new(Bare::new(&directory));
    let store = Store::open(directory.join("ownership")).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let context = Context {
        host: HostId::new(name).unwrap(),
        guests: guests.clone(),
        store: store.clone(),
        identity: None,
        movers: Movers {
            run_dir: directory.join("run"),
            program: env!("CARGO_BIN_EXE_lifeboat-disk").into(),
            tls_dir: None,
        },
        rooms: Arc::new(DiskRooms {
            directories: vec![],
            owner: (0, 0),
            notes: directory.join("left-disks"),
            kept_for: Duration::from_secs(1),
        }),
    };
    let registry = Registry::new(context, &address);
    let serving = registry.clone().serve_links(Listener::new(listener, None));
    lifeboat_agent::tasks::spawn("links", serving);
    Host { guests, registry, store, address }
}

fn vm() -> VmId {
    VmId::new("ticker").unwrap()
}

struct World {
    _directory: tempfile::TempDir,
    h1: Host,
    h2: Host,
}

/// A guest that ticks on h1, and h2 beside it.
async fn world() -> World {
    let directory = tempfile::tempdir().unwrap();
    let h1 = host("h1", directory.path()).await;
    let h2 = host("h2", directory.path()).await;
    h1.guests.start(&vm(), &[]);
    let owner = Record::Owner { generation: Generation(1), via: None, from: None, resumed: true };
    h1.store.write(&vm(), &owner).unwrap();
    while h1.guests.ticks() == 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    World { _directory: directory, h1, h2 }
}

impl World {
    async fn prepare(&self, mode: Mode) -> StartMigrationRequest {
        let request = PrepareDestinationRequest {
            migration: "m1".into(),
            definition: Some(VmDefinition { name: "ticker".into(), ..VmDefinition::default() }),
            mode: mode.into(),
            generation: 1,
            source_host: "h1".into(),
            source_page_address: self.h1.address.clone(),
            command: None,
            ..PrepareDestinationRequest::default()
        };
        let prepared = self.h2.registry.prepare_destination(&request).await.unwrap();
        StartMigrationRequest {
            migration: "m1".into(),
            vm: "ticker".into(),
            mode: mode.into(),
            destination_host: "h2".into(),
            page_address: prepared.page_address,
            token: prepared.token,
            network_limit_bits_per_sec: 400_000_000,
            ..StartMigrationRequest::default()
        }
    }

    async fn end_of(&self, host: &Host) -> MigrationProgress {
        let mut progress = host.registry.progress("m1").unwrap();
        let ended = progress.wait_for(|progress| progress.phase().is_final());
        tokio::time::timeout(Duration::from_secs(60), ended)
            .await
            .expect("the migration does not end")
            .unwrap()
            .clone()
    }

    /// Ticks come from exactly this host.
    async fn runs_only_at(&self, runs: &Host, rests: &Host) {
        assert_eq!(
            runs.guests.qmp(&vm()).await.unwrap().query_status().await.unwrap().status,
            RunState::Running
        );
        if rests.guests.lives(&vm()) {
            let qmp = rests.guests.qmp(&vm()).await.unwrap();
            assert_ne!(qmp.query_status().await.unwrap().status, RunState::Running);
        }
        let (running, resting) = (runs.guests.ticks(), rests.guests.ticks());
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(runs.guests.ticks() > running, "no ticks where it should run");
        assert_eq!(rests.guests.ticks(), resting, "ticks where it should not run");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_and_runs_on_at_the_destination() {
    let world = world().await;
    let request = world.prepare(Mode::PreCopy).await;
    world.h1.registry.start_migration(&request).await.unwrap();
    let source = world.end_of(&world.h1).await;
    let destination = world.end_of(&world.h2).await;
    assert_eq!(source.phase(), Phase::Completed, "{}", source.reason);
    assert_eq!(destination.phase(), Phase::Completed, "{}", destination.reason);
    assert!(source.downtime_us > 0 && source.eviction_ms > 0, "{source:?}");
    assert_eq!(source.bytes_sent, destination.bytes_sent);
    assert!(destination.resume_unix_us > source.stop_unix_us, "{source:?} {destination:?}");
    world.runs_only_at(&world.h2, &world.h1).await;
    assert!(!world.h1.guests.lives(&vm()), "the source still has its QEMU");
    eprintln!("downtime {} us, phases {:?}", source.downtime_us, source.phase_times);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_migration_leaves_the_guest_at_the_source() {
    let world = world().await;
    let request = world.prepare(Mode::PreCopy).await;
    let slow = StartMigrationRequest { network_limit_bits_per_sec: 2_000_000, ..request };
    world.h1.registry.start_migration(&slow).await.unwrap();
    let mut progress = world.h1.registry.progress("m1").unwrap();
    progress.wait_for(|progress| progress.bytes_sent > 0).await.unwrap();
    let ended = world.h1.registry.cancel("m1", "changed my mind").await.unwrap();
    assert_eq!(ended.phase(), Phase::Cancelled, "{}", ended.reason);
    assert!(ended.reason.contains("changed my mind"));
    let destination = world.end_of(&world.h2).await;
    assert_ne!(destination.phase(), Phase::Completed);
    world.runs_only_at(&world.h1, &world.h2).await;
    assert!(!world.h2.guests.lives(&vm()), "the destination still has its QEMU");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_whose_qemu_dies_costs_nothing() {
    let world = world().await;
    let request = world.prepare(Mode::PreCopy).await;
    let slow = StartMigrationRequest { network_limit_bits_per_sec: 2_000_000, ..request };
    world.h1.registry.start_migration(&slow).await.unwrap();
    let mut progress = world.h1.registry.progress("m1").unwrap();
    progress.wait_for(|progress| progress.bytes_sent > 0).await.unwrap();
    world.h2.guests.kill(&vm());
    let ended = world.end_of(&world.h1).await;
    assert_eq!(ended.phase(), Phase::Failed);
    world.runs_only_at(&world.h1, &world.h2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_migration_starts_the_guest_anew() {
    let world = world().await;
    let request = world.prepare(Mode::Cold).await;
    world.h1.registry.start_migration(&request).await.unwrap();
    let source = world.end_of(&world.h1).await;
    assert_eq!(source.phase(), Phase::Completed, "{}", source.reason);
    world.runs_only_at(&world.h2, &world.h1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mode_that_is_not_here_yet_says_so_and_changes_nothing() {
    let world = world().await;
    let request = world.prepare(Mode::PreCopy).await;
    let later = StartMigrationRequest { mode: Mode::PostCopy.into(), ..request };
    let error = world.h1.registry.start_migration(&later).await.unwrap_err();
    assert!(error.to_string().contains("not in this release"), "{error}");
    world.h2.registry.cancel("m1", "").await.unwrap();
    world.runs_only_at(&world.h1, &world.h2).await;
}
