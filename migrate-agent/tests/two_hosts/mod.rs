//! Two hosts in one process, with real QEMUs and a guest that ticks: both ends' drivers, registries
//! and page listeners, without gRPC. Used by the tests of the hand-over.
#![allow(dead_code, reason = "each test uses its part of it")]

#[path = "../qemus/mod.rs"]
pub(crate) mod qemus;

use std::collections::HashMap;
use std::future::{Future, ready};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use lifeboat_agent::disk::parameters::Parameters;
use lifeboat_agent::disk::process::client::Movers;
use lifeboat_agent::disk::rooms::DiskRooms;
use lifeboat_agent::guests::{Arrival, GuestError, Guests};
use lifeboat_agent::handover::Record;
use lifeboat_agent::handover::store::Store;
use lifeboat_agent::link::Listener;
use lifeboat_agent::qemu::qmp::{Qmp, RunState};
use lifeboat_agent::qemu::ram::Ram;
use lifeboat_agent::registry::Registry;
use lifeboat_agent::source::Context;
use lifeboat_protocol::agent::{
    MigrationProgress, Mode, Phase, PrepareDestinationRequest, ScatterPlan, StartMigrationRequest,
    VmDefinition,
};
use lifeboat_protocol::ids::{Generation, HostId, VmId};
use lifeboat_protocol::units::Bytes;
use tokio::net::TcpListener;
use tokio::runtime::{Handle, Runtime};
use tokio::task::block_in_place;

use qemus::Qemus;

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
const TICKING: [u8; 54] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0xbb, 0x00, 0x10, 0x8e, 0xc3, 0x26, 0x66, 0xff, 0x06, 0x00, 0x00,
    0x81, 0xc3, 0x00, 0x01, 0x81, 0xfb, 0x00, 0x90, 0x72, 0x1a, 0xbb, 0x00, 0x10, 0x66, 0xff, 0x06,
    0x00, 0x06, 0x66, 0xa1, 0x00, 0x06, 0x66, 0xa9, 0xff, 0x3f, 0x00, 0x00, 0x75, 0x06, 0xba, 0xf8,
    0x03, 0xb0, 0x54, 0xee, 0xeb, 0xd2,
];

/// A boot sector that dirties 84 MiB from 40 MiB on, page after page and around and around, and writes `T`
/// to the serial port after each round, which takes about a tenth of a second. Assembled from:
///
/// ```text
/// cli; xor ax,ax; mov ds,ax; lgdt [table]; mov eax,cr0; or al,1; mov cr0,eax; jmp 8:flat
/// flat: mov ax,0x10; mov ds,ax
/// round: mov ebx,0x2800000
/// next: inc dword [ebx]; mov ecx,1500
/// same: dec ecx; jnz same; add ebx,0x1000; cmp ebx,0x7c00000; jb next
///       mov dx,0x3f8; mov al,'T'; out dx,al; jmp round
/// ```
///
/// and, from byte 72 on, a flat descriptor table with what loads it.
const OUTRUNNING: [u8; 102] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x0f, 0x01, 0x16, 0x60, 0x7c, 0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f,
    0x22, 0xc0, 0xea, 0x17, 0x7c, 0x08, 0x00, 0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8, 0xbb, 0x00, 0x00,
    0x80, 0x02, 0xff, 0x03, 0xb9, 0xdc, 0x05, 0x00, 0x00, 0x49, 0x75, 0xfd, 0x81, 0xc3, 0x00, 0x10,
    0x00, 0x00, 0x81, 0xfb, 0x00, 0x00, 0xc0, 0x07, 0x72, 0xe8, 0x66, 0xba, 0xf8, 0x03, 0xb0, 0x54,
    0xee, 0xeb, 0xda, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0xff, 0xff, 0x00, 0x00, 0x00, 0x9a, 0xcf, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x92, 0xcf, 0x00,
    0x17, 0x00, 0x48, 0x7c, 0x00, 0x00,
];

/// What a guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Does {
    /// It dirties little.
    Tick,
    /// It dirties two thirds of its memory ten times a second.
    Outrun {
        /// Its owner forbids that it is slowed down.
        unslowed: bool,
    },
}

