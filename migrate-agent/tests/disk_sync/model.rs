//! A guest that knows what its disk has to say: qemu-io, and beside it a model of the content.
//!
//! Every command goes to QEMU's own block layer (raw and qcow2, O_DIRECT, discards) and to the model, one
//! after the other; each read is checked, and at the end the whole disk is.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::disk_lab::run;
use crate::world::MIB;

/// What the guest sees of its disk, bytes.
pub(super) const DISK: u64 = 48 * MIB;
const UNIT: u64 = 4096;
/// A qcow2 cluster: of less, a discard is ignored.
const CLUSTER: u64 = 64 << 10;

/// Knuth's linear congruential generator: the same places for the same seed.
pub(super) struct Random(pub(super) u64);

impl Random {
    /// Less than `end`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// The content: a byte for each 4 KiB, which are all of that byte.
pub(super) struct Model(Vec<u8>);

impl Model {
    /// Zeroes.
    pub(super) fn new() -> Self {
        Self(vec![0; (DISK / UNIT) as usize])
    }

    fn set(&mut self, at: u64, length: u64, content: u8) {
        self.0[(at / UNIT) as usize..((at + length) / UNIT) as usize].fill(content);
    }

    /// The next command; what it changes is noted.
    pub(super) fn step(&mut self, random: &mut Random) -> String {
        let place = |random: &mut Random, unit: u64, most: u64| {
            let length = unit * (1 + random.below(most));
            (unit * random.below((DISK - length) / unit), length)
        };
        match random.below(16) {
            0 => "flush".to_owned(),
            1 => {
                let (at, length) = place(random, CLUSTER, 8);
                self.set(at, length, 0);
                format!("discard {at} {length}")
            }
            2 => {
                let (at, length) = place(random, UNIT, 32);
                self.set(at, length, 0);
                format!("write -z {at} {length}")
            }
            3..6 => {
                let (at, length) = place(random, UNIT, 1);
                format!("read -P {} {at} {length}", self.0[(at / UNIT) as usize])
            }
            _ => {
                let (at, length) = place(random, UNIT, 32);
                let content = 1 + random.below(255) as u8;
                self.set(at, length, content);
                format!("write -P {content} {at} {length}")
            }
        }
    }

    /// Panics unless the image at `path` has this content and, where its format can be checked, is
    /// sound.
    pub(super) fn assert_in(&self, path: &Path, format: &str) {
        let path = path.to_str().unwrap();
        if format == "qcow2" {
            run("qemu-img", &["check", "-q", "-f", format, path]);
        }
        let plain = format!("{path}.plain");
        run("qemu-img", &["convert", "-f", format, "-O", "raw", path, &plain]);
        let found = std::fs::read(&plain).unwrap();
        std::fs::remove_file(&plain).unwrap();
        assert_eq!(found.len() as u64, DISK);
        for (number, (unit, expected)) in found.chunks(UNIT as usize).zip(&self.0).enumerate() {
            let wrong = unit.iter().find(|byte| *byte != expected);
            assert_eq!(wrong, None, "4 KiB number {number} are not all {expected}");
        }
    }
}

/// A qemu-io that has the image open.
pub(super) struct QemuIo {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
}

const PROMPT: &[u8] = b"qemu-io> ";

impl QemuIo {
    pub(super) fn open(path: &str, format: &str) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-f", format, "-t", "none", "-d", "unmap", path]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut own = Self { child, input, output };
        own.answer();
        own
    }

    /// What it says up to its next prompt.
    fn answer(&mut self) -> String {
        let (mut said, mut piece) = (Vec::new(), [0; 512]);
        while !said.ends_with(PROMPT) {
            let read = self.output.read(&mut piece).unwrap();
            assert!(read > 0, "qemu-io is gone: {}", String::from_utf8_lossy(&said));
            said.extend_from_slice(&piece[..read]);
        }
        String::from_utf8_lossy(&said).into_owned()
    }

    pub(super) fn does(&mut self, command: &str) {
        self.input.write_all(format!("{command}\n").as_bytes()).unwrap();
        let said = self.answer();
        assert!(!said.contains("rror") && !said.contains("failed"), "{command}: {said}");
    }

    /// Closes the image: what its format kept back is written.
    pub(super) fn close(mut self) {
        self.input.write_all(b"q\n").unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
