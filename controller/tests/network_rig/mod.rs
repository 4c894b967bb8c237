//! A real Open vSwitch for each test, with three bridges in a network namespace of its own:
//!
//! ```text
//!  br-h1 (host h1) u1 ════ d1  s1  d2 ════ u2 br-h2 (host h2)
//! ```
//!
//! The test's thread moves into the namespace, so that the controller listens on a loopback address
//! that only these switches have. Needs ovsdb-server, ovs-vswitchd, ip, tc and root. Daemons are
//! children and are ended by their handle; the namespace goes with the rig.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::{BoxFuture, ready};
use lifeboat_controller::agents::AgentError;
use lifeboat_controller::config::Site;
use lifeboat_controller::network::{
    ClassifierError, Classifiers, Hop, Network, PageFlow, PortRef, ReservationRequest, Shaping,
    SwitchNetwork,
};
use lifeboat_protocol::ids::{EvacuationId, HostId, MigrationId, SwitchId};
use lifeboat_protocol::terms::{ReservationKind, Urgency};
use lifeboat_protocol::units::BitsPerSec;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The bridges.
pub(crate) const BRIDGES: [&str; 3] = ["br-h1", "s1", "br-h2"];

pub(crate) struct Rig {
    dir: tempfile::TempDir,
    namespace: String,
    server: Option<Child>,
    switch: Option<Child>,
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) = (&output.stdout, String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {err}");
    String::from_utf8_lossy(out).into_owned()
}

/// Runs a program with these words.
pub(crate) fn tool(words: &str) -> String {
    let mut words = words.split_whitespace();
    run(Command::new(words.next().unwrap()).args(words))
}

/// Asks until it is so.
pub(crate) async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    for _ in 0..400 {
        if is_so().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not within 20 s: {what}");
}

