//! Pages that go to stores while their guest still runs at its source; stores that fail before it has left; and
//! what an agent of the destination was told, lost with it.

use lifeboat_protocol::agent::{Mode, Phase, Redundancy, ScatterPlan, StartMigrationRequest};

use super::intermediary::Intermediary;
use super::two_hosts::{World, vm, world};
use super::{arrived_whole, evicted, scattered, stores_as};

/// A guest whose destination is prepared, with its stores, and what begins it.
async fn prepared(
    world: &mut World,
    plan: ScatterPlan,
    stores: u8,
    gather_limit: u64,
) -> (Vec<Intermediary>, StartMigrationRequest) {
    let hosts = stores_as(world, stores, plan, gather_limit).await;
    let request = world.prepare(Mode::ScatterGather).await;
    (hosts, request)
}

/// The same, on its way as fast as it goes.
async fn begun(
    world: &mut World,
    plan: ScatterPlan,
    stores: u8,
    gather_limit: u64,
) -> Vec<Intermediary> {
    let (hosts, request) = prepared(world, plan, stores, gather_limit).await;
    let fast = StartMigrationRequest { network_limit_bits_per_sec: 0, ..request };
    world.start(&fast).await;
    hosts
}

/// Pages go from while the guest still runs at its source.
fn ahead(redundancy: Redundancy) -> ScatterPlan {
    ScatterPlan { redundancy: redundancy.into(), while_live: true, ..ScatterPlan::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_go_ahead_of_their_guest_and_those_that_it_writes_to_go_again() {
    for (stores, redundancy) in [(3, Redundancy::Parity), (1, Redundancy::None)] {
        let mut world = world().await;
        let _hosts = begun(&mut world, ahead(redundancy), stores, 0).await;
        let source = evicted(&world).await;
        assert!(source.pages_ahead > 0, "{source:?}");
        assert_eq!(source.pages_stored, source.pages_total, "each page counts once");
        arrived_whole(&world).await;
        eprintln!("{} of {} pages went ahead", source.pages_ahead, source.pages_total);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_lost_while_pages_go_ahead_costs_nothing() {
    let mut world = world().await;
    let (hosts, request) = prepared(&mut world, ahead(Redundancy::Parity), 3, 0).await;
    world.start(&StartMigrationRequest { network_limit_bits_per_sec: 80_000_000, ..request }).await;
    world.phase_at(&world.h1, Phase::MemoryCopy).await;
    hosts[0].kill();
    evicted(&world).await;
    arrived_whole(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_takes_nothing_before_the_guest_has_left_is_named_and_the_guest_runs_on() {
    let mut world = world().await;
    let (hosts, request) = prepared(&mut world, ahead(Redundancy::None), 1, 0).await;
    hosts[0].fill().await;
    world.start(&request).await;
    stays(&world, "i0").await;
}

/// The migration has failed at an intermediary, and its guest is where it was.
async fn stays(world: &World, failed_at: &str) {
    let source = world.end_of(&world.h1).await;
    assert_eq!(source.phase(), Phase::Failed, "{source:?}");
    assert_eq!(source.failed_store_host, failed_at, "{}", source.reason);
    world.end_of(&world.h2).await;
    world.runs_only_at(&world.h1, &world.h2).await;
    world.memory_is_whole_at(&world.h1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_cannot_be_reached_is_named_and_the_guest_runs_on() {
    let mut world = world().await;
    let (hosts, request) = prepared(&mut world, ahead(Redundancy::Mirror), 2, 0).await;
    hosts[1].kill();
    world.start(&request).await;
    stays(&world, "i1").await;
}

/// What the destination's agent was told, lost with it: `left` of it is still there, and a store may be gone, too.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_told_of_the_pages_may_be_lost_and_is_read_off_the_stores() {
    for (left, lose_store) in [(Some(3), false), (None, true)] {
        let mut world = world().await;
        let plan = ahead(Redundancy::Parity);
        let hosts = begun(&mut world, plan, 3, 20_000_000).await;
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
