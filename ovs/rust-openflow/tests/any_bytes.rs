//! What holds for every message and for every sequence of bytes.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use rust_openflow::flow::{FlowCommand, FlowMod, FlowRemoved, FlowRemovedReason};
use rust_openflow::matching::RawOxm;
use rust_openflow::meter::{Band, BandEffect, MeterCommand, MeterMod};
use rust_openflow::multipart::{
    BandStats, Description, FlowFilter, FlowStats, MeterStats, PortStats, QueueStats, Reply,
    Request,
};
use rust_openflow::packet::{PacketIn, PacketInReason, PacketOut};
use rust_openflow::switch::{Port, PortReason, PortStatus};
use rust_openflow::{
    Action, DecodeError, Failure, Header, Instruction, MacAddr, Masked, Match, Message, Oxm,
    PortNo, decode, encode,
};

fn masked<T: std::fmt::Debug + Clone>(
    value: impl Strategy<Value = T> + Clone,
) -> impl Strategy<Value = Masked<T>> {
    (value.clone(), option::of(value)).prop_map(|(value, mask)| Masked { value, mask })
}

fn payload(limit: usize) -> impl Strategy<Value = Bytes> + Clone {
    vec(any::<u8>(), 0..limit).prop_map(Bytes::from)
}

fn mac() -> impl Strategy<Value = MacAddr> + Clone {
    any::<[u8; 6]>().prop_map(MacAddr)
}

fn port() -> impl Strategy<Value = PortNo> + Clone {
    any::<u32>().prop_map(PortNo)
}

fn oxm() -> impl Strategy<Value = Oxm> {
    let ipv4 = any::<u32>().prop_map(Ipv4Addr::from);
    let ipv6 = any::<u128>().prop_map(Ipv6Addr::from);
    prop_oneof![
        port().prop_map(Oxm::InPort),
        masked(mac()).prop_map(Oxm::EthDst),
        any::<u16>().prop_map(Oxm::EthType),
        masked(any::<u16>()).prop_map(Oxm::VlanVid),
        any::<u8>().prop_map(Oxm::IpDscp),
        masked(ipv4).prop_map(Oxm::Ipv4Src),
        masked(ipv6).prop_map(Oxm::Ipv6Dst),
        any::<u16>().prop_map(Oxm::TcpDst),
        masked(any::<u64>()).prop_map(Oxm::Metadata),
        (0_u16..0x8000, 0_u8..128, any::<bool>(), payload(255)).prop_filter_map(
            "fits",
            |(class, field, mask, payload)| {
                RawOxm::new(class, field, mask, payload).map(Oxm::Raw)
            }
        ),
    ]
}

fn matching() -> impl Strategy<Value = Match> {
    vec(oxm(), 0..6).prop_map(|fields| Match { fields })
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        (port(), any::<u16>()).prop_map(|(port, max_len)| Action::Output { port, max_len }),
        any::<u16>().prop_map(Action::PushVlan),
        Just(Action::PopVlan),
        any::<u32>().prop_map(Action::SetQueue),
        any::<u32>().prop_map(Action::Group),
        oxm()
            .prop_filter("set-field has no mask", |oxm| !oxm.is_masked())
            .prop_map(Action::SetField),
        (100_u16.., 0_usize..4).prop_map(|(kind, words)| {
            Action::Raw { kind, body: Bytes::from(vec![7; 4 + 8 * words]) }
        }),
    ]
}

fn instruction() -> impl Strategy<Value = Instruction> {
    prop_oneof![
        any::<u8>().prop_map(Instruction::GotoTable),
        (any::<u64>(), any::<u64>())
            .prop_map(|(metadata, mask)| Instruction::WriteMetadata { metadata, mask }),
        vec(action(), 0..4).prop_map(Instruction::WriteActions),
        vec(action(), 0..4).prop_map(Instruction::ApplyActions),
        Just(Instruction::ClearActions),
        any::<u32>().prop_map(Instruction::Meter),
        (100_u16..).prop_map(|kind| Instruction::Raw { kind, body: Bytes::from_static(&[1; 4]) }),
    ]
}

fn flow_mod() -> impl Strategy<Value = FlowMod> {
    (any::<(u64, u64, u8, u8, u16, u16)>(), matching(), vec(instruction(), 0..4)).prop_map(
        |((cookie, cookie_mask, table, command, priority, flags), matching, instructions)| {
            let command = FlowCommand::from(command);
            let base = FlowMod::add(cookie, priority, matching, instructions);
            FlowMod { cookie_mask, table, command, flags, ..base }
        },
    )
}

