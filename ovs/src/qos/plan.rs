//! From rows as they are to the transaction that makes them as they should be. Pure.
//!
//! Used by [`super`]. Each plan begins with what it was made on, as a condition of its transaction.

use std::collections::BTreeSet;
use std::time::Duration;

use super::rows::{Mark, QosRow, Rates, Snapshot};
use super::{HIGHEST_QUEUE, KIND, QosError, Reservation};
use crate::ovsdb::{Atom, Condition, Datum, Mutation, Operation, Row, Uuid};

/// The name of our QoS inside its transaction.
const QOS: &str = "qos";

/// Adds the reservation's queue to the port, and a QoS and a queue 0 where there are none.
///
/// # Errors
/// When the port does not exist, carries a QoS that cannot be joined, or has the number taken.
pub fn reserve_plan(snapshot: &Snapshot, wanted: &Reservation) -> Result<Vec<Operation>, QosError> {
    let (port, queue) = (&wanted.port, wanted.queue);
    if !(1..=HIGHEST_QUEUE).contains(&queue) {
        return Err(QosError::BadQueue { queue });
    }
    wanted.rates.check()?;
    wanted.others.check()?;
    Rates { min: wanted.rates.min, max: Some(wanted.capacity) }.check()?;
    let row =
        snapshot.ports.get(port).ok_or_else(|| QosError::NoSuchPort { port: port.clone() })?;
    let mut plan = vec![unchanged("Port", row.uuid, "qos", optional(row.qos))];
    let Some((uuid, qos)) = snapshot.qos_of(port) else {
        plan.extend(new_qos(row.uuid, wanted));
        return Ok(plan);
    };
    if qos.kind != KIND {
        return Err(QosError::ForeignKind { port: port.clone(), kind: qos.kind.clone() });
    }
    if qos.queues.contains_key(&queue.into()) {
        return Err(QosError::QueueTaken { port: port.clone(), queue });
    }
    plan.push(unchanged("QoS", uuid, "queues", queues(qos)));
    plan.extend(join(uuid, qos, wanted));
    Ok(plan)
}

fn new_qos(port: Uuid, wanted: &Reservation) -> Vec<Operation> {
    let queues = vec![named(0, "others"), named(wanted.queue.into(), "reserved")];
    let row = Row::from([
        ("type".to_owned(), KIND.into()),
        ("other_config".to_owned(), Datum::texts([("max-rate", wanted.capacity.to_string())])),
        ("external_ids".to_owned(), wanted.mark.shared().to_datum()),
        ("queues".to_owned(), Datum::Map(queues)),
    ]);
    let attached = Row::from([("qos".to_owned(), Datum::Set(vec![Atom::Named(QOS.to_owned())]))]);
    vec![
        insert_queue("others", wanted.others, &wanted.mark.shared()),
        insert_queue("reserved", wanted.rates, &wanted.mark),
        Operation::Insert { table: "QoS".to_owned(), row, name: Some(QOS.to_owned()) },
        update("Port", port, attached),
    ]
}

fn join(uuid: Uuid, qos: &QosRow, wanted: &Reservation) -> Vec<Operation> {
    let mut operations = vec![insert_queue("reserved", wanted.rates, &wanted.mark)];
    let mut added = vec![named(wanted.queue.into(), "reserved")];
    if !qos.queues.contains_key(&0) {
        operations.push(insert_queue("others", wanted.others, &wanted.mark.shared()));
        added.push(named(0, "others"));
    }
    operations.push(mutate_queues(uuid, "insert", Datum::Map(added)));
    operations
}

/// The queue of a port that belongs to a reservation.
pub(crate) fn reserved_queue(
    snapshot: &Snapshot,
    port: &str,
    mark: &Mark,
) -> Result<Uuid, QosError> {
    let same = |found: &Mark| found.owner == mark.owner && found.reservation == mark.reservation;
    let queues = snapshot.qos_of(port).map(|(_, qos)| &qos.queues);
    let found = queues
        .into_iter()
        .flat_map(|queues| queues.values())
        .find(|queue| snapshot.queue_mark(queue).is_some_and(same));
    let (port, reservation) = (port.to_owned(), mark.reservation.clone());
    found.copied().ok_or(QosError::NotReserved { port, reservation })
}

