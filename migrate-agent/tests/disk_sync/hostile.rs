//! A source that says what no source of ours says: each time its stream ends by name, and no byte that
//! was there is another one. Damaged and foreign frames are `disk::sync::frame`'s unit tests.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use lifeboat_agent::disk::sync::frame::{Frame, Kind};
use lifeboat_agent::disk::sync::receive::{ReceiveError, Received, receive};
use lifeboat_agent::disk::sync::stream::FrameWriter;
use lifeboat_agent::disk::sync::versions::Version;
use lifeboat_agent::disk::track::BlockSize;
use lifeboat_agent::tasks;
use tokio::net::UnixStream;

use crate::world::MIB;

/// The longest image that is taken in (`receive::LONGEST`).
const LONGEST: u64 = 16 << 40;

/// A destination's directory, in which one image has been announced and begun.
struct Place {
    folder: tempfile::TempDir,
    received: Arc<Received>,
}

impl Place {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("somebody's"), "mine").unwrap();
        let received = Received::new(vec![folder.path().join("image")]);
        let own = Self { folder, received };
        let first = Frame { version: Version(1), payload: content(), ..at(Kind::Data, 0, 4096) };
        own.hear(vec![hello(MIB), first]).await.unwrap();
        own
    }

    /// What comes of a stream with these frames, at its end.
    async fn hear(&self, frames: Vec<Frame>) -> Result<(), ReceiveError> {
        let (here, there) = UnixStream::pair().unwrap();
        let received = Arc::clone(&self.received);
        let receiving = tasks::spawn("receive", receive(received, there.into_split()));
        // Answers are not read, but there is room for these few.
        let (_answers, writer) = here.into_split();
        let mut writer = FrameWriter::new(writer);
        for frame in frames {
            if writer.write(&frame).await.is_err() {
                break;
            }
        }
        // It may have hung up already.
        let _ = writer.shutdown().await;
        receiving.await.unwrap()
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    fn assert_untouched(&self) {
        assert_eq!(std::fs::read(self.folder.path().join("somebody's")).unwrap(), b"mine");
        let image = File::open(self.image()).unwrap();
        assert_eq!(image.metadata().unwrap().len(), MIB);
        let mut begin = vec![0; 8192];
        image.read_exact_at(&mut begin, 0).unwrap();
        assert!(begin[..4096] == content()[..] && begin[4096..].iter().all(|byte| *byte == 0));
        let names = std::fs::read_dir(self.folder.path()).unwrap().count();
        assert_eq!(names, 2, "nothing was made beside them");
    }
}

fn content() -> Bytes {
    Bytes::from(vec![7; 4096])
}

fn hello(length: u64) -> Frame {
    Frame { offset: BlockSize::default().bytes(), length, ..Frame::new(Kind::Hello, 0) }
}

fn at(kind: Kind, offset: u64, length: u64) -> Frame {
    Frame { version: Version(2), offset, length, ..Frame::new(kind, 0) }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_beyond_the_end_of_any_image_are_refused() {
    let place = Place::new().await;
    let beyond = [
        Frame { payload: content(), ..at(Kind::Data, LONGEST, 4096) },
        Frame { payload: content(), ..at(Kind::Data, LONGEST - 1, 4096) },
        at(Kind::Zeroes, LONGEST - 4096, 8192),
        at(Kind::Zeroes, 0, LONGEST + 1),
    ];
    for frame in beyond {
        let outcome = place.hear(vec![hello(MIB), frame]).await;
        assert!(matches!(outcome, Err(ReceiveError::BeyondEnd(0))), "{outcome:?}");
        place.assert_untouched();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_impossible_image_is_refused_and_an_unknown_one() {
    let place = Place::new().await;
    let longer = place.hear(vec![at(Kind::Resize, LONGEST + 1, 0)]).await;
    assert!(matches!(longer, Err(ReceiveError::Length { disk: 0, .. })), "{longer:?}");
    let unknown = place.hear(vec![Frame { disk: 1, ..hello(MIB) }]).await;
    assert!(matches!(unknown, Err(ReceiveError::NoSuchDisk(1))), "{unknown:?}");
    let data = Frame { disk: 9, payload: content(), ..at(Kind::Data, 0, 4096) };
    let unknown = place.hear(vec![data]).await;
    assert!(matches!(unknown, Err(ReceiveError::NoSuchDisk(9))), "{unknown:?}");
    // What only a destination says.
    let answer = place.hear(vec![at(Kind::Ack, 0, 0)]).await;
    assert!(matches!(answer, Err(ReceiveError::Stream(_))), "{answer:?}");
    place.assert_untouched();
    let folder = tempfile::tempdir().unwrap();
    let received = Received::new(vec![folder.path().join("image")]);
    let other = Place { folder, received };
    let long = other.hear(vec![hello(LONGEST + 1)]).await;
    assert!(matches!(long, Err(ReceiveError::Length { disk: 0, .. })), "{long:?}");
    assert!(!other.image().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn once_the_vm_runs_here_nothing_is_written_any_more() {
    let place = Place::new().await;
    place.received.close();
    let late = [
        Frame { payload: content(), ..at(Kind::Data, 4096, 4096) },
        at(Kind::Zeroes, 0, 4096),
        at(Kind::Resize, 2 * MIB, 0),
        at(Kind::Unseal, 0, 0),
    ];
    for frame in late {
        let outcome = place.hear(vec![hello(MIB), frame]).await;
        assert!(matches!(outcome, Err(ReceiveError::Closed(0))), "{outcome:?}");
        place.assert_untouched();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_of_another_size_are_refused_until_nothing_is_missing() {
    let place = Place::new().await;
    let finer = |disk| Frame { offset: 16 << 10, disk, ..hello(MIB) };
    let refused = place.hear(vec![finer(0)]).await;
    let Err(error @ ReceiveError::OtherBlocks { .. }) = refused else { panic!("{refused:?}") };
    assert!(error.to_string().contains("16384 bytes"), "{error}");
    assert!(error.to_string().contains("in blocks of 65536: set `block_size` back"), "{error}");
    place.assert_untouched();
    // As before, and what all of it is here for.
    place.hear(vec![hello(MIB)]).await.unwrap();
    assert_eq!(place.received.block(), Some(BlockSize::default()));
    place.received.own();
    place.hear(vec![finer(0)]).await.unwrap();
}
