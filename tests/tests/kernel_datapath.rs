//! A reservation holds on Open vSwitch's kernel datapath too: the experiment `reservation` on a
//! machine of its own, an emulated one, whose kernel has the modules (`tests/kernel-datapath`).
//!
//! There `set_queue` alone has to do it: no classifier is installed. The link is slower than
//! elsewhere, because one emulated processor carries all of it and has to be idle half of the time:
//! what it measures without a breath left is measured again. Needs no root.

use std::path::Path;
use std::process::Command;

use lifeboat_tests::experiments::reservation;

/// The median and the claim of each line in which the experiment judges.
fn judged(said: &str) -> Vec<(&str, f64)> {
    let lines = said.lines().filter(|line| line.starts_with("holds") || line.starts_with("BROKEN"));
    lines
        .filter_map(|line| {
            let (claim, figures) = line.split_once(": median ")?;
            let median = figures.split_whitespace().next()?.parse().ok()?;
            Some((claim.split_once(' ')?.1.trim(), median))
        })
        .collect()
}

#[test]
fn a_migration_gets_what_is_reserved_on_the_kernel_datapath() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let image = Command::new(root.join("lab/image")).output().unwrap();
    assert!(image.status.success(), "{}", String::from_utf8_lossy(&image.stderr));
    let done = Command::new(root.join("tests/kernel-datapath/machine"))
        .args(["--seconds", "300", "--", env!("CARGO_BIN_EXE_lifeboat-experiment")])
        .args([reservation::NAME, "--quick", "--runs", "1", "--link-mbit", "20"])
        .args(["--out", "/tmp", "--images", "/tmp"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    let why = String::from_utf8_lossy(&done.stderr);
    let judged = judged(&said);
    assert_eq!(judged.len(), 6, "{said}\n{why}");
    for (claim, median) in judged {
        // How fast one connection gets going alone is the emulated processor's matter; how a full
        // link is shared is not.
        let within = if claim.contains("share") { 72.0..=78.0 } else { 85.0..=101.0 };
        assert!(within.contains(&median), "{claim}: {median}\n{said}\n{why}");
    }
}
