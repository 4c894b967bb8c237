//! Open vSwitch's own decoder reads what we write, and means by it what we meant.
//!
//! Needs `ovs-ofctl` (Debian: openvswitch-common). A missing program fails the test: a green run
//! without it would prove nothing.

use std::process::Command;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rust_openflow::flow::{FlowCommand, FlowMod, FlowRemoved, FlowRemovedReason};
use rust_openflow::hello::Hello;
use rust_openflow::meter::{ALL_METERS, MeterCommand, MeterMod};
use rust_openflow::multipart::{ALL_QUEUES, FlowFilter, Request};
use rust_openflow::packet::{PacketIn, PacketInReason, PacketOut};
use rust_openflow::switch::{Config, LINK_DOWN, Port, PortReason, PortStatus, Role, RoleKind};
use rust_openflow::types::NO_BUFFER;
use rust_openflow::{Action, Failure, Instruction, Masked, Match, Message, Oxm, PortNo, encode};

/// What the real decoder makes of a message.
fn printed(message: &Message) -> String {
    let mut bytes = BytesMut::new();
    encode(0x15, message, &mut bytes).expect("fits");
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let output = Command::new("ovs-ofctl")
        .args(["ofp-print", &hex, "2"])
        .output()
        .expect("ovs-ofctl must be installed (Debian package openvswitch-common)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && complaints.is_empty(), "{message:?}: {complaints}");
    text
}

fn check(message: &Message, wanted: &[&str]) {
    let text = printed(message);
    for complaint in ["***", "decode error", "unparsable", "truncated", "unknown", "bad "] {
        assert!(!text.contains(complaint), "{message:?} is read as\n{text}");
    }
    assert!(text.contains("(xid=0x15)"), "{text}");
    for part in wanted {
        assert!(text.contains(part), "no {part:?} in what {message:?} is read as:\n{text}");
    }
}

fn flow(fields: Vec<Oxm>, instructions: Vec<Instruction>) -> Message {
    Message::FlowMod(FlowMod::add(0xf00d, 100, Match { fields }, instructions))
}

fn apply(actions: Vec<Action>) -> Vec<Instruction> {
    vec![Instruction::ApplyActions(actions)]
}

#[test]
fn messages_without_a_body() {
    check(&Message::Hello(Hello::offering(&[4])), &["OFPT_HELLO", "0x04"]);
    check(&Message::Hello(Hello { version: 4, bitmap: None }), &["OFPT_HELLO"]);
    check(&Message::EchoRequest(Bytes::new()), &["OFPT_ECHO_REQUEST (OF1.3)"]);
    check(&Message::EchoReply(Bytes::from_static(b"abc")), &["OFPT_ECHO_REPLY", "3 bytes"]);
    check(&Message::FeaturesRequest, &["OFPT_FEATURES_REQUEST"]);
    check(&Message::GetConfigRequest, &["OFPT_GET_CONFIG_REQUEST"]);
    check(&Message::BarrierRequest, &["OFPT_BARRIER_REQUEST"]);
}

#[test]
fn configuration_and_role() {
    let config = Config { flags: 0, miss_send_length: 128 };
    check(&Message::SetConfig(config), &["OFPT_SET_CONFIG", "miss_send_len=128"]);
    let role = Role { role: RoleKind::Master, generation: 9 };
    check(&Message::RoleRequest(role), &["OFPT_ROLE_REQUEST", "generation_id=9"]);
}

#[test]
fn matches_of_every_kind() {
    let mac = |text: &str| Oxm::EthDst(Masked::exact(text.parse().unwrap()));
    let net = Masked { value: [10, 1, 0, 0].into(), mask: Some([255, 255, 0, 0].into()) };
    let rows: Vec<(Vec<Oxm>, &[&str])> = vec![
        (vec![Oxm::InPort(PortNo(3))], &["in_port=3"]),
        (vec![mac("02:00:00:00:00:07")], &["dl_dst=02:00:00:00:00:07"]),
        (
            vec![Oxm::EthSrc(Masked::exact("02:00:00:00:00:08".parse().unwrap()))],
            &["dl_src=02:00:00:00:00:08"],
        ),
        (vec![Oxm::vlan(5)], &["dl_vlan=5"]),
        (vec![Oxm::vlan(5), Oxm::VlanPcp(3)], &["dl_vlan_pcp=3"]),
        (vec![Oxm::untagged()], &["vlan_tci=0x0000"]),
        (vec![Oxm::EthType(0x0800), Oxm::Ipv4Src(net)], &["nw_src=10.1.0.0/16"]),
        (
            vec![Oxm::EthType(0x0800), Oxm::Ipv4Dst(Masked::exact([10, 0, 0, 2].into()))],
            &["ip,nw_dst=10.0.0.2"],
        ),
        (vec![Oxm::EthType(0x0800), Oxm::IpDscp(7), Oxm::IpEcn(1)], &["nw_tos=28", "nw_ecn=1"]),
        (
            vec![Oxm::EthType(0x0800), Oxm::IpProto(6), Oxm::TcpSrc(1), Oxm::TcpDst(5201)],
            &["tcp", "tp_src=1", "tp_dst=5201"],
        ),
        (
            vec![Oxm::EthType(0x0800), Oxm::IpProto(17), Oxm::UdpSrc(53), Oxm::UdpDst(54)],
            &["udp", "tp_src=53", "tp_dst=54"],
        ),
        (
            vec![Oxm::EthType(0x0800), Oxm::IpProto(1), Oxm::Icmpv4Type(8), Oxm::Icmpv4Code(0)],
            &["icmp_type=8"],
        ),
        (
            vec![Oxm::EthType(0x86dd), Oxm::Ipv6Src(Masked::exact("fd00::1".parse().unwrap()))],
            &["ipv6_src=fd00::1"],
        ),
        (
            vec![Oxm::EthType(0x86dd), Oxm::Ipv6Dst(Masked::exact("fd00::2".parse().unwrap()))],
            &["ipv6_dst=fd00::2"],
        ),
        (vec![Oxm::EthType(0x0806), Oxm::ArpOp(2)], &["arp", "arp_op=2"]),
        (
            vec![Oxm::EthType(0x0806), Oxm::ArpSpa(Masked::exact([10, 0, 0, 9].into()))],
            &["arp_spa=10.0.0.9"],
        ),
        (vec![Oxm::EthType(0x8035), Oxm::ArpOp(3)], &["rarp", "arp_op=3"]),
        (vec![Oxm::Metadata(Masked { value: 1, mask: Some(3) })], &["metadata=0x1/0x3"]),
    ];
    for (fields, wanted) in rows {
        check(&flow(fields, vec![]), wanted);
    }
}

#[test]
fn instructions_and_actions_of_every_kind() {
    let rows: Vec<(Vec<Instruction>, &[&str])> = vec![
        (apply(vec![Action::SetQueue(7), Action::output(PortNo(2))]), &["set_queue:7,output:2"]),
        (
            vec![
                Instruction::Meter(4),
                Instruction::ApplyActions(vec![Action::output(PortNo::NORMAL)]),
            ],
            &["meter:4", "NORMAL"],
        ),
        (
            apply(vec![Action::PushVlan(0x8100), Action::SetField(Oxm::vlan(9))]),
            &["push_vlan:0x8100", "set_field:4105->vlan_vid"],
        ),
        (apply(vec![Action::Group(3)]), &["group:3"]),
        (
            vec![Instruction::WriteActions(vec![Action::output(PortNo(1))])],
            &["write_actions(output:1)"],
        ),
        (vec![Instruction::ClearActions], &["clear_actions"]),
        (vec![Instruction::GotoTable(2)], &["goto_table:2"]),
        (vec![Instruction::WriteMetadata { metadata: 2, mask: 6 }], &["write_metadata:0x2/0x6"]),
        (apply(vec![Action::output(PortNo::CONTROLLER)]), &["CONTROLLER:65535"]),
    ];
    for (instructions, wanted) in rows {
        check(&flow(vec![], instructions), wanted);
    }
    check(&flow(vec![Oxm::vlan(5)], apply(vec![Action::PopVlan])), &["actions=pop_vlan"]);
    let mark = apply(vec![
        Action::SetQueue(7),
        Action::SetField(Oxm::IpDscp(7)),
        Action::output(PortNo::NORMAL),
    ]);
    check(
        &flow(vec![Oxm::EthType(0x0800)], mark),
        &[
            "OFPT_FLOW_MOD (OF1.3)",
            "ADD",
            "priority=100",
            "cookie:0xf00d",
            "set_queue:7,set_field:7->ip_dscp,NORMAL",
        ],
    );
}

#[test]
fn changes_of_flows_and_meters() {
    let delete = FlowMod::delete_by_cookie(0x10, 0xf0);
    check(&Message::FlowMod(delete), &["DEL table:255", "cookie:0x10/0xf0"]);
    let strict = FlowMod::delete_strict(0, 0, 7, Match::any().with(Oxm::InPort(PortNo(1))));
    check(&Message::FlowMod(strict.clone()), &["DEL_STRICT", "priority=7,in_port=1"]);
    let modify = FlowMod { command: FlowCommand::ModifyStrict, ..strict };
    check(&Message::FlowMod(modify), &["MOD_STRICT"]);
    let meter = MeterMod::drop_above(MeterCommand::Add, 5, 25_000, 12_500);
    check(
        &Message::MeterMod(meter.clone()),
        &[
            "OFPT_METER_MOD (OF1.3)",
            "ADD meter=5 kbps burst stats",
            "type=drop rate=25000 burst_size=12500",
        ],
    );
    let modify = MeterMod { command: MeterCommand::Modify, ..meter };
    check(&Message::MeterMod(modify), &["MOD meter=5"]);
    check(&Message::MeterMod(MeterMod::delete(5)), &["DEL meter=5"]);
    check(&Message::MeterMod(MeterMod::delete(ALL_METERS)), &["DEL meter=all"]);
}

#[test]
fn packets_out() {
    let packet: Vec<u8> = [[0xff; 6], [2, 0, 0, 0, 0, 1]].concat();
    let data = Bytes::from([&packet[..], &[0x80, 0x35], &[0; 46]].concat());
    let message = Message::PacketOut(PacketOut::to_port(PortNo(4), data));
    check(&message, &["OFPT_PACKET_OUT", "in_port=CONTROLLER", "actions=output:4", "data_len=60"]);
}

#[test]
fn questions_of_every_kind() {
    let rows: Vec<(Request, &[&str])> = vec![
        (Request::Description, &["OFPST_DESC request (OF1.3)"]),
        (Request::Flow(FlowFilter::by_cookie(0x10, 0xf0)), &["OFPST_FLOW request"]),
        (Request::Aggregate(FlowFilter::all()), &["OFPST_AGGREGATE request"]),
        (Request::Table, &["OFPST_TABLE request"]),
        (Request::Port(PortNo::ANY), &["OFPST_PORT request", "port_no=ANY"]),
        (
            Request::Queue { port: PortNo(2), queue: ALL_QUEUES },
            &["OFPST_QUEUE request", "port=2 queue=ALL"],
        ),
        (Request::Meter(5), &["OFPST_METER request", "meter=5"]),
        (Request::MeterConfig(ALL_METERS), &["OFPST_METER_CONFIG request", "meter=all"]),
        (Request::MeterFeatures, &["OFPST_METER_FEATURES request"]),
        (Request::PortDescription, &["OFPST_PORT_DESC request"]),
    ];
    for (request, wanted) in rows {
        check(&Message::question(request), wanted);
    }
}

/// We do not send these, but whoever plays a switch does, and what we read of them must have the
/// layout that the tools know.
#[test]
fn what_a_switch_says_unasked() {
    let ip = Match::any().with(Oxm::EthType(0x0800));
    let removed = FlowRemoved {
        cookie: 0xf00d,
        priority: 9,
        reason: FlowRemovedReason::HardTimeout,
        table: 3,
        age: Duration::new(7, 500_000_000),
        idle_timeout: 4,
        hard_timeout: 7,
        packets: 11,
        bytes: 1100,
        matching: ip,
    };
    check(
        &Message::FlowRemoved(removed),
        &["reason=hard table_id=3 cookie:0xf00d duration7.500s", "idle4 hard7 pkts11 bytes1100"],
    );
    let packet = PacketIn {
        buffer: NO_BUFFER,
        total_length: 60,
        reason: PacketInReason::Action,
        table: 2,
        cookie: 5,
        matching: Match::any().with(Oxm::InPort(PortNo(6))),
        data: Bytes::from(vec![0xff; 60]),
    };
    check(&Message::PacketIn(packet), &["table_id=2 cookie=0x5 total_len=60 in_port=6"]);
    let port = Port {
        port: PortNo(3),
        address: "02:00:00:00:00:03".parse().unwrap(),
        name: "v3".into(),
        config: 0,
        state: LINK_DOWN,
        current: 0,
        advertised: 0,
        supported: 0,
        peer: 0,
        current_speed: 10_000_000,
        max_speed: 0,
    };
    check(
        &Message::PortStatus(PortStatus { reason: PortReason::Add, port }),
        &[
            "OFPT_PORT_STATUS",
            "ADD: 3(v3): addr:02:00:00:00:00:03",
            "LINK_DOWN",
            "speed: 10000 Mbps now",
        ],
    );
}

#[test]
fn every_error_has_the_name_that_the_tools_print() {
    // Open vSwitch gives these three the names of 1.4's property errors.
    let renamed = ["OFPTFFC_BAD_TYPE", "OFPTFFC_BAD_LEN", "OFPTFFC_BAD_ARGUMENT"];
    let mut wrong = Vec::new();
    for failure in Failure::all_named() {
        let name = failure.name().expect("named");
        // An error quotes the message at fault; here a barrier request. HELLO_FAILED has text.
        let quoted: &[u8] = if failure.kind == 0 { b"no" } else { &[4, 20, 0, 8, 0, 0, 0, 9] };
        let failure = Failure { data: Bytes::from_static(quoted), ..failure };
        let text = printed(&Message::Error(failure));
        let same = text.lines().next().is_some_and(|line| line.ends_with(&name));
        if !same && !renamed.contains(&name.as_str()) {
            wrong.push(format!("{name} is read as {text}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
