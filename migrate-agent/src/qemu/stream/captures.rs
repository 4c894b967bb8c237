//! Streams that real QEMUs wrote, and what the codec makes of them. How they were made is in
//! `testdata/stream/README.md`.

use std::collections::BTreeSet;
use std::path::PathBuf;

use bytes::Bytes;

use super::compose::joined;
use super::return_path::{Message, ReturnReader};
use super::tests::{read_all, write_all};
use super::*;

/// The QEMUs of whose streams there are captures.
const LABELS: [&str; 2] = ["7.2", "10.0"];

fn capture(name: &str) -> Bytes {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/stream").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).into()
}

fn devices(records: &[Record]) -> Bytes {
    let state = records.iter().filter_map(|record| match record {
        Record::DeviceState(bytes) => Some(bytes.clone()),
        _ => None,
    });
    joined(&state.collect::<Vec<_>>())
}

fn pages(records: &[Record]) -> BTreeSet<PageAt> {
    let page = |record: &Record| match record {
        Record::Ram(RamRecord::Page { at, .. } | RamRecord::Zero { at, .. }) => Some(*at),
        _ => None,
    };
    records.iter().filter_map(page).collect()
}

fn commands(records: &[Record]) -> Vec<&Command> {
    let mut found = Vec::new();
    for record in records {
        if let Record::Command(command) = record {
            found.push(command);
        }
    }
    found
}

fn layout_of(records: &[Record]) -> &RamLayout {
    let start = records.iter().find_map(|record| match record {
        Record::RamStart { layout, .. } => Some(layout),
        _ => None,
    });
    start.expect("every stream announces its blocks")
}

#[test]
fn every_capture_is_written_back_as_it_was() {
    for label in LABELS {
        for kind in ["pre-copy", "return-path", "post-copy"] {
            let bytes = capture(&format!("{kind}-{label}.stream"));
            let (records, end) = read_all(&bytes, &[65_536]);
            assert_eq!(end, Ok(()), "{kind} {label}");
            assert_eq!(write_all(&records), bytes, "{kind} {label}");
            let layout = layout_of(&records);
            assert_eq!(pages(&records).len() as u64, layout.pages(), "{kind} {label}: every page");
            assert!(layout.find(b"pc.ram").is_some());
        }
    }
}

#[test]
fn a_capture_reads_the_same_however_it_is_cut() {
    let bytes = capture("post-copy-7.2.stream");
    let (whole, _) = read_all(&bytes, &[usize::MAX]);
    for pieces in [&[1][..], &[4096], &[4095, 1, 13]] {
        assert_eq!(read_all(&bytes, pieces).0, whole, "{pieces:?}");
    }
}

#[test]
fn the_devices_of_a_pre_copy_end_before_their_description() {
    for label in LABELS {
        for kind in ["pre-copy", "return-path"] {
            let (records, _) = read_all(&capture(&format!("{kind}-{label}.stream")), &[10_000]);
            let state = devices(&records);
            let tail = tail::split(&state).unwrap();
            assert_eq!(tail.devices[0], 4, "{kind} {label}: a device comes first");
            let text: serde_json::Value =
                serde_json::from_slice(tail.description.unwrap()).unwrap();
            assert!(text["devices"].as_array().is_some_and(|all| all.len() > 10));
        }
    }
}

#[test]
fn a_post_copy_packs_its_devices_between_listen_and_run() {
    for label in LABELS {
        let (records, _) = read_all(&capture(&format!("post-copy-{label}.stream")), &[10_000]);
        let commands = commands(&records);
        let first = [&Command::OpenReturnPath, &Command::Ping(1), &Command::PostcopyAdvise];
        assert_eq!(commands[..3], first, "{label}");
        let packed = commands.iter().find_map(|command| match command {
            Command::Packaged(inside) => Some(inside),
            _ => None,
        });
        let packed = packed.unwrap();
        assert!(packed.starts_with(b"\x08\0\x04\0\0"), "{label}: LISTEN");
        assert!(
            packed.ends_with(b"\x08\0\x02\0\x04\0\0\0\x03\x08\0\x05\0\0"),
            "{label}: PING 3, RUN"
        );
        assert_eq!(records.last(), Some(&Record::EndOfStream));
    }
}

#[test]
fn the_answers_of_real_destinations_are_understood() {
    for label in LABELS {
        let (records, _) = read_all(&capture(&format!("post-copy-{label}.stream")), &[10_000]);
        let mut reader = ReturnReader::new(layout_of(&records).clone());
        reader.feed(capture(&format!("post-copy-{label}.return")));
        let mut found = Vec::new();
        while let Some(message) = reader.read().unwrap() {
            found.push(message);
        }
        assert_eq!(found.first(), Some(&Message::Pong(1)), "{label}");
        assert_eq!(found.last(), Some(&Message::Shut(0)), "{label}");
        let asked = |message: &Message| matches!(message, Message::RequestPages { .. });
        assert!(found.iter().any(asked), "{label}: the guest waited for no page");
    }
}

#[test]
fn what_a_vm_was_told_to_check_is_read() {
    let (records, end) = read_all(&capture("uuid-7.2.stream"), &[100]);
    let uuid = *b"\xb8\xd5\xa9\xa0\x3c\x3c\x4e\x0f\x9d\x55\x0d\x6f\x6b\x1f\x2a\x77";
    assert_eq!(records[2], Record::ConfigurationField(ConfigurationField::Uuid(uuid)));
    assert!(matches!(end, Err(StreamError::Cut { .. })), "a capture's beginning is cut");
}

#[test]
fn captures_of_what_is_not_carried_are_refused_by_name() {
    for (name, feature) in [
        ("ignore-shared-7.2", Feature::Capability("x-ignore-shared".to_owned())),
        ("compress-7.2", Feature::Compress),
        ("multifd-10.0", Feature::Multifd),
    ] {
        let (_, end) = read_all(&capture(&format!("{name}.stream")), &[500]);
        assert_eq!(end, Err(StreamError::Unsupported(feature)), "{name}");
    }
}

/// Each capture with each of its bytes changed: a corpus of seeds that lie close to what is real.
#[test]
fn a_real_stream_with_one_wrong_byte_never_panics() {
    let bytes = capture("post-copy-7.2.stream");
    let interesting = bytes.len().min(3000);
    for at in 0..interesting {
        for wrong in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut changed = bytes[..interesting].to_vec();
            changed[at] ^= wrong | 1;
            let _ = read_all(&changed.into(), &[1024]);
        }
    }
}