/// Guests that are nothing but QEMU processes of one binary with one machine.
pub(crate) struct Bare {
    directory: PathBuf,
    program: PathBuf,
    machine: &'static str,
    does: Does,
    /// What somebody else switches on when a migration has been prepared and has not begun.
    interferes: Mutex<Option<&'static str>>,
    /// `None` once the host has gone: then nothing is started any more.
    running: Mutex<Option<HashMap<VmId, Child>>>,
}

impl Bare {
    fn new(directory: &Path, program: &Path, machine: &'static str, does: Does) -> Self {
        let mut sector = match does {
            Does::Tick => TICKING.to_vec(),
            Does::Outrun { .. } => OUTRUNNING.to_vec(),
        };
        sector.resize(510, 0);
        sector.extend([0x55, 0xaa]);
        std::fs::create_dir_all(directory).unwrap();
        std::fs::write(directory.join("boot"), sector).unwrap();
        let (directory, program) = (directory.to_owned(), program.to_owned());
        Self {
            directory,
            program,
            machine,
            does,
            interferes: Mutex::default(),
            running: Mutex::new(Some(HashMap::new())),
        }
    }

    /// From now on a migration begins with this capability, by another monitor than the agent's: in the moment
    /// between the agent's choice of capabilities and its order to migrate.
    pub(crate) fn interfere(&self, capability: &'static str) {
        *self.interferes.lock().unwrap() = Some(capability);
    }

    /// Another way to its QEMU than the agent's.
    pub(crate) async fn watch(&self) -> Qmp {
        Qmp::connect(&self.directory.join("watch")).await.unwrap()
    }

    pub(crate) fn start(&self, vm: &VmId, extra: &[&str]) {
        let mut running = self.running.lock().unwrap();
        let Some(running) = running.as_mut() else { return };
        let path = |name: &str| self.directory.join(name).display().to_string();
        for monitor in ["qmp", "watch"] {
            let _ = std::fs::remove_file(path(monitor));
        }
        let child = Command::new(&self.program)
            .args(["-accel", "tcg", "-machine", self.machine, "-m", "128", "-nodefaults"])
            .args(["-display", "none", "-serial", &format!("file:{}", path("serial"))])
            .args(["-drive", &format!("file={},format=raw,if=floppy,read-only=on", path("boot"))])
            .args(["-qmp", &format!("unix:{},server,nowait", path("qmp"))])
            .args(["-qmp", &format!("unix:{},server,nowait", path("watch"))])
            .args(extra)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 must be installed (lab/install)");
        running.insert(vm.clone(), child);
    }

    pub(crate) fn ticks(&self) -> usize {
        std::fs::read(self.directory.join("serial")).map_or(0, |bytes| bytes.len())
    }

