//! A directory of images, a mount of it, and the programs that people use on images, for the tests.
//!
//! Everything is undone when it is dropped: mounts are detached, processes killed by their own pid.
#![allow(dead_code, reason = "each test uses its part of it")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use lifeboat_agent::disk::fuse::{self, Hook, Server};

/// Directories on a real disk (O_DIRECT wants one): `images/`, `mount/`.
pub(crate) struct Folders {
    directory: PathBuf,
    /// Removed at the end, unless it is somebody else's.
    _own: Option<tempfile::TempDir>,
}

impl Folders {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        for name in ["images", "mount"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        Self { directory: directory.path().to_owned(), _own: Some(directory) }
    }

    /// Around a directory of images that is there.
    pub(crate) fn beside(images: &Path) -> Self {
        let directory = images.parent().unwrap().to_owned();
        std::fs::create_dir(directory.join("mount")).unwrap();
        Self { directory, _own: None }
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.path("images")
    }

    pub(crate) fn mount(&self) -> PathBuf {
        self.path("mount")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

impl Drop for Folders {
    fn drop(&mut self) {
        let _ = fuse::unmount(&self.mount());
    }
}

/// A server in this process.
pub(crate) struct Mounted {
    pub(crate) server: Server,
    // After the server: its folders unmount.
    pub(crate) folders: Folders,
}

impl Mounted {
    pub(crate) fn with(hook: Arc<dyn Hook>) -> Self {
        let folders = Folders::new();
        let server = Server::mount(&folders.images(), &folders.mount(), hook).unwrap();
        Self { server, folders }
    }

    /// Of a directory that is somewhere else.
    pub(crate) fn over(images: &Path, hook: Arc<dyn Hook>) -> Self {
        let folders = Folders::new();
        let server = Server::mount(images, &folders.mount(), hook).unwrap();
        Self { server, folders }
    }

    /// Of the directory that `image` lies in, which is called `images` as well.
    pub(crate) fn of(image: &Path, hook: Arc<dyn Hook>) -> Self {
        let folders = Folders::beside(image.parent().unwrap());
        let server = Server::mount(&folders.images(), &folders.mount(), hook).unwrap();
        Self { server, folders }
    }

    /// `name` natively.
    pub(crate) fn native(&self, name: &str) -> String {
        text(&self.folders.images().join(name))
    }

    /// `name` through the mount.
    pub(crate) fn through(&self, name: &str) -> String {
        text(&self.folders.mount().join(name))
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Runs a program; panics with what it said unless it succeeds. Returns what it printed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let (ok, printed) = try_run(program, arguments);
    assert!(ok, "{program} {arguments:?}: {printed}");
    printed
}

/// Runs a program; whether it succeeded, and what it printed.
pub(crate) fn try_run(program: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("{program} is installed: {e}"));
    let printed = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&printed).into_owned())
}

/// `qemu-io` with one `-c` for each command.
pub(crate) fn qemu_io(options: &[&str], image: &str, commands: &[&str]) -> String {
    let mut arguments = options.to_vec();
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(image);
    let printed = run("qemu-io", &arguments);
    assert!(!printed.contains("rror") && !printed.contains("failed"), "{printed}");
    printed
}

/// A process that is killed when it is dropped.
pub(crate) struct Process {
    pub(crate) child: Child,
}

impl Process {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self { child: command.stdin(Stdio::null()).spawn().unwrap() }
    }

    /// `kill -9`, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// `lifeboat-disk hold`.
pub(crate) fn start_holder(folders: &Folders) -> Process {
    let socket = folders.path("holder");
    let mut command = Command::new(env!("CARGO_BIN_EXE_lifeboat-disk"));
    let holder = Process::start(command.arg("hold").arg("--socket").arg(&socket));
    while !socket.exists() {
        lifeboat_agent::clock::pause_thread(std::time::Duration::from_millis(2));
    }
    holder
}

/// `lifeboat-disk serve`, once it serves.
pub(crate) fn start_server(folders: &Folders) -> Process {
    start_server_with(folders, &[])
}

/// The same, with more arguments.
pub(crate) fn start_server_with(folders: &Folders, more: &[&str]) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lifeboat-disk"));
    command.arg("serve").arg("--images").arg(folders.images());
    command.arg("--at").arg(folders.mount()).arg("--holder").arg(folders.path("holder")).args(more);
    let mut server = Process::start(command.env("LIFEBOAT_LOG", "info").stdout(Stdio::piped()));
    let mut line = String::new();
    let output = server.child.stdout.as_mut().unwrap();
    BufReader::new(output).read_line(&mut line).unwrap();
    assert_eq!(line, "serving\n");
    server
}
