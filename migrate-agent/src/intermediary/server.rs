//! A store in a redis-server of our own: what it needs before it starts, its end, its adoption.
//!
//! Used by [`super::Intermediary`]. A server is recognised by its working directory, which is the
//! store's own folder and no other process's: a number alone may long be somebody else's.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use lifeboat_protocol::ids::{MigrationId, VmId};
use lifeboat_protocol::units::Bytes;
use lifeboat_scatter_gather::store::{
    KeySpace, Launch, Secret, ServerError, Settings as StoreSettings, StoreServer, TlsListen, User,
};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::record::Record;
use super::{
    Intermediary, IntermediaryError, Kept, LEFT_FREE, PATIENCE, Seen, Settings, available, cgroup,
    unix_ms,
};
use crate::programs;
use crate::registry::random_token;
use crate::vms::chain;

/// Our own login at a store.
const OWNER: &str = "intermediary";
/// What a server needs for TLS, as `tls_dir` calls it.
const TLS_FILES: [&str; 3] = ["cert.pem", "key.pem", "ca.pem"];

/// Why no store can run here; empty where it can.
pub(super) async fn obstacle(settings: &Settings, address: IpAddr) -> String {
    let program = settings.program.display().to_string();
    if let Err(error) = programs::run(&program, &["--version"]).await {
        return format!("{}; install redis-server, or set intermediary.program", chain(&error));
    }
    if settings.tls_dir.is_none() && !address.is_loopback() {
        return "stores are reached over TLS and there are no certificates; set tls_dir".to_owned();
    }
    String::new()
}

/// Makes a directory that the servers' user can pass, and only root can list.
pub(super) fn make_passable(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o711))
}

impl Intermediary {
    pub(super) async fn prepare_own(
        &self,
        migration: MigrationId,
        vm: VmId,
        room: Bytes,
    ) -> Result<Kept, IntermediaryError> {
        let drawn = || random_token().map_err(|errno| self.file("draw a password", errno.into()));
        let secret = |bytes: [u8; 32]| Secret::new(&bytes).reveal().to_owned();
        let mut record = Record {
            user: migration.to_string(),
            migration,
            vm,
            room,
            set_aside: Bytes::ZERO,
            address: String::new(),
            plain: self.inner.settings.tls_dir.is_none(),
            existing: false,
            secret: secret(drawn()?),
            owner_secret: secret(drawn()?),
            run: String::new(),
            process: 0,
            prepared_unix_ms: unix_ms(),
        };
        let needed = self.settings_of(&record, None).memory();
        self.has_room(needed)?;
        let aside = self.inner.vms.set_aside(record.migration.as_str(), needed);
        aside.map_err(|free| IntermediaryError::VmsFirst { needed, free })?;
        record.set_aside = needed;
        match self.start(&mut record).await {
            Ok(server) => {
                let owner = Some(server.owner().clone());
                Ok(Kept { record, server: Some(server), owner, seen: Seen::default() })
            }
            Err(error) => {
                let undone = self.tidy(&record).await;
                if let Err(undone) = undone {
                    tracing::warn!(migration = %record.migration, %undone, "left for the next start");
                }
                Err(error)
            }
        }
    }

    fn has_room(&self, needed: Bytes) -> Result<(), IntermediaryError> {
        let (free, most) = (self.unpromised(), self.inner.settings.memory);
        if needed > free {
            return Err(IntermediaryError::Full { needed, free, most });
        }
        match available() {
            Some(available) if available < needed + LEFT_FREE => {
                Err(IntermediaryError::Machine { needed: needed + LEFT_FREE, available })
            }
            _ => Ok(()),
        }
    }

