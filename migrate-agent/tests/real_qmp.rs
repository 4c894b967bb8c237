//! The QMP client against the QEMU that is installed.

mod bare_qemu;

use std::time::Duration;

use bare_qemu::BareQemu;
use lifeboat_agent::qemu::qmp::{MigrateParameters, MigrationStatus, QmpError, RunState};
use serde_json::{Value, json};
use tokio::net::UnixListener;

#[tokio::test]
async fn every_command_that_we_use_is_understood_both_ways() {
    let qemu = BareQemu::start(&["-device", "virtio-net-pci", "-smp", "2"]);
    let qmp = qemu.connect().await;
    assert_eq!(qmp.query_version().await.unwrap(), *qmp.version());
    assert_eq!(qmp.query_name().await.unwrap(), "bare");
    assert_eq!(qmp.query_status().await.unwrap().status, RunState::Prelaunch);
    assert!(!qmp.query_kvm().await.unwrap());
    assert_eq!(qmp.query_cpus_fast().await.unwrap().len(), 2);
    assert!(qmp.query_blockstats().await.unwrap().is_empty());
    assert_eq!(qmp.query_migrate().await.unwrap().status, MigrationStatus::None);
    assert!(qmp.query_machines().await.unwrap().iter().any(|m| m.name == "pc-i440fx-7.2"));
    assert!(qmp.query_cpu_definitions().await.unwrap().iter().any(|m| m.name == "qemu64"));
    let devices = qmp.qom_list_types("device").await.unwrap();
    assert!(devices.iter().any(|d| d == "virtio-net-pci"));
    qmp.migrate_set_capabilities(&[("events", true), ("pause-before-switchover", true)])
        .await
        .unwrap();
    let on = qmp.query_migrate_capabilities().await.unwrap();
    assert!(on.contains(&("events".to_owned(), true)));
    let parameters =
        MigrateParameters { downtime_limit_ms: Some(1), max_bandwidth_bytes: Some(1 << 20) };
    qmp.migrate_set_parameters(parameters).await.unwrap();
    let set = qmp.execute("query-migrate-parameters", Value::Null, Duration::from_secs(5)).await;
    assert_eq!(set.unwrap()["max-bandwidth"], json!(1 << 20));
    qmp.announce_self().await.unwrap();
}

#[tokio::test]
async fn events_come_with_qemus_own_time_and_end_with_qemu() {
    let qemu = BareQemu::start(&[]);
    let qmp = qemu.connect().await;
    let mut events = qmp.events();
    qmp.cont().await.unwrap();
    let resume = events.recv().await.unwrap();
    assert_eq!(resume.name, "RESUME");
    let age = lifeboat_agent::clock::unix_now().as_micros() as u64 - resume.unix_us();
    assert!(age < 10_000_000, "{age} us");
    qmp.stop().await.unwrap();
    assert_eq!(events.recv().await.unwrap().name, "STOP");
    qmp.quit().await.unwrap();
    while events.recv().await.is_ok() {}
    assert!(qmp.is_closed());
    assert!(matches!(qmp.query_status().await, Err(QmpError::Disconnected { .. })));
}

#[tokio::test]
async fn a_migration_to_nobody_fails_in_qemus_words_and_the_guest_stays() {
    let qemu = BareQemu::start(&[]);
    let qmp = qemu.connect().await;
    qmp.migrate_set_capabilities(&[("events", true)]).await.unwrap();
    let refused = qmp.migrate("nonsense:").await.unwrap_err();
    assert!(matches!(refused, QmpError::Refused { .. }), "{refused}");
    assert!(refused.had_no_effect());
    // Refused at once or failed a moment later, depending on the version; never `active`.
    let _ = qmp.migrate("unix:/nonexistent/lifeboat").await;
    let status = qmp.query_migrate().await.unwrap().status;
    assert!(matches!(status, MigrationStatus::Failed | MigrationStatus::Setup), "{status:?}");
}

/// The moment at which QEMU forgets to wake what it cancels (`qemu::qmp::cancel`).
#[tokio::test]
async fn a_migration_that_is_cancelled_just_as_it_stops_its_guest_ends_and_the_guest_runs_on() {
    let qemu = BareQemu::start(&[]);
    let qmp = qemu.connect().await;
    let mut events = qmp.events();
    qmp.cont().await.unwrap();
    qmp.migrate_set_capabilities(&[("events", true), ("pause-before-switchover", true)])
        .await
        .unwrap();
    // It stops as soon as it can.
    let at_once =
        MigrateParameters { downtime_limit_ms: Some(2_000_000), max_bandwidth_bytes: None };
    qmp.migrate_set_parameters(at_once).await.unwrap();
    for round in 0..100 {
        qmp.migrate("exec:cat >/dev/null").await.unwrap();
        while events.recv().await.unwrap().name != "STOP" {}
        // Not asked first how far it is, so that QEMU hears it while it holds its lock.
        qmp.migrate_cancel().await.unwrap();
        assert!(qmp.migrate_end(Duration::from_secs(5)).await.unwrap(), "round {round}");
        while events.recv().await.unwrap().name != "RESUME" {}
        let status = qmp.query_migrate().await.unwrap().status;
        assert_eq!(status, MigrationStatus::Cancelled, "round {round}");
    }
}

/// QEMU serves one client of a monitor at a time: the second waits for a greeting.
#[tokio::test]
async fn a_monitor_that_is_taken_is_said_to_be_taken() {
    let qemu = BareQemu::start(&[]);
    let _holder = qemu.connect().await;
    let error = lifeboat_agent::qemu::qmp::Qmp::connect(&qemu.qmp_path()).await.unwrap_err();
    assert!(matches!(error, QmpError::NoGreeting { .. }), "{error}");
    assert!(error.to_string().contains("another client"), "{error}");
}

/// A stopped process is as silent as a QEMU whose main loop waits for a disk.
#[tokio::test]
async fn a_qemu_that_hangs_is_noticed_by_the_deadline_and_heard_again_after() {
    let qemu = BareQemu::start(&[]);
    let qmp = qemu.connect().await;
    let pid = rustix::process::Pid::from_child(&qemu.child);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let short = Duration::from_millis(200);
    let error = qmp.execute("query-status", Value::Null, short).await.unwrap_err();
    assert!(matches!(error, QmpError::Deadline { .. }), "{error}");
    assert!(error.to_string().contains("200ms"), "{error}");
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    // The late answer of the first is not taken for the answer of the second.
    assert_eq!(qmp.query_name().await.unwrap(), "bare");
}

#[tokio::test]
async fn a_peer_that_is_not_qemu_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("not-qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let fake = async {
        let (mut socket, _) = listener.accept().await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut socket, b"HTTP/1.1 400 no\r\n").await.unwrap();
        socket
    };
    let connect = lifeboat_agent::qemu::qmp::Qmp::connect(&path);
    let (result, _socket) = tokio::join!(connect, fake);
    assert!(matches!(result, Err(QmpError::Disconnected { .. })));
}
