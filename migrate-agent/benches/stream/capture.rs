//! What a real QEMU writes of a real guest: a Linux of `lab/image` that fills most of its memory with
//! patterns and goes on changing them, migrated into a socket that keeps every byte.
//!
//! qemu-system-x86_64 has to be installed (lab/install).

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use lifeboat_agent::clock;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(120);
/// The guest's memory: so much that no cache of a processor holds what is read.
const MEMORY_MIB: u64 = 256;
/// What of it the guest's program fills.
const REGION: u64 = 176 << 20;
/// How much is read from a socket at once.
const RECEIVED: usize = 1 << 20;

struct Guest {
    process: Child,
    control: BufReader<UnixStream>,
    folder: tempfile::TempDir,
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The stream in the pieces in which a socket gives it.
pub(crate) fn take() -> Vec<Bytes> {
    let mut guest = Guest::boot(&images());
    guest.await_words("LIFEBOAT-TICK");
    guest.migrated()
}

fn images() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a room of the workspace");
    let made = Command::new(root.join("lab/image")).output().expect("the checkout is whole");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    root.join("lab/build")
}

impl Guest {
    fn boot(images: &Path) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (control, serial) = (folder.path().join("qmp"), folder.path().join("serial"));
        let append = format!(
            "console=ttyS0 quiet panic=-1 nokaslr tsc=unstable no_timer_check mitigations=off lb.name=bench \
             lb.role=idle lb.region={REGION} lb.dirty=2000 lb.check=500"
        );
        let process = Command::new("qemu-system-x86_64")
            .args(["-machine", "pc-i440fx-7.2", "-accel", "tcg", "-cpu", "max", "-nodefaults"])
            .args(["-display", "none", "-m", &format!("{}K", MEMORY_MIB << 10), "-append", &append])
            .arg("-kernel")
            .arg(images.join("vmlinuz"))
            .arg("-initrd")
            .arg(images.join("initrd"))
            .args(["-serial", &format!("file:{}", serial.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", control.display())])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 is installed");
        let control = wait_for("QEMU listens", || UnixStream::connect(&control).ok());
        let mut guest = Self { process, control: BufReader::new(control), folder };
        guest.line();
        guest.ask("qmp_capabilities", json!({}));
        guest
    }

    /// The guest's program has filled its region, and works.
    fn await_words(&self, words: &str) {
        let serial = self.folder.path().join("serial");
        wait_for("the guest works", || {
            let said = std::fs::read(&serial).unwrap_or_default();
            String::from_utf8_lossy(&said).contains(words).then_some(())
        });
    }

    fn migrated(&mut self) -> Vec<Bytes> {
        let path = self.folder.path().join("stream");
        let listener = UnixListener::bind(&path).expect("a socket");
        self.ask("migrate-set-parameters", json!({"max-bandwidth": 0, "downtime-limit": 300}));
        self.ask("migrate", json!({"uri": format!("unix:{}", path.display())}));
        let (mut stream, _) = listener.accept().expect("QEMU connects");
        let mut whole = Vec::new();
        stream.read_to_end(&mut whole).expect("QEMU writes");
        assert_eq!(self.ask("query-migrate", json!({}))["status"], "completed");
        let mut whole = Bytes::from(whole);
        let mut pieces = Vec::new();
        while !whole.is_empty() {
            pieces.push(whole.split_to(RECEIVED.min(whole.len())));
        }
        pieces
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.control.read_line(&mut line).expect("QEMU speaks");
        serde_json::from_str(&line).expect("QMP is JSON")
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        self.control.get_mut().write_all(line.as_bytes()).expect("QEMU listens");
        loop {
            let mut answer = self.line();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
        }
    }
}

fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let end = clock::now() + PATIENCE;
    loop {
        if let Some(ready) = ready() {
            return ready;
        }
        assert!(clock::now() < end, "within {PATIENCE:?} it is not so that {what}");
        clock::pause_thread(Duration::from_millis(20));
    }
}
