//! A VM with a disk goes to and fro between two hosts, again and again, with nothing killed: what fails one
//! migration in a thousand shows itself here or nowhere. `LIFEBOAT_LEGS=N` says how often; the machine may be as
//! loaded as one likes. Not here: blows (`kill_points`, `soak`), and how long anything takes.

use lifeboat_tests::world::guest;
use lifeboat_tests::world::{Disk, Host};

use super::{evacuate, in_a_world};

/// One leg is one migration.
const LEGS: usize = 20;
/// Reads of its disk that its guest has checked between two of them.
const CHECKS: u64 = 200;

#[test]
#[ignore = "takes long: tests/full"]
fn a_guest_goes_to_and_fro_and_nothing_of_it_changes() {
    let name = "to_and_fro::a_guest_goes_to_and_fro_and_nothing_of_it_changes";
    in_a_world(name, 14, Disk::Overlay, |world| {
        let told = std::env::var("LIFEBOAT_LEGS").ok().and_then(|text| text.parse().ok());
        let mut at: Host = 0;
        guest::assert_at(world, at, CHECKS);
        for leg in 1..=told.unwrap_or(LEGS) {
            let to = 1 - at;
            world.control.await_sight(at).expect("the controller sees the VM");
            evacuate(world, at, to);
            guest::assert_at(world, to, CHECKS);
            println!("leg {leg}: at host {}", to + 1);
            at = to;
        }
    });
}
