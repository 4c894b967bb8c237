//! Swapping a real QEMU's disk onto the mount and back, under load, and with the mount's server
//! killed under it. Takes root, /dev/fuse and QEMU.
//!
//! The load comes through QEMU's own NBD export of the disk's node: the same block layer, the same
//! drain, as a guest's.

mod bare_qemu;
mod disk_lab;

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bare_qemu::BareQemu;
use disk_lab::{Folders, run, start_holder, start_server};
use lifeboat_agent::clock;
use lifeboat_agent::qemu::qmp::Qmp;
use lifeboat_agent::qemu::swap::{DiskNodes, Side, SwapError};
use serde_json::json;

/// A QEMU with the disk `image`, exported at the returned NBD address.
async fn qemu_with(image: &Path, format: &str) -> (BareQemu, Qmp, String) {
    let file = format!("driver=file,node-name=file0,filename={}", image.display());
    let disk = format!("driver={format},node-name=disk0,file=file0");
    let qemu = BareQemu::start(&["-blockdev", &file, "-blockdev", &disk]);
    let qmp = qemu.connect().await;
    let socket = qemu.directory.path().join("nbd");
    let address = json!({"addr": {"type": "unix", "data": {"path": socket}}});
    let execute = |command, arguments| qmp.execute(command, arguments, Duration::from_secs(5));
    execute("nbd-server-start", address).await.unwrap();
    let export = json!({"type": "nbd", "id": "e", "node-name": "disk0", "name": "d",
                        "writable": true});
    execute("block-export-add", export).await.unwrap();
    let url = format!("nbd+unix:///d?socket={}", socket.display());
    (qemu, qmp, url)
}

/// Writes a pattern per place, in an order that looks random, then reads the last one of each back.
/// 32 areas of 256 KiB; the last byte of the pattern says which write it was.
fn patterned_load(url: &str, writes: u32) -> Child {
    let mut child = Command::new("qemu-io")
        .args(["-f", "raw", url])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut commands = child.stdin.take().unwrap();
    std::thread::spawn(move || {
        let mut last = [0; 32];
        for number in 0..writes {
            let area = (number.wrapping_mul(2_654_435_761) >> 27) as usize;
            last[area] = number % 251 + 1;
            let length = if number % 3 == 0 { "256k" } else { "4k" };
            let (place, pattern) = (area * 256, last[area]);
            let flush = if number % 16 == 0 { "flush\n" } else { "" };
            let line = format!("write -P {pattern} {place}k {length}\n{flush}");
            commands.write_all(line.as_bytes()).unwrap();
        }
        for (area, pattern) in last.into_iter().enumerate().filter(|(_, pattern)| *pattern > 0) {
            writeln!(commands, "read -P {pattern} {}k 4k", area * 256).unwrap();
        }
    });
    child
}

fn assert_clean(load: Child) {
    let output = load.wait_with_output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let bad = printed.lines().find(|l| l.contains("rror") || l.contains("fail"));
    assert!(output.status.success() && bad.is_none(), "{bad:?}");
    assert!(printed.matches("read ").count() > 20);
}

/// `swap` with what has to be told to the server around it; here the test itself is the server's
/// process.
async fn swap(
    nodes: &DiskNodes,
    qmp: &Qmp,
    mount: &disk_lab::Mounted,
    to: Side,
) -> Result<Duration, SwapError> {
    let path = match to {
        Side::Native => mount.native("a.img"),
        Side::Mount => mount.through("a.img"),
    };
    mount.server.begin_swap("a.img".as_ref()).unwrap();
    let outcome = nodes.swap(qmp, to, Path::new(&path)).await;
    let ended = mount.server.end_swap("a.img".as_ref(), to == Side::Mount);
    assert!(ended.is_ok(), "{ended:?} after {outcome:?}");
    outcome
}

