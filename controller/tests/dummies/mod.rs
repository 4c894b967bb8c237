//! Real Open vSwitches without a kernel: bridges of type `dummy`, whose ports are joined by sockets.
//!
//! Each [`Switches`] is one ovsdb-server with one ovs-vswitchd, and may have several bridges; a test
//! may have several of them. Packets pass, ports go down, rows and flows are as anywhere; only
//! queues shape and count nothing. Needs no root and no namespace.

#![allow(dead_code, reason = "each test program uses a part of this")]

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lifeboat_controller::config::Site;
use lifeboat_controller::network::{Network, PortRef};
use lifeboat_protocol::ids::SwitchId;

pub(crate) struct Switches {
    dir: tempfile::TempDir,
    server: Option<Child>,
    switch: Option<Child>,
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) = (&output.stdout, String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {err}");
    String::from_utf8_lossy(out).into_owned()
}

/// Asks until it is so.
pub(crate) async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    for _ in 0..1000 {
        if is_so().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("not within 20 s: {what}");
}

/// A port of this machine that nobody listens on.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub(crate) fn port(switch: &str, port: &str) -> PortRef {
    PortRef { switch: SwitchId::new(switch).unwrap(), port: port.to_owned() }
}

impl Switches {
    pub(crate) async fn start() -> Self {
        let mut switches = Self { dir: tempfile::tempdir().unwrap(), server: None, switch: None };
        let schema = "/usr/share/openvswitch/vswitch.ovsschema";
        let database = switches.path("conf.db");
        run(Command::new("ovsdb-tool").arg("create").arg(&database).arg(schema));
        switches.start_server().await;
        switches.vsctl("--no-wait init");
        let mut daemon = switches.daemon("ovs-vswitchd");
        daemon.arg("--enable-dummy").arg(switches.database());
        switches.switch = Some(daemon.spawn().expect("ovs-vswitchd must be installed"));
        switches.wait_for("ovs-vswitchd.ctl").await;
        switches
    }

