//! A VM whose disk is on a storage that several hosts reach: moved where that is proven, not believed;
//! left where it is otherwise, with the reason, before anything has been touched. Its guest writes to it
//! all the while, and checks what it wrote.
//!
//! Real QEMU, agents and controller (`lifeboat_tests::world`); needs root and `lab/image`'s guest.

use std::path::{Path, PathBuf};
use std::process::Command;

use lifeboat_tests::clock;
use lifeboat_tests::rig::private;
use lifeboat_tests::world::{Disk, VM, World, guest, inside};
use serde_json::Value;

fn images() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let made = Command::new(root.join("lab/image")).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    root.join("lab/build")
}

/// All that the guest writes, once and again.
const CHECKS: u64 = 2048;

/// Nobody else may write to the image.
fn assert_locked(image: &Path) {
    let other = ["-f", "raw", "-c", "write 0 512"];
    let other = Command::new("qemu-io").args(other).arg(image).output().unwrap();
    let said = String::from_utf8_lossy(&other.stderr);
    assert!(!other.status.success() && said.contains("lock"), "{said}");
}

fn host_of_vm(world: &World) -> Option<(String, String)> {
    let vms = world.control.ask("vms").ok()?;
    let of = |vm: &Value, key: &str| vm[key].as_str().unwrap_or_default().to_owned();
    let running: Vec<_> = vms["vms"]
        .as_array()?
        .iter()
        .filter(|vm| vm["name"] == VM && vm["state"] == "running")
        .map(|vm| (of(vm, "host"), of(vm, "state")))
        .collect();
    (running.len() == 1).then(|| running[0].clone())
}

#[test]
fn a_disk_moves_only_by_a_storage_that_both_hosts_are_proven_to_reach() {
    let name = "a_disk_moves_only_by_a_storage_that_both_hosts_are_proven_to_reach";
    if !inside::is_inside() {
        images();
        assert!(inside::run_inside(name).unwrap().success(), "see above");
        return;
    }
    private::settle().unwrap();
    let world = World::make_with(1, &images(), Disk::Shared).unwrap();
    world.control.await_sight(0).unwrap();
    // h3 calls a folder of its own by the same name.
    let plan = world.control.ask("plan h1 --to h3").unwrap().to_string();
    assert!(plan.contains("h3") && plan.contains("san"), "{plan}");
    assert!(world.control.order("evacuate h1 --to h3 --urgency 0 --yes").is_err());
    assert_eq!(host_of_vm(&world).unwrap().0, "h1");

    // The guest writes to it, and its QEMU has its lock.
    guest::await_more(&world, 0, "disk_checks", CHECKS);
    let disk = world.folder().join("shared/disk.raw");
    assert_locked(&disk);
    let before = world.witness.look().last_tick().unwrap();
    world.control.order("evacuate h1 --urgency 0 --yes --by 2m").unwrap();
    let arrived = || host_of_vm(&world).filter(|(host, _)| host == "h2");
    assert!(clock::wait_for(std::time::Duration::from_secs(10), arrived).is_some());
    world.await_guest(before).unwrap();
    // It finds what it wrote; its QEMU there has the lock, and nothing was copied.
    guest::assert_at(&world, 1, CHECKS);
    assert!(!world.agents[0].has_qemu());
    assert_locked(&disk);
    for host in [0, 1] {
        assert_eq!(guest::files(&world, host), Vec::<String>::new());
        assert!(world.agents[host].disk_leftovers().is_empty());
    }
    // No file of the proof is left behind.
    let left: Vec<_> = std::fs::read_dir(world.folder().join("shared")).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}
