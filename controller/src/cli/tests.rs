//! What may be typed, and what is printed.

use clap::{CommandFactory, Parser};
use lifeboat_protocol::controller::{HostReport, MigrationStatus, Report, VmReport};

use super::{Cli, evacuate, progress, report};

fn parses(line: &str) -> bool {
    Cli::try_parse_from(line.split_whitespace()).is_ok()
}

#[test]
fn the_commands_of_the_manual_parse() {
    Cli::command().debug_assert();
    for line in [
        "lifeboat controller --config lab.toml --check",
        "lifeboat hosts --json",
        "lifeboat vms h1 --server unix:/run/x.sock",
        "lifeboat status e1 --watch",
        "lifeboat plan h1 h2 --urgency 90",
        "lifeboat evacuate h1 --mode cold --to h2,h3 --parallel 2 --reason failing --by 10m --yes",
        "lifeboat evacuate h1 --dry-run",
        "lifeboat migrate web --to h2 --yes --detach",
        "lifeboat cordon h1",
        "lifeboat uncordon h1",
        "lifeboat retry e1",
        "lifeboat cancel e1",
        "lifeboat limit web --disk 5 --network none --json",
        "lifeboat limit web --network 100",
        "lifeboat report e1 --json",
        "lifeboat claim web --fenced --host h2",
        "lifeboat verify web --host h2 --json",
        "lifeboat preseed web --to h2 --limit 50",
        "lifeboat preseed web --to h2 --forget --json",
        "lifeboat preseed --list",
        "lifeboat certs init pki --agent h1=10.99.0.1,h2=10.99.0.2 --controller c1=10.99.0.254 --operator ann",
        "lifeboat completions bash",
    ] {
        assert!(parses(line), "{line}");
    }
    for line in [
        "lifeboat",
        "lifeboat evacuate",
        "lifeboat evacuate h1 --mode warm",
        "lifeboat evacuate h1 --by soon",
        "lifeboat limit web",
        "lifeboat limit web --disk 0",
        "lifeboat limit web --network fast",
    ] {
        assert!(!parses(line), "{line}");
    }
}

#[test]
fn a_time_reads_as_it_is_typed() {
    for (text, seconds) in [("90s", 90), ("10m", 600), ("2h", 7200)] {
        assert_eq!(evacuate::duration(text).unwrap().as_secs(), seconds);
    }
    for bad in ["", "m", "10", "-1m", "0s", "99999999999999999999h", "10ü"] {
        assert!(evacuate::duration(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_exit_code_is_zero_only_when_all_moved() {
    let codes = ["done", "partial", "failed", "cancelled", "running"].map(report::code);
    assert_eq!(codes, [0, 2, 3, 4, 5]);
}

#[test]
fn an_unknown_time_to_go_is_shown_as_unknown() {
    let migration = MigrationStatus {
        vm: "web".to_owned(),
        source: "h1".to_owned(),
        destination: "h2".to_owned(),
        phase: "memory copy".to_owned(),
        rate_bits_per_sec: 190_000_000,
        bytes_remaining: 64 << 20,
        iteration: 1,
        ..MigrationStatus::default()
    };
    assert_eq!(
        progress::migration_line(&migration),
        "web memory copy h1 > h2, 190 Mbit/s, 64 MiB left, iteration 1, ? to go"
    );
}

#[test]
fn the_report_table_is_pinned() {
    let moved = VmReport {
        vm: "web".to_owned(),
        source: "h1".to_owned(),
        destination: "h2".to_owned(),
        outcome: "moved".to_owned(),
        mode: "pre-copy".to_owned(),
        eviction_ms: 9_400,
        total_ms: 9_300,
        downtime_us: 61_250,
        bytes_sent: 200 << 20,
        iterations: 3,
        predicted_total_ms: 9_000,
        predicted_downtime_ms: 60,
        predicted_bytes: 192 << 20,
        attempts: 1,
        ..VmReport::default()
    };
    let stayed = VmReport {
        vm: "db".to_owned(),
        source: "h1".to_owned(),
        outcome: "left-behind".to_owned(),
        reason: "no host can take it".to_owned(),
        ..VmReport::default()
    };
    let found = report::text(&Report {
        evacuation: "e1".to_owned(),
        hosts: vec!["h1".to_owned()],
        state: "partial".to_owned(),
        urgency: 90,
        total_ms: 9_500,
        predicted_total_ms: 9_000,
        bytes_sent: 200 << 20,
        vms: vec![moved, stayed],
        host_reports: vec![HostReport {
            host: "h1".to_owned(),
            eviction_ms: 9_450,
            moved: 1,
            left_behind: 1,
        }],
        ..Report::default()
    });
    let expected = "\
e1 of h1: partial in 9.5 s (predicted 9.0 s), 200 MiB on the wire, urgency 90 %

VM   FROM  TO  MODE      OUTCOME      EVICTED  TOTAL / PREDICTED  PAUSE / PREDICTED  BYTES / PREDICTED  ITERATIONS  ATTEMPTS
web  h1    h2  pre-copy  moved        9.4 s    9.3 s / 9.0 s      61.2 ms / 60 ms    200 MiB / 192 MiB  3           1
db   h1                  left-behind  0 ms     0 ms / 0 ms        0.0 ms / 0 ms      0 B / 0 B          0           0

HOST  EVICTED  MOVED  LEFT BEHIND
h1    9.4 s    1      1
db: left-behind: no host can take it
";
    assert_eq!(found, expected);
}
