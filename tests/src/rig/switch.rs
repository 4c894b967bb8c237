//! An Open vSwitch of its own in a namespace: ovsdb-server and ovs-vswitchd, with the kernel's
//! datapath where its module is loaded, else with the userspace one.
//!
//! Used by the experiments. What is under test is done through `lifeboat-ovs`; this raises what it
//! speaks to. Not here: flows, queues, and the machine's own Open vSwitch, which is never asked.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lifeboat_ovs::Endpoint;
use lifeboat_ovs::openflow::flow::FlowMod;
use lifeboat_ovs::openflow::{
    self, Action, Instruction, Match, PortNo, SwitchHandle, WhatHappened,
};
use lifeboat_ovs::ovsdb::{self, Client};

use super::RigError;
use super::network::Namespace;
use super::program::{Running, run};
use crate::clock;

/// More than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(10);

const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
const SERVER_SOCKET: &str = "db.sock";
const SWITCH_SOCKET: &str = "vswitchd.ctl";

/// Where packets are forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Datapath {
    /// In the kernel, by its module.
    Kernel,
    /// In ovs-vswitchd.
    User,
}

impl Datapath {
    /// Which of the two there is on this machine.
    #[must_use]
    pub fn here() -> Self {
        match Path::new("/sys/module/openvswitch").exists() {
            true => Self::Kernel,
            false => Self::User,
        }
    }

    /// For people.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::User => "userspace",
        }
    }

    /// As OVSDB calls it.
    const fn kind(self) -> &'static str {
        match self {
            Self::Kernel => "system",
            Self::User => "netdev",
        }
    }
}

/// Both daemons; they end with it.
#[derive(Debug)]
pub struct Switch {
    folder: PathBuf,
    _server: Running,
    _switch: Running,
}

impl Switch {
    /// Starts both daemons in `namespace`, with their files in `folder`.
    ///
    /// # Errors
    /// When Open vSwitch is not installed or does not start.
    pub fn start(namespace: &Namespace, folder: &Path) -> Result<Self, RigError> {
        let database = folder.join("conf.db");
        run(Command::new("ovsdb-tool").arg("create").arg(&database).arg(SCHEMA))?;
        let remote = format!("--remote=punix:{}", folder.join(SERVER_SOCKET).display());
        let mut server = daemon(namespace, folder, "ovsdb-server", "ovsdb.ctl");
        let server =
            Running::start(server.arg(remote).arg(database), &folder.join("ovsdb-server.log"))?;
        appears(&folder.join(SERVER_SOCKET))?;
        run(vsctl(folder).args(["--no-wait", "init"]))?;
        let mut switch = daemon(namespace, folder, "ovs-vswitchd", SWITCH_SOCKET);
        let switch = Running::start(
            switch.arg(format!("unix:{}", folder.join(SERVER_SOCKET).display())),
            &folder.join("ovs-vswitchd.log"),
        )?;
        appears(&folder.join(SWITCH_SOCKET))?;
        Ok(Self { folder: folder.to_owned(), _server: server, _switch: switch })
    }

    /// Makes a bridge with these ports, which forwards as a plain switch does.
    ///
    /// # Errors
    /// When Open vSwitch refuses.
    pub async fn bridge(&self, name: &str, ports: &[&str]) -> Result<SwitchHandle, RigError> {
        let mut command = vsctl(&self.folder);
        command.args(["--timeout=10", "add-br", name, "--", "set", "bridge", name]);
        let kind = format!("datapath_type={}", Datapath::here().kind());
        command.args([&kind, "protocols=OpenFlow13", "fail-mode=secure"]);
        for port in ports {
            command.args(["--", "add-port", name, port]);
        }
        run(&mut command)?;
        let bridge = self.openflow(name).await?;
        let normal = Instruction::ApplyActions(vec![Action::output(PortNo::NORMAL)]);
        let flow = FlowMod::add(0, 0, Match::any(), vec![normal]);
        bridge.flow_mod(flow, PATIENCE).await.map_err(RigError::refused("a flow"))?;
        Ok(bridge)
    }

    /// Puts ports into a VLAN: what comes in by one of them is tagged wherever it leaves by a port that
    /// is in none.
    ///
    /// # Errors
    /// When Open vSwitch refuses.
    pub fn tag(&self, ports: &[&str], vlan: u16) -> Result<(), RigError> {
        for port in ports {
            run(vsctl(&self.folder).args(["set", "port", port, &format!("tag={vlan}")]))?;
        }
        Ok(())
    }

    async fn openflow(&self, bridge: &str) -> Result<SwitchHandle, RigError> {
        let endpoint = Endpoint::Unix(self.folder.join(format!("{bridge}.mgmt")));
        let settings = openflow::Settings::default();
        let what = format!("a connection to bridge {bridge}");
        let opened = openflow::connect(&endpoint, settings).await;
        let mut events = opened.map_err(RigError::io(what.clone()))?;
        let first = tokio::time::timeout(PATIENCE, events.recv()).await;
        match first {
            Ok(Some(event)) => match event.what {
                WhatHappened::Connected { handle, .. } => Ok(handle),
                other => Err(RigError::refused("an OpenFlow session")(format!("{other:?}"))),
            },
            Ok(None) | Err(_) => Err(RigError::TooLate { what, seconds: PATIENCE.as_secs() }),
        }
    }

    /// A client of its database.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn database(&self) -> Result<Client, RigError> {
        let endpoint = Endpoint::Unix(self.folder.join(SERVER_SOCKET));
        let client = Client::start(endpoint, ovsdb::Settings::default());
        client.connected(PATIENCE).await.map_err(RigError::refused("an OVSDB session"))?;
        Ok(client)
    }
}

fn daemon(namespace: &Namespace, folder: &Path, program: &str, control: &str) -> Command {
    let mut command = namespace.command(program);
    for variable in ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR", "OVS_SYSCONFDIR"] {
        command.env(variable, folder);
    }
    command.arg(format!("--unixctl={}", folder.join(control).display()));
    command.args(["-vsyslog:off", "--no-chdir"]);
    command
}

fn vsctl(folder: &Path) -> Command {
    let mut command = Command::new("ovs-vsctl");
    command.arg(format!("--db=unix:{}", folder.join(SERVER_SOCKET).display()));
    command.env("OVS_RUNDIR", folder);
    command
}

fn appears(socket: &Path) -> Result<(), RigError> {
    let what = format!("the socket {}", socket.display());
    let found = clock::wait_for(PATIENCE, || socket.exists().then_some(()));
    found.ok_or(RigError::TooLate { what, seconds: PATIENCE.as_secs() })
}
