//! What becomes of pages in stores that spoil, fill up, or begin anew.

use lifeboat_agent::guests::Guests;
use lifeboat_protocol::agent::{MigrationProgress, Mode, Phase, Redundancy};
use lifeboat_scatter_gather::pack::{Batch, Width, pack_bytes_most};

use super::intermediary::Intermediary;
use super::two_hosts::{vm, world};
use super::{arrived_whole, evicted, scattered, scattering, stores_for, until};

/// Everything is in stores: each page once, those of zeroes not at all, and of parity no more than one pack in three.
pub(crate) async fn hold_each_page_once(hosts: &[Intermediary], source: &MigrationProgress) {
    assert_eq!(source.pages_stored, source.pages_total, "{source:?}");
    let (mut packs, mut packed, mut parities) = (0, 0, 0);
    for host in hosts {
        packs += host.packs().await.len() as u64;
    }
    for host in hosts {
        let (in_packs, in_parities) = host.bytes(packs).await;
        (packed, parities) = (packed + in_packs, parities + in_parities);
    }
    let slot = Width::WHOLE.slot_bytes(true) as u64;
    // What is beside the slots of a pack.
    let beside = pack_bytes_most(Batch::new(1).unwrap(), true) as u64 - slot;
    let most = source.pages_total * slot + packs * beside;
    assert!(packed > most / 2 && packed <= most, "{packed} of {most} bytes, {packs} packs");
    // The last stripe of each width may be half full.
    let whole = pack_bytes_most(Batch::default(), true) as u64 * 11 / 10;
    let most = packed / 2 * 11 / 10 + Width::NUMBER as u64 * whole;
    assert!(parities <= most, "{parities} of {most} bytes of parity, {packed} of packs");
    eprintln!(
        "{} pages: {packed} bytes in {packs} packs, {parities} of parity",
        source.pages_total
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_that_is_not_as_it_was_is_computed_from_the_others() {
    let mut world = world().await;
    let hosts = scattered(&mut world, 3, Redundancy::Parity, 40_000_000).await;
    evicted(&world).await;
    hosts[0].spoil(2).await;
    let now = until(&world.h2, "it gathers", |now| now.pages_total > 0).await;
    assert!(now.pages_arrived < now.pages_total / 4, "too fast for this test: {now:?}");
    arrived_whole(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_is_not_as_it_was_is_said_to_be_lost_and_never_placed() {
    let mut world = world().await;
    let hosts = scattered(&mut world, 1, Redundancy::None, 40_000_000).await;
    evicted(&world).await;
    hosts[0].spoil(3).await;
    let said = "are lost: what stores held of them is gone (i0)";
    let told = until(&world.h2, said, |now| now.reason.contains(said)).await;
    assert_eq!(told.phase(), Phase::Gather, "{told:?}");
    // Of one pack, and everything else that the same store holds comes.
    assert!(lost(&told) <= u64::from(Batch::default().pages()), "{}", told.reason);
    until(&world.h2, "all others come", |now| now.pages_arrived + lost(now) == now.pages_total)
        .await;
    let seen = world.known_at(&world.h2).await;
    assert!(seen.wrong == 0 && seen.missing > 0 && seen.right > 0, "{seen:?}");
    assert!(seen.missing as u64 <= lost(&told), "{seen:?}, {}", told.reason);
}

/// The number at the beginning of what is said of pages that are lost; 0 where nothing is.
fn lost(said: &MigrationProgress) -> u64 {
    let number = said.reason.split_once(" pages of ticker are lost").map(|(number, _)| number);
    number.map_or(0, |number| number.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: tests/full"]
async fn of_two_stores_that_hold_each_page_once_the_one_that_begins_anew_costs_its_own_alone() {
    let mut world = world().await;
    let mut hosts = scattered(&mut world, 2, Redundancy::None, 40_000_000).await;
    evicted(&world).await;
    hosts[0].kill();
    hosts[0].start_anew().await;
    let told = until(&world.h2, "pages are lost", |now| lost(now) > 0).await;
    assert!(told.reason.contains("what stores held of them is gone (i0)"), "{}", told.reason);
    let named =
        until(&world.h2, "all others come", |now| now.pages_arrived + lost(now) == now.pages_total);
    let named = lost(&named.await);
    assert!(named > 0);
    let seen = world.known_at(&world.h2).await;
    assert!(seen.wrong == 0 && seen.missing > 0 && seen.right > 0, "{seen:?}");
    assert!(seen.missing as u64 <= named, "{seen:?}, {named} are said to be lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fills_up_while_the_source_scatters_gets_no_more_and_the_others_do() {
    for redundancy in [Redundancy::Mirror, Redundancy::Parity] {
        let mut world = world().await;
        let hosts = stores_for(&mut world, 3, redundancy, 40_000_000).await;
        let request = world.prepare(Mode::ScatterGather).await;
        scattering(&world, request, 160_000_000).await;
        hosts[0].fill().await;
        let full = hosts[0].packs().await.len();
        let source = evicted(&world).await;
        assert_eq!(world.h2.registry.progress("m1").unwrap().borrow().phase(), Phase::Gather);
        assert_eq!(source.pages_stored, source.pages_total, "each page counts once: {source:?}");
        let (now, other) = (hosts[0].packs().await.len(), hosts[1].packs().await.len());
        // What the other one sent lay in a buffer, whose room is free again.
        assert!(now < full + 10 && other > now + 10, "{full}, then {now}; {other} beside it");
        if redundancy == Redundancy::Parity {
            // What was of one stripe with what did not fit is safe, too.
            hosts[1].kill();
        }
        arrived_whole(&world).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_store_has_room_left_the_source_stays_until_the_last_page_is_there() {
    for (number, redundancy) in [(1, Redundancy::None), (2, Redundancy::Mirror)] {
        let mut world = world().await;
        let hosts = stores_for(&mut world, number, redundancy, 0).await;
        let request = world.prepare(Mode::ScatterGather).await;
        scattering(&world, request, 60_000_000).await;
        hosts[0].fill().await;
        until(&world.h2, "half is there", |now| now.pages_arrived > now.pages_total / 2).await;
        assert!(world.h1.guests.lives(&vm()), "the source has gone");
        let source = evicted(&world).await;
        assert!(source.pages_stored < source.pages_total, "it fitted: {source:?}");
        let there = world.h2.registry.progress("m1").unwrap().borrow().clone();
        assert_eq!(there.pages_arrived, there.pages_total, "the source has gone too early");
        arrived_whole(&world).await;
    }
}