    /// Starts the server; each port that somebody else has meanwhile is passed over.
    async fn start(&self, record: &mut Record) -> Result<StoreServer, IntermediaryError> {
        let settings = &self.inner.settings;
        self.make_folder(record)?;
        let mut ports = settings.ports.clone();
        let server = loop {
            let Some(address) = self.next_port(&mut ports) else { return Err(self.no_port()) };
            record.address = address.to_string();
            record
                .write(&settings.directory)
                .map_err(|source| self.file("remember a store", source))?;
            match self.start_at(record, address).await {
                Err(ServerError::Ended { log, .. }) if log.contains("already in use") => {}
                started => break started?,
            }
        };
        (record.process, record.run) = (server.process(), server.run().to_string());
        let kept = record.write(&settings.directory);
        let kept = kept.map_err(|source| self.file("remember a store", source));
        self.forget_keys(record);
        if let Err(error) = kept {
            let _ = server.stop(PATIENCE).await;
            return Err(error);
        }
        let name = self.group(record);
        let root = self.inner.cgroups.as_ref();
        if let Err(error) = cgroup::set_aside(root, &name, record.process, record.set_aside) {
            let error = chain(&error);
            tracing::warn!(migration = %record.migration, error, "memory is counted, not set aside by the kernel");
        }
        Ok(server)
    }

    async fn start_at(
        &self,
        record: &Record,
        address: SocketAddr,
    ) -> Result<StoreServer, ServerError> {
        let ours = &self.inner.settings;
        let user = (ours.user.uid, ours.user.gid);
        let launch = Launch {
            program: &ours.program,
            user: rustix::process::geteuid().is_root().then_some(user),
            plain: record.plain.then_some(address),
        };
        let settings = self.settings_of(record, (!record.plain).then_some(address));
        StoreServer::launch(launch, &settings, PATIENCE).await
    }

    fn settings_of(&self, record: &Record, tls: Option<SocketAddr>) -> StoreSettings {
        let folder = record.folder(&self.inner.settings.directory);
        let login = |name: &str, secret: &str| User {
            name: name.to_owned(),
            secret: Secret::given(secret),
        };
        StoreSettings {
            room: record.room,
            keys: KeySpace::new(&record.migration),
            owner: login(OWNER, &record.owner_secret),
            migration: login(&record.user, &record.secret),
            tls: tls.map(|address| TlsListen {
                address,
                certificate: folder.join(TLS_FILES[0]),
                key: folder.join(TLS_FILES[1]),
                authority: folder.join(TLS_FILES[2]),
            }),
            folder,
        }
    }

    /// The next port that nobody listens at.
    fn next_port(&self, ports: &mut impl Iterator<Item = u16>) -> Option<SocketAddr> {
        let at = |port| SocketAddr::new(self.inner.address, port);
        ports.map(at).find(|address| TcpListener::bind(address).is_ok())
    }

    fn no_port(&self) -> IntermediaryError {
        let (first, last) = self.inner.settings.ports.clone().into_inner();
        IntermediaryError::Ports { first, last, address: self.inner.address }
    }