impl Rig {
    pub(crate) async fn start() -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("lbnet-{}-{number}", std::process::id());
        tool(&format!("ip netns add {namespace}"));
        let (dir, server) = (tempfile::tempdir().unwrap(), None);
        let mut rig = Self { dir, namespace, server, switch: None };
        let file = std::fs::File::open(format!("/run/netns/{}", rig.namespace)).unwrap();
        let kind = rustix::thread::LinkNameSpaceType::Network;
        rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(kind))
            .expect("tests of real switches need root");
        tool("ip link set lo up");
        for (port, peer) in [("u1", "d1"), ("u2", "d2")] {
            tool(&format!("ip link add {port} up type veth peer name {peer}"));
            tool(&format!("ip link set {peer} up"));
        }
        let schema = "/usr/share/openvswitch/vswitch.ovsschema";
        tool(&format!("ovsdb-tool create {} {schema}", rig.path("conf.db").display()));
        rig.server = Some(rig.daemon("ovsdb-server", "conf.db", "--remote=punix:"));
        rig.wait_for("db.sock").await;
        rig.vsctl("--no-wait init");
        rig.start_switch().await;
        for (bridge, ports) in [("br-h1", "u1"), ("s1", "d1 d2"), ("br-h2", "u2")] {
            rig.bridge(bridge, ports);
        }
        rig
    }

    fn daemon(&self, program: &str, database: &str, remote: &str) -> Child {
        let mut command = Command::new(program);
        for variable in ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR", "OVS_SYSCONFDIR"] {
            command.env(variable, self.dir.path());
        }
        let socket = self.path("db.sock");
        match remote {
            "" => command.arg(format!("unix:{}", socket.display())),
            remote => command.arg(self.path(database)).arg(format!("{remote}{}", socket.display())),
        };
        let control = self.path(&format!("{program}.ctl"));
        command.arg(format!("--unixctl={}", control.display()));
        command.args(["-vconsole:off", "-vsyslog:off"]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect(program)
    }

    fn bridge(&self, bridge: &str, ports: &str) {
        let id = BRIDGES.iter().position(|name| *name == bridge).unwrap() + 1;
        let ports: Vec<String> =
            ports.split(' ').map(|port| format!("-- add-port {bridge} {port}")).collect();
        self.vsctl(&format!(
            "--id=@c create Controller target=\"tcp:127.0.0.1:6653\" max_backoff=1000 \
             connection_mode=out-of-band -- add-br {bridge} -- set bridge {bridge} \
             datapath_type=netdev protocols=OpenFlow13 fail-mode=secure controller=@c \
             other-config:datapath-id={id:016x} {}",
            ports.join(" ")
        ));
        self.ofctl(bridge, "add-flow", "priority=0,actions=NORMAL");
    }

    /// Starts ovs-vswitchd, the first time or again.
    pub(crate) async fn start_switch(&mut self) {
        self.switch = Some(self.daemon("ovs-vswitchd", "", ""));
        self.wait_for("ovs-vswitchd.ctl").await;
    }

    /// Ends ovs-vswitchd as a crash would.
    pub(crate) fn kill_switch(&mut self) {
        end(&mut self.switch);
        let _ = std::fs::remove_file(self.path("ovs-vswitchd.ctl"));
    }

    async fn wait_for(&self, file: &str) {
        eventually(file, async || self.path(file).exists()).await;
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// `ovs-vsctl` with these words.
    pub(crate) fn vsctl(&self, words: &str) -> String {
        let database = format!("--db=unix:{}", self.path("db.sock").display());
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

    /// What a packet that enters a bridge by its own port would meet.
    pub(crate) fn trace(&self, bridge: &str, flow: &str) -> String {
        let control = self.path("ovs-vswitchd.ctl");
        run(Command::new("ovs-appctl").arg("-t").arg(control).args(["ofproto/trace", bridge, flow]))
    }

    /// Everything that a reservation may touch.
    pub(crate) fn everything(&self) -> String {
        let flows = BRIDGES.map(|bridge| self.flows(bridge)).concat();
        let rows = ["QoS", "Queue"].map(|table| self.vsctl(&format!("list {table}"))).concat();
        let ports = self.vsctl("--columns=name,qos list Port");
        let shaped = ["u1", "d1", "d2", "u2"]
            .map(|port| tool(&format!("tc class show dev {port}")))
            .concat();
        flows + &rows + &ports + &shaped
    }

    /// The configuration of a controller for these switches.
    pub(crate) fn site(&self) -> Site {
        Self::read(&self.text())
    }

    /// A configuration from its text.
    pub(crate) fn read(text: &str) -> Site {
        Site::parse(Path::new("lab.toml"), text).unwrap()
    }

    /// The same as text.
    pub(crate) fn text(&self) -> String {
        let database = format!("unix:{}", self.path("db.sock").display());
        let host = |n: u32| {
            format!(
                "[[host]]\nname = \"h{n}\"\nagent = \"127.0.0.1:700{n}\"\novsdb = \"{database}\"\n\
                 bridge = \"br-h{n}\"\nuplink = \"u{n}\"\naddress = \"10.0.0.{n}\"\n"
            )
        };
        let link = |n: u32| {
            format!("[[link]]\na = \"s1:d{n}\"\nb = \"h{n}:u{n}\"\ncapacity = \"100 Mbit/s\"\n")
        };
        format!(
            "[controller]\nlisten = [\"127.0.0.1:7443\"]\nopenflow_listen = \"127.0.0.1:6653\"\n\
             state_dir = \"/nonexistent\"\n{}{}[[switch]]\nname = \"s1\"\ndatapath_id = \"2\"\n\
             ovsdb = \"{database}\"\nagent = \"127.0.0.1:7009\"\nagent_name = \"fabric\"\n{}{}",
            host(1),
            host(2),
            link(1),
            link(2)
        )
    }

    /// A controller's network, connected to all switches.
    pub(crate) async fn network(&self) -> (SwitchNetwork, Arc<Recorder>) {
        self.network_on(Recorder::default().shaping).await
    }

    /// The same on machines whose kernels can do so much.
    pub(crate) async fn network_on(&self, shaping: Shaping) -> (SwitchNetwork, Arc<Recorder>) {
        let network = SwitchNetwork::start(&self.site(), None);
        let recorder = Arc::new(Recorder { shaping, ..Recorder::default() });
        network.meet(Arc::clone(&recorder) as Arc<dyn Classifiers>);
        connected(&network).await;
        (network, recorder)
    }
}

/// Waits until every switch is there.
pub(crate) async fn connected(network: &SwitchNetwork) {
    eventually("all switches connect", async || {
        let switches = network.switches().await;
        switches.iter().all(|s| s.openflow_connected && s.ovsdb_connected && !s.ports.is_empty())
    })
    .await;
}

fn end(child: &mut Option<Child>) {
    if let Some(mut child) = child.take() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        end(&mut self.switch);
        end(&mut self.server);
        let _ = Command::new("ip").args(["netns", "del", &self.namespace]).status();
    }
}

