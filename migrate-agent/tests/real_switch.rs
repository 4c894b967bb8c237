//! The classifier on the HTB of a real Open vSwitch: the kernel's counters say where frames went.

mod switch_lab;

use lifeboat_agent::switch::{ClassifierError, PortClassifier, ensure, probe, remove};
use switch_lab::{SwitchLab, run};

/// The class of queue 7, and HTB's default.
const OURS: u32 = 8;
const DEFAULT: u32 = 1;

fn filters() -> String {
    run("tc", "filter show dev v1 parent 1:")
}

fn problem(answers: Vec<PortClassifier>) -> ClassifierError {
    let answer = answers.into_iter().next().unwrap();
    assert!(!answer.installed);
    answer.problem.unwrap()
}

fn assert_installed(answers: &[PortClassifier]) {
    assert!(answers.iter().all(|a| a.installed && a.problem.is_none()), "{answers:?}");
}

#[tokio::test]
async fn a_mark_leads_to_the_class_of_its_queue_with_and_without_a_tag() {
    let lab = SwitchLab::start().await;
    // Without the filter the queue is lost: this is why there is one.
    let before = lab.sent(OURS);
    lab.send(5, "set_queue:7,set_field:7->ip_dscp");
    assert_eq!(lab.sent(OURS) - before, 0);

    assert_installed(&ensure(&["v1"]).await);
    lab.send(5, "set_queue:7,set_field:7->ip_dscp");
    assert_eq!(lab.sent(OURS) - before, 5);
    let tag = "push_vlan:0x8100,set_field:4106->vlan_vid";
    lab.send(5, &format!("{tag},set_field:7->ip_dscp"));
    assert_eq!(lab.sent(OURS) - before, 10);

    let rest = lab.sent(DEFAULT);
    lab.send(5, "");
    lab.send(5, tag);
    // A mark without a queue behind it.
    lab.send(5, "set_field:9->ip_dscp");
    assert_eq!(lab.sent(OURS) - before, 10);
    assert!(lab.sent(DEFAULT) - rest >= 15);
}

#[tokio::test]
async fn it_is_there_once_however_often_it_is_ensured_and_back_after_a_new_qos() {
    let lab = SwitchLab::start().await;
    let qdiscs = run("tc", "qdisc show dev v1");
    for _ in 0..3 {
        assert_installed(&ensure(&["v1", "v1"]).await);
    }
    assert_installed(&tokio::join!(ensure(&["v1"]), ensure(&["v1"])).0);
    assert_eq!(filters().matches("bytecode").count(), 1, "{}", filters());

    // Queues come and go beside it.
    let qos = lab.vsctl("get port v1 qos");
    lab.vsctl(&format!("remove qos {} queues 7", qos.trim()));
    assert_eq!(filters().matches("bytecode").count(), 1, "{}", filters());
    let classes = run("tc", "class show dev v1");
    assert!(!classes.contains("1:8 "), "{classes}");

    let removed = remove(&["v1"]).await;
    assert!(!removed[0].installed && removed[0].problem.is_none());
    assert_eq!(filters(), "");
    assert_eq!(run("tc", "qdisc show dev v1"), qdiscs);
    assert_eq!(run("tc", "class show dev v1"), classes);
    assert!(remove(&["v1"]).await[0].problem.is_none());

    assert_installed(&ensure(&["v1"]).await);
    lab.vsctl("clear port v1 qos");
    assert!(matches!(problem(ensure(&["v1"]).await), ClassifierError::NoQos { .. }));
    lab.attach_qos();
    assert_eq!(filters(), "");
    assert_installed(&ensure(&["v1"]).await);
}

#[tokio::test]
async fn what_belongs_to_others_is_refused_and_left_as_it_is() {
    let _lab = SwitchLab::start().await;
    run("tc", "qdisc add dev v2 root handle 1: htb default 1");
    run("tc", "class add dev v2 parent 1: classid 1:1 htb rate 10mbit");
    let before = run("tc", "qdisc show dev v2");
    let error = problem(ensure(&["v2"]).await);
    assert!(matches!(error, ClassifierError::ForeignQdisc { .. }), "{error}");
    assert!(error.to_string().contains("shaped by htb 1:"), "{error}");
    assert!(remove(&["v2"]).await[0].problem.is_none());
    assert_eq!(run("tc", "qdisc show dev v2"), before);

    let theirs = "filter add dev v1 parent 1: protocol ip prio 5 u32 match ip protocol 6 0xff \
                  flowid 1:1";
    run("tc", theirs);
    let before = filters();
    let error = problem(ensure(&["v1"]).await);
    let ClassifierError::ForeignFilter { kind, preference, .. } = &error else { panic!("{error}") };
    assert_eq!((kind.as_str(), *preference), ("u32", 5));
    // The advice that the error gives is right.
    assert!(remove(&["v1"]).await[0].problem.is_none());
    assert_eq!(filters(), before);
    run("tc", "filter del dev v1 parent 1: prio 5");
    assert_installed(&ensure(&["v1"]).await);
    // Ours goes from beside theirs, which stays.
    run("tc", theirs);
    assert!(remove(&["v1"]).await[0].problem.is_none());
    assert!(filters().contains("u32") && !filters().contains("bytecode"));
}

#[tokio::test]
async fn what_the_kernel_can_do_is_found_out_and_nothing_of_it_stays() {
    let before = run("tc", "qdisc show dev lo");
    let found = probe::probe().await.unwrap();
    assert!(found.htb && found.classifier, "the tests above need both: {found:?}");
    // Asked by other words: an action without a filter.
    let polices = succeeds("unshare", "--net tc actions add action police rate 1mbit burst 10k");
    assert_eq!(found.policing, polices);
    assert_eq!(run("tc", "qdisc show dev lo"), before);
}

fn succeeds(program: &str, words: &str) -> bool {
    let output = std::process::Command::new(program).args(words.split(' ')).output();
    output.is_ok_and(|output| output.status.success())
}
