//! The controller as a process, and the operator's commands to it: the binary `lifeboat`, with
//! `--json`.
//!
//! Used by [`super::World`] and the tests.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::{Host, host_name, host_of};
use crate::clock;
use crate::rig::RigError;

/// A controller sees all its hosts within this time.
const SIGHT_LIMIT: Duration = Duration::from_secs(60);
/// What the plan believes that a link carries, and what the agents hold to, in bit/s: it lets a
/// migration take long enough to be hit.
pub(super) const CAPACITY: u64 = 400_000_000;

/// What the hosts' links carry, in bit/s.
#[derive(Debug, Clone, Copy)]
pub(super) struct Links {
    /// All but one.
    pub(super) all: u64,
    /// The second host's, the usual destination.
    pub(super) second: u64,
}

impl Links {
    pub(super) const fn alike(all: u64) -> Self {
        Self { all, second: all }
    }

    const fn of(self, host: Host) -> u64 {
        if host == 1 { self.second } else { self.all }
    }
}

/// The controller, which may be dead, and its commands.
pub struct Control {
    folder: PathBuf,
    program: PathBuf,
    hosts: usize,
    /// What each host's link carries.
    links: Links,
    child: Option<Child>,
}

/// An evacuation whose operator stays and watches.
pub struct Attended {
    child: Child,
    output: PathBuf,
}

impl Control {
    pub(super) fn start(
        world: &Path,
        programs: &Path,
        hosts: usize,
        links: Links,
    ) -> Result<Self, RigError> {
        let (folder, program) = (world.to_owned(), programs.join("lifeboat"));
        let mut control = Self { folder, program, hosts, links, child: None };
        fs::write(control.folder.join("lab.toml"), control.configuration())
            .map_err(RigError::io("cannot write the controller's configuration"))?;
        control.restart()?;
        Ok(control)
    }

    fn configuration(&self) -> String {
        let dir = self.folder.display();
        let mut text = format!(
            "[controller]\nlisten = [\"unix:{dir}/controller.sock\"]\nstate_dir = \"{dir}/controller\"\n\
             metrics_listen = \"off\"\n[policy]\nmeasure_window_ms = 200\n\
             [[switch]]\nname = \"s1\"\ndatapath_id = \"1\"\novsdb = \"unix:{dir}/no-switch.sock\"\n"
        );
        for host in 0..self.hosts {
            let (name, capacity) = (host_name(host), self.links.of(host) / 1_000_000);
            text.push_str(&format!(
                "[[host]]\nname = \"{name}\"\nagent = \"unix:{dir}/{name}/agent.sock\"\n\
                 ovsdb = \"unix:{dir}/no-switch.sock\"\nbridge = \"br0\"\nuplink = \"{name}-eth0\"\n\
                 address = \"127.0.0.1\"\n\
                 [[link]]\na = \"s1:s1-{name}\"\nb = \"{name}:{name}-eth0\"\ncapacity = \"{capacity} Mbit/s\"\n"
            ));
        }
        text
    }

    /// Starts it, again if it lives.
    ///
    /// # Errors
    /// When it cannot be started; its log is `controller.log` in the world's folder.
    pub fn restart(&mut self) -> Result<(), RigError> {
        self.kill();
        let log = OpenOptions::new().create(true).append(true).open(self.log());
        let log = log.map_err(RigError::io("cannot open the controller's log"))?;
        let mut command = Command::new(&self.program);
        command.args(["controller", "--config"]).arg(self.folder.join("lab.toml"));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        let program = self.program.display().to_string();
        self.child = Some(child.map_err(|source| RigError::Start { program, source })?);
        Ok(())
    }

    fn log(&self) -> PathBuf {
        self.folder.join("controller.log")
    }

    /// Whether it has been started and not been killed.
    #[must_use]
    pub fn lives(&self) -> bool {
        self.child.is_some()
    }