    pub(crate) fn kill(&self, vm: &VmId) {
        let child = self.running.lock().unwrap().as_mut().and_then(|running| running.remove(vm));
        if let Some(mut child) = child {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Ends every guest, and none begins any more.
    fn close(&self) {
        for (_, mut child) in self.running.lock().unwrap().take().into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Guests for Bare {
    fn definition(&self, _: &VmId) -> Option<VmDefinition> {
        let forbids = self.does == Does::Outrun { unslowed: true };
        forbids.then(|| VmDefinition { forbid_throttling: true, ..VmDefinition::default() })
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
        let child = running.as_mut().and_then(|running| running.get_mut(vm));
        child.is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    fn socket_path(&self, _: &VmId, name: &str) -> Result<PathBuf, GuestError> {
        Ok(self.directory.join(name))
    }

    fn grant(&self, _: &VmId, _: &Path) -> Result<(), GuestError> {
        let capability = *self.interferes.lock().unwrap();
        if let Some(capability) = capability {
            let switch_on = async {
                let qmp = self.watch().await;
                qmp.migrate_set_capabilities(&[(capability, true)]).await.unwrap();
            };
            block_in_place(|| Handle::current().block_on(switch_on));
        }
        Ok(())
    }

    fn arrive<'a>(
        &'a self,
        definition: &'a VmDefinition,
        arrival: Arrival,
        _: &'a std::collections::BTreeMap<usize, PathBuf>,
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

    fn memory(&self, vm: &VmId) -> Result<Ram, GuestError> {
        let running = self.running.lock().unwrap();
        let pid = running.as_ref().and_then(|running| running.get(vm)).map_or(0, Child::id);
        let size = Bytes::from_mib(128);
        let failed = |source| GuestError {
            vm: vm.clone(),
            doing: "read its memory",
            source: Box::new(source),
        };
        Ram::find(pid, size).map_err(failed)
    }

    fn keep_monitor<'a>(&'a self, _: &'a VmId) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(ready(Ok(())))
    }

    fn recover_by_kept_monitor<'a>(
        &'a self,
        vm: &'a VmId,
        _: &'a str,
    ) -> BoxFuture<'a, Result<(), GuestError>> {
        let source = "this host keeps no monitor open".into();
        let nothing = GuestError { vm: vm.clone(), doing: "take its stream up", source };
        Box::pin(ready(Err(nothing)))
    }

    fn forget_monitor(&self, _: &VmId) {}

    fn shares_our_mounts(&self, _: &VmId) -> bool {
        true
    }

    fn could_arrive(&self, _: &VmDefinition) -> Result<(), GuestError> {
        Ok(())
    }

    fn present(&self) -> Vec<VmId> {
        self.running.lock().unwrap().iter().flat_map(HashMap::keys).cloned().collect()
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

pub(crate) struct Host {
    name: HostId,
    pub(crate) guests: Arc<Bare>,
    pub(crate) registry: Registry,
    pub(crate) store: Store,
    pub(crate) address: String,
    /// Everything that the agent does, so that it can be killed.
    runtime: Option<Runtime>,
}

impl Host {
    async fn start(
        name: &str,
        directory: &Path,
        (qemu, machine): (&Path, &'static str),
        does: Does,
    ) -> Self {
        let directory = directory.join(name);
        let guests = Arc::new(Bare::new(&directory, qemu, machine, does));
        let store = Store::open(directory.join("ownership")).unwrap();
        let name = HostId::new(name).unwrap();
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let address = address.to_string();
        let (runtime, registry) = agent(&name, &guests, &store, &address).await;
        Self { name, guests, registry, store, address, runtime: Some(runtime) }
    }

    /// Does something as this host's agent.
    pub(crate) async fn run<F>(&self, work: F) -> F::Output
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.runtime.as_ref().expect("the agent runs").spawn(work).await.unwrap()
    }

    /// The agent is killed at once, wherever it is. Its guests stay.
    pub(crate) fn kill_agent(&mut self) {
        self.runtime.take().expect("the agent runs").shutdown_background();
    }

    /// Another agent takes over.
    pub(crate) async fn start_agent(&mut self) {
        let (runtime, registry) = agent(&self.name, &self.guests, &self.store, &self.address).await;
        (self.runtime, self.registry) = (Some(runtime), registry);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        // What the agent did may outlive this test program, and would keep them: nobody else ends them then.
        self.guests.close();
    }
}

/// An agent without gRPC: takes up what its records say, and then page links.
async fn agent(
    name: &HostId,
    guests: &Arc<Bare>,
    store: &Store,
    address: &str,
) -> (Runtime, Registry) {
    let runtime = Runtime::new().unwrap();
    let context = Context {
        host: name.clone(),
        guests: guests.clone(),
        store: store.clone(),
        identity: None,
        movers: Movers {
            run_dir: guests.directory.join("run"),
            program: env!("CARGO_BIN_EXE_lifeboat-disk").into(),
            tls_dir: None,
            parameters: Parameters::default(),
        },
        rooms: Arc::new(DiskRooms {
            directories: vec![],
            owner: (0, 0),
            notes: guests.directory.join("left-disks"),
            kept_for: Duration::from_secs(1),
        }),
    };
    let registry = Registry::new(context, address);
    let (serving, address) = (registry.clone(), address.to_owned());
    let started = runtime.spawn(async move {
        let listener = loop {
            // The one before has just been killed.
            match TcpListener::bind(&address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        serving.recover().await.unwrap();
        lifeboat_agent::tasks::spawn("links", serving.serve_links(Listener::new(listener, None)));
    });
    started.await.unwrap();
    (runtime, registry)
}

pub(crate) fn vm() -> VmId {
    VmId::new("ticker").unwrap()
}

pub(crate) struct World {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) h1: Host,
    pub(crate) h2: Host,
    /// Of scatter-gather: where pages wait, and how fast they are fetched from there (bit/s).
    pub(crate) scatter: Option<ScatterPlan>,
    pub(crate) gather_limit: u64,
}

/// Pages of the known memory as they were seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) right: usize,
    pub(crate) wrong: usize,
    pub(crate) missing: usize,
}

/// Where in the guest's memory known bytes lie, and how many.
const KNOWN_AT: u64 = 0x100_0000;
const KNOWN_BYTES: usize = 24 << 20;

/// Bytes of which no two pages are alike; every seventh page is zero, two of seven can be compressed.
fn known() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(KNOWN_BYTES);
    for page in 0..KNOWN_BYTES / 4096 {
        for _ in 0..512 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let word = match page % 7 {
                0 => 0,
                // Compressible to about a half, and to next to nothing.
                1 => state >> 40,
                2 => page as u64,
                _ => state,
            };
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    bytes
}

/// A guest that ticks on h1, with some known memory, and h2 beside it, which has none of it.
pub(crate) async fn world() -> World {
    world_of(&Qemus::installed()).await
}

/// The same with these QEMUs.
pub(crate) async fn world_of(qemus: &Qemus) -> World {
    world_that(qemus, Does::Tick).await
}

/// The same with a guest that does something else.
pub(crate) async fn world_that(qemus: &Qemus, does: Does) -> World {
    qemus.announce();
    let directory = tempfile::tempdir().unwrap();
    let (source, destination) =
        ((&*qemus.source, qemus.machine), (&*qemus.destination, qemus.machine));
    let h1 = Host::start("h1", directory.path(), source, does).await;
    let h2 = Host::start("h2", directory.path(), destination, does).await;
    let file = directory.path().join("known");
    std::fs::write(&file, known()).unwrap();
    let loaded = format!("loader,file={},addr={KNOWN_AT:#x},force-raw=on", file.display());
    h1.guests.start(&vm(), &["-device", &loaded]);
    let owner = Record::Owner { generation: Generation(1), via: None, from: None, resumed: true };
    h1.store.write(&vm(), &owner).unwrap();
    while h1.guests.ticks() == 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    World { directory, h1, h2, scatter: None, gather_limit: 0 }
}

impl World {
    pub(crate) async fn prepare(&self, mode: Mode) -> StartMigrationRequest {
        let request = PrepareDestinationRequest {
            migration: "m1".into(),
            definition: Some(VmDefinition {
                name: "ticker".into(),
                memory_bytes: 128 << 20,
                ..VmDefinition::default()
            }),
            mode: mode.into(),
            generation: 1,
            source_host: "h1".into(),
            source_page_address: self.h1.address.clone(),
            command: None,
            scatter: self.scatter.clone(),
            gather_limit_bits_per_sec: self.gather_limit,
            ..PrepareDestinationRequest::default()
        };
        let registry = self.h2.registry.clone();
        let prepared = self.h2.run(async move { registry.prepare_destination(&request).await });
        let prepared = prepared.await.unwrap();
        StartMigrationRequest {
            migration: "m1".into(),
            vm: "ticker".into(),
            mode: mode.into(),
            destination_host: "h2".into(),
            page_address: prepared.page_address,
            token: prepared.token,
            network_limit_bits_per_sec: 400_000_000,
            scatter: self.scatter.clone(),
            ..StartMigrationRequest::default()
        }
    }

    /// The known memory is in the guest at this host as it was put there.
    pub(crate) async fn memory_is_whole_at(&self, host: &Host) {
        let file = self.directory.path().join("seen");
        let _ = std::fs::remove_file(&file);
        let arguments = serde_json::json!(
            {"val": KNOWN_AT, "size": KNOWN_BYTES, "filename": file.display().to_string()}
        );
        let qmp = host.guests.qmp(&vm()).await.unwrap();
        qmp.execute("pmemsave", arguments, Duration::from_secs(20)).await.unwrap();
        let (seen, known) = (std::fs::read(&file).unwrap(), known());
        let wrong = seen.chunks(4096).zip(known.chunks(4096)).position(|(a, b)| a != b);
        assert_eq!((seen.len(), wrong), (known.len(), None), "a page is not as it was");
    }

    /// How the known memory is in the guest at this host, whose pages may not all be there. Looks without
    /// touching what is not: that would wait for it.
    pub(crate) async fn known_at(&self, host: &Host) -> Seen {
        let (ram, known) = (host.guests.memory(&vm()).unwrap(), known());
        let first = KNOWN_AT / 4096;
        let populated = ram.populated(first, (KNOWN_BYTES / 4096) as u64).unwrap();
        let (mut seen, mut page) = (Seen::default(), [0; 4096]);
        for ((number, known), is_there) in (first..).zip(known.chunks(4096)).zip(populated) {
            match is_there {
                true => {
                    ram.read(number, &mut page).unwrap();
                    *(if page == known { &mut seen.right } else { &mut seen.wrong }) += 1;
                }
                // A page of zeroes is as good as one that is not there.
                false => seen.missing += usize::from(known.iter().any(|byte| *byte != 0)),
            }
        }
        seen
    }

    /// Sets it going, as the source's agent.
    pub(crate) async fn start(&self, request: &StartMigrationRequest) {
        let (registry, request) = (self.h1.registry.clone(), request.clone());
        let started = self.h1.run(async move { registry.start_migration(&request).await });
        started.await.unwrap();
    }

    /// Waits until the migration is so far on this host.
    pub(crate) async fn phase_at(&self, host: &Host, phase: Phase) -> MigrationProgress {
        let mut progress = host.registry.progress("m1").unwrap();
        let reached = progress.wait_for(|progress| progress.phase() == phase);
        match tokio::time::timeout(Duration::from_secs(30), reached).await {
            Ok(reached) => reached.unwrap().clone(),
            Err(_) => panic!("it does not come to {phase:?}: {}", self.so_far()),
        }
    }

    /// How far it is on both hosts, for whoever has to find out why it came no further.
    fn so_far(&self) -> String {
        let of = |host: &Host| match host.registry.progress("m1") {
            Ok(progress) => {
                format!("{:?} `{}`", progress.borrow().phase(), progress.borrow().reason)
            }
            Err(error) => error.to_string(),
        };
        format!("at the source {}, at the destination {}", of(&self.h1), of(&self.h2))
    }

    pub(crate) async fn end_of(&self, host: &Host) -> MigrationProgress {
        let mut progress = host.registry.progress("m1").unwrap();
        let ended = progress.wait_for(|progress| progress.phase().is_final());
        match tokio::time::timeout(Duration::from_secs(60), ended).await {
            Ok(ended) => ended.unwrap().clone(),
            Err(_) => panic!("it does not end: {}", self.so_far()),
        }
    }

    /// Its QEMU has ended, or is about to.
    async fn has_no_guest(&self, host: &Host) {
        let ended = async {
            while host.guests.lives(&vm()) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), ended).await.expect("it lives and is silent");
    }

    /// Ticks come from exactly this host.
    pub(crate) async fn runs_only_at(&self, runs: &Host, rests: &Host) {
        assert_eq!(
            runs.guests.qmp(&vm()).await.unwrap().query_status().await.unwrap().status,
            RunState::Running
        );
        let asked =
            async { Some(rests.guests.qmp(&vm()).await.ok()?.query_status().await.ok()?.status) };
        match asked.await {
            Some(status) => assert_ne!(status, RunState::Running),
            // It is ending, or has ended.
            None => self.has_no_guest(rests).await,
        }
        let (running, resting) = (runs.guests.ticks(), rests.guests.ticks());
        tokio::time::sleep(Duration::from_millis(300)).await;
        // A guest that waits for a CPU ticks late.
        let ticks = async {
            while runs.guests.ticks() <= running {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let ticks = tokio::time::timeout(Duration::from_secs(20), ticks).await;
        ticks.expect("no ticks where it should run");
        assert_eq!(rests.guests.ticks(), resting, "ticks where it should not run");
    }
}
