//! A VM moves with its local disk: a guest writes patterns to it all the while, checks them, and its
//! count of writes moves with its memory. Vetoed, it runs on where it was. Processes are killed, links
//! fall silent. Or its disk follows it ([`a_disk_that_follows`], [`a_disk_by_way_of_another`]), its hosts fail
//! ([`a_disk_whose_hosts_fail`]), it has two disks or is one of two VMs ([`several_disks`]).
//! What else was agreed: [`agreements`]. Again and again, and nothing breaks: [`to_and_fro`].
//!
//! Real QEMU, FUSE, agents and controller (`lifeboat_tests::world`); needs root and `lab/image`'s
//! guest.

// Tests begin in the order of their names; the longest one is here, and should not begin last.
mod a_disk_by_way_of_another;
mod a_disk_that_follows;
mod a_disk_whose_hosts_fail;
mod agreements;
mod several_disks;
mod to_and_fro;

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lifeboat_tests::clock;
use lifeboat_tests::rig::userfaultfd::Allowed;
use lifeboat_tests::world::agent::FRESH_NVRAM;
use lifeboat_tests::world::guest::{self, PATIENCE, await_more, files, images, play_in, said};
use lifeboat_tests::world::{Disk, Host, World, host_name, relay};

/// Runs `play` in namespaces of its own, in a world whose VM has such a disk.
fn in_a_world(name: &str, number: usize, disk: Disk, play: impl FnOnce(&mut World)) {
    play_in(name, || World::make_with(number, images(), disk).unwrap(), play);
}

/// Longer than everything that is sent before them takes.
const LATE: Duration = Duration::from_secs(3);
/// Beyond what the guest writes.
const STILL_AT: u64 = 32 << 20;
const STILL: u32 = 28 << 20;
/// One round of checks over all that is written.
const ROUND: u64 = 2048;

/// What the guest never writes, beyond what it writes all the while.
fn still() -> Vec<u8> {
    (0..STILL).map(|at| (at >> 9) as u8 | 1).collect()
}

fn fill_still(image: &Path) {
    let image = File::options().write(true).open(image).unwrap();
    image.write_all_at(&still(), STILL_AT).unwrap();
}

fn assert_has_still(image: &Path) {
    let mut found = vec![0; STILL as usize];
    File::open(image).unwrap().read_exact_at(&mut found, STILL_AT).unwrap();
    assert!(found == still(), "{}", image.display());
}

/// It runs there, its disk fits its memory, and it goes on writing.
fn assert_at(world: &World, host: Host) {
    guest::assert_at(world, host, ROUND);
}

fn evacuate(world: &World, from: Host, to: Host) {
    let (from, to) = (host_name(from), host_name(to));
    let line = format!("evacuate {from} --to {to} --urgency 0 --yes --by 5m");
    world.control.order(&line).unwrap();
}

/// The evacuation has come to an end, whatever it is.
fn await_over(world: &World, id: &str) {
    let over = || world.control.status(id).ok().filter(|status| status["state"] != "running");
    let over = clock::wait_for(PATIENCE, over);
    assert!(over.is_some(), "{:?}", world.control.status(id));
}

/// No process that moves disks is left at a host, nor anything of one.
fn await_no_mover(world: &World, host: Host) {
    let none = || world.agents[host].disk_leftovers().is_empty().then_some(());
    assert!(clock::wait_for(PATIENCE, none).is_some(), "host {}", host + 1);
}

/// The process that serves and sends the VM's disks there.
fn await_mover(world: &World, host: Host) -> rustix::process::Pid {
    let folder = world.agents[host].folder().display().to_string();
    let is_it = |pid: i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains("lifeboat-disk move") && line.contains(&folder)
    };
    let find = || {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let mut pids = entries.filter_map(|e| e.file_name().to_str()?.parse().ok());
        rustix::process::Pid::from_raw(pids.find(|pid| is_it(*pid))?)
    };
    clock::wait_for(PATIENCE, find).expect("a mover")
}

