//! A small site of this machine: hosts with real agents, a controller, and the operator's command to
//! ask it with. All in one network namespace, without a switch.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lifeboat_agent::qemu::run_dir::RunDir;
use lifeboat_tests::clock;
use lifeboat_tests::rig::private;
use lifeboat_tests::rig::userfaultfd::Allowed;
use lifeboat_tests::world::inside;
use serde_json::Value;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(90);

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where a test's processes live: a folder, in namespaces that end with the test.
pub(crate) struct Place {
    pub(crate) folder: TempDir,
    _allowed: Allowed,
}

impl Place {
    /// `None` outside: the test of this name has just been run inside, and has passed.
    pub(crate) fn of(name: &str) -> Option<Self> {
        if !inside::is_inside() {
            assert!(inside::run_inside(name).unwrap().success(), "see above");
            return None;
        }
        private::settle().unwrap();
        Some(Self { folder: tempfile::tempdir().unwrap(), _allowed: Allowed::now().unwrap() })
    }
}

/// What a site begins with.
pub(crate) struct Begin<'a> {
    /// Hosts `h1` and so on; the link of the last one is a twentieth of the others'.
    pub(crate) hosts: u16,
    /// The rack of each; none: all are in one.
    pub(crate) racks: &'a [&'a str],
    /// QEMU, where it is not the installed one.
    pub(crate) qemu: Option<&'a Path>,
    /// Definitions of h1, by name.
    pub(crate) vms: &'a [(&'a str, String)],
    /// Profiles of QEMU arguments, by name; every host has them.
    pub(crate) profiles: &'a [(&'a str, String)],
    /// What one host has in place of redis-server.
    pub(crate) redis: Option<(u16, &'a Path)>,
}

impl<'a> Begin<'a> {
    /// So many hosts, with these guests at the first.
    pub(crate) fn of(hosts: u16, vms: &'a [(&'a str, String)]) -> Self {
        Self { hosts, racks: &[], qemu: None, vms, profiles: &[], redis: None }
    }
}

/// The site. Its processes end with the test's namespaces.
pub(crate) struct Site {
    folder: PathBuf,
    hosts: u16,
    controller: Option<Process>,
    agents: Vec<Process>,
}

pub(crate) fn images() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let made = Command::new(root.join("lab/image")).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    root.join("lab/build")
}

fn spawn(program: &str, arguments: &[&str], log: &Path) -> Process {
    let log = File::options().create(true).append(true).open(log).unwrap();
    let mut command = Command::new(private::built(program).unwrap());
    command.args(arguments).env("NO_COLOR", "1").stdin(Stdio::null());
    command.stdout(log.try_clone().unwrap()).stderr(log);
    Process(command.spawn().unwrap())
}

