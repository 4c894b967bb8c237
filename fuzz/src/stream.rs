//! QEMU's migration stream, as the source's agent reads it and the destination's writes it.

use bytes::{Bytes, BytesMut};
use lifeboat_agent::qemu::stream::{
    Record, StreamError, StreamReader, StreamWriter, compose, tail,
};

/// Whatever QEMU writes.
///
/// # Panics
/// Where something does not hold.
pub fn holds(data: &[u8]) {
    let Some((pieces, whole)) = super::pieces::cut(data) else { return };
    let (records, end) = read(&pieces);
    assert_eq!((&records, &end), (&read(std::slice::from_ref(&whole)).0, &read(&[whole]).1));
    let written = write(&records);
    let (again, _) = read(&[written]);
    assert_eq!(again, records, "what was written is read again");
    for record in &records {
        let Record::DeviceState(state) = record else { continue };
        if let Ok(found) = tail::split(state) {
            let description = found.description.map_or(0, <[u8]>::len);
            assert!(found.devices.len() + description <= state.len());
        }
    }
}

type Read = (Vec<Record>, Result<(), StreamError>);

/// Every record, and how it ended. Device state has no length: where it is cut is chance.
fn read(pieces: &[Bytes]) -> Read {
    let mut reader = StreamReader::new();
    let (mut records, mut state) = (Vec::new(), BytesMut::new());
    let mut end = Ok(());
    for piece in pieces {
        reader.feed(piece.clone());
        end = loop {
            match reader.read() {
                Ok(Some(Record::DeviceState(bytes))) => state.extend_from_slice(&bytes),
                Ok(Some(record)) => records.push(record),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if end.is_err() {
            assert_eq!(reader.read().err(), end.clone().err(), "it stays in its error");
            break;
        }
    }
    if !state.is_empty() {
        records.push(Record::DeviceState(state.freeze()));
    }
    (records, end.and_then(|()| reader.finish()))
}

fn write(records: &[Record]) -> Bytes {
    let mut writer = StreamWriter::new();
    records.iter().for_each(|record| writer.write(record));
    compose::joined(&writer.take())
}
