//! Queues on the ports of a switch: read them, reserve one, change it, give it back.
//!
//! Used by whoever shares out a link. A use of [`crate::ovsdb`]; not here: who gets how much, and the
//! flows that send packets to a queue.
//!
//! Three rules, each kept in one place (`plan.rs`):
//! - **Foreign rows stay as they are.** Ours carry a [`Mark`] in `external_ids`. A port that has a
//!   QoS of another kind than `linux-htb` is refused; one that has a `linux-htb` QoS is joined by
//!   adding our queues to it.
//! - **There is always a queue 0 with a minimum rate.** Without it HTB's default class has 12
//!   kbit/s, and everybody who has no queue of his own starves.
//! - **What is taken away is deleted.** QoS and Queue are root tables, which the server never
//!   collects; so a row goes in the same transaction that detaches it.
//!
//! What a plan was made on is repeated in its transaction as a `wait` without time: when somebody
//! else has changed it in between nothing happens, and the error is [`QosError::Changed`].

mod plan;
mod rows;

use std::time::Duration;

pub use plan::{release_plan, reserve_plan};
pub use rows::{Mark, PortRow, QosRow, QueueRow, Rates, Snapshot};

use crate::ovsdb::value::ValueError;
use crate::ovsdb::{Client, ClientError, Condition, Operation, Row, Uuid};

/// The only kind of QoS that we make or join.
pub const KIND: &str = "linux-htb";
/// Queues above this have no DSCP value, by which the classifier beside HTB tells them apart.
pub const HIGHEST_QUEUE: u32 = 63;

/// A queue that is wanted on a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    /// Name of the port.
    pub port: String,
    /// Its number, 1 to [`HIGHEST_QUEUE`].
    pub queue: u32,
    /// What it gets.
    pub rates: Rates,
    /// Whose it is, and until when.
    pub mark: Mark,
    /// What everybody else gets, when the port has no queue 0 yet. A minimum of 0 is made 1.
    pub others: Rates,
    /// What the port can carry, in bit/s, when it has no QoS yet.
    pub capacity: u64,
}

/// Why queues are not as they were wanted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QosError {
    /// The switch has no such port.
    #[error("the switch has no port {port}")]
    NoSuchPort {
        /// Its name.
        port: String,
    },
    /// Somebody else's QoS, of a kind that cannot be joined.
    #[error(
        "port {port} carries a QoS of type {kind:?} that is not ours; only linux-htb can be joined: \
         remove it (ovs-vsctl clear port {port} qos) or leave this port out"
    )]
    ForeignKind {
        /// Name of the port.
        port: String,
        /// Type of the QoS.
        kind: String,
    },
    /// The number is taken.
    #[error("queue {queue} of port {port} is taken: choose another number")]
    QueueTaken {
        /// Name of the port.
        port: String,
        /// Number of the queue.
        queue: u32,
    },
    /// A number that no queue of ours can have.
    #[error("queue {queue} cannot be reserved: 1 to {HIGHEST_QUEUE} can")]
    BadQueue {
        /// Number of the queue.
        queue: u32,
    },
    /// A minimum above the maximum, or above what the port carries.
    #[error("a minimum of {min} bit/s exceeds the maximum of {max} bit/s")]
    BadRates {
        /// In bit/s.
        min: u64,
        /// In bit/s.
        max: u64,
    },
    /// Nothing carries this mark (any more).
    #[error("no queue of port {port} belongs to reservation {reservation}")]
    NotReserved {
        /// Name of the port.
        port: String,
        /// Name of the reservation.
        reservation: String,
    },
    /// Somebody else was faster; nothing has been changed.
    #[error("the queues were changed by somebody else at the same moment")]
    Changed,
    /// A row that cannot be read.
    #[error("the database has an unreadable row")]
    Malformed(#[from] ValueError),
    /// The database says no, or nothing.
    #[error(transparent)]
    Client(ClientError),
}

impl QosError {
    /// Whether the same may succeed when it is tried again.
    pub fn may_retry(&self) -> bool {
        let unknown =
            |error: &_| matches!(error, ClientError::Request(_) | ClientError::NotInstalled { .. });
        matches!(self, Self::Changed) || matches!(self, Self::Client(error) if unknown(error))
    }
}

impl From<ClientError> for QosError {
    fn from(error: ClientError) -> Self {
        match error {
            // The only waits in our transactions are those on what the plan was made on.
            ClientError::Transact(refused) if refused.is_timed_out() => Self::Changed,
            other => Self::Client(other),
        }
    }
}

/// All ports, QoS and queues of a switch, read in one transaction.
///
/// # Errors
/// When there is no readable answer.
pub async fn read(client: &Client, within: Duration) -> Result<Snapshot, QosError> {
    let outcomes = client.transact(&rows::select_all(), within).await?;
    Ok(Snapshot::from_outcomes(&outcomes)?)
}

/// Makes a queue, and what it needs, and waits until the switch has installed it.
///
/// # Errors
/// Nothing is changed, except after [`ClientError::NotInstalled`] or when no answer came: then
/// [`release`] it.
pub async fn reserve(
    client: &Client,
    reservation: &Reservation,
    within: Duration,
) -> Result<(), QosError> {
    let snapshot = read(client, within).await?;
    client.install(reserve_plan(&snapshot, reservation)?, within).await?;
    Ok(())
}

/// Gives a reservation's queue on a port other rates and a later expiry.
///
/// # Errors
/// [`QosError::NotReserved`] when it has none there.
pub async fn change(
    client: &Client,
    port: &str,
    mark: &Mark,
    rates: Rates,
    within: Duration,
) -> Result<(), QosError> {
    rates.check()?;
    let snapshot = read(client, within).await?;
    let uuid = plan::reserved_queue(&snapshot, port, mark)?;
    let row = Row::from([
        ("other_config".to_owned(), rates.to_datum()),
        ("external_ids".to_owned(), mark.to_datum()),
    ]);
    let (table, conditions) = ("Queue".to_owned(), vec![Condition::row(uuid)]);
    let outcomes =
        client.install(vec![Operation::Update { table, conditions, row }], within).await?;
    // The row may have gone between the two.
    if outcomes.first().is_some_and(|outcome| outcome.count == 1) {
        Ok(())
    } else {
        Err(QosError::Changed)
    }
}

/// Takes away all queues of `owner` whose mark is `doomed`, and what is then of no more use: one
/// reservation's, the expired ones, or all that a crash has left. Answers how many.
///
/// # Errors
/// Nothing is changed, except when no answer came.
pub async fn release(
    client: &Client,
    owner: &str,
    doomed: impl Fn(&Mark) -> bool,
    within: Duration,
) -> Result<usize, QosError> {
    let snapshot = read(client, within).await?;
    let (count, operations) = release_plan(&snapshot, owner, doomed);
    if !operations.is_empty() {
        client.install(operations, within).await?;
    }
    Ok(count)
}

/// A row that carries our mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkedRow {
    /// `QoS` or `Queue`.
    pub table: &'static str,
    /// The row.
    pub uuid: Uuid,
    /// Its mark.
    pub mark: Mark,
}

/// All rows that carry a mark of `owner`, attached or not.
///
/// # Errors
/// When there is no readable answer.
pub async fn marked(
    client: &Client,
    owner: &str,
    within: Duration,
) -> Result<Vec<MarkedRow>, QosError> {
    Ok(read(client, within).await?.marked(owner))
}
