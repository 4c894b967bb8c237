//! The rows of Port, QoS and Queue as values, and how they are read and written.
//!
//! Used by [`super`] and [`super::plan`]. Numbers that cannot be read count as absent: foreign rows
//! may hold anything.

use std::collections::BTreeMap;

use super::{MarkedRow, QosError};
use crate::ovsdb::value::ValueError;
use crate::ovsdb::{Datum, Operation, Outcome, Row, Uuid};

const OWNER: &str = "reservation-owner";
const RESERVATION: &str = "reservation-id";
const EXPIRES: &str = "reservation-expires";

/// Whose a row is. In `external_ids`, so that it survives a crash of whoever made it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// Who made it.
    pub owner: String,
    /// For what. Rows that several reservations share have an empty one.
    pub reservation: String,
    /// Seconds since 1970 after which nobody needs it any more.
    pub expires: u64,
}

impl Mark {
    /// The mark of rows that all reservations of an owner on a port share; they go with the last.
    pub(crate) fn shared(&self) -> Self {
        Self { reservation: String::new(), ..self.clone() }
    }

    /// As `external_ids`.
    pub fn to_datum(&self) -> Datum {
        Datum::texts([
            (OWNER, self.owner.clone()),
            (RESERVATION, self.reservation.clone()),
            (EXPIRES, self.expires.to_string()),
        ])
    }

    fn from_row(row: &Row) -> Option<Self> {
        let ids = row.get("external_ids")?.text_map();
        let reservation = ids.get(RESERVATION).copied().unwrap_or_default().to_owned();
        // An expiry that cannot be read must not make a row immortal.
        let expires = ids.get(EXPIRES).and_then(|text| text.parse().ok()).unwrap_or_default();
        Some(Self { owner: (*ids.get(OWNER)?).to_owned(), reservation, expires })
    }
}

/// A queue's burst is its minimum rate over a second divided by this: 4 ms of it.
const BURSTS_PER_SECOND: u64 = 250;
/// At least two full frames, in bits.
const BURST_LEAST: u64 = 2 * 1514 * 8;

/// What a queue gets, in bit/s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// At least.
    pub min: u64,
    /// At most; `None` is as much as there is.
    pub max: Option<u64>,
}

impl Rates {
    pub(crate) fn check(self) -> Result<Self, QosError> {
        match self.max {
            Some(max) if self.min > max => Err(QosError::BadRates { min: self.min, max }),
            _ => Ok(self),
        }
    }

    /// As `other_config`. A minimum of 0 would be HTB's smallest class; 1 bit/s is a request for
    /// the least that it can do well.
    pub fn to_datum(self) -> Datum {
        let min = ("min-rate", self.min.max(1).to_string());
        let burst = ("burst", self.burst().to_string());
        let max = self.max.map(|max| ("max-rate", max.to_string()));
        Datum::texts([min, burst].into_iter().chain(max))
    }

    /// What may be sent at once after a pause, in bits. Left out, OVS asks HTB for a single
    /// packet's worth, and a queue whose timer fires late loses that time for good: its minimum
    /// is then a figure that a busy machine never reaches.
    fn burst(self) -> u64 {
        (self.min / BURSTS_PER_SECOND).max(BURST_LEAST)
    }

    fn from_row(row: &Row) -> Self {
        let config = row.get("other_config").map(Datum::text_map).unwrap_or_default();
        let rate = |key| config.get(key).and_then(|text| text.parse().ok());
        Self { min: rate("min-rate").unwrap_or_default(), max: rate("max-rate") }
    }
}

/// A port and the QoS that it carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortRow {
    /// The row.
    pub uuid: Uuid,
    /// Its QoS.
    pub qos: Option<Uuid>,
}

/// A QoS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QosRow {
    /// Its type, such as `linux-htb`.
    pub kind: String,
    /// Its queues by number.
    pub queues: BTreeMap<i64, Uuid>,
    /// What the whole port may send, in bit/s.
    pub max: Option<u64>,
    /// Whose it is, if it is somebody's who marks.
    pub mark: Option<Mark>,
}

/// A queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueRow {
    /// What it gets.
    pub rates: Rates,
    /// Whose it is, if it is somebody's who marks.
    pub mark: Option<Mark>,
}

/// All ports, QoS and queues of a switch at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// By name.
    pub ports: BTreeMap<String, PortRow>,
    /// By row.
    pub qos: BTreeMap<Uuid, QosRow>,
    /// By row.
    pub queues: BTreeMap<Uuid, QueueRow>,
}

/// Reads what [`Snapshot::from_outcomes`] wants.
pub(crate) fn select_all() -> Vec<Operation> {
    let select = |table, columns: &[&str]| Operation::select(table, Vec::new(), columns);
    vec![
        select("Port", &["_uuid", "name", "qos"]),
        select("QoS", &["_uuid", "type", "queues", "other_config", "external_ids"]),
        select("Queue", &["_uuid", "other_config", "external_ids"]),
    ]
}

fn identity(row: &Row) -> Result<Uuid, ValueError> {
    let missing = || ValueError::NotARow("a row without _uuid".to_owned());
    row.get("_uuid").and_then(Datum::uuid).ok_or_else(missing)
}

fn text(row: &Row, column: &str) -> String {
    row.get(column).and_then(Datum::text).unwrap_or_default().to_owned()
}

impl Snapshot {
    pub(crate) fn from_outcomes(outcomes: &[Outcome]) -> Result<Self, ValueError> {
        let rows =
            |index: usize| outcomes.get(index).map(|o| o.rows.as_slice()).unwrap_or_default();
        let mut snapshot = Self::default();
        for row in rows(0) {
            let qos = row.get("qos").and_then(Datum::uuid);
            snapshot.ports.insert(text(row, "name"), PortRow { uuid: identity(row)?, qos });
        }
        for row in rows(1) {
            let kind = text(row, "type");
            let queues = row.get("queues").map(Datum::uuids_by_number).unwrap_or_default();
            let (max, mark) = (Rates::from_row(row).max, Mark::from_row(row));
            snapshot.qos.insert(identity(row)?, QosRow { kind, queues, max, mark });
        }
        for row in rows(2) {
            let queue = QueueRow { rates: Rates::from_row(row), mark: Mark::from_row(row) };
            snapshot.queues.insert(identity(row)?, queue);
        }
        Ok(snapshot)
    }

    /// The QoS that a port carries.
    pub fn qos_of(&self, port: &str) -> Option<(Uuid, &QosRow)> {
        let uuid = self.ports.get(port)?.qos?;
        Some((uuid, self.qos.get(&uuid)?))
    }

    /// The mark of a queue.
    pub fn queue_mark(&self, queue: &Uuid) -> Option<&Mark> {
        self.queues.get(queue)?.mark.as_ref()
    }

    /// All rows that carry a mark of `owner`.
    pub fn marked(&self, owner: &str) -> Vec<MarkedRow> {
        let qos = self.qos.iter().map(|(uuid, row)| ("QoS", *uuid, &row.mark));
        let queues = self.queues.iter().map(|(uuid, row)| ("Queue", *uuid, &row.mark));
        qos.chain(queues)
            .filter_map(|(table, uuid, mark)| {
                let mark = mark.clone().filter(|mark| mark.owner == owner)?;
                Some(MarkedRow { table, uuid, mark })
            })
            .collect()
    }
}
