//! A VM never runs twice and is never lost: real QEMU, real agents, a real controller, killed at
//! every step of the hand-over.
//!
//! Needs root (namespaces, QEMU as another user) and `lab/image`'s guest. Of the kill points in
//! `cases` a seed chooses some of each kind, and the details; a failure names the seed.
//!
//! * `LIFEBOAT_SEED=N`: that seed again;
//! * `LIFEBOAT_KILL_POINTS=all` (or `LIFEBOAT_TESTS=full`): all of them, by another seed each time;
//!   or a number; or a part of their name.
//!
//! Without any of these the seed is always the same, so that what fails in `tests/run` was broken by
//! a change and not by chance, and points that an operator's claim ends are left to `tests/full`.

mod cases;
mod elsewhere;
mod play;

use std::path::{Path, PathBuf};
use std::process::Command;

use cases::{CASES, Case};
use lifeboat_tests::chance::Chance;
use lifeboat_tests::clock;
use lifeboat_tests::rig::private;
use lifeboat_tests::rig::userfaultfd::Allowed;
use lifeboat_tests::world::guest::{self, PATIENCE};
use lifeboat_tests::world::{World, inside};

/// So many are played where nobody says otherwise.
const DEFAULT: usize = 20;
/// The seed of `tests/run`.
const SEED: u64 = 1_795_227_153_278;
/// So many worlds are there at once.
const WORLDS: usize = 2;

#[test]
fn a_vm_never_runs_twice_and_is_never_lost_whatever_is_killed() {
    if !inside::is_inside() {
        let images = images();
        assert!(images.join("vmlinuz").is_file(), "lab/image made no kernel");
        let name = "a_vm_never_runs_twice_and_is_never_lost_whatever_is_killed";
        let status = inside::run_inside(name).unwrap();
        assert!(status.success(), "see above: {status}");
        return;
    }
    private::settle().unwrap();
    let seed = seed();
    println!("LIFEBOAT_SEED={seed}");
    let mut chance = Chance::from_seed(seed);
    let chosen = choose(&mut chance);
    let failures = play_side_by_side(&chosen, seed);
    println!("{} kill points, {} failed", chosen.len(), failures.len());
    assert!(failures.is_empty(), "LIFEBOAT_SEED={seed}:\n{}", failures.join("\n"));
}

/// QEMU's devices touch pages before it says that the guest runs, and the source may have died meanwhile:
/// the one that comes back does not wait for that word.
#[test]
fn a_source_that_was_killed_serves_a_guest_that_does_not_run_yet() {
    let name = "a_source_that_was_killed_serves_a_guest_that_does_not_run_yet";
    guest::play_in(
        name,
        || World::make(0, guest::images()).unwrap(),
        |world| {
            let _allowed = Allowed::now().unwrap();
            world.agents[1].start(Some("destination/before/start-guest")).unwrap();
            world.control.await_sight(0).unwrap();
            let id =
                world.control.detached("migrate vm --to h2 --urgency 0 --mode post-copy --yes");
            let held = || world.agents[1].holds().then_some(());
            assert!(clock::wait_for(PATIENCE, held).is_some(), "it does not get to the hand-over");
            world.agents[0].kill();
            world.agents[0].start(None).unwrap();
            let serves = || world.agents[0].said("its pages are served again").then_some(());
            assert!(clock::wait_for(PATIENCE, serves).is_some(), "no page is served");
            assert!(!world.agents[1].said("going on"), "that proves nothing");
            world.agents[1].let_go();
            assert_eq!(world.at_rest(PATIENCE).unwrap(), 1, "{id:?}");
        },
    );
}

/// Several worlds at once: most of a kill point's time is waiting.
fn play_side_by_side(chosen: &[Case], seed: u64) -> Vec<String> {
    std::thread::scope(|scope| {
        let worlds = (0..WORLDS).map(|number| {
            let share: Vec<Case> = chosen.iter().skip(number).step_by(WORLDS).copied().collect();
            let mut chance = Chance::from_seed(seed.wrapping_add(1 + number as u64));
            scope.spawn(move || play_all(number, &share, &mut chance))
        });
        let worlds: Vec<_> = worlds.collect();
        worlds.into_iter().flat_map(|world| world.join().unwrap()).collect()
    })
}

/// A world lasts until a kill point fails in it; the next one gets a new one.
fn play_all(number: usize, chosen: &[Case], chance: &mut Chance) -> Vec<String> {
    let mut failures = vec![];
    let mut world = None;
    for (index, case) in chosen.iter().enumerate() {
        let name = name(case);
        let began = clock::now();
        let mut here = match world.take() {
            Some(world) => world,
            None => World::make(number * 100 + index, &images()).unwrap(),
        };
        let played = play::play(&mut here, case, chance);
        let took = began.elapsed().as_secs_f64();
        match played {
            Ok(end) => {
                println!("{number}.{index:02} {took:5.1} s  {name}: {end}");
                world = Some(here);
            }
            Err(failure) => {
                let folder = here.keep();
                println!(
                    "{number}.{index:02} {took:5.1} s  {name}: FAILED: {failure} ({folder:?})"
                );
                failures.push(format!("{name}: {failure}"));
            }
        }
    }
    failures
}

fn name(case: &Case) -> String {
    let claim = case.claim.map(|side| format!(", claimed by {side:?}")).unwrap_or_default();
    let only = if case.only_there { ", nowhere else to go" } else { "" };
    format!("{:?} {:?}{claim}{only}", case.moment, case.blow)
}

fn choose(chance: &mut Chance) -> Vec<Case> {
    let mut all: Vec<Vec<Case>> = CASES.iter().map(|kind| kind.to_vec()).collect();
    for kind in &mut all {
        chance.shuffle(kind);
    }
    let wanted = std::env::var("LIFEBOAT_KILL_POINTS").unwrap_or_default();
    let full = is_full();
    if wanted.is_empty() && !full {
        all.iter_mut().for_each(|kind| kind.retain(|case| case.claim.is_none()));
    }
    let number = match wanted.as_str() {
        "all" => usize::MAX,
        "" if full => usize::MAX,
        "" => DEFAULT,
        text => match text.parse() {
            Ok(number) => number,
            Err(_) => {
                let named = |case: &Case| name(case).contains(text);
                return all.into_iter().flatten().filter(named).collect();
            }
        },
    };
    // One of each kind in turn, so that few are still of every kind.
    let longest = all.iter().map(Vec::len).max().unwrap_or_default();
    let in_turn = (0..longest).flat_map(|at| all.iter().filter_map(move |kind| kind.get(at)));
    let mut chosen: Vec<Case> = in_turn.copied().take(number).collect();
    chance.shuffle(&mut chosen);
    chosen
}

fn is_full() -> bool {
    std::env::var("LIFEBOAT_TESTS").is_ok_and(|tier| tier == "full")
}

fn seed() -> u64 {
    let given = std::env::var("LIFEBOAT_SEED").ok().and_then(|seed| seed.parse().ok());
    let chosen = is_full() || std::env::var_os("LIFEBOAT_KILL_POINTS").is_some();
    let by_chance = || clock::unix_now().as_millis().try_into().unwrap_or_default();
    given.unwrap_or_else(|| if chosen { by_chance() } else { SEED })
}

/// The guest's kernel and initrd, made if they are not there.
fn images() -> PathBuf {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lab");
    let images = lab.join("build");
    if !images.join("initrd").is_file() {
        let made = Command::new(lab.join("image")).status().unwrap();
        assert!(made.success(), "lab/image failed");
    }
    images.canonicalize().unwrap()
}
