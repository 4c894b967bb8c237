//! One connection of the source's driver: the world becomes events, and actions are performed.
//!
//! `send` runs [`serve`] for each. It listens to both streams, to the agent's commands, to the mirror's
//! broken promise and to the peer's silence; beside it one task goes on at a time (`passes`).
//! Deliberately not here: what follows from an event (`phases`), and what outlives a connection
//! ([`Outgoing`]).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lifeboat_protocol::units::BytesPerSec;
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::blocks::Pace;
use super::frame::{Frame, HEADER, Kind, SPARES};
use super::heat::Heat;
use super::mirror::Mirror;
use super::passes::{PassError, Passed, Work};
use super::phases::{Action, Event, Phase, Veto};
use super::receive::block_hash;
use super::send::{Command, Outgoing, Progress, SendError};
use super::stream::{FrameReader, FrameWriter, StreamError};
use crate::disk::fuse::Image;
use crate::{clock, tasks};

/// The peer is asked for a sign of life so often, and is gone after three without.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);
/// Writes that are answered before they are acknowledged are as many as go over the link in this time and
/// a round trip. A pause waits for them.
const AHEAD: Duration = Duration::from_millis(10);
/// A round trip counts up to this.
const FARTHEST: Duration = Duration::from_millis(250);
/// As many bytes whatever the link: one write of a guest that writes much.
const AHEAD_LEAST: u64 = 64 << 10;
/// They are in memory.
const AHEAD_MOST: u64 = 8 << 20;
/// Nothing is reserved, and what the link carries is not known.
const UNRESERVED: BytesPerSec = BytesPerSec(25_000_000);
/// What a destination had to say before it hung up is here within this time.
const LAST_WORD: Duration = Duration::from_millis(100);

enum Signal {
    Frame(Frame),
    Lost(SendError),
    /// The task with this number has ended.
    Ended(u64, Ended),
}

enum Ended {
    Pass(Result<Passed, PassError>),
    Seal,
    /// It fell out of step before it was sealed.
    Unsealed,
    Rest(Result<(), PassError>),
}

/// What goes on beside listening; one at a time.
struct Task {
    number: u64,
    /// Ended by itself only: broken off, it could leave half a frame on the stream.
    writes_blocks: bool,
    /// Held for its end.
    _handle: Ending,
}

/// A task that ends with its owner, also when that is dropped half way.
struct Ending(JoinHandle<()>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Serves `own` over one connection, until all is there or it ends.
pub(super) async fn serve<R, W>(
    own: &mut Outgoing,
    control: (R, W),
    bulk: (R, W),
    rate: watch::Receiver<Option<BytesPerSec>>,
    commands: &mut mpsc::Receiver<Command>,
    progress: &watch::Sender<Progress>,
) -> Result<(), SendError>
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let (signals, heard) = mpsc::unbounded_channel();
    let (to_control, frames) = mpsc::unbounded_channel();
    let pace = Arc::new(Pace::new(rate));
    let writer = Ending(write_control(FrameWriter::new(control.1), frames, Arc::clone(&pace)));
    let last_heard = Arc::new(Mutex::new(clock::now()));
    let _readers = [control.0, bulk.0].map(|reader| {
        let (mirror, to) = (Arc::clone(&own.mirror), signals.clone());
        let heard = Arc::clone(&last_heard);
        Ending(tasks::spawn("disk frames", read(FrameReader::new(reader), mirror, to, heard)))
    });
    let work = Arc::new(Work {
        mirror: Arc::clone(&own.mirror),
        images: own.images.clone(),
        orders: Mutex::new(own.orders.clone()),
        heat: Mutex::new(Heat::new(own.choice.weights)),
        choice: own.choice,
        pace,
        bulk: tokio::sync::Mutex::new(FrameWriter::new(bulk.1)),
        control: to_control,
        stopped: AtomicBool::new(false),
        wanted: Mutex::new(VecDeque::new()),
    });
    let (task, sealing) = (None, None);
    let mut connection =
        Connection { own, work, signals, heard, task, tasks: 0, sealing, last_heard };
    match connection.serve(commands, progress).await {
        Err(lost) if lost.may_retry() => Err(connection.last_word(lost).await),
        Ok(()) => {
            connection.hang_up(writer).await;
            Ok(())
        }
        outcome => outcome,
    }
}

