//! Frames as byte literals, and against whatever a peer may send.

use super::*;
use crate::pack::Width;
use crate::page::{PAGE_BYTES, PackId};
use crate::redundancy::directory::Protection;
use proptest::prelude::*;

fn hello() -> Hello {
    Hello {
        purpose: Purpose::Migrate,
        migration: MigrationId::new("m1").unwrap(),
        vm: VmId::new("web").unwrap(),
        host: HostId::new("h1").unwrap(),
        generation: Generation(2),
        token: [7; TOKEN_BYTES],
    }
}

#[test]
fn commit_is_sixteen_known_bytes() {
    let mut bytes = BytesMut::new();
    encode(&Frame::Commit(Generation(2)), &mut bytes);
    assert_eq!(bytes[..], [7, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 2]);
}

#[test]
fn a_length_beyond_the_types_own_is_refused_at_the_header() {
    let mut bytes = BytesMut::from(&[COMMIT, 0, 0, 0, 0xff, 0xff, 0xff, 0xff][..]);
    assert_eq!(decode(&mut bytes), Err(FrameError::TooLong { stated: u32::MAX, max: 8 }));
}

#[test]
fn half_a_frame_is_not_an_error() {
    let mut all = BytesMut::new();
    encode(&Frame::Hello(hello()), &mut all);
    for cut in 0..all.len() {
        let mut part = BytesMut::from(&all[..cut]);
        assert_eq!(decode(&mut part), Ok(None), "{cut} bytes");
    }
}

#[test]
fn a_peer_of_another_version_is_told_so() {
    let mut bytes = BytesMut::new();
    encode(&Frame::Hello(hello()), &mut bytes);
    bytes[HEADER_BYTES + 1] = 9;
    assert_eq!(decode(&mut bytes), Err(FrameError::Version { theirs: 9 }));
}

#[test]
fn a_reason_cannot_write_to_a_terminal() {
    let mut bytes = BytesMut::new();
    encode(&Frame::Abort("\u{1b}[2Jgone".into()), &mut bytes);
    assert_eq!(decode(&mut bytes), Ok(Some(Frame::Abort("[2Jgone".into()))));
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let standing = (0..STANDINGS.len()).prop_map(|at| Frame::Standing(STANDINGS[at]));
    prop_oneof![
        Just(Frame::Hello(hello())),
        Just(Frame::Welcome),
        proptest::collection::vec(any::<u8>(), 0..5000).prop_map(|b| Frame::Stream(b.into())),
        any::<(u64, u64)>().prop_map(|(total, digest)| Frame::End(Ended { total, digest })),
        any::<u64>().prop_map(Frame::Ack),
        any::<u64>().prop_map(|g| Frame::Loaded(Generation(g))),
        any::<u64>().prop_map(|g| Frame::Commit(Generation(g))),
        any::<u64>().prop_map(|g| Frame::Running(Generation(g))),
        "[ -~]{0,100}".prop_map(Frame::Abort),
        "[ -~]{0,100}".prop_map(Frame::Refused),
        standing,
        any::<u64>().prop_map(Frame::Ping),
        any::<u64>().prop_map(Frame::Pong),
        any_word(),
    ]
}

fn any_at() -> impl Strategy<Value = PageAt> {
    any::<(u16, u32)>().prop_map(|(block, page)| PageAt { block, page })
}

fn any_run() -> impl Strategy<Value = PageRun> {
    (any::<(u16, u32)>(), 0_u32..50).prop_map(|((block, first), count)| PageRun {
        block,
        first,
        count,
    })
}

/// A frame about single pages.
fn any_word() -> impl Strategy<Value = Frame> {
    use proptest::collection::vec;
    let note = (any_run(), any::<bool>()).prop_map(|(run, zero)| Note { run, zero });
    let page =
        (any_at(), any::<u8>()).prop_map(|(at, byte)| (at, Bytes::from(vec![byte; PAGE_BYTES])));
    let protection = prop_oneof![
        Just(Protection::None),
        any::<u8>().prop_map(|store| Protection::Mirror(StoreId(store))),
        any::<u64>().prop_map(Protection::Stripe),
    ];
    let width = proptest::sample::select(Width::all().collect::<Vec<_>>());
    let slot =
        proptest::option::of(any_at().prop_map(|at| PageAt { block: at.block % 1000, ..at }));
    let pack = (any::<(u64, u8)>(), width, protection, vec(slot, 0..70)).prop_map(
        |((pack, store), width, protection, pages)| PackNote {
            pack: PackId(pack),
            width,
            store: StoreId(store),
            protection,
            pages,
        },
    );
    prop_oneof![
        vec(note, 0..20).prop_map(Frame::Notes),
        vec(any_run(), 0..5).prop_map(Frame::Fetch),
        vec(page, 0..4).prop_map(Frame::Pages),
        vec(any::<u8>(), 0..500).prop_map(|bytes| Frame::Compressed(bytes.into())),
        any::<[u8; KEY_BYTES]>().prop_map(|key| Frame::Key(PageKey(key))),
        pack.prop_map(Frame::Pack),
        any::<(u64, u8)>()
            .prop_map(|(stripe, store)| Frame::Parity { stripe, store: StoreId(store) }),
        Just(Frame::Scattered),
        any::<u64>().prop_map(|g| Frame::Released(Generation(g))),
    ]
}

proptest! {
    #[test]
    fn frames_survive_any_cutting(
        frames in proptest::collection::vec(any_frame(), 1..8),
        step in 1usize..700,
    ) {
        let mut bytes = BytesMut::new();
        for frame in &frames {
            encode(frame, &mut bytes);
        }
        let (mut buffer, mut seen) = (BytesMut::new(), Vec::new());
        for piece in bytes.chunks(step) {
            buffer.extend_from_slice(piece);
            while let Some(frame) = decode(&mut buffer).unwrap() {
                seen.push(frame);
            }
        }
        prop_assert_eq!(seen, frames);
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut buffer = BytesMut::from(&bytes[..]);
        while let Ok(Some(_)) = decode(&mut buffer) {}
    }

    #[test]
    fn no_payload_panics(kind in 0u8..24, payload in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut buffer = BytesMut::from(&header(kind, payload.len())[..]);
        buffer.extend_from_slice(&payload);
        while let Ok(Some(_)) = decode(&mut buffer) {}
    }
}
