//! QEMU migrating by itself: the same machine that an agent would start, and `migrate tcp:`.
//!
//! Used by experiments that compare. The command line comes from the agent's own code, so both
//! sides of the comparison run the same QEMU in the same sandbox as the same user.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lifeboat_agent::qemu::launch::{Begin, LaunchSpec, command_line};
use lifeboat_agent::qemu::process::{QemuProcess, User};
use lifeboat_agent::qemu::qmp::{MigrateParameters, MigrationStatus, Qmp, QmpEvent};
use lifeboat_agent::qemu::run_dir::RunDir;
use serde_json::{Value, json};
use tokio::sync::broadcast::Receiver;

use super::RigError;
use super::network::Namespace;
use crate::clock;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// `nobody`, on Debian.
const NOBODY: User = User { uid: 65534, gid: 65534 };
/// Where one that waits listens.
pub const PORT: u16 = 7500;
const PATIENCE: Duration = Duration::from_secs(10);

/// Where a QEMU runs.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Its host.
    pub namespace: &'a Namespace,
    /// The host's address.
    pub address: Ipv4Addr,
    /// The host's folder for run-time files.
    pub folder: &'a Path,
}

/// A QEMU with its monitor.
#[derive(Debug)]
pub struct Direct {
    process: QemuProcess,
    qmp: Qmp,
    run_dir: RunDir,
}

/// How a migration is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aim {
    /// What the pause should not exceed.
    pub downtime: Duration,
    /// What it may send, in bit/s.
    pub limit: Option<u64>,
    /// When it is given up.
    pub within: Duration,
}

/// When the guest was stopped and when it went on, in microseconds since the epoch, by the events
/// of both QEMUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moments {
    /// STOP at the source.
    pub stop: u64,
    /// RESUME at the destination.
    pub resume: u64,
}

/// A way in which QEMU leaves a host soon, with what both sides have to be told for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaving {
    /// Its own post-copy, begun at once.
    PostCopy,
    /// Pre-copy over two connections, compressed.
    MultifdZstd,
}

impl Leaving {
    const fn capability(self) -> &'static str {
        match self {
            Self::PostCopy => "postcopy-ram",
            Self::MultifdZstd => "multifd",
        }
    }
}

