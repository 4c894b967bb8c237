//! A VM moves with its disk by plain pre-copy, and meanwhile both agents are killed at once, or the
//! destination's; its QEMU there dies, or its host loses power. Before COMMIT the guest runs on where it was, on
//! its image itself, and moves when it is asked to again; after it, it arrives with all of its disk.
//!
//! Real QEMU, FUSE, agents and controller (`lifeboat_tests::world`); needs root and `lab/image`'s guest.

use std::time::Duration;

use lifeboat_tests::clock;
use lifeboat_tests::world::guest::{self, PATIENCE, await_more, files};
use lifeboat_tests::world::{Disk, Host, World};

use super::a_disk_that_follows::{await_moved, open_files};
use super::{ROUND, assert_at, assert_has_still, await_no_mover, await_over, fill_still};

/// What the links carry, in bit/s: the disk takes some seconds, and so does memory.
const LINK: u64 = 100_000_000;
const MOVE: &str = "migrate vm --to h2 --urgency 0 --yes";
/// Checks of its disk after a failed attempt; all of it is checked once it has arrived.
const FEW: u64 = 300;

/// When the blow falls.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// Blocks come, and there is no QEMU at the destination.
    Bulk,
    /// Every write goes to both sides, and memory moves.
    InStep,
    /// That host's agent stays at this mark of the hand-over.
    At(Host, &'static str),
}

/// What falls. The dead are started again.
#[derive(Debug, Clone, Copy)]
enum Blow {
    BothAgents,
    DestinationsAgent,
    DestinationsQemu,
    DestinationsPower,
}

fn in_a_world(name: &str, number: usize, play: impl FnOnce(&mut World)) {
    let name = format!("a_disk_whose_hosts_fail::{name}");
    let make = || World::make_on(number, guest::images(), Disk::Raw, LINK).unwrap();
    guest::play_in(&name, make, |world| {
        await_more(world, 0, "disk_writes", ROUND);
        fill_still(&world.agents[0].disk());
        play(world);
    });
}

/// Begins to move it, and waits for the moment.
fn begin(world: &mut World, moment: Moment) -> String {
    if let Moment::At(host, mark) = moment {
        world.agents[host].start(Some(mark)).unwrap();
        world.control.await_sight(0).unwrap();
    }
    let id = world.control.detached(MOVE).unwrap();
    let come = || files(world, 1).iter().any(|name| name.contains(".arriving-"));
    let reached = || match moment {
        Moment::Bulk => come() && !world.agents[1].has_qemu(),
        Moment::InStep => world.agents[1].has_qemu(),
        Moment::At(host, _) => world.agents[host].holds(),
    };
    let reached = clock::wait_for(PATIENCE, || reached().then_some(()));
    assert!(reached.is_some(), "{moment:?}: {:?}", world.control.status(&id));
    id
}

fn strike(world: &mut World, blow: Blow) {
    match blow {
        Blow::BothAgents => [0, 1].into_iter().for_each(|host| world.agents[host].kill()),
        Blow::DestinationsAgent => world.agents[1].kill(),
        Blow::DestinationsQemu => world.agents[1].kill_qemu(),
        Blow::DestinationsPower => world.agents[1].lose_power().unwrap(),
    }
    clock::rest(Duration::from_millis(300));
    for host in [0, 1] {
        world.agents[host].let_go();
        if !world.agents[host].lives() {
            world.agents[host].start(None).unwrap();
        }
    }
}

/// The guest runs on where it was, on its image itself; nothing is left of the attempt.
fn assert_stays(world: &mut World, moment: Moment, blow: Blow) {
    let id = begin(world, moment);
    strike(world, blow);
    await_over(world, &id);
    let status = world.control.status(&id).unwrap();
    assert_eq!(status["migrations"][0]["phase"], "left-behind", "{moment:?} {blow:?}: {status}");
    let reason = status["left_behind"][0]["reason"].as_str().unwrap_or_default();
    println!("{moment:?}, {blow:?}: {reason}");
    assert!(!reason.is_empty(), "{status}");
    await_no_mover(world, 0);
    let cleared = || (files(world, 1).is_empty() && !world.agents[1].has_qemu()).then_some(());
    assert!(clock::wait_for(PATIENCE, cleared).is_some(), "{blow:?}: {:?}", files(world, 1));
    assert_eq!(files(world, 0), ["disk"], "{moment:?} {blow:?}");
    let open = open_files(world, 0);
    assert!(open.contains(&world.agents[0].disk()), "{open:?}");
    guest::assert_at(world, 0, FEW);
    world.control.await_sight(0).unwrap();
}

