//! OpenFlow with a real ovs-vswitchd.

mod lab;

use std::time::Duration;

use lab::{Lab, PATIENCE};
use lifeboat_ovs::openflow::codec::meter::{MeterCommand, MeterMod};
use lifeboat_ovs::openflow::flow::FlowMod;
use lifeboat_ovs::openflow::io::ConnectionError;
use lifeboat_ovs::openflow::packet::PacketOut;
use lifeboat_ovs::openflow::{
    Action, Instruction, Match, Message, Oxm, PortNo, RequestError, SessionError, Settings,
    SwitchHandle, Switches, WhatHappened, connect, listen,
};
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

async fn next(switches: &mut Switches) -> WhatHappened {
    timeout(PATIENCE, switches.recv()).await.expect("an event in time").expect("an event").what
}

async fn connected(lab: &Lab) -> (SwitchHandle, Switches) {
    lab.wait_for("br0.mgmt").await;
    let mut switches = connect(&lab.management("br0"), Settings::default()).await.unwrap();
    match next(&mut switches).await {
        WhatHappened::Connected { handle, .. } => (handle, switches),
        other => panic!("{other:?}"),
    }
}

fn marking(queue: u32) -> Vec<Instruction> {
    let dscp = u8::try_from(queue).unwrap();
    vec![Instruction::ApplyActions(vec![
        Action::SetQueue(queue),
        Action::SetField(Oxm::IpDscp(dscp)),
        Action::output(PortNo::NORMAL),
    ])]
}

#[tokio::test]
async fn a_flow_with_queue_and_mark_is_there_after_the_barrier_and_gone_after_its_deletion() {
    let lab = Lab::dummy().await;
    let (switch, _events) = connected(&lab).await;
    let matching = Match::any().with(Oxm::EthType(0x0800)).with(Oxm::IpProto(6));
    switch.flow_mod(FlowMod::add(0xab, 70, matching, marking(7)), PATIENCE).await.unwrap();
    let flows = lab.ofctl("dump-flows");
    assert!(flows.contains("cookie=0xab"), "{flows}");
    assert!(flows.contains("priority=70,tcp"), "{flows}");
    assert!(flows.contains("set_queue:7,set_field:7->ip_dscp,NORMAL"), "{flows}");
    let ours = switch.flow_stats(0xab, u64::MAX, PATIENCE).await.unwrap();
    assert_eq!((ours.len(), &ours[0].instructions), (1, &marking(7)));
    assert_eq!(switch.flow_stats(0xac, u64::MAX, PATIENCE).await.unwrap(), []);
    switch.flow_mod(FlowMod::delete_by_cookie(0xab, u64::MAX), PATIENCE).await.unwrap();
    assert!(!lab.ofctl("dump-flows").contains("cookie=0xab"));
}

#[tokio::test]
async fn a_meter_is_made_used_and_refused_by_name() {
    let lab = Lab::dummy().await;
    let (switch, _events) = connected(&lab).await;
    let meter = MeterMod::drop_above(MeterCommand::Add, 5, 25_000, 12_500);
    switch.meter_mod(meter.clone(), PATIENCE).await.unwrap();
    let shown = lab.ofctl("dump-meters");
    assert!(shown.contains("meter=5 kbps burst stats"), "{shown}");
    assert!(shown.contains("rate=25000 burst_size=12500"), "{shown}");
    assert_eq!(switch.meter_stats(5, PATIENCE).await.unwrap()[0].meter, 5);
    let again = switch.meter_mod(meter, PATIENCE).await.unwrap_err();
    assert_eq!(again.to_string(), "the switch refuses: OFPMMFC_METER_EXISTS");
    let missing = FlowMod::add(1, 1, Match::any(), vec![Instruction::Meter(9)]);
    let good = FlowMod::add(2, 2, Match::any(), vec![]);
    let changes = vec![Message::FlowMod(good), Message::FlowMod(missing)];
    let refused = switch.change(changes, PATIENCE).await.unwrap_err();
    let RequestError::Refused { failure, index } = refused else { panic!("{refused:?}") };
    assert_eq!((failure.name().as_deref(), index), (Some("OFPMMFC_INVALID_METER"), 1));
}

