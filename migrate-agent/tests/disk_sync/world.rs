//! An image behind a real mount, the drivers that bring it to another file, and a guest that writes.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use lifeboat_agent::disk::fuse::{Hook, Server};
use lifeboat_agent::disk::parameters::TRANSFER;
use lifeboat_agent::disk::sync::mirror::{DEADLINE, Mirror};
use lifeboat_agent::disk::sync::phases::{Goal, Phase, Veto};
use lifeboat_agent::disk::sync::rank::{Strategy, Weights};
use lifeboat_agent::disk::sync::receive::{ReceiveError, Received, receive};
use lifeboat_agent::disk::sync::send::{Choice, Command, Outgoing, Progress, SendError};
use lifeboat_agent::disk::sync::within::Within;
use lifeboat_agent::disk::track::{BlockSize, SegmentSize};
use lifeboat_agent::{clock, tasks};
use lifeboat_protocol::units::BytesPerSec;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use crate::disk_lab::{Folders, Mounted};

pub(super) const MIB: u64 = 1 << 20;
pub(super) const LENGTH: u64 = 64 * MIB;

/// An image behind a mount with its hook, and the place where it shall go.
pub(super) struct World {
    pub(super) mount: Mounted,
    pub(super) mirror: Arc<Mirror>,
    pub(super) arrived: PathBuf,
    pub(super) received: Arc<Received>,
    pub(super) rate: watch::Sender<Option<BytesPerSec>>,
    pub(super) progress: watch::Sender<Progress>,
}

impl World {
    pub(super) fn new() -> Self {
        Self::on(None)
    }

    /// Changes are noted by so many bytes.
    pub(super) fn in_blocks_of(bytes: u64) -> Self {
        Self::made(None, BlockSize::new(bytes).unwrap())
    }

    /// With the image that `prepare` makes at the path that it is given.
    pub(super) fn holding(prepare: impl FnOnce(&Path)) -> Self {
        let folders = Folders::new();
        let image = folders.images().join("a.raw");
        prepare(&image);
        let length = std::fs::metadata(&image).unwrap().len();
        let mirror = mirror_of(length, BlockSize::default());
        let hook = Arc::clone(&mirror) as Arc<dyn Hook>;
        let server = Server::mount(&folders.images(), &folders.mount(), hook).unwrap();
        Self::around(Mounted { server, folders }, mirror)
    }

    /// With the image in a directory that another mount shows, or in one of its own.
    pub(super) fn on(below: Option<&Mounted>) -> Self {
        Self::made(below, BlockSize::default())
    }

    fn made(below: Option<&Mounted>, block: BlockSize) -> Self {
        let mirror = mirror_of(LENGTH, block);
        let hook = Arc::clone(&mirror) as Arc<dyn Hook>;
        let mount = match below {
            Some(below) => Mounted::over(&below.folders.mount(), hook),
            None => Mounted::with(hook),
        };
        let image = File::create_new(below.unwrap_or(&mount).native("a.raw")).unwrap();
        image.set_len(LENGTH).unwrap();
        // Two thirds data, of which a part zeroes, one third hole.
        for at in 0..32 {
            let content = if at % 4 == 0 { 0 } else { at as u8 };
            image.write_all_at(&[content; MIB as usize], at * MIB * 4 / 3).unwrap();
        }
        Self::around(mount, mirror)
    }

    fn around(mount: Mounted, mirror: Arc<Mirror>) -> Self {
        let arrived = mount.folders.path("there").join("images/arrived");
        std::fs::create_dir_all(arrived.parent().unwrap()).unwrap();
        let received = Received::new(vec![arrived.clone()]);
        let progress = Progress { phase: Phase::Bulk, dirty: 0, on_the_way: 0, comparing: false };
        let (rate, progress) = (watch::Sender::new(None), watch::Sender::new(progress));
        Self { mount, mirror, arrived, received, rate, progress }
    }

    pub(super) fn outgoing(&self, change: impl FnOnce(&mut Choice)) -> Outgoing {
        let mut choice = Choice {
            goal: Goal { left: 2, early: false },
            strategy: Strategy::Whole,
            weights: Weights::default(),
            segment: SegmentSize::new(4 * MIB).unwrap(),
            transfer: TRANSFER,
            monitors: false,
            compares: false,
        };
        change(&mut choice);
        let image = self.mount.server.image(OsStr::new("a.raw")).unwrap();
        Outgoing::new(Arc::clone(&self.mirror), vec![image], choice).unwrap()
    }

    /// Runs `outgoing` over new streams, with a receiver at the other end.
    pub(super) fn connect(&self, mut outgoing: Outgoing) -> Way {
        let (commands, mut orders) = mpsc::channel(4);
        let (rate, progress) = (self.rate.subscribe(), self.progress.clone());
        let streams = [(); 2].map(|()| UnixStream::pair().unwrap());
        let mut ends = Vec::new();
        let mut destinations = Vec::new();
        for (here, there) in streams {
            ends.push(here.into_split());
            let received = Arc::clone(&self.received);
            destinations.push(tasks::spawn("receive", receive(received, there.into_split())));
        }
        let (bulk, control) = (ends.pop().unwrap(), ends.pop().unwrap());
        let rate_of_now = self.rate.subscribe();
        let within = Within::keep(self.mount.server.limit(), &self.mirror, rate_of_now);
        let source = tasks::spawn("send", async move {
            let outcome = outgoing.run(control, bulk, rate, &mut orders, &progress).await;
            (outgoing, outcome)
        });
        Way { commands, source, destinations, _within: within }
    }