/// Deletes the queues of `owner` that are `doomed`, and with the last one of a QoS our queue 0 and,
/// if it is ours and nobody else uses it, the QoS. Answers how many reserved queues go.
pub fn release_plan(
    snapshot: &Snapshot,
    owner: &str,
    doomed: impl Fn(&Mark) -> bool,
) -> (usize, Vec<Operation>) {
    let ours = |mark: Option<&Mark>| mark.is_some_and(|mark| mark.owner == owner);
    let goes = |uuid: &Uuid| {
        snapshot
            .queue_mark(uuid)
            .is_some_and(|mark| mark.owner == owner && !mark.reservation.is_empty() && doomed(mark))
    };
    let mut count = 0;
    let mut plan = Vec::new();
    for (uuid, qos) in &snapshot.qos {
        let mine = ours(qos.mark.as_ref());
        let mut gone: Vec<i64> = numbers(qos, goes);
        count += gone.len();
        if gone.is_empty() && !mine {
            continue;
        }
        let left = |number: &i64| !gone.contains(number);
        let base = numbers(qos, |uuid| {
            snapshot
                .queue_mark(uuid)
                .is_some_and(|mark| ours(Some(mark)) && mark.reservation.is_empty())
        });
        let (mut others, mut reserved) = (false, false);
        for (_, queue) in
            qos.queues.iter().filter(|(number, _)| left(number) && !base.contains(number))
        {
            let is_ours = ours(snapshot.queue_mark(queue));
            reserved |= is_ours;
            others |= !is_ours;
        }
        let whole = mine && !reserved && !others;
        if !reserved && (whole || !mine) {
            gone.extend(base);
        }
        plan.extend(take_away(snapshot, *uuid, qos, &gone, whole));
    }
    plan.extend(orphans(snapshot, owner, goes, &mut count));
    (count, plan)
}

fn numbers(qos: &QosRow, wanted: impl Fn(&Uuid) -> bool) -> Vec<i64> {
    let wanted = qos.queues.iter().filter(|(_, uuid)| wanted(uuid));
    wanted.map(|(number, _)| *number).collect()
}

fn take_away(
    snapshot: &Snapshot,
    uuid: Uuid,
    qos: &QosRow,
    gone: &[i64],
    whole: bool,
) -> Vec<Operation> {
    if gone.is_empty() && !whole {
        return Vec::new();
    }
    let mut plan = vec![unchanged("QoS", uuid, "queues", queues(qos))];
    if whole {
        for port in snapshot.ports.values().filter(|port| port.qos == Some(uuid)) {
            plan.push(unchanged("Port", port.uuid, "qos", uuid.into()));
            plan.push(update("Port", port.uuid, Row::from([("qos".to_owned(), Datum::none())])));
        }
        plan.push(delete("QoS", uuid));
    } else {
        let keys = gone.iter().map(|number| Atom::Integer(*number)).collect();
        plan.push(mutate_queues(uuid, "delete", Datum::Set(keys)));
    }
    plan.extend(gone.iter().filter_map(|number| Some(delete("Queue", *qos.queues.get(number)?))));
    plan
}

/// Queues of ours that no QoS has: their port or QoS was deleted by somebody else.
fn orphans(
    snapshot: &Snapshot,
    owner: &str,
    goes: impl Fn(&Uuid) -> bool,
    count: &mut usize,
) -> Vec<Operation> {
    let used: BTreeSet<_> = snapshot.qos.values().flat_map(|qos| qos.queues.values()).collect();
    let mut plan = Vec::new();
    for (uuid, row) in snapshot.queues.iter().filter(|(uuid, _)| !used.contains(uuid)) {
        let Some(mark) = row.mark.as_ref().filter(|mark| mark.owner == owner) else { continue };
        let base = mark.reservation.is_empty();
        if base || goes(uuid) {
            *count += usize::from(!base);
            plan.push(delete("Queue", *uuid));
        }
    }
    plan
}

fn optional(uuid: Option<Uuid>) -> Datum {
    uuid.map_or_else(Datum::none, Datum::from)
}

fn queues(qos: &QosRow) -> Datum {
    let pair = |(number, uuid): (&i64, &Uuid)| (Atom::Integer(*number), Atom::Uuid(*uuid));
    Datum::Map(qos.queues.iter().map(pair).collect())
}

fn named(number: i64, name: &str) -> (Atom, Atom) {
    (Atom::Integer(number), Atom::Named(name.to_owned()))
}

fn unchanged(table: &str, uuid: Uuid, column: &str, value: Datum) -> Operation {
    Operation::Wait {
        table: table.to_owned(),
        conditions: vec![Condition::row(uuid)],
        columns: vec![column.to_owned()],
        equal: true,
        rows: vec![Row::from([(column.to_owned(), value)])],
        within: Duration::ZERO,
    }
}

fn insert_queue(name: &str, rates: Rates, mark: &Mark) -> Operation {
    let row = Row::from([
        ("other_config".to_owned(), rates.to_datum()),
        ("external_ids".to_owned(), mark.to_datum()),
    ]);
    Operation::Insert { table: "Queue".to_owned(), row, name: Some(name.to_owned()) }
}

fn mutate_queues(qos: Uuid, mutator: &'static str, value: Datum) -> Operation {
    Operation::Mutate {
        table: "QoS".to_owned(),
        conditions: vec![Condition::row(qos)],
        mutations: vec![Mutation { column: "queues".to_owned(), mutator, value }],
    }
}

fn update(table: &str, uuid: Uuid, row: Row) -> Operation {
    Operation::Update { table: table.to_owned(), conditions: vec![Condition::row(uuid)], row }
}

fn delete(table: &str, uuid: Uuid) -> Operation {
    Operation::Delete { table: table.to_owned(), conditions: vec![Condition::row(uuid)] }
}

#[cfg(test)]
mod tests;
