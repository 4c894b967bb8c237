//! Idle costs nothing by construction: which paths a QEMU has open, before, during and after a swap.
//!
//! A QEMU without a guest, whose disk a mover's mount takes and gives back. Its descriptors say it, not
//! its monitor.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lifeboat_agent::disk::process::client::{ANSWER_LIMIT, Mover};
use lifeboat_agent::disk::process::control::Request;
use lifeboat_agent::qemu::qmp::Qmp;
use lifeboat_agent::qemu::swap::{DiskNodes, Side};
use lifeboat_lab::experiment::{Bound, Check, Record};

use super::Setting;
use super::rig::{fill, images, on_mount, serve};
use super::sample;
use crate::clock;
use crate::rig::RigError;
use crate::rig::program::{Running, words};

const IMAGE: &str = "idle.raw";
const IMAGE_BYTES: u64 = 64 << 20;
const STARTED_WITHIN: Duration = Duration::from_secs(20);

const NATIVE: &str = "open_natively";
const MOUNTED: &str = "open_on_the_mount";
const MOMENTS: [&str; 3] = ["QEMU before it migrates", "QEMU swapped", "QEMU swapped back"];

/// Asks a QEMU three times and adds what it has open to `record`.
///
/// # Errors
/// When QEMU or the mover cannot be started, or a swap is refused.
pub(super) async fn look(setting: &Setting<'_>, record: &mut Record) -> Result<(), RigError> {
    let images = images(setting)?;
    let native = images.path().join(IMAGE);
    fill(&native, IMAGE_BYTES)?;
    let mut mover = serve(setting, images.path(), &[IMAGE]).await?;
    let mount = on_mount(&mover, IMAGE);
    let (qemu, qmp) = start(&native, setting.folder).await?;
    let nodes = DiskNodes::launched(0, "raw");
    let mut note = |moment: usize| -> Result<(), RigError> {
        let open = open_files(qemu.pid())?;
        let count = |path: &Path| open.iter().filter(|each| *each == path).count() as f64;
        let figures = [(NATIVE, count(&native)), (MOUNTED, count(&mount))];
        record.samples.push(sample(MOMENTS[moment].to_owned(), 0, figures));
        Ok(())
    };
    note(0)?;
    swap(&nodes, &qmp, &mut mover, (Side::Mount, &mount)).await?;
    note(1)?;
    swap(&nodes, &qmp, &mut mover, (Side::Native, &native)).await?;
    note(2)?;
    qmp.quit().await.map_err(RigError::refused("QEMU's end"))?;
    mover.finish().await.map_err(RigError::refused("the end of a mover"))
}

/// A QEMU that has the image open, without a guest.
pub(super) async fn start(image: &Path, folder: &Path) -> Result<(Running, Qmp), RigError> {
    let socket = folder.join("qmp");
    let mut command = words("qemu-system-x86_64 -machine none -nodefaults -display none -S");
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
    let file = format!("driver=file,node-name=file0,filename={}", image.display());
    command.args(["-blockdev", &file, "-blockdev", "driver=raw,node-name=disk0,file=file0"]);
    let log = folder.join("qemu.log");
    let qemu = Running::start(&mut command, &log)?;
    let deadline = clock::now() + STARTED_WITHIN;
    loop {
        if let Ok(qmp) = Qmp::connect(&socket).await {
            return Ok((qemu, qmp));
        }
        if clock::now() > deadline {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            return Err(RigError::refused("QEMU's monitor")(said));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Swaps it and says how long QEMU took, all commands together.
pub(super) async fn swap(
    nodes: &DiskNodes,
    qmp: &Qmp,
    mover: &mut Mover,
    (to, path): (Side, &Path),
) -> Result<Duration, RigError> {
    let begin = Request::BeginSwap { disk: 0 };
    mover.ask(&begin, ANSWER_LIMIT).await.map_err(RigError::refused("a swap's begin"))?;
    let swapped = nodes.swap(qmp, to, path).await;
    let end = Request::EndSwap { disk: 0, on_mount: to == Side::Mount };
    mover.ask(&end, ANSWER_LIMIT).await.map_err(RigError::refused("a swap's end"))?;
    swapped.map_err(RigError::refused("a swap"))
}

/// What a process has open, by path.
fn open_files(pid: u32) -> Result<Vec<PathBuf>, RigError> {
    let failed = || RigError::io("cannot see what QEMU has open");
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).map_err(failed())?;
    // One may be closed while we look.
    let open = entries.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
    Ok(open.collect())
}

/// Natively only, through the mount only, and natively only again.
pub(super) fn checks(record: &Record) -> Vec<Check> {
    let check = |claim: &str, moment: usize, figure: &str, bound: Bound| {
        Check::worst(claim, bound, &record.figures(MOMENTS[moment], figure))
    };
    let (some, none) = (Bound::AtLeast(1.0), Bound::AtMost(0.0));
    vec![
        check("descriptors that an idle QEMU has on the image itself", 0, NATIVE, some),
        check("and on our mount", 0, MOUNTED, none),
        check("descriptors on our mount while it is swapped", 1, MOUNTED, some),
        check("and on the image itself", 1, NATIVE, none),
        check("descriptors on our mount when it is swapped back", 2, MOUNTED, none),
    ]
}
