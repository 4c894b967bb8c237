//! Questions whose answers may take several messages (section A.3.5).
//!
//! Used through [`crate::Message`]. A reply that is split carries [`MORE`] in all parts but the
//! last; [`Reply::append`] joins them. Which request a reply belongs to is told by the xid, which
//! is not known here.

mod records;

use bytes::{BufMut, Bytes, BytesMut};

pub use records::{
    Aggregate, BandStats, Description, FlowStats, MeterConfig, MeterFeatures, MeterStats,
    PortStats, QueueStats, TableStats,
};

use crate::flow::{ALL_TABLES, ANY_GROUP};
use crate::matching::Match;
use crate::switch::Port;
use crate::types::PortNo;
use crate::wire::{BodyError, Reader, Wire, put_all, wire_struct};

/// Flag: another part of this follows.
pub const MORE: u16 = 1;
/// All queues of a port, in requests (`OFPQ_ALL`).
pub const ALL_QUEUES: u32 = u32::MAX;

wire_struct! {
    /// Which flows a question is about.
    pub struct FlowFilter {
        /// Of this table, or of [`ALL_TABLES`].
        table: u8 => pad 3,
        /// That output to this port; [`PortNo::ANY`] is no restriction.
        out_port: PortNo,
        /// That use this group; [`ANY_GROUP`] is no restriction.
        out_group: u32 => pad 4,
        /// Whose cookie agrees with this
        cookie: u64,
        /// in these bits; 0 is no restriction.
        cookie_mask: u64,
        /// That this match includes.
        matching: Match,
    }
}

impl FlowFilter {
    /// All flows whose cookie agrees with `cookie` in the bits of `mask`.
    pub fn by_cookie(cookie: u64, mask: u64) -> Self {
        Self {
            table: ALL_TABLES,
            out_port: PortNo::ANY,
            out_group: ANY_GROUP,
            cookie,
            cookie_mask: mask,
            matching: Match::any(),
        }
    }

    /// All flows.
    pub fn all() -> Self {
        Self::by_cookie(0, 0)
    }
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Who made the switch.
    Description,
    /// Flows and their counters.
    Flow(FlowFilter),
    /// The sums of these.
    Aggregate(FlowFilter),
    /// Counters of all tables.
    Table,
    /// Counters of a port, or of [`PortNo::ANY`].
    Port(PortNo),
    /// Counters of a queue (or [`ALL_QUEUES`]) of a port (or [`PortNo::ANY`]).
    Queue {
        /// Which port.
        port: PortNo,
        /// Which queue.
        queue: u32,
    },
    /// Counters of a meter, or of [`crate::meter::ALL_METERS`].
    Meter(u32),
    /// How a meter, or [`crate::meter::ALL_METERS`], is set.
    MeterConfig(u32),
    /// What meters the switch can have.
    MeterFeatures,
    /// The ports.
    PortDescription,
    /// Kept as it came.
    Other {
        /// Multipart type.
        kind: u16,
        /// What follows the flags and their padding.
        body: Bytes,
    },
}

/// An answer, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Who made the switch.
    Description(Box<Description>),
    /// Flows and their counters.
    Flow(Vec<FlowStats>),
    /// The sums of these.
    Aggregate(Aggregate),
    /// Counters of all tables.
    Table(Vec<TableStats>),
    /// Counters of ports.
    Port(Vec<PortStats>),
    /// Counters of queues.
    Queue(Vec<QueueStats>),
    /// Counters of meters.
    Meter(Vec<MeterStats>),
    /// How meters are set.
    MeterConfig(Vec<MeterConfig>),
    /// What meters the switch can have.
    MeterFeatures(MeterFeatures),
    /// The ports.
    PortDescription(Vec<Port>),
    /// Kept as it came.
    Other {
        /// Multipart type.
        kind: u16,
        /// What follows the flags and their padding.
        body: Bytes,
    },
}

/// Two parts with the same xid that do not go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a part of multipart type {next} follows one of type {first}")]
pub struct Mismatch {
    /// The type of what was there.
    pub first: u16,
    /// The type of what came.
    pub next: u16,
}

impl Request {
    /// The number of the multipart type.
    pub fn kind(&self) -> u16 {
        match self {
            Self::Description => 0,
            Self::Flow(_) => 1,
            Self::Aggregate(_) => 2,
            Self::Table => 3,
            Self::Port(_) => 4,
            Self::Queue { .. } => 5,
            Self::Meter(_) => 9,
            Self::MeterConfig(_) => 10,
            Self::MeterFeatures => 11,
            Self::PortDescription => 13,
            Self::Other { kind, .. } => *kind,
        }
    }

