//! A small world of its own: three hosts with real agents, one VM with a real QEMU, a real
//! controller; and a hand on each of their throats.
//!
//! Used by the tests that kill. Each host is a network namespace with a loopback interface and
//! nothing else: its page links to the others are [`relay`]s, so that every direction of every
//! link can be cut. The VM has no NIC, so no switch is needed, and the evacuations are ordered with
//! urgency 0, which reserves nothing. What really runs is not asked of the agents: [`witness`]
//! hears it from the QEMUs.
//!
//! ```text
//!   lifeboat --unix--> controller --unix--> agent h1  agent h2  agent h3
//!                                              |  '--relays--'  |
//!                                            QEMU              QEMU  --second monitor--> witness
//! ```
//!
//! Not here: what is done to it, and what must come of that, which the tests say.

pub mod agent;
pub mod control;
pub mod guest;
pub mod inside;
pub mod relay;
pub mod rest;
pub mod witness;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use agent::Agent;
use control::{Control, Links};
use relay::Relay;
use witness::Witness;

use crate::clock;
use crate::rig::RigError;
use crate::rig::network::Namespace;
use crate::rig::program::run;

/// The VM's name.
pub const VM: &str = "vm";
/// The name of the one beside it, in a world [with two](World::make_with_neighbour).
pub const NEIGHBOUR: &str = "neighbour";
/// How many hosts there are, but for a world [with stores](World::make_with_stores).
pub const HOSTS: usize = 3;
/// How many there are where pages wait elsewhere: a source, a destination, and what parity needs.
pub const HOSTS_WITH_STORES: usize = 5;
/// A booted guest says so within this time, on a busy machine.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// Bytes of each log that a story tells: some thirty lines.
const STORY: usize = 6 << 10;

/// A host by its number, from 0.
pub type Host = usize;

/// A host's name.
#[must_use]
pub fn host_name(host: Host) -> String {
    format!("h{}", host + 1)
}

/// The host of a name.
#[must_use]
pub fn host_of(name: &str) -> Option<Host> {
    (0..HOSTS_WITH_STORES).find(|&host| host_name(host) == name)
}

/// What the VM keeps its data on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// It has none.
    None,
    /// An image of its host's, to which its guest writes.
    Raw,
    /// The same as an overlay, in qcow2, of a base that every host has.
    Overlay,
    /// A file on a storage that the first two hosts reach; the third one says that it does, too.
    Shared,
    /// No disk, but firmware (OVMF) and the NVRAM that it writes its variables to.
    Firmware,
    /// The same as [`Self::Raw`], and a CD beside it, which its guest reads.
    Cd,
    /// Two images of its host's, both written by its guest, and a part of them filled and discarded in turn.
    Two {
        /// The second one is in a directory of its own.
        apart: bool,
    },
    /// The same as [`Self::Raw`] in qcow2, whose counts of references are written late and which has a bitmap
    /// that is kept: what QEMU writes as it closes the image. A part of it is filled and discarded in turn.
    Lazy,
    /// An image of its host's, all of it written again and again, as fast as that says.
    Busy(Busy),
}

/// How a guest writes to an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Busy {
    /// The image's length, bytes.
    pub image: u64,
    /// Of one write, which lies anywhere in the image, bytes.
    pub block: u64,
    /// What it would like to write, bytes/s.
    pub rate: u64,
    /// Blocks that it reads back and checks for 100 that it writes.
    pub check_percent: u64,
    /// What its owner was promised that it may write, bytes/s; 0 for nothing.
    pub promised: u64,
}

/// What there is in a world.
struct Outline {
    disk: Disk,
    hosts: usize,
    /// Hosts may keep what belongs to VMs that are between two others.
    keep: bool,
    links: Links,
    /// Hosts show each other certificates.
    secure: bool,
    /// There is a second VM.
    neighbour: bool,
}

impl Outline {
    const fn of(disk: Disk) -> Self {
        let links = Links::alike(control::CAPACITY);
        Self { disk, hosts: HOSTS, keep: false, links, secure: false, neighbour: false }
    }
}

