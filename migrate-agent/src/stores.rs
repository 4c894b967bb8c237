//! The way to a migration's stores, from its source and from its destination: a TCP connection, TLS
//! with the agents' certificates unless the operator named a store without, and a login.
//!
//! Used by `source/scattering.rs` and `destination/gathering/`. The stores themselves are
//! `lifeboat_scatter_gather::store`; who keeps them is `intermediary/`.

use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::agent::{PageStore, Redundancy as PlannedRedundancy, ScatterPlan};
use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units::{BitsPerSec, Bytes, BytesPerSec};
use lifeboat_scatter_gather::pack::Batch;
use lifeboat_scatter_gather::redundancy::placement::Offer;
use lifeboat_scatter_gather::redundancy::{Redundancy, StoreSet};
use lifeboat_scatter_gather::store::{
    KeySpace, Login, RedisStore, RunId, Secret, StoreError, User,
};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::handover::gathering::StoreAt;
use crate::tls::TlsIdentity;

/// What a store is assumed to take where nobody has said: faster than any network here.
const RATE_UNKNOWN: BytesPerSec = BytesPerSec(1 << 32);
/// How long a connection may take to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Why a store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreLinkError {
    /// Nobody answers there.
    #[error("store {store} cannot be reached")]
    Connect {
        /// Host and address.
        store: StoreName,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Nobody answers there in time.
    #[error("store {store} does not answer within {} ms", CONNECT_LIMIT.as_millis())]
    Silent {
        /// Host and address.
        store: StoreName,
    },
    /// It wants TLS, and this host has no certificates.
    #[error("store {store} is reached over TLS, and this host has no certificates (`tls_dir`)")]
    NoCertificates {
        /// Host and address.
        store: StoreName,
    },
    /// It does not let us in, or is not the one that it was.
    #[error("store {store} cannot be used")]
    Store {
        /// Host and address.
        store: StoreName,
        /// What it said.
        #[source]
        source: StoreError,
    },
}

impl StoreLinkError {
    /// What a store said when it was in use.
    pub(crate) fn of(at: &StoreAt, source: StoreError) -> Self {
        Self::Store { store: name_of(at), source }
    }

    /// The intermediary's host; empty for a store that was named by its address.
    #[must_use]
    pub fn host(&self) -> &str {
        match self {
            Self::Connect { store, .. }
            | Self::Silent { store }
            | Self::NoCertificates { store }
            | Self::Store { store, .. } => &store.host,
        }
    }
}

/// Which store it is, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreName {
    host: String,
    address: String,
}

impl std::fmt::Display for StoreName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host.as_str() {
            "" => f.write_str(&self.address),
            host => write!(f, "at {host} ({})", self.address),
        }
    }
}

/// What a plan for a migration's stores lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No stores, too many, or fewer than the redundancy needs.
    #[error("{redundancy:?} needs {least} to 64 stores, and {given} are named")]
    Stores {
        /// What is wanted.
        redundancy: Redundancy,
        /// The fewest.
        least: usize,
        /// How many there are.
        given: usize,
    },
    /// A number of pages that no pack has.
    #[error("a pack holds 1 to {most} pages, not {0}", most = Batch::MOST)]
    Batch(u32),
    /// A redundancy that this version does not know.
    #[error("a redundancy is asked for that this agent does not know")]
    Redundancy,
}

/// Where a migration's pages wait between source and destination, checked.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The stores, in the order that both agents count them in.
    pub stores: Vec<StoreAt>,
    /// Bytes of packs that each takes, and how fast.
    pub offers: Vec<Offer>,
    /// What is left when one is lost.
    pub redundancy: Redundancy,
    /// Pages of a pack.
    pub batch: Batch,
    /// Pages go there while the guest still runs at the source.
    pub while_live: bool,
}

impl Plan {
    /// Checks what the controller sent.
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn new(plan: &ScatterPlan) -> Result<Self, PlanError> {
        let given = plan.stores.len();
        let redundancy = match plan.redundancy() {
            PlannedRedundancy::Unspecified if plan.redundancy == 0 => Redundancy::of(given),
            PlannedRedundancy::Unspecified => return Err(PlanError::Redundancy),
            PlannedRedundancy::None => Redundancy::None,
            PlannedRedundancy::Mirror => Redundancy::Mirror,
            PlannedRedundancy::Parity => Redundancy::Parity,
        };
        let least = redundancy.stores_least();
        if given < least || given > StoreSet::MOST {
            return Err(PlanError::Stores { redundancy, least, given });
        }
        let batch = match plan.batch_pages {
            0 => Some(Batch::default()),
            pages => u16::try_from(pages).ok().and_then(Batch::new),
        };
        Ok(Self {
            stores: plan.stores.iter().map(StoreAt::from).collect(),
            offers: plan.stores.iter().map(offer).collect(),
            redundancy,
            batch: batch.ok_or(PlanError::Batch(plan.batch_pages))?,
            while_live: plan.while_live,
        })
    }
}

