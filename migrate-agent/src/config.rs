//! The agent's configuration: `agent.toml`, checked. Used by `main.rs`.
//!
//! ```toml
//! host = "h1"
//! listen = ["10.99.0.1:7000"]            # gRPC; also "unix:/run/lifeboat/agent.sock"
//! page_listen = "10.0.0.1:7001"          # page links of other agents
//! page_address = "10.0.0.1:7001"         # how they reach it; page_listen where left out
//! roles = ["hypervisor"]                 # hypervisor, intermediary, switch
//! tls_dir = "/etc/lifeboat/tls"          # ca.pem, cert.pem, key.pem; left out: loopback only
//! state_dir = "/var/lib/lifeboat"
//! run_dir = "/run/lifeboat"
//! images_dir = "/var/lib/lifeboat/images"
//! vms_dir = "/etc/lifeboat/vms"
//! profiles_dir = "/etc/lifeboat/profiles"
//! memory = "12 GiB"                      # for VMs with QEMU's overhead
//! disk_dirs = ["/var/lib/lifeboat/disks"] # where disks may arrive; state_dir/disks where left out
//! disk_retention_hours = 24              # how long a disk is kept whose VM has left
//!
//! [qemu]
//! program = "/usr/bin/qemu-system-x86_64"
//! user = "nobody"                        # a user of its own is better
//! group = "kvm"                          # left out: the user's
//! accelerator = "tcg"                    # kvm or tcg
//!
//! [ovs]
//! database = "unix:/run/openvswitch/db.sock"
//!
//! [[storage]]
//! name = "nfs1"
//! path = "/srv/nfs1"
//! ```
//!
//! What an intermediary may say of its stores is in `config/intermediary.rs`, how disks leave (`[disk]`) in
//! `config/disk.rs`.

mod disk;
mod intermediary;

pub use disk::DiskSettings;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lifeboat_protocol::ids::HostId;
use lifeboat_protocol::units::{Bytes, text};
use serde::Deserialize;

use crate::qemu::launch::Accelerator;
use crate::qemu::process::User;
use crate::toml_file::{self, FileError, SyntaxError};
use crate::vms::Settings;
use crate::vms::host_files::Storage;
use crate::vms::taps::Ovs;

/// What an agent does on its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentRole {
    /// Runs VMs.
    Hypervisor,
    /// Keeps pages for others.
    Intermediary,
    /// Sets up classifiers at the switch's ports.
    Switch,
}

impl AgentRole {
    /// As in the file and on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hypervisor => "hypervisor",
            Self::Intermediary => "intermediary",
            Self::Switch => "switch",
        }
    }
}

/// Where gRPC is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// TCP.
    Tcp(SocketAddr),
    /// A unix socket, root's alone.
    Unix(PathBuf),
}

/// The configuration, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// This host.
    pub host: HostId,
    /// gRPC.
    pub listen: Vec<Listen>,
    /// Page links.
    pub page_listen: SocketAddr,
    /// How other agents reach the page links.
    pub page_address: String,
    /// What this agent does.
    pub roles: Vec<AgentRole>,
    /// Certificates; `None` serves loopback and unix sockets only.
    pub tls_dir: Option<PathBuf>,
    /// Survives reboots.
    pub state_dir: PathBuf,
    /// For `disk/`.
    pub disks: DiskSettings,
    /// For `vms/`.
    pub vms: Settings,
    /// For `intermediary/`; of use with that role alone.
    pub intermediary: crate::intermediary::Settings,
}