    /// Kills it with -9.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--server").arg(format!("unix:{}/controller.sock", self.folder.display()));
        command.stdin(Stdio::null());
        command
    }

    fn output(&self, line: &str) -> Result<Output, RigError> {
        let program = self.program.display().to_string();
        let mut command = self.command();
        let output = command.args(line.split_whitespace()).output();
        output.map_err(|source| RigError::Start { program, source })
    }

    /// A command's reply, whatever its exit code; `Null` where it gave none.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn ask(&self, line: &str) -> Result<Value, RigError> {
        let output = self.output(&format!("{line} --json"))?;
        Ok(serde_json::from_slice(&output.stdout).unwrap_or(Value::Null))
    }

    /// A command that has to succeed.
    ///
    /// # Errors
    /// With its words, when it does not.
    pub fn order(&self, line: &str) -> Result<String, RigError> {
        let output = self.output(line)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(RigError::Failed { command: format!("lifeboat {line}"), status: output.status, said })
    }

    /// Begins a command and does not wait for it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn begin(&self, line: &str) -> Result<Attended, RigError> {
        let output = self.folder.join("attended.txt");
        let file = File::create(&output).map_err(RigError::io("cannot make a file"))?;
        let error = file.try_clone().map_err(RigError::io("cannot make a file"))?;
        let mut command = self.command();
        command.args(line.split_whitespace()).stdout(file).stderr(error);
        let program = self.program.display().to_string();
        let child = command.spawn().map_err(|source| RigError::Start { program, source })?;
        Ok(Attended { child, output })
    }

    /// Waits until it sees all hosts, and the VM at `host`.
    ///
    /// # Errors
    /// When it does not.
    pub fn await_sight(&self, host: Host) -> Result<(), RigError> {
        let sees = || {
            let hosts = self.ask("hosts").ok()?;
            let hosts = hosts["hosts"].as_array()?.clone();
            let all =
                hosts.len() == self.hosts && hosts.iter().all(|host| host["connected"] == true);
            let vms = self.ask("vms").ok()?;
            let mut vms = vms["vms"].as_array()?.iter();
            let there = vms.any(|vm| vm["host"] == host_name(host) && vm["state"] == "running");
            (all && there).then_some(())
        };
        clock::wait_for(SIGHT_LIMIT, sees).ok_or_else(|| RigError::TooLate {
            what: format!("that the controller sees all hosts, and the VM at {}", host_name(host)),
            seconds: SIGHT_LIMIT.as_secs(),
        })
    }

    /// Where a plan would bring the VM of a host.
    ///
    /// # Errors
    /// When there is no such plan.
    pub fn planned_destination(&self, source: Host) -> Result<Host, RigError> {
        let plan = self.ask(&format!("plan {} --urgency 0", host_name(source)))?;
        let to = plan["vms"][0]["destination"].as_str().and_then(host_of);
        to.ok_or_else(|| RigError::refused("a plan")(plan.to_string()))
    }

    /// Begins an evacuation by this command and gives its id.
    ///
    /// # Errors
    /// With the controller's words.
    pub fn detached(&self, line: &str) -> Result<String, RigError> {
        let said = self.order(&format!("{line} --detach --json"))?;
        let reply: Value = serde_json::from_str(&said).unwrap_or_default();
        let id = reply["evacuation"].as_str().map(str::to_owned);
        id.ok_or_else(|| RigError::refused("an evacuation")(said))
    }

    /// How an evacuation stands.
    ///
    /// # Errors
    /// When the command cannot be started.
    pub fn status(&self, id: &str) -> Result<Value, RigError> {
        let mut all = self.ask(&format!("status {id}"))?;
        Ok(all.pointer_mut("/evacuations/0").map(Value::take).unwrap_or_default())
    }

    /// The id of the newest evacuation.
    ///
    /// # Errors
    /// When there is none.
    pub fn newest(&self) -> Result<String, RigError> {
        let all = self.ask("status")?;
        let ids = all["evacuations"].as_array().into_iter().flatten();
        let number = |id: &str| id.trim_start_matches('e').parse::<u32>().unwrap_or_default();
        let ids = ids.filter_map(|evacuation| evacuation["evacuation"].as_str());
        let newest = ids.max_by_key(|id| number(id)).map(str::to_owned);
        newest.ok_or_else(|| RigError::refused("an evacuation")(all.to_string()))
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Attended {
    /// Ctrl-C.
    pub fn interrupt(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        // It may have ended; the exit code tells.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
    }

    /// Waits for its end: its exit code, and all that it said.
    ///
    /// # Errors
    /// When it does not end.
    pub fn end(mut self, within: Duration) -> Result<(Option<i32>, String), RigError> {
        let ended = clock::wait_for(within, || self.child.try_wait().ok().flatten());
        let said = fs::read_to_string(&self.output).unwrap_or_default();
        match ended {
            Some(status) => Ok((status.code(), said)),
            None => {
                // Nobody waits for it any more.
                let _ = self.child.kill();
                let _ = self.child.wait();
                let what = format!("the end of a command ({said})");
                Err(RigError::TooLate { what, seconds: within.as_secs() })
            }
        }
    }
}
