//! Where the pages of a host's VMs wait when it leaves alone, and when its whole rack does; and what a plan
//! says of the loss of such a store.

use serde_json::Value;

use super::site::{Begin, Place, Site, images};

const RACKS: [&str; 6] = ["left", "left", "right", "right", "right", "far"];

/// The stores of the plan's VM, by host, and their redundancy; `None` where it stays.
fn stores(plan: &Value) -> Option<(Vec<&str>, &str)> {
    let vm = plan["vms"].as_array()?.first()?;
    let mut hosts: Vec<&str> =
        vm["stores"].as_array()?.iter().filter_map(|store| store["host"].as_str()).collect();
    hosts.sort_unstable();
    Some((hosts, vm["redundancy"].as_str()?))
}

/// A plan, once no host is too busy to keep pages.
fn plan(site: &Site, line: &str) -> Value {
    let mut plan = Value::Null;
    site.await_that(line, || {
        plan = site.ask(&format!("plan {line} --to h3 --urgency 0 --mode scatter-gather")).unwrap();
        stores(&plan).is_some()
    });
    plan
}

#[test]
#[ignore = "takes long: tests/full"]
fn pages_of_a_rack_that_is_emptied_wait_in_the_destinations_rack() {
    let name = "racks::pages_of_a_rack_that_is_emptied_wait_in_the_destinations_rack";
    let Some(Place { folder, .. }) = &Place::of(name) else { return };
    let vms = [("vm", super::definition())];
    let begin = Begin { racks: &RACKS, ..Begin::of(6, &vms) };
    let site = Site::start(folder.path(), &images(), &begin);
    site.await_sight("h1");
    site.ticks_on("h1");

    // One host leaves: its neighbour keeps pages, too.
    let alone = plan(&site, "h1");
    assert_eq!(stores(&alone), Some((vec!["h2", "h4", "h5"], "parity")), "{alone}");
    let risk = "the loss of a store before all is gathered is the loss of the VM";
    assert!(!alone["notes"].to_string().contains(risk), "{alone}");
    for (line, count) in
        [("h1 --intermediaries h2,h4,h5 --redundancy none", 3), ("h1 --intermediaries h4", 1)]
    {
        let unprotected = plan(&site, line);
        let (hosts, redundancy) = stores(&unprotected).unwrap();
        assert_eq!((hosts.len(), redundancy), (count, "none"), "{unprotected}");
        assert!(unprotected["notes"].to_string().contains(risk), "{unprotected}");
    }

    // Both leave: only the destination's rack has any, and two are enough for a mirror.
    let rack = plan(&site, "h1 h2");
    assert_eq!(stores(&rack), Some((vec!["h4", "h5"], "mirror")), "{rack}");
    let report =
        site.ask("evacuate h1 h2 --to h3 --urgency 0 --mode scatter-gather --yes").unwrap();
    let report = if report["vms"].is_array() { report } else { site.ask("report e1").unwrap() };
    let vm = &report["vms"][0];
    assert_eq!((&vm["outcome"], &vm["redundancy"]), (&"moved".into(), &"mirror".into()), "{vm}");
    let mut kept: Vec<&str> =
        vm["stores"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    kept.sort_unstable();
    assert_eq!(kept, ["h4", "h5"], "{vm}");
    site.ticks_on("h3");
}
