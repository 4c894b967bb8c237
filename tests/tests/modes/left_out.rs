//! An intermediary at which an attempt fails is left out of the next one; the destination, which is blameless, is
//! not. Real agents; the redis-server of one host is a program that says its version and then does not serve.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::definition;
use super::site::{Begin, Place, Site, images};

const BROKEN: &str = "#!/bin/sh\n\
                      case \"$1\" in --version|-v) exec redis-server --version ;; esac\n\
                      exit 1\n";

#[test]
fn an_intermediary_that_fails_is_left_out_of_the_next_attempt() {
    let name = "left_out::an_intermediary_that_fails_is_left_out_of_the_next_attempt";
    let Some(Place { folder, .. }) = &Place::of(name) else { return };
    let broken = folder.path().join("broken-redis");
    fs::write(&broken, BROKEN).unwrap();
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755)).unwrap();
    let vms = [("vm", definition())];
    let begin = Begin { redis: Some((3, &broken)), ..Begin::of(5, &vms) };
    let site = Site::start(folder.path(), &images(), &begin);
    site.await_sight("h1");
    site.ticks_on("h1");

    let line = "evacuate h1 --to h2 --urgency 0 --mode scatter-gather --intermediaries h3,h4,h5 \
                --yes --detach";
    let begun = site.ask(line).unwrap();
    let planned = begun["plan"]["vms"][0]["stores"].as_array().map_or(0, Vec::len);
    assert_eq!(planned, 3, "{begun}");
    let id = begun["evacuation"].as_str().unwrap().to_owned();
    site.await_that("it has moved", || {
        let status = site.status(&id);
        status["state"] == "done" || status["state"] == "failed"
    });
    let vm = site.ask(&format!("report {id}")).unwrap()["vms"][0].clone();
    assert_eq!((&vm["outcome"], &vm["destination"]), (&"moved".into(), &"h2".into()), "{vm}");
    assert_eq!(vm["attempts"], 2, "{vm}");
    assert_eq!(vm["stores"], serde_json::json!(["h4", "h5"]), "{vm}");
    site.ticks_on("h2");
}
