//! The lab's cloud as a rig: `lab/up` as a process of its own, Lifeboat's commands to it, its guests'
//! serial lines, and the client that they send to and receive from.
//!
//! Used by the experiments that evacuate hosts. The cloud makes namespaces of its own, so such an
//! experiment needs none around it. One cloud at a time can be up in a checkout; who asks for a
//! second one is told so by `lab/up`. Deliberately not here: what is measured.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lifeboat_lab::proportions::Role;
use lifeboat_lab::scenario::{self, Scenario, Vm};
use serde_json::Value;

use super::RigError;
use super::network::Namespace;
use super::private::built;
use super::program::{run, words};
use crate::clock;

/// Switches, agents and controller are up, and connected.
const UP_LIMIT: Duration = Duration::from_secs(150);
/// Emulated guests boot, all at once.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
const END_LIMIT: Duration = Duration::from_secs(40);
/// A niceness that outweighs all others together on two cores.
const FAVOURED: i32 = -15;
/// What `lab/up` says last.
const IS_UP: &str = "enter it with lab/exec";
/// For people who read a guest's life afterwards; more often costs CPU time that guests need.
const HEARTBEAT_MS: &str = "200";

/// A cloud that is up; it is taken down when this is dropped.
#[derive(Debug)]
pub struct Cloud {
    lab: PathBuf,
    program: PathBuf,
    scenario: Scenario,
    up: Option<Child>,
    client: Option<Child>,
}

impl Cloud {
    /// Raises the scenario of this name from the `lab` folder, with the programs beside this one, and
    /// waits until its guests have booted. What `lab/up` says goes to `log`.
    ///
    /// # Errors
    /// When the cloud does not come up; with what it said.
    pub fn raise(lab: &Path, name: &str, log: &Path) -> Result<Self, RigError> {
        let file = lab.join(format!("scenarios/{name}.toml"));
        let text = fs::read_to_string(&file)
            .map_err(RigError::io(format!("cannot read {}", file.display())))?;
        let scenario = scenario::parse(&file.display().to_string(), &text)
            .map_err(RigError::refused("a scenario"))?;
        let program = built("lifeboat")?;
        let mut cloud = Self { lab: lab.to_owned(), program, scenario, up: None, client: None };
        cloud.up = Some(cloud.start(&file, log)?);
        cloud.await_up(log)?;
        cloud.client = Some(cloud.start_client(&log.with_extension("client.log"))?);
        cloud.await_guests()?;
        Ok(cloud)
    }

    fn start(&self, file: &Path, log: &Path) -> Result<Child, RigError> {
        let cannot = |source| RigError::Start { program: "lab/up".to_owned(), source };
        let out = File::create(log).map_err(cannot)?;
        let error = out.try_clone().map_err(cannot)?;
        let binaries = self.program.parent().unwrap_or(Path::new("."));
        // Ended in order, should this program be killed.
        let mut command = words("setpriv --pdeathsig TERM --");
        command.arg(self.lab.join("up")).arg(file).arg("--binaries").arg(binaries);
        command.stdin(Stdio::null()).stdout(out).stderr(error).spawn().map_err(cannot)
    }

