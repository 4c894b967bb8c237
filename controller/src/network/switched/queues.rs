//! Makes the queue rows of a port agree with the ledger: one transaction per change, so that the
//! sum of what is guaranteed never exceeds the link in between.
//!
//! Used by `reserve` and `release`. The rules on foreign rows are `lifeboat_ovs::qos`'; here is
//! only what several reservations of ours on one port mean together: when one comes, grows or
//! goes, the others and queue 0 change with it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lifeboat_ovs::ovsdb::{
    Client, ClientError, Condition, Datum, Operation, RequestError, Row, Uuid,
};
use lifeboat_ovs::qos::{
    self, Mark, QosError, Rates, Reservation, Snapshot, release_plan, reserve_plan,
};
use lifeboat_protocol::ids::{EvacuationId, SwitchId};
use lifeboat_protocol::terms::ReservationKind;
use lifeboat_protocol::units::BitsPerSec;

use super::ledger::{Share, Shares};
use super::mark::{self, OWNER};
use crate::network::{NetworkError, PortRef};

/// How long a switch may take to install a change. It takes milliseconds; the rest is for a busy
/// machine.
pub(super) const WITHIN: Duration = Duration::from_secs(5);
/// Tries when somebody else changes the same rows at the same moment.
const TRIES: u32 = 5;

/// Whether a row is of ours that all our queues on a port share.
fn is_shared(mark: Option<&Mark>) -> bool {
    mark.is_some_and(|mark| mark.owner == OWNER && mark.reservation.is_empty())
}

/// What the queues of a port that are not ours are promised together.
pub(super) fn foreign_promises(snapshot: &Snapshot, port: &str) -> BitsPerSec {
    let queues = snapshot.qos_of(port).map(|(_, qos)| qos.queues.values());
    let rows = queues.into_iter().flatten().filter_map(|uuid| snapshot.queues.get(uuid));
    let foreign = rows.filter(|row| row.mark.as_ref().is_none_or(|mark| mark.owner != OWNER));
    foreign.map(|row| BitsPerSec(row.rates.min)).sum()
}

/// The queue numbers of all ports of a database that are somebody else's: those without our mark,
/// and those that carry the mark of an evacuation that the ledger does not have.
pub(super) fn taken(snapshot: &Snapshot) -> BTreeSet<u32> {
    let numbers = snapshot.qos.values().flat_map(|qos| qos.queues.keys());
    numbers.filter_map(|number| u32::try_from(*number).ok()).collect()
}

/// An evacuation's queue as it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FoundQueue {
    /// Its number.
    pub(super) number: u32,
    /// What it is guaranteed.
    pub(super) rate: BitsPerSec,
    /// Whether it may have more.
    pub(super) kind: ReservationKind,
}

/// The evacuations' queues in a database, by their marks.
pub(super) fn held(snapshot: &Snapshot) -> BTreeMap<(EvacuationId, PortRef), FoundQueue> {
    let mut found = BTreeMap::new();
    for (number, uuid) in snapshot.qos.values().flat_map(|qos| &qos.queues) {
        let Some(row) = snapshot.queues.get(uuid) else { continue };
        let whose = row.mark.as_ref().and_then(mark::read_mark);
        if let (Some(key), Ok(number)) = (whose, u32::try_from(*number)) {
            let kind = match row.rates.max.is_some_and(|max| max <= row.rates.min) {
                true => ReservationKind::Strict,
                false => ReservationKind::Borrow,
            };
            found.insert(key, FoundQueue { number, rate: BitsPerSec(row.rates.min), kind });
        }
    }
    found
}

fn queue_of(snapshot: &Snapshot, port: &str, reservation: &str) -> Option<Uuid> {
    let (_, qos) = snapshot.qos_of(port)?;
    let is = |mark: &Mark| mark.owner == OWNER && mark.reservation == reservation;
    qos.queues.values().find(|uuid| snapshot.queue_mark(uuid).is_some_and(is)).copied()
}