/// It runs there with all of its disk, and nothing is left of the way.
fn assert_arrived(world: &World, id: &str) {
    await_moved(world, id);
    assert_at(world, 1);
    assert_eq!(files(world, 1), ["disk"]);
    assert_has_still(&world.agents[1].disk());
    let open = open_files(world, 1);
    assert!(open.contains(&world.agents[1].disk()), "{open:?}");
    let left = || (!world.agents[0].has_qemu()).then(|| files(world, 0));
    let left = clock::wait_for(PATIENCE, || left().filter(|left| left != &["disk"]));
    let left = left.unwrap_or_else(|| files(world, 0));
    assert!(left.len() == 1 && left[0].starts_with("disk.left-"), "{left:?}");
    for host in [0, 1] {
        await_no_mover(world, host);
    }
}

fn assert_arrives(world: &mut World, moment: Moment, blow: Blow) {
    let id = begin(world, moment);
    strike(world, blow);
    assert_arrived(world, &id);
}

#[test]
fn both_agents_that_are_killed_at_once_leave_a_guest_at_one_host_with_all_of_its_disk() {
    let name = "both_agents_that_are_killed_at_once_leave_a_guest_at_one_host_with_all_of_its_disk";
    in_a_world(name, 40, |world| {
        assert_stays(world, Moment::Bulk, Blow::BothAgents);
        assert_stays(world, Moment::Bulk, Blow::DestinationsPower);
        let ceded = Moment::At(0, "source/after/persist-ceded");
        assert_arrives(world, ceded, Blow::BothAgents);
    });
}

#[test]
#[ignore = "takes long: tests/full"]
fn whoever_fails_before_commit_costs_an_attempt_and_afterwards_a_wait() {
    let name = "whoever_fails_before_commit_costs_an_attempt_and_afterwards_a_wait";
    in_a_world(name, 41, |world| {
        assert_stays(world, Moment::InStep, Blow::BothAgents);
        let sealed = Moment::At(0, "source/before/persist-ceded");
        assert_stays(world, sealed, Blow::BothAgents);
        for moment in [Moment::Bulk, Moment::InStep] {
            assert_stays(world, moment, Blow::DestinationsAgent);
        }
        assert_stays(world, Moment::InStep, Blow::DestinationsQemu);
        assert_stays(world, Moment::InStep, Blow::DestinationsPower);
        let loaded = Moment::At(1, "destination/before/send-loaded");
        assert_stays(world, loaded, Blow::DestinationsAgent);
        let committed = Moment::At(1, "destination/before/persist-owner");
        assert_arrives(world, committed, Blow::DestinationsAgent);
    });
}

#[test]
#[ignore = "takes long: tests/full"]
fn a_destination_that_never_ran_its_guest_gives_it_back_with_all_of_its_disk_after_commit() {
    let name =
        "a_destination_that_never_ran_its_guest_gives_it_back_with_all_of_its_disk_after_commit";
    in_a_world(name, 42, |world| {
        // It has QEMU's word that it was not told to resume.
        let starting = Moment::At(1, "destination/before/start-guest");
        assert_stays(world, starting, Blow::DestinationsQemu);
        // It comes back without the guest that it had loaded.
        let ceded = Moment::At(0, "source/after/persist-ceded");
        assert_stays(world, ceded, Blow::DestinationsPower);
        let owned = Moment::At(1, "destination/after/persist-owner");
        assert_arrives(world, owned, Blow::BothAgents);
    });
}

#[test]
#[ignore = "takes long: tests/full"]
fn a_source_that_loses_power_boots_its_guest_from_its_own_disk_and_nothing_is_left_elsewhere() {
    let name =
        "a_source_that_loses_power_boots_its_guest_from_its_own_disk_and_nothing_is_left_elsewhere";
    in_a_world(name, 49, |world| {
        let id = begin(world, Moment::Bulk);
        world.agents[0].lose_power().unwrap();
        clock::rest(Duration::from_millis(300));
        // It is started with its host, as after any power cut.
        world.witness.forget();
        world.agents[0].start(None).unwrap();
        await_over(world, &id);
        let status = world.control.status(&id).unwrap();
        assert_eq!(status["migrations"][0]["phase"], "left-behind", "{status}");
        world.await_guest(0).unwrap();
        await_no_mover(world, 0);
        let cleared = || files(world, 1).is_empty().then_some(());
        assert!(clock::wait_for(PATIENCE, cleared).is_some(), "{:?}", files(world, 1));
        assert_eq!(files(world, 0), ["disk"]);
        assert_has_still(&world.agents[0].disk());
        guest::assert_at(world, 0, FEW);
        world.control.await_sight(0).unwrap();
        let id = world.control.detached(MOVE).unwrap();
        assert_arrived(world, &id);
    });
}
