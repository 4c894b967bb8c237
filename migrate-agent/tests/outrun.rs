//! A guest that dirties its memory faster than its host takes it in: it is slowed down until its pages can
//! follow it, unless its owner forbids that.
//!
//! No guest of this machine outruns its memory, so QEMU is held to 40 MB/s by another monitor than the
//! agent's: what the guest dirties, what is absorbed and what slows it down are real.

mod two_hosts;

use std::time::Duration;

use lifeboat_agent::guests::Guests;
use lifeboat_agent::qemu::qmp::{MigrateParameters, MigrationStatus, Qmp};
use lifeboat_protocol::agent::{MigrationProgress, Mode, Phase};
use two_hosts::qemus::Qemus;
use two_hosts::{Does, World, vm, world_that};

/// What its host takes in, bytes/s: all that the guest dirties again and again takes 2.2 s.
const TAKEN_IN: u64 = 40_000_000;
const PATIENCE: Duration = Duration::from_secs(120);

/// Begins to move it, and slows its host down as soon as QEMU sends.
async fn begin(world: &World) -> Qmp {
    let request = world.prepare(Mode::PostCopy).await;
    let qmp = world.h1.guests.watch().await;
    world.start(&request).await;
    let mut began = false;
    while !began {
        let status = qmp.query_migrate().await.unwrap().status;
        began = matches!(status, MigrationStatus::Setup | MigrationStatus::Active);
    }
    let slow = MigrateParameters { downtime_limit_ms: None, max_bandwidth_bytes: Some(TAKEN_IN) };
    qmp.migrate_set_parameters(slow).await.unwrap();
    qmp
}

async fn end(world: &World) -> MigrationProgress {
    let mut progress = world.h1.registry.progress("m1").unwrap();
    let ended = progress.wait_for(|progress| progress.phase().is_final());
    tokio::time::timeout(PATIENCE, ended).await.expect("it does not end").unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: tests/full"]
async fn it_is_slowed_down_until_its_pages_can_follow_it() {
    let world = world_that(&Qemus::installed(), Does::Outrun { unslowed: false }).await;
    begin(&world).await;
    let mut progress = world.h1.registry.progress("m1").unwrap();
    let slowed = progress.wait_for(|progress| progress.throttle_percent > 0);
    let slowed = tokio::time::timeout(PATIENCE, slowed).await.expect("it is not slowed down");
    assert_eq!(slowed.unwrap().phase(), Phase::MemoryCopy);
    let ended = end(&world).await;
    assert_eq!((ended.phase(), ended.throttle_percent), (Phase::Completed, 0), "{}", ended.reason);
    let there = world.end_of(&world.h2).await;
    assert_eq!(there.phase(), Phase::Completed, "{}", there.reason);
    world.memory_is_whole_at(&world.h2).await;
    world.runs_only_at(&world.h2, &world.h1).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: tests/full"]
async fn where_its_owner_forbids_that_it_stays_at_its_own_speed() {
    let world = world_that(&Qemus::installed(), Does::Outrun { unslowed: true }).await;
    let qmp = begin(&world).await;
    let ended = end(&world).await;
    assert_eq!(ended.phase(), Phase::Failed, "{}", ended.reason);
    assert!(
        ended.reason.contains("forbids to slow it down (forbid_throttling)"),
        "{}",
        ended.reason
    );
    assert_eq!(qmp.query_migrate().await.unwrap().cpu_throttle_percentage, 0);
    world.runs_only_at(&world.h1, &world.h2).await;
    assert!(!world.h2.guests.lives(&vm()), "the destination still has a QEMU");
}