#[test]
fn an_overlay_goes_along_and_comes_back_though_its_mover_is_killed() {
    let name = "an_overlay_goes_along_and_comes_back_though_its_mover_is_killed";
    in_a_world(name, 1, Disk::Overlay, |world| {
        await_more(world, 0, "disk_checks", ROUND);
        evacuate(world, 0, 1);
        assert_at(world, 1);
        // The source keeps its copy under another name, and nothing else.
        let left = files(world, 0);
        assert!(left.len() == 1 && left[0].starts_with("disk.left-"), "{left:?}");
        assert_eq!(files(world, 1), ["disk"]);
        await_no_mover(world, 0);
        await_no_mover(world, 1);
        // And back, where the old copy does not stand in the way. The mover is killed on the way: its
        // mounts are held, the guest waits, and another one compares hashes.
        world.control.await_sight(1).unwrap();
        let id = world.control.detached("evacuate h2 --to h1 --urgency 0 --yes").unwrap();
        let mover = await_mover(world, 1);
        // Once it serves; before, there is nothing to hold.
        let control = world.agents[1].disk_leftovers()[0].join("control");
        clock::wait_for(PATIENCE, || control.exists().then_some(())).unwrap();
        // What its guest may change is an operator's to say, and the next one keeps to it, too.
        let limited = clock::wait_for(PATIENCE, || world.control.ask("limit vm --disk 5").ok());
        assert_eq!(limited.expect("a limit")["disk_bytes_per_sec"], 5_000_000);
        clock::rest(Duration::from_millis(300));
        rustix::process::kill_process(mover, rustix::process::Signal::KILL).unwrap();
        let shown = || {
            let status = world.control.status(&id).ok()?;
            (status["migrations"][0]["disk_limit_bytes_per_sec"] == 5_000_000).then_some(())
        };
        assert!(clock::wait_for(PATIENCE, shown).is_some(), "{:?}", world.control.status(&id));
        await_over(world, &id);
        assert_at(world, 0);
        await_no_mover(world, 1);
    });
}