/// Plays the agents with the switch role: writes down what it is asked, or refuses.
#[derive(Debug)]
pub(crate) struct Recorder {
    pub(crate) asked: Mutex<Vec<String>>,
    pub(crate) refuses: std::sync::atomic::AtomicBool,
    pub(crate) shaping: Shaping,
}

impl Default for Recorder {
    /// On machines whose kernels can do all that a reservation needs.
    fn default() -> Self {
        let shaping = Shaping { htb: true, classifier: true, policing: false };
        Self { asked: Mutex::default(), refuses: false.into(), shaping }
    }
}

impl Recorder {
    fn answer(&self, verb: &str, agent: &HostId, ports: &[String]) -> Result<(), ClassifierError> {
        self.asked.lock().unwrap().push(format!("{verb} {agent} {}", ports.join(",")));
        if self.refuses.load(Ordering::Relaxed) {
            let (host, detail) = (agent.clone(), "tc is missing".to_owned());
            return Err(
                AgentError::Refused { host, doing: "classify ports", detail, store: None }.into()
            );
        }
        Ok(())
    }

    /// What it was asked since the last call, sorted.
    pub(crate) fn take(&self) -> Vec<String> {
        let mut asked = std::mem::take(&mut *self.asked.lock().unwrap());
        asked.sort();
        asked
    }
}

impl Classifiers for Recorder {
    fn shaping<'a>(&'a self, _: &'a HostId) -> BoxFuture<'a, Result<Shaping, ClassifierError>> {
        Box::pin(ready(Ok(self.shaping)))
    }

    fn ensure<'a>(
        &'a self,
        agent: &'a HostId,
        ports: Vec<String>,
    ) -> BoxFuture<'a, Result<(), ClassifierError>> {
        Box::pin(ready(self.answer("ensure", agent, &ports)))
    }

    fn remove<'a>(
        &'a self,
        agent: &'a HostId,
        ports: Vec<String>,
    ) -> BoxFuture<'a, Result<(), ClassifierError>> {
        Box::pin(ready(self.answer("remove", agent, &ports)))
    }
}

pub(crate) fn evacuation(id: &str) -> EvacuationId {
    EvacuationId::new(id).unwrap()
}

pub(crate) fn migration(id: &str) -> MigrationId {
    MigrationId::new(id).unwrap()
}

pub(crate) fn port(switch: &str, port: &str) -> PortRef {
    PortRef { switch: SwitchId::new(switch).unwrap(), port: port.to_owned() }
}

/// The wish of a migration from h1 to h2 for so many Mbit/s of 100.
pub(crate) fn wish(migration_id: &str, mbit: u64) -> ReservationRequest {
    let hop =
        |at| Hop { at, capacity: BitsPerSec::from_mbit(100), rate: BitsPerSec::from_mbit(mbit) };
    let (owner, _) = migration_id.split_once('-').unwrap();
    ReservationRequest {
        evacuation: evacuation(owner),
        migration: migration(migration_id),
        urgency: Urgency::new(u32::try_from(mbit).unwrap().min(100)).unwrap(),
        kind: ReservationKind::Borrow,
        hops: vec![hop(port("h1.br-h1", "u1")), hop(port("s1", "d2"))],
        traffic: PageFlow {
            source: [10, 0, 0, 1].into(),
            destination: ([10, 0, 0, 2], 7445).into(),
            served: false,
        },
    }
}
