//! A VM's disk follows it by way of a third host (`--disk scatter`): its source is rid of it, and may be
//! switched off, while the destination lacks some of it. And whoever is killed or away meanwhile.
//!
//! Real QEMU, FUSE, agents and controller (`lifeboat_tests::world`); needs root and `lab/image`'s guest.

use std::path::PathBuf;
use std::time::Duration;

use lifeboat_tests::clock;
use lifeboat_tests::world::guest::{self, PATIENCE, await_more, files};
use lifeboat_tests::world::{Disk, Host, World, relay};
use rustix::process::{Signal, kill_process};

use super::a_disk_that_follows::{
    BLOCKS, DISK, arrival_leftovers, assert_at, assert_given_up, assert_whole, await_moved, blocks,
    lose_power_at_destination, process,
};

/// What the links carry, in bit/s: the destination's is the narrow one, so that the third host has all of the
/// disk long before it.
const LINKS: (u64, u64) = (400_000_000, 48_000_000);
/// Where something happens before it has all.
const KILLS: (u64, u64) = (400_000_000, 64_000_000);
const SLOW: (u64, u64) = (160_000_000, 40_000_000);
const MOVE: &str = "migrate vm --to h2 --urgency 0 --disk scatter --disk-watch 2s --yes";
/// The third host.
const BETWEEN: Host = 2;

fn in_a_world(name: &str, (number, links): (usize, (u64, u64)), play: impl FnOnce(&mut World)) {
    let name = format!("a_disk_by_way_of_another::{name}");
    let make = || World::make_by_way_of_others(number, guest::images(), DISK, links).unwrap();
    guest::play_in(&name, make, play);
}

/// Begins to move it, and waits until it runs there.
fn move_and_await_running(world: &World) -> String {
    await_more(world, 0, "disk_writes", BLOCKS);
    let id = world.control.detached(MOVE).unwrap();
    let runs = || {
        let status = world.control.status(&id).unwrap();
        assert!(status["state"] == "running", "it is over already: {status}");
        (world.witness.look().running() == [1]).then_some(())
    };
    let runs = clock::wait_for(PATIENCE, runs);
    assert!(runs.is_some(), "{:?}", world.control.status(&id));
    id
}

/// Waits until the source is rid of it, which is before the destination has all.
fn await_evicted(world: &World, id: &str) {
    let evicted = || {
        let status = world.control.status(id).unwrap();
        assert!(status["state"] == "running", "the destination was faster: {status}");
        let migration = &status["migrations"][0];
        let rid = migration["phase"] == "gathering" && !world.agents[0].has_qemu();
        (rid && migration["disk_bytes_left"].as_u64().unwrap_or(0) > 1 << 20).then_some(())
    };
    let evicted = clock::wait_for(PATIENCE, evicted);
    assert!(evicted.is_some(), "{:?}", world.control.status(id));
    let left = || (files(world, 0).len() == 1).then(|| files(world, 0).remove(0));
    let left = clock::wait_for(PATIENCE, left).unwrap_or_default();
    assert!(left.starts_with("disk.left-"), "{left}");
}

/// What is left of it at the third host.
fn between(world: &World) -> Vec<PathBuf> {
    let folder = world.agents[BETWEEN].folder();
    let below = |path: &str| std::fs::read_dir(folder.join(path)).into_iter().flatten().flatten();
    let all =
        below("disks").chain(below("qemu/.storing/.disks")).chain(below("state/left-disks/stores"));
    all.map(|entry| entry.path()).collect()
}

/// Whether the third host has all of it, durably.
fn is_whole(world: &World) -> bool {
    let records = world.agents[BETWEEN].folder().join("state/left-disks/stores");
    let entries = std::fs::read_dir(records).into_iter().flatten().flatten();
    let texts = entries.filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
    texts.into_iter().any(|text| text.contains("\"whole\": true"))
}

fn await_released(world: &World) {
    let released = || between(world).is_empty().then_some(());
    assert!(clock::wait_for(PATIENCE, released).is_some(), "{:?}", between(world));
}

#[test]
fn its_source_is_switched_off_while_the_destination_lacks_some_of_its_disk() {
    let name = "its_source_is_switched_off_while_the_destination_lacks_some_of_its_disk";
    in_a_world(name, (27, LINKS), |world| {
        let plan = world.control.ask("plan h1 --to h2 --urgency 0 --disk scatter").unwrap();
        assert_eq!(plan["vms"][0]["stores"][0]["host"], "h3", "{plan}");
        assert!(plan.to_string().contains("is at h3 alone"), "{plan}");
        let id = move_and_await_running(world);
        await_evicted(world, &id);
        world.agents[0].kill();
        // It goes on: what it reads comes from the third host.
        let checked = await_more(world, 1, "disk_checks", 0);
        await_more(world, 1, "disk_checks", checked);
        await_moved(world, &id);
        assert_whole(world);
        await_released(world);
        let report = world.control.ask(&format!("report {id}")).unwrap();
        assert_eq!(report["vms"][0]["stores"][0], "h3", "{report}");
    });
}

