//! A test that plays in a world of its own, and what the world's guest says meanwhile of its memory and
//! its disk. Used by the tests that move disks. Not here: what is done to it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use super::{Host, World, inside};
use crate::clock;
use crate::rig::private;

/// Long enough for a build beside us.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Made once: two tests at a time would take each other's files away.
static IMAGES: LazyLock<PathBuf> = LazyLock::new(|| {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a room has a root");
    let made = Command::new(root.join("lab/image")).output().expect("lab/image starts");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    root.join("lab/build")
});

/// The guest's kernel and initrd.
///
/// # Panics
/// When lab/image fails.
#[must_use]
pub fn images() -> &'static Path {
    &IMAGES
}

/// Runs `play` in namespaces of its own, in a world that `make` makes and the controller sees. A world
/// in which it panics tells its story and is kept.
///
/// # Panics
/// When the test does, or there is no world.
pub fn play_in(name: &str, make: impl FnOnce() -> World, play: impl FnOnce(&mut World)) {
    if !inside::is_inside() {
        assert!(images().is_dir());
        assert!(inside::run_inside(name).expect("namespaces").success(), "see above");
        return;
    }
    private::settle().expect("namespaces");
    let mut world = make();
    world.control.await_sight(0).expect("the controller sees the VM");
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| play(&mut world))) {
        println!("{}the world is kept in {}", world.story(), world.keep().display());
        resume_unwind(panic);
    }
}

/// The newest `key=N` that the guest has said at a host; 0 before the first.
#[must_use]
pub fn said(world: &World, host: Host, key: &str) -> u64 {
    let seen = world.witness.look();
    let lines = seen.lives().iter().filter(|life| life.host == host).flat_map(|l| l.said().lines());
    let ticks = lines.filter(|line| line.starts_with("LIFEBOAT-TICK"));
    let number = |line: &str| {
        let words = line.split_whitespace();
        words.filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok()).next()
    };
    ticks.filter_map(number).next_back().unwrap_or(0)
}

/// Waits until the guest has said more of `key` than so much at a host, and gives what it said.
///
/// # Panics
/// When it does not.
pub fn await_more(world: &World, host: Host, key: &str, than: u64) -> u64 {
    let more = || Some(said(world, host, key)).filter(|now| *now > than);
    clock::wait_for(PATIENCE, more).unwrap_or_else(|| {
        panic!("no more {key} than {than} at host {}: {:?}", host + 1, said(world, host, key))
    })
}

/// It runs there and nowhere else, finds what it wrote to its disk in so many checks, and has found
/// nothing wrong.
///
/// # Panics
/// Where that is not so.
pub fn assert_at(world: &World, host: Host, checks: u64) {
    assert_eq!(world.witness.look().running(), [host]);
    let checked = await_more(world, host, "disk_checks", 0);
    await_more(world, host, "disk_checks", checked + checks);
    assert_eq!(world.witness.look().offences(), Vec::<String>::new());
}

/// What is in the directory of a host's disks, by name.
///
/// # Panics
/// When there is no such directory.
#[must_use]
pub fn files(world: &World, host: Host) -> Vec<String> {
    let disk = world.agents[host].disk();
    let folder = disk.parent().expect("a disk is in a directory");
    let entries = std::fs::read_dir(folder).expect("a directory").flatten();
    let mut names: Vec<_> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