fn band() -> impl Strategy<Value = Band> {
    let effect = prop_oneof![
        Just(BandEffect::Drop),
        any::<u8>().prop_map(BandEffect::DscpRemark),
        (3_u16.., any::<u32>()).prop_map(|(kind, argument)| BandEffect::Other { kind, argument }),
    ];
    (any::<u32>(), any::<u32>(), effect).prop_map(|(rate, burst, effect)| Band {
        rate,
        burst,
        effect,
    })
}

fn age() -> impl Strategy<Value = Duration> {
    (any::<u32>(), 0_u32..1_000_000_000).prop_map(|(s, ns)| Duration::new(s.into(), ns))
}

fn description_port() -> impl Strategy<Value = Port> {
    (port(), mac(), "[a-z0-9-]{0,15}", any::<[u32; 8]>()).prop_map(|(port, address, name, n)| {
        Port {
            port,
            address,
            name: name.as_str().into(),
            config: n[0],
            state: n[1],
            current: n[2],
            advertised: n[3],
            supported: n[4],
            peer: n[5],
            current_speed: n[6],
            max_speed: n[7],
        }
    })
}

fn port_stats() -> impl Strategy<Value = PortStats> {
    (port(), any::<[u64; 12]>(), age()).prop_map(|(port, n, age)| PortStats {
        port,
        rx_packets: n[0],
        tx_packets: n[1],
        rx_bytes: n[2],
        tx_bytes: n[3],
        rx_dropped: n[4],
        tx_dropped: n[5],
        rx_errors: n[6],
        tx_errors: n[7],
        rx_frame_errors: n[8],
        rx_over_errors: n[9],
        rx_crc_errors: n[10],
        collisions: n[11],
        age,
    })
}

fn flow_stats() -> impl Strategy<Value = FlowStats> {
    (any::<(u8, u16, u16, u64, u64, u64)>(), age(), matching(), vec(instruction(), 0..3)).prop_map(
        |((table, priority, flags, cookie, packets, bytes), age, matching, instructions)| {
            FlowStats {
                table,
                age,
                priority,
                idle_timeout: 1,
                hard_timeout: 2,
                flags,
                cookie,
                packets,
                bytes,
                matching,
                instructions,
            }
        },
    )
}

fn reply() -> impl Strategy<Value = Reply> {
    let queue = (port(), any::<(u32, u64, u64, u64)>(), age()).prop_map(
        |(port, (queue, tx_bytes, tx_packets, tx_errors), age)| QueueStats {
            port,
            queue,
            tx_bytes,
            tx_packets,
            tx_errors,
            age,
        },
    );
    let meter = (any::<(u32, u32, u64, u64)>(), age(), vec(any::<(u64, u64)>(), 0..3)).prop_map(
        |((meter, flows, packets, bytes), age, bands)| {
            let bands = bands.into_iter().map(|(packets, bytes)| BandStats { packets, bytes });
            MeterStats { meter, flows, packets, bytes, age, bands: bands.collect() }
        },
    );
    let description = "[ -~]{0,31}".prop_map(|text| {
        Reply::Description(Box::new(Description {
            manufacturer: text.as_str().into(),
            hardware: text.as_str().into(),
            software: text.as_str().into(),
            serial: text.as_str().into(),
            datapath: text.as_str().into(),
        }))
    });
    prop_oneof![
        description,
        vec(flow_stats(), 0..4).prop_map(Reply::Flow),
        vec(port_stats(), 0..4).prop_map(Reply::Port),
        vec(queue, 0..4).prop_map(Reply::Queue),
        vec(meter, 0..4).prop_map(Reply::Meter),
        vec(description_port(), 0..4).prop_map(Reply::PortDescription),
        (20_u16.., payload(40)).prop_map(|(kind, body)| Reply::Other { kind, body }),
    ]
}

