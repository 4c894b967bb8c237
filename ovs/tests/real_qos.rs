//! Queues on the ports of a real Open vSwitch, as its own tools and the kernel see them.

mod lab;

use lab::{Lab, PATIENCE};
use lifeboat_ovs::ovsdb::{
    Atom, ClientError, Condition, Datum, Operation, RequestError, Row, Status,
};
use lifeboat_ovs::qos::{self, Mark, QosError, Rates, Reservation};

const OWNER: &str = "test-owner";

fn mark(reservation: &str) -> Mark {
    Mark { owner: OWNER.to_owned(), reservation: reservation.to_owned(), expires: 2_000_000_000 }
}

fn wanted(port: &str, queue: u32, reservation: &str) -> Reservation {
    Reservation {
        port: port.to_owned(),
        queue,
        rates: Rates { min: 75_000_000, max: None },
        mark: mark(reservation),
        others: Rates { min: 25_000_000, max: None },
        capacity: 100_000_000,
    }
}

fn rows(lab: &Lab) -> String {
    ["QoS", "Queue"]
        .map(|table| lab.vsctl(&format!("--columns=_uuid,other_config,external_ids list {table}")))
        .concat()
        + &lab.vsctl("--columns=name,qos list Port")
        + &lab.vsctl("--columns=queues,type list QoS")
}

#[tokio::test]
async fn queues_are_made_changed_shared_and_leave_nothing_behind() {
    let lab = Lab::shaping().await;
    let client = lab.client().await;
    let before = rows(&lab);
    qos::reserve(&client, &wanted("v1", 1, "a"), PATIENCE).await.unwrap();
    let classes = lab.inside(&["tc", "class", "show", "dev", "v1"]);
    assert!(classes.contains("class htb 1:2") && classes.contains("rate 75Mbit"), "{classes}");
    assert!(classes.contains("class htb 1:1") && classes.contains("rate 25Mbit"), "{classes}");
    assert!(lab.vsctl("list Queue").contains("reservation-id=a"));

    qos::reserve(&client, &wanted("v1", 2, "b"), PATIENCE).await.unwrap();
    let taken = qos::reserve(&client, &wanted("v1", 2, "c"), PATIENCE).await;
    assert_eq!(taken, Err(QosError::QueueTaken { port: "v1".into(), queue: 2 }));
    let slower = Rates { min: 20_000_000, max: Some(30_000_000) };
    qos::change(&client, "v1", &mark("b"), slower, PATIENCE).await.unwrap();
    let classes = lab.inside(&["tc", "class", "show", "dev", "v1"]);
    assert!(classes.contains("rate 20Mbit ceil 30Mbit"), "{classes}");
    assert_eq!(qos::marked(&client, OWNER, PATIENCE).await.unwrap().len(), 4);

    let released = qos::release(&client, OWNER, |mark| mark.reservation == "a", PATIENCE).await;
    assert_eq!(released, Ok(1));
    let classes = lab.inside(&["tc", "class", "show", "dev", "v1"]);
    assert!(!classes.contains("class htb 1:2 ") && classes.contains("class htb 1:3 "), "{classes}");
    assert_eq!(qos::release(&client, OWNER, |_| true, PATIENCE).await, Ok(1));
    assert_eq!(rows(&lab), before);
    assert!(!lab.inside(&["tc", "qdisc", "show", "dev", "v1"]).contains("htb"));
    let gone = qos::change(&client, "v1", &mark("b"), slower, PATIENCE).await;
    assert!(matches!(gone, Err(QosError::NotReserved { .. })), "{gone:?}");
}

#[tokio::test]
async fn a_foreign_htb_is_joined_and_left_as_it_was() {
    let lab = Lab::shaping().await;
    let client = lab.client().await;
    lab.vsctl(
        "set port v1 qos=@q -- --id=@q create qos type=linux-htb external_ids:whose=theirs \
               other_config:max-rate=100000000 queues:5=@k -- --id=@k create queue \
               other_config:min-rate=10000000 external_ids:whose=theirs",
    );
    let before = rows(&lab);
    qos::reserve(&client, &wanted("v1", 1, "a"), PATIENCE).await.unwrap();
    let classes = lab.inside(&["tc", "class", "show", "dev", "v1"]);
    assert!(["1:1 ", "1:2 ", "1:6 "].iter().all(|class| classes.contains(class)), "{classes}");
    assert_eq!(qos::release(&client, "somebody-else", |_| true, PATIENCE).await, Ok(0));
    assert_eq!(qos::release(&client, OWNER, |_| true, PATIENCE).await, Ok(1));
    assert_eq!(rows(&lab), before);
}

#[tokio::test]
async fn what_cannot_be_reserved_is_refused_and_changes_nothing() {
    let lab = Lab::shaping().await;
    let client = lab.client().await;
    lab.vsctl("set port v2 qos=@q -- --id=@q create qos type=linux-sfq");
    let before = rows(&lab);
    let foreign = qos::reserve(&client, &wanted("v2", 1, "a"), PATIENCE).await.unwrap_err();
    let kind = "linux-sfq".to_owned();
    assert_eq!(foreign, QosError::ForeignKind { port: "v2".into(), kind });
    let missing = qos::reserve(&client, &wanted("v9", 1, "a"), PATIENCE).await;
    assert_eq!(missing, Err(QosError::NoSuchPort { port: "v9".into() }));
    let zero = qos::reserve(&client, &wanted("v1", 0, "a"), PATIENCE).await;
    assert_eq!(zero, Err(QosError::BadQueue { queue: 0 }));
    let too_much = Reservation { capacity: 1, ..wanted("v1", 1, "a") };
    let refused = qos::reserve(&client, &too_much, PATIENCE).await;
    assert!(matches!(refused, Err(QosError::BadRates { .. })));
    assert_eq!(rows(&lab), before);
}

