//! Short names for the tests of this room: an order, a VM, a leg.

use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::terms::{Mode, Reason, ReservationKind};

use lifeboat_policy::intermediary::{ChosenStore, ChosenStores, Redundancy};
use lifeboat_protocol::units::{BitsPerSec, Bytes};

use super::{Choice, EvacuationOrder, PlannedLeg, Prediction};

/// A host by name.
pub(crate) fn host(name: &str) -> HostId {
    HostId::new(name).unwrap()
}

/// A VM by name.
pub(crate) fn vm(name: &str) -> VmId {
    VmId::new(name).unwrap()
}

/// An order to empty one host, one VM after the other.
pub(crate) fn order(from: &str) -> EvacuationOrder {
    EvacuationOrder {
        hosts: vec![host(from)],
        vms: Vec::new(),
        urgency: Reason::Maintenance.urgency(),
        reservation: ReservationKind::Borrow,
        fixed: false,
        mode: Mode::PreCopy,
        to: Vec::new(),
        parallel: 1,
        reason: Reason::Maintenance,
        deadline: None,
        downtime_limit_ms: 300,
        intermediaries: Vec::new(),
        intermediary_count: 0,
        redundancy: None,
        disk: lifeboat_protocol::terms::DiskMode::Copy,
        handover_size: 0,
        disk_watch_ms: 0,
        operation: String::new(),
        operator: "test".to_owned(),
    }
}

/// A choice of `name` on h1, to `to`.
pub(crate) fn choice(name: &str, to: &str) -> Box<Choice> {
    let leg = PlannedLeg {
        destination: host(to),
        mode: Mode::PreCopy,
        hops: Vec::new(),
        prediction: Prediction {
            total_ms: 1000,
            downtime_ms: 100,
            bytes: 1 << 20,
            ..Prediction::default()
        },
        disk_date: None,
        stores: None,
        disk_store: None,
    };
    Box::new(Choice { vm: vm(name), source: host("h1"), leg })
}

/// The same, scattered over h8 and h9.
pub(crate) fn scattered(name: &str, to: &str) -> Box<Choice> {
    let store = |name| ChosenStore {
        host: host(name),
        memory: Bytes::from_mib(64),
        rate: BitsPerSec::from_mbit(50),
    };
    let mut choice = choice(name, to);
    choice.leg.mode = Mode::ScatterGather;
    choice.leg.stores = Some(ChosenStores {
        stores: vec![store("h8"), store("h9")],
        redundancy: Redundancy::Mirror,
        ahead: None,
    });
    choice
}