fn rates(least: BitsPerSec, most: BitsPerSec) -> Rates {
    Rates { min: least.0, max: Some(most.max(least).0.max(1)) }
}

/// What one evacuation's queue gets.
fn own_rates(share: &Share, shares: &Shares) -> Rates {
    rates(share.rate, share.most(shares.capacity))
}

/// What the queue of everybody else gets.
fn others_rates(shares: &Shares) -> Rates {
    rates(shares.others, shares.others_most)
}

fn update(uuid: Uuid, rates: Rates, mark: Option<&Mark>) -> Operation {
    let mut row = Row::from([("other_config".to_owned(), rates.to_datum())]);
    if let Some(mark) = mark {
        row.insert("external_ids".to_owned(), mark.to_datum());
    }
    Operation::Update { table: "Queue".to_owned(), conditions: vec![Condition::row(uuid)], row }
}

/// The next transaction towards `shares`, and whether it is the last. It adds at most one queue,
/// because the rows of a second would have the same names.
fn step(
    snapshot: &Snapshot,
    at: &PortRef,
    shares: &Shares,
    expires: u64,
) -> Result<(Vec<Operation>, bool), QosError> {
    let mut missing: Vec<(&Share, Mark)> = Vec::new();
    let mut operations = Vec::new();
    for share in &shares.queues {
        let mark = mark::queue_mark(&share.evacuation, at, expires);
        match queue_of(snapshot, &at.port, &mark.reservation) {
            Some(uuid) => operations.push(update(uuid, own_rates(share, shares), Some(&mark))),
            None => missing.push((share, mark)),
        }
    }
    let base = snapshot.qos_of(&at.port).and_then(|(_, qos)| qos.queues.get(&0));
    if let Some(uuid) = base.filter(|uuid| is_shared(snapshot.queue_mark(uuid))) {
        operations.push(update(*uuid, others_rates(shares), None));
    }
    let last = missing.len() <= 1;
    if let Some((share, mark)) = missing.into_iter().next() {
        let reservation = Reservation {
            port: at.port.clone(),
            queue: share.queue,
            rates: own_rates(share, shares),
            mark,
            others: others_rates(shares),
            capacity: shares.capacity.0,
        };
        operations.extend(reserve_plan(snapshot, &reservation)?);
    }
    Ok((operations, last))
}

/// Makes a port's rows agree with `shares` (of what foreign queues are promised there, as it is
/// told), and waits until the switch has installed them. Answers the shares.
pub(super) async fn apply(
    client: &Client,
    at: &PortRef,
    expires: u64,
    divide: impl Fn(BitsPerSec) -> Option<Shares>,
) -> Result<Option<Shares>, NetworkError> {
    let mut overtaken = 0;
    loop {
        let snapshot = qos::read(client, WITHIN).await.map_err(|error| of_qos(at, error))?;
        let foreign = foreign_promises(&snapshot, &at.port);
        let Some(shares) = divide(foreign) else { return Ok(None) };
        check_room(at, &shares, foreign)?;
        let (operations, last) =
            step(&snapshot, at, &shares, expires).map_err(|error| of_qos(at, error))?;
        match client.install(operations, WITHIN).await.map_err(QosError::from) {
            Ok(_) if last => return Ok(Some(shares)),
            Ok(_) => {}
            Err(QosError::Changed) if overtaken < TRIES => overtaken += 1,
            Err(error) => return Err(of_qos(at, error)),
        }
    }
}

/// A queue without a rate would promise nothing and starve.
fn check_room(at: &PortRef, shares: &Shares, foreign: BitsPerSec) -> Result<(), NetworkError> {
    if shares.queues.iter().all(|share| share.rate > BitsPerSec::ZERO) {
        return Ok(());
    }
    let given: BitsPerSec = shares.queues.iter().map(|share| share.rate).sum();
    let asked = BitsPerSec(shares.capacity.0 / 100);
    let free = shares.capacity - given - foreign;
    Err(NetworkError::NoRoom {
        at: at.clone(),
        asked,
        free: free.min(asked),
        capacity: shares.capacity,
    })
}

