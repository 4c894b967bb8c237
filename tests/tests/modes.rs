//! A host is emptied by post-copy, and another by scatter-gather over three intermediaries, through
//! the operator's command; the guest goes on and finds its memory whole.
//!
//! Real QEMU, redis-server, agents and controller as processes, in one network namespace; needs root
//! and `lab/image`'s guest. QEMU's user needs userfaultfd: the machine's setting is put back.

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

const PATIENCE: Duration = Duration::from_secs(90);
const HOSTS: u16 = 5;

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Site {
    folder: PathBuf,
    controller: Option<Process>,
    agents: Vec<Process>,
}

fn images() -> PathBuf {
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

fn open_to_all(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

impl Site {
    fn start(folder: &Path) -> Self {
        let images = images();
        let mut site = Self { folder: folder.to_owned(), controller: None, agents: Vec::new() };
        for number in 1..=HOSTS {
            site.agents.push(site.agent(number, &images));
        }
        fs::write(folder.join("lab.toml"), site.configuration()).unwrap();
        site.start_controller();
        site
    }

    fn agent(&self, number: u16, images: &Path) -> Process {
        let own = self.folder.join(format!("h{number}"));
        for folder in ["vms", "profiles"] {
            fs::create_dir_all(own.join(folder)).unwrap();
        }
        open_to_all(&own);
        if number == 1 {
            fs::write(own.join("vms/vm.toml"), definition()).unwrap();
        }
        let text = format!(
            "host = \"h{number}\"\nlisten = [\"unix:{0}/agent.sock\"]\n\
             page_listen = \"127.0.0.1:70{number:02}\"\npage_address = \"127.0.0.1:70{number:02}\"\n\
             state_dir = \"{0}/state\"\nrun_dir = \"{0}/qemu\"\nimages_dir = \"{1}\"\n\
             vms_dir = \"{0}/vms\"\nprofiles_dir = \"{0}/profiles\"\nmemory = \"1 GiB\"\n\
             roles = [\"hypervisor\", \"intermediary\"]\n\
             [qemu]\nuser = \"nobody\"\naccelerator = \"tcg\"\n\
             [ovs]\ndatabase = \"unix:{0}/no-switch-here.sock\"\n\
             [intermediary]\nports = \"71{number}0-71{number}9\"\n",
            own.display(),
            images.display(),
        );
        let file = own.join("agent.toml");
        fs::write(&file, text).unwrap();
        let file = file.display().to_string();
        spawn("lifeboat-agent", &["--config", &file], &own.join("agent.log"))
    }

    fn configuration(&self) -> String {
        let dir = self.folder.display();
        let mut text = format!(
            "[controller]\nlisten = [\"unix:{dir}/controller.sock\"]\nstate_dir = \"{dir}/controller\"\n\
             metrics_listen = \"off\"\n[policy]\nmeasure_window_ms = 200\n\
             [[switch]]\nname = \"s1\"\ndatapath_id = \"1\"\novsdb = \"unix:{dir}/no-switch.sock\"\n"
        );
        for number in 1..=HOSTS {
            let name = format!("h{number}");
            let capacity = if number == HOSTS { "20 Mbit/s" } else { "400 Mbit/s" };
            text.push_str(&format!(
                "[[host]]\nname = \"{name}\"\nagent = \"unix:{dir}/{name}/agent.sock\"\n\
                 ovsdb = \"unix:{dir}/no-switch.sock\"\nbridge = \"br0\"\nuplink = \"{name}-eth0\"\n\
                 address = \"127.0.0.1\"\n\
                 [[link]]\na = \"s1:s1-{name}\"\nb = \"{name}:{name}-eth0\"\ncapacity = \"{capacity}\"\n"
            ));
        }
        text
    }

    fn start_controller(&mut self) {
        self.controller = None;
        let file = self.folder.join("lab.toml").display().to_string();
        let log = self.folder.join("controller.log");
        self.controller = Some(spawn("lifeboat", &["controller", "--config", &file], &log));
    }

    /// A command's reply; its words where it has none.
    fn ask(&self, line: &str) -> Result<Value, String> {
        let mut command = Command::new(private::built("lifeboat").unwrap());
        command.arg("--server").arg(format!("unix:{}/controller.sock", self.folder.display()));
        let output = command.args(line.split_whitespace()).arg("--json").output().unwrap();
        serde_json::from_slice(&output.stdout)
            .map_err(|_| String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn await_that(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let held = clock::wait_for(PATIENCE, || holds().then_some(()));
        assert!(held.is_some(), "{what}; the status: {:?}", self.ask("status"));
    }

    fn await_sight(&self, host: &str) {
        self.await_that("the controller sees all", || {
            let hosts = self.ask("hosts").unwrap_or_default();
            let seen = hosts["hosts"]
                .as_array()
                .map_or(0, |hosts| hosts.iter().filter(|host| host["connected"] == true).count());
            let vms = self.ask("vms").unwrap_or_default();
            let at = |vm: &Value| vm["host"] == host && vm["state"] == "running";
            seen == usize::from(HOSTS) && vms["vms"].as_array().is_some_and(|v| v.iter().any(at))
        });
    }

    fn lines(&self, host: &str, words: &str) -> usize {
        let folder = self.folder.join(host).join("qemu");
        let log = fs::read(RunDir::new(&folder, "vm").serial_log()).unwrap_or_default();
        String::from_utf8_lossy(&log).lines().filter(|line| line.contains(words)).count()
    }

    /// The guest goes on at a host and finds its memory whole.
    fn ticks_on(&self, host: &str) {
        let before = self.lines(host, "LIFEBOAT-TICK");
        self.await_that("the guest goes on", || self.lines(host, "LIFEBOAT-TICK") > before + 4);
        assert_eq!(self.lines(host, "LIFEBOAT-CORRUPT"), 0, "wrong bytes at {host}");
    }

    fn status(&self, id: &str) -> Value {
        self.ask(&format!("status {id}")).unwrap_or_default()["evacuations"][0].clone()
    }

    fn stores(&self) -> usize {
        let folders = (1..=HOSTS).map(|number| self.folder.join(format!("h{number}/state/stores")));
        folders.flat_map(fs::read_dir).flatten().flatten().count()
    }
}

fn definition() -> String {
    format!(
        "name = \"vm\"\nmemory = \"128 MiB\"\nvcpus = 1\nmachine = \"pc-i440fx-7.2\"\n\
         cpu_model = \"max\"\nkernel = \"vmlinuz\"\ninitrd = \"initrd\"\nautostart = true\n\
         kernel_arguments = \"console=ttyS0 quiet panic=-1 nokaslr tsc=unstable mitigations=off \
         lb.name=vm lb.role=idle lb.region={} lb.dirty=100 lb.check=500\"\n",
        24 << 20
    )
}

#[test]
fn hosts_are_emptied_by_post_copy_and_by_scatter_gather() {
    let name = "hosts_are_emptied_by_post_copy_and_by_scatter_gather";
    if !inside::is_inside() {
        assert!(inside::run_inside(name).unwrap().success(), "see above");
        return;
    }
    private::settle().unwrap();
    let _allowed = Allowed::now().unwrap();
    let folder = tempfile::tempdir().unwrap();
    open_to_all(folder.path());
    let mut site = Site::start(folder.path());
    site.await_sight("h1");
    site.ticks_on("h1");

    // Nobody asked for a mode: where the destination takes in what the source sends, pre-copy; where
    // it has a twentieth of that, the pages wait elsewhere. The plan says why.
    let plan = site.ask("plan h1 --to h2 --urgency 90").unwrap();
    let vm = &plan["vms"][0];
    assert_eq!((&plan["mode"], &vm["mode"]), (&"auto".into(), &"pre-copy".into()), "{plan}");
    assert!(vm["why_mode"].as_str().is_some_and(|why| why.contains("loses nothing")), "{vm}");
    let plan = site.ask("plan h1 --to h5 --urgency 90").unwrap();
    let vm = &plan["vms"][0];
    assert_eq!(vm["mode"], "scatter-gather", "{plan}");
    assert!(vm["why_mode"].as_str().is_some_and(|why| why.contains("off the source")), "{vm}");
    assert_eq!(vm["stores"].as_array().map_or(0, Vec::len), 3, "{vm}");
    let likely = |figure: &str| vm[figure]["likely"].as_f64().unwrap_or_default();
    assert!(likely("eviction_ms") > 0.0 && likely("eviction_ms") < likely("total_ms"), "{vm}");

    let report = site.ask("evacuate h1 --to h2 --urgency 0 --mode post-copy --yes").unwrap();
    let id = "e1";
    let report = if report["vms"].is_array() { report } else { site.ask("report e1").unwrap() };
    let vm = &report["vms"][0];
    assert_eq!((&vm["outcome"], &vm["mode"]), (&"moved".into(), &"post-copy".into()), "{vm}");
    assert!(site.status(id)["migrations"][0]["pages_total"].as_u64() > Some(0));
    site.ticks_on("h2");

    site.await_sight("h2");
    let too_few = "plan h2 --to h1 --urgency 0 --mode scatter-gather --redundancy parity \
                   --intermediaries h3,h4";
    let plan = site.ask(too_few).unwrap();
    let why = plan["left_behind"][0]["reason"].as_str().unwrap_or_default();
    assert!(why.contains("needs 3 intermediaries"), "{plan}");

    let begun = site.ask(
        "evacuate h2 --to h1 --urgency 0 --mode scatter-gather --intermediaries h3,h4,h5 --yes \
         --detach",
    );
    let begun = begun.unwrap();
    let id = begun["evacuation"].as_str().unwrap().to_owned();
    let planned = begun["plan"]["vms"][0]["stores"].as_array().map_or(0, Vec::len);
    assert_eq!((planned, &begun["plan"]["vms"][0]["redundancy"]), (3, &"parity".into()));
    // The controller is killed once the source has begun; the next one goes on and owes the stores. (One
    // that is killed before would have to begin anew elsewhere, and there is no other destination.)
    site.await_that("pages are on their way, and stores are owed", || {
        let status = site.status(&id);
        let begun = !["", "measuring", "reserving", "preparing"]
            .contains(&status["migrations"][0]["phase"].as_str().unwrap_or_default())
            && status["migrations"][0]["bytes_sent"].as_u64() > Some(0);
        begun && status["pending_stores"].as_array().is_some_and(|stores| stores.len() == 3)
    });
    site.start_controller();
    site.await_that("it has moved", || {
        let status = site.status(&id);
        status["state"] == "done" || status["state"] == "failed"
    });
    let report = site.ask(&format!("report {id}")).unwrap();
    let vm = &report["vms"][0];
    assert_eq!(vm["outcome"], "moved", "{vm}");
    assert_eq!(vm["stores"].as_array().map_or(0, Vec::len), 3, "{vm}");
    assert!(vm["eviction_ms"].as_u64() > Some(0), "{vm}");
    assert!(vm["total_ms"].as_u64() >= vm["eviction_ms"].as_u64(), "{vm}");
    site.ticks_on("h1");
    site.await_that("the stores have gone", || {
        let owed = &site.status(&id)["pending_stores"];
        owed.as_array().is_none_or(Vec::is_empty)
    });
    println!("{vm}\nstore folders left: {}", site.stores());
}