/// What a store takes. Where nobody has said how fast, all are alike.
fn offer(store: &PageStore) -> Offer {
    let rate = match BitsPerSec(store.rate_bits_per_sec).bytes_per_sec() {
        BytesPerSec(0) => RATE_UNKNOWN,
        rate => rate,
    };
    Offer { room: Bytes(store.memory_bytes), rate }
}

fn name_of(at: &StoreAt) -> StoreName {
    StoreName { host: at.host.clone(), address: at.address.clone() }
}

/// Comes into a store. `expected`: the run that pages were put into; `patience`: how long an answer
/// may take.
///
/// # Errors
/// [`StoreLinkError`], which names the store.
pub async fn connect(
    at: &StoreAt,
    migration: &MigrationId,
    identity: Option<&TlsIdentity>,
    expected: Option<RunId>,
    patience: Duration,
) -> Result<RedisStore, StoreLinkError> {
    let login = Login {
        user: User { name: at.user.clone(), secret: Secret::given(at.secret.clone()) },
        keys: KeySpace::new(migration),
        patience,
        expected,
    };
    let opened = tokio::time::timeout(CONNECT_LIMIT, open(at, identity, &login)).await;
    opened.map_err(|_| StoreLinkError::Silent { store: name_of(at) })?
}

async fn open(
    at: &StoreAt,
    identity: Option<&TlsIdentity>,
    login: &Login,
) -> Result<RedisStore, StoreLinkError> {
    let failed = |source| StoreLinkError::Connect { store: name_of(at), source };
    let refused = |source| StoreLinkError::Store { store: name_of(at), source };
    let socket = TcpStream::connect(&at.address).await.map_err(failed)?;
    socket.set_nodelay(true).map_err(failed)?;
    if at.plain {
        return RedisStore::connect(socket, login).await.map_err(refused);
    }
    let none = || StoreLinkError::NoCertificates { store: name_of(at) };
    let identity = identity.ok_or_else(none)?;
    // Who is there counts: an intermediary's certificate names its host. A store that is named by
    // its address alone shows a certificate for that, and a Redis of somebody else's what it is known by.
    let named = match (at.certificate.as_str(), at.host.as_str()) {
        ("", "") => at.address.rsplit_once(':').map_or(at.address.as_str(), |(host, _)| host),
        ("", host) => host,
        (certificate, _) => certificate,
    };
    let name = ServerName::try_from(named.to_owned())
        .map_err(|error| failed(std::io::Error::new(std::io::ErrorKind::InvalidInput, error)))?;
    let connector = TlsConnector::from(Arc::clone(identity.client_config()));
    let stream = connector.connect(name, socket).await.map_err(failed)?;
    RedisStore::connect(stream, login).await.map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(stores: usize, redundancy: PlannedRedundancy, batch_pages: u32) -> ScatterPlan {
        let store = PageStore { memory_bytes: 7, ..PageStore::default() };
        let redundancy = redundancy.into();
        ScatterPlan { stores: vec![store; stores], redundancy, batch_pages, while_live: false }
    }

    #[test]
    fn redundancy_follows_the_stores_unless_it_is_said() {
        use PlannedRedundancy as P;
        let of = |stores, said| Plan::new(&plan(stores, said, 0)).map(|plan| plan.redundancy);
        assert_eq!(of(1, P::Unspecified), Ok(Redundancy::None));
        assert_eq!(of(2, P::Unspecified), Ok(Redundancy::Mirror));
        assert_eq!(of(3, P::Unspecified), Ok(Redundancy::Parity));
        assert_eq!(of(3, P::None), Ok(Redundancy::None));
        for (stores, said) in [(0, P::Unspecified), (1, P::Mirror), (65, P::Parity)] {
            assert!(matches!(of(stores, said), Err(PlanError::Stores { .. })), "{stores}");
        }
    }

    #[test]
    fn what_no_pack_can_be_is_refused() {
        use PlannedRedundancy::None;
        assert_eq!(Plan::new(&plan(1, None, 9000)).err(), Some(PlanError::Batch(9000)));
        assert_eq!(Plan::new(&plan(1, None, 70_000)).err(), Some(PlanError::Batch(70_000)));
        assert_eq!(Plan::new(&plan(1, None, 16)).unwrap().batch.pages(), 16);
        let unknown = ScatterPlan { redundancy: 9, ..plan(3, None, 0) };
        assert_eq!(Plan::new(&unknown).err(), Some(PlanError::Redundancy));
    }
}