/// What is wrong with a value.
#[derive(Debug, thiserror::Error)]
pub enum ConfigProblem {
    /// Not of the form that the key needs.
    #[error("`{given}` is not {wanted} (`lifeboat-agent --check` tries a changed file)")]
    Form {
        /// What was given.
        given: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// A relative path would depend on where the agent was started.
    #[error("{} is not an absolute path", given.display())]
    Relative {
        /// What was given.
        given: PathBuf,
    },
    /// Nobody of that name.
    #[error("there is no {kind} `{given}` on this machine; create it, or choose another")]
    NoSuch {
        /// User or group.
        kind: &'static str,
        /// The name.
        given: String,
    },
    /// QEMU must not be root.
    #[error("QEMU does not run as root; choose an unprivileged user")]
    Root,
    /// Nor may a store.
    #[error("a store does not run as root; choose an unprivileged user")]
    StoreRoot,
    /// An address that others reach, without certificates.
    #[error(
        "{given} is reachable by others, and there are no certificates: make them with `lifeboat certs init` and set `tls_dir`, or listen on a loopback address or a unix socket"
    )]
    Unprotected {
        /// The address.
        given: SocketAddr,
    },
    /// Nothing to listen on.
    #[error("names nothing to listen on")]
    Nothing,
    /// How disks cannot leave.
    #[error(transparent)]
    Disk(#[from] disk::ParameterError),
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not such a file at all.
    #[error(transparent)]
    Syntax(#[from] FileError<SyntaxError>),
    /// A value that is not allowed.
    #[error(transparent)]
    Value(#[from] FileError<ConfigProblem>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    host: HostId,
    listen: Vec<String>,
    page_listen: SocketAddr,
    page_address: Option<String>,
    #[serde(default = "hypervisor")]
    roles: Vec<AgentRole>,
    tls_dir: Option<PathBuf>,
    state_dir: PathBuf,
    run_dir: PathBuf,
    images_dir: PathBuf,
    vms_dir: PathBuf,
    profiles_dir: PathBuf,
    #[serde(with = "text")]
    memory: Bytes,
    disk_dirs: Option<Vec<PathBuf>>,
    #[serde(default = "a_day")]
    disk_retention_hours: u32,
    #[serde(default)]
    disk: disk::RawDisk,
    qemu: RawQemu,
    ovs: RawOvs,
    #[serde(default)]
    storage: Vec<RawStorage>,
    #[serde(default)]
    intermediary: intermediary::RawIntermediary,
}

fn hypervisor() -> Vec<AgentRole> {
    vec![AgentRole::Hypervisor]
}

fn a_day() -> u32 {
    24
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawQemu {
    #[serde(default = "default_program")]
    program: PathBuf,
    user: String,
    group: Option<String>,
    accelerator: RawAccelerator,
}

fn default_program() -> PathBuf {
    "/usr/bin/qemu-system-x86_64".into()
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawAccelerator {
    Kvm,
    Tcg,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawOvs {
    database: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStorage {
    name: HostId,
    path: PathBuf,
}

type Checked<T> = Result<T, (String, ConfigProblem)>;

impl Config {
    /// Reads and checks `file`.
    ///
    /// # Errors
    /// With file, line and key.
    pub fn read(file: &Path) -> Result<Self, ConfigError> {
        Self::parse(file, &toml_file::read(file)?)
    }

    /// As [`Self::read`], from text; `file` is for error texts.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let raw: RawConfig = toml_file::parse(file, text)?;
        raw.check().map_err(|(key, problem)| {
            let line = toml_file::line_of_key(text, &key);
            FileError { file: file.into(), line, key, problem }.into()
        })
    }
}

impl RawConfig {
    fn check(self) -> Checked<Config> {
        let user = self.user()?;
        let listen = self.listeners()?;
        if self.tls_dir.is_none() && !self.page_listen.ip().is_loopback() {
            let given = self.page_listen;
            return Err(("page_listen".to_owned(), ConfigProblem::Unprotected { given }));
        }
        let tls_dir = match self.tls_dir {
            Some(path) => Some(absolute("tls_dir", path)?),
            None => None,
        };
        let storages = self.storage.into_iter().enumerate().map(|(index, storage)| {
            let path = absolute(&format!("storage[{index}].path"), storage.path)?;
            Ok(Storage { name: storage.name.into(), path })
        });
        let storages: Vec<Storage> = storages.collect::<Checked<_>>()?;
        let state_dir = absolute("state_dir", self.state_dir)?;
        let intermediary = self.intermediary.check(self.memory, &state_dir, tls_dir.as_deref())?;
        let directories = match self.disk_dirs {
            Some(paths) => {
                let check = |(index, path)| absolute(&format!("disk_dirs[{index}]"), path);
                paths.into_iter().enumerate().map(check).collect::<Checked<_>>()?
            }
            None => vec![state_dir.join("disks")],
        };
        let disks = DiskSettings {
            directories: directories.clone(),
            kept_for: Duration::from_secs(u64::from(self.disk_retention_hours) * 3600),
            parameters: self.disk.check()?,
        };
        let vms = Settings {
            vms_dir: absolute("vms_dir", self.vms_dir)?,
            arrived_dir: state_dir.join("vms"),
            run_dir: absolute("run_dir", self.run_dir)?,
            images_dir: absolute("images_dir", self.images_dir)?,
            profiles_dir: absolute("profiles_dir", self.profiles_dir)?,
            disk_dirs: directories,
            storages,
            qemu: absolute("qemu.program", self.qemu.program)?,
            user,
            accelerator: match self.qemu.accelerator {
                RawAccelerator::Kvm => Accelerator::Kvm,
                RawAccelerator::Tcg => Accelerator::Tcg,
            },
            ovs: Ovs { database: self.ovs.database },
            memory: self.memory,
        };
        Ok(Config {
            host: self.host,
            listen,
            page_listen: self.page_listen,
            page_address: self.page_address.unwrap_or_else(|| self.page_listen.to_string()),
            roles: self.roles,
            tls_dir,
            state_dir,
            disks,
            vms,
            intermediary,
        })
    }

    fn listeners(&self) -> Checked<Vec<Listen>> {
        if self.listen.is_empty() {
            return Err(("listen".to_owned(), ConfigProblem::Nothing));
        }
        let check = |(index, given): (usize, &String)| {
            let key = format!("listen[{index}]");
            if let Some(path) = given.strip_prefix("unix:") {
                return absolute(&key, path.into()).map(Listen::Unix);
            }
            let wanted = "an address such as `10.0.0.1:7000`, or `unix:/PATH`";
            let address: SocketAddr = given
                .parse()
                .map_err(|_| (key.clone(), ConfigProblem::Form { given: given.clone(), wanted }))?;
            if self.tls_dir.is_none() && !address.ip().is_loopback() {
                return Err((key, ConfigProblem::Unprotected { given: address }));
            }
            Ok(Listen::Tcp(address))
        };
        self.listen.iter().enumerate().map(check).collect()
    }

    fn user(&self) -> Checked<User> {
        let no_such = |key: &str, kind, given: &str| {
            (key.to_owned(), ConfigProblem::NoSuch { kind, given: given.to_owned() })
        };
        let user = &self.qemu.user;
        let entry = entry_of("/etc/passwd", user);
        let (uid, own_gid) = entry
            .as_ref()
            .and_then(|fields| Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?)))
            .ok_or_else(|| no_such("qemu.user", "user", user))?;
        let gid = match &self.qemu.group {
            None => own_gid,
            Some(group) => entry_of("/etc/group", group)
                .and_then(|fields| fields.get(2)?.parse().ok())
                .ok_or_else(|| no_such("qemu.group", "group", group))?,
        };
        match uid {
            0 => Err(("qemu.user".to_owned(), ConfigProblem::Root)),
            uid => Ok(User { uid, gid }),
        }
    }
}

/// The fields of an entry of `/etc/passwd` or `/etc/group`. Users of other sources (LDAP) are not
/// looked up: QEMU's user should not depend on the network.
fn entry_of(file: &str, name: &str) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(file).ok()?;
    let mut lines = text.lines().map(|line| line.split(':'));
    let entry = lines.find(|fields| fields.clone().next() == Some(name))?;
    Some(entry.map(str::to_owned).collect())
}

fn absolute(key: &str, given: PathBuf) -> Checked<PathBuf> {
    match given.is_absolute() {
        true => Ok(given),
        false => Err((key.to_owned(), ConfigProblem::Relative { given })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = r#"host = "h1"
listen = ["127.0.0.1:7000", "unix:/run/lb/agent.sock"]
page_listen = "127.0.0.1:7001"
roles = ["hypervisor", "switch"]
state_dir = "/var/lib/lifeboat"
run_dir = "/run/lifeboat"
images_dir = "/images"
vms_dir = "/etc/lifeboat/vms"
profiles_dir = "/etc/lifeboat/profiles"
memory = "12 GiB"

[qemu]
user = "nobody"
accelerator = "tcg"

[ovs]
database = "unix:/run/ovs.sock"

[[storage]]
name = "nfs1"
path = "/srv/nfs1"
"#;

    fn parse(from: &str, to: &str) -> Result<Config, String> {
        assert!(SAMPLE.contains(from), "{from}");
        let text = SAMPLE.replace(from, to);
        Config::parse(Path::new("agent.toml"), &text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_plain_configuration_passes() {
        let config = parse("h1", "h1").unwrap();
        assert_eq!(config.page_address, "127.0.0.1:7001");
        assert_eq!(config.vms.memory, Bytes::from_mib(12 << 10));
        assert_ne!(config.vms.user.uid, 0);
        assert_eq!(config.listen.len(), 2);
    }

    #[test]
    fn what_does_not_pass_names_file_line_key_and_what_to_do() {
        let cases = [
            ("\"12 GiB\"", "12", "agent.toml:10: `memory`: invalid type: integer `12`, expected"),
            ("\"12 GiB\"", "\"12 Gbit\"", "agent.toml:10: `memory`: `12 Gbit` is not a size"),
            (
                "[\"127.0.0.1:7000\",",
                "[\"0.0.0.0:7000\",",
                "agent.toml:2: `listen[0]`: 0.0.0.0:7000 is reachable",
            ),
            ("\"127.0.0.1:7001\"", "\"10.0.0.1:7001\"", "lifeboat certs init"),
            ("\"127.0.0.1:7000\"", "\"h1\"", "agent.toml:2: `listen[0]`: `h1` is not an address"),
            ("\"nobody\"", "\"root\"", "agent.toml:13: `qemu.user`: QEMU does not run as root"),
            ("\"nobody\"", "\"no-one\"", "agent.toml:13: `qemu.user`: there is no user `no-one`"),
            ("\"/images\"", "\"images\"", "agent.toml:7: `images_dir`: images is not an absolute"),
            ("\"tcg\"", "\"xen\"", "agent.toml:14: `qemu.accelerator`: unknown variant `xen`"),
            ("\"switch\"", "\"router\"", "agent.toml:4: `roles[1]`: unknown variant `router`"),
            ("host = \"h1\"", "host = \"../h1\"", "agent.toml:1: `host`: `../h1` is no name"),
            (
                "[qemu]",
                "[disk]\nblock_size = \"5 KiB\"\n[qemu]",
                "agent.toml:13: `disk.block_size`: a block of 5120 bytes",
            ),
            (
                "\"nfs1\"",
                "\"nfs1\"\ncolour = 1",
                "agent.toml:21: `storage[0].colour`: unknown field",
            ),
        ];
        for (from, to, wanted) in cases {
            let said = parse(from, to).unwrap_err();
            assert!(said.contains(wanted), "{said}\n  wanted: {wanted}");
        }
    }
}