/// Deletes the evacuation's queues of a database on ports that it does not hold any more. Answers
/// those ports, and which of them still carry somebody else's QoS.
pub(super) async fn remove(
    client: &Client,
    doomed: impl Fn(&EvacuationId, &PortRef) -> bool,
) -> Result<Removed, QosError> {
    let goes = |mark: &Mark| match mark::read_mark(mark) {
        Some((evacuation, at)) => doomed(&evacuation, &at),
        // Ours, but no reservation that this version could have written.
        None => false,
    };
    for _ in 0..TRIES {
        let snapshot = qos::read(client, WITHIN).await?;
        let ports = held(&snapshot).into_keys().filter(|(evacuation, at)| doomed(evacuation, at));
        let ports: BTreeSet<PortRef> = ports.map(|(_, at)| at).collect();
        let (_, operations) = release_plan(&snapshot, OWNER, goes);
        if operations.is_empty() {
            return Ok(Removed::default());
        }
        match client.install(operations, WITHIN).await.map_err(QosError::from) {
            Err(QosError::Changed) => {}
            Err(error) => return Err(error),
            Ok(_) => {
                let joined = |at: &&PortRef| {
                    let qos = snapshot.qos_of(&at.port).map(|(_, qos)| qos);
                    qos.is_some_and(|qos| !is_shared(qos.mark.as_ref()))
                };
                let foreign = ports.iter().filter(joined).cloned().collect();
                return Ok(Removed { ports, foreign });
            }
        }
    }
    Err(QosError::Changed)
}

/// What [`remove`] did.
#[derive(Debug, Default)]
pub(super) struct Removed {
    /// Ports from which queues went.
    pub(super) ports: BTreeSet<PortRef>,
    /// Those of them whose QoS is not ours and stays.
    pub(super) foreign: BTreeSet<PortRef>,
}

/// Moves the expiry of all our queues in a database whose evacuation `lives`.
pub(super) async fn renew(
    client: &Client,
    expires: u64,
    lives: impl Fn(&EvacuationId) -> bool,
) -> Result<(), QosError> {
    let snapshot = qos::read(client, WITHIN).await?;
    let mut operations = Vec::new();
    for row in snapshot.marked(OWNER) {
        let shared = row.mark.reservation.is_empty();
        let live = mark::read_mark(&row.mark).is_some_and(|(evacuation, _)| lives(&evacuation));
        if shared || live {
            let mark: Datum = Mark { expires, ..row.mark }.to_datum();
            let columns = Row::from([("external_ids".to_owned(), mark)]);
            let (table, conditions) = (row.table.to_owned(), vec![Condition::row(row.uuid)]);
            operations.push(Operation::Update { table, conditions, row: columns });
        }
    }
    if !operations.is_empty() {
        client.transact(&operations, WITHIN).await?;
    }
    Ok(())
}

/// What an error of the queues means to whoever asked for a reservation.
pub(super) fn of_qos(at: &PortRef, error: QosError) -> NetworkError {
    match error {
        QosError::NoSuchPort { .. } => NetworkError::UnknownPort { at: at.clone() },
        QosError::ForeignKind { kind, .. } => {
            NetworkError::ForeignQos { at: at.clone(), detail: format!("type {kind}") }
        }
        other => of_database(&at.switch, other),
    }
}

/// The same where no port is meant.
pub(super) fn of_database(switch: &SwitchId, error: QosError) -> NetworkError {
    let (switch, doing) = (switch.clone(), "change its queues");
    match error {
        QosError::Client(ClientError::Request(RequestError::TimedOut { within }))
        | QosError::Client(ClientError::NotInstalled { within, .. }) => {
            NetworkError::Late { switch, doing, after: within }
        }
        QosError::Client(ClientError::Request(error @ RequestError::Disconnected)) => {
            NetworkError::NotConnected { switch, protocol: "OVSDB", detail: error.to_string() }
        }
        other => NetworkError::Refused { switch, doing, answer: other.to_string() },
    }
}