    fn await_up(&mut self, log: &Path) -> Result<(), RigError> {
        let said = || fs::read_to_string(log).unwrap_or_default();
        let ended = |up: &mut Option<Child>| {
            up.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)))
        };
        let look = || {
            let is_up = said().contains(IS_UP);
            (is_up || ended(&mut self.up)).then_some(is_up)
        };
        match clock::wait_for(UP_LIMIT, look) {
            Some(true) => Ok(()),
            Some(false) => Err(RigError::refused("a cloud")(said().trim().to_owned())),
            None => {
                let what = format!("a cloud ({})", said().trim());
                Err(RigError::TooLate { what, seconds: UP_LIMIT.as_secs() })
            }
        }
    }

    /// The client: what NO guests send to, and what sends to NI guests.
    fn start_client(&self, log: &Path) -> Result<Child, RigError> {
        let cannot = |source| RigError::Start { program: "guest-workload".to_owned(), source };
        let out = File::create(log).map_err(cannot)?;
        let error = out.try_clone().map_err(cannot)?;
        let target = self.program.ancestors().nth(2).unwrap_or(Path::new("."));
        let workload = target.join("x86_64-unknown-linux-gnu/release/guest-workload");
        let mut command = Command::new(self.lab.join("exec"));
        command.arg("client").arg(workload).arg("client").arg("--out");
        command.arg(log.with_extension("json")).args(["--interval", HEARTBEAT_MS]);
        let transport = self.scenario.transport;
        for vm in &self.scenario.vms {
            command.arg("--guest").arg(peer(vm, transport.as_str()));
        }
        command.stdin(Stdio::null()).stdout(out).stderr(error).spawn().map_err(cannot)
    }

    fn await_guests(&self) -> Result<(), RigError> {
        let ready = |vm: &Vm| {
            let said = fs::read_to_string(self.serial(vm.host.as_str(), vm.name.as_str()));
            said.is_ok_and(|text| text.contains("LIFEBOAT-READY"))
        };
        let all = || self.scenario.vms.iter().all(ready).then_some(());
        let what = "that all guests have booted".to_owned();
        let seconds = BOOT_LIMIT.as_secs();
        clock::wait_for(BOOT_LIMIT, all).ok_or(RigError::TooLate { what, seconds })
    }

    /// What has been raised.
    #[must_use]
    pub fn scenario(&self) -> &Scenario {
        &self.scenario
    }

    /// One of Lifeboat's commands, with `--json`; its reply whatever its exit code is, because an
    /// evacuation that left somebody behind has one of its own.
    ///
    /// # Errors
    /// With its words, when it gave no reply.
    pub fn ask(&self, line: &[&str]) -> Result<Value, RigError> {
        let mut command = Command::new(&self.program);
        command
            .arg("--server")
            .arg(format!("unix:{}", self.lab.join("run/controller.sock").display()));
        let output = command.arg("--json").args(line).stdin(Stdio::null()).output();
        let program = self.program.display().to_string();
        let output = output.map_err(|source| RigError::Start { program, source })?;
        let reply = String::from_utf8_lossy(&output.stdout);
        // A command that shows progress prints one reply after the other; the last one counts.
        let last =
            serde_json::Deserializer::from_str(&reply).into_iter().map_while(Result::ok).last();
        last.ok_or_else(|| RigError::Failed {
            command: format!("lifeboat {}", line.join(" ")),
            status: output.status,
            said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    /// A program on a node, to its end; what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn on(&self, node: &str, line: &str) -> Result<String, RigError> {
        run(Command::new(self.lab.join("exec")).arg(node).args(line.split_whitespace()))
    }

    /// The socket of the database of a host's own switch.
    #[must_use]
    pub fn database(&self, host: &str) -> PathBuf {
        self.lab.join("run").join(host).join("ovs/db.sock")
    }

    /// A node's network, for programs that are not in the cloud otherwise.
    ///
    /// # Errors
    /// When the cloud has no such node.
    pub fn namespace(&self, node: &str) -> Result<Namespace, RigError> {
        let read = |name: &str| {
            let text = fs::read_to_string(self.lab.join("run").join(name));
            text.map_err(RigError::io(format!("cannot read the cloud's {name}")))
        };
        let state: Value =
            serde_json::from_str(&read("state.json")?).map_err(RigError::refused("a state"))?;
        let inside = state["nodes"][node].as_u64();
        let inside =
            inside.ok_or_else(|| RigError::refused("a cloud")(format!("it has no node {node}")))?;
        // Its processes have numbers of their own: those of its first one's /proc.
        let first = read("init.pid")?;
        let file = format!("/proc/{}/root/proc/{inside}/ns/net", first.trim());
        Ok(Namespace::at(PathBuf::from(file)))
    }

    /// A program on a node, for as long as what is returned lives.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn keep_on(&self, node: &str, line: &str) -> Result<Kept, RigError> {
        let mut command = Command::new(self.lab.join("exec"));
        // In the cloud it is the child of the process that we can end.
        command.arg(node).args(["setpriv", "--pdeathsig", "KILL", "--"]);
        command.args(line.split_whitespace());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let cannot = |source| RigError::Start { program: line.to_owned(), source };
        Ok(Kept(command.spawn().map_err(cannot)?))
    }

    /// Lets all threads of a guest's QEMU go before everybody else's, as if its CPU were one of its own.
    /// Nothing happens where the guest is not, or is just leaving.
    pub fn favour(&self, host: &str, vm: &str) {
        let pid_file = self.lab.join("run").join(host).join("qemu").join(vm).join("io/pid");
        let Ok(pid) = fs::read_to_string(pid_file) else { return };
        let Ok(threads) = fs::read_dir(format!("/proc/{}/task", pid.trim())) else { return };
        for thread in threads.flatten() {
            let id = thread.file_name().to_str().and_then(|id| id.parse().ok());
            if let Some(id) = id.and_then(rustix::process::Pid::from_raw) {
                // A thread that has just ended needs no precedence.
                let _ = rustix::process::setpriority_process(Some(id), FAVOURED);
            }
        }
    }

    /// A host's address on the data network.
    ///
    /// # Errors
    /// When the scenario has no such host.
    pub fn address(&self, host: &str) -> Result<String, RigError> {
        let found = self.scenario.hosts.iter().find(|one| one.name.as_str() == host);
        let address = found.map(|one| one.address.split('/').next().unwrap_or_default().to_owned());
        address.ok_or_else(|| RigError::refused("a scenario")(format!("it has no host {host}")))
    }

    /// The file with all that came out of a guest's serial line on one host.
    #[must_use]
    pub fn serial(&self, host: &str, vm: &str) -> PathBuf {
        self.lab.join("run").join(host).join("qemu").join(vm).join("io/serial.log")
    }

    /// Listens to a guest from now on; it may move meanwhile.
    ///
    /// # Errors
    /// When it has no serial line on this host.
    pub fn listen(&self, host: &str, vm: &str) -> Result<Listener, RigError> {
        let path = self.serial(host, vm);
        let cannot = || RigError::io(format!("cannot listen to {}", path.display()));
        let mut file = File::open(&path).map_err(cannot())?;
        file.seek(SeekFrom::End(0)).map_err(cannot())?;
        Ok(Listener { file })
    }
}