/// The world. Everything in it ends when it is dropped; QEMUs end with the process's namespace.
pub struct World {
    /// By host.
    pub agents: Vec<Agent>,
    /// The controller and its commands.
    pub control: Control,
    /// Who runs, and what the guest says.
    pub witness: Witness,
    relays: Vec<Relay>,
    /// Goes last: where QEMUs run, and who they are, stands in it.
    folder: tempfile::TempDir,
}

impl World {
    /// Makes world number `number`, with the VM booted at the first host.
    ///
    /// # Errors
    /// When something of it does not start.
    pub fn make(number: usize, images: &Path) -> Result<Self, RigError> {
        Self::make_with(number, images, Disk::None)
    }

    /// The same, with a disk.
    ///
    /// # Errors
    /// When something of it does not start.
    pub fn make_with(number: usize, images: &Path, disk: Disk) -> Result<Self, RigError> {
        Self::raise(number, images, Outline::of(disk))
    }

    /// The same, and its links carry so much, in bit/s: what the plan counts with, and what the agents
    /// hold to.
    ///
    /// # Errors
    /// When something of it does not start.
    pub fn make_on(number: usize, images: &Path, disk: Disk, link: u64) -> Result<Self, RigError> {
        Self::raise(number, images, Outline { links: Links::alike(link), ..Outline::of(disk) })
    }

    /// The same, whose hosts show each other certificates.
    ///
    /// # Errors
    /// When something of it does not start.
    pub fn make_secure(
        number: usize,
        images: &Path,
        disk: Disk,
        link: u64,
    ) -> Result<Self, RigError> {
        let links = Links::alike(link);
        Self::raise(number, images, Outline { links, secure: true, ..Outline::of(disk) })
    }

    /// The same, with a second VM at the first host, which has a disk as [`Disk::Raw`].
    ///
    /// # Errors
    /// When something of it does not start.
    pub fn make_with_neighbour(
        number: usize,
        images: &Path,
        disk: Disk,
        link: u64,
    ) -> Result<Self, RigError> {
        let links = Links::alike(link);
        Self::raise(number, images, Outline { links, neighbour: true, ..Outline::of(disk) })
    }

    /// The same, whose hosts may keep what belongs to VMs that are between two others; and the second
    /// host's link carries `second`.
    ///
    /// # Errors
    /// When something of it does not start.
    pub fn make_by_way_of_others(
        number: usize,
        images: &Path,
        disk: Disk,
        (all, second): (u64, u64),
    ) -> Result<Self, RigError> {
        let links = Links { all, second };
        Self::raise(number, images, Outline { links, keep: true, ..Outline::of(disk) })
    }

    /// The same with five hosts, all of which may keep pages of VMs that are between two others.
    ///
    /// # Errors
    /// When something of it does not start.
    pub fn make_with_stores(number: usize, images: &Path, disk: Disk) -> Result<Self, RigError> {
        let hosts = HOSTS_WITH_STORES;
        Self::raise(number, images, Outline { hosts, keep: true, ..Outline::of(disk) })
    }

