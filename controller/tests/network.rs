//! Reservations on a real Open vSwitch, as its own tools and the kernel see them.

mod network_rig;

use std::sync::atomic::Ordering;

use lifeboat_controller::network::{
    Ability, Adjustment, Network, NetworkError, PaceOnly, PageFlow, ReservationRequest, Shaping,
};
use lifeboat_policy::saturation::Saturation;
use lifeboat_protocol::terms::ReservationKind;
use lifeboat_protocol::units::BitsPerSec;
use network_rig::{Rig, connected, evacuation, eventually, migration, port, tool, wish};

#[tokio::test]
async fn a_path_is_reserved_and_given_back_as_it_was() {
    let rig = Rig::start().await;
    let (network, classifiers) = rig.network().await;
    let before = rig.everything();
    let reserved = network.reserve(wish("e1-m1", 75)).await.unwrap();
    assert_eq!((reserved.rate(), reserved.hops.len()), (BitsPerSec::from_mbit(75), 2));
    assert_eq!(reserved.hops[1].queue, 3);
    for at in ["u1", "d2"] {
        let classes = tool(&format!("tc class show dev {at}"));
        assert!(
            classes.contains("1:4 ") && classes.contains("rate 75Mbit ceil 100Mbit"),
            "{classes}"
        );
        assert!(
            classes.contains("1:1 ") && classes.contains("rate 25Mbit ceil 100Mbit"),
            "{classes}"
        );
    }
    assert!(rig.vsctl("list Queue").contains("reservation-id=\"e1 s1:d2\""));
    assert_eq!(classifiers.take(), ["ensure fabric d2", "ensure h1 u1"]);
    for bridge in ["br-h1", "s1"] {
        let flows = rig.flows(bridge);
        let page = "tcp,nw_src=10.0.0.1,nw_dst=10.0.0.2,tp_dst=7445 \
                    actions=set_queue:3,set_field:3->ip_dscp,NORMAL";
        assert!(flows.contains(page) && flows.lines().count() == 3, "{flows}");
    }
    assert_eq!(rig.flows("br-h2").lines().count(), 1);

    let held = rig.everything();
    assert_eq!(network.reserve(wish("e1-m1", 75)).await.unwrap(), reserved);
    assert_eq!(without_expiry(&rig.everything()), without_expiry(&held));
    let report = network.release(evacuation("e1"), Some(migration("e1-m1"))).await;
    assert_eq!((report.released.len(), report.failures), (2, vec![]));
    assert_eq!(rig.everything(), before);
    let again = network.release(evacuation("e1"), Some(migration("e1-m1"))).await;
    assert_eq!((again.released, again.failures), (vec![], vec![]));
}

/// Rows without the one value that is meant to move.
fn without_expiry(rows: &str) -> String {
    rows.split("reservation-expires=\"")
        .map(|part| part.split_once('"').map_or(part, |p| p.1))
        .collect()
}

#[tokio::test]
async fn a_mark_that_an_application_sets_is_cleared() {
    let rig = Rig::start().await;
    let (network, _) = rig.network().await;
    network.reserve(wish("e1-m1", 75)).await.unwrap();
    let pages = "tcp,in_port=1,nw_src=10.0.0.1,nw_dst=10.0.0.2,tp_dst=7445";
    let traced = rig.trace("s1", pages);
    assert!(traced.contains("set_queue:3") && traced.contains("set_field:3->ip_dscp"), "{traced}");
    // DSCP 3 is 12 in the whole byte.
    for liar in
        ["tcp,in_port=1,nw_src=10.0.0.9,nw_dst=10.0.0.2,nw_tos=12", "udp,in_port=1,nw_tos=12"]
    {
        let traced = rig.trace("s1", liar);
        assert!(
            traced.contains("set_field:0->ip_dscp") && !traced.contains("set_queue"),
            "{traced}"
        );
    }
    let honest = rig.trace("s1", "udp,in_port=1,nw_tos=184");
    assert!(!honest.contains("set_field"), "{honest}");
}

