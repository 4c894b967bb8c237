//! Guests that run at their destination before their pages are there: post-copy and scatter-gather
//! with both ends' drivers, real QEMUs, and real redis-servers as stores. Each test ends with exactly
//! one running guest, whose memory is compared byte by byte.

mod two_hosts;

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lifeboat_agent::guests::Guests;
use lifeboat_agent::tasks;
use lifeboat_protocol::agent::{
    MigrationProgress, Mode, PageStore, Phase, Redundancy, ScatterPlan, StartMigrationRequest,
};
use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units::Bytes;
use lifeboat_scatter_gather::store::{KeySpace, Launch, Secret, Settings, StoreServer, User};
use tempfile::TempDir;
use tokio::task::AbortHandle;
use two_hosts::qemus::Qemus;
use two_hosts::{World, vm, world, world_of};

const PATIENCE: Duration = Duration::from_secs(20);

/// A store on a host of its own, as far as the agents can see.
struct Intermediary {
    server: StoreServer,
    settings: Settings,
    address: SocketAddr,
    store: PageStore,
    _folder: TempDir,
}

impl Intermediary {
    async fn start(number: u8, room: Bytes) -> Self {
        let folder = TempDir::new().unwrap();
        let user =
            |name: &str, byte: u8| User { name: name.to_owned(), secret: Secret::new(&[byte; 32]) };
        let settings = Settings {
            folder: folder.path().to_owned(),
            room,
            keys: KeySpace::new(&MigrationId::new("m1").unwrap()),
            owner: user("owner", 1),
            migration: user("m1", 2),
            tls: None,
        };
        let address: SocketAddr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let server = launched(&settings, address).await;
        let store = PageStore {
            host: format!("i{number}"),
            address: address.to_string(),
            user: "m1".to_owned(),
            secret: settings.migration.secret.reveal().to_owned(),
            memory_bytes: room.0,
            plain: true,
            ..PageStore::default()
        };
        Self { server, settings, address, store, _folder: folder }
    }

    /// Another server in its place, which has nothing.
    async fn start_anew(&mut self) {
        while tokio::net::UnixStream::connect(self.settings.socket()).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.server = launched(&self.settings, self.address).await;
    }

    fn signal(&self, signal: &str) {
        let process = self.server.process().to_string();
        let done = std::process::Command::new("kill").args([signal, &process]).status();
        assert!(done.is_ok_and(|status| status.success()), "process {process}");
    }

    fn kill(&self) {
        self.signal("-9");
    }
}

async fn launched(settings: &Settings, address: SocketAddr) -> StoreServer {
    let program = Path::new("redis-server");
    let launch = Launch { program, user: None, plain: Some(address) };
    let server = StoreServer::launch(launch, settings, PATIENCE).await;
    server.expect("redis-server is installed")
}

impl Drop for Intermediary {
    fn drop(&mut self) {
        let process = self.server.process().to_string();
        let _ = std::process::Command::new("kill").args(["-9", &process]).status();
    }
}

/// A guest that is scattered over `number` stores and gathered at `gather_limit` bit/s.
async fn scattered(
    world: &mut World,
    number: u8,
    redundancy: Redundancy,
    gather_limit: u64,
) -> Vec<Intermediary> {
    let plan = ScatterPlan { redundancy: redundancy.into(), ..ScatterPlan::default() };
    scattered_as(plan, world, number, gather_limit).await
}

/// The same, as a plan without stores says.
async fn scattered_as(
    plan: ScatterPlan,
    world: &mut World,
    number: u8,
    gather_limit: u64,
) -> Vec<Intermediary> {
    world.gather_limit = gather_limit;
    let (hosts, request) = with_stores(plan, world, number).await;
    let fast = StartMigrationRequest { network_limit_bits_per_sec: 0, ..request };
    world.start(&fast).await;
    hosts
}

/// A guest whose destination is prepared, with its stores, and what begins it.
async fn with_stores(
    plan: ScatterPlan,
    world: &mut World,
    number: u8,
) -> (Vec<Intermediary>, StartMigrationRequest) {
    let mut hosts = Vec::new();
    for number in 0..number {
        hosts.push(Intermediary::start(number, Bytes::from_mib(48)).await);
    }
    let stores = hosts.iter().map(|host| host.store.clone()).collect();
    world.scatter = Some(ScatterPlan { stores, ..plan });
    let request = world.prepare(Mode::ScatterGather).await;
    (hosts, request)
}

