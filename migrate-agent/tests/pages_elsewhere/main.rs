//! Guests that run at their destination before their pages are there: post-copy and scatter-gather
//! with both ends' drivers, real QEMUs, and real redis-servers as stores. Each test ends with exactly
//! one running guest, whose memory is compared byte by byte; those of guests that are lost end with what
//! is said of that, and with no page that is not as it was.

mod ahead;
mod intermediary;
mod relay;
mod sides;
mod stores;
#[path = "../two_hosts/mod.rs"]
mod two_hosts;

use std::time::Duration;

use intermediary::Intermediary;
use lifeboat_agent::guests::Guests;
use lifeboat_protocol::agent::{
    MigrationProgress, Mode, Phase, Redundancy, ScatterPlan, StartMigrationRequest,
};
use lifeboat_protocol::units::Bytes;
use relay::Relay;
use two_hosts::qemus::Qemus;
use two_hosts::{Host, World, vm, world, world_of};

const PATIENCE: Duration = Duration::from_secs(20);

/// Stores for a guest, which is gathered from them at `gather_limit` bit/s.
async fn stores_for(
    world: &mut World,
    number: u8,
    redundancy: Redundancy,
    gather_limit: u64,
) -> Vec<Intermediary> {
    let plan = ScatterPlan { redundancy: redundancy.into(), ..ScatterPlan::default() };
    stores_as(world, number, plan, gather_limit).await
}

/// The same, as a plan without stores says.
async fn stores_as(
    world: &mut World,
    number: u8,
    plan: ScatterPlan,
    gather_limit: u64,
) -> Vec<Intermediary> {
    let mut hosts = Vec::new();
    for number in 0..number {
        hosts.push(Intermediary::start(number, Bytes::from_mib(48)).await);
    }
    let stores = hosts.iter().map(|host| host.store.clone()).collect();
    world.scatter = Some(ScatterPlan { stores, ..plan });
    world.gather_limit = gather_limit;
    hosts
}

/// A guest that is scattered over `number` stores as fast as it goes, and gathered at `gather_limit` bit/s.
async fn scattered(
    world: &mut World,
    number: u8,
    redundancy: Redundancy,
    gather_limit: u64,
) -> Vec<Intermediary> {
    let hosts = stores_for(world, number, redundancy, gather_limit).await;
    let request = world.prepare(Mode::ScatterGather).await;
    let fast = StartMigrationRequest { network_limit_bits_per_sec: 0, ..request };
    world.start(&fast).await;
    hosts
}

/// A guest that is on its way to stores at `limit` bit/s; returns when some of its pages are there.
async fn scattering(world: &World, request: StartMigrationRequest, limit: u64) {
    world.start(&StartMigrationRequest { network_limit_bits_per_sec: limit, ..request }).await;
    world.phase_at(&world.h1, Phase::Gather).await;
    let progress = until(&world.h1, "pages are in stores", |now| now.pages_stored > 800).await;
    assert!(progress.pages_stored < progress.pages_total, "too fast for this test: {progress:?}");
}

/// Waits until a host says so of the migration.
async fn until(
    host: &Host,
    what: &str,
    is_so: impl FnMut(&MigrationProgress) -> bool,
) -> MigrationProgress {
    let mut progress = host.registry.progress("m1").unwrap();
    let so = tokio::time::timeout(PATIENCE, progress.wait_for(is_so)).await;
    let so = so.map(|so| so.unwrap().clone());
    so.unwrap_or_else(|_| {
        panic!("{what}: never; {:?}", host.registry.progress("m1").unwrap().borrow())
    })
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
        let hosts = scattered(&mut world, 3, Redundancy::Parity, 40_000_000).await;
        let source = evicted(&world).await;
        stores::hold_each_page_once(&hosts, &source).await;
        until(&world.h2, "pages are in stores", |gathering| {
            assert_eq!(gathering.phase(), Phase::Gather);
            gathering.pages_stored > 1000
        })
        .await;
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
    for qemus in Qemus::all() {
        for (stores, redundancy) in [(3, Redundancy::Parity), (2, Redundancy::Mirror)] {
            let mut world = world_of(&qemus).await;
            let hosts = scattered(&mut world, stores, redundancy, 40_000_000).await;
            evicted(&world).await;
            hosts[usize::from(stores - 1)].kill();
            arrived_whole(&world).await;
        }
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
        let told = until(&world.h2, what, |gathering| gathering.reason.contains(what)).await;
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

/// Its agent is killed, and the next one comes after a while.
async fn agent_again(host: &mut Host) {
    host.kill_agent();
    tokio::time::sleep(Duration::from_millis(700)).await;
    host.start_agent().await;
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
    agent_again(&mut world.h1).await;
    evicted(&world).await;
    arrived_whole(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_destinations_agent_may_be_killed_while_pages_are_at_the_source() {
    let mut world = half_way().await;
    agent_again(&mut world.h2).await;
    arrived_whole(&world).await;
    evicted(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_destinations_agent_may_be_killed_while_it_gathers() {
    for qemus in Qemus::all() {
        let mut world = world_of(&qemus).await;
        let _hosts = scattered(&mut world, 3, Redundancy::Parity, 40_000_000).await;
        evicted(&world).await;
        world.h2.kill_agent();
        tokio::time::sleep(Duration::from_millis(300)).await;
        world.h2.start_agent().await;
        arrived_whole(&world).await;
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