#[tokio::test]
async fn migrations_of_an_evacuation_share_a_queue_and_evacuations_share_a_link() {
    let rig = Rig::start().await;
    let (network, _) = rig.network().await;
    let before = rig.everything();
    network.reserve(wish("e1-m1", 50)).await.unwrap();
    let second = network.reserve(wish("e1-m2", 50)).await.unwrap();
    assert_eq!(second.hops[0].queue, 3);
    assert!(network.release(evacuation("e1"), Some(migration("e1-m1"))).await.released.is_empty());
    let third = network.reserve(wish("e2-m1", 80)).await.unwrap();
    assert_eq!((third.rate(), third.hops[0].queue), (BitsPerSec::from_mbit(80), 7));
    let classes = tool("tc class show dev u1");
    assert!(
        ["rate 80Mbit", "rate 15Mbit", "rate 5Mbit"].iter().all(|r| classes.contains(r)),
        "{classes}"
    );

    let ports = vec![(port("h1.br-h1", "u1"), BitsPerSec::from_mbit(20))];
    let adjustment = Adjustment { evacuation: evacuation("e2"), ports };
    let adjusted = network.adjust(adjustment).await.unwrap();
    assert_eq!(adjusted.rate(), BitsPerSec::from_mbit(20));
    let classes = tool("tc class show dev u1");
    assert!(
        ["rate 20Mbit", "rate 50Mbit", "rate 30Mbit"].iter().all(|r| classes.contains(r)),
        "{classes}"
    );
    assert_eq!(network.release(evacuation("e2"), None).await.released.len(), 2);
    let classes = tool("tc class show dev u1");
    assert_eq!(classes.matches("rate 50Mbit").count(), 2, "{classes}");
    assert_eq!(network.release(evacuation("e1"), Some(migration("e1-m2"))).await.failures, vec![]);
    assert_eq!(rig.everything(), before);
}

#[tokio::test]
async fn what_a_killed_controller_left_is_found_and_taken_away() {
    let rig = Rig::start().await;
    let before = {
        let (network, _) = rig.network().await;
        let before = rig.everything();
        network.reserve(wish("e1-m1", 40)).await.unwrap();
        network.reserve(wish("e2-m1", 40)).await.unwrap();
        before
    };
    let (network, _) = rig.network().await;
    let report = network.release_leftovers(vec![migration("e2-m1")]).await;
    assert_eq!((report.released.len(), report.failures), (2, vec![]));
    assert_eq!(rig.flows("s1").matches("set_queue:7").count(), 1);
    assert!(!rig.flows("s1").contains("set_queue:3"), "{}", rig.flows("s1"));
    // The number of the one that lives is not given away.
    let new = network.reserve(wish("e3-m1", 20)).await.unwrap();
    assert_eq!(new.hops[0].queue, 3);
    network.release(evacuation("e3"), None).await;
    assert_eq!(network.release(evacuation("e2"), Some(migration("e2-m1"))).await.released.len(), 2);
    assert_eq!(rig.everything(), before);
}

#[tokio::test]
async fn a_restarted_controller_releases_by_marks_alone() {
    let rig = Rig::start().await;
    let before = {
        let (network, _) = rig.network().await;
        let before = rig.everything();
        network.reserve(wish("e1-m1", 40)).await.unwrap();
        network.reserve(wish("e1-m2", 40)).await.unwrap();
        before
    };
    let (network, _) = rig.network().await;
    let first = network.release(evacuation("e1"), Some(migration("e1-m1"))).await;
    assert_eq!((first.released, first.failures), (vec![], vec![]));
    assert_eq!(rig.flows("s1").matches("set_queue:3").count(), 1);
    let second = network.release(evacuation("e1"), Some(migration("e1-m2"))).await;
    assert_eq!((second.released.len(), second.failures), (2, vec![]));
    assert_eq!(rig.everything(), before);
}

