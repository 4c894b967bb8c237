//! A disk is swapped onto a mover's mount and back a hundred times, under load: how long each swap takes, and
//! that no request fails.
//!
//! The load comes through QEMU's own export of the disk, which is the block layer of a guest's requests;
//! `disk_swap`, a test of the agent's, holds what it writes against what it reads.

use std::path::Path;
use std::time::Duration;

use lifeboat_agent::qemu::qmp::Qmp;
use lifeboat_agent::qemu::swap::{DiskNodes, Side};
use lifeboat_lab::experiment::{Bound, Check, Record};
use serde_json::json;

use super::rig::{fill, images, on_mount, serve};
use super::{Setting, idle, sample};
use crate::rig::RigError;
use crate::rig::program::{Running, words};

const IMAGE: &str = "swapped.raw";
const IMAGE_BYTES: u64 = 64 << 20;
const SWAPS: usize = 100;
const PAUSE: Duration = Duration::from_millis(20);
const ANSWERED_WITHIN: Duration = Duration::from_secs(5);

/// 4 KiB writes, eight at a time, and no end.
const LOAD: &str = "qemu-img bench -w -f raw -d 8 -s 4096 -S 69632 -c 2000000000";

const CASE: &str = "swapped under load";
const TOOK: &str = "swap_ms";

/// Swaps the disk of a QEMU and adds what each swap took to `record`.
///
/// # Errors
/// When QEMU, the mover or the load cannot be started, a swap is refused, or a request of the load fails.
pub(super) async fn look(setting: &Setting<'_>, record: &mut Record) -> Result<(), RigError> {
    let images = images(setting)?;
    let native = images.path().join(IMAGE);
    fill(&native, IMAGE_BYTES)?;
    let mut mover = serve(setting, images.path(), &[IMAGE]).await?;
    let mount = on_mount(&mover, IMAGE);
    let (_qemu, qmp) = idle::start(&native, setting.folder).await?;
    let log = setting.folder.join("swapped-load.log");
    let mut load = Running::start(words(LOAD).arg(export(&qmp, setting.folder).await?), &log)?;
    let nodes = DiskNodes::launched(0, "raw");
    for swap in 0..SWAPS {
        tokio::time::sleep(PAUSE).await;
        let way = match swap % 2 {
            0 => (Side::Mount, mount.as_path()),
            _ => (Side::Native, native.as_path()),
        };
        let took = idle::swap(&nodes, &qmp, &mut mover, way).await?.as_secs_f64() * 1e3;
        record.samples.push(sample(CASE.to_owned(), swap, [(TOOK, took)]));
        if load.has_ended() {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            return Err(RigError::refused("a request of the load")(said));
        }
    }
    drop(load);
    qmp.quit().await.map_err(RigError::refused("QEMU's end"))?;
    mover.finish().await.map_err(RigError::refused("the end of a mover"))
}

/// Has QEMU export the disk; where.
async fn export(qmp: &Qmp, folder: &Path) -> Result<String, RigError> {
    let socket = folder.join("nbd");
    let address = json!({"addr": {"type": "unix", "data": {"path": socket}}});
    let export =
        json!({"type": "nbd", "id": "e", "node-name": "disk0", "name": "d", "writable": true});
    for (command, arguments) in [("nbd-server-start", address), ("block-export-add", export)] {
        let done = qmp.execute(command, arguments, ANSWERED_WITHIN).await;
        done.map_err(RigError::refused("QEMU's export of its disk"))?;
    }
    Ok(format!("nbd+unix:///d?socket={}", socket.display()))
}

/// What each of them may take; it is what QEMU takes for all commands of a swap, of which a guest's requests wait for
/// one, the reopening.
pub(super) fn checks(record: &Record) -> Vec<Check> {
    let took = record.figures(CASE, TOOK);
    vec![
        Check::worst("the longest of 100 swaps under load, ms", Bound::AtMost(20.0), &took),
        Check::worst(
            "swaps that were made under load",
            Bound::AtLeast(SWAPS as f64),
            &[took.len() as f64],
        ),
    ]
}
