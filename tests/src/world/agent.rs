//! One host of the world: its real agent as a process, killed and started again at will.
//!
//! Used by [`super::World`] and the tests. The orders that an agent takes from its environment
//! (where in the hand-over it shall stay until a file has gone) are read once at its start, so a
//! host is given one by starting its agent anew; its guest does not notice.

mod definition;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use lifeboat_agent::qemu::run_dir::RunDir;
use lifeboat_protocol::agent::agent_client::AgentClient;
use lifeboat_protocol::agent::{Command as Ordered, ListVmsRequest, StartVmRequest, VmStatus};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use super::relay::{PAGE_PORT, page_address, store_ports};
use super::witness::Watched;
use super::{Host, NEIGHBOUR, VM, host_name};
use crate::clock;
use crate::rig::RigError;
use crate::rig::network::Namespace;
use crate::rig::program::Running;

/// An agent answers within this time after its start, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(60);
/// The profile that gives a QEMU its second monitor.
const PROFILE: &str = "watched";
/// What every host calls its storage.
const STORAGE: &str = "san";
/// OVMF's variables as they are before the first boot.
pub const FRESH_NVRAM: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// A host with its agent, which may be dead.
pub struct Agent {
    host: Host,
    namespace: Namespace,
    folder: PathBuf,
    program: PathBuf,
    /// Who keeps its mount namespace; `None` is everybody's.
    mounts: Option<Running>,
    child: Option<Child>,
    /// Where in the log the present process begins.
    log_from: u64,
    operations: u32,
}

impl Agent {
    pub(super) fn prepare(
        host: Host,
        namespace: Namespace,
        world: &Path,
        images: &Path,
        programs: &Path,
    ) -> Result<Self, RigError> {
        let folder = world.join(host_name(host));
        let program = programs.join("lifeboat-agent");
        let (mounts, child, log_from, operations) = Default::default();
        let agent = Self { host, namespace, folder, program, mounts, child, log_from, operations };
        let cannot = RigError::io("cannot write a host's files");
        agent.write_files(images).map_err(cannot)?;
        Ok(agent)
    }