/// One connection, from its begin to its end.
struct Connection<'a, W> {
    own: &'a mut Outgoing,
    work: Arc<Work<W>>,
    signals: mpsc::UnboundedSender<Signal>,
    heard: mpsc::UnboundedReceiver<Signal>,
    /// The pass, seal or rest that is going on.
    task: Option<Task>,
    /// How many were started.
    tasks: u64,
    sealing: Option<oneshot::Sender<Result<(), Veto>>>,
    /// When anything came, acknowledgements too: a busy destination's sign of life comes late, because
    /// it waits its turn behind the guest's writes.
    last_heard: Arc<Mutex<std::time::Instant>>,
}

impl<W: AsyncWrite + Unpin + Send + 'static> Connection<'_, W> {
    async fn serve(
        &mut self,
        commands: &mut mpsc::Receiver<Command>,
        progress: &watch::Sender<Progress>,
    ) -> Result<(), SendError> {
        self.greet();
        let mut broken = self.own.mirror.broken();
        broken.mark_unchanged();
        let mut ticks = tokio::time::interval(SIGN_OF_LIFE / 8);
        loop {
            progress.send_replace(self.progress());
            if self.own.phases.phase() == Phase::Complete {
                return Ok(());
            }
            tokio::select! {
                signal = self.heard.recv() => {
                    // We hold a sender ourselves, so there is always a next one.
                    if let Some(signal) = signal { self.hear(signal).await?; }
                }
                command = commands.recv() => self.obey(command.ok_or(SendError::Abandoned)?),
                Ok(()) = broken.changed() => {
                    if *broken.borrow_and_update() { self.apply(Event::Unanswered); }
                }
                _ = ticks.tick() => {
                    self.look_at_writes();
                    self.look_for_life()?;
                }
            }
        }
    }

    /// Why a connection was lost: a destination whose disk is full says so and hangs up, and our
    /// next block can find that out before its word is read. Nobody waits for the mirror meanwhile.
    async fn last_word(&mut self, lost: SendError) -> SendError {
        if matches!(self.own.phases.phase(), Phase::Synchronous | Phase::Sealing) {
            self.own.mirror.disarm();
        }
        self.own.mirror.give_up();
        let word = async {
            loop {
                match self.heard.recv().await? {
                    Signal::Frame(frame) if frame.kind == Kind::Failed => {
                        return self.hear_frame(&frame).await.err();
                    }
                    _ => {}
                }
            }
        };
        // A timeout: it said nothing.
        tokio::time::timeout(LAST_WORD, word).await.ok().flatten().unwrap_or(lost)
    }

    /// Ends both streams in order. What the destination says until it has seen that is read: a
    /// connection that is closed with something unread is reset, which looks like a failure there.
    async fn hang_up(self, mut writer: Ending) {
        let Self { work, signals, mut heard, .. } = self;
        // The readers have the last ones, and end with their streams.
        drop(signals);
        let in_order = async {
            // An error: it has hung up before.
            let _ = work.bulk.lock().await.shutdown().await;
            // The last one that may send on the other: a sealed mirror sends nothing.
            drop(work);
            let _ = (&mut writer.0).await;
            while heard.recv().await.is_some() {}
        };
        // All is there already: a destination that does not hang up holds nobody up.
        let _ = tokio::time::timeout(SIGN_OF_LIFE, in_order).await;
    }

    fn progress(&self) -> Progress {
        let dirty = self.own.mirror.disks().iter().map(|disk| disk.dirty.count()).sum();
        let on_the_way = self.own.mirror.ledger().bytes();
        let (phase, comparing) = (self.own.phases.phase(), self.own.compares);
        Progress { phase, dirty, on_the_way, comparing }
    }

    fn greet(&mut self) {
        // What it lacks it says itself: it may have been killed, and know less than it had.
        self.own.compares |= self.own.phases.phase() == Phase::Rest;
        for (number, image) in self.own.images.iter().enumerate() {
            let block = self.own.mirror.disks()[number].dirty.block().bytes();
            let length = image.length().unwrap_or(0);
            let hello = Frame { version: SPARES, ..Frame::new(Kind::Hello, number as u16) };
            let _ = self.work.control.send(Frame { offset: block, length, ..hello });
            if self.own.compares {
                let _ = self.work.control.send(Frame::new(Kind::AskMap, number as u16));
            }
        }
        if !self.own.compares {
            self.apply(Event::Connected);
        }
    }

