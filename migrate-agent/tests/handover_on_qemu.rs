//! The hand-over on real QEMUs: both ends' drivers in one process, a guest that ticks, a relay
//! over loopback. Each test ends with exactly one running guest. Crashes of whole agents are
//! tested with real agent processes in the package `tests/`.

mod two_hosts;

use lifeboat_agent::guests::Guests;
use lifeboat_protocol::agent::{Mode, Phase, StartMigrationRequest};
use two_hosts::{vm, world};

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_and_runs_on_at_the_destination() {
    let world = world().await;
    let request = world.prepare(Mode::PreCopy).await;
    world.start(&request).await;
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
    world.start(&slow).await;
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
    world.start(&slow).await;
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
    world.start(&request).await;
    let source = world.end_of(&world.h1).await;
    assert_eq!(source.phase(), Phase::Completed, "{}", source.reason);
    world.runs_only_at(&world.h2, &world.h1).await;
}
