//! Tests of the FUSE messages: literals laid out by hand after linux/fuse.h, and any bytes.

use super::*;
use proptest::prelude::*;

fn message(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER_IN + body.len()).unwrap();
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&opcode.to_ne_bytes());
    bytes.extend_from_slice(&7_u64.to_ne_bytes());
    bytes.extend_from_slice(&node.to_ne_bytes());
    bytes.extend_from_slice(&[0; 16]);
    bytes.extend_from_slice(body);
    bytes
}

fn body_of(bytes: &[u8]) -> Body<'_> {
    decode(bytes).unwrap().body
}

#[test]
fn a_write_carries_its_data_at_byte_eighty() {
    let mut body = Vec::new();
    body.extend_from_slice(&3_u64.to_ne_bytes());
    body.extend_from_slice(&4096_u64.to_ne_bytes());
    body.extend_from_slice(&5_u32.to_ne_bytes());
    body.extend_from_slice(&[0; 20]);
    body.extend_from_slice(b"hello");
    let bytes = message(16, 9, &body);
    assert_eq!(&bytes[BEFORE_WRITE_DATA..], b"hello");
    let read = decode(&bytes).unwrap();
    assert_eq!((read.unique, read.node), (7, 9));
    assert_eq!(read.body, Body::Write { handle: 3, offset: 4096, data: b"hello" });
}

#[test]
fn a_write_that_claims_more_than_it_has_is_refused() {
    let mut body = vec![0; 40];
    body[16..20].copy_from_slice(&u32::MAX.to_ne_bytes());
    assert_eq!(decode(&message(16, 1, &body)), Err(AbiError::Body { opcode: 16 }));
}

#[test]
fn names_end_at_their_zero_byte() {
    let name = OsStr::new("a.raw");
    assert_eq!(body_of(&message(1, 1, b"a.raw\0")), Body::Lookup { name });
    assert_eq!(decode(&message(1, 1, b"a.raw")), Err(AbiError::Body { opcode: 1 }));
    let mut body = vec![0; 16];
    body[0] = 2;
    body[4] = 0o44;
    body.extend_from_slice(b"a.raw\0");
    assert_eq!(body_of(&message(35, 1, &body)), Body::Create { flags: 2, mode: 0o44, name });
}

#[test]
fn a_new_length_is_told_from_other_attributes() {
    let mut body = vec![0; 88];
    body[0] = 8;
    body[16] = 5;
    let changes = Changes { size: Some(5), mode: None };
    assert_eq!(body_of(&message(4, 2, &body)), Body::SetAttr(changes));
    body[0] = 1;
    body[68] = 0o6;
    let changes = Changes { size: None, mode: Some(6) };
    assert_eq!(body_of(&message(4, 2, &body)), Body::SetAttr(changes));
}

#[test]
fn what_we_do_not_serve_is_told_by_its_number() {
    assert_eq!(body_of(&message(22, 1, &[])), Body::Other { opcode: 22 });
}

#[test]
fn replies_have_the_kernels_lengths() {
    let attributes = Attributes { inode: 5, ..Attributes::default() };
    assert_eq!(Reply::init(u32::MAX, 1 << 17, 1 << 20).as_bytes().len(), 64);
    assert_eq!(Reply::attributes(&attributes).as_bytes().len(), 104);
    assert_eq!(Reply::entry(&attributes).as_bytes().len(), 128);
    assert_eq!(Reply::entry(&attributes).opened(1, 0).as_bytes().len(), 144);
    assert_eq!(Reply::written(1).as_bytes().len(), 8);
    assert_eq!(Reply::statfs([0; 5], 4096, 255).as_bytes().len(), 80);
    let error = header_out(9, Err(Errno::IO));
    assert_eq!(i32::from_ne_bytes(error[4..8].try_into().unwrap()), -5);
}

#[test]
fn directory_entries_stay_within_the_limit_and_aligned() {
    let mut reply = Reply::empty();
    assert!(reply.push_entry(64, 5, 1, OsStr::new("abc")));
    assert_eq!(reply.as_bytes().len(), 32);
    assert!(reply.push_entry(64, 6, 2, OsStr::new("d")));
    assert!(!reply.push_entry(64, 7, 3, OsStr::new("e")));
    assert_eq!(reply.as_bytes().len(), 64);
}

proptest! {
    #[test]
    fn any_bytes_decode_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode(&bytes);
    }

    #[test]
    fn any_body_of_any_operation_decodes_or_is_refused(
        opcode in 0_u32..60,
        body in prop::collection::vec(any::<u8>(), 0..120),
    ) {
        let _ = decode(&message(opcode, 1, &body));
    }
}