    fn look_for_life(&mut self) -> Result<(), SendError> {
        let silent = self.last_heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
        if silent > SIGN_OF_LIFE * 3 {
            return Err(SendError::Silent(silent));
        }
        let _ = self.work.control.send(Frame::new(Kind::Alive, 0));
        Ok(())
    }

    /// How far answers may be ahead of acknowledgements, and whether they are too far.
    fn look_at_writes(&self) {
        let mirror = &self.own.mirror;
        mirror.set_window(window(self.work.pace.rate(), mirror.ledger().quickest()));
        if matches!(self.own.phases.phase(), Phase::Synchronous | Phase::Sealing) {
            mirror.look_at_the_oldest();
        }
    }

    async fn hear(&mut self, signal: Signal) -> Result<(), SendError> {
        match signal {
            Signal::Frame(frame) => return self.hear_frame(&frame).await,
            Signal::Lost(error) => return Err(error),
            Signal::Ended(number, ended) => {
                // One that was broken off may have said so just before.
                if self.task.as_ref().is_none_or(|task| task.number != number) {
                    return Ok(());
                }
                self.task = None;
                match ended {
                    Ended::Pass(outcome) => {
                        let Passed { left, sent } = outcome.map_err(of_pass)?;
                        if self.own.choice.goal.early {
                            // Before the next pass begins: it would be broken off like this one,
                            // and so would all after it.
                            self.try_seal();
                        }
                        if self.own.phases.phase() < Phase::Sealing {
                            self.apply(Event::PassOver { left, sent });
                        }
                        self.try_seal();
                    }
                    Ended::Seal => {
                        self.apply(Event::SealAcknowledged);
                        self.answer_seal(Ok(()));
                    }
                    // It has been vetoed.
                    Ended::Unsealed => {}
                    Ended::Rest(outcome) => {
                        outcome.map_err(of_pass)?;
                        self.apply(Event::AllThere);
                    }
                }
            }
        }
        Ok(())
    }

    async fn hear_frame(&mut self, frame: &Frame) -> Result<(), SendError> {
        match frame.kind {
            Kind::Want => {
                let Some(disk) = self.own.mirror.disks().get(usize::from(frame.disk)) else {
                    return Ok(());
                };
                let block = frame.offset / disk.dirty.block().bytes();
                let mut wanted = self.work.wanted.lock().unwrap_or_else(PoisonError::into_inner);
                wanted.push_back((frame.disk, block));
            }
            Kind::Overwritten => self.spare(frame),
            Kind::Map => self.compare(frame).await,
            Kind::Failed => {
                let errno = i32::try_from(frame.version.0).unwrap_or(libc::EIO);
                let source = Errno::from_raw_os_error(errno.clamp(1, 4095));
                return Err(SendError::Peer { disk: frame.disk, source });
            }
            _ => {}
        }
        Ok(())
    }

    /// The destination's guest, which runs there, has overwritten these blocks.
    fn spare(&self, frame: &Frame) {
        let Some(disk) = self.own.mirror.disks().get(usize::from(frame.disk)) else { return };
        if self.own.phases.phase() != Phase::Rest {
            // Nothing is its guest's yet, as far as this side knows: then it is sent.
            return;
        }
        let (size, range) = (disk.dirty.block(), frame.range());
        let length = self.own.images[usize::from(frame.disk)].length().unwrap_or(0);
        for block in size.touched(&(range.start..range.end.min(length))) {
            let whole = size.range(block, length);
            if range.start <= whole.start && range.end >= whole.end {
                disk.dirty.take_one(block);
            }
        }
    }