    pub(super) async fn until(&self, phase: Phase) {
        let mut progress = self.progress.subscribe();
        let reached = progress.wait_for(|progress| progress.phase == phase);
        let reached = tokio::time::timeout(Duration::from_secs(60), reached).await;
        assert!(reached.is_ok(), "{phase:?} was not reached: {:?}", self.progress.borrow());
    }

    /// The first bytes of what has arrived.
    pub(super) fn at_destination(&self, bytes: usize) -> Vec<u8> {
        let mut content = vec![0; bytes];
        File::open(&self.arrived).unwrap().read_exact_at(&mut content, 0).unwrap();
        content
    }

    pub(super) fn assert_same(&self) {
        let (here, there) =
            (std::fs::read(self.mount.native("a.raw")), std::fs::read(&self.arrived));
        let (here, there) = (here.unwrap(), there.unwrap());
        assert_eq!(here.len(), there.len());
        let differs = here.iter().zip(&there).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{:?}", self.progress.borrow());
    }
}

/// The hook of an image of `length` bytes.
fn mirror_of(length: u64, block: BlockSize) -> Arc<Mirror> {
    let segment = SegmentSize::new(4 * MIB).unwrap();
    let disks = [(OsStr::new("a.raw"), length)];
    Arc::new(Mirror::new(&disks, block, segment, DEADLINE))
}

pub(super) struct Way {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) source: tokio::task::JoinHandle<(Outgoing, Result<(), SendError>)>,
    pub(super) destinations: Vec<tokio::task::JoinHandle<Result<(), ReceiveError>>>,
    _within: Within,
}

impl Way {
    /// Seals, asking again while blocks are on their way.
    pub(super) async fn seal(&self) {
        for _ in 0..200 {
            let (answer, sealed) = oneshot::channel();
            self.commands.send(Command::Seal(answer)).await.unwrap();
            match sealed.await.unwrap() {
                Ok(()) => return,
                Err(Veto::BlocksLeft | Veto::NotInStep) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(veto) => panic!("{veto}"),
            }
        }
        panic!("it never seals");
    }

    pub(super) async fn cede(self) {
        self.commands.send(Command::Cede).await.unwrap();
        self.source.await.unwrap().1.unwrap();
        for destination in self.destinations {
            destination.await.unwrap().unwrap();
        }
    }

    /// Cuts both connections at the destination's end.
    pub(super) async fn cut(self) -> Outgoing {
        self.destinations.iter().for_each(tokio::task::JoinHandle::abort);
        let (outgoing, outcome) = self.source.await.unwrap();
        assert!(outcome.unwrap_err().may_retry());
        outgoing
    }
}

/// A guest: writes, discards, zeroes and flushes at random places, until it is stopped.
pub(super) struct Guest {
    pub(super) thread: Option<JoinHandle<()>>,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) writes: Arc<AtomicU64>,
    pub(super) longest_ms: Arc<AtomicU64>,
}

impl Guest {
    pub(super) fn start(world: &World, seed: u64) -> Self {
        let path = world.mount.through("a.raw");
        let (stop, writes, longest_ms) =
            <(Arc<AtomicBool>, Arc<AtomicU64>, Arc<AtomicU64>)>::default();
        let own = (Arc::clone(&stop), Arc::clone(&writes), Arc::clone(&longest_ms));
        let thread = std::thread::spawn(move || {
            let file = File::options().read(true).write(true).open(path).unwrap();
            let mut random = seed;
            while !own.0.load(Ordering::Relaxed) {
                // Knuth's linear congruential generator: the same places for the same seed.
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let length = [4096, 4096, 65536, 1000][(random >> 60 & 3) as usize];
                let at = (random >> 20) % (LENGTH - length);
                let begin = clock::now();
                match random >> 40 & 15 {
                    0 => punch(&file, at, length),
                    1 => file.sync_data().unwrap(),
                    _ => {
                        let content = vec![(random >> 32) as u8; length as usize];
                        file.write_all_at(&content, at).unwrap();
                    }
                }
                let took = begin.elapsed().as_millis() as u64;
                own.2.fetch_max(took, Ordering::Relaxed);
                own.1.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { thread: Some(thread), stop, writes, longest_ms }
    }

    pub(super) fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        println!("longest request {} ms", self.longest_ms.load(Ordering::Relaxed));
        self.writes.load(Ordering::Relaxed)
    }
}

impl Drop for Guest {
    /// Also when a test fails: a request that is on its way when the server's process exits would
    /// keep the process.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

pub(super) fn punch(file: &File, at: u64, length: u64) {
    let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, mode, at, length).unwrap();
}