#[test]
fn an_overlay_goes_only_to_a_host_whose_base_is_the_same() {
    let name = "an_overlay_goes_only_to_a_host_whose_base_is_the_same";
    in_a_world(name, 9, Disk::Overlay, |world| {
        let verify = || world.control.ask("verify vm").unwrap();
        let states = || {
            let reply = verify();
            let files = reply["files"].as_array().unwrap().iter();
            files.map(|file| file["state"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert!(verify()["same"] == true && states() == ["same"; 2], "{}", verify());
        // One byte of it is another one there: the guest would read it.
        let base = world.agents[1].base();
        let content = std::fs::read(&base).unwrap();
        let mut other = content.clone();
        other[1 << 20] = 1;
        std::fs::write(&base, other).unwrap();
        assert_eq!(states(), ["differs", "same"]);
        let failed = world.control.order("verify vm --host h2").unwrap_err().to_string();
        assert!(failed.contains("exit status: 2"), "{failed}");
        world.control.order("verify vm --host h3").unwrap();
        let itself = world.control.order("verify vm --host h1").unwrap_err().to_string();
        assert!(itself.contains("no other host is connected"), "{itself}");
        let refused = |why: &str| {
            let order = world.control.order("migrate vm --to h2 --urgency 0 --yes");
            let refused = order.unwrap_err().to_string();
            assert!(refused.contains("base.raw") && refused.contains(why), "{refused}");
        };
        refused("differs");
        std::fs::remove_file(&base).unwrap();
        assert_eq!(states(), ["unreadable", "same"]);
        refused("No such file");
        assert_eq!(files(world, 1), Vec::<String>::new());
        // It is put there, and the VM goes.
        std::fs::write(&base, content).unwrap();
        evacuate(world, 0, 1);
        assert_at(world, 1);
    });
}

#[test]
#[ignore = "takes long: tests/full"]
fn a_disk_that_cannot_go_leaves_its_guest_running_and_nothing_behind() {
    let name = "a_disk_that_cannot_go_leaves_its_guest_running_and_nothing_behind";
    in_a_world(name, 2, Disk::Raw, |world| {
        await_more(world, 0, "disk_writes", ROUND);
        // Somebody's file has its name.
        let there = world.agents[1].disk();
        std::fs::write(&there, "mine").unwrap();
        let refused = world.control.order("evacuate h1 --to h2 --urgency 0 --yes").unwrap_err();
        assert!(refused.to_string().contains("is there already"), "{refused}");
        assert_eq!(std::fs::read(&there).unwrap(), b"mine");
        std::fs::remove_file(&there).unwrap();
        // The link goes while blocks are on their way, and stays away.
        let id = world.control.detached("evacuate h1 --to h2 --urgency 0 --yes").unwrap();
        await_mover(world, 0);
        world.link(0, 1, relay::State::Silent);
        await_over(world, &id);
        world.link(0, 1, relay::State::Whole);
        await_no_mover(world, 0);
        let cleared = || files(world, 1).is_empty().then_some(());
        assert!(clock::wait_for(PATIENCE, cleared).is_some(), "{:?}", files(world, 1));
        assert_at(world, 0);
        // The agent is killed: the guest writes on through the mover, and the next agent ends it.
        let id = world.control.detached("evacuate h1 --to h2 --urgency 0 --yes").unwrap();
        await_mover(world, 0);
        world.agents[0].kill();
        let written = said(world, 0, "disk_writes");
        await_more(world, 0, "disk_writes", written + 100);
        world.agents[0].start(None).unwrap();
        await_no_mover(world, 0);
        await_over(world, &id);
        assert_at(world, 0);
    });
}

#[test]
#[ignore = "takes long: tests/full"]
fn a_disk_that_was_copied_ahead_sends_only_what_differs() {
    let name = "a_disk_that_was_copied_ahead_sends_only_what_differs";
    in_a_world(name, 10, Disk::Raw, |world| {
        await_more(world, 0, "disk_checks", ROUND);
        fill_still(&world.agents[0].disk());
        let copied = world.control.ask("preseed vm --to h2 --limit 1000").unwrap();
        assert_eq!(copied["phase"], "done", "{copied}");
        let first = copied["bytes_sent"].as_u64().unwrap();
        assert!(first >= copied["bytes_total"].as_u64().unwrap() / 2, "{copied}");
        assert_eq!(files(world, 1), ["disk.seed-vm"]);
        await_no_mover(world, 0);
        assert_at(world, 0);
        // Again: what the guest has written since, and no more.
        let again = world.control.ask("preseed vm --to h2 --limit 1000").unwrap();
        let sent = again["bytes_sent"].as_u64().unwrap();
        assert!(sent + u64::from(STILL) - (1 << 20) < first, "{again} after {copied}");
        let listed = || {
            let seeds = world.control.ask("preseed --list").unwrap();
            let seeds = seeds["seeds"].as_array().unwrap().iter();
            seeds.map(|seed| seed["host"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let told = || (listed() == ["h2"]).then_some(());
        assert!(clock::wait_for(PATIENCE, told).is_some(), "{:?}", listed());
        let plan = world.control.ask("plan h1 --to h2 --urgency 0").unwrap();
        assert!(plan["notes"].to_string().contains("has a copy of vm's disks"), "{plan}");
        // A migration that does not come to its end leaves the copy as it was.
        let id = world.control.detached("evacuate h1 --to h2 --urgency 0 --yes").unwrap();
        await_mover(world, 0);
        world.link(0, 1, relay::State::Silent);
        await_over(world, &id);
        world.link(0, 1, relay::State::Whole);
        await_no_mover(world, 0);
        let back = || (files(world, 1) == ["disk.seed-vm"]).then_some(());
        assert!(clock::wait_for(PATIENCE, back).is_some(), "{:?}", files(world, 1));
        assert_at(world, 0);
        // One that does uses it up.
        evacuate(world, 0, 1);
        assert_at(world, 1);
        assert_eq!(files(world, 1), ["disk"]);
        assert_has_still(&world.agents[1].disk());
        let none = || listed().is_empty().then_some(());
        assert!(clock::wait_for(PATIENCE, none).is_some(), "{:?}", listed());
    });
}

#[test]
fn a_copy_ahead_ends_with_its_command_and_makes_way_for_a_migration() {
    let name = "a_copy_ahead_ends_with_its_command_and_makes_way_for_a_migration";
    in_a_world(name, 11, Disk::Raw, |world| {
        await_more(world, 0, "disk_writes", ROUND);
        // So slow that it does not end by itself.
        let mut copying = world.control.begin("preseed vm --to h2 --limit 1").unwrap();
        await_mover(world, 0);
        let begun = || (files(world, 1) == ["disk.seed-vm"]).then_some(());
        assert!(clock::wait_for(PATIENCE, begun).is_some(), "{:?}", files(world, 1));
        let second = world.control.order("preseed vm --to h2 --limit 1").unwrap_err().to_string();
        assert!(second.contains("already"), "{second}");
        copying.interrupt();
        let (code, said) = copying.end(PATIENCE).unwrap();
        assert!(code == Some(4) && said.contains("what has been copied stays"), "{code:?} {said}");
        await_no_mover(world, 0);
        // What was begun is gone on with by a migration, which does not wait for a copy.
        copying = world.control.begin("preseed vm --to h2 --limit 1").unwrap();
        await_mover(world, 0);
        evacuate(world, 0, 1);
        assert_at(world, 1);
        assert_eq!(files(world, 1), ["disk"]);
        let (code, said) = copying.end(PATIENCE).unwrap();
        assert!(code != Some(0) && said.contains("has begun to move"), "{code:?} {said}");
        // Nothing is left of a copy that nobody wants.
        world.control.await_sight(1).unwrap();
        let id = world.control.ask("preseed vm --to h3 --limit 1000").unwrap();
        assert_eq!(id["phase"], "done", "{id}");
        world.control.order("preseed vm --to h3 --forget").unwrap();
        assert_eq!(files(world, 2), Vec::<String>::new());
        let again = world.control.order("preseed vm --to h3 --forget").unwrap_err().to_string();
        assert!(again.contains("has no copy of the disks of vm"), "{again}");
    });
}

#[test]
#[ignore = "takes long: tests/full"]
fn a_disk_goes_ahead_of_pages_that_follow_their_guest() {
    let name = "a_disk_goes_ahead_of_pages_that_follow_their_guest";
    let make = || World::make_with_stores(7, images(), Disk::Raw).unwrap();
    play_in(name, make, |world| {
        let _allowed = Allowed::now().unwrap();
        assert_at(world, 0);
        let plan = world.control.ask("plan h1 --to h2 --urgency 0 --mode post-copy").unwrap();
        assert!(plan["vms"][0]["mode"] == "post-copy", "{plan}");
        // The connections that pages come on are late: the destination's QEMU needs one of its disk's pages
        // to load it, answers nobody until it has it, and must not be given up meanwhile.
        world.connect_after(0, 1, LATE);
        world.control.order("migrate vm --to h2 --urgency 0 --mode post-copy --yes").unwrap();
        world.connect_after(0, 1, Duration::ZERO);
        assert_at(world, 1);
        assert_eq!(files(world, 1), ["disk"]);
        world.control.await_sight(1).unwrap();
        let scatter = "migrate vm --to h1 --urgency 0 --mode scatter-gather --yes \
                       --intermediaries h3,h4,h5 --redundancy parity";
        // The copy that stayed at the first host is kept under another name, and is not in the way.
        world.control.order(scatter).unwrap();
        assert_at(world, 0);
        for host in [0, 1] {
            await_no_mover(world, host);
        }
    });
}

#[test]
fn what_firmware_keeps_goes_along_in_every_mode() {
    let name = "what_firmware_keeps_goes_along_in_every_mode";
    in_a_world(name, 12, Disk::Firmware, |world| {
        let _allowed = Allowed::now().unwrap();
        // It wrote while it booted, through no mount of ours.
        let written = std::fs::read(world.agents[0].disk()).unwrap();
        assert!(written != std::fs::read(FRESH_NVRAM).unwrap());
        evacuate(world, 0, 1);
        let tick = world.await_guest(0).unwrap();
        world.await_guest(tick).unwrap();
        assert_eq!(world.witness.look().running(), [1]);
        assert!(std::fs::read(world.agents[1].disk()).unwrap() == written);
        world.control.await_sight(1).unwrap();
        world.control.order("migrate vm --to h1 --urgency 0 --mode post-copy --yes").unwrap();
        let tick = world.witness.look().last_tick().unwrap();
        world.await_guest(tick).unwrap();
        assert_eq!(world.witness.look().running(), [0]);
        assert!(std::fs::read(world.agents[0].disk()).unwrap() == written);
        assert_eq!(world.witness.look().offences(), Vec::<String>::new());
        for host in [0, 1] {
            await_no_mover(world, host);
        }
    });
}

/// How often the guest has said at a host that this is on its CD.
fn cd_reads(world: &World, host: Host, content: &str) -> usize {
    let seen = world.witness.look();
    let lines = seen.lives().iter().filter(|life| life.host == host).flat_map(|l| l.said().lines());
    lines.filter(|line| line.contains("LIFEBOAT-CD") && line.contains(content)).count()
}

fn await_cd_read(world: &World, host: Host, content: &str) {
    let before = cd_reads(world, host, content);
    // The first one may have begun before.
    let again = || (cd_reads(world, host, content) > before + 1).then_some(());
    assert!(clock::wait_for(PATIENCE, again).is_some(), "host {}", host + 1);
}

/// As the guest counts it.
fn md5(file: &Path) -> String {
    let said = Command::new("md5sum").stdin(File::open(file).unwrap()).output().unwrap();
    String::from_utf8(said.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}

#[test]
fn a_cd_goes_along_where_it_is_not_there_and_stays_where_it_is() {
    let name = "a_cd_goes_along_where_it_is_not_there_and_stays_where_it_is";
    in_a_world(name, 13, Disk::Cd, |world| {
        let cds = [0, 1].map(|host| world.agents[host].cd());
        let (content, sum) = (std::fs::read(&cds[0]).unwrap(), md5(&cds[0]));
        let inode = || std::fs::metadata(&cds[0]).unwrap().ino();
        let first = inode();
        await_cd_read(world, 0, &sum);
        // Something else has its name there: not overwritten, and the plan says so.
        let mut other = content.clone();
        other[1 << 20] ^= 1;
        std::fs::write(&cds[1], &other).unwrap();
        let verified = world.control.ask("verify vm").unwrap();
        let states: Vec<_> =
            verified["files"].as_array().unwrap().iter().map(|file| &file["state"]).collect();
        assert!(verified["same"] == false && states == ["differs", "absent"], "{verified}");
        world.control.order("verify vm --host h3").unwrap();
        let refused = world.control.order("migrate vm --to h2 --urgency 0 --yes").unwrap_err();
        let refused = refused.to_string();
        assert!(refused.contains("cd.iso") && refused.contains("differs"), "{refused}");
        assert!(std::fs::read(&cds[1]).unwrap() == other);
        std::fs::remove_file(&cds[1]).unwrap();
        // It is sent, bit for bit, and the source's stays: others may use it.
        evacuate(world, 0, 1);
        assert_at(world, 1);
        await_cd_read(world, 1, &sum);
        assert!(
            std::fs::read(&cds[1]).unwrap() == content && files(world, 1) == ["cd.iso", "disk"]
        );
        let left = files(world, 0);
        assert!(
            left.len() == 2 && left[0] == "cd.iso" && left[1].starts_with("disk.left-"),
            "{left:?}"
        );
        // And back, to the very file that it came from.
        world.control.await_sight(1).unwrap();
        evacuate(world, 1, 0);
        assert_at(world, 0);
        await_cd_read(world, 0, &sum);
        assert!(inode() == first && std::fs::read(&cds[0]).unwrap() == content);
        for host in [0, 1] {
            await_no_mover(world, host);
        }
    });
}

/// Takes all the room that is left.
fn fill(file: &Path) {
    let mut file = File::create(file).unwrap();
    let full = loop {
        if let Err(error) = file.write_all(&[1; 1 << 16]) {
            break error;
        }
    };
    assert_eq!(full.kind(), ErrorKind::StorageFull);
}

#[test]
fn a_destination_that_runs_out_of_room_is_told_and_the_guest_runs_on() {
    let name = "a_destination_that_runs_out_of_room_is_told_and_the_guest_runs_on";
    in_a_world(name, 8, Disk::Raw, |world| {
        await_more(world, 0, "disk_writes", ROUND);
        let room = world.agents[1].disk().parent().unwrap().to_owned();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=48m,mode=755", "room"])
            .arg(&room)
            .status();
        assert!(mounted.unwrap().success());
        // Enough when it is asked, and not any more once blocks come.
        let id = world.control.detached("evacuate h1 --to h2 --urgency 0 --yes").unwrap();
        await_mover(world, 0);
        // Before all of the disk is there: a quick machine sends it while the room is being filled.
        world.link(0, 1, relay::State::Silent);
        fill(&room.join("somebody's"));
        world.link(0, 1, relay::State::Whole);
        await_over(world, &id);
        let status = world.control.status(&id).unwrap();
        let reason = status["left_behind"][0]["reason"].as_str().unwrap_or_default().to_owned();
        assert!(reason.contains("No space left"), "{status}");
        assert_at(world, 0);
        await_no_mover(world, 0);
        let cleared = || (files(world, 1) == ["somebody's"]).then_some(());
        assert!(clock::wait_for(PATIENCE, cleared).is_some(), "{:?}", files(world, 1));
    });
}