/// The source has nothing of the guest any more.
async fn evicted(world: &World) -> MigrationProgress {
    let source = world.end_of(&world.h1).await;
    assert_eq!(source.phase(), Phase::Completed, "{}", source.reason);
    assert!(!world.h1.guests.lives(&vm()), "the source still has its QEMU");
    source
}

async fn arrived_whole(world: &World) -> MigrationProgress {
    let destination = world.end_of(&world.h2).await;
    assert_eq!(destination.phase(), Phase::Completed, "{}", destination.reason);
    assert_eq!(destination.pages_arrived, destination.pages_total);
    assert!(!world.h2.store.wants_source(&vm()));
    world.runs_only_at(&world.h2, &world.h1).await;
    world.memory_is_whole_at(&world.h2).await;
    destination
}

#[tokio::test(flavor = "multi_thread")]
async fn in_post_copy_a_guest_runs_at_once_and_its_pages_follow() {
    for qemus in Qemus::all() {
        let world = world_of(&qemus).await;
        let request = world.prepare(Mode::PostCopy).await;
        world.start(&request).await;
        let source = evicted(&world).await;
        let destination = arrived_whole(&world).await;
        assert!(destination.faults_served > 0 && destination.pages_total > 5000, "{destination:?}");
        // The pace had time to compress what two sevenths of the pages hold.
        let plain = destination.pages_total * 4096;
        assert!(source.bytes_sent < plain / 100 * 95, "{} of {plain}", source.bytes_sent);
        eprintln!("downtime {} us, phases {:?}", source.downtime_us, source.phase_times);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_scatter_gather_the_source_is_empty_while_the_destination_gathers() {
    for qemus in Qemus::all() {
        let mut world = world_of(&qemus).await;
        let _hosts = scattered(&mut world, 3, Redundancy::Parity, 40_000_000).await;
        let source = evicted(&world).await;
        let mut gathering = world.h2.registry.progress("m1").unwrap();
        let stored = gathering.wait_for(|gathering| {
            assert_eq!(gathering.phase(), Phase::Gather);
            gathering.pages_stored > 1000
        });
        tokio::time::timeout(PATIENCE, stored).await.unwrap().unwrap();
        let destination = arrived_whole(&world).await;
        assert!(destination.total_ms > source.eviction_ms + 1000, "{source:?} {destination:?}");
        eprintln!(
            "downtime {} us, evicted after {} ms, gathered after {} ms, {} faults",
            source.downtime_us, source.eviction_ms, destination.total_ms, destination.faults_served
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_one_store_may_be_lost_once_the_source_has_gone() {
    for (stores, redundancy) in [(3, Redundancy::Parity), (2, Redundancy::Mirror)] {
        let mut world = world().await;
        let hosts = scattered(&mut world, stores, redundancy, 40_000_000).await;
        evicted(&world).await;
        hosts[usize::from(stores - 1)].kill();
        arrived_whole(&world).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_lost_while_the_source_scatters_costs_nothing() {
    let mut world = world().await;
    let hosts = scattered(&mut world, 3, Redundancy::Parity, 0).await;
    world.phase_at(&world.h1, Phase::Gather).await;
    hosts[0].kill();
    evicted(&world).await;
    arrived_whole(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_stands_still_is_waited_for_where_it_holds_the_only_copy() {
    let mut world = world().await;
    let hosts = scattered(&mut world, 1, Redundancy::None, 40_000_000).await;
    evicted(&world).await;
    hosts[0].signal("-STOP");
    tokio::time::sleep(Duration::from_secs(5)).await;
    hosts[0].signal("-CONT");
    arrived_whole(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_that_no_store_can_give_are_told_of_and_so_is_when_they_never_will_be() {
    let mut world = world().await;
    let mut hosts = scattered(&mut world, 3, Redundancy::Parity, 20_000_000).await;
    evicted(&world).await;
    hosts[..2].iter().for_each(Intermediary::kill);
    let told = async |what: &'static str| {
        let mut gathering = world.h2.registry.progress("m1").unwrap();
        let told = gathering.wait_for(|gathering| gathering.reason.contains(what));
        let told = tokio::time::timeout(PATIENCE, told).await.expect(what).unwrap().clone();
        assert_eq!(told.phase(), Phase::Gather, "{told:?}");
    };
    told("wait for stores that do not answer (i0, i1)").await;
    for host in &mut hosts[..2] {
        host.start_anew().await;
    }
    told("are lost: what stores held of them is gone (i0, i1)").await;
}

/// A post-copy at 40 Mbit/s: half of the pages are still at the source when it returns.
async fn half_way() -> World {
    let world = world().await;
    let request = world.prepare(Mode::PostCopy).await;
    world.start(&StartMigrationRequest { network_limit_bits_per_sec: 40_000_000, ..request }).await;
    some_have_come(&world, 2).await;
    world
}

/// One in `part` of the pages is here.
async fn some_have_come(world: &World, part: u64) {
    world.phase_at(&world.h1, Phase::PostCopy).await;
    let mut progress = world.h2.registry.progress("m1").unwrap();
    let half = progress.wait_for(|p| p.pages_total > 0 && p.pages_arrived > p.pages_total / part);
    let half = tokio::time::timeout(PATIENCE, half).await.expect("no pages come");
    let half = half.unwrap().clone();
    assert!(!half.phase().is_final(), "too fast for this test: {half:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sources_agent_may_be_killed_while_pages_are_at_the_source() {
    let mut world = half_way().await;
    world.h1.kill_agent();
    tokio::time::sleep(Duration::from_millis(700)).await;
    world.h1.start_agent().await;
    evicted(&world).await;
    arrived_whole(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_destinations_agent_may_be_killed_while_pages_are_at_the_source() {
    let mut world = half_way().await;
    world.h2.kill_agent();
    tokio::time::sleep(Duration::from_millis(700)).await;
    world.h2.start_agent().await;
    arrived_whole(&world).await;
    evicted(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_destinations_agent_may_be_killed_while_it_gathers() {
    let mut world = world().await;
    let _hosts = scattered(&mut world, 3, Redundancy::Parity, 40_000_000).await;
    evicted(&world).await;
    world.h2.kill_agent();
    tokio::time::sleep(Duration::from_millis(300)).await;
    world.h2.start_agent().await;
    arrived_whole(&world).await;
}

/// Carries connections, and cuts them.
struct Relay {
    address: String,
    carried: Arc<Mutex<Vec<AbortHandle>>>,
    listening: AbortHandle,
}

impl Relay {
    async fn to(address: String) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = listener.local_addr().unwrap().to_string();
        let carried: Arc<Mutex<Vec<AbortHandle>>> = Arc::default();
        let all = Arc::clone(&carried);
        let listening = tasks::spawn("relay", async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let address = address.clone();
                let carrying = tasks::spawn("carried", async move {
                    let mut far = tokio::net::TcpStream::connect(address).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
                all.lock().unwrap().push(carrying.abort_handle());
            }
        });
        Self { address: own, carried, listening: listening.abort_handle() }
    }

    /// Cuts all connections; new ones are taken.
    fn cut(&self) {
        self.carried.lock().unwrap().drain(..).for_each(|carrying| carrying.abort());
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.listening.abort();
        self.cut();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_connection_costs_time_and_nothing_else() {
    let world = world().await;
    let request = world.prepare(Mode::PostCopy).await;
    let relay = Relay::to(request.page_address.clone()).await;
    let request = StartMigrationRequest {
        page_address: relay.address.clone(),
        network_limit_bits_per_sec: 40_000_000,
        ..request
    };
    world.start(&request).await;
    for part in [10, 4, 2] {
        some_have_come(&world, part).await;
        relay.cut();
    }
    evicted(&world).await;
    arrived_whole(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stores_without_room_are_refused_before_the_guest_has_left() {
    let mut world = world().await;
    let store = Intermediary::start(0, Bytes::from_mib(4)).await;
    world.scatter =
        Some(ScatterPlan { stores: vec![store.store.clone()], ..ScatterPlan::default() });
    let request = world.prepare(Mode::ScatterGather).await;
    world.start(&request).await;
    let source = world.end_of(&world.h1).await;
    assert_eq!(source.phase(), Phase::Failed);
    assert!(source.reason.contains("room"), "{}", source.reason);
    world.end_of(&world.h2).await;
    world.runs_only_at(&world.h1, &world.h2).await;
    world.memory_is_whole_at(&world.h1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scatter_gather_without_stores_is_refused_and_changes_nothing() {
    let world = world().await;
    let request = world.prepare(Mode::PreCopy).await;
    let scattered = StartMigrationRequest { mode: Mode::ScatterGather.into(), ..request };
    let error = world.h1.registry.start_migration(&scattered).await.unwrap_err();
    assert!(error.to_string().contains("stores"), "{error}");
    world.h2.registry.cancel("m1", "").await.unwrap();
    world.runs_only_at(&world.h1, &world.h2).await;
}

/// Pages go from while the guest still runs at its source.
fn ahead(redundancy: Redundancy) -> ScatterPlan {
    ScatterPlan { redundancy: redundancy.into(), while_live: true, ..ScatterPlan::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_go_ahead_of_their_guest_and_those_that_it_writes_to_go_again() {
    for (stores, redundancy) in [(3, Redundancy::Parity), (1, Redundancy::None)] {
        let mut world = world().await;
        let _hosts = scattered_as(ahead(redundancy), &mut world, stores, 0).await;
        let source = evicted(&world).await;
        assert!(source.pages_ahead > 0, "{source:?}");
        assert_eq!(source.pages_stored, source.pages_total, "each page counts once");
        arrived_whole(&world).await;
        eprintln!("{} of {} pages went ahead", source.pages_ahead, source.pages_total);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_lost_before_the_guest_has_left_costs_nothing_or_the_attempt() {
    for (stores, redundancy) in [(3, Redundancy::Parity), (1, Redundancy::None)] {
        let mut world = world().await;
        let (hosts, request) = with_stores(ahead(redundancy), &mut world, stores).await;
        world
            .start(&StartMigrationRequest { network_limit_bits_per_sec: 80_000_000, ..request })
            .await;
        world.phase_at(&world.h1, Phase::MemoryCopy).await;
        hosts[0].kill();
        if redundancy == Redundancy::Parity {
            evicted(&world).await;
            arrived_whole(&world).await;
            continue;
        }
        let source = world.end_of(&world.h1).await;
        assert_eq!(source.phase(), Phase::Failed, "{source:?}");
        assert_eq!(source.failed_store_host, "i0", "{}", source.reason);
        world.end_of(&world.h2).await;
        world.runs_only_at(&world.h1, &world.h2).await;
        world.memory_is_whole_at(&world.h1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_cannot_be_reached_is_named_and_the_guest_runs_on() {
    let mut world = world().await;
    let (hosts, request) = with_stores(ahead(Redundancy::Mirror), &mut world, 2).await;
    hosts[1].kill();
    world.start(&request).await;
    let source = world.end_of(&world.h1).await;
    assert_eq!(source.phase(), Phase::Failed, "{source:?}");
    assert_eq!(source.failed_store_host, "i1", "{}", source.reason);
    world.end_of(&world.h2).await;
    world.runs_only_at(&world.h1, &world.h2).await;
    world.memory_is_whole_at(&world.h1).await;
}

/// What the destination's agent was told, lost with it: `left` of it is still there, and a store may be gone, too.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_told_of_the_pages_may_be_lost_and_is_read_off_the_stores() {
    for (left, lose_store) in [(Some(3), false), (None, true)] {
        let mut world = world().await;
        let plan = ahead(Redundancy::Parity);
        let hosts = scattered_as(plan, &mut world, 3, 20_000_000).await;
        evicted(&world).await;
        world.h2.kill_agent();
        if lose_store {
            hosts[1].kill();
        }
        let journal = world.h2.store.journal_path(&vm());
        match left {
            Some(part) => {
                let bytes = std::fs::read(&journal).unwrap();
                std::fs::write(&journal, &bytes[..bytes.len() / part]).unwrap();
            }
            None => std::fs::remove_file(&journal).unwrap(),
        }
        world.h2.start_agent().await;
        arrived_whole(&world).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_was_started_anew_while_the_agent_was_away_is_not_taken_for_the_one_with_the_pages()
 {
    let mut world = world().await;
    let mut hosts = scattered(&mut world, 3, Redundancy::Parity, 20_000_000).await;
    evicted(&world).await;
    world.h2.kill_agent();
    hosts[1].kill();
    hosts[1].start_anew().await;
    world.h2.start_agent().await;
    arrived_whole(&world).await;
}
