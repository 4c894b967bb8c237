//! A destination that dies with a guest of which its source still has everything: what is said of it, what
//! a claim brings back, and that nothing of it runs twice when the dead come back.

use lifeboat_tests::clock;
use lifeboat_tests::rig::userfaultfd::Allowed;
use lifeboat_tests::world::guest::{self, PATIENCE};
use lifeboat_tests::world::{Disk, World};
use serde_json::Value;

/// A guest's pages take about five seconds over it, bit/s.
const LINK: u64 = 80_000_000;

fn world() -> World {
    World::make_on(0, guest::images(), Disk::None, LINK).unwrap()
}

/// The guest runs at the second host, and a good part of its pages has not come yet.
fn half_way(world: &World) -> String {
    let line = "migrate vm --to h2 --urgency 0 --mode post-copy --yes";
    let id = world.control.detached(line).unwrap();
    // Nothing of its pages leaves its source before it runs elsewhere.
    let sent = || {
        let vm = world.control.status(&id).ok()?["migrations"][0].take();
        let (sent, all) = (vm["bytes_sent"].as_u64()?, vm["pages_total"].as_u64()? * 4096);
        (all > 0 && sent > all / 5).then_some((sent, all))
    };
    let (sent, all) = clock::wait_for(PATIENCE, sent).expect("no pages come");
    assert!(sent < all * 3 / 4, "too fast for this test: {sent} of {all} bytes are there");
    assert_eq!(world.witness.look().running(), [1]);
    id
}

/// Waits until the migration, or else a host, says that.
fn await_words(world: &World, id: &str, words: &str) {
    let said = || {
        let status = world.control.status(id).unwrap_or_default();
        let vms = world.control.ask("vms").unwrap_or_default();
        (status.to_string().contains(words) || vms.to_string().contains(words)).then_some(())
    };
    let said = clock::wait_for(PATIENCE, said);
    let vms: Value = world.control.ask("vms").unwrap();
    assert!(said.is_some(), "{words} is not said; {:?}; {vms}", world.control.status(id));
}

/// By the operator: it runs at its source as it was at the switchover, and never anywhere else.
fn claim(world: &World) {
    // A source that has not heard of it yet refuses: nothing is uncertain there.
    let claimed = || world.control.order("claim vm --fenced --host h1").ok();
    assert!(clock::wait_for(PATIENCE, claimed).is_some(), "the claim is refused");
    let runs = || (world.witness.look().running() == [0]).then_some(());
    assert!(clock::wait_for(PATIENCE, runs).is_some(), "it is not brought back");
}

/// It goes on at its source, and no other host would start it.
fn is_at_its_source_alone(world: &mut World) {
    // The guest counts the seconds since the switchover once more: what it did meanwhile is lost.
    let twice = "the guest counted a second twice";
    let now = || world.witness.look().last_tick_at(0).unwrap_or_default();
    let before = now();
    let counts = clock::wait_for(PATIENCE, || (now() > before + 2).then_some(()));
    assert!(counts.is_some(), "it stands still");
    let seen = world.witness.look();
    let offences: Vec<String> =
        seen.offences().into_iter().filter(|said| !said.starts_with(twice)).collect();
    assert_eq!((offences, seen.running(), seen.with_qemu()), (vec![], vec![0], vec![0]));
    drop(seen);
    for host in 1..world.agents.len() {
        let started = world.agents[host].start_vm();
        assert!(started.is_err(), "h{} started it, which is h1's", host + 1);
    }
}

#[test]
#[ignore = "takes long: tests/full"]
fn a_guest_that_dies_while_its_pages_follow_is_said_to_be_lost_and_brought_back_by_a_claim() {
    let name = "elsewhere::\
                a_guest_that_dies_while_its_pages_follow_is_said_to_be_lost_and_brought_back_by_a_claim";
    guest::play_in(name, world, |world| {
        let _allowed = Allowed::now().unwrap();
        let id = half_way(world);
        world.agents[1].kill_qemu();
        await_words(world, &id, "lifeboat claim vm --fenced");
        claim(world);
        is_at_its_source_alone(world);
    });
}

#[test]
#[ignore = "takes long: tests/full"]
fn a_guest_whose_host_loses_its_power_while_its_pages_follow_is_brought_back_and_runs_once() {
    let name = "elsewhere::\
                a_guest_whose_host_loses_its_power_while_its_pages_follow_is_brought_back_and_runs_once";
    guest::play_in(name, world, |world| {
        let _allowed = Allowed::now().unwrap();
        let id = half_way(world);
        world.agents[1].lose_power().unwrap();
        await_words(world, &id, "lifeboat claim vm --fenced");
        claim(world);
        // It starts the VMs that are to be started with it.
        world.agents[1].start(None).unwrap();
        is_at_its_source_alone(world);
    });
}