    fn raise(number: usize, images: &Path, outline: Outline) -> Result<Self, RigError> {
        let Outline { disk, hosts, keep, links, secure, neighbour } = outline;
        let folder = tempfile::tempdir().map_err(RigError::io("cannot make a temporary folder"))?;
        // QEMU's user must be able to pass through.
        let open = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755);
        fs::set_permissions(folder.path(), open)
            .map_err(RigError::io("cannot open the temporary folder"))?;
        let programs = keep_programs(folder.path())?;
        let mut agents = vec![];
        for host in 0..hosts {
            let namespace = Namespace::make(&format!("w{number}{}", host_name(host)))?;
            let mut agent = Agent::prepare(host, namespace, folder.path(), images, &programs)?;
            if keep {
                agent.keep_stores()?;
            }
            if disk == (Disk::Two { apart: true }) {
                agent.give_second_room()?;
            }
            agents.push(agent);
        }
        if secure {
            let certificates = folder.path().join("certs");
            make_certificates(&certificates, &programs, hosts)?;
            agents.iter().try_for_each(|agent| agent.show_certificate(&certificates))?;
        }
        let mut relays = vec![];
        for from in 0..hosts {
            for to in (0..hosts).filter(|&to| to != from) {
                let ends = || (agents[from].namespace().clone(), agents[to].namespace().clone());
                let (near, far) = ends();
                relays.push(Relay::start((from, to), near, far)?);
                for port in relay::store_ports(to).filter(|_| hosts > HOSTS) {
                    let (near, far) = ends();
                    relays.push(Relay::to_store((from, to), near, far, port)?);
                }
            }
        }
        let witness = Witness::start(agents.iter().map(Agent::watched).collect());
        agents[0].define_vm(disk)?;
        if neighbour {
            agents[0].define_neighbour()?;
        }
        for agent in &mut agents {
            agent.start(None)?;
        }
        let control = Control::start(folder.path(), &programs, hosts, links)?;
        let world = Self { folder, agents, control, witness, relays };
        world.await_guest(0)?;
        Ok(world)
    }

    /// Makes certificates for all hosts in `folder`, by an authority of its own.
    ///
    /// # Errors
    /// When `lifeboat` refuses.
    pub fn make_certificates(&self, folder: &Path) -> Result<(), RigError> {
        make_certificates(folder, &self.folder.path().join("programs"), self.agents.len())
    }

    /// Waits until the guest has said something new on its serial line.
    ///
    /// # Errors
    /// When it does not.
    pub fn await_guest(&self, after: u64) -> Result<u64, RigError> {
        let what = "a new word of the guest".to_owned();
        let late = RigError::TooLate { what, seconds: BOOT_LIMIT.as_secs() };
        let newer = || self.witness.look().last_tick().filter(|&tick| tick > after);
        clock::wait_for(BOOT_LIMIT, newer).ok_or(late)
    }

    /// Where its files and logs are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Keeps the folder when the world is gone, for somebody to look at, and says where it is.
    #[must_use]
    pub fn keep(&mut self) -> PathBuf {
        self.folder.disable_cleanup(true);
        self.folder.path().to_owned()
    }

    /// The end of everything that was logged in it, and of what the guest said: what a failure
    /// looks like to somebody who will not have the folder.
    #[must_use]
    pub fn story(&self) -> String {
        let logs = std::iter::once(self.folder.path().join("controller.log"));
        let logs = logs.chain(self.agents.iter().map(Agent::log));
        let mut story = String::new();
        for log in logs {
            let bytes = fs::read(&log).unwrap_or_default();
            let end = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(STORY)..]);
            story.push_str(&format!("== the end of {}\n{end}\n", log.display()));
        }
        for life in self.witness.look().lives() {
            story.push_str(&format!("== the guest at {}\n", host_name(life.host)));
            life.told().iter().for_each(|line| story.push_str(&format!("{line}\n")));
        }
        story
    }

    /// Cuts or heals what is between two hosts, both ways.
    pub fn link(&self, one: Host, other: Host, state: relay::State) {
        self.between(one, other).for_each(|relay| relay.set(state));
    }

    /// From now on a connection between two hosts is made only after so long, both ways.
    pub fn connect_after(&self, one: Host, other: Host, late: Duration) {
        self.between(one, other).for_each(|relay| relay.connect_after(late));
    }

    fn between(&self, one: Host, other: Host) -> impl Iterator<Item = &Relay> {
        let is_it = move |ends: (Host, Host)| ends == (one, other) || ends == (other, one);
        self.relays.iter().filter(move |relay| is_it(relay.ends()))
    }
}

fn make_certificates(folder: &Path, programs: &Path, hosts: usize) -> Result<(), RigError> {
    let names: Vec<String> =
        (0..hosts).map(|host| format!("{}=127.0.0.1", host_name(host))).collect();
    let mut command = Command::new(programs.join("lifeboat"));
    command.args(["certs", "init"]).arg(folder);
    run(command.args(["--agent", &names.join(",")])).map(drop)
}

/// Others may build while the world lives: it keeps the programs that it began with.
fn keep_programs(folder: &Path) -> Result<PathBuf, RigError> {
    let programs = folder.join("programs");
    fs::create_dir(&programs).map_err(RigError::io("cannot make a folder"))?;
    for name in ["lifeboat", "lifeboat-agent", "lifeboat-disk"] {
        let from = crate::rig::private::built(name)?;
        fs::copy(from, programs.join(name)).map_err(RigError::io("cannot copy a program"))?;
    }
    Ok(programs)
}