fn message() -> impl Strategy<Value = Message> {
    let packet_in = (any::<(u32, u16, u8, u8, u64)>(), matching(), payload(100)).prop_map(
        |((buffer, total_length, reason, table, cookie), matching, data)| {
            let reason = PacketInReason::from(reason);
            Message::PacketIn(PacketIn {
                buffer,
                total_length,
                reason,
                table,
                cookie,
                matching,
                data,
            })
        },
    );
    let removed = (any::<(u64, u16, u8, u8, u64)>(), age(), matching()).prop_map(
        |((cookie, priority, reason, table, packets), age, matching)| {
            Message::FlowRemoved(FlowRemoved {
                cookie,
                priority,
                reason: FlowRemovedReason::from(reason),
                table,
                age,
                idle_timeout: 3,
                hard_timeout: 4,
                packets,
                bytes: 5,
                matching,
            })
        },
    );
    prop_oneof![
        payload(50).prop_map(Message::EchoRequest),
        Just(Message::BarrierRequest),
        flow_mod().prop_map(Message::FlowMod),
        packet_in,
        removed,
        (any::<u16>(), reply()).prop_map(|(flags, reply)| Message::MultipartReply { flags, reply }),
        (any::<(u64, u64)>(), matching()).prop_map(|((cookie, mask), matching)| {
            let filter = FlowFilter { matching, ..FlowFilter::by_cookie(cookie, mask) };
            Message::question(Request::Flow(filter))
        }),
        (any::<u16>(), any::<u16>(), any::<u32>(), vec(band(), 0..3)).prop_map(
            |(command, flags, meter, bands)| {
                let command = MeterCommand::from(command);
                Message::MeterMod(MeterMod { command, flags, meter, bands })
            }
        ),
        (port(), vec(action(), 0..4), payload(60)).prop_map(|(in_port, actions, data)| {
            Message::PacketOut(PacketOut { buffer: 1, in_port, actions, data })
        }),
        (any::<u8>(), description_port()).prop_map(|(reason, port)| {
            Message::PortStatus(PortStatus { reason: PortReason::from(reason), port })
        }),
        (0_u16..20, any::<u16>(), payload(30)).prop_map(|(kind, code, data)| {
            Message::Error(Failure { data, ..Failure::new(kind, code) })
        }),
        (30_u8.., payload(30)).prop_map(|(kind, body)| Message::Other { kind, body }),
    ]
}

/// A header of a type that exists, so that random bodies reach every decoder.
fn framed() -> impl Strategy<Value = Vec<u8>> {
    (0_u8..30, vec(any::<u8>(), 0..200)).prop_map(|(kind, body)| {
        let length = u16::try_from(8 + body.len()).unwrap().to_be_bytes();
        [&[4, kind, length[0], length[1], 0, 0, 0, 1][..], &body].concat()
    })
}

/// Reads all there is, and checks that each step takes something from the buffer or ends.
fn drain(bytes: &[u8]) -> Result<(), TestCaseError> {
    let mut buffer = BytesMut::from(bytes);
    loop {
        let before = buffer.len();
        match decode(&mut buffer) {
            Ok(None) => return Ok(()),
            Err(error) if error.is_fatal() => return Ok(()),
            Ok(Some(_)) | Err(_) => prop_assert!(buffer.len() < before),
        }
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(xid: u32, message in message()) {
        let mut buffer = BytesMut::new();
        encode(xid, &message, &mut buffer).unwrap();
        let (header, read) = decode(&mut buffer).unwrap().unwrap();
        prop_assert_eq!(header.xid, xid);
        prop_assert_eq!(read, message);
        prop_assert!(buffer.is_empty());
    }

    #[test]
    fn any_bytes_are_survived(bytes in vec(any::<u8>(), 0..300)) {
        drain(&bytes)?;
    }

    #[test]
    fn any_body_of_any_type_is_survived(bytes in framed()) {
        drain(&bytes)?;
    }

    #[test]
    fn a_sound_message_with_broken_bytes_is_survived(
        message in message(),
        breaks in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut buffer = BytesMut::new();
        encode(1, &message, &mut buffer).unwrap();
        for (place, byte) in breaks {
            let place = place.index(buffer.len());
            buffer[place] = byte;
        }
        drain(&buffer)?;
    }

    #[test]
    fn a_cut_message_is_waited_for(message in message(), cut: prop::sample::Index) {
        let mut buffer = BytesMut::new();
        encode(1, &message, &mut buffer).unwrap();
        buffer.truncate(cut.index(buffer.len()));
        prop_assert_eq!(decode(&mut buffer), Ok(None));
    }

    #[test]
    fn any_header_is_read_or_refused_but_never_believed(bytes: [u8; 8]) {
        let header = Header::peek(&bytes).unwrap();
        let result = decode(&mut BytesMut::from(&bytes[..]));
        match usize::from(header.length) {
            0..=7 => prop_assert!(matches!(result, Err(DecodeError::TooShort { .. })), "{result:?}"),
            8 => {}
            _ => prop_assert_eq!(result, Ok(None)),
        }
    }
}
