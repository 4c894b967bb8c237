//! Runs the redis-server of one migration. Used by an intermediary's agent.
//!
//! Like a guest, a store outlives the agent that started it: after the source has left it holds the
//! only copy. So it is in a process group of its own, dropping [`StoreServer`] does not end it, and
//! an agent that starts again adopts it by its socket. Whoever holds the VM's future ends it.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::client::{Login, RedisStore, RunId};
use super::error::{ServerError, StoreError};
use super::settings::Settings;

/// How often a starting or ending server is looked at.
const GLANCE: Duration = Duration::from_millis(10);
/// How much of its log an error shows, in bytes.
const LOG_SHOWN: usize = 400;

/// Who runs a server, and where it is reached beside its socket and TLS.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// The program.
    pub program: &'a Path,
    /// User and group that it runs as; `None` for our own. The folder of the store has to be theirs.
    pub user: Option<(u32, u32)>,
    /// An address without TLS. Passwords and sealed pages travel there as they are: for loopback.
    pub plain: Option<SocketAddr>,
}

/// A server that runs.
#[derive(Debug)]
pub struct StoreServer {
    /// `None` for one that was adopted: then it is somebody else's child.
    child: Option<Child>,
    owner: RedisStore,
    process: u32,
}

impl StoreServer {
    /// Starts a server as ourselves, and waits until it answers.
    ///
    /// # Errors
    /// [`ServerError`]; nothing is left running then.
    pub async fn start(
        program: &Path,
        settings: &Settings,
        patience: Duration,
    ) -> Result<Self, ServerError> {
        Self::launch(Launch { program, user: None, plain: None }, settings, patience).await
    }

    /// Starts a server as somebody else, and waits until it answers.
    ///
    /// # Errors
    /// [`ServerError`]; nothing is left running then.
    pub async fn launch(
        launch: Launch<'_>,
        settings: &Settings,
        patience: Duration,
    ) -> Result<Self, ServerError> {
        if UnixStream::connect(settings.socket()).await.is_ok() {
            // Another would take the socket's name away and leave it out of reach, with its pages.
            return Err(ServerError::Occupied(settings.folder.clone()));
        }
        let mut child = spawn(launch, settings).await?;
        let ready = tokio::select! {
            ready = tokio::time::timeout(patience, ready(settings, patience)) => ready,
            ended = child.wait() => return Err(ended_early(settings, ended)),
        };
        match ready {
            Ok(Ok((owner, process))) => Ok(Self { child: Some(child), owner, process }),
            failed => {
                // Nothing was put into it: it may go the hard way, and its end is waited for.
                let _ = child.kill().await;
                Err(failed.map_or(ServerError::NotReady(patience), |inner| {
                    inner.err().unwrap_or(ServerError::NotReady(patience))
                }))
            }
        }
    }

    /// Takes over a server that an earlier agent started with these settings.
    ///
    /// # Errors
    /// [`ServerError`] where none answers, or another run than `expected`.
    pub async fn adopt(
        settings: &Settings,
        expected: Option<RunId>,
        patience: Duration,
    ) -> Result<Self, ServerError> {
        let login = login(settings, expected, patience);
        let stream = UnixStream::connect(settings.socket()).await;
        let folder = settings.folder.clone();
        let stream = stream.map_err(|source| ServerError::Folder { folder, source })?;
        let owner = RedisStore::connect(stream, &login).await?;
        let process = owner.usage().await?.process;
        Ok(Self { child: None, owner, process })
    }

    /// Which run this is: whoever puts pages here keeps it, to notice a restart.
    #[must_use]
    pub fn run(&self) -> &RunId {
        self.owner.run()
    }

    /// The process, to set memory aside for it.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.process
    }

    /// A connection that may do everything.
    #[must_use]
    pub fn owner(&self) -> &RedisStore {
        &self.owner
    }

    /// Returns once the server has ended: everything in it is lost then.
    pub async fn ended(&mut self) -> Option<ExitStatus> {
        if let Some(child) = &mut self.child {
            return child.wait().await.ok();
        }
        // A slow answer is no end; only a broken connection is.
        while !matches!(self.owner.usage().await, Err(StoreError::Broken(_))) {
            tokio::time::sleep(GLANCE * 10).await;
        }
        None
    }

    /// Ends the server and waits for its end; the hard way after `patience`.
    ///
    /// # Errors
    /// [`ServerError::NotReady`] where even that did not help within `patience`.
    pub async fn stop(mut self, patience: Duration) -> Result<(), ServerError> {
        let asked = self.owner.shut_down().await;
        if let Err(error) = asked {
            tracing::warn!(%error, process = self.process, "a store did not end when asked");
        }
        if tokio::time::timeout(patience, self.ended()).await.is_ok() {
            return Ok(());
        }
        let hard = async {
            match &mut self.child {
                Some(child) => child.kill().await.is_ok(),
                None => false,
            }
        };
        match tokio::time::timeout(patience, hard).await {
            Ok(true) => Ok(()),
            _ => Err(ServerError::NotReady(patience)),
        }
    }
}

async fn spawn(launch: Launch<'_>, settings: &Settings) -> Result<Child, ServerError> {
    let Launch { program, user, plain } = launch;
    let failed = |source| ServerError::Program { program: program.to_owned(), source };
    let mut command = Command::new(program);
    command.arg("-").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    // A file that is in none of our folders would keep a file system busy for as long as it runs.
    command.current_dir("/").env_clear();
    if let Some((uid, gid)) = user {
        command.gid(gid).uid(uid);
    }
    let mut child = command.process_group(0).kill_on_drop(false).spawn().map_err(failed)?;
    let text = settings.text(plain);
    if let Some(mut input) = child.stdin.take()
        && let Err(source) = input.write_all(text.as_bytes()).await
    {
        let _ = child.kill().await;
        return Err(failed(source));
    }
    Ok(child)
}

/// Waits until the server lets its owner in.
async fn ready(settings: &Settings, patience: Duration) -> Result<(RedisStore, u32), ServerError> {
    let login = login(settings, None, patience);
    loop {
        if let Ok(stream) = UnixStream::connect(settings.socket()).await {
            match RedisStore::connect(stream, &login).await {
                Ok(owner) => {
                    let process = owner.usage().await?.process;
                    return Ok((owner, process));
                }
                Err(StoreError::Broken(_) | StoreError::Late) => {}
                Err(error) => return Err(error.into()),
            }
        }
        tokio::time::sleep(GLANCE).await;
    }
}

fn login(settings: &Settings, expected: Option<RunId>, patience: Duration) -> Login {
    let keys = settings.keys.clone();
    Login { user: settings.owner.clone(), keys, patience, expected }
}

fn ended_early(settings: &Settings, ended: std::io::Result<ExitStatus>) -> ServerError {
    let folder = settings.folder.clone();
    match ended {
        Err(source) => ServerError::Folder { folder, source },
        Ok(status) => {
            let log = std::fs::read(settings.log()).unwrap_or_default();
            let shown = &log[log.len().saturating_sub(LOG_SHOWN)..];
            ServerError::Ended { status, log: String::from_utf8_lossy(shown).into_owned() }
        }
    }
}