#[tokio::test]
async fn a_plan_that_somebody_overtakes_changes_nothing() {
    let lab = Lab::shaping().await;
    let client = lab.client().await;
    let snapshot = qos::read(&client, PATIENCE).await.unwrap();
    let plan = qos::reserve_plan(&snapshot, &wanted("v1", 1, "a")).unwrap();
    lab.vsctl("set port v1 qos=@q -- --id=@q create qos type=linux-htb");
    let before = rows(&lab);
    let error = QosError::from(client.transact(&plan, PATIENCE).await.unwrap_err());
    assert!(error == QosError::Changed && error.may_retry());
    assert_eq!(rows(&lab), before);
}

#[tokio::test]
async fn what_a_crash_left_is_found_by_its_mark_even_without_a_port() {
    let lab = Lab::shaping().await;
    let client = lab.client().await;
    let before = lab.vsctl("--columns=_uuid list QoS") + &lab.vsctl("--columns=_uuid list Queue");
    qos::reserve(&client, &wanted("v1", 1, "a"), PATIENCE).await.unwrap();
    lab.vsctl("del-port br0 v1");
    assert_eq!(qos::marked(&client, OWNER, PATIENCE).await.unwrap().len(), 3);
    let late = |mark: &Mark| mark.expires < 2_000_000_001;
    assert_eq!(qos::release(&client, OWNER, late, PATIENCE).await, Ok(1));
    let after = lab.vsctl("--columns=_uuid list QoS") + &lab.vsctl("--columns=_uuid list Queue");
    assert_eq!(after, before);
}

#[tokio::test]
async fn errors_of_transactions_come_with_the_servers_words() {
    let lab = Lab::dummy().await;
    let client = lab.client().await;
    let row = Row::from([("type".to_owned(), Datum::from(true))]);
    let insert = Operation::Insert { table: "QoS".to_owned(), row, name: None };
    let comment = Operation::Comment("about to fail".to_owned());
    let error = client.transact(&[comment, insert], PATIENCE).await.unwrap_err();
    assert!(error.to_string().contains("operation 1: syntax error"), "{error}");
    let dangling = Datum::Set(vec![Atom::Uuid(lifeboat_ovs::ovsdb::Uuid([1; 16]))]);
    let update = Operation::Update {
        table: "Port".to_owned(),
        conditions: vec![Condition::is("name", "br0")],
        row: Row::from([("qos".to_owned(), dangling)]),
    };
    let error = client.transact(&[update], PATIENCE).await.unwrap_err();
    assert!(error.to_string().contains("referential integrity violation"), "{error}");
    let aborted = client.transact(&[Operation::Abort], PATIENCE).await.unwrap_err();
    assert!(aborted.to_string().contains("aborted"), "{aborted}");
}

#[tokio::test]
async fn a_monitor_follows_rows_across_a_restart_of_the_server() {
    let mut lab = Lab::dummy().await;
    let client = lab.client().await;
    let mut monitor = client.monitor(&[("Bridge", &["name"])], PATIENCE).await.unwrap();
    let first = tokio::time::timeout(PATIENCE, monitor.changes()).await.unwrap().unwrap();
    assert_eq!(first[0].new.as_ref().unwrap()["name"].text(), Some("br0"));
    lab.kill_switch();
    lab.kill_server();
    let mut status = client.status();
    let down = status.wait_for(|status| matches!(status, Status::Disconnected(Some(_))));
    tokio::time::timeout(PATIENCE, down).await.unwrap().unwrap();
    let refused = client.transact(&[], PATIENCE).await;
    assert_eq!(refused, Err(ClientError::Request(RequestError::Disconnected)));
    lab.start_server().await;
    client.connected(PATIENCE).await.unwrap();
    lab.vsctl("--no-wait add-br br1");
    let next = tokio::time::timeout(PATIENCE, monitor.changes()).await.unwrap().unwrap();
    assert_eq!((next.len(), next[0].new.as_ref().unwrap()["name"].text()), (1, Some("br1")));
    let unknown = client.monitor(&[("Nothing", &["name"])], PATIENCE).await;
    assert!(matches!(unknown, Err(RequestError::Refused { .. })));
}

#[tokio::test]
async fn rows_without_a_switch_to_install_them_are_told_apart() {
    let mut lab = Lab::dummy().await;
    let client = lab.client().await;
    lab.kill_switch();
    let soon = std::time::Duration::from_millis(300);
    let result = client.install(vec![Operation::Comment("nobody home".to_owned())], soon).await;
    assert!(matches!(result, Err(ClientError::NotInstalled { .. })), "{result:?}");
    lab.start_switch().await;
    client.install(vec![Operation::Comment("somebody home".to_owned())], PATIENCE).await.unwrap();
}