#[tokio::test]
async fn foreign_queues_are_joined_or_refused_and_stay() {
    let rig = Rig::start().await;
    let (network, classifiers) = rig.network().await;
    rig.vsctl(
        "set port d2 qos=@q -- --id=@q create qos type=linux-htb other_config:max-rate=100000000 \
         queues:0=@k -- --id=@k create queue other_config:min-rate=40000000",
    );
    let before = rig.everything();
    let reserved = network.reserve(wish("e1-m1", 75)).await.unwrap();
    let rates: Vec<u64> = reserved.hops.iter().map(|hop| hop.rate.0 / 1_000_000).collect();
    assert_eq!(rates, [75, 60]);
    assert!(tool("tc class show dev d2").contains("rate 40Mbit"));
    classifiers.take();
    assert_eq!(network.release(evacuation("e1"), None).await.failures, vec![]);
    assert_eq!(classifiers.take(), ["remove fabric d2"]);
    assert_eq!(rig.everything(), before);

    rig.vsctl("-- --all destroy qos -- --all destroy queue -- clear port d2 qos");
    rig.vsctl("set port d2 qos=@q -- --id=@q create qos type=linux-noop external_ids:whose=theirs");
    let before = rig.everything();
    let refused = network.reserve(wish("e1-m1", 75)).await.unwrap_err();
    assert!(
        matches!(&refused, NetworkError::ForeignQos { detail, .. } if detail.contains("linux-noop"))
    );
    assert!(refused.to_string().contains("s1:d2 already carries QoS"), "{refused}");
    assert_eq!(rig.everything(), before);
}

#[tokio::test]
async fn a_switch_that_restarts_gets_its_flows_back() {
    let mut rig = Rig::start().await;
    let (network, classifiers) = rig.network().await;
    network.reserve(wish("e1-m1", 75)).await.unwrap();
    let flows = rig.flows("s1");
    let page = flows.lines().find(|flow| flow.contains("set_queue")).unwrap().to_owned();
    classifiers.take();
    rig.kill_switch();
    eventually("the switch is missed", async || {
        network.switches().await.iter().all(|switch| !switch.openflow_connected)
    })
    .await;
    rig.start_switch().await;
    connected(&network).await;
    eventually("the flow is back", async || rig.flows("s1").contains(&page)).await;
    eventually("its classifier, too", async || {
        classifiers.asked.lock().unwrap().iter().any(|asked| asked == "ensure fabric d2")
    })
    .await;
    // The flow that let it forward went with the restart; ours stands in, and does not go.
    assert!(rig.flows("s1").contains("cookie=0x4c42300000000000"), "{}", rig.flows("s1"));
    assert!(tool("tc class show dev d2").contains("rate 75Mbit"));
    assert_eq!(network.release(evacuation("e1"), None).await.failures, vec![]);
    assert_eq!(rig.flows("s1").trim(), "cookie=0x4c42300000000000, priority=0 actions=NORMAL");
    // Once somebody else's flow forwards it goes.
    rig.ofctl("s1", "add-flow", "priority=1,actions=NORMAL");
    network.release_leftovers(vec![]).await;
    assert_eq!(rig.flows("s1").trim(), "priority=1 actions=NORMAL");
}

