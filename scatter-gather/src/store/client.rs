//! Puts packs into a store and gets them back. Used by the agents of source and destination.
//!
//! Commands of one connection are pipelined: whoever wants throughput has several calls under way,
//! and answers come in the order of the calls. A demand therefore waits behind what is under way on
//! its connection; it gets a connection of its own.

use std::fmt;
use std::time::Duration;

use bytes::BytesMut;
use lifeboat_protocol::units::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, FromRedisValue, RedisConnectionInfo, cmd};
use tokio::io::{AsyncRead, AsyncWrite};

use super::error::StoreError;
use super::keys::{Key, KeySpace};
use super::settings::User;
use crate::page::PackId;
use crate::tasks;

/// Names in one command that frees them.
const CLEARED_AT_ONCE: usize = 500;

/// Which start of a server this is: other with each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunId(String);

impl RunId {
    /// A run that was noted before.
    #[must_use]
    pub fn noted(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How to come in, and what is expected there.
#[derive(Debug, Clone)]
pub struct Login {
    /// Who.
    pub user: User,
    /// The migration's names.
    pub keys: KeySpace,
    /// How long an answer may take.
    pub patience: Duration,
    /// The run that pages were put into; `None` for the first connection.
    pub expected: Option<RunId>,
}

/// What a store says of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Used.
    pub used: Bytes,
    /// May be used.
    pub most: Bytes,
    /// The process that answers.
    pub process: u32,
}

/// A connection to a store. Clones share it.
#[derive(Clone)]
pub struct RedisStore {
    connection: MultiplexedConnection,
    keys: KeySpace,
    run: RunId,
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RedisStore({} at run {})", self.keys.prefix(), self.run)
    }
}