#[test]
#[ignore = "takes long: tests/full"]
fn whoever_is_killed_on_the_way_goes_on_and_nothing_is_lost() {
    let name = "whoever_is_killed_on_the_way_goes_on_and_nothing_is_lost";
    in_a_world(name, (28, KILLS), |world| {
        let id = move_and_await_running(world);
        // The source's agent, which hears of the destination that the guest runs there.
        world.agents[0].kill();
        world.agents[0].start(None).unwrap();
        let rests = || world.agents[0].said("disk rest").then_some(());
        assert!(
            clock::wait_for(PATIENCE, rests).is_some(),
            "the source does not hear that it runs"
        );
        let comes = |path: &PathBuf| path.to_string_lossy().contains("disks/vm-0");
        let comes = || between(world).iter().any(comes).then_some(());
        assert!(clock::wait_for(PATIENCE, comes).is_some(), "{:?}", between(world));
        // The destination gets nothing now, from nobody; and the third host's agent is killed as well.
        world.link(0, 1, relay::State::Closed);
        world.link(BETWEEN, 1, relay::State::Closed);
        world.agents[BETWEEN].kill();
        world.agents[BETWEEN].start(None).unwrap();
        assert!(clock::wait_for(PATIENCE, || is_whole(world).then_some(())).is_some());
        world.link(0, 1, relay::State::Whole);
        world.link(BETWEEN, 1, relay::State::Whole);
        await_evicted(world, &id);
        world.agents[0].kill();
        // Who brings it on, who takes it in, and both agents.
        kill_process(process(world, BETWEEN, "move"), Signal::KILL).unwrap();
        clock::rest(Duration::from_millis(500));
        kill_process(process(world, 1, "arrive"), Signal::KILL).unwrap();
        clock::rest(Duration::from_millis(500));
        for host in [1, BETWEEN] {
            world.agents[host].kill();
            world.agents[host].start(None).unwrap();
        }
        await_moved(world, &id);
        assert_whole(world);
        await_released(world);
    });
}

#[test]
#[ignore = "takes long: tests/full"]
fn without_the_third_host_its_disk_comes_from_the_source_and_room_is_given_back_later() {
    let name = "without_the_third_host_its_disk_comes_from_the_source_and_room_is_given_back_later";
    in_a_world(name, (29, SLOW), |world| {
        // Given up before it runs there: no room is kept.
        await_more(world, 0, "disk_writes", BLOCKS);
        let id = world.control.detached(MOVE).unwrap();
        let come = || files(world, 1).iter().any(|name| name.contains(".arriving-")).then_some(());
        assert!(clock::wait_for(PATIENCE, come).is_some(), "{:?}", world.control.status(&id));
        assert!(!between(world).is_empty());
        let _reply = world.control.ask(&format!("cancel {id}")).unwrap();
        let over = || (world.control.status(&id).ok()?["state"] == "cancelled").then_some(());
        assert!(clock::wait_for(PATIENCE, over).is_some(), "{:?}", world.control.status(&id));
        assert_given_up(world);
        await_released(world);
        // Its host goes away when it has not all.
        world.control.await_sight(0).unwrap();
        let id = move_and_await_running(world);
        world.agents[BETWEEN].kill();
        await_moved(world, &id);
        assert_whole(world);
        assert!(arrival_leftovers(world).is_empty());
        assert!(!between(world).is_empty());
        world.agents[BETWEEN].start(None).unwrap();
        await_released(world);
        assert_at(world, 1);
    });
}

#[test]
#[ignore = "takes long: tests/full"]
fn a_destination_that_loses_power_leaves_the_third_hosts_copy_as_of_the_switchover() {
    let name = "a_destination_that_loses_power_leaves_the_third_hosts_copy_as_of_the_switchover";
    in_a_world(name, (31, LINKS), |world| {
        let id = move_and_await_running(world);
        await_evicted(world, &id);
        let reason = lose_power_at_destination(world, &id);
        assert!(reason.contains("kept at h3"), "{reason}");
        // It could have been the last copy, so nobody has given it back.
        assert!(is_whole(world), "{:?}", between(world));
        let copies: Vec<PathBuf> = between(world)
            .into_iter()
            .filter(|path| path.to_string_lossy().contains("disks/vm-0"))
            .collect();
        assert!(!copies.is_empty(), "{:?}", between(world));
        let left = files(world, 0).remove(0);
        let left = blocks(&world.agents[0].disk().with_file_name(left));
        assert!(blocks(&copies[0]) == left, "the copies at h1 and h3 differ");
        copies.iter().for_each(|copy| std::fs::remove_file(copy).unwrap());
        await_released(world);
    });
}

#[test]
fn a_disk_that_no_other_host_can_keep_is_refused_by_the_plan() {
    let name = "a_disk_that_no_other_host_can_keep_is_refused_by_the_plan";
    let name = format!("a_disk_by_way_of_another::{name}");
    let make = || World::make_with(30, guest::images(), Disk::Raw).unwrap();
    guest::play_in(&name, make, |world| {
        let plan = world.control.ask("plan h1 --to h2 --urgency 0 --disk scatter").unwrap();
        let said = plan.to_string();
        assert!(said.contains("no intermediary can keep them"), "{plan}");
        assert!(said.contains("h3: its agent does not have the role intermediary"), "{plan}");
        assert!(said.contains("h2: it is the destination"), "{plan}");
    });
}