#[tokio::test]
async fn what_stands_in_the_way_is_named_and_nothing_remains() {
    let mut rig = Rig::start().await;
    let (network, classifiers) = rig.network().await;
    let before = rig.everything();
    classifiers.refuses.store(true, Ordering::Relaxed);
    let unable = network.reserve(wish("e1-m1", 75)).await.unwrap_err();
    assert!(unable.to_string().contains("tc is missing"), "{unable}");
    assert_eq!(rig.everything(), before);
    classifiers.refuses.store(false, Ordering::Relaxed);

    let mut wrong = wish("e1-m1", 75);
    wrong.hops[1].at = port("s1", "d7");
    let unknown = network.reserve(wrong.clone()).await.unwrap_err();
    assert_eq!(unknown, NetworkError::UnknownPort { at: port("s1", "d7") });
    wrong.hops[1].at = port("s9", "d1");
    let unknown = network.reserve(wrong).await.unwrap_err();
    assert!(matches!(unknown, NetworkError::UnknownSwitch { .. }));
    let mut six = wish("e1-m1", 75);
    six.traffic.source = "fd00::1".parse().unwrap();
    assert!(matches!(network.reserve(six).await, Err(NetworkError::Unable { .. })));
    let nothing = network.reserve(wish("e1-m1", 0)).await.unwrap();
    assert!(nothing.hops.is_empty());
    assert_eq!(network.release(evacuation("e1"), Some(migration("e1-m1"))).await.failures, vec![]);
    assert_eq!(rig.everything(), before);

    rig.vsctl("set bridge s1 protocols=OpenFlow10");
    let mut refused = None;
    eventually("it is gone", async || {
        refused = network.reserve(wish("e1-m1", 75)).await.err();
        network.release(evacuation("e1"), None).await;
        refused.is_some()
    })
    .await;
    let refused = refused.unwrap().to_string();
    assert!(refused.contains("OpenFlow connection to switch s1 is down"), "{refused}");
    assert!(refused.contains("protocols=OpenFlow13"), "{refused}");
    rig.kill_switch();
}

#[tokio::test]
async fn rates_are_unknown_until_they_are_known() {
    let rig = Rig::start().await;
    let (network, _) = rig.network().await;
    network.reserve(wish("e1-m1", 75)).await.unwrap();
    assert!(
        network
            .rates()
            .await
            .iter()
            .all(|rate| rate.queues.iter().all(|q| q.transmitted.is_none()))
    );
    eventually("two samples", async || {
        let rates = network.rates().await;
        let known = rates.iter().all(|rate| rate.transmitted.is_some());
        known && rates.iter().flat_map(|rate| &rate.queues).all(|q| q.transmitted.is_some())
    })
    .await;
    let switches = network.switches().await;
    let s1 = switches.iter().find(|switch| switch.name.as_str() == "s1").unwrap();
    assert_eq!((s1.datapath.as_str(), s1.datapath_id.as_str()), ("netdev", "0000000000000002"));
    let d2 = s1.ports.iter().find(|port| port.name == "d2").unwrap();
    assert!(d2.up && d2.number > 0 && d2.peer == "h2.br-h2:u2");
    assert_eq!((d2.capacity, d2.reserved), (BitsPerSec::from_mbit(100), BitsPerSec::from_mbit(75)));
    tool("ip link set u2 down");
    eventually("the link is down", async || {
        let switches = network.switches().await;
        let s1 = switches.iter().find(|switch| switch.name.as_str() == "s1").unwrap();
        s1.ports.iter().any(|port| port.name == "d2" && !port.up)
    })
    .await;
}

#[tokio::test]
async fn a_strict_reservation_is_a_ceiling_and_holds_applications_to_the_remainder() {
    let rig = Rig::start().await;
    let (network, _) = rig.network().await;
    let before = rig.everything();
    let strict = ReservationRequest { kind: ReservationKind::Strict, ..wish("e1-m1", 75) };
    network.reserve(strict).await.unwrap();
    let classes = tool("tc class show dev u1");
    assert!(classes.contains("rate 75Mbit ceil 75Mbit"), "{classes}");
    assert!(classes.contains("rate 25Mbit ceil 25Mbit"), "{classes}");
    // A borrowing one beside it may have what is not reserved strictly; the ceiling follows.
    network.reserve(wish("e2-m1", 10)).await.unwrap();
    let ports = vec![(port("h1.br-h1", "u1"), BitsPerSec::from_mbit(40))];
    network.adjust(Adjustment { evacuation: evacuation("e1"), ports }).await.unwrap();
    let classes = tool("tc class show dev u1");
    assert!(classes.contains("rate 40Mbit ceil 40Mbit"), "{classes}");
    assert!(classes.contains("rate 50Mbit ceil 60Mbit"), "{classes}");
    // A controller that comes after knows which of the two it was.
    drop(network);
    let (network, _) = rig.network().await;
    network.release_leftovers(vec![migration("e1-m1"), migration("e2-m1")]).await;
    let rates = network.rates().await;
    let u1 = rates.iter().find(|rate| rate.at == port("h1.br-h1", "u1")).unwrap();
    let kinds: Vec<ReservationKind> = u1.queues.iter().map(|queue| queue.kind).collect();
    assert_eq!(kinds, [ReservationKind::Strict, ReservationKind::Borrow]);
    assert_eq!(u1.queues[0].migrations, [migration("e1-m1")]);
    network.release(evacuation("e1"), None).await;
    network.release(evacuation("e2"), None).await;
    assert_eq!(rig.everything(), before);
}