    pub(crate) fn get(kind: u16, body: &mut Reader<'_>) -> Result<Self, BodyError> {
        Ok(match kind {
            0 => Self::Description,
            1 => Self::Flow(body.get()?),
            2 => Self::Aggregate(body.get()?),
            3 => Self::Table,
            4 => Self::Port(body.get()?),
            5 => Self::Queue { port: body.get()?, queue: body.get()? },
            9 => Self::Meter(body.get()?),
            10 => Self::MeterConfig(body.get()?),
            11 => Self::MeterFeatures,
            13 => Self::PortDescription,
            _ => Self::Other { kind, body: body.rest() },
        })
    }

    pub(crate) fn put(&self, out: &mut BytesMut) {
        match self {
            Self::Description | Self::Table | Self::MeterFeatures | Self::PortDescription => {}
            Self::Flow(filter) | Self::Aggregate(filter) => filter.put(out),
            Self::Port(port) => {
                port.put(out);
                out.put_u32(0);
            }
            Self::Queue { port, queue } => {
                port.put(out);
                out.put_u32(*queue);
            }
            Self::Meter(meter) | Self::MeterConfig(meter) => {
                out.put_u32(*meter);
                out.put_u32(0);
            }
            Self::Other { body, .. } => out.put_slice(body),
        }
    }
}

impl Reply {
    /// The number of the multipart type.
    pub fn kind(&self) -> u16 {
        match self {
            Self::Description(_) => 0,
            Self::Flow(_) => 1,
            Self::Aggregate(_) => 2,
            Self::Table(_) => 3,
            Self::Port(_) => 4,
            Self::Queue(_) => 5,
            Self::Meter(_) => 9,
            Self::MeterConfig(_) => 10,
            Self::MeterFeatures(_) => 11,
            Self::PortDescription(_) => 13,
            Self::Other { kind, .. } => *kind,
        }
    }

    /// Joins the next part to what is there.
    ///
    /// # Errors
    /// When the parts are of different types, or of one that has only a single record.
    pub fn append(&mut self, next: Self) -> Result<(), Mismatch> {
        let mismatch = Mismatch { first: self.kind(), next: next.kind() };
        match (self, next) {
            (Self::Flow(records), Self::Flow(more)) => records.extend(more),
            (Self::Table(records), Self::Table(more)) => records.extend(more),
            (Self::Port(records), Self::Port(more)) => records.extend(more),
            (Self::Queue(records), Self::Queue(more)) => records.extend(more),
            (Self::Meter(records), Self::Meter(more)) => records.extend(more),
            (Self::MeterConfig(records), Self::MeterConfig(more)) => records.extend(more),
            (Self::PortDescription(records), Self::PortDescription(more)) => records.extend(more),
            _ => return Err(mismatch),
        }
        Ok(())
    }

    pub(crate) fn get(kind: u16, body: &mut Reader<'_>) -> Result<Self, BodyError> {
        Ok(match kind {
            0 => Self::Description(Box::new(body.get()?)),
            1 => Self::Flow(body.all()?),
            2 => Self::Aggregate(body.get()?),
            3 => Self::Table(body.all()?),
            4 => Self::Port(body.all()?),
            5 => Self::Queue(body.all()?),
            9 => Self::Meter(body.all()?),
            10 => Self::MeterConfig(body.all()?),
            11 => Self::MeterFeatures(body.get()?),
            13 => Self::PortDescription(body.all()?),
            _ => Self::Other { kind, body: body.rest() },
        })
    }

    pub(crate) fn put(&self, out: &mut BytesMut) {
        match self {
            Self::Description(record) => record.put(out),
            Self::Flow(records) => put_all(records, out),
            Self::Aggregate(record) => record.put(out),
            Self::Table(records) => put_all(records, out),
            Self::Port(records) => put_all(records, out),
            Self::Queue(records) => put_all(records, out),
            Self::Meter(records) => put_all(records, out),
            Self::MeterConfig(records) => put_all(records, out),
            Self::MeterFeatures(record) => record.put(out),
            Self::PortDescription(records) => put_all(records, out),
            Self::Other { body, .. } => out.put_slice(body),
        }
    }
}
