//! A real Open vSwitch of one's own for each test: its own directory, daemons and, where ports
//! must shape, network namespace.
//!
//! Needs ovsdb-server, ovs-vswitchd and ovs-vsctl; for HTB also ip, tc and root. What is missing
//! fails the test and is named. Daemons are children and are ended by their handle.

#![allow(dead_code, reason = "each test program uses a part of this")]

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lifeboat_ovs::Endpoint;
use lifeboat_ovs::ovsdb::{Client, Settings};

/// More than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

static NUMBER: AtomicU32 = AtomicU32::new(0);

pub(crate) struct Lab {
    dir: tempfile::TempDir,
    namespace: Option<String>,
    server: Option<Child>,
    switch: Option<Child>,
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) = (&output.stdout, String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {err}");
    String::from_utf8_lossy(out).into_owned()
}

impl Lab {
    /// With ports of type `dummy`, which need neither root nor a namespace.
    pub(crate) async fn dummy() -> Self {
        let lab = Self::start(None).await;
        lab.vsctl("add-br br0 -- set bridge br0 datapath_type=dummy protocols=OpenFlow13 \
                   fail-mode=secure -- add-port br0 p1 -- set interface p1 type=dummy ofport_request=1");
        lab
    }

    /// With the veth ports `v1` and `v2` in a network namespace, which can shape.
    pub(crate) async fn shaping() -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("lbovs-{}-{number}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &namespace]));
        let lab = Self::start(Some(namespace)).await;
        for port in ["v1", "v2"] {
            let peer = format!("{port}-peer");
            lab.inside(&["ip", "link", "add", port, "up", "type", "veth", "peer", "name", &peer]);
            lab.inside(&["ip", "link", "set", &peer, "up"]);
        }
        lab.vsctl(
            "add-br br0 -- set bridge br0 datapath_type=netdev protocols=OpenFlow13 \
                   fail-mode=secure -- add-port br0 v1 -- set interface v1 ofport_request=1 \
                   -- add-port br0 v2 -- set interface v2 ofport_request=2",
        );
        lab
    }

    async fn start(namespace: Option<String>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let schema = "/usr/share/openvswitch/vswitch.ovsschema";
        let database = dir.path().join("conf.db");
        run(Command::new("ovsdb-tool").arg("create").arg(&database).arg(schema));
        let mut lab = Self { dir, namespace, server: None, switch: None };
        let mut server = lab.daemon("ovsdb-server");
        server.arg(database).arg(format!("--remote=punix:{}", lab.path("db.sock").display()));
        lab.server = Some(server.spawn().expect("ovsdb-server must be installed"));
        lab.wait_for("db.sock").await;
        lab.vsctl("--no-wait init");
        lab.start_switch().await;
        lab
    }

    fn daemon(&self, program: &str) -> Command {
        let mut command = match &self.namespace {
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace, program]);
                command
            }
            None => Command::new(program),
        };
        for variable in ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR", "OVS_SYSCONFDIR"] {
            command.env(variable, self.dir.path());
        }
        let control = self.path(&format!("{program}.ctl"));
        command
            .arg(format!("--unixctl={}", control.display()))
            .args(["-vconsole:off", "-vsyslog:off"]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.arg(format!("--pidfile={}", self.path(&format!("{program}.pid")).display()));
        command
    }

    /// Starts ovs-vswitchd, the first time or again.
    pub(crate) async fn start_switch(&mut self) {
        let mut switch = self.daemon("ovs-vswitchd");
        switch.arg("--enable-dummy").arg(format!("unix:{}", self.path("db.sock").display()));
        self.switch = Some(switch.spawn().expect("ovs-vswitchd must be installed"));
        self.wait_for("ovs-vswitchd.ctl").await;
    }

    /// Ends ovs-vswitchd as a crash would.
    pub(crate) fn kill_switch(&mut self) {
        if let Some(mut child) = self.switch.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_file(self.path("ovs-vswitchd.ctl"));
    }

    /// Ends ovsdb-server as a crash would.
    pub(crate) fn kill_server(&mut self) {
        if let Some(mut child) = self.server.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_file(self.path("db.sock"));
    }

    /// Starts ovsdb-server again.
    pub(crate) async fn start_server(&mut self) {
        let mut server = self.daemon("ovsdb-server");
        server.arg(self.path("conf.db"));
        server.arg(format!("--remote=punix:{}", self.path("db.sock").display()));
        self.server = Some(server.spawn().expect("ovsdb-server must be installed"));
        self.wait_for("db.sock").await;
    }

    pub(crate) async fn wait_for(&self, file: &str) {
        for _ in 0..500 {
            if self.path(file).exists() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{file} has not appeared");
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    pub(crate) fn database(&self) -> Endpoint {
        Endpoint::Unix(self.path("db.sock"))
    }

    pub(crate) fn management(&self, bridge: &str) -> Endpoint {
        Endpoint::Unix(self.path(&format!("{bridge}.mgmt")))
    }

    /// A client that is connected.
    pub(crate) async fn client(&self) -> Client {
        let client = Client::start(self.database(), Settings::default());
        client.connected(PATIENCE).await.expect("ovsdb-server is there");
        client
    }

    /// `ovs-vsctl` with these words.
    pub(crate) fn vsctl(&self, words: &str) -> String {
        let database = format!("--db=unix:{}", self.path("db.sock").display());
        let words = words.split_whitespace();
        run(Command::new("ovs-vsctl").args([&database, "--timeout=10"]).args(words))
    }

    /// `ovs-ofctl -O OpenFlow13 VERB br0`.
    pub(crate) fn ofctl(&self, verb: &str) -> String {
        let socket = format!("unix:{}", self.path("br0.mgmt").display());
        run(Command::new("ovs-ofctl").args(["-O", "OpenFlow13", verb, &socket]))
    }

    /// A command in the namespace.
    pub(crate) fn inside(&self, words: &[&str]) -> String {
        let namespace = self.namespace.as_ref().expect("a lab with a namespace");
        run(Command::new("ip").args(["netns", "exec", namespace]).args(words))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.kill_switch();
        self.kill_server();
        if let Some(namespace) = &self.namespace {
            let _ = Command::new("ip").args(["netns", "del", namespace]).status();
        }
    }
}
