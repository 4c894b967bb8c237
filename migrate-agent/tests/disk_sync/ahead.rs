//! What is there before its time: a copy that was taken ahead, and a VM that moves before its disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use lifeboat_agent::disk::sync::phases::{Goal, Phase};
use lifeboat_agent::disk::sync::rank::Strategy;
use lifeboat_agent::disk::sync::receive::{ReceiveError, Received};
use lifeboat_agent::disk::sync::send::Command;
use lifeboat_agent::tasks;
use lifeboat_protocol::units::BytesPerSec;
use tokio::sync::oneshot;

use crate::world::{Guest, LENGTH, MIB, World};

/// As `World::new`, with a copy at the destination that differs in one block and is too short.
fn with_a_copy() -> World {
    let mut world = World::new();
    let mut copy = std::fs::read(world.mount.native("a.raw")).unwrap();
    copy[(20 * MIB + 5) as usize] ^= 1;
    copy.truncate((LENGTH - MIB) as usize);
    std::fs::write(&world.arrived, copy).unwrap();
    world.received = Received::going_on(vec![world.arrived.clone()]);
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_copy_that_is_there_only_what_differs_is_sent() {
    let world = with_a_copy();
    // What is sent would take a minute if it were all of it.
    world.rate.send_replace(Some(BytesPerSec(1_000_000)));
    let way = world.connect(world.outgoing(|choice| choice.compares = true));
    let in_step = tokio::time::timeout(Duration::from_secs(20), world.until(Phase::Synchronous));
    in_step.await.unwrap();
    way.seal().await;
    world.assert_same();
    way.cede().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_did_not_compare_cannot_call_a_copy_whole() {
    let world = with_a_copy();
    let way = world.connect(world.outgoing(|_| {}));
    world.until(Phase::Synchronous).await;
    let (answer, sealed) = oneshot::channel();
    way.commands.send(Command::Seal(answer)).await.unwrap();
    // Refused, or nobody is left who could say so.
    assert!(!matches!(sealed.await, Ok(Ok(()))));
    assert!(!world.received.is_sealed());
    let mut refused = false;
    for destination in way.destinations {
        let outcome = destination.await.unwrap();
        refused |= matches!(outcome, Err(ReceiveError::NotCompared(0)));
    }
    assert!(refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_in_place_of_a_copy_is_not_followed() {
    let world = World::new();
    let elsewhere = world.mount.folders.path("elsewhere");
    std::fs::write(&elsewhere, "mine").unwrap();
    std::os::unix::fs::symlink(&elsewhere, &world.arrived).unwrap();
    let received = Received::going_on(vec![world.arrived.clone()]);
    let world = World { received: Arc::clone(&received), ..world };
    let way = world.connect(world.outgoing(|choice| choice.compares = true));
    let mut refused = false;
    for destination in way.destinations {
        let outcome = destination.await.unwrap();
        refused |= matches!(outcome, Err(ReceiveError::Create { disk: 0, .. }));
    }
    assert!(refused && !received.is_sealed());
    assert_eq!(std::fs::read(&elsewhere).unwrap(), b"mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_may_move_early_is_sealed_in_the_middle_of_a_pass() {
    let world = World::new();
    world.rate.send_replace(Some(BytesPerSec(20_000_000)));
    let way = world.connect(world.outgoing(|choice| {
        choice.goal = Goal { left: 10_000, early: true };
        choice.strategy = Strategy::Hot { threshold: 5.0 };
        choice.monitors = true;
    }));
    // Segments 3 and 5 are hot.
    let image = File::options().write(true).open(world.mount.through("a.raw")).unwrap();
    for number in 0..40 {
        image.write_all_at(&[7; 4096], 12 * MIB + number * 4096).unwrap();
        image.write_all_at(&[7; 4096], 20 * MIB + number * 4096).unwrap();
    }
    way.commands.send(Command::EndMonitoring).await.unwrap();
    // What it writes there while they are sent is left for another pass.
    let guest = Guest::start(&world, 9);
    world.until(Phase::Synchronous).await;
    // Which would take most of a minute now.
    world.rate.send_replace(Some(BytesPerSec(200_000)));
    tasks::blocking(move || guest.stop()).await;
    let (answer, sealed) = oneshot::channel();
    way.commands.send(Command::Seal(answer)).await.unwrap();
    let sealed = tokio::time::timeout(Duration::from_secs(15), sealed).await;
    sealed.expect("it is not sealed while blocks are left").unwrap().unwrap();
    assert!(world.received.is_sealed() && world.received.missing() > 40);
    world.rate.send_replace(None);
    way.cede().await;
    world.assert_same();
}
