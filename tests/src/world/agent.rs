//! One host of the world: its real agent as a process, killed and started again at will.
//!
//! Used by [`super::World`] and the tests. The orders that an agent takes from its environment
//! (where in the hand-over it shall stay until a file has gone) are read once at its start, so a
//! host is given one by starting its agent anew; its guest does not notice.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
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
use super::{Disk, HOSTS, Host, VM, host_name};
use crate::clock;
use crate::rig::RigError;
use crate::rig::network::Namespace;

/// An agent answers within this time after its start, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(60);
/// The profile that gives a QEMU its second monitor.
const PROFILE: &str = "watched";
/// What every host calls its storage.
const STORAGE: &str = "san";
const DISK_BYTES: u64 = 64 << 20;
/// Not a whole number of the blocks that are sent: its last one is short.
const CD_BYTES: u64 = (4 << 20) + 2048;
/// OVMF's variables as they are before the first boot.
pub const FRESH_NVRAM: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
/// What the guest writes of a local disk, again and again.
const WRITTEN_BYTES: u64 = 8 << 20;

/// A host with its agent, which may be dead.
pub struct Agent {
    host: Host,
    namespace: Namespace,
    folder: PathBuf,
    program: PathBuf,
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
        let agent =
            Self { host, namespace, folder, program, child: None, log_from: 0, operations: 0 };
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
        let file = self.folder.join("agent.toml");
        let cannot = || RigError::io("cannot write an agent's configuration");
        let text = fs::read_to_string(&file).map_err(cannot())?;
        let ports = store_ports(self.host);
        let (first, last) = (ports.start(), ports.end());
        let roles = "roles = [\"hypervisor\", \"intermediary\"]\n";
        let text = format!("{roles}{text}[intermediary]\nports = \"{first}-{last}\"\n");
        fs::write(file, text).map_err(cannot())
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

    fn make_disk(&self, disk: Disk) -> std::io::Result<String> {
        use std::os::unix::fs::PermissionsExt;
        let (file, path, format, key) = match disk {
            Disk::None => return Ok(String::new()),
            Disk::Raw | Disk::Busy(_) => (self.disk(), "disk".to_owned(), "raw", String::new()),
            Disk::Cd => (self.disk(), "disk".to_owned(), "raw", self.make_cd()?),
            Disk::Overlay => (self.disk(), "disk".to_owned(), "qcow2", String::new()),
            Disk::Firmware => (self.disk(), "disk".to_owned(), "raw", "nvram = true\n".to_owned()),
            Disk::Shared => {
                let file = self.shared().join("disk.raw");
                let key = format!("shared_storage = \"{STORAGE}\"\n");
                (file.clone(), file.display().to_string(), "raw", key)
            }
        };
        match disk {
            Disk::Overlay => self.make_overlay(&file)?,
            Disk::Busy(busy) => File::create(&file)?.set_len(busy.image)?,
            Disk::Firmware => drop(fs::copy(FRESH_NVRAM, &file)?),
            _ => File::create(&file)?.set_len(DISK_BYTES)?,
        }
        fs::set_permissions(&file, fs::Permissions::from_mode(0o666))?;
        Ok(format!("[[disk]]\npath = \"{path}\"\nformat = \"{format}\"\n{key}"))
    }

    /// Its part of the definition, which follows the disk's.
    fn make_cd(&self) -> std::io::Result<String> {
        let content: Vec<u8> = (0..CD_BYTES).map(|at| (at.wrapping_mul(at) >> 11) as u8).collect();
        fs::write(self.cd(), content)?;
        Ok("[[disk]]\npath = \"cd.iso\"\nformat = \"raw\"\ncdrom = true\n".to_owned())
    }

    /// On a base of which every host has its own copy at the same place beside its disks.
    fn make_overlay(&self, file: &Path) -> std::io::Result<()> {
        let folders = (0..HOSTS).map(|host| self.folder.with_file_name(host_name(host)));
        for folder in folders {
            File::create(folder.join("base.raw"))?.set_len(DISK_BYTES)?;
        }
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "../base.raw"])
            .arg(file)
            .status()?;
        if made.success() { Ok(()) } else { Err(ErrorKind::InvalidData.into()) }
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

    /// Defines the VM here, started with the host.
    pub(super) fn define_vm(&self, disk: Disk) -> Result<(), RigError> {
        let writes = match disk {
            Disk::Raw | Disk::Overlay => format!(" lb.disk={WRITTEN_BYTES} lb.disk_rate=300"),
            Disk::Cd => format!(" lb.disk={WRITTEN_BYTES} lb.disk_rate=300 lb.cd=1"),
            Disk::Busy(busy) => format!(
                " lb.disk={} lb.disk_block={} lb.disk_rate={} lb.disk_check={}",
                busy.image,
                busy.block,
                busy.rate / busy.block,
                busy.check_percent
            ),
            Disk::None | Disk::Shared | Disk::Firmware => String::new(),
        };
        // With less OVMF runs into a page fault of its own.
        let (memory, firmware) = match disk {
            Disk::Firmware => (256, "firmware = \"OVMF_CODE_4M.fd\"\n"),
            _ => (128, ""),
        };
        let disk = self.make_disk(disk).map_err(RigError::io("cannot make a VM's disk"))?;
        let definition = format!(
            "name = \"{VM}\"\nmemory = \"{memory} MiB\"\nvcpus = 1\nmachine = \"pc-i440fx-7.2\"\n\
             cpu_model = \"max\"\nkernel = \"vmlinuz\"\ninitrd = \"initrd\"\n\
             kernel_arguments = \"console=ttyS0 quiet panic=-1 nokaslr tsc=unstable \
             mitigations=off lb.name={VM} lb.role=idle lb.region={} lb.dirty=100 lb.check=500{writes}\"\n\
             profile = \"{PROFILE}\"\nautostart = true\n{firmware}{disk}",
            24 << 20
        );
        fs::write(self.folder.join(format!("vms/{VM}.toml")), definition)
            .map_err(RigError::io("cannot write a VM's definition"))
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
        let mut command = self.namespace.command_beside(&self.program.to_string_lossy());
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

    /// The power goes, and comes back: agent and QEMU die, what a reboot clears is gone, and the
    /// next agent finds another boot. It is not started yet.
    ///
    /// # Errors
    /// When the files cannot be changed.
    pub fn lose_power(&mut self) -> Result<(), RigError> {
        self.kill();
        self.kill_qemu();
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
        self.kill_stores();
    }
}