    fn daemon(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for variable in ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR", "OVS_SYSCONFDIR"] {
            command.env(variable, self.dir.path());
        }
        command.arg(format!("--unixctl={}", self.path(&format!("{program}.ctl")).display()));
        command.args(["-vconsole:off", "-vsyslog:off"]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Starts ovsdb-server, the first time or again.
    pub(crate) async fn start_server(&mut self) {
        let mut server = self.daemon("ovsdb-server");
        server.arg(self.path("conf.db"));
        server.arg(format!("--remote=punix:{}", self.path("db.sock").display()));
        self.server = Some(server.spawn().expect("ovsdb-server must be installed"));
        self.wait_for("db.sock").await;
    }

    /// Ends ovsdb-server as a crash would.
    pub(crate) fn kill_server(&mut self) {
        end(&mut self.server);
        let _ = std::fs::remove_file(self.path("db.sock"));
    }

    async fn wait_for(&self, file: &str) {
        eventually(file, async || self.path(file).exists()).await;
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// Where its database listens.
    pub(crate) fn database(&self) -> String {
        format!("unix:{}", self.path("db.sock").display())
    }

    /// A bridge with these ports that connects to a controller on `controller`.
    pub(crate) fn bridge(&self, name: &str, id: u64, ports: &[&str], controller: u16) {
        let ports: Vec<String> = ports
            .iter()
            .map(|port| format!("-- add-port {name} {port} -- set interface {port} type=dummy"))
            .collect();
        self.vsctl(&format!(
            "--id=@c create Controller target=\"tcp:127.0.0.1:{controller}\" max_backoff=1000 \
             connection_mode=out-of-band -- add-br {name} -- set bridge {name} \
             datapath_type=dummy protocols=OpenFlow13 fail-mode=secure controller=@c \
             other-config:datapath-id={id:016x} {}",
            ports.join(" ")
        ));
        // Forwarding is somebody else's business, and forwards nothing.
        self.ofctl(name, "add-flow", "priority=0,actions=drop");
    }

    /// Two hosts' bridges, and two ways between them over s1, s2 and s3, cabled by `links` (ends
    /// written `NODE:PORT`); with the port that its switches look for a controller on.
    pub(crate) async fn diamond(links: &[(&str, &str)]) -> (Self, u16) {
        let (switches, listen) = (Self::start().await, free_port());
        switches.bridge("br-h1", 0xb1, &["u1"], listen);
        switches.bridge("br-h2", 0xb2, &["u2"], listen);
        switches.bridge("s1", 1, &["a1", "a2", "a3"], listen);
        switches.bridge("s2", 2, &["b1", "b2", "b3"], listen);
        switches.bridge("s3", 3, &["c1", "c2"], listen);
        for (a, b) in links {
            let name = |end: &str| end.split_once(':').unwrap().1.to_owned();
            switches.join(&name(a), &name(b));
        }
        (switches, listen)
    }

    /// Joins two ports by a socket.
    pub(crate) fn join(&self, a: &str, b: &str) {
        let socket = self.path(&format!("{a}-{b}"));
        let socket = socket.display();
        self.vsctl(&format!(
            "set interface {a} options:pstream=punix:{socket} -- \
             set interface {b} options:stream=unix:{socket}"
        ));
    }

    /// Takes a cable away from a port that listens: packets end, and nobody is told.
    pub(crate) fn unplug(&self, port: &str) {
        self.vsctl(&format!("remove interface {port} options stream"));
    }

    /// Takes a port down or up; the switch tells its controller.
    pub(crate) fn set_port(&self, port: &str, state: &str) {
        self.appctl(&["netdev-dummy/set-admin-state", port, state]);
    }

    fn appctl(&self, words: &[&str]) -> String {
        run(Command::new("ovs-appctl").arg("-t").arg(self.path("ovs-vswitchd.ctl")).args(words))
    }

    /// `ovs-vsctl` with these words.
    pub(crate) fn vsctl(&self, words: &str) -> String {
        let database = format!("--db={}", self.database());
        run(Command::new("ovs-vsctl")
            .args([&database, "--timeout=10"])
            .args(words.split_whitespace()))
    }

    /// `ovs-ofctl VERB BRIDGE WORDS`.
    pub(crate) fn ofctl(&self, bridge: &str, verb: &str, words: &str) -> String {
        let socket = format!("unix:{}", self.path(&format!("{bridge}.mgmt")).display());
        let mut command = Command::new("ovs-ofctl");
        command.args(["-O", "OpenFlow13", "--no-stats", "--sort", verb, &socket]);
        run(command.args(words.split_whitespace()))
    }

    /// A bridge's flows.
    pub(crate) fn flows(&self, bridge: &str) -> String {
        self.ofctl(bridge, "dump-flows", "")
    }

    /// The OpenFlow number of a port.
    pub(crate) fn number(&self, port: &str) -> String {
        self.vsctl(&format!("get interface {port} ofport")).trim().to_owned()
    }

    /// CPU time that ovs-vswitchd has taken, in seconds (`/proc/PID/stat`, in ticks of 10 ms).
    pub(crate) fn switch_cpu(&self) -> f64 {
        let pid = self.switch.as_ref().map_or(0, Child::id);
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit(") ").next().unwrap_or_default().split_whitespace();
        let ticks = fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok());
        ticks.sum::<f64>() / 100.0
    }

    /// All rows of QoS and Queue.
    pub(crate) fn queues(&self) -> String {
        ["QoS", "Queue"].map(|table| self.vsctl(&format!("list {table}"))).concat()
    }
}

fn end(child: &mut Option<Child>) {
    if let Some(mut child) = child.take() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Switches {
    fn drop(&mut self) {
        end(&mut self.switch);
        end(&mut self.server);
    }
}

/// Waits until every switch is there with all of its ports.
pub(crate) async fn connected(network: &dyn Network) {
    eventually("all switches connect", async || {
        let switches = network.switches().await;
        let numbered = |s: &lifeboat_controller::network::SwitchStatus| {
            s.ports.len() > 1
                && s.ports
                    .iter()
                    .filter(|p| !p.peer.is_empty())
                    .all(|p| p.number > 0 || p.ability.pace_only().is_some())
        };
        switches.iter().all(|s| s.openflow_connected && s.ovsdb_connected && numbered(s))
    })
    .await;
}

/// Hosts h1 and h2 with agents at `agents`/hN.sock, and these fabric switches and links.
pub(crate) fn site(
    head: &str,
    agents: &Path,
    hosts: &str,
    switches: &[(&str, u64, &str)],
    links: &[(&str, &str)],
    capacity: &str,
) -> Site {
    let agents = agents.display();
    let mut text = format!(
        "[controller]\nlisten = [\"unix:{agents}/c.sock\"]\nstate_dir = \"{agents}/state\"\n\
         metrics_listen = \"off\"\n{head}\n"
    );
    for n in 1..=2 {
        text.push_str(&format!(
            "[[host]]\nname = \"h{n}\"\nagent = \"unix:{agents}/h{n}.sock\"\novsdb = \"{hosts}\"\n\
             bridge = \"br-h{n}\"\nuplink = \"u{n}\"\naddress = \"10.0.0.{n}\"\n"
        ));
    }
    for (name, id, ovsdb) in switches {
        text.push_str(&format!(
            "[[switch]]\nname = \"{name}\"\ndatapath_id = \"{id:x}\"\novsdb = \"{ovsdb}\"\n\
             migration_budget = \"50 Mbit/s\"\n"
        ));
    }
    for (a, b) in links {
        text.push_str(&format!("[[link]]\na = \"{a}\"\nb = \"{b}\"\ncapacity = \"{capacity}\"\n"));
    }
    Site::parse(Path::new("test.toml"), &text).unwrap()
}
