//! What a guest was promised is what arrives, whatever happens on the way: runs by seed.
//!
//! A guest (`model`) works on an image through the mount while its disk goes to another file, and a seed
//! says what goes wrong meanwhile: connections are cut, the destination falls silent, a source or a
//! destination forgets everything it knew, a seal is taken back, rates change. In a third of the runs the
//! guest moves before its disk and finds the rest on demand.
//!
//! `LIFEBOAT_DISK_RUNS` runs, the first one with the seed `LIFEBOAT_SEED`; tests/soak does hundreds.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use lifeboat_agent::disk::sync::arriving::{Arriving, READ_DEADLINE};
use lifeboat_agent::disk::sync::phases::{Goal, Phase, Veto};
use lifeboat_agent::disk::sync::rank::Strategy;
use lifeboat_agent::disk::sync::receive::Received;
use lifeboat_agent::disk::sync::send::{Choice, Command, Outgoing};
use lifeboat_agent::tasks;
use lifeboat_protocol::units::BytesPerSec;
use tokio::sync::{Mutex, oneshot};

use crate::disk_lab::{Mounted, run};
use crate::model::{DISK, Model, QemuIo, Random};
use crate::world::{MIB, Way, World};

/// A guest at work, which can be held between two of its requests, as a VM is that pauses.
struct Working {
    held: Arc<Mutex<()>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(Model, QemuIo)>,
}

impl Working {
    fn start(mut model: Model, mut disk: QemuIo, seed: u64) -> Self {
        let (held, stop) = <(Arc<Mutex<()>>, Arc<AtomicBool>)>::default();
        let own = (Arc::clone(&held), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut random = Random(seed);
            while !own.1.load(Ordering::Relaxed) {
                let _turn = own.0.blocking_lock();
                disk.does(&model.step(&mut random));
            }
            (model, disk)
        });
        Self { held, stop, thread }
    }

    async fn end(self) -> (Model, QemuIo) {
        self.stop.store(true, Ordering::Relaxed);
        tasks::blocking(move || self.thread.join().unwrap()).await
    }
}

/// One run.
struct Run {
    world: World,
    random: Random,
    early: bool,
    /// A source that has to compare: somebody forgot what had arrived.
    forgot: bool,
}

impl Run {
    fn outgoing(&self) -> Outgoing {
        self.world.outgoing(|choice: &mut Choice| {
            choice.compares = self.forgot;
            if self.early {
                choice.goal = Goal { left: 400, early: true };
                choice.strategy = Strategy::Hot { threshold: 1.0 };
            }
        })
    }

    /// Something happens; the way goes on after it.
    async fn happens(&mut self, way: Way, guest: &Working) -> Way {
        match self.random.below(7) {
            0 | 1 => self.world.connect(way.cut().await),
            2 => {
                // Beyond the deadline of a write, in half of the cases.
                let received = Arc::clone(&self.world.received);
                if let Ok(_held) = received.hold(0) {
                    tokio::time::sleep(Duration::from_millis(300 + self.random.below(1500))).await;
                }
                way
            }
            3 => {
                // The source's process is killed: requests wait for the next one, its map is lost.
                let _held = guest.held.lock().await;
                drop(way.cut().await);
                while self.world.mirror.disks()[0].dirty.take(0).is_some() {}
                self.forgot = true;
                self.world.connect(self.outgoing())
            }
            4 => {
                drop(way.cut().await);
                self.world.received = Received::going_on(vec![self.world.arrived.clone()]);
                self.forgot = true;
                self.world.connect(self.outgoing())
            }
            5 => {
                // Paused, and on again: the hand-over was called off at the last moment.
                let _held = guest.held.lock().await;
                let (answer, sealed) = oneshot::channel();
                way.commands.send(Command::Seal(answer)).await.unwrap();
                let outcome: Result<(), Veto> = sealed.await.unwrap();
                if outcome.is_ok() {
                    way.commands.send(Command::Unseal).await.unwrap();
                    // The guest goes on no sooner: until then what it writes fails.
                    self.world.until(Phase::Synchronous).await;
                }
                way
            }
            _ => {
                way.commands.send(Command::GoInStep).await.unwrap();
                let rate = [None, Some(BytesPerSec(8_000_000 + self.random.below(40_000_000)))];
                self.world.rate.send_replace(rate[self.random.below(2) as usize]);
                way
            }
        }
    }
}