impl Direct {
    /// Starts a QEMU whose guest boots, or waits for its state.
    ///
    /// # Errors
    /// When it does not start; with the end of its log.
    pub async fn start(spec: &LaunchSpec, place: Place<'_>) -> Result<Self, RigError> {
        let run_dir = RunDir::new(place.folder, &spec.name);
        run_dir.create(NOBODY.uid, NOBODY.gid).map_err(RigError::io("cannot make folders"))?;
        let mut arguments = command_line(spec, &run_dir);
        if spec.begin == Begin::Incoming {
            // An agent's QEMU stands until COMMIT; one that moves by itself runs at once.
            arguments.retain(|argument| argument != "-S");
        }
        let dir = run_dir.clone();
        let start = move || QemuProcess::start(Path::new(QEMU), &arguments, NOBODY, &dir);
        let process = place.namespace.within(start)?.map_err(RigError::refused("QEMU"))?;
        let deadline = clock::now() + PATIENCE;
        loop {
            if let Ok(qmp) = Qmp::connect(&run_dir.qmp_socket()).await {
                return Ok(Self { process, qmp, run_dir });
            }
            if clock::now() > deadline {
                return Err(RigError::refused("QEMU's monitor")(run_dir.log_tail()));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Boots a guest.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn boot(spec: &LaunchSpec, place: Place<'_>) -> Result<Self, RigError> {
        let booted = Self::start(&LaunchSpec { begin: Begin::Boot, ..spec.clone() }, place).await?;
        booted.qmp.cont().await.map_err(RigError::refused("to boot"))?;
        Ok(booted)
    }

    /// Starts a QEMU that listens for this guest.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn listen(spec: &LaunchSpec, place: Place<'_>) -> Result<Self, RigError> {
        let spec = LaunchSpec { begin: Begin::Incoming, ..spec.clone() };
        let waiting = Self::start(&spec, place).await?;
        let uri = format!("tcp:{}", SocketAddrV4::new(place.address, PORT));
        waiting.qmp.migrate_incoming(&uri).await.map_err(RigError::refused("to listen"))?;
        Ok(waiting)
    }

    /// Starts a QEMU that listens for a guest that comes in this way.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn listen_for(
        spec: &LaunchSpec,
        place: Place<'_>,
        leaving: Leaving,
    ) -> Result<Self, RigError> {
        let spec = LaunchSpec { begin: Begin::Incoming, ..spec.clone() };
        let waiting = Self::start(&spec, place).await?;
        waiting.set(leaving).await?;
        let uri = format!("tcp:{}", SocketAddrV4::new(place.address, PORT));
        waiting.qmp.migrate_incoming(&uri).await.map_err(RigError::refused("to listen"))?;
        Ok(waiting)
    }

    async fn set(&self, leaving: Leaving) -> Result<(), RigError> {
        let set = self.qmp.migrate_set_only(&["events", leaving.capability()]).await;
        set.map_err(RigError::refused("a capability"))?;
        // As fast as it goes, with nothing that holds the end back.
        let mut parameters = json!({"max-bandwidth": 0, "downtime-limit": 300});
        if leaving == Leaving::MultifdZstd {
            parameters["multifd-compression"] = "zstd".into();
            parameters["multifd-channels"] = 2.into();
        }
        let set = self.qmp.execute("migrate-set-parameters", parameters, PATIENCE).await;
        set.map(drop).map_err(RigError::refused("a parameter"))
    }

    /// Leaves for `destination`, which listens for that at `address`; returns when this QEMU has gone,
    /// and how long it took from the order on.
    ///
    /// # Errors
    /// When QEMU refuses, or it takes longer than `within`.
    pub async fn leave(
        self,
        address: Ipv4Addr,
        leaving: Leaving,
        within: Duration,
    ) -> Result<Duration, RigError> {
        self.set(leaving).await?;
        let uri = format!("tcp:{}", SocketAddrV4::new(address, PORT));
        let began = clock::now();
        self.qmp.migrate(&uri).await.map_err(RigError::refused("to migrate"))?;
        let mut asked = leaving != Leaving::PostCopy;
        loop {
            let info = self.qmp.query_migrate().await.map_err(RigError::refused("its state"))?;
            match info.status {
                MigrationStatus::Completed => break,
                MigrationStatus::Failed => {
                    let why = info.error_desc.unwrap_or_default();
                    return Err(RigError::refused("to migrate")(why));
                }
                MigrationStatus::Active if !asked => {
                    let start = self.qmp.execute("migrate-start-postcopy", Value::Null, PATIENCE);
                    start.await.map_err(RigError::refused("post-copy"))?;
                    asked = true;
                }
                _ if began.elapsed() > within => {
                    let what = "a migration".to_owned();
                    return Err(RigError::TooLate { what, seconds: within.as_secs() });
                }
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
        self.end().await?;
        Ok(began.elapsed())
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its monitor.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// What its guest has said on its serial line here.
    #[must_use]
    pub fn serial_log(&self) -> PathBuf {
        self.run_dir.serial_log()
    }

    /// Migrates to `destination`, which listens at `address`, and ends this QEMU.
    ///
    /// # Errors
    /// When QEMU refuses, or it takes too long.
    pub async fn migrate_to(
        self,
        destination: &Self,
        address: Ipv4Addr,
        aim: Aim,
    ) -> Result<Moments, RigError> {
        let (mut here, mut there) = (self.qmp.events(), destination.qmp.events());
        let parameters = MigrateParameters {
            downtime_limit_ms: u64::try_from(aim.downtime.as_millis()).ok(),
            max_bandwidth_bytes: Some(aim.limit.unwrap_or(0) / 8),
        };
        let refused = RigError::refused("to migrate");
        self.qmp.migrate_set_parameters(parameters).await.map_err(refused)?;
        let uri = format!("tcp:{}", SocketAddrV4::new(address, PORT));
        self.qmp.migrate(&uri).await.map_err(RigError::refused("to migrate"))?;
        let moments = async {
            let stop = event(&mut here, "STOP").await?.unix_us();
            let resume = event(&mut there, "RESUME").await?.unix_us();
            Ok(Moments { stop, resume })
        };
        let late =
            |_| RigError::TooLate { what: "a migration".to_owned(), seconds: aim.within.as_secs() };
        let moments = tokio::time::timeout(aim.within, moments).await.map_err(late)??;
        self.end().await?;
        Ok(moments)
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn end(self) -> Result<(), RigError> {
        self.qmp.quit().await.map_err(RigError::refused("to quit"))?;
        let ended = self.process.end_within(PATIENCE).await;
        ended.map(drop).map_err(RigError::refused("to quit"))
    }
}

async fn event(events: &mut Receiver<QmpEvent>, name: &str) -> Result<QmpEvent, RigError> {
    loop {
        let event = events.recv().await.map_err(RigError::refused("QEMU's events"))?;
        if event.name == name {
            return Ok(event);
        }
    }
}
