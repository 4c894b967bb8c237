//! A VM runs at its destination before its disk is there (`--disk on-demand`): what it reads is fetched,
//! what it writes is kept, all of it arrives, and QEMU goes back to the image itself. Meanwhile links are
//! cut, processes killed, guests ended; and before, it is given up.
//!
//! Real QEMU, FUSE, agents and controller (`lifeboat_tests::world`); needs root and `lab/image`'s guest,
//! which writes anywhere in its disk and checks what it wrote.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lifeboat_tests::clock;
use lifeboat_tests::world::guest::{self, PATIENCE, await_more, files, said};
use lifeboat_tests::world::{Busy, Disk, Host, World, relay};
use rustix::process::{Pid, Signal, kill_process};

/// A segment and three quarters of one, which the guest writes and reads evenly: so the first is used above
/// the average and goes before its VM, and the second follows.
pub(super) const DISK: Disk = Disk::Busy(Busy {
    image: 112 << 20,
    block: BLOCK,
    rate: 2 << 20,
    check_percent: 300,
    promised: 0,
});
const BLOCK: u64 = 64 << 10;
/// What a link carries, in bit/s: the rest takes some seconds.
const LINK: u64 = 80_000_000;
/// And where something happens meanwhile.
const SLOW: u64 = 40_000_000;
/// Of the disk's blocks the guest writes each once before it begins to check them.
pub(super) const BLOCKS: u64 = (112 << 20) / BLOCK;
const MOVE: &str = "migrate vm --to h2 --urgency 0 --disk on-demand --disk-watch 2s --yes";

/// Runs `play` in namespaces of its own, in a world whose VM has such a disk.
fn in_a_world(name: &str, (number, link): (usize, u64), disk: Disk, play: impl FnOnce(&mut World)) {
    let name = format!("a_disk_that_follows::{name}");
    guest::play_in(&name, || World::make_on(number, guest::images(), disk, link).unwrap(), play);
}

/// It runs there, all of its disk fits its memory, and it goes on writing.
pub(super) fn assert_at(world: &World, host: Host) {
    guest::assert_at(world, host, BLOCKS);
}

/// Begins to move it, and waits until it runs there without all of its disk.
fn move_and_await_rest(world: &World) -> String {
    await_more(world, 0, "disk_writes", BLOCKS);
    let id = world.control.detached(MOVE).unwrap();
    let rests = || {
        let status = world.control.status(&id).unwrap();
        let migration = &status["migrations"][0];
        let rests = migration["phase"] == "disk rest" && world.witness.look().running() == [1];
        assert!(rests || status["state"] == "running", "it is over already: {status}");
        (rests && migration["disk_bytes_left"].as_u64().unwrap_or(0) > 8 << 20).then_some(())
    };
    let rests = clock::wait_for(PATIENCE, rests);
    assert!(rests.is_some(), "{:?}", world.control.status(&id));
    // The other copy is there still, and its images with it.
    assert!(world.agents[0].has_qemu());
    id
}

/// The evacuation has come to its end, and the VM has moved.
pub(super) fn await_moved(world: &World, id: &str) {
    let over = || world.control.status(id).ok().filter(|status| status["state"] != "running");
    let status = clock::wait_for(PATIENCE, over);
    let status = status.unwrap_or_else(|| panic!("{:?}", world.control.status(id)));
    assert_eq!(status["migrations"][0]["phase"], "moved", "{status}");
}

/// The files that the VM's QEMU at a host has open.
pub(super) fn open_files(world: &World, host: Host) -> Vec<PathBuf> {
    let pid = world.agents[host].vm().unwrap().unwrap().qemu_pid;
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    entries.filter_map(|entry| std::fs::read_link(entry.path()).ok()).collect()
}

/// What the processes of arriving disks have left at the destination.
pub(super) fn arrival_leftovers(world: &World) -> Vec<PathBuf> {
    let folder = world.agents[1].folder();
    let below = |path: &str| std::fs::read_dir(folder.join(path)).into_iter().flatten().flatten();
    let all = below("qemu/.arriving/.disks").chain(below("state/left-disks/arriving"));
    all.map(|entry| entry.path()).collect()
}