/// An image with something in it.
fn prepare(path: &Path, format: &str, model: &mut Model, random: &mut Random) {
    let name = path.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", format, name, &DISK.to_string()]);
    let mut disk = QemuIo::open(name, format);
    (0..200).for_each(|_| disk.does(&model.step(random)));
    disk.close();
}

async fn moves(seed: u64) {
    let mut random = Random(seed);
    let format = ["raw", "qcow2"][random.below(2) as usize];
    let early = random.below(3) == 0;
    println!("seed {seed}: {format}{}", if early { ", on demand" } else { "" });
    let mut model = Model::new();
    let world = World::holding(|path| prepare(path, format, &mut model, &mut random));
    world.mount.server.limit().set(Some(BytesPerSec(3_000_000 + random.below(20_000_000))));
    world.rate.send_replace(Some(BytesPerSec(20 * MIB)));
    let disk = QemuIo::open(&world.mount.through("a.raw"), format);
    let guest = Working::start(model, disk, seed ^ 1);
    let events = 1 + random.below(5);
    let mut run = Run { world, random, early, forgot: false };
    let mut way = run.world.connect(run.outgoing());
    for _ in 0..events {
        tokio::time::sleep(Duration::from_millis(100 + run.random.below(400))).await;
        way = run.happens(way, &guest).await;
    }
    run.world.rate.send_replace(None);
    run.world.until(Phase::Synchronous).await;
    // As before a VM pauses; then QEMU writes what it had kept back and lets go of the image.
    run.world.mount.server.limit().set(None);
    let (model, disk) = guest.end().await;
    tasks::blocking(move || disk.close()).await;
    way.seal().await;
    if !early {
        run.world.assert_same();
        way.cede().await;
        tasks::blocking(move || model.assert_in(&run.world.arrived, format)).await;
        return;
    }
    goes_on_there(run, way, (model, format), seed ^ 2).await;
}

/// The guest runs at the destination while blocks are missing there, and the connection is cut.
async fn goes_on_there(
    mut run: Run,
    mut way: Way,
    (model, format): (Model, &'static str),
    seed: u64,
) {
    // What is left takes a second or two.
    run.world.rate.send_replace(Some(BytesPerSec(10_000_000)));
    let arriving = Arriving::new(Arc::clone(&run.world.received), READ_DEADLINE);
    let own = Arc::clone(&arriving);
    let answering = tasks::spawn("arriving", async move { own.run().await });
    let there = Mounted::of(&run.world.arrived, arriving);
    way.commands.send(Command::Cede).await.unwrap();
    let path = there.through("arrived");
    let disk = tasks::blocking(move || QemuIo::open(&path, format)).await;
    let guest = Working::start(model, disk, seed);
    for _ in 0..run.random.below(3) {
        tokio::time::sleep(Duration::from_millis(50 + run.random.below(200))).await;
        if run.world.received.missing() > 0 && !way.source.is_finished() {
            way = run.world.connect(way.cut().await);
        }
    }
    run.world.rate.send_replace(None);
    way.source.await.unwrap().1.unwrap();
    assert_eq!(run.world.received.missing(), 0);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (model, disk) = guest.end().await;
    tasks::blocking(move || disk.close()).await;
    tasks::blocking(move || model.assert_in(&run.world.arrived, format)).await;
    answering.abort();
    drop(there);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_arrives_as_promised_whatever_happens_on_the_way() {
    let number = |name: &str, otherwise: u64| {
        std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
    };
    let first = number("LIFEBOAT_SEED", 1);
    let runs = number("LIFEBOAT_DISK_RUNS", 6);
    for seed in first..first + runs {
        moves(seed).await;
    }
    println!("{runs} runs, no wrong byte");
}
