//! What a destination's QEMU answers on the way back.

use bytes::{Bytes, BytesMut};
use lifeboat_agent::qemu::stream::return_path::{Message, ReturnReader, encode};
use lifeboat_agent::qemu::stream::{RamBlock, RamLayout, StreamError};

/// Blocks as a small PC has them.
///
/// # Panics
/// Never: they are a layout.
#[must_use]
pub fn layout() -> RamLayout {
    let block = |name: &str, pages| RamBlock { name: name.to_owned(), pages };
    let blocks = vec![block("pc.ram", 512), block("vga.vram", 65), block("pc.bios", 1)];
    RamLayout::new(blocks, 0).expect("three blocks")
}

/// Whatever QEMU answers.
///
/// # Panics
/// Where something does not hold.
pub fn holds(data: &[u8]) {
    let Some((pieces, whole)) = super::pieces::cut(data) else { return };
    let (messages, end) = read(&pieces);
    assert_eq!((&messages, &end), (&read(std::slice::from_ref(&whole)).0, &read(&[whole]).1));
    let mut written = BytesMut::new();
    messages.iter().for_each(|message| encode(message, &layout(), &mut written));
    assert_eq!(read(&[written.freeze()]), (messages, Ok(())), "what was written is read again");
}

fn read(pieces: &[Bytes]) -> (Vec<Message>, Result<(), StreamError>) {
    let mut reader = ReturnReader::new(layout());
    let mut messages = Vec::new();
    for piece in pieces {
        reader.feed(piece.clone());
        loop {
            match reader.read() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Err(error)),
            }
        }
    }
    (messages, Ok(()))
}