#[tokio::test]
async fn the_switch_tells_its_ports_counters_and_who_it_is() {
    let lab = Lab::shaping().await;
    let (switch, _events) = connected(&lab).await;
    let ports = switch.port_desc(PATIENCE).await.unwrap();
    let names: Vec<_> = ports.iter().map(|port| port.name.to_string()).collect();
    assert!(
        ["br0", "v1", "v2"].iter().all(|name| names.contains(&(*name).to_owned())),
        "{names:?}"
    );
    assert!(switch.desc(PATIENCE).await.unwrap().hardware.contains("Open vSwitch"));
    let before = switch.port_stats(PortNo(1), PATIENCE).await.unwrap();
    let packet = vec![0xff; 60].into();
    switch.packet_out(PacketOut::to_port(PortNo(1), packet), PATIENCE).await.unwrap();
    switch.barrier(PATIENCE).await.unwrap();
    let after = switch.port_stats(PortNo(1), PATIENCE).await.unwrap();
    assert!(after[0].tx_packets > before[0].tx_packets);
    assert_eq!(switch.port_stats(PortNo(99), PATIENCE).await.unwrap(), []);
    let unknown = switch.queue_stats(PortNo(99), PATIENCE).await.unwrap_err();
    assert_eq!(unknown.to_string(), "the switch refuses: OFPQOFC_BAD_PORT");
    lab.vsctl(
        "set port v1 qos=@q -- --id=@q create qos type=linux-htb other_config:max-rate=100000000 \
               queues:3=@k -- --id=@k create queue other_config:min-rate=1000000",
    );
    let queues = switch.queue_stats(PortNo(1), PATIENCE).await.unwrap();
    assert!(queues.iter().any(|queue| queue.queue == 3), "{queues:?}");
}

#[tokio::test]
async fn a_switch_that_connects_is_told_of_with_its_ports_and_again_after_a_restart() {
    let mut lab = Lab::dummy().await;
    let address = "127.0.0.1:0".parse().unwrap();
    let (listener, mut switches) = listen(address, Settings::default()).await.unwrap();
    let port = listener.address().port();
    lab.vsctl(&format!(
        "set-controller br0 tcp:127.0.0.1:{port} -- set controller br0 max_backoff=1000 \
                        connection-mode=out-of-band"
    ));
    let WhatHappened::Connected { handle, .. } = next(&mut switches).await else { panic!() };
    handle.barrier(PATIENCE).await.unwrap();
    lab.vsctl("add-port br0 p2 -- set interface p2 type=dummy");
    let WhatHappened::Message(Message::PortStatus(status)) = next(&mut switches).await else {
        panic!()
    };
    assert_eq!(&*status.port.name, "p2");

    lab.kill_switch();
    while !matches!(next(&mut switches).await, WhatHappened::Disconnected(_)) {}
    let gone = handle.barrier(PATIENCE).await.unwrap_err();
    assert!(gone == RequestError::Disconnected && gone.may_retry());
    lab.start_switch().await;
    while !matches!(next(&mut switches).await, WhatHappened::Connected { .. }) {}
}

#[tokio::test]
async fn a_bridge_that_speaks_only_1_0_is_refused_with_what_to_do() {
    let lab = Lab::dummy().await;
    lab.wait_for("br0.mgmt").await;
    lab.vsctl("set bridge br0 protocols=OpenFlow10");
    let mut switches = connect(&lab.management("br0"), Settings::default()).await.unwrap();
    let WhatHappened::Disconnected(Some(ConnectionError::Session(error))) =
        next(&mut switches).await
    else {
        panic!()
    };
    assert_eq!(error, SessionError::NoCommonVersion { theirs: vec![1] });
    assert!(error.to_string().contains("protocols=OpenFlow13"), "{error}");
}

/// A peer that is no switch: what it sends ends its own connection and nothing else.
#[tokio::test]
async fn cut_and_oversized_messages_end_only_their_own_connection() {
    let settings = Settings { message_limit: 1024, ..Settings::default() };
    let (listener, mut switches) = listen("127.0.0.1:0".parse().unwrap(), settings).await.unwrap();
    let rows: [(&[u8], bool); 4] = [
        (&[4, 0, 0, 4, 0, 0, 0, 1], true),
        (&[4, 0, 0xff, 0xff, 0, 0, 0, 1], true),
        (b"GET / HTTP/1.1\r\n\r\n", true),
        (&[4, 0, 0, 16, 0, 0], false),
    ];
    for (bytes, garbled) in rows {
        let mut peer = tokio::net::TcpStream::connect(listener.address()).await.unwrap();
        peer.write_all(bytes).await.unwrap();
        if !garbled {
            drop(peer);
        }
        let WhatHappened::Disconnected(end) = next(&mut switches).await else { panic!() };
        assert_eq!(end.is_some(), garbled, "{bytes:?}: {end:?}");
    }
}

#[tokio::test]
async fn a_request_to_a_peer_that_says_nothing_ends_at_its_deadline() {
    let settings = Settings { handshake_within: Duration::from_millis(50), ..Settings::default() };
    let (listener, mut switches) = listen("127.0.0.1:0".parse().unwrap(), settings).await.unwrap();
    let _peer = tokio::net::TcpStream::connect(listener.address()).await.unwrap();
    let WhatHappened::Disconnected(Some(ConnectionError::Session(error))) =
        next(&mut switches).await
    else {
        panic!()
    };
    assert!(matches!(error, SessionError::SlowHandshake { .. }));
}
