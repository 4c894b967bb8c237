//! A VM with two disks, in one directory and in two, and two VMs with a disk each, which go to the same host at once.
//!
//! Real QEMU, FUSE, agents and controller (`lifeboat_tests::world`); needs root and `lab/image`'s guest, which
//! says of several disks how far it is with the slowest.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use lifeboat_tests::clock;
use lifeboat_tests::world::guest::{self, PATIENCE, await_more, files};
use lifeboat_tests::world::{Disk, NEIGHBOUR, World};
use serde_json::Value;

use super::a_disk_that_follows::open_files;
use super::{ROUND, assert_at, assert_has_still, await_no_mover, evacuate, fill_still};

/// What the links carry, in bit/s.
const LINK: u64 = 100_000_000;
/// What a guest writes of each disk, and what it fills and discards in turn behind that, bytes.
const WRITTEN: u64 = 8 << 20;
const TRIMMED: u64 = 1 << 20;

/// What a guest discards its image gives back, and takes again when it is filled.
fn await_room(disk: &Path) {
    let takes = || std::fs::metadata(disk).unwrap().blocks() * 512;
    for (word, is) in [("more", true), ("less", false), ("more", true)] {
        let reached = || ((takes() > WRITTEN + TRIMMED / 2) == is).then_some(());
        assert!(clock::wait_for(PATIENCE, reached).is_some(), "{disk:?} never takes {word}");
    }
}

fn there_and_back(world: &mut World, apart: bool) {
    await_more(world, 0, "disk_writes", ROUND);
    for (from, to) in [(0, 1), (1, 0)] {
        evacuate(world, from, to);
        assert_at(world, to);
        await_no_mover(world, from);
        await_no_mover(world, to);
        let disks = [world.agents[to].disk(), world.agents[to].second_disk(apart)];
        assert!(disks.iter().all(|disk| disk.exists()), "{disks:?}");
        let gone = [world.agents[from].disk(), world.agents[from].second_disk(apart)];
        assert!(!gone.iter().any(|disk| disk.exists()), "{gone:?}");
        let left = |disk: &Path| {
            let entries = std::fs::read_dir(disk.parent().unwrap()).unwrap().flatten();
            let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
            let own = format!("{}.left-", disk.file_name().unwrap().to_string_lossy());
            names.filter(|name| name.starts_with(&own)).count()
        };
        assert!(gone.iter().all(|disk| left(disk) == 1), "{:?}", files(world, from));
        world.control.await_sight(to).unwrap();
    }
    await_room(&world.agents[0].disk());
    await_room(&world.agents[0].second_disk(apart));
}

#[test]
fn both_disks_of_a_vm_go_along_from_one_directory() {
    let name = "several_disks::both_disks_of_a_vm_go_along_from_one_directory";
    let disk = Disk::Two { apart: false };
    let make = || World::make_with(43, guest::images(), disk).unwrap();
    guest::play_in(name, make, |world| {
        there_and_back(world, false);
        let open = open_files(world, 0);
        let disks = [world.agents[0].disk(), world.agents[0].second_disk(false)];
        assert!(disks.iter().all(|disk| open.contains(disk)), "{open:?}");
    });
}

#[test]
#[ignore = "takes long: tests/full"]
fn both_disks_of_a_vm_go_along_from_two_directories() {
    let name = "several_disks::both_disks_of_a_vm_go_along_from_two_directories";
    let make = || World::make_with(44, guest::images(), Disk::Two { apart: true }).unwrap();
    guest::play_in(name, make, |world| there_and_back(world, true));
}

/// The newest `key=N` in what a guest has said.
fn newest(said: &str, key: &str) -> u64 {
    let words = said.lines().filter(|line| line.starts_with("LIFEBOAT-TICK"));
    let words = words.flat_map(str::split_whitespace);
    let mut numbers =
        words.filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok());
    numbers.next_back().unwrap_or(0)
}

/// Whether two VMs send their disks now.
fn both_send_disks(status: &Value) -> bool {
    let migrations = status["migrations"].as_array().into_iter().flatten();
    migrations.filter(|migration| migration["phase"] == "disk bulk").count() == 2
}

#[test]
#[ignore = "takes long: tests/full"]
fn two_vms_go_with_their_disks_to_the_same_host_at_once() {
    let name = "several_disks::two_vms_go_with_their_disks_to_the_same_host_at_once";
    let make = || World::make_with_neighbour(45, guest::images(), Disk::Raw, LINK).unwrap();
    guest::play_in(name, make, |world| {
        await_more(world, 0, "disk_writes", ROUND);
        let written =
            || (newest(&world.agents[0].said_by_neighbour(), "disk_writes") > ROUND).then_some(());
        assert!(clock::wait_for(PATIENCE, written).is_some(), "the neighbour writes nothing");
        for name in ["disk", NEIGHBOUR] {
            let image = world.agents[0].disk().with_file_name(name);
            fill_still(&image);
        }
        let line = "evacuate h1 --to h2 --urgency 0 --parallel 2 --yes";
        let id = world.control.detached(line).unwrap();
        let mut together = 0;
        let over = || {
            let status = world.control.status(&id).unwrap();
            together += u32::from(both_send_disks(&status));
            (status["state"] != "running").then_some(status)
        };
        let status = clock::wait_for(PATIENCE, over).expect("an end");
        assert_eq!(status["state"], "done", "{status}");
        assert!(together > 0, "one went after the other: {status}");
        assert_at(world, 1);
        let checks = || newest(&world.agents[1].said_by_neighbour(), "disk_checks");
        let before = checks();
        let checked = || (checks() > before + ROUND).then_some(());
        assert!(clock::wait_for(PATIENCE, checked).is_some(), "the neighbour does not go on");
        assert!(!world.agents[1].said_by_neighbour().contains("CORRUPT"));
        assert_eq!(files(world, 1), ["disk", NEIGHBOUR]);
        for name in ["disk", NEIGHBOUR] {
            assert_has_still(&world.agents[1].disk().with_file_name(name));
        }
        for host in [0, 1] {
            await_no_mover(world, host);
        }
    });
}