#[tokio::test]
async fn a_link_that_is_not_heard_of_is_unknown_and_a_quiet_one_calm() {
    let mut rig = Rig::start().await;
    let (network, _) = rig.network().await;
    eventually("every link is known", async || {
        network.rates().await.iter().all(|rate| rate.saturation != Saturation::Unknown)
    })
    .await;
    let rates = network.rates().await;
    assert!(rates.iter().all(|rate| rate.up && !rate.saturation.is_hot()), "{rates:?}");
    rig.kill_switch();
    eventually("nothing is known any more", async || {
        let rates = network.rates().await;
        rates.iter().all(|rate| rate.saturation == Saturation::Unknown)
    })
    .await;
    let switches = network.switches().await;
    assert!(switches.iter().all(|switch| switch.saturation == Saturation::Unknown));
}

/// The same on machines whose kernels have no HTB.
const UNSHAPED: Shaping = Shaping { htb: false, classifier: true, policing: false };

async fn ability(network: &impl Network, switch: &str, name: &str) -> Ability {
    let switches = network.switches().await;
    let status = switches.iter().find(|status| status.name.as_str() == switch).unwrap();
    status.ports.iter().find(|port| port.name == name).unwrap().ability.clone()
}

#[tokio::test]
async fn what_a_kernel_cannot_shape_is_only_paced_and_on_a_host_others_are_held_back() {
    for (htb, classifier, why) in
        [(false, true, PaceOnly::NoShaper), (true, false, PaceOnly::NoFilter)]
    {
        let rig = Rig::start().await;
        let shaping = Shaping { htb, classifier, policing: false };
        let (network, classifiers) = rig.network_on(shaping).await;
        let before = rig.everything();
        let reserved = network.reserve(wish("e1-m1", 75)).await.unwrap();
        assert!(reserved.hops.iter().all(|hop| hop.is_paced()), "{reserved:?}");
        assert_eq!(reserved.paced_rate(), Some(BitsPerSec::from_mbit(75)));
        assert_eq!(classifiers.take(), Vec::<String>::new());
        // The switch in the middle leads elsewhere, too: nothing is installed there.
        assert_eq!(rig.flows("s1").lines().count(), 1);
        assert_eq!(ability(&network, "s1", "d2").await, Ability::PaceOnly(why.clone()));
        assert_eq!(ability(&network, "h1.br-h1", "u1").await, Ability::Metered(why));
        let switches = network.switches().await;
        let s1 = switches.iter().find(|switch| switch.name.as_str() == "s1").unwrap();
        assert_eq!(s1.shaping, Some(shaping));
        let meter = rig.ofctl("br-h1", "dump-meters", "");
        assert!(meter.contains("meter=19522 kbps burst stats"), "{meter}");
        assert!(meter.contains("type=drop rate=25000 burst_size=1250"), "{meter}");
        let pages =
            rig.trace("br-h1", "tcp,in_port=LOCAL,nw_src=10.0.0.1,nw_dst=10.0.0.2,tp_dst=7445");
        assert!(!pages.contains("meter:"), "{pages}");
        let forged = rig.trace("br-h1", "udp,in_port=LOCAL,nw_tos=12");
        assert!(
            forged.contains("meter:19522") && forged.contains("set_field:0->ip_dscp"),
            "{forged}"
        );
        let released = network.release(evacuation("e1"), None).await;
        assert_eq!(released.failures, vec![]);
        assert_eq!(rig.everything(), before);
        let meters = rig.ofctl("br-h1", "dump-meters", "");
        assert!(!meters.contains("meter="), "{meters}");
    }
}

