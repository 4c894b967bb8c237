//! One early hand-over of an image with a guest on it: two real mounts, the real drivers between
//! them, and the network limit of the source's driver as the link.
//!
//! Used by the LiveFS experiments. Deliberately not here: agents, QMP and COMMIT.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use lifeboat_agent::disk::fuse::{self, Hook, Server};
use lifeboat_agent::disk::parameters::TRANSFER;
use lifeboat_agent::disk::sync::arriving::{Arriving, READ_DEADLINE};
use lifeboat_agent::disk::sync::mirror::{DEADLINE, Mirror};
use lifeboat_agent::disk::sync::phases::{Goal, Phase};
use lifeboat_agent::disk::sync::rank::{Strategy, Weights};
use lifeboat_agent::disk::sync::receive::{Received, receive};
use lifeboat_agent::disk::sync::send::{Choice, Command, Outgoing, Progress, SendError};
use lifeboat_agent::disk::track::{BlockSize, SegmentSize};
use lifeboat_agent::tasks;
use lifeboat_protocol::units::BytesPerSec;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::guest::{Guest, Load, Wait};
use super::{LINK, MIB, SEGMENTS};
use crate::clock;
use crate::rig::RigError;

/// The image's name on both sides.
const NAME: &str = "disk.raw";
/// A migration that takes longer does not end.
const PATIENCE: Duration = Duration::from_secs(90);

/// How an image goes.
#[derive(Clone)]
pub(super) struct Plan {
    /// What is sent again when a byte of it changes, bytes.
    pub block: u64,
    /// What goes before the guest. Of what may follow it, whatever ranks at the threshold: 0 is pre-copy,
    /// infinity post-copy.
    pub strategy: Strategy,
    /// How its reads count beside its writes.
    pub weights: Weights,
    /// How long it is watched first.
    pub monitoring: Duration,
    /// Whether it was watched so long before the migration began.
    pub watched_already: bool,
    /// The paper's handover-size, in segments.
    pub handover_segments: u64,
    /// The guest's threads, and what they do.
    pub threads: usize,
    /// It only reads, so both images have to be the same at the end.
    pub reads_only: bool,
    pub load: Load,
}

/// What came of it.
pub(super) struct Outcome {
    /// From the order to the guest running at the destination.
    pub handover: Duration,
    /// From the order until nothing is missing there.
    pub total: Duration,
    /// The guest stood still so long.
    pub paused: Duration,
    /// Steps of the guest that ended between the two, each with its wait.
    pub after: Vec<Duration>,
    /// Blocks that were missing when the guest began there, as MiB.
    pub missing_mib: f64,
    /// All that was sent, as MiB.
    pub sent_mib: f64,
    /// Bytes that differ between both images, where the guest only reads.
    pub differ: Option<u64>,
}

struct Side {
    server: Server,
    mount: PathBuf,
}

impl Side {
    fn mount(folder: &Path, hook: Arc<dyn Hook>) -> Result<Self, RigError> {
        let mount = folder.join("mount");
        std::fs::create_dir_all(&mount).map_err(RigError::io("cannot make a mount point"))?;
        let server = Server::mount(&folder.join("images"), &mount, hook)
            .map_err(RigError::refused("a FUSE mount"))?;
        Ok(Self { server, mount })
    }

    fn open(&self) -> Result<File, RigError> {
        let file = File::options().read(true).write(true).open(self.mount.join(NAME));
        file.map_err(RigError::io("cannot open the image through its mount"))
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // What is left of it goes with the mount namespace.
        let _ = fuse::unmount(&self.mount);
    }
}