/// All of it is there: on the image itself, with nothing left of the way there.
pub(super) fn assert_whole(world: &World) {
    let settled = || arrival_leftovers(world).is_empty().then_some(());
    assert!(clock::wait_for(PATIENCE, settled).is_some(), "{:?}", arrival_leftovers(world));
    let (disk, open) = (world.agents[1].disk(), open_files(world, 1));
    assert!(open.contains(&disk), "{open:?}");
    let on_mount = |path: &&PathBuf| path.to_string_lossy().contains(".arriving");
    assert_eq!(open.iter().find(on_mount), None);
    assert_eq!(files(world, 1), ["disk"]);
    let gone = || (!world.agents[0].has_qemu()).then_some(());
    assert!(clock::wait_for(PATIENCE, gone).is_some(), "the source's QEMU stays");
    let left = || (files(world, 0).len() == 1).then(|| files(world, 0).remove(0));
    let left = clock::wait_for(PATIENCE, left).unwrap_or_default();
    assert!(left.starts_with("disk.left-"), "{left}");
    assert_at(world, 1);
}

/// The process that does this with the VM's disks at a host.
pub(super) fn process(world: &World, host: Host, does: &str) -> Pid {
    let folder = world.agents[host].folder().display().to_string();
    let is_it = |pid: i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(&format!("lifeboat-disk {does}")) && line.contains(&folder)
    };
    let find = || {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let mut pids = entries.filter_map(|e| e.file_name().to_str()?.parse().ok());
        Pid::from_raw(pids.find(|pid| is_it(*pid))?)
    };
    clock::wait_for(PATIENCE, find).expect("a process")
}

#[test]
fn a_guest_runs_before_its_disk_is_there_and_all_of_it_arrives() {
    let name = "a_guest_runs_before_its_disk_is_there_and_all_of_it_arrives";
    in_a_world(name, (20, LINK), DISK, |world| {
        let id = move_and_await_rest(world);
        // It goes on at once: what it reads is fetched before the rest.
        let checked = await_more(world, 1, "disk_checks", 0);
        await_more(world, 1, "disk_checks", checked);
        await_moved(world, &id);
        assert_whole(world);
    });
}

#[test]
#[ignore = "takes long: tests/full"]
fn a_link_that_is_cut_while_the_rest_comes_costs_a_wait() {
    let name = "a_link_that_is_cut_while_the_rest_comes_costs_a_wait";
    in_a_world(name, (21, SLOW), DISK, |world| {
        let id = move_and_await_rest(world);
        // The second one is noticed by its silence.
        for (state, seconds) in [(relay::State::Closed, 2), (relay::State::Silent, 8)] {
            world.link(0, 1, state);
            clock::rest(Duration::from_secs(seconds));
            world.link(0, 1, relay::State::Whole);
            clock::rest(Duration::from_millis(500));
        }
        await_moved(world, &id);
        assert_whole(world);
        // And back, as any disk.
        world.control.await_sight(1).unwrap();
        world.control.order("migrate vm --to h1 --urgency 0 --yes").unwrap();
        assert_at(world, 0);
    });
}

#[test]
#[ignore = "takes long: tests/full"]
fn whoever_is_killed_while_the_rest_comes_is_replaced_and_nothing_is_lost() {
    let name = "whoever_is_killed_while_the_rest_comes_is_replaced_and_nothing_is_lost";
    in_a_world(name, (22, SLOW), DISK, |world| {
        let id = move_and_await_rest(world);
        // Who takes the blocks in: what the guest wrote there since is kept.
        kill_process(process(world, 1, "arrive"), Signal::KILL).unwrap();
        clock::rest(Duration::from_millis(1500));
        // Who has them.
        kill_process(process(world, 0, "move"), Signal::KILL).unwrap();
        clock::rest(Duration::from_millis(1500));
        // Both agents; what they steer goes on.
        for host in [1, 0] {
            world.agents[host].kill();
            world.agents[host].start(None).unwrap();
        }
        await_moved(world, &id);
        assert_whole(world);
    });
}

