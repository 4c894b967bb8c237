//! A guest moves on and on by post-copy and scatter-gather while everything around it is killed: its
//! memory is whole, it runs once, and it is lost only where docs/elsewhere.md says so, and where that was
//! said at the time (which `tests/run` does not play).
//!
//! Real QEMU, redis-server, agents and controller in network namespaces; needs root and
//! `lab/image`'s guest. `tests/run` plays each blow once, by one seed; `tests/soak` goes
//! on by chance:
//!
//! * `LIFEBOAT_SOAK_MINUTES=N`: for so long;
//! * `LIFEBOAT_SEED=N`: that seed again;
//! * `LIFEBOAT_SOAK_ONLY=DestinationAgent`: of the cases only those with that in their name.

mod turn;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lifeboat_tests::chance::Chance;
use lifeboat_tests::clock;
use lifeboat_tests::rig::private;
use lifeboat_tests::rig::userfaultfd::Allowed;
use lifeboat_tests::world::{Disk, World, inside};
use turn::{Case, End};

/// The seed of `tests/run`.
const SEED: u64 = 1_795_711_264_001;
/// So many worlds are there at once: most of a turn's time is waiting.
const WORLDS: usize = 2;

#[test]
fn a_guest_survives_what_breaks_while_its_pages_are_elsewhere() {
    if !inside::is_inside() {
        assert!(images().join("vmlinuz").is_file(), "lab/image made no kernel");
        let name = "a_guest_survives_what_breaks_while_its_pages_are_elsewhere";
        let status = inside::run_inside(name).unwrap();
        assert!(status.success(), "see above: {status}");
        return;
    }
    private::settle().unwrap();
    let _allowed = Allowed::now().unwrap();
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let minutes = number("LIFEBOAT_SOAK_MINUTES");
    let by_chance = minutes.map(|_| u64::try_from(clock::unix_now().as_millis()).unwrap());
    let seed = number("LIFEBOAT_SEED").or(by_chance).unwrap_or(SEED);
    println!("LIFEBOAT_SEED={seed}");
    let end = minutes.map(|minutes| clock::now() + Duration::from_secs(minutes * 60));
    let played = std::thread::scope(|scope| {
        let worlds = (0..WORLDS).map(|number| scope.spawn(move || play(number, seed, end)));
        let worlds: Vec<_> = worlds.collect();
        worlds.into_iter().map(|world| world.join().unwrap()).collect::<Vec<_>>()
    });
    let (turns, failures): (Vec<usize>, Vec<Vec<String>>) = played.into_iter().unzip();
    let failures = failures.concat();
    let turns: usize = turns.iter().sum();
    println!("{turns} migrations, {} failed", failures.len());
    assert!(failures.is_empty(), "LIFEBOAT_SEED={seed}:\n{}", failures.join("\n"));
}

/// One world's turns until `end`, or its share of the few; how many there were, and what went wrong. A world
/// lasts until something does.
fn play(number: usize, seed: u64, end: Option<Instant>) -> (usize, Vec<String>) {
    let mut chance = Chance::from_seed(seed.wrapping_add(1 + number as u64));
    // All worlds shuffle alike, and share.
    let part = std::env::var("LIFEBOAT_SOAK_ONLY").unwrap_or_default();
    let few = Case::few(&mut Chance::from_seed(seed));
    let mut once: Vec<Case> = few.into_iter().skip(number).step_by(WORLDS).collect();
    let (mut turns, mut failures, mut world) = (0, vec![], None);
    loop {
        let case = match end {
            Some(end) if clock::now() < end => Case::by(&mut chance, &part),
            Some(_) => break,
            None => match once.pop() {
                Some(case) => case,
                None => break,
            },
        };
        let began = clock::now();
        let mut here = match world.take() {
            Some(world) => world,
            None => {
                // In one of them a disk goes along.
                let disk = if number == 0 { Disk::Raw } else { Disk::None };
                World::make_with_stores(number * 1000 + turns, &images(), disk).unwrap()
            }
        };
        turns += 1;
        let played = turn::play(&mut here, case, &mut chance);
        let took = began.elapsed().as_secs_f64();
        match played {
            Ok(End::Lives(said)) => {
                println!("{number}.{turns:03} {took:5.1} s  {case}: {said}");
                world = Some(here);
            }
            Ok(End::Lost(said)) => {
                println!("{number}.{turns:03} {took:5.1} s  {case}: lost, and said so: {said}");
            }
            Err(failure) => {
                println!("{number}.{turns:03} {took:5.1} s  {case}: FAILED: {failure}");
                println!("{}", here.story());
                let folder = here.keep();
                println!("its files stay in {}", folder.display());
                failures.push(format!("{case}: {failure}"));
            }
        }
    }
    (turns, failures)
}

fn images() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let made = Command::new(root.join("lab/image")).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    root.join("lab/build")
}