    fn write_files(&self, images: &Path) -> std::io::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let monitors = self.folder.join("watched");
        for folder in ["vms", "profiles", "watched", "not-shared", "disks"] {
            fs::create_dir_all(self.folder.join(folder))?;
        }
        fs::create_dir_all(self.shared())?;
        // QEMU's user makes its socket here.
        fs::set_permissions(&monitors, fs::Permissions::from_mode(0o777))?;
        let monitor = self.watched().monitor;
        let profile =
            format!("args = [\"-qmp\", \"unix:{},server=on,wait=off\"]\n", monitor.display());
        fs::write(self.folder.join(format!("profiles/{PROFILE}.toml")), profile)?;
        fs::write(self.folder.join("agent.toml"), self.configuration(images))
    }

    fn configuration(&self, images: &Path) -> String {
        let (own, images) = (self.folder.display(), images.display());
        format!(
            "host = \"{}\"\n\
             listen = [\"unix:{own}/agent.sock\"]\n\
             page_listen = \"127.0.0.1:{PAGE_PORT}\"\n\
             page_address = \"{}\"\n\
             state_dir = \"{own}/state\"\n\
             run_dir = \"{own}/qemu\"\n\
             images_dir = \"{images}\"\n\
             vms_dir = \"{own}/vms\"\n\
             profiles_dir = \"{own}/profiles\"\n\
             memory = \"1 GiB\"\n\
             disk_dirs = [\"{own}/disks\"]\n\
             [qemu]\n\
             user = \"nobody\"\n\
             accelerator = \"tcg\"\n\
             [ovs]\n\
             database = \"unix:{own}/no-switch-here.sock\"\n\
             [[storage]]\n\
             name = \"{STORAGE}\"\n\
             path = \"{}\"\n",
            host_name(self.host),
            page_address(self.host),
            self.storage().display(),
        )
    }

    /// Has the host keep pages of others' VMs.
    pub(super) fn keep_stores(&self) -> Result<(), RigError> {
        let ports = store_ports(self.host);
        let (first, last) = (ports.start(), ports.end());
        let roles = "roles = [\"hypervisor\", \"intermediary\"]\n";
        self.configure(|text| format!("{roles}{text}[intermediary]\nports = \"{first}-{last}\"\n"))
    }

    /// Changes its configuration, which it reads when it starts.
    fn configure(&self, change: impl FnOnce(String) -> String) -> Result<(), RigError> {
        let file = self.folder.join("agent.toml");
        let cannot = || RigError::io("cannot write an agent's configuration");
        let text = fs::read_to_string(&file).map_err(cannot())?;
        fs::write(file, change(text)).map_err(cannot())
    }

    /// The redis-servers of the stores here, by their working directories, which are the stores'.
    #[must_use]
    pub fn stores(&self) -> Vec<u32> {
        let folder = self.folder.join("state/stores");
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_here = |pid: &u32| {
            fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(&folder))
        };
        pids.filter(is_here).collect()
    }

    /// Kills them with -9: what is in them is gone.
    pub fn kill_stores(&self) {
        self.stores().into_iter().for_each(kill);
    }

    /// What the first two hosts share.
    fn shared(&self) -> PathBuf {
        self.folder.with_file_name("shared")
    }

    /// What this host calls by the shared storage's name.
    fn storage(&self) -> PathBuf {
        if self.host < 2 { self.shared() } else { self.folder.join("not-shared") }
    }

    /// Where its files are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the VM's local disk is on this host.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.folder.join("disks/disk")
    }

    /// Where the VM's CD is on this host.
    #[must_use]
    pub fn cd(&self) -> PathBuf {
        self.folder.join("disks/cd.iso")
    }

    /// What the VM's overlay lies on, on this host.
    #[must_use]
    pub fn base(&self) -> PathBuf {
        self.folder.join("base.raw")
    }

    /// The processes that move a VM's disks, and whatever is left of them here.
    #[must_use]
    pub fn disk_leftovers(&self) -> Vec<PathBuf> {
        let folder = self.folder.join("qemu/.disks");
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    }

    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    pub(super) fn watched(&self) -> Watched {
        let monitor = self.folder.join("watched/monitor.sock");
        Watched { monitor, serial: self.run_dir().serial_log() }
    }

    fn run_dir(&self) -> RunDir {
        RunDir::new(&self.folder.join("qemu"), VM)
    }

    fn neighbours_run_dir(&self) -> RunDir {
        RunDir::new(&self.folder.join("qemu"), NEIGHBOUR)
    }

    /// All that the neighbour's guest has said here on its serial line, while its QEMU is here.
    #[must_use]
    pub fn said_by_neighbour(&self) -> String {
        fs::read_to_string(self.neighbours_run_dir().serial_log()).unwrap_or_default()
    }

    pub(super) fn log(&self) -> PathBuf {
        self.folder.join("agent.log")
    }

    fn hold_file(&self) -> PathBuf {
        self.folder.join("hold")
    }

    /// Starts it and waits until it answers. With `mark`, it will stay at that point of the
    /// hand-over until [`Self::let_go`].
    ///
    /// # Errors
    /// When it does not start; its log is `HOST/agent.log` in the world's folder.
    pub fn start(&mut self, mark: Option<&str>) -> Result<(), RigError> {
        self.kill();
        let log = OpenOptions::new().create(true).append(true).open(self.log());
        let log = log.map_err(RigError::io("cannot open an agent's log"))?;
        self.log_from = log.metadata().map_or(0, |metadata| metadata.len());
        let again = log.try_clone().map_err(RigError::io("cannot open an agent's log"))?;
        // A mover of the next agent mounts what the QEMU of this one has to see.
        let program = self.program.display();
        let line = match &self.mounts {
            Some(keeper) => format!("nsenter --mount=/proc/{}/ns/mnt {program}", keeper.pid()),
            None => program.to_string(),
        };
        let mut command = self.namespace.command_beside(&line);
        command.arg("--config").arg(self.folder.join("agent.toml"));
        command.env("LIFEBOAT_LOG", "info,lifeboat_agent=debug").env("NO_COLOR", "1");
        if let Some(mark) = mark {
            fs::write(self.hold_file(), "").map_err(RigError::io("cannot make the hold file"))?;
            command.env("LIFEBOAT_HOLD_AT", mark).env("LIFEBOAT_HOLD_FILE", self.hold_file());
        }
        let child = command.stdin(Stdio::null()).stdout(log).stderr(again).spawn();
        let program = self.program.display().to_string();
        self.child = Some(child.map_err(|source| RigError::Start { program, source })?);
        let ready = clock::wait_for(START_LIMIT, || self.said(" ready").then_some(()));
        ready.ok_or_else(|| RigError::TooLate {
            what: format!("the start of the agent of {}", host_name(self.host)),
            seconds: START_LIMIT.as_secs(),
        })
    }

    /// Whether the present process has logged this.
    #[must_use]
    pub fn said(&self, words: &str) -> bool {
        let read = || {
            let mut log = File::open(self.log())?;
            log.seek(SeekFrom::Start(self.log_from))?;
            let mut text = String::new();
            log.read_to_string(&mut text)?;
            std::io::Result::Ok(text)
        };
        read().is_ok_and(|text| text.contains(words))
    }

    /// Whether it stays at its mark.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.said("holding here, as ordered")
    }

    /// Lets it go on from its mark, and past it from now on.
    pub fn let_go(&self) {
        // It may have been let go, or never been told to stay.
        let _ = fs::remove_file(self.hold_file());
    }

    /// Whether it has been started and not been killed.
    #[must_use]
    pub fn lives(&self) -> bool {
        self.child.is_some()
    }

    /// Kills it with -9. Its QEMU goes on.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Kills the VM's QEMU here with -9, if there is one.
    pub fn kill_qemu(&self) {
        self.run_dir().claimed_pid().into_iter().for_each(kill);
    }

    /// Whether the VM's QEMU process is there.
    #[must_use]
    pub fn has_qemu(&self) -> bool {
        let stat = |pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok();
        let alive = |text: String| !text.contains(") Z ");
        self.run_dir().claimed_pid().and_then(stat).is_some_and(alive)
    }

    /// The processes that move disks here.
    fn disk_processes(&self) -> Vec<u32> {
        let folder = format!("{}/", self.folder.display());
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_here = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains("lifeboat-disk\0") && line.contains(&folder)
        };
        pids.filter(is_here).collect()
    }

    /// Takes away what was mounted beneath what a reboot clears, or clearing it would clear the images.
    fn unmount_disks(&self) {
        let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let cleared = self.folder.join("qemu");
        let points = table.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
        for point in points.filter(|point| point.starts_with(&cleared)) {
            let gone = Command::new("umount").arg("-l").arg(point).status();
            assert!(gone.is_ok_and(|status| status.success()), "{} stays", point.display());
        }
    }

    /// The power goes, and comes back: agent, QEMU and what moves disks die, what a reboot clears is
    /// gone, and the next agent finds another boot. It is not started yet.
    ///
    /// # Errors
    /// When the files cannot be changed.
    pub fn lose_power(&mut self) -> Result<(), RigError> {
        self.kill();
        self.kill_qemu();
        self.disk_processes().into_iter().for_each(kill);
        self.unmount_disks();
        let cannot = || RigError::io("cannot clear what a reboot clears");
        let gone = clock::wait_for(START_LIMIT, || (!self.has_qemu()).then_some(()));
        gone.ok_or_else(|| cannot()(std::io::ErrorKind::TimedOut.into()))?;
        let _ = fs::remove_dir_all(self.folder.join("qemu"));
        fs::write(self.folder.join("state/boot"), "an earlier boot").map_err(cannot())
    }

    /// The VM as its agent tells it; `None` where it knows none.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub fn vm(&self) -> Result<Option<VmStatus>, RigError> {
        let listed = self.call(async |mut client| client.list_vms(ListVmsRequest {}).await)?;
        let named = |status: &VmStatus| {
            status.definition.as_ref().is_some_and(|definition| definition.name == VM)
        };
        let listed = listed.map_err(RigError::refused("the list of VMs"))?;
        Ok(listed.into_inner().vms.into_iter().find(named))
    }

    /// Orders the VM's start here, with a term above every controller's.
    ///
    /// # Errors
    /// With the agent's words.
    pub fn start_vm(&mut self) -> Result<(), RigError> {
        self.operations += 1;
        let operation_id = format!("by-hand-{}-{}", self.operations, self.log_from);
        let command = Some(Ordered { operation_id, term: self.term()? });
        let request = StartVmRequest { command, vm: VM.to_owned() };
        let started = self.call(async |mut client| client.start_vm(request).await)?;
        started.map(drop).map_err(RigError::refused("to start the VM"))
    }

    /// The term that the agent obeys now: what is ordered by hand disturbs no controller.
    fn term(&self) -> Result<u64, RigError> {
        use lifeboat_protocol::agent::DescribeHostRequest;
        let described =
            self.call(async |mut client| client.describe_host(DescribeHostRequest {}).await)?;
        let described = described.map_err(RigError::refused("the host's description"))?;
        Ok(described.into_inner().highest_term)
    }

    fn call<T>(
        &self,
        work: impl AsyncFnOnce(AgentClient<Channel>) -> Result<T, tonic::Status>,
    ) -> Result<Result<T, tonic::Status>, RigError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(RigError::io("cannot start a runtime"))?;
        let socket = self.folder.join("agent.sock");
        let open = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        runtime.block_on(async {
            // The address is for the HTTP header only.
            let endpoint = Endpoint::from_static("http://agent").timeout(START_LIMIT);
            let channel = endpoint.connect_with_connector(open).await;
            let channel = channel.map_err(RigError::refused("a connection to an agent"))?;
            Ok(work(AgentClient::new(channel)).await)
        })
    }
}

fn kill(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    // It may have ended.
    let _ = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
        self.kill_qemu();
        self.neighbours_run_dir().claimed_pid().into_iter().for_each(kill);
        self.kill_stores();
    }
}
