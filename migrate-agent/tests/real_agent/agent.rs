//! A real `lifeboat-agent` process with a directory of its own, and a gRPC client for it.
//!
//! Its host has no network of VMs (no Open vSwitch is asked); its guests are QEMUs that stand or
//! run a boot sector. Whatever a test leaves running is ended by pid, however the test ends.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use lifeboat_agent::qemu::process::QemuProcess;
use lifeboat_agent::qemu::run_dir::RunDir;
use lifeboat_protocol::agent::agent_client::AgentClient;
use lifeboat_protocol::agent::{Command as AgentCommand, ListVmsRequest, VmStatus};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// An agent and its files.
pub(crate) struct Agent {
    pub(crate) directory: tempfile::TempDir,
    child: Option<Child>,
    operations: u32,
}

impl Agent {
    /// Writes the configuration, and VMs by these definitions; starts nothing.
    pub(crate) fn prepare(vms: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        // QEMU's user must be able to pass through.
        std::fs::set_permissions(root, std::fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["vms", "images", "profiles"] {
            std::fs::create_dir(root.join(name)).unwrap();
        }
        for (name, definition) in vms {
            std::fs::write(root.join(format!("vms/{name}.toml")), definition).unwrap();
        }
        let at = root.display();
        let config = format!(
            "host = \"h1\"\nlisten = [\"unix:{at}/agent.sock\"]\npage_listen = \"127.0.0.1:0\"\n\
             state_dir = \"{at}/state\"\nrun_dir = \"{at}/run\"\nimages_dir = \"{at}/images\"\n\
             vms_dir = \"{at}/vms\"\nprofiles_dir = \"{at}/profiles\"\nmemory = \"1 GiB\"\n\
             [qemu]\nuser = \"nobody\"\naccelerator = \"tcg\"\n[ovs]\ndatabase = \"unix:{at}/no-ovs\"\n"
        );
        std::fs::write(root.join("agent.toml"), config).unwrap();
        Self { directory, child: None, operations: 0 }
    }

    /// Starts the agent and waits until it serves.
    pub(crate) async fn start(&mut self) -> AgentClient<Channel> {
        let child = Command::new(env!("CARGO_BIN_EXE_lifeboat-agent"))
            .arg("--config")
            .arg(self.directory.path().join("agent.toml"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.child = Some(child);
        let path = self.directory.path().join("agent.sock");
        for _ in 0..400 {
            if let Ok(client) = connect(path.clone()).await {
                return client;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the agent does not serve after 20 s");
    }

    /// Kills the agent as a crash would.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let _ = std::fs::remove_file(self.directory.path().join("agent.sock"));
    }

    /// Asks the agent to end, and gives its exit code.
    pub(crate) fn terminate(&mut self) -> Option<i32> {
        let mut child = self.child.take().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        child.wait().unwrap().code()
    }

    /// A command of its own, in term 1.
    pub(crate) fn command(&mut self) -> Option<AgentCommand> {
        self.operations += 1;
        Some(AgentCommand { operation_id: format!("op{}", self.operations), term: 1 })
    }

    /// The run directory of a VM.
    pub(crate) fn run_dir(&self, vm: &str) -> RunDir {
        RunDir::new(&self.directory.path().join("run"), vm)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for entry in std::fs::read_dir(self.directory.path().join("run")).into_iter().flatten() {
            let name = entry.unwrap().file_name();
            end_qemu(&self.run_dir(&name.to_string_lossy()));
        }
        end_stores(&self.directory.path().join("state/stores"));
    }
}

/// By the same proof of identity as the agent's, and then by its pidfd.
fn end_qemu(run_dir: &RunDir) {
    if let Ok(Some(process)) = QemuProcess::adopt(run_dir)
        && let Some(pid) = rustix::process::Pid::from_raw(process.pid().cast_signed())
    {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Those of the records; a process counts only while it works in its store's folder.
fn end_stores(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let text = std::fs::read(entry.path()).unwrap_or_default();
        let record: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
        let pid = record["process"].as_u64().unwrap_or(0);
        let works_in = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        if pid != 0 && works_in.starts_with(directory) {
            let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

async fn connect(path: PathBuf) -> Result<AgentClient<Channel>, tonic::transport::Error> {
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://agent").connect_with_connector(connector).await?;
    Ok(AgentClient::new(channel))
}

/// The status of one VM.
pub(crate) async fn status(client: &mut AgentClient<Channel>, vm: &str) -> VmStatus {
    let listed = client.list_vms(ListVmsRequest {}).await.unwrap().into_inner();
    let named = |status: &VmStatus| status.definition.as_ref().is_some_and(|d| d.name == vm);
    listed.vms.into_iter().find(named).unwrap_or_else(|| panic!("no VM {vm}"))
}

/// A definition without kernel, NIC or disk: its firmware runs, and finds nothing to boot.
pub(crate) fn bare_definition(name: &str) -> String {
    format!(
        "name = \"{name}\"\nmemory = \"64 MiB\"\nvcpus = 1\nmachine = \"pc-i440fx-7.2\"\ncpu_model = \"qemu64\"\n"
    )
}

/// Whether a process with this id is there and no zombie.
pub(crate) fn is_alive(pid: u32) -> bool {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(Path::new(&path)).unwrap_or_default();
    lifeboat_agent::qemu::procfs::parse_stat(&stat).is_some_and(|stat| stat.state != 'Z')
}
