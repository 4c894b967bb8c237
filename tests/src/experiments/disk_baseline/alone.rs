//! QEMU takes the guest and its disk by itself, as libvirt has it do: an NBD export in the destination's
//! QEMU, blockdev-mirror to it, then pre-copy, and the mirror's end while the guest is paused.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use lifeboat_agent::qemu::qmp::{MigrateParameters, Qmp, QmpEvent};
use serde_json::{Value, json};
use tokio::sync::broadcast::Receiver;

use super::Case;
use super::hosts::{ADDRESSES, Hosts, NAMES, TOLD};
use super::writes::{Ear, Moved};
use crate::clock;
use crate::experiments::twins::made;
use crate::rig::RigError;
use crate::rig::direct::{Direct, PORT, Place};

const NBD_PORT: u16 = 10809;
/// The launcher's names.
const NODE: &str = "disk0";
const DEVICE: &str = "/machine/peripheral/vd0/virtio-backend";
const DOWNTIME_MS: u64 = 300;
const FILLING: Duration = Duration::from_secs(120);
const PATIENCE: Duration = Duration::from_secs(300);
/// A write-blocking mirror is watched at most so long: it is its guest's rate that is asked for.
const WATCHED: Duration = Duration::from_secs(60);
const ANSWER: Duration = Duration::from_secs(10);

pub(super) async fn migrate(hosts: &mut Hosts, case: &Case) -> Result<Moved, RigError> {
    let pair = Pair::raise(hosts, case).await?;
    let (mut here, mut there) = (pair.running.qmp().events(), pair.waiting.qmp().events());
    let (began, began_unix) = (clock::now(), clock::unix_now());
    if let Some(limit) = case.limit {
        throttle(pair.running.qmp(), limit).await?;
    }
    pair.mirror("background").await?;
    within(PATIENCE, event(&mut here, "BLOCK_JOB_READY")).await?;
    let bulk_over = clock::now();
    let qmp = pair.running.qmp();
    let refused = || RigError::refused("to migrate");
    qmp.migrate_set_only(&["events", "pause-before-switchover"]).await.map_err(refused())?;
    let parameters =
        MigrateParameters { downtime_limit_ms: Some(DOWNTIME_MS), max_bandwidth_bytes: Some(TOLD) };
    qmp.migrate_set_parameters(parameters).await.map_err(refused())?;
    qmp.migrate(&format!("tcp:{}:{PORT}", ADDRESSES[1])).await.map_err(refused())?;
    let stop = within(PATIENCE, event(&mut here, "STOP")).await?.unix_us();
    let paused = clock::now();
    // What the mirror still has goes over, while nobody writes.
    within(PATIENCE, migration_is(&mut here, "pre-switchover")).await?;
    execute(qmp, "block-job-cancel", json!({"device": "mirror"})).await?;
    within(PATIENCE, event(&mut here, "BLOCK_JOB_COMPLETED")).await?;
    // The guest's device wants its image to itself.
    execute(pair.waiting.qmp(), "nbd-server-stop", Value::Null).await?;
    qmp.migrate_continue().await.map_err(refused())?;
    let resume = within(PATIENCE, event(&mut there, "RESUME")).await?.unix_us();
    let figures = BTreeMap::from([
        ("total_seconds", resume as f64 / 1e6 - began_unix.as_secs_f64()),
        ("downtime_ms", (resume as f64 - stop as f64) / 1e3),
        ("until_in_step_seconds", (bulk_over - began).as_secs_f64()),
    ]);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let ear = pair.end().await?;
    Ok(Moved { ear, began, bulk_over, paused, figures })
}

/// Only the copy: until the mirror is ready, or long enough.
pub(super) async fn write_blocking(hosts: &mut Hosts, case: &Case) -> Result<Moved, RigError> {
    let pair = Pair::raise(hosts, case).await?;
    let mut here = pair.running.qmp().events();
    let began = clock::now();
    pair.mirror("write-blocking").await?;
    let ready = tokio::time::timeout(WATCHED, event(&mut here, "BLOCK_JOB_READY")).await;
    let bulk_over = clock::now();
    let figures = BTreeMap::from([("was_ready", f64::from(u8::from(ready.is_ok())))]);
    // Its next count.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let ear = pair.end().await?;
    Ok(Moved { ear, began, bulk_over, paused: bulk_over, figures })
}