/// Nothing is left of an attempt that was given up, and the guest runs where it was.
pub(super) fn assert_given_up(world: &World) {
    let cleared = || {
        let destination = !world.agents[1].has_qemu() && files(world, 1).is_empty();
        let left =
            arrival_leftovers(world).is_empty() && world.agents[0].disk_leftovers().is_empty();
        (destination && left).then_some(())
    };
    let left = || (files(world, 1), arrival_leftovers(world), world.agents[0].disk_leftovers());
    assert!(clock::wait_for(PATIENCE, cleared).is_some(), "{:?}", left());
    assert_eq!(world.witness.look().running(), [0]);
    assert_eq!(files(world, 0), ["disk"]);
    let open = open_files(world, 0);
    assert!(open.contains(&world.agents[0].disk()), "{open:?}");
}

/// Begins to move it, and waits until blocks come.
fn move_and_await_blocks(world: &World) -> String {
    let id = world.control.detached(MOVE).unwrap();
    let come = || files(world, 1).iter().any(|name| name.contains(".arriving-")).then_some(());
    assert!(clock::wait_for(PATIENCE, come).is_some(), "{:?}", world.control.status(&id));
    id
}

#[test]
#[ignore = "takes long: tests/full"]
fn what_is_given_up_before_its_guest_runs_there_leaves_nothing_and_can_be_begun_anew() {
    let name = "what_is_given_up_before_its_guest_runs_there_leaves_nothing_and_can_be_begun_anew";
    in_a_world(name, (24, SLOW), DISK, |world| {
        await_more(world, 0, "disk_writes", BLOCKS);
        // While blocks come, and once a QEMU has the images open there.
        for with_qemu in [false, true] {
            let id = move_and_await_blocks(world);
            let reached = || (!with_qemu || world.agents[1].has_qemu()).then_some(());
            assert!(clock::wait_for(PATIENCE, reached).is_some(), "no QEMU there");
            let _reply = world.control.ask(&format!("cancel {id}")).unwrap();
            let over = || (world.control.status(&id).ok()?["state"] == "cancelled").then_some(());
            let over = clock::wait_for(PATIENCE, over);
            assert!(over.is_some(), "{:?}", world.control.status(&id));
            assert_given_up(world);
            world.control.await_sight(0).unwrap();
        }
        // Who takes the blocks in has lost them when it is killed now, and says so.
        let id = move_and_await_blocks(world);
        kill_process(process(world, 1, "arrive"), Signal::KILL).unwrap();
        let over = || world.control.status(&id).ok().filter(|status| status["state"] != "running");
        let status = clock::wait_for(PATIENCE, over);
        let status = status.unwrap_or_else(|| panic!("{:?}", world.control.status(&id)));
        assert_eq!(status["migrations"][0]["phase"], "left-behind", "{status}");
        assert!(status.to_string().contains("what takes these disks in"), "{status}");
        assert_given_up(world);
        assert_at(world, 0);
    });
}

/// The blocks of an image.
pub(super) fn blocks(image: &Path) -> Vec<Vec<u8>> {
    std::fs::read(image).unwrap().chunks(BLOCK as usize).map(<[u8]>::to_vec).collect()
}

/// Why a host does not start the VM.
fn start_refused(world: &mut World, host: Host) -> String {
    let refused = world.agents[host].start_vm().expect_err("it was started");
    std::error::Error::source(&refused).map(ToString::to_string).unwrap_or_default()
}