impl RedisStore {
    /// Comes in over `stream`, and asks which run answers.
    ///
    /// # Errors
    /// [`StoreError::Restarted`] where another run than expected answers; [`StoreError::Refused`]
    /// for a wrong login.
    pub async fn connect<S>(stream: S, login: &Login) -> Result<Self, StoreError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let info = RedisConnectionInfo::default()
            .set_username(&login.user.name)
            .set_password(login.user.secret.reveal())
            .set_skip_set_lib_name();
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(login.patience));
        let opened = MultiplexedConnection::new_with_config(&info, stream, config);
        let opened = tokio::time::timeout(login.patience, opened).await;
        let (connection, driver) = opened.map_err(|_| StoreError::Late)??;
        tasks::spawn(driver);
        let keys = login.keys.clone();
        let mut store = Self { connection, keys, run: RunId(String::new()) };
        store.run = RunId(store.info("server", "run_id").await?);
        match &login.expected {
            Some(expected) if *expected != store.run => {
                Err(StoreError::Restarted { expected: expected.clone(), found: store.run })
            }
            _ => Ok(store),
        }
    }

    /// The run that answers.
    #[must_use]
    pub fn run(&self) -> &RunId {
        &self.run
    }

    /// The migration's names.
    #[must_use]
    pub fn keys(&self) -> &KeySpace {
        &self.keys
    }

    /// Puts bytes under a name. When this returns, the store has acknowledged them.
    ///
    /// # Errors
    /// [`StoreError::Full`] where there is no room; others as the connection goes.
    pub async fn put(&self, key: &Key, bytes: &[u8]) -> Result<(), StoreError> {
        self.ask(cmd("SET").arg(key.as_str()).arg(bytes)).await
    }

    /// Gets what lies under a name.
    ///
    /// # Errors
    /// [`StoreError::Missing`] where nothing does; others as the connection goes.
    pub async fn get(&self, key: &Key) -> Result<BytesMut, StoreError> {
        let found: Option<Vec<u8>> = self.ask(cmd("GET").arg(key.as_str())).await?;
        found.map(owned).ok_or_else(|| StoreError::Missing(key.clone()))
    }

    /// Gets `length` bytes from `start` on of what lies under a name.
    ///
    /// # Errors
    /// [`StoreError::Missing`] where there is nothing there; fewer bytes than asked for are returned
    /// as they are.
    pub async fn get_part(
        &self,
        key: &Key,
        start: usize,
        length: usize,
    ) -> Result<BytesMut, StoreError> {
        if length == 0 {
            return Ok(BytesMut::new());
        }
        let last = start.saturating_add(length - 1);
        let part = cmd("GETRANGE").arg(key.as_str()).arg(start).arg(last).to_owned();
        let found: Vec<u8> = self.ask(&part).await?;
        match found.is_empty() {
            true => Err(StoreError::Missing(key.clone())),
            false => Ok(owned(found)),
        }
    }

    /// Frees what lies under these names; what is not there is no error.
    ///
    /// # Errors
    /// As the connection goes.
    pub async fn remove(&self, keys: &[Key]) -> Result<(), StoreError> {
        if keys.is_empty() {
            return Ok(());
        }
        let mut command = cmd("UNLINK");
        for key in keys {
            command.arg(key.as_str());
        }
        self.ask::<u64>(&command).await.map(drop)
    }

    /// All packs that lie here, ascending: for rebuilding a lost index.
    ///
    /// # Errors
    /// As the connection goes.
    pub async fn packs(&self) -> Result<Vec<PackId>, StoreError> {
        let names = self.names().await?;
        let mut packs: Vec<PackId> =
            names.iter().filter_map(|name| self.keys.pack_of(name)).collect();
        packs.sort_unstable();
        packs.dedup();
        Ok(packs)
    }

    /// The stripes whose parity lies here, ascending: for rebuilding a lost index.
    ///
    /// # Errors
    /// As the connection goes.
    pub async fn stripes(&self) -> Result<Vec<u64>, StoreError> {
        let names = self.names().await?;
        let mut stripes: Vec<u64> =
            names.iter().filter_map(|name| self.keys.stripe_of(name)).collect();
        stripes.sort_unstable();
        stripes.dedup();
        Ok(stripes)
    }

    /// All names of the migration, some perhaps twice.
    async fn names(&self) -> Result<Vec<String>, StoreError> {
        let (mut cursor, mut all) = (0_u64, Vec::new());
        let pattern = format!("{}*", self.keys.prefix());
        loop {
            let mut scan = cmd("SCAN");
            scan.arg(cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(1000);
            let (next, names): (u64, Vec<String>) = self.ask(&scan).await?;
            all.extend(names);
            cursor = next;
            if cursor == 0 {
                return Ok(all);
            }
        }
    }

    /// How many values lie here, of whomever.
    ///
    /// # Errors
    /// As the connection goes.
    pub async fn values(&self) -> Result<u64, StoreError> {
        self.ask(&cmd("DBSIZE")).await
    }

    /// How many connections there are, this one included.
    ///
    /// # Errors
    /// [`StoreError::Nonsense`], and as the connection goes.
    pub async fn connections(&self) -> Result<u64, StoreError> {
        self.figure("clients", "connected_clients").await
    }

    /// What happens to a value that finds no room; of a store that may keep pages, `noeviction`.
    ///
    /// # Errors
    /// [`StoreError::Nonsense`], and as the connection goes.
    pub async fn when_full(&self) -> Result<String, StoreError> {
        self.info("memory", "maxmemory_policy").await
    }

    /// Frees everything of the migration. Names of others stay.
    ///
    /// # Errors
    /// As the connection goes.
    pub async fn clear(&self) -> Result<u64, StoreError> {
        let mut freed = 0;
        let names = self.names().await?;
        for some in names.chunks(CLEARED_AT_ONCE) {
            let mut command = cmd("UNLINK");
            for name in some {
                command.arg(name);
            }
            freed += self.ask::<u64>(&command).await?;
        }
        Ok(freed)
    }

    /// What the store says of its memory and process.
    ///
    /// # Errors
    /// [`StoreError::Nonsense`], and as the connection goes.
    pub async fn usage(&self) -> Result<Usage, StoreError> {
        Ok(Usage {
            used: Bytes(self.figure("memory", "used_memory").await?),
            most: Bytes(self.figure("memory", "maxmemory").await?),
            process: self.figure("server", "process_id").await?,
        })
    }

    /// Ends the server. Only its owner may.
    ///
    /// # Errors
    /// [`StoreError::Refused`]; a broken connection is what was asked for.
    pub(super) async fn shut_down(&self) -> Result<(), StoreError> {
        match self.ask::<()>(cmd("SHUTDOWN").arg("NOSAVE").arg("NOW")).await {
            Ok(()) | Err(StoreError::Broken(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn figure<T: std::str::FromStr>(
        &self,
        section: &'static str,
        field: &'static str,
    ) -> Result<T, StoreError> {
        let text = self.info(section, field).await?;
        text.parse().map_err(|_| StoreError::Nonsense { what: field })
    }

    async fn info(&self, section: &str, field: &'static str) -> Result<String, StoreError> {
        let text: String = self.ask(cmd("INFO").arg(section)).await?;
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        let found = lines.find(|(name, _)| *name == field);
        found.map(|(_, value)| value.to_owned()).ok_or(StoreError::Nonsense { what: field })
    }

    async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, StoreError> {
        Ok(command.query_async(&mut self.connection.clone()).await?)
    }
}

/// The bytes as a buffer that can be written to, without copying them.
fn owned(bytes: Vec<u8>) -> BytesMut {
    BytesMut::from(bytes::Bytes::from(bytes))
}