async fn swap_a_hundred_times(format: &str) {
    let mount =
        disk_lab::Mounted::with(std::sync::Arc::new(lifeboat_agent::disk::fuse::PassThrough));
    let image = mount.native("a.img");
    run("qemu-img", &["create", "-q", "-f", format, &image, "64M"]);
    let (mut qemu, qmp, url) = qemu_with(Path::new(&image), format).await;
    let load = patterned_load(&url, 6000);
    let mut other = disk_lab::Process::start(
        Command::new("qemu-img")
            .args(["bench", "-q", "-w", "-f", "raw", "-o", "33554432", "-c", "30000", "-d", "8"])
            .arg(&url)
            .stdout(Stdio::null()),
    );
    let nodes = DiskNodes::launched(0, format);
    let mut times = Vec::new();
    for number in 0..100 {
        let to = if number % 2 == 0 { Side::Mount } else { Side::Native };
        times.push(swap(&nodes, &qmp, &mount, to).await.unwrap());
        assert_eq!(nodes.side(&qmp).await.unwrap(), Some(to));
        // While it is on the mount nobody opens it natively.
        if to == Side::Mount && number < 10 {
            let attempt = ["-f", format, "-c", "write 0 1", &image];
            let (ok, said) = disk_lab::try_run("qemu-io", &attempt);
            assert!(!ok && said.contains("lock"), "{number}: {said}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    times.sort();
    println!("{format}: swap median {:?}, longest {:?}", times[50], times[99]);
    assert_clean(load);
    assert!(other.child.wait().unwrap().success());
    qmp.quit().await.unwrap();
    qemu.child.wait().unwrap();
    // 2 to 11 ms on a machine that does nothing else, which is for whoever reads the line above to judge:
    // tests share theirs, and 20 ms were once exceeded there. This is for one that waits for a timeout.
    assert!(times[50] < Duration::from_millis(200), "{:?}", times[50]);
    // QEMU 7.2 itself leaks a cluster now and then when a qcow2 node is reopened, also between two
    // native paths. That wastes 64 KiB and harms nothing; a corruption would be code 2.
    if format == "qcow2" {
        let check = Command::new("qemu-img").args(["check", "-q", &image]).status().unwrap();
        assert!(matches!(check.code(), Some(0 | 3)), "{check}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_disk_is_swapped_a_hundred_times_under_load_without_an_error() {
    swap_a_hundred_times("raw").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qcow2_disk_is_swapped_a_hundred_times_under_load_without_an_error() {
    swap_a_hundred_times("qcow2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swap_that_cannot_be_leaves_the_guest_on_its_path() {
    let folders = Folders::new();
    let image = folders.images().join("a.img");
    run("qemu-img", &["create", "-q", "-f", "raw", image.to_str().unwrap(), "8M"]);
    let (_qemu, qmp, url) = qemu_with(&image, "raw").await;
    let nodes = DiskNodes::launched(0, "raw");
    for _ in 0..2 {
        let nowhere = folders.mount().join("a.img");
        let error = nodes.swap(&qmp, Side::Mount, &nowhere).await.unwrap_err();
        assert!(matches!(error, SwapError::Refused { .. }), "{error}");
    }
    assert_eq!(nodes.side(&qmp).await.unwrap(), Some(Side::Native));
    disk_lab::qemu_io(&["-f", "raw"], &url, &["write -P 1 0 4k", "flush", "read -P 1 0 4k"]);
}

/// What an agent has done of a swap onto the mount when it is killed.
async fn half_a_swap(qmp: &Qmp, mount: &disk_lab::Mounted, reopened: bool) {
    let execute = |command, arguments| qmp.execute(command, arguments, Duration::from_secs(5));
    mount.server.begin_swap("a.img".as_ref()).unwrap();
    let file = json!({"driver": "file", "node-name": "mount0", "read-only": false,
                      "filename": mount.through("a.img")});
    execute("blockdev-add", file).await.unwrap();
    if reopened {
        let disk = json!({"driver": "raw", "node-name": "disk0", "read-only": false,
                          "file": "mount0"});
        execute("blockdev-reopen", json!({"options": [disk]})).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swap_that_an_agent_left_unfinished_is_ended_by_the_next_in_either_direction() {
    for (reopened, to) in
        [(false, Side::Native), (false, Side::Mount), (true, Side::Native), (true, Side::Mount)]
    {
        let mount =
            disk_lab::Mounted::with(std::sync::Arc::new(lifeboat_agent::disk::fuse::PassThrough));
        let image = mount.native("a.img");
        run("qemu-img", &["create", "-q", "-f", "raw", &image, "64M"]);
        let (_qemu, qmp, url) = qemu_with(Path::new(&image), "raw").await;
        let load = patterned_load(&url, 500);
        half_a_swap(&qmp, &mount, reopened).await;
        let nodes = DiskNodes::launched(0, "raw");
        assert_eq!(nodes.side(&qmp).await.unwrap(), None);
        for to in [to, Side::Mount, Side::Native] {
            swap(&nodes, &qmp, &mount, to).await.unwrap();
            assert_eq!(nodes.side(&qmp).await.unwrap(), Some(to), "reopened: {reopened}");
        }
        assert_clean(load);
        qmp.quit().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_under_load_is_replaced_and_the_guest_sees_no_error() {
    let folders = Folders::new();
    let _holder = start_holder(&folders);
    let image = folders.images().join("a.img");
    run("qemu-img", &["create", "-q", "-f", "raw", image.to_str().unwrap(), "64M"]);
    let mut server = start_server(&folders);
    let mounted = folders.mount().join("a.img");
    let (_qemu, qmp, url) = qemu_with(&mounted, "raw").await;
    let load = patterned_load(&url, 8000);
    let mut longest = Duration::ZERO;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        let begin = clock::now();
        server.kill();
        server = start_server(&folders);
        // It is served again once this comes back.
        let size = std::fs::metadata(&mounted).unwrap().len();
        assert_eq!(size, 64 << 20);
        longest = longest.max(begin.elapsed());
    }
    println!("killed and replaced ten times; the longest took {longest:?}");
    assert_clean(load);
    let (ok, said) = disk_lab::try_run("qemu-io", &["-c", "write 0 1", image.to_str().unwrap()]);
    assert!(!ok && said.contains("lock"), "{said}");
    qmp.quit().await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    disk_lab::qemu_io(&["-f", "raw"], image.to_str().unwrap(), &["read 0 64M"]);
}
