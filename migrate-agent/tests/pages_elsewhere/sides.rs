//! What becomes of a guest whose pages are elsewhere when one of its two sides breaks, or what is between
//! them; and when QEMU says something that cannot be carried page by page.

use std::time::Duration;

use lifeboat_agent::guests::Guests;
use lifeboat_protocol::agent::{Mode, Phase, Redundancy, StartMigrationRequest};

use super::intermediary::Intermediary;
use super::relay::Relay;
use super::two_hosts::{World, vm, world};
use super::{agent_again, arrived_whole, evicted, half_way, scattering, stores_for, until};

/// What a source sends to stores, bit/s: about three seconds of it.
const SLOW: u64 = 60_000_000;

#[tokio::test(flavor = "multi_thread")]
async fn the_sources_agent_may_be_killed_while_it_scatters() {
    let mut world = world().await;
    let _hosts = stores_for(&mut world, 3, Redundancy::Parity, 80_000_000).await;
    let request = world.prepare(Mode::ScatterGather).await;
    scattering(&world, request, SLOW).await;
    agent_again(&mut world.h1).await;
    evicted(&world).await;
    arrived_whole(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_is_cut_for_seconds_while_the_source_scatters_costs_time_and_nothing_else() {
    let mut world = world().await;
    let _hosts = stores_for(&mut world, 3, Redundancy::Parity, 80_000_000).await;
    let request = world.prepare(Mode::ScatterGather).await;
    let relay = Relay::to(request.page_address.clone()).await;
    let request = StartMigrationRequest { page_address: relay.address.clone(), ..request };
    scattering(&world, request, SLOW).await;
    relay.cut_for(Duration::from_secs(3)).await;
    assert!(world.h1.guests.lives(&vm()), "the source went without a word of the destination's");
    let source = evicted(&world).await;
    assert_eq!(source.pages_stored, source.pages_total, "it did not go on: {source:?}");
    arrived_whole(&world).await;
}

/// The pages that have come are right, and not all have.
async fn the_rest_is_missing(world: &World) {
    let seen = world.known_at(&world.h2).await;
    assert!(seen.wrong == 0 && seen.missing > 0 && seen.right > 0, "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: tests/full"]
async fn what_a_source_that_dies_still_had_is_said_to_be_lost() {
    for its_agent_too in [false, true] {
        let mut world = half_way().await;
        if its_agent_too {
            world.h1.kill_agent();
        }
        world.h1.guests.kill(&vm());
        if its_agent_too {
            world.h1.start_agent().await;
        }
        let said = until(&world.h1, "it is lost", |now| now.phase() == Phase::Lost).await;
        assert!(said.reason.contains("has not fetched is lost"), "{}", said.reason);
        the_rest_is_missing(&world).await;
        assert!(world.h2.guests.lives(&vm()));
    }
}

/// A guest half of which is at the destination, or in stores, and all of which the source still has.
async fn not_released(mode: Mode) -> (World, Vec<Intermediary>) {
    if mode == Mode::PostCopy {
        return (half_way().await, Vec::new());
    }
    let mut world = world().await;
    let hosts = stores_for(&mut world, 3, Redundancy::Parity, 80_000_000).await;
    let request = world.prepare(mode).await;
    scattering(&world, request, SLOW).await;
    (world, hosts)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: tests/full"]
async fn a_guest_that_dies_at_its_destination_is_brought_back_by_a_claim_as_it_was() {
    for mode in [Mode::PostCopy, Mode::ScatterGather] {
        let (world, _hosts) = not_released(mode).await;
        world.h2.guests.kill(&vm());
        let said = until(&world.h1, "it is lost", |now| now.phase() == Phase::Lost).await;
        assert!(said.reason.contains("lifeboat claim ticker --fenced"), "{}", said.reason);
        let said = until(&world.h2, "it is lost there", |now| now.phase() == Phase::Lost).await;
        assert!(
            said.reason.contains("QEMU died after ticker had been handed over"),
            "{}",
            said.reason
        );
        claimed(&world).await;
    }
}

/// By an operator, at the source: it runs there, and nowhere else.
async fn claimed(world: &World) {
    let registry = world.h1.registry.clone();
    let unfenced = world.h1.run(async move { registry.claim(&vm(), false).await }).await;
    assert!(unfenced.unwrap_err().to_string().contains("--fenced"));
    let registry = world.h1.registry.clone();
    world.h1.run(async move { registry.claim(&vm(), true).await }).await.unwrap();
    world.runs_only_at(&world.h1, &world.h2).await;
    world.memory_is_whole_at(&world.h1).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: tests/full"]
async fn a_guest_whose_destination_has_gone_is_brought_back_by_a_claim_as_it_was() {
    for mode in [Mode::PostCopy, Mode::ScatterGather] {
        let (mut world, _hosts) = not_released(mode).await;
        world.h2.kill_agent();
        world.h2.guests.kill(&vm());
        tokio::time::sleep(Duration::from_secs(1)).await;
        claimed(&world).await;
        // It comes back, and finds nothing to run.
        world.h2.start_agent().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!world.h2.guests.lives(&vm()), "it was started there, too");
        world.runs_only_at(&world.h1, &world.h2).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: tests/full"]
async fn a_stream_that_cannot_be_carried_page_by_page_leaves_the_guest_where_it_is() {
    for capability in ["x-ignore-shared", "dirty-bitmaps"] {
        let world = world().await;
        let request = world.prepare(Mode::PostCopy).await;
        world.h1.guests.interfere(capability);
        world.start(&request).await;
        let source = world.end_of(&world.h1).await;
        assert_eq!(source.phase(), Phase::Failed, "{capability}: {source:?}");
        assert!(source.reason.contains(capability), "{capability}: {}", source.reason);
        world.end_of(&world.h2).await;
        world.runs_only_at(&world.h1, &world.h2).await;
        world.memory_is_whole_at(&world.h1).await;
    }
}