#[tokio::test]
async fn a_meter_follows_who_comes_and_goes_and_a_restart_of_controller_or_switch() {
    let mut rig = Rig::start().await;
    let meter = |rig: &Rig| {
        let said = rig.ofctl("br-h1", "dump-meters", "");
        let rate = said.split_once("rate=").and_then(|(_, rest)| rest.split_whitespace().next());
        rate.map(str::to_owned)
    };
    let (network, _) = rig.network_on(UNSHAPED).await;
    let before = rig.everything();
    network.reserve(wish("e1-m1", 40)).await.unwrap();
    assert_eq!(meter(&rig).as_deref(), Some("60000"));
    network.reserve(wish("e1-m2", 40)).await.unwrap();
    assert_eq!(meter(&rig).as_deref(), Some("60000"));
    let ports = vec![(port("h1.br-h1", "u1"), BitsPerSec::from_mbit(20))];
    network.adjust(Adjustment { evacuation: evacuation("e1"), ports }).await.unwrap();
    assert_eq!(meter(&rig).as_deref(), Some("80000"));
    network.reserve(wish("e2-m1", 30)).await.unwrap();
    assert_eq!(meter(&rig).as_deref(), Some("50000"));
    network.release(evacuation("e2"), None).await;
    assert_eq!(meter(&rig).as_deref(), Some("80000"));

    drop(network);
    let (network, _) = rig.network_on(UNSHAPED).await;
    let kept = network.release_leftovers(vec![migration("e1-m2")]).await;
    assert_eq!(kept.failures, vec![]);
    assert_eq!(meter(&rig).as_deref(), Some("80000"));
    assert_eq!(rig.flows("br-h1").matches("tp_dst=7445").count(), 1);

    rig.kill_switch();
    eventually("the switch is missed", async || {
        network.switches().await.iter().all(|switch| !switch.openflow_connected)
    })
    .await;
    rig.start_switch().await;
    connected(&network).await;
    eventually("the meter is back", async || meter(&rig).as_deref() == Some("80000")).await;
    rig.ofctl("br-h1", "add-flow", "priority=0,actions=NORMAL");
    rig.ofctl("s1", "add-flow", "priority=0,actions=NORMAL");
    rig.ofctl("br-h2", "add-flow", "priority=0,actions=NORMAL");

    // Nobody lives: a controller that comes after takes it away.
    drop(network);
    let (network, _) = rig.network_on(UNSHAPED).await;
    assert_eq!(network.release_leftovers(vec![]).await.failures, vec![]);
    assert_eq!(meter(&rig), None);
    assert_eq!(rig.everything(), before);
}

#[tokio::test]
async fn a_meter_comes_before_no_flow_of_others_that_does_more_than_forward() {
    let rig = Rig::start().await;
    rig.ofctl("br-h1", "add-flow", "priority=9,udp,nw_src=10.0.0.66,actions=drop");
    let (network, _) = rig.network_on(UNSHAPED).await;
    let before = rig.everything();
    let reserved = network.reserve(wish("e1-m1", 75)).await.unwrap();
    assert_eq!(reserved.paced_rate(), Some(BitsPerSec::from_mbit(75)));
    assert_eq!(rig.everything(), before);
    let only = Ability::PaceOnly(PaceOnly::NoShaper);
    assert_eq!(ability(&network, "h1.br-h1", "u1").await, only);
    network.release(evacuation("e1"), None).await;
}