    /// Marks the blocks whose hash differs. Reads as much as the destination did; once per disk,
    /// after a restart of this agent.
    async fn compare(&mut self, frame: &Frame) {
        let number = usize::from(frame.disk);
        let Some(image) = self.own.images.get(number).map(Arc::clone) else { return };
        if frame.payload.is_empty() {
            // What is longer here than there, and how far the versions were.
            if self.own.phases.phase() != Phase::Rest {
                self.own.mirror.disks()[number].dirty.mark(&(frame.offset..u64::MAX));
            }
            self.own.mirror.ledger().continue_after(frame.version);
            if number + 1 == self.own.images.len() {
                self.own.compares = false;
                self.apply(Event::Connected);
            }
            return;
        }
        let (mirror, frame) = (Arc::clone(&self.own.mirror), frame.clone());
        if self.own.phases.phase() == Phase::Rest {
            return mark_missing(&mirror.disks()[number], &frame);
        }
        tasks::blocking(move || mark_different(&mirror, &image, &frame)).await;
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::EndMonitoring => self.apply(Event::MonitoringOver),
            Command::GoInStep => self.apply(Event::Hurry),
            Command::Seal(answer) => {
                self.sealing = Some(answer);
                // A VM that may move early does not wait for the pass; another lets it finish.
                self.work.stopped.store(self.own.choice.goal.early, Ordering::Release);
                self.try_seal();
            }
            Command::Unseal => {
                self.answer_seal(Err(Veto::NotInStep));
                self.apply(Event::Unseal);
            }
            Command::Cede => {
                let missing = self.progress().dirty;
                self.apply(Event::Ceded { missing });
            }
        }
    }

    /// Seals, if that was asked for and no pass is going on.
    fn try_seal(&mut self) {
        if self.sealing.is_none() || self.task.is_some() {
            return;
        }
        self.work.stopped.store(false, Ordering::Release);
        if self.own.phases.phase() == Phase::Synchronous && !self.own.choice.goal.early {
            // What a failed write may have left since the last pass.
            self.apply(Event::PassOver { left: self.work.left(), sent: 0 });
            if self.task.is_some() {
                return;
            }
        }
        self.apply(Event::Seal);
    }

    fn answer_seal(&mut self, outcome: Result<(), Veto>) {
        if let Some(answer) = self.sealing.take() {
            // Whoever asked may have given up waiting.
            let _ = answer.send(outcome);
        }
    }

    fn apply(&mut self, event: Event) {
        for action in self.own.phases.apply(event) {
            self.perform(action);
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Rank => {
                self.own.rank();
                let mut orders = self.work.orders.lock().unwrap_or_else(PoisonError::into_inner);
                orders.clone_from(&self.own.orders);
            }
            Action::BeginPass => {
                self.start(true, |work| async move { Ended::Pass(work.pass().await) });
            }
            Action::SendSeal => self.start(false, |work| async move {
                if work.seal().await { Ended::Seal } else { Ended::Unsealed }
            }),
            Action::SendRest => {
                self.start(true, |work| async move { Ended::Rest(work.rest().await) });
            }
            Action::Mirror(true) => {
                self.look_at_writes();
                self.own.mirror.arm(self.work.control.clone());
            }
            Action::Mirror(false) => {
                // A seal that waits for what is given up here.
                drop(self.task.take_if(|task| !task.writes_blocks));
                self.own.mirror.disarm();
                self.own.mirror.give_up();
            }
            Action::SendUnseal => {
                drop(self.task.take_if(|task| !task.writes_blocks));
                // First: a write that comes to a sealed destination is dropped there.
                for number in 0..self.own.images.len() {
                    self.work.say(Frame::new(Kind::Unseal, number as u16));
                }
                self.own.mirror.arm(self.work.control.clone());
            }
            Action::Veto(veto) => self.answer_seal(Err(veto)),
            Action::Finish => {}
        }
    }

    /// Starts a task. A pass that is going on is left to its end, which leads to the next; a seal
    /// is broken off.
    fn start<F>(
        &mut self,
        writes_blocks: bool,
        task: impl FnOnce(Arc<Work<W>>) -> F + Send + 'static,
    ) where
        F: Future<Output = Ended> + Send + 'static,
    {
        if self.task.as_ref().is_some_and(|before| before.writes_blocks) {
            return;
        }
        // Ends a seal that is going on.
        self.task = None;
        self.tasks += 1;
        let (number, work, signals) = (self.tasks, Arc::clone(&self.work), self.signals.clone());
        let handle = tasks::spawn("disk pass", async move {
            let ended = task(work).await;
            let _ = signals.send(Signal::Ended(number, ended));
        });
        self.task = Some(Task { number, writes_blocks, _handle: Ending(handle) });
    }
}

