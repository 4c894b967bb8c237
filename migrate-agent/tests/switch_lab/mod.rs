//! A real Open vSwitch in a network namespace of its own, and the test thread inside it, so that
//! what is tested finds its ports as an agent on that switch would.
//!
//! Needs root, ip, tc, ovsdb-server, ovs-vswitchd, ovs-vsctl and ovs-ofctl; what is missing fails
//! the test and is named. Daemons are children and are ended by their handle.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Userspace bridge `br0` with the ports `v1` and `v2`; `v1` shapes to 100 Mbit/s with the queues
/// 0 and 7.
pub(crate) struct SwitchLab {
    directory: tempfile::TempDir,
    namespace: String,
    daemons: Vec<Child>,
}

/// Runs a program and returns what it printed.
pub(crate) fn run(program: &str, words: &str) -> String {
    let words = words.split_whitespace();
    let output = Command::new(program).args(words).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl SwitchLab {
    /// Call it from a test with a runtime of one thread: the thread moves into the namespace.
    pub(crate) async fn start() -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("lbsw-{}-{number}", std::process::id());
        run("ip", &format!("netns add {namespace}"));
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut lab = Self { directory, namespace, daemons: vec![] };
        let opened = std::fs::File::open(format!("/run/netns/{}", lab.namespace)).unwrap();
        let ours = std::os::fd::AsFd::as_fd(&opened);
        move_into_link_name_space(ours, Some(LinkNameSpaceType::Network)).unwrap();
        lab.start_daemons().await;
        for port in ["v1", "v2"] {
            run("ip", &format!("link add {port} up type veth peer name {port}-peer"));
            run("ip", &format!("link set {port}-peer up"));
        }
        lab.vsctl(
            "add-br br0 -- set bridge br0 datapath_type=netdev protocols=OpenFlow13 \
             fail-mode=secure -- add-port br0 v1 -- add-port br0 v2",
        );
        lab.attach_qos();
        lab
    }

    async fn start_daemons(&mut self) {
        let database = self.path("conf.db");
        let schema = "/usr/share/openvswitch/vswitch.ovsschema";
        run("ovsdb-tool", &format!("create {} {schema}", database.display()));
        let remote = format!("--remote=punix:{}", self.path("db.sock").display());
        self.daemon("ovsdb-server", &[&database.display().to_string(), &remote]);
        self.wait_for("db.sock").await;
        self.vsctl("--no-wait init");
        self.daemon("ovs-vswitchd", &[&format!("unix:{}", self.path("db.sock").display())]);
        self.wait_for("ovs-vswitchd.ctl").await;
    }

    fn daemon(&mut self, program: &str, arguments: &[&str]) {
        let mut command = Command::new(program);
        for variable in ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR", "OVS_SYSCONFDIR"] {
            command.env(variable, self.directory.path());
        }
        command
            .args(arguments)
            .arg(format!("--unixctl={}", self.path(&format!("{program}.ctl")).display()))
            .arg(format!("--pidfile={}", self.path(&format!("{program}.pid")).display()))
            .args(["-vconsole:off", "-vsyslog:off"])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn();
        self.daemons.push(child.unwrap_or_else(|error| panic!("{program}: {error}")));
    }

    async fn wait_for(&self, file: &str) {
        for _ in 0..500 {
            if self.path(file).exists() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{file} has not appeared");
    }

    fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    /// `ovs-vsctl` with these words; OVS has done it when this returns.
    pub(crate) fn vsctl(&self, words: &str) -> String {
        let database = self.path("db.sock");
        run("ovs-vsctl", &format!("--db=unix:{} --timeout=10 {words}", database.display()))
    }

    /// Gives `v1` its QoS.
    pub(crate) fn attach_qos(&self) {
        self.vsctl(
            "set port v1 qos=@qos -- --id=@qos create qos type=linux-htb \
             other-config:max-rate=100000000 queues:0=@rest queues:7=@ours \
             -- --id=@rest create queue other-config:min-rate=20000000 \
             -- --id=@ours create queue other-config:min-rate=75000000",
        );
    }

    /// Lets the switch send `count` IPv4 packets out of `v1`, after these actions.
    pub(crate) fn send(&self, count: u32, actions: &str) {
        let socket = self.path("br0.mgmt");
        let comma = if actions.is_empty() { "" } else { "," };
        // Ethernet, IPv4 with DSCP 0, UDP; 10.0.0.1 to 10.0.0.2, no payload.
        let packet = "ffffffffffff0200000000010800\
                      4500001c0001000040110000\
                      0a0000010a000002\
                      0001000200080000";
        for _ in 0..count {
            run(
                "ovs-ofctl",
                &format!(
                    "-O OpenFlow13 packet-out unix:{} \
                     in_port=LOCAL,packet={packet},actions={actions}{comma}output:v1",
                    socket.display()
                ),
            );
        }
    }

    /// Packets that have left `v1` through class `1:{minor}`.
    pub(crate) fn sent(&self, minor: u32) -> u32 {
        let classes = run("tc", "-s class show dev v1");
        let class = classes.split("class htb ").find(|c| c.starts_with(&format!("1:{minor} ")));
        let words: Vec<&str> = class.unwrap_or_default().split_whitespace().collect();
        let packets = words.windows(2).find(|pair| pair[1] == "pkt");
        packets.unwrap_or_else(|| panic!("no class 1:{minor} in {classes}"))[0].parse().unwrap()
    }
}

impl Drop for SwitchLab {
    fn drop(&mut self) {
        for child in self.daemons.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = Command::new("ip").args(["netns", "del", &self.namespace]).status();
    }
}