/// Raises both sides in `folder`, moves the image, and leaves nothing behind.
///
/// # Errors
/// When the rig cannot be raised, or the migration or a request of the guest fails.
pub(super) async fn migrate(folder: &Path, plan: &Plan) -> Result<Outcome, RigError> {
    let folder = tempfile::tempdir_in(folder).map_err(RigError::io("cannot make a folder"))?;
    let (here, there) = (folder.path().join("here"), folder.path().join("there"));
    for side in [&here, &there] {
        std::fs::create_dir_all(side.join("images")).map_err(RigError::io("no folder"))?;
    }
    fill(&here.join("images").join(NAME))?;
    let segment = SegmentSize::new(MIB).map_err(RigError::refused("a segment"))?;
    let block = BlockSize::new(plan.block).map_err(RigError::refused("a block"))?;
    let disks = [(OsStr::new(NAME), SEGMENTS * MIB)];
    let mirror = Arc::new(Mirror::new(&disks, block, segment, DEADLINE));
    let source = Side::mount(&here, Arc::clone(&mirror) as Arc<dyn Hook>)?;
    let received = Received::new(vec![there.join("images").join(NAME)]);
    let arriving = Arriving::new(Arc::clone(&received), READ_DEADLINE);
    let destination = Side::mount(&there, Arc::clone(&arriving) as Arc<dyn Hook>)?;
    let answering = tasks::spawn("arriving", async move { arriving.run().await });

    // Below both mounts: dropped before them, also after an error, because a server waits for whoever
    // has its files open.
    let guest = Guest::start(source.open()?, plan.threads, &plan.load);
    if plan.watched_already {
        tokio::time::sleep(plan.monitoring).await;
    }
    let began = clock::now();
    let mut way = Way::begin(&source, &mirror, &received, plan, segment)?;
    if !plan.watched_already && !plan.monitoring.is_zero() {
        tokio::time::sleep(plan.monitoring).await;
        way.order(Command::EndMonitoring).await?;
    }
    way.until_in_step(plan).await?;
    let (moved, paused) = hand_over(&guest, &mut way, &destination).await?;
    let missing_mib = received.missing() as f64 * plan.block as f64 / MIB as f64;
    way.order(Command::Cede).await?;
    way.ended().await?;
    let ended = clock::now();
    let sent_mib = way.sent.load(Ordering::Relaxed) as f64 / MIB as f64;
    let waits = tasks::blocking(move || guest.stop()).await?;
    answering.abort();
    let differ = plan.reads_only.then(|| differ(&here, &there)).transpose()?;
    Ok(Outcome {
        handover: moved.duration_since(began),
        total: ended.duration_since(began),
        paused,
        after: between(waits, moved, ended),
        missing_mib,
        sent_mib,
        differ,
    })
}

/// Pauses the guest, seals, and lets it go on at the destination. Says when, and after what pause.
async fn hand_over(
    guest: &Guest,
    way: &mut Way,
    destination: &Side,
) -> Result<(Instant, Duration), RigError> {
    let begin = clock::now();
    let mut place = guest.pause().await;
    way.seal().await?;
    *place = destination.open()?;
    drop(place);
    let moved = clock::now();
    Ok((moved, moved.duration_since(begin)))
}

/// What ended between the two moments.
fn between(waits: Vec<Wait>, from: Instant, to: Instant) -> Vec<Duration> {
    let within = |(end, _): &Wait| *end >= from && *end <= to;
    waits.into_iter().filter(within).map(|(_, wait)| wait).collect()
}

/// No block of it is zeroes, so each is sent.
fn fill(image: &Path) -> Result<(), RigError> {
    let failed = || RigError::io("cannot fill the image");
    let file = File::create_new(image).map_err(failed())?;
    for segment in 0..SEGMENTS {
        let content = vec![segment as u8 + 1; MIB as usize];
        file.write_all_at(&content, segment * MIB).map_err(failed())?;
    }
    file.sync_all().map_err(failed())
}

fn differ(here: &Path, there: &Path) -> Result<u64, RigError> {
    let read = |side: &Path| {
        std::fs::read(side.join("images").join(NAME)).map_err(RigError::io("cannot compare"))
    };
    let (one, other) = (read(here)?, read(there)?);
    let longer = one.len().abs_diff(other.len());
    Ok((one.iter().zip(&other).filter(|(a, b)| a != b).count() + longer) as u64)
}

/// The two streams of a migration and who works at their ends.
struct Way {
    commands: mpsc::Sender<Command>,
    progress: watch::Receiver<Progress>,
    sending: JoinHandle<Result<(), SendError>>,
    receiving: Vec<JoinHandle<()>>,
    /// Bytes that came at the other end.
    sent: Arc<AtomicU64>,
    _rate: watch::Sender<Option<BytesPerSec>>,
}