struct Pair {
    running: Direct,
    waiting: Direct,
    folder: PathBuf,
    ear: Ear,
}

impl Pair {
    /// A guest that has filled its image, and a QEMU that waits for it.
    async fn raise(hosts: &mut Hosts, case: &Case) -> Result<Self, RigError> {
        let folder = hosts.for_a_run()?;
        let mut folders = Vec::new();
        for name in NAMES {
            let own = made(&folder, name)?;
            hosts.make_image(&own.join("disk"))?;
            folders.push(own);
        }
        let place = |index: usize| Place {
            namespace: &hosts.namespaces[index],
            address: ADDRESSES[index],
            folder: &folders[index],
        };
        let spec = |index: usize| hosts.spec(case, &folders[index].join("disk"));
        let running = Direct::boot(&spec(0), place(0)).await?;
        let log = running.serial_log();
        // The destination's log is where its folder says; its QEMU is not there yet.
        let there = folders[1].join(log.strip_prefix(&folders[0]).unwrap_or(&log));
        let ear = Ear::at(vec![log, there]);
        ear.filled(hosts.image, FILLING).await?;
        let waiting = Direct::listen(&spec(1), place(1)).await?;
        Ok(Self { running, waiting, folder, ear })
    }

    /// Starts the mirror.
    async fn mirror(&self, mode: &str) -> Result<(), RigError> {
        let (here, there) = (self.running.qmp(), self.waiting.qmp());
        let address = ADDRESSES[1].to_string();
        let inet = json!({"host": address, "port": NBD_PORT.to_string()});
        execute(there, "nbd-server-start", json!({"addr": {"type": "inet", "data": inet}})).await?;
        let export =
            json!({"type": "nbd", "id": "e", "node-name": NODE, "name": "d", "writable": true});
        execute(there, "block-export-add", export).await?;
        let server = json!({"type": "inet", "host": address, "port": NBD_PORT.to_string()});
        let node = json!({"driver": "nbd", "node-name": "there", "server": server, "export": "d"});
        execute(here, "blockdev-add", node).await?;
        let job = json!({
            "job-id": "mirror", "device": NODE, "target": "there", "sync": "full", "copy-mode": mode,
        });
        execute(here, "blockdev-mirror", job).await.map(drop)
    }

    async fn end(self) -> Result<Ear, RigError> {
        // A source whose mirror goes on does not quit before it is told to drop it.
        let job = json!({"device": "mirror", "force": true});
        let _ = execute(self.running.qmp(), "block-job-cancel", job).await;
        self.running.end().await?;
        self.waiting.end().await?;
        std::fs::remove_dir_all(&self.folder)
            .map_err(RigError::io("cannot remove a run's folder"))?;
        Ok(self.ear)
    }
}

async fn throttle(qmp: &Qmp, bytes_per_sec: u64) -> Result<(), RigError> {
    let limits = json!({
        "id": DEVICE, "bps": 0, "bps_rd": 0, "bps_wr": bytes_per_sec, "iops": 0, "iops_rd": 0, "iops_wr": 0,
    });
    execute(qmp, "block_set_io_throttle", limits).await.map(drop)
}

async fn execute(qmp: &Qmp, command: &str, arguments: Value) -> Result<Value, RigError> {
    qmp.execute(command, arguments, ANSWER).await.map_err(RigError::refused("a command to QEMU"))
}

async fn event(events: &mut Receiver<QmpEvent>, name: &str) -> Result<QmpEvent, RigError> {
    loop {
        let event = events.recv().await.map_err(RigError::refused("QEMU's events"))?;
        if event.name == name {
            return Ok(event);
        }
    }
}

async fn migration_is(events: &mut Receiver<QmpEvent>, status: &str) -> Result<(), RigError> {
    loop {
        if event(events, "MIGRATION").await?.data["status"] == status {
            return Ok(());
        }
    }
}

async fn within<T>(
    limit: Duration,
    what: impl Future<Output = Result<T, RigError>>,
) -> Result<T, RigError> {
    let late =
        |_| RigError::TooLate { what: "QEMU's migration".to_owned(), seconds: limit.as_secs() };
    tokio::time::timeout(limit, what).await.map_err(late)?
}