    /// A folder for the server's user alone, with the certificates that it reads at its start.
    fn make_folder(&self, record: &Record) -> Result<(), IntermediaryError> {
        let settings = &self.inner.settings;
        let folder = record.folder(&settings.directory);
        let made = || {
            fs::create_dir_all(&folder)?;
            fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))?;
            let files = settings.tls_dir.iter().flat_map(|tls| TLS_FILES.map(|name| (tls, name)));
            for (tls, name) in files {
                let copy = folder.join(name);
                fs::copy(tls.join(name), &copy)?;
                fs::set_permissions(&copy, fs::Permissions::from_mode(0o600))?;
                self.hand_over(&copy)?;
            }
            self.hand_over(&folder)
        };
        made().map_err(|source| self.file("make a store's folder", source))
    }

    fn hand_over(&self, path: &Path) -> io::Result<()> {
        if !rustix::process::geteuid().is_root() {
            return Ok(());
        }
        let user = self.inner.settings.user;
        std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid))
    }

    /// A running server has them in its memory.
    fn forget_keys(&self, record: &Record) {
        let folder = record.folder(&self.inner.settings.directory);
        for name in TLS_FILES {
            let _ = fs::remove_file(folder.join(name));
        }
    }

    /// Takes up a store of an agent before us, or takes away what is left of it.
    pub(super) async fn adopt(&self, record: Record) {
        let migration = record.migration.clone();
        if record.existing {
            return self.adopt_existing(record).await;
        }
        let settings = self.settings_of(&record, None);
        let found = StoreServer::adopt(&settings, None, PATIENCE).await;
        let server = match found {
            Ok(server) if server.run().to_string() == record.run => Some(server),
            other => {
                let process = record.process;
                if process == 0 || !is_server(process, &settings.folder) {
                    tracing::warn!(%migration, "its store is gone, and pages that it held with it");
                    if let Err(error) = self.tidy(&record).await {
                        tracing::warn!(%migration, %error, "not tidied up");
                    }
                    return;
                }
                let why = other.err().map(|error| error.to_string());
                tracing::error!(%migration, process, ?why, "a store runs and does not answer");
                None
            }
        };
        // What is set aside already may be more than a smaller configuration allows: it stays.
        let _ = self.inner.vms.set_aside(migration.as_str(), record.set_aside);
        tracing::info!(%migration, process = record.process, "store adopted");
        let owner = server.as_ref().map(|server| server.owner().clone());
        self.kept().insert(migration, Kept { record, server, owner, seen: Seen::default() });
    }

    /// Ends a store and takes away all that belongs to it.
    pub(super) async fn end(&self, kept: Kept) -> Result<(), IntermediaryError> {
        let Kept { record, server, owner, .. } = kept;
        if record.existing {
            return self.end_existing(&record, owner).await;
        }
        drop(owner);
        if let Some(server) = server
            && let Err(error) = server.stop(PATIENCE).await
        {
            tracing::warn!(migration = %record.migration, %error, "a store has to be killed");
        }
        self.tidy(&record).await
    }

    /// What a store leaves behind: its process, folder, control group, memory and record.
    pub(super) async fn tidy(&self, record: &Record) -> Result<(), IntermediaryError> {
        let directory = &self.inner.settings.directory;
        let folder = record.folder(directory);
        if record.process != 0 {
            kill(record.process, &folder).await?;
        }
        match fs::remove_dir_all(&folder) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(self.file("remove a store's folder", source));
            }
            _ => (),
        }
        cgroup::give_back(self.inner.cgroups.as_ref(), &self.group(record));
        self.inner.vms.give_back(record.migration.as_str());
        let removed = Record::remove(directory, &record.migration);
        removed.map_err(|source| self.file("forget a store", source))
    }

    /// Its control group's name: hosts of a lab share a machine.
    fn group(&self, record: &Record) -> String {
        format!("{}-{}", self.inner.host, record.migration)
    }

    pub(super) fn file(&self, doing: &'static str, source: io::Error) -> IntermediaryError {
        let path: PathBuf = self.inner.settings.directory.clone();
        IntermediaryError::File { doing, path, source }
    }
}

/// Whether a process is the server that works in this folder. A zombie works nowhere.
fn is_server(process: u32, folder: &Path) -> bool {
    fs::read_link(format!("/proc/{process}/cwd")).is_ok_and(|works_in| works_in == folder)
}

/// Kills a server that is still there, and waits for its end.
async fn kill(process: u32, folder: &Path) -> Result<(), IntermediaryError> {
    let Some(pid) = i32::try_from(process).ok().and_then(Pid::from_raw) else { return Ok(()) };
    // Held first, looked at then: what is killed is what was seen.
    let Ok(handle) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
    if !is_server(process, folder) {
        return Ok(());
    }
    let _ = rustix::process::pidfd_send_signal(&handle, Signal::KILL);
    let gone = async {
        while is_server(process, folder) {
            tokio::time::sleep(PATIENCE / 500).await;
        }
    };
    let gone = tokio::time::timeout(PATIENCE, gone).await;
    gone.map_err(|_| IntermediaryError::Survives(process))
}