pub(crate) fn open_to_all(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

impl Site {
    pub(crate) fn start(folder: &Path, images: &Path, begin: &Begin<'_>) -> Self {
        open_to_all(folder);
        let (folder, hosts) = (folder.to_owned(), begin.hosts);
        let mut site = Self { folder, hosts, controller: None, agents: Vec::new() };
        for number in 1..=hosts {
            site.agents.push(site.agent(number, images, begin));
        }
        fs::write(site.folder.join("lab.toml"), site.configuration(begin.racks)).unwrap();
        site.start_controller();
        site
    }

    fn agent(&self, number: u16, images: &Path, begin: &Begin<'_>) -> Process {
        let own = self.folder.join(format!("h{number}"));
        for folder in ["vms", "profiles"] {
            fs::create_dir_all(own.join(folder)).unwrap();
        }
        open_to_all(&own);
        for (name, definition) in begin.vms.iter().filter(|_| number == 1) {
            fs::write(own.join(format!("vms/{name}.toml")), definition).unwrap();
        }
        for (name, profile) in begin.profiles {
            fs::write(own.join(format!("profiles/{name}.toml")), profile).unwrap();
        }
        let program = |program: &Path| format!("program = \"{}\"\n", program.display());
        let qemu = begin.qemu.map(program);
        let redis = begin.redis.filter(|(host, _)| *host == number);
        let redis = redis.map(|(_, path)| program(path));
        let text = format!(
            "host = \"h{number}\"\nlisten = [\"unix:{0}/agent.sock\"]\n\
             page_listen = \"127.0.0.1:70{number:02}\"\npage_address = \"127.0.0.1:70{number:02}\"\n\
             state_dir = \"{0}/state\"\nrun_dir = \"{0}/qemu\"\nimages_dir = \"{1}\"\n\
             vms_dir = \"{0}/vms\"\nprofiles_dir = \"{0}/profiles\"\nmemory = \"1 GiB\"\n\
             roles = [\"hypervisor\", \"intermediary\"]\n\
             [qemu]\nuser = \"nobody\"\naccelerator = \"tcg\"\n{2}\
             [ovs]\ndatabase = \"unix:{0}/no-switch-here.sock\"\n\
             [intermediary]\nports = \"71{number}0-71{number}9\"\n{3}",
            own.display(),
            images.display(),
            qemu.unwrap_or_default(),
            redis.unwrap_or_default(),
        );
        let file = own.join("agent.toml");
        fs::write(&file, text).unwrap();
        let file = file.display().to_string();
        spawn("lifeboat-agent", &["--config", &file], &own.join("agent.log"))
    }

    fn configuration(&self, racks: &[&str]) -> String {
        let dir = self.folder.display();
        let mut text = format!(
            "[controller]\nlisten = [\"unix:{dir}/controller.sock\"]\nstate_dir = \"{dir}/controller\"\n\
             metrics_listen = \"off\"\n[policy]\nmeasure_window_ms = 200\n\
             [[switch]]\nname = \"s1\"\ndatapath_id = \"1\"\novsdb = \"unix:{dir}/no-switch.sock\"\n"
        );
        for number in 1..=self.hosts {
            let name = format!("h{number}");
            let capacity = if number == self.hosts { "20 Mbit/s" } else { "400 Mbit/s" };
            let rack = racks.get(usize::from(number - 1));
            let rack = rack.map(|rack| format!("rack = \"{rack}\"\n")).unwrap_or_default();
            text.push_str(&format!(
                "[[host]]\nname = \"{name}\"\nagent = \"unix:{dir}/{name}/agent.sock\"\n\
                 ovsdb = \"unix:{dir}/no-switch.sock\"\nbridge = \"br0\"\nuplink = \"{name}-eth0\"\n\
                 address = \"127.0.0.1\"\n{rack}\
                 [[link]]\na = \"s1:s1-{name}\"\nb = \"{name}:{name}-eth0\"\ncapacity = \"{capacity}\"\n"
            ));
        }
        text
    }

    pub(crate) fn start_controller(&mut self) {
        self.controller = None;
        let file = self.folder.join("lab.toml").display().to_string();
        let log = self.folder.join("controller.log");
        self.controller = Some(spawn("lifeboat", &["controller", "--config", &file], &log));
    }

    /// A command's reply; its words where it has none.
    pub(crate) fn ask(&self, line: &str) -> Result<Value, String> {
        let mut command = Command::new(private::built("lifeboat").unwrap());
        command.arg("--server").arg(format!("unix:{}/controller.sock", self.folder.display()));
        let output = command.args(line.split_whitespace()).arg("--json").output().unwrap();
        serde_json::from_slice(&output.stdout)
            .map_err(|_| String::from_utf8_lossy(&output.stderr).into_owned())
    }

    pub(crate) fn await_that(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let held = clock::wait_for(PATIENCE, || holds().then_some(()));
        assert!(held.is_some(), "{what}; the status: {:?}", self.ask("status"));
    }

    pub(crate) fn await_sight(&self, host: &str) {
        self.await_running(host, 1);
    }

    /// The controller sees every host, and so many VMs that run at this one.
    pub(crate) fn await_running(&self, host: &str, number: usize) {
        self.await_that("the controller sees all", || {
            let hosts = self.ask("hosts").unwrap_or_default();
            let seen = hosts["hosts"]
                .as_array()
                .map_or(0, |hosts| hosts.iter().filter(|host| host["connected"] == true).count());
            let vms = self.ask("vms").unwrap_or_default();
            let at = |vm: &&Value| vm["host"] == host && vm["state"] == "running";
            let running = vms["vms"].as_array().map_or(0, |vms| vms.iter().filter(at).count());
            seen == usize::from(self.hosts) && running >= number
        });
    }

    /// Where the QEMU of a VM of this host has its sockets.
    pub(crate) fn run_dir(&self, host: &str, vm: &str) -> RunDir {
        RunDir::new(&self.folder.join(host).join("qemu"), vm)
    }

    fn lines(&self, host: &str, words: &str) -> usize {
        let log = fs::read(self.run_dir(host, "vm").serial_log()).unwrap_or_default();
        String::from_utf8_lossy(&log).lines().filter(|line| line.contains(words)).count()
    }

    /// The guest goes on at a host and finds its memory whole.
    pub(crate) fn ticks_on(&self, host: &str) {
        let before = self.lines(host, "LIFEBOAT-TICK");
        self.await_that("the guest goes on", || self.lines(host, "LIFEBOAT-TICK") > before + 4);
        assert_eq!(self.lines(host, "LIFEBOAT-CORRUPT"), 0, "wrong bytes at {host}");
    }

    pub(crate) fn status(&self, id: &str) -> Value {
        self.ask(&format!("status {id}")).unwrap_or_default()["evacuations"][0].clone()
    }

    pub(crate) fn stores(&self) -> usize {
        let folders =
            (1..=self.hosts).map(|number| self.folder.join(format!("h{number}/state/stores")));
        folders.flat_map(fs::read_dir).flatten().flatten().count()
    }
}
