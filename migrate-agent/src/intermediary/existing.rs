//! A store in a Redis that somebody else runs, as the configuration names it: only the names of the
//! migration are ours there, and nothing of it is ever started, ended or configured by us.
//!
//! Used by [`super::Intermediary`]. Its memory is not this host's, so none is set aside here; whether
//! it has room is asked before a page leaves.

use std::sync::Arc;

use lifeboat_protocol::ids::{MigrationId, VmId};
use lifeboat_protocol::units::Bytes;
use lifeboat_scatter_gather::store::{KeySpace, Login, RedisStore, Secret, StoreError, User};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::record::Record;
use super::{Existing, Intermediary, IntermediaryError, Kept, PATIENCE, Seen, unix_ms};

impl Intermediary {
    pub(super) async fn prepare_existing(
        &self,
        existing: &Existing,
        migration: MigrationId,
        vm: VmId,
        room: Bytes,
    ) -> Result<Kept, IntermediaryError> {
        let mut record = Record {
            migration,
            vm,
            room,
            set_aside: Bytes::ZERO,
            address: existing.address.clone(),
            plain: existing.plain,
            existing: true,
            user: existing.user.clone(),
            secret: existing.password.clone(),
            owner_secret: String::new(),
            run: String::new(),
            process: 0,
            prepared_unix_ms: unix_ms(),
        };
        let store = self.reach(&record).await?;
        suits(&store, room).await?.map_or(Ok(()), |why| {
            Err(IntermediaryError::Unsuitable(existing.address.clone(), why))
        })?;
        record.run = store.run().to_string();
        let written = record.write(&self.inner.settings.directory);
        written.map_err(|source| self.file("remember a store", source))?;
        Ok(Kept { record, server: None, owner: Some(store), seen: Seen::default() })
    }

    pub(super) async fn adopt_existing(&self, record: Record) {
        let migration = record.migration.clone();
        let owner = match self.reach(&record).await {
            Ok(store) => Some(store),
            Err(error) => {
                tracing::warn!(%migration, %error, "its store does not answer");
                None
            }
        };
        self.kept().insert(migration, Kept { record, server: None, owner, seen: Seen::default() });
    }

    /// Frees the migration's names there.
    pub(super) async fn end_existing(
        &self,
        record: &Record,
        owner: Option<RedisStore>,
    ) -> Result<(), IntermediaryError> {
        let store = match owner {
            Some(store) => store,
            None => self.reach(record).await?,
        };
        store.clear().await?;
        let removed = Record::remove(&self.inner.settings.directory, &record.migration);
        removed.map_err(|source| self.file("forget a store", source))
    }

    async fn reach(&self, record: &Record) -> Result<RedisStore, IntermediaryError> {
        let login = Login {
            user: User { name: record.user.clone(), secret: Secret::given(&record.secret) },
            keys: KeySpace::new(&record.migration),
            patience: PATIENCE,
            expected: None,
        };
        let unusable = |why: String| IntermediaryError::Unsuitable(record.address.clone(), why);
        let connected = tokio::time::timeout(PATIENCE, TcpStream::connect(&record.address)).await;
        let stream = connected.map_err(|_| StoreError::Late)?;
        let stream = stream.map_err(|error| unusable(error.to_string()))?;
        if record.plain {
            return Ok(RedisStore::connect(stream, &login).await?);
        }
        let identity = self.inner.identity.as_ref();
        let identity = identity.ok_or_else(|| unusable("there are no certificates".to_owned()))?;
        let name = ServerName::try_from(record.named().to_owned());
        let name = name.map_err(|error| unusable(error.to_string()))?;
        let connector = TlsConnector::from(Arc::clone(identity.client_config()));
        let stream = connector.connect(name, stream).await;
        let stream = stream.map_err(|error| unusable(error.to_string()))?;
        Ok(RedisStore::connect(stream, &login).await?)
    }
}

/// What speaks against keeping pages there.
async fn suits(store: &RedisStore, room: Bytes) -> Result<Option<String>, StoreError> {
    let policy = store.when_full().await?;
    if policy != "noeviction" {
        return Ok(Some(format!("its maxmemory-policy is {policy}, so it may drop pages")));
    }
    let usage = store.usage().await?;
    let free = usage.most - usage.used;
    Ok((usage.most > Bytes::ZERO && free < room)
        .then(|| format!("it has {free} free, and {room} are needed")))
}