#[test]
#[ignore = "takes long: tests/full"]
fn a_guest_that_ends_while_the_rest_comes_finds_all_of_its_disk_when_it_is_started() {
    let name = "a_guest_that_ends_while_the_rest_comes_finds_all_of_its_disk_when_it_is_started";
    in_a_world(name, (25, SLOW), DISK, |world| {
        let id = move_and_await_rest(world);
        world.agents[1].kill_qemu();
        let refuses = || start_refused(world, 1).contains("not all here").then_some(());
        assert!(clock::wait_for(PATIENCE, refuses).is_some(), "{}", start_refused(world, 1));
        // Neither a new agent nor a link that is cut makes it a guest that died: what it wrote is there.
        world.agents[1].kill();
        world.agents[1].start(None).unwrap();
        await_moved(world, &id);
        let settled = || arrival_leftovers(world).is_empty().then_some(());
        assert!(clock::wait_for(PATIENCE, settled).is_some(), "{:?}", arrival_leftovers(world));
        assert_eq!(files(world, 1), ["disk"]);
        let left = || (files(world, 0) != ["disk"]).then(|| files(world, 0).remove(0));
        let left = clock::wait_for(PATIENCE, left).expect("the source's image is left behind");
        let left = blocks(&world.agents[0].disk().with_file_name(left));
        let arrived = blocks(&world.agents[1].disk());
        // It was all filled; the guest has written some seconds there.
        let differ = left.iter().zip(&arrived).filter(|(left, arrived)| left != arrived).count();
        assert!(left.len() == arrived.len() && differ < left.len() / 4, "{differ} differ");
        let missing = |block: &Vec<u8>| block.iter().all(|byte| *byte == 0);
        assert!(!left.iter().any(missing) && !arrived.iter().any(missing));
        // And it is started from that, like any VM that ended.
        world.witness.forget();
        world.agents[1].start_vm().unwrap();
        world.await_guest(0).unwrap();
        assert_eq!(world.witness.look().running(), [1]);
    });
}

/// The destination's host goes down with all that it has not flushed, and comes back: the VM is lost.
pub(super) fn lose_power_at_destination(world: &mut World, id: &str) -> String {
    world.agents[1].lose_power().unwrap();
    world.agents[1].start(None).unwrap();
    let over = || world.control.status(id).ok().filter(|status| status["state"] != "running");
    let status = clock::wait_for(PATIENCE, over);
    let status = status.unwrap_or_else(|| panic!("{:?}", world.control.status(id)));
    assert_eq!(status["migrations"][0]["phase"], "lost", "{status}");
    status["migrations"][0]["reason"].to_string()
}

/// Resumes it from its source's copy, as it was at the switchover.
fn claim_at_source(world: &World) {
    world.control.order("claim vm --fenced --host h1").unwrap();
    let checked = said(world, 0, "disk_checks");
    await_more(world, 0, "disk_checks", checked + BLOCKS);
    let seen = world.witness.look();
    assert_eq!(seen.running(), [0]);
    assert!(!seen.lives().iter().any(|life| life.said().contains("CORRUPT")));
    drop(seen);
    let home = || world.agents[0].disk_leftovers().is_empty().then_some(());
    assert!(clock::wait_for(PATIENCE, home).is_some());
    assert_eq!(files(world, 0), ["disk"]);
}

#[test]
#[ignore = "takes long: tests/full"]
fn a_destination_that_loses_power_before_the_rest_has_come_leaves_the_sources_copy() {
    let name = "a_destination_that_loses_power_before_the_rest_has_come_leaves_the_sources_copy";
    in_a_world(name, (26, SLOW), DISK, |world| {
        let id = move_and_await_rest(world);
        let reason = lose_power_at_destination(world, &id);
        assert!(reason.contains("claim vm --fenced"), "{reason}");
        // What was not flushed there is gone, so nothing is started from the rest.
        let refused = start_refused(world, 1);
        assert!(refused.contains("not all here") && refused.contains("h1"), "{refused}");
        claim_at_source(world);
    });
}

#[test]
fn disks_that_cannot_follow_their_vm_are_refused_by_the_plan() {
    let name = "disks_that_cannot_follow_their_vm_are_refused_by_the_plan";
    in_a_world(name, (23, LINK), Disk::Overlay, |world| {
        let refused = |line: &str, why: &str| {
            let refused = world.control.order(line).unwrap_err().to_string();
            assert!(refused.contains(why), "{line}: {refused}");
        };
        refused("plan h1 --disk on-demand --reason failing", "--reason failing");
        refused("plan h1 --disk on-demand --by 5m", "leave out --by");
        refused("plan h1 --disk on-demand --mode post-copy", "pre-copy only");
        refused("plan h1 --disk on-demand --mode scatter-gather", "pre-copy only");
        refused("plan h1 --disk later", "on-demand");
        refused("plan h1 --disk scatter --by 5m", "leave out --by");
        refused("plan h1 --disk scatter --mode post-copy", "pre-copy only");
        let plan = world.control.ask("plan h1 --to h2 --urgency 0 --disk on-demand").unwrap();
        assert!(plan.to_string().contains("one of its disks is not raw"), "{plan}");
    });
}