/// Real packets: a flood of an application gets what is not reserved, and no more.
#[tokio::test]
async fn a_flood_from_a_metered_host_gets_what_is_not_reserved() {
    let rig = Rig::start().await;
    let (network, _) = rig.network_on(UNSHAPED).await;
    tool("ip address add 10.7.0.1/24 dev br-h1");
    tool("ip link set br-h1 up");
    tool("ip neighbour add 10.7.0.2 lladdr 02:00:00:00:00:02 dev br-h1 nud permanent");
    let sent = || -> u64 {
        // Of the thread's own namespace: name, eight figures of what came, then bytes sent.
        let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let line = text.lines().find(|line| line.trim_start().starts_with("u1:")).unwrap();
        line.split_whitespace().nth(9).unwrap().parse().unwrap()
    };
    // 60 Mbit/s for two seconds, by packets of 1,442 bytes on the wire.
    let flood = async || {
        let application = std::net::UdpSocket::bind("10.7.0.1:0").unwrap();
        let (began, before) = (tokio::time::Instant::now(), sent());
        let packets = 60_000_000 * 2 / 8 / 1442;
        for number in 0..packets {
            tokio::time::sleep_until(began + std::time::Duration::from_micros(number * 192)).await;
            application.send_to(&[0; 1400], "10.7.0.2:9").unwrap();
        }
        let passed = (sent() - before) as f64 * 8.0 / 1e6;
        passed / began.elapsed().as_secs_f64()
    };
    let free = flood().await;
    assert!(free > 45.0, "{free} Mbit/s without a reservation");
    network.reserve(wish("e1-m1", 90)).await.unwrap();
    let held = flood().await;
    // 10 Mbit/s, and once a burst of 0.5 Mbit.
    assert!((8.0..11.5).contains(&held), "{held} Mbit/s");
    network.release(evacuation("e1"), None).await;
    let free = flood().await;
    assert!(free > 45.0, "{free} Mbit/s after the release");
}

#[tokio::test]
async fn what_a_store_sends_to_who_gathers_is_led_to_the_queue_and_known_after_a_restart() {
    let rig = Rig::start().await;
    let (network, _) = rig.network().await;
    let before = rig.everything();
    let traffic = PageFlow {
        source: [10, 0, 0, 2].into(),
        destination: ([10, 0, 0, 1], 7100).into(),
        served: true,
    };
    let gathered = ReservationRequest { traffic, ..wish("e1-m1.g1", 40) };
    network.reserve(wish("e1-m1", 40)).await.unwrap();
    network.reserve(gathered).await.unwrap();
    let sent = "tcp,nw_src=10.0.0.1,nw_dst=10.0.0.2,tp_src=7100 \
                actions=set_queue:3,set_field:3->ip_dscp,NORMAL";
    for bridge in ["br-h1", "s1"] {
        assert!(rig.flows(bridge).contains(sent), "{}", rig.flows(bridge));
    }
    // What its clients send it is nobody's pages.
    let asked = rig.trace("s1", "tcp,in_port=2,nw_src=10.0.0.2,nw_dst=10.0.0.1,tp_dst=7100");
    assert!(!asked.contains("set_queue"), "{asked}");
    // The migration itself is over; a controller that comes after keeps what is gathered.
    network.release(evacuation("e1"), Some(migration("e1-m1"))).await;
    drop(network);
    let (network, _) = rig.network().await;
    network.release_leftovers(vec![migration("e1-m1.g1")]).await;
    let rates = network.rates().await;
    let u1 = rates.iter().find(|rate| rate.at == port("h1.br-h1", "u1")).unwrap();
    assert_eq!(u1.queues[0].migrations, [migration("e1-m1.g1")]);
    let released = network.release(evacuation("e1"), Some(migration("e1-m1.g1"))).await;
    assert_eq!((released.released.len(), released.failures), (2, vec![]));
    assert_eq!(rig.everything(), before);
}