/// A program on a node; it ends when this is dropped.
#[derive(Debug)]
pub struct Kept(Child);

impl Kept {
    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Kept open, so that a guest's last words on a host can be read after the agent has cleared up.
#[derive(Debug)]
pub struct Listener {
    file: File,
}

impl Listener {
    /// What it has said since, first here, then at `arrived`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn heard(mut self, arrived: &Path) -> Result<String, RigError> {
        let mut bytes = Vec::new();
        let cannot = RigError::io("cannot read a guest's serial line");
        self.file.read_to_end(&mut bytes).map_err(cannot)?;
        // A guest that stayed has no file there.
        bytes.extend(fs::read(arrived).unwrap_or_default());
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        if let Some(mut client) = self.client.take() {
            // It ends with the cloud in any case.
            let _ = client.kill();
            let _ = client.wait();
        }
        let Some(mut up) = self.up.take() else { return };
        // `lab/up` ends all of it in order when asked to.
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_child(&up),
            rustix::process::Signal::TERM,
        );
        if clock::wait_for(END_LIMIT, || up.try_wait().ok().flatten()).is_none() {
            let _ = up.kill();
            let _ = up.wait();
        }
    }
}

/// `name=web,ip=10.0.0.101`, as the client takes it.
fn peer(vm: &Vm, transport: &str) -> String {
    let address = vm.nics.first().map_or("", |nic| nic.address.as_str());
    let ip = address.split('/').next().unwrap_or_default();
    match vm.role {
        Role::Ni => format!("name={},ip={ip},source={},transport={transport}", vm.name, vm.rate.0),
        _ => format!("name={},ip={ip}", vm.name),
    }
}