impl Way {
    fn begin(
        source: &Side,
        mirror: &Arc<Mirror>,
        received: &Arc<Received>,
        plan: &Plan,
        segment: SegmentSize,
    ) -> Result<Self, RigError> {
        let choice = Choice {
            goal: Goal {
                left: plan.handover_segments * MIB / plan.block,
                early: plan.strategy != Strategy::Whole,
            },
            strategy: plan.strategy,
            weights: plan.weights,
            segment,
            transfer: TRANSFER,
            monitors: !plan.watched_already && !plan.monitoring.is_zero(),
            compares: false,
        };
        let image = source.server.image(OsStr::new(NAME)).map_err(RigError::refused("an image"))?;
        let mut outgoing = Outgoing::new(Arc::clone(mirror), vec![image], choice)
            .map_err(RigError::refused("an image's way"))?;
        let pair = || UnixStream::pair().map_err(RigError::io("cannot make a stream"));
        let ((control, control_end), (bulk, bulk_end)) = (pair()?, pair()?);
        let sent = Arc::new(AtomicU64::new(0));
        let receive_at = |end: UnixStream| {
            let received = Arc::clone(received);
            let (from, to) = end.into_split();
            let from = Counted { from, counter: Arc::clone(&sent) };
            tasks::spawn("receive", async move {
                // The source hears of it, too, and says so.
                let _ = receive(received, (from, to)).await;
            })
        };
        let receiving = [control_end, bulk_end].map(receive_at).into();
        let (commands, mut orders) = mpsc::channel(4);
        let rate = watch::Sender::new(Some(BytesPerSec(LINK)));
        let phase = outgoing.phase();
        let (told, progress) =
            watch::channel(Progress { phase, dirty: 0, on_the_way: 0, comparing: false });
        let limit = rate.subscribe();
        let sending = tasks::spawn("send", async move {
            let (control, bulk) = (control.into_split(), bulk.into_split());
            outgoing.run(control, bulk, limit, &mut orders, &told).await
        });
        Ok(Self { commands, progress, sending, receiving, sent, _rate: rate })
    }

    async fn order(&mut self, command: Command) -> Result<(), RigError> {
        let said = self.commands.send(command).await;
        self.unless_ended(said, "an order").await
    }

    /// Why its driver has ended says more than that it has.
    async fn unless_ended<T, E>(&mut self, it: Result<T, E>, what: &str) -> Result<T, RigError> {
        if let Ok(it) = it {
            return Ok(it);
        }
        self.ended().await?;
        Err(RigError::refused("the migration")(format!("it ended before {what}")))
    }

    /// Waits until every write goes to both sides; with all that goes before the guest there.
    async fn until_in_step(&mut self, plan: &Plan) -> Result<(), RigError> {
        let whole = plan.strategy == Strategy::Whole;
        let reached = self.progress.wait_for(|progress| {
            progress.phase >= Phase::Synchronous && !(whole && progress.dirty > 0)
        });
        let reached = tokio::time::timeout(PATIENCE, reached).await;
        let reached = reached.map_err(|_| late("the synchronous phase".to_owned()))?.map(drop);
        self.unless_ended(reached, "both sides were in step").await
    }

    /// Seals; the guest is paused.
    async fn seal(&mut self) -> Result<(), RigError> {
        let (answer, sealed) = oneshot::channel();
        self.order(Command::Seal(answer)).await?;
        let sealed = tokio::time::timeout(PATIENCE, sealed).await;
        let sealed = sealed.map_err(|_| late("the seal".to_owned()))?;
        let sealed = self.unless_ended(sealed, "the seal").await?;
        sealed.map_err(RigError::refused("the hand-over"))
    }

    async fn ended(&mut self) -> Result<(), RigError> {
        let ended = tokio::time::timeout(PATIENCE, &mut self.sending).await;
        let ended = ended.map_err(|_| late("the end of the migration".to_owned()))?;
        let sent = ended.map_err(RigError::refused("the source's driver"))?;
        sent.map_err(RigError::refused("the migration"))
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.sending.abort();
        self.receiving.iter().for_each(JoinHandle::abort);
    }
}

/// A stream of which is counted what comes out of it.
struct Counted<R> {
    from: R,
    counter: Arc<AtomicU64>,
}

impl<R: AsyncRead + Unpin> AsyncRead for Counted<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let read = Pin::new(&mut self.from).poll_read(context, into);
        self.counter.fetch_add((into.filled().len() - before) as u64, Ordering::Relaxed);
        read
    }
}

fn late(what: String) -> RigError {
    RigError::TooLate { what, seconds: PATIENCE.as_secs() }
}