/// Bytes that go over a link of `rate` in [`AHEAD`] and a round trip.
fn window(rate: Option<BytesPerSec>, round_trip: Option<Duration>) -> u64 {
    let time = AHEAD + round_trip.unwrap_or_default().min(FARTHEST);
    let bytes = rate.unwrap_or(UNRESERVED).0.saturating_mul(time.as_millis() as u64) / 1000;
    bytes.clamp(AHEAD_LEAST, AHEAD_MOST)
}

/// Marks the blocks whose content here has another hash than the destination's.
fn mark_different(mirror: &Mirror, image: &Image, frame: &Frame) {
    let disk = &mirror.disks()[usize::from(frame.disk)];
    let size = disk.dirty.block();
    let length = image.length().unwrap_or(0);
    disk.dirty.grow(length);
    disk.activity.grow(length);
    let first = frame.offset / size.bytes();
    for (index, theirs) in frame.payload.chunks_exact(8).enumerate() {
        let range = size.range(first.saturating_add(index as u64), length);
        let mut content = vec![0; (range.end - range.start) as usize];
        let read = image.read(false, range.start, &mut content);
        if read.is_err() || block_hash(&content).to_be_bytes() != *theirs {
            disk.dirty.mark(&range);
        }
    }
}

/// Marks the blocks of which the destination of a VM that runs there says that they are missing.
fn mark_missing(disk: &super::mirror::Disk, frame: &Frame) {
    let size = disk.dirty.block();
    let first = frame.offset / size.bytes();
    for (index, theirs) in frame.payload.chunks_exact(8).enumerate() {
        let at = first.saturating_add(index as u64).saturating_mul(size.bytes());
        if *theirs == [0; 8] {
            disk.dirty.mark(&(at..at.saturating_add(1)));
        }
    }
}

fn of_pass(error: PassError) -> SendError {
    match error {
        PassError::Stream(error) => SendError::Stream(error),
        PassError::Read { disk, block, source } => SendError::Read { disk, block, source },
    }
}

/// Acknowledgements go straight into the ledger, all else to the loop.
async fn read<R: AsyncRead + Unpin>(
    mut frames: FrameReader<R>,
    mirror: Arc<Mirror>,
    signals: mpsc::UnboundedSender<Signal>,
    last_heard: Arc<Mutex<std::time::Instant>>,
) {
    loop {
        let signal = match frames.next().await {
            Ok(Some(frame)) => {
                *last_heard.lock().unwrap_or_else(PoisonError::into_inner) = clock::now();
                if frame.kind == Kind::Ack {
                    mirror.ledger().acknowledge(frame.version);
                    continue;
                }
                Signal::Frame(frame)
            }
            Ok(None) => Signal::Lost(StreamError::from(closed()).into()),
            Err(error) => Signal::Lost(error.into()),
        };
        let ends = matches!(signal, Signal::Lost(_));
        if signals.send(signal).is_err() || ends {
            return;
        }
    }
}

fn closed() -> std::io::Error {
    std::io::ErrorKind::ConnectionReset.into()
}

fn write_control<W: AsyncWrite + Unpin + Send + 'static>(
    mut writer: FrameWriter<W>,
    mut frames: mpsc::UnboundedReceiver<Frame>,
    pace: Arc<Pace>,
) -> JoinHandle<()> {
    tasks::spawn("disk writes to the destination", async move {
        while let Some(frame) = frames.recv().await {
            // It goes at once, a guest may wait for it; the blocks after it pay.
            pace.charge((frame.payload.len() + HEADER) as u64);
            if writer.write(&frame).await.is_err() {
                // The reader of the same stream notices and says so.
                return;
            }
        }
        let _ = writer.shutdown().await;
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_answered_ahead_goes_over_the_link_in_moments() {
        let near = Some(Duration::from_micros(300));
        assert_eq!(window(Some(BytesPerSec(60_000_000)), near), 600_000);
        let far = Some(Duration::from_millis(90));
        assert_eq!(window(Some(BytesPerSec(60_000_000)), far), 6_000_000);
        // One write, also over a link that takes long for it, and memory for some.
        assert_eq!(window(Some(BytesPerSec(0)), far), AHEAD_LEAST);
        assert_eq!(window(Some(BytesPerSec(u64::MAX)), near), AHEAD_MOST);
        assert_eq!(window(None, None), 250_000);
    }
}
