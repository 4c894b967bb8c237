//! Short names for the tests of this room: an order, a VM, a leg.

use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::terms::{Mode, Reason, ReservationKind};

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
    };
    Box::new(Choice { vm: vm(name), source: host("h1"), leg })
}
