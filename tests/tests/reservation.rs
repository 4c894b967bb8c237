//! A reservation holds on a real Open vSwitch: the experiment `reservation`, as a test.
//!
//! It runs as a program of its own because it enters namespaces of its own. Needs root.

use std::process::Command;

use lifeboat_tests::experiments::reservation;

#[test]
fn a_migration_gets_what_is_reserved_beside_any_flood_and_no_more() {
    let out = tempfile::tempdir().unwrap();
    let images = out.path();
    let done = Command::new(env!("CARGO_BIN_EXE_lifeboat-experiment"))
        .args([reservation::NAME, "--quick", "--out"])
        .arg(out.path())
        .arg("--images")
        .arg(images)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    let why = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}\n{why}");
    let record = std::fs::read_to_string(out.path().join("reservation.json")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    // Four floods beside it, and each of both alone.
    assert_eq!(record["checks"].as_array().unwrap().len(), 6, "{said}");
    assert!(record["samples"].as_array().unwrap().len() >= 21, "{said}");
}
