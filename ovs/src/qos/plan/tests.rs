//! Plans on rows made up, checked against a model of the database that does what they say.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::rows::{PortRow, QueueRow};
use super::*;

const RATES: Rates = Rates { min: 10, max: None };

fn uuid(table: u8, number: u8) -> Uuid {
    let mut bytes = [0; 16];
    (bytes[0], bytes[15]) = (table, number);
    Uuid(bytes)
}

fn mark(owner: &str, reservation: &str) -> Mark {
    Mark { owner: owner.into(), reservation: reservation.into(), expires: 100 }
}

/// Any rows: QoS of us and of others, queues of us, of others and of nobody, attached or not.
fn any_snapshot() -> impl Strategy<Value = Snapshot> {
    let owner = prop_oneof![
        Just(None),
        Just(Some(mark("us", ""))),
        Just(Some(mark("us", "a"))),
        Just(Some(mark("us", "b"))),
        Just(Some(mark("them", "a"))),
    ];
    let qos = (any::<bool>(), prop::collection::btree_map(0_i64..4, 0_u8..8, 0..4), any::<bool>());
    let qos = prop::collection::vec(qos, 0..3);
    (qos, prop::collection::vec(owner, 8)).prop_map(|(qos, owners)| {
        let mut snapshot = Snapshot::default();
        let mut free: Vec<u8> = (0..8).collect();
        for (number, (ours, queues, attached)) in (0..).zip(qos) {
            let mut mine = BTreeMap::new();
            for (queue, wanted) in queues {
                if let Some(place) = free.iter().position(|queue| *queue == wanted) {
                    mine.insert(queue, uuid(2, free.remove(place)));
                }
            }
            let mark = ours.then(|| mark("us", ""));
            let row = QosRow { kind: KIND.into(), queues: mine, max: None, mark };
            snapshot.qos.insert(uuid(1, number), row);
            let qos = attached.then(|| uuid(1, number));
            let port = PortRow { uuid: uuid(0, number), qos };
            snapshot.ports.insert(format!("p{number}"), port);
        }
        for (number, mark) in (0..).zip(owners) {
            snapshot.queues.insert(uuid(2, number), QueueRow { rates: RATES, mark });
        }
        snapshot
    })
}

fn row_of(conditions: &[Condition]) -> Uuid {
    conditions[0].value.uuid().expect("our plans name rows")
}

/// Does what a release says.
fn perform(snapshot: &mut Snapshot, plan: &[Operation]) {
    for operation in plan {
        match operation {
            Operation::Wait { .. } => {}
            Operation::Update { table, conditions, .. } if table == "Port" => {
                let port = row_of(conditions);
                let ports = snapshot.ports.values_mut();
                ports.filter(|row| row.uuid == port).for_each(|row| row.qos = None);
            }
            Operation::Mutate { conditions, mutations, .. } => {
                let Datum::Set(keys) = &mutations[0].value else { panic!() };
                let row = snapshot.qos.get_mut(&row_of(conditions)).expect("there");
                row.queues.retain(|number, _| !keys.contains(&Atom::Integer(*number)));
            }
            Operation::Delete { table, conditions } => {
                let row = row_of(conditions);
                let found = match table.as_str() {
                    "QoS" => snapshot.qos.remove(&row).is_some(),
                    _ => snapshot.queues.remove(&row).is_some(),
                };
                assert!(found, "deleted twice: {operation:?}");
            }
            other => panic!("a release never does this: {other:?}"),
        }
    }
}

/// What is not ours and how it hangs together.
fn foreign(snapshot: &Snapshot) -> impl PartialEq + std::fmt::Debug {
    let theirs = |mark: Option<&Mark>| mark.is_none_or(|mark| mark.owner != "us");
    let queues: Vec<_> = snapshot
        .queues
        .iter()
        .filter(|(_, row)| theirs(row.mark.as_ref()))
        .map(|(u, _)| *u)
        .collect();
    let qos: Vec<_> = snapshot
        .qos
        .iter()
        .filter(|(_, row)| theirs(row.mark.as_ref()))
        .map(|(uuid, row)| {
            let queues: Vec<_> =
                row.queues.iter().filter(|(_, queue)| theirs(snapshot.queue_mark(queue))).collect();
            format!("{uuid} {queues:?}")
        })
        .collect();
    (queues, qos)
}

/// Our QoS, queue 0 and queue 1; queue 2 is somebody else's, who has joined.
#[test]
fn a_qos_of_ours_that_somebody_has_joined_stays_with_its_queue_0() {
    let mut snapshot = Snapshot::default();
    let marks = [Some(mark("us", "")), Some(mark("us", "a")), None];
    for (number, mark) in (0..).zip(marks) {
        snapshot.queues.insert(uuid(2, number), QueueRow { rates: RATES, mark });
    }
    let queues = (0..3).map(|number| (i64::from(number), uuid(2, number))).collect();
    let row = QosRow { kind: KIND.into(), queues, max: None, mark: Some(mark("us", "")) };
    snapshot.qos.insert(uuid(1, 0), row);
    let (count, plan) = release_plan(&snapshot, "us", |_| true);
    perform(&mut snapshot, &plan);
    assert_eq!(count, 1);
    let left: Vec<_> = snapshot.qos[&uuid(1, 0)].queues.keys().copied().collect();
    assert_eq!(left, [0, 2]);
}

proptest! {
    #[test]
    fn a_release_of_all_leaves_no_queue_of_ours_that_is_reserved_and_everything_foreign(
        before in any_snapshot(),
    ) {
        let mut after = before.clone();
        let (count, plan) = release_plan(&before, "us", |_| true);
        perform(&mut after, &plan);
        let reserved = |snapshot: &Snapshot| {
            let marked = snapshot.marked("us").into_iter();
            marked.filter(|row| row.table == "Queue" && !row.mark.reservation.is_empty()).count()
        };
        prop_assert_eq!((reserved(&after), reserved(&before)), (0, count));
        prop_assert_eq!(foreign(&before), foreign(&after));
        for row in after.qos.values() {
            prop_assert!(row.queues.values().all(|queue| after.queues.contains_key(queue)));
            // A QoS of ours stays only for somebody else's queue.
            let ours = |uuid: &Uuid| after.queue_mark(uuid).is_some_and(|mark| mark.owner == "us");
            prop_assert!(row.mark.is_none() || !row.queues.values().all(ours));
        }
        for port in after.ports.values() {
            prop_assert!(port.qos.is_none_or(|qos| after.qos.contains_key(&qos)));
        }
        prop_assert_eq!(release_plan(&after, "us", |_| true).0, 0);
    }

    #[test]
    fn a_release_of_one_keeps_the_other(before in any_snapshot()) {
        let mut after = before.clone();
        let (_, plan) = release_plan(&before, "us", |mark| mark.reservation == "a");
        perform(&mut after, &plan);
        let of = |snapshot: &Snapshot, name: &str| {
            let marked = snapshot.marked("us").into_iter();
            marked.filter(|row| row.mark.reservation == name).count()
        };
        prop_assert_eq!(of(&after, "a"), 0);
        prop_assert_eq!(of(&after, "b"), of(&before, "b"));
    }
}
