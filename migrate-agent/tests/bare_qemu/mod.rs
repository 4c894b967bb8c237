//! A QEMU without a guest, for the tests: it answers QMP and holds memory, no more.
//!
//! Killed by its own pid when the test ends, however it ends.
#![allow(dead_code, reason = "each test uses its part of it")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lifeboat_agent::qemu::qmp::Qmp;

/// One running QEMU and the directory of its sockets.
pub(crate) struct BareQemu {
    pub(crate) child: Child,
    pub(crate) directory: tempfile::TempDir,
}

impl BareQemu {
    /// Starts one that stands paused, with `extra` arguments.
    pub(crate) fn start(extra: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = format!("unix:{}/qmp,server=on,wait=off", directory.path().display());
        let child = Command::new("qemu-system-x86_64")
            .args(["-machine", "pc-i440fx-7.2", "-accel", "tcg", "-nodefaults", "-S"])
            .args(["-display", "none", "-m", "16M", "-name", "bare", "-qmp", &socket])
            .args(extra)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 is installed");
        Self { child, directory }
    }

    /// The monitor socket.
    pub(crate) fn qmp_path(&self) -> PathBuf {
        self.directory.path().join("qmp")
    }

    /// Connects, once QEMU listens.
    pub(crate) async fn connect(&self) -> Qmp {
        connect_when_ready(&self.qmp_path()).await
    }
}

impl Drop for BareQemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connects to a monitor that is about to appear; 20 s at most.
pub(crate) async fn connect_when_ready(path: &Path) -> Qmp {
    for _ in 0..400 {
        match Qmp::connect(path).await {
            Ok(qmp) => return qmp,
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    panic!("no QMP at {} within 20 s", path.display());
}
