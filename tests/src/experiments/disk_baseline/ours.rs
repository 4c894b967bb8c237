//! Two agents take the guest and its disk.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lifeboat_protocol::agent::{MigrationProgress, Mode, Phase};

use super::hosts::{ADDRESSES, Hosts, NAMES, TOLD};
use super::writes::{Ear, Moved};
use super::{Case, GUARANTEED};
use crate::clock;
use crate::experiments::twins::made;
use crate::rig::RigError;
use crate::rig::agents::{Agent, Manner, Prepared, make_certificates};

const DOWNTIME: Duration = Duration::from_millis(300);
const FILLING: Duration = Duration::from_secs(120);
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_millis(50);

pub(super) async fn migrate(hosts: &mut Hosts, case: &Case) -> Result<Moved, RigError> {
    let folder = hosts.for_a_run()?;
    make_certificates(&folder, &[(NAMES[0], ADDRESSES[0]), (NAMES[1], ADDRESSES[1])])?;
    let definition = made(&folder, "h1/vms")?.join("vm.toml");
    std::fs::write(definition, hosts.definition(case))
        .map_err(RigError::io("cannot define the guest"))?;
    hosts.make_image(&made(&folder, "h1/disks")?.join("disk"))?;
    let (namespaces, images) = (&hosts.namespaces, &hosts.images);
    let start = |index: usize| {
        Agent::start(&namespaces[index], NAMES[index], ADDRESSES[index], &folder, images)
    };
    let (mut source, mut destination) = (start(0).await?, start(1).await?);
    source.start_vm("vm").await?;
    let ear = Ear::at(vec![source.serial_log("vm"), destination.serial_log("vm")]);
    ear.filled(hosts.image, FILLING).await?;
    let moved = order(&mut source, &mut destination, hosts.image, case).await?;
    let (began, bulk_over, paused, figures) = moved;
    // Its count goes on there.
    tokio::time::sleep(Duration::from_secs(2)).await;
    destination.stop_vm("vm").await?;
    drop((source, destination));
    // Images are large.
    std::fs::remove_dir_all(&folder).map_err(RigError::io("cannot remove a run's folder"))?;
    Ok(Moved { ear, began, bulk_over, paused, figures })
}

type Figures = BTreeMap<&'static str, f64>;

async fn order(
    source: &mut Agent,
    destination: &mut Agent,
    image: u64,
    case: &Case,
) -> Result<(Instant, Instant, Instant, Figures), RigError> {
    let (began, began_unix) = (clock::now(), clock::unix_now());
    let manner = Manner::of(Mode::PreCopy);
    let mut prepared = Prepared::at(source, destination, "vm", "m1", manner).await?;
    prepared.hold_writes(case.limit.unwrap_or(0));
    prepared.start(source, DOWNTIME, Some(TOLD * 8)).await?;
    let mut bulk_over = None;
    let sent = loop {
        let progress = source.progress("m1").await?;
        if bulk_over.is_none()
            && (progress.disk_bytes_sent >= image || progress.phase() >= Phase::MemoryCopy)
        {
            bulk_over = Some(clock::now());
            // That is what it is judged by. One that writes faster than its link would be refused later, unless
            // its operator does this.
            if case.limit.is_none() && case.wants > GUARANTEED {
                source.hold_writes("m1", GUARANTEED).await?;
            }
        }
        if progress.phase().is_final() {
            break progress;
        }
        if began.elapsed() > PATIENCE {
            let what = "the end of a migration".to_owned();
            return Err(RigError::TooLate { what, seconds: PATIENCE.as_secs() });
        }
        tokio::time::sleep(LOOK).await;
    };
    if sent.phase() != Phase::Completed {
        let why = format!("{:?}: {}", sent.phase(), sent.reason);
        return Err(RigError::refused("a migration")(why));
    }
    let taken = destination.ended("m1", PATIENCE).await?;
    let since = |unix_us: u64| Duration::from_micros(unix_us).saturating_sub(began_unix);
    let figures = Figures::from([
        ("total_seconds", since(taken.resume_unix_us).as_secs_f64()),
        ("downtime_ms", (taken.resume_unix_us as f64 - sent.stop_unix_us as f64) / 1e3),
        ("disk_sent_mib", sent.disk_bytes_sent as f64 / f64::from(1 << 20)),
        ("until_in_step_seconds", of_phase(&sent, Phase::DiskBulk)),
    ]);
    let paused = began + since(sent.stop_unix_us);
    Ok((began, bulk_over.unwrap_or(paused), paused, figures))
}

fn of_phase(progress: &MigrationProgress, phase: Phase) -> f64 {
    let of_phase = progress.phase_times.iter().filter(|time| time.phase() == phase);
    of_phase.map(|time| time.micros as f64 / 1e6).sum()
}
