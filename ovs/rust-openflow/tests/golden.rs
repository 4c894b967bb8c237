//! Messages as a real switch wrote them (testdata/README.md): what they say, and that they are
//! written again byte for byte.

use bytes::BytesMut;
use rust_openflow::flow::RESET_COUNTS;
use rust_openflow::multipart::Reply;
use rust_openflow::{Action, Instruction, Masked, Message, Oxm, PortNo, decode, encode};

fn captured(text: &str) -> Message {
    let digits: String = text.split_whitespace().collect();
    let pair = |at| u8::from_str_radix(&digits[at..at + 2], 16).expect("hexadecimal");
    let bytes: Vec<u8> = (0..digits.len()).step_by(2).map(pair).collect();
    let mut buffer = BytesMut::from(&bytes[..]);
    let (header, message) = decode(&mut buffer).expect("sound").expect("whole");
    assert!(buffer.is_empty());
    let mut again = BytesMut::new();
    encode(header.xid, &message, &mut again).expect("fits");
    assert_eq!(again[..], bytes[..], "{message:?}");
    message
}

macro_rules! golden {
    ($name:literal) => {
        captured(include_str!(concat!("../testdata/", $name, ".hex")))
    };
}

macro_rules! reply {
    ($name:literal, $variant:ident) => {{
        let Message::MultipartReply { reply: Reply::$variant(reply), .. } = golden!($name) else {
            panic!("another type");
        };
        reply
    }};
}

#[test]
fn the_handshake_of_a_real_switch() {
    let Message::Hello(hello) = golden!("hello") else { panic!() };
    assert_eq!(hello.versions(), [4]);
    let Message::FeaturesReply(features) = golden!("features_reply") else { panic!() };
    assert_eq!((features.datapath_id, features.tables), (0xaa, 254));
    let Message::GetConfigReply(_) = golden!("config_reply") else { panic!() };
    assert_eq!(golden!("barrier_reply"), Message::BarrierReply);
}

#[test]
fn its_flows() {
    let flows = reply!("flow_reply", Flow);
    assert_eq!(flows.iter().map(|flow| flow.cookie).collect::<Vec<_>>(), [0xf00d, 0xf00e]);
    assert_eq!((flows[0].priority, flows[0].flags & RESET_COUNTS), (100, 0));
    let net = Masked { value: [10, 0, 0, 0].into(), mask: Some([255, 0, 0, 0].into()) };
    assert_eq!(flows[0].matching.fields, [Oxm::EthType(0x0800), Oxm::Ipv4Dst(net)]);
    let max_len = 0;
    let output = |port| Action::Output { port, max_len };
    let marking =
        vec![Action::SetQueue(7), Action::SetField(Oxm::IpDscp(7)), output(PortNo::NORMAL)];
    assert_eq!(flows[0].instructions, [Instruction::Meter(5), Instruction::ApplyActions(marking),]);
    assert_eq!(flows[1].matching.fields, [Oxm::InPort(PortNo(1)), Oxm::vlan(5)]);
    let untag = vec![Action::PopVlan, output(PortNo::LOCAL)];
    assert_eq!(flows[1].instructions, [Instruction::ApplyActions(untag)]);
    assert_eq!(reply!("aggregate_reply", Aggregate).flows, 2);
    let tables = reply!("table_reply", Table);
    assert_eq!((tables.len(), tables[0].active), (254, 2));
}

#[test]
fn its_ports_and_who_it_is() {
    let ports = reply!("port_description_reply", PortDescription);
    let names: Vec<_> = ports.iter().map(|port| (&*port.name, port.port)).collect();
    assert!(names.contains(&("p1", PortNo(1))) && names.contains(&("br0", PortNo::LOCAL)));
    assert_eq!(reply!("port_reply", Port).len(), 2);
    let description = reply!("description_reply", Description);
    assert_eq!(&*description.manufacturer, "Nicira, Inc.");
    assert_eq!(&*description.software, "3.1.0");
}

#[test]
fn its_meters_and_its_refusal() {
    let meters = reply!("meter_reply", Meter);
    assert_eq!((meters[0].meter, meters[0].flows, meters[0].bands.len()), (5, 1, 1));
    let config = reply!("meter_config_reply", MeterConfig);
    assert_eq!((config[0].bands[0].rate, config[0].bands[0].burst), (25_000, 12_500));
    assert!(reply!("meter_features_reply", MeterFeatures).max_meters > 0);
    let Message::Error(failure) = golden!("error_meter_exists") else { panic!() };
    assert_eq!(failure.name().as_deref(), Some("OFPMMFC_METER_EXISTS"));
}
