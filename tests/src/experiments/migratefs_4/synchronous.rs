//! What a synchronous write costs while both sides are in step: fio on the mount, against fio writing
//! to the destination alone, over the same shaped link beside the same stream.
//!
//! At the level of the disk layer: two drivers on TCP between two network namespaces, no QEMU, no TLS.
//! The other side of the comparison is the least that any write to the destination takes, NBD; a write
//! of ours goes there *and* to the local disk. Neither asks for a flush, and on both the destination
//! answers once the write is in its page cache.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use lifeboat_agent::disk::fuse::{self, Hook, Server};
use lifeboat_agent::disk::parameters::TRANSFER;
use lifeboat_agent::disk::sync::mirror::{DEADLINE, Mirror};
use lifeboat_agent::disk::sync::phases::{Goal, Phase};
use lifeboat_agent::disk::sync::rank::{Strategy, Weights};
use lifeboat_agent::disk::sync::receive::{Received, receive};
use lifeboat_agent::disk::sync::send::{Choice, Command as Order, Outgoing, Progress, SendError};
use lifeboat_agent::disk::track::{BlockSize, SegmentSize};
use lifeboat_agent::tasks;
use lifeboat_lab::experiment::{Record, Sample};
use lifeboat_protocol::units::BytesPerSec;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::MIB;
use crate::clock;
use crate::experiments::Setting;
use crate::rig::RigError;
use crate::rig::network::{self, Namespace};
use crate::rig::program::{Running, run as run_program, words};

/// Sizes of a write, bytes.
pub(super) const BLOCKS: [u64; 2] = [4 << 10, 64 << 10];
/// Who writes.
pub(super) const OURS: &str = "in step";
pub(super) const REMOTE: &str = "to the destination alone";
/// MB/s that fio wrote.
pub(super) const RATE: &str = "written_mb_per_sec";

const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)];
const LINK_BITS: u64 = 200_000_000;
/// The memory stream beside the writes: three fifths of the link.
const STREAM: u64 = LINK_BITS / 8 * 3 / 5;
const IMAGE: u64 = 64 * MIB;
const NAME: &str = "disk.raw";
const NBD_PORT: u16 = 10809;
const PATIENCE: Duration = Duration::from_secs(60);

const fn seconds(quick: bool) -> u64 {
    if quick { 4 } else { 10 }
}

pub(super) fn case(who: &str, block: u64) -> String {
    format!("{who}, {} KiB", block >> 10)
}

pub(super) fn parameters(quick: bool) -> Value {
    json!({
        "image_bytes": IMAGE,
        "link_bits_per_sec": LINK_BITS,
        "link": "veth with tbf, a queue of 25 ms",
        "memory_stream_bytes_per_sec": STREAM,
        "fio_seconds": seconds(quick),
        "fio": "randwrite, direct, one at a time, no flush",
        "remote": "qemu-nbd, cache=writeback, fio's nbd engine",
    })
}

/// Raises both, measures them in turn.
pub(super) async fn measure(
    setting: &Setting<'_>,
    runs: usize,
    record: &mut Record,
) -> Result<(), RigError> {
    let rig = Rig::raise(setting.folder).await?;
    for run in 0..runs {
        for block in BLOCKS {
            let both = if run % 2 == 0 { [OURS, REMOTE] } else { [REMOTE, OURS] };
            for who in both {
                let figures = rig.write(who, block, seconds(setting.quick)).await?;
                record.samples.push(Sample { case: case(who, block), run, figures });
            }
        }
        setting.keep(record, run + 1, runs);
    }
    rig.end().await
}

struct Rig {
    namespaces: [Namespace; 2],
    mount: PathBuf,
    /// Fields end in this order: whoever writes through the mount, then its server.
    way: Way,
    server: Server,
    _remote: Running,
}

impl Rig {
    async fn raise(folder: &Path) -> Result<Self, RigError> {
        let namespaces = [Namespace::make("fa")?, Namespace::make("fb")?];
        let [here, there] = &namespaces;
        network::plug(here, ADDRESSES[0], there, "eth0")?;
        run_program(&mut there.command(&format!("ip address add {}/24 dev eth0", ADDRESSES[1])))?;
        for side in &namespaces {
            network::limit(side, "eth0", Some(LINK_BITS))?;
        }
        let folder = folder.join("s");
        let (images, mount) = (folder.join("here"), folder.join("mount"));
        for path in [&images, &mount, &folder.join("there")] {
            std::fs::create_dir_all(path).map_err(RigError::io("cannot make a folder"))?;
        }
        fill(&images.join(NAME))?;
        let remote = folder.join("there/remote.raw");
        fill(&remote)?;
        let nbd = format!(
            "qemu-nbd -t -f raw --cache=writeback --aio=threads -b {} -p {NBD_PORT} {}",
            ADDRESSES[1],
            remote.display()
        );
        let remote = Running::start(&mut there.command(&nbd), &folder.join("nbd.log"))?;
        let mirror = Arc::new(Mirror::new(
            &[(OsStr::new(NAME), IMAGE)],
            BlockSize::default(),
            SegmentSize::default(),
            DEADLINE,
        ));
        let server = Server::mount(&images, &mount, Arc::clone(&mirror) as Arc<dyn Hook>)
            .map_err(RigError::refused("a FUSE mount"))?;
        let received = Received::new(vec![folder.join("there").join(NAME)]);
        let way = Way::begin(&namespaces, &server, &mirror, received).await?;
        Ok(Self { namespaces, mount, way, server, _remote: remote })
    }

    /// Lets fio write for so long beside the memory stream.
    async fn write(
        &self,
        who: &str,
        block: u64,
        seconds: u64,
    ) -> Result<BTreeMap<&'static str, f64>, RigError> {
        self.way.in_step().await?;
        let stream = MemoryStream::start(&self.namespaces)?;
        let common = format!(
            "--name=w --rw=randwrite --bs={block} --iodepth=1 --direct=1 --size={IMAGE} --time_based \
             --runtime={seconds} --randrepeat=0 --refill_buffers --output-format=json"
        );
        let mut command = match who {
            OURS => words(&format!(
                "fio --ioengine=psync --filename={} {common}",
                self.mount.join(NAME).display()
            )),
            _ => self.namespaces[0].command(&format!(
                "fio --ioengine=nbd --uri=nbd://{}:{NBD_PORT}/ {common}",
                ADDRESSES[1]
            )),
        };
        let began = clock::now();
        let said = tasks::blocking(move || said_of(&mut command)).await?;
        let streamed = stream.finish() / began.elapsed().as_secs_f64();
        let write = &said["jobs"][0]["write"];
        let figure = |path: &str| write.pointer(path).and_then(Value::as_f64).unwrap_or(f64::NAN);
        Ok(BTreeMap::from([
            (RATE, figure("/bw_bytes") / 1e6),
            ("latency_median_us", figure("/clat_ns/percentile/50.000000") / 1e3),
            ("latency_p99_us", figure("/clat_ns/percentile/99.000000") / 1e3),
            ("stream_mb_per_sec", streamed / 1e6),
            ("errors", said["jobs"][0]["error"].as_f64().unwrap_or(f64::NAN)),
        ]))
    }

    async fn end(self) -> Result<(), RigError> {
        self.way.in_step().await?;
        drop(self.way);
        let (mount, server) = (self.mount.clone(), self.server);
        tasks::blocking(move || {
            let unmounted = fuse::unmount(&mount);
            drop(server);
            unmounted.map_err(|errno| RigError::io("cannot unmount")(errno.into()))
        })
        .await
    }
}

/// No block of it is zeroes.
fn fill(image: &Path) -> Result<(), RigError> {
    let failed = || RigError::io("cannot fill an image");
    let file = File::create_new(image).map_err(failed())?;
    for at in 0..IMAGE / MIB {
        file.write_all_at(&vec![at as u8 + 1; MIB as usize], at * MIB).map_err(failed())?;
    }
    file.sync_all().map_err(failed())
}

fn said_of(command: &mut Command) -> Result<Value, RigError> {
    let said = run_program(command)?;
    // fio puts warnings before its report.
    let report = said.find('{').map_or("", |at| &said[at..]);
    serde_json::from_str(report).map_err(RigError::refused("fio's report"))
}

/// The streams of the disk, and who works at their ends.
struct Way {
    progress: watch::Receiver<Progress>,
    mirror: Arc<Mirror>,
    sending: JoinHandle<Result<(), SendError>>,
    receiving: Vec<JoinHandle<()>>,
    _commands: mpsc::Sender<Order>,
    _rate: watch::Sender<Option<BytesPerSec>>,
}

impl Way {
    async fn begin(
        namespaces: &[Namespace; 2],
        server: &Server,
        mirror: &Arc<Mirror>,
        received: Arc<Received>,
    ) -> Result<Self, RigError> {
        let mut streams = Vec::new();
        let mut receiving = Vec::new();
        for _ in 0..2 {
            let (near, far) = connect(namespaces)?;
            let received = Arc::clone(&received);
            receiving.push(tasks::spawn("receive", async move {
                // The source hears of it, too, and says so.
                let _ = receive(received, far.into_split()).await;
            }));
            streams.push(near.into_split());
        }
        let choice = Choice {
            goal: Goal { left: 8, early: false },
            strategy: Strategy::Whole,
            weights: Weights::default(),
            segment: SegmentSize::default(),
            monitors: false,
            compares: false,
            transfer: TRANSFER,
        };
        let image = server.image(OsStr::new(NAME)).map_err(RigError::refused("an image"))?;
        let mut outgoing = Outgoing::new(Arc::clone(mirror), vec![image], choice)
            .map_err(RigError::refused("an image's way"))?;
        let (commands, mut orders) = mpsc::channel(4);
        let rate = watch::Sender::new(Some(BytesPerSec(LINK_BITS / 8)));
        let phase = outgoing.phase();
        let (told, progress) =
            watch::channel(Progress { phase, dirty: 0, on_the_way: 0, comparing: false });
        let limit = rate.subscribe();
        let (bulk, control) = (streams.pop(), streams.pop());
        let sending = tasks::spawn("send", async move {
            let (Some(control), Some(bulk)) = (control, bulk) else { return Ok(()) };
            outgoing.run(control, bulk, limit, &mut orders, &told).await
        });
        let mirror = Arc::clone(mirror);
        Ok(Self { progress, mirror, sending, receiving, _commands: commands, _rate: rate })
    }

    /// Waits until every write goes to both sides and nothing else is left.
    async fn in_step(&self) -> Result<(), RigError> {
        let late = || RigError::TooLate { what: "both sides in step".into(), seconds: 60 };
        let mut progress = self.progress.clone();
        let reached = progress.wait_for(|now| now.phase == Phase::Synchronous);
        let reached = tokio::time::timeout(PATIENCE, reached).await.map_err(|_| late())?;
        reached.map_err(RigError::refused("the source's driver"))?;
        let deadline = clock::now() + PATIENCE;
        while self.mirror.disks().iter().any(|disk| disk.dirty.count() > 0) {
            if clock::now() > deadline {
                return Err(late());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.sending.abort();
        self.receiving.iter().for_each(JoinHandle::abort);
        self.mirror.retire();
        self.mirror.give_up();
    }
}

/// A connection from the first namespace to the second.
fn connect(
    namespaces: &[Namespace; 2],
) -> Result<(tokio::net::TcpStream, tokio::net::TcpStream), RigError> {
    let (near, far) = connect_blocking(namespaces)?;
    let turned = |socket: TcpStream| {
        socket.set_nonblocking(true).and_then(|()| tokio::net::TcpStream::from_std(socket))
    };
    let failed = || RigError::io("cannot use a connection");
    Ok((turned(near).map_err(failed())?, turned(far).map_err(failed())?))
}

fn connect_blocking(namespaces: &[Namespace; 2]) -> Result<(TcpStream, TcpStream), RigError> {
    let failed = || RigError::io("cannot connect two namespaces");
    let [here, there] = namespaces;
    let listener = there.within(|| TcpListener::bind(SocketAddrV4::new(ADDRESSES[1], 0)))?;
    let listener = listener.map_err(failed())?;
    let to: SocketAddr = listener.local_addr().map_err(failed())?;
    let near = here.within(move || TcpStream::connect(to))?.map_err(failed())?;
    let (far, _) = listener.accept().map_err(failed())?;
    for socket in [&near, &far] {
        socket.set_nodelay(true).map_err(failed())?;
    }
    Ok((near, far))
}

/// A paced flow of bytes, as memory's is.
struct MemoryStream {
    over: Arc<AtomicBool>,
    arrived: Arc<AtomicU64>,
}

impl MemoryStream {
    fn start(namespaces: &[Namespace; 2]) -> Result<Self, RigError> {
        let (mut near, mut far) = connect_blocking(namespaces)?;
        let (over, arrived): (Arc<AtomicBool>, Arc<AtomicU64>) = Default::default();
        let until = Arc::clone(&over);
        std::thread::spawn(move || {
            let chunk = vec![0x5a; 64 << 10];
            let step = Duration::from_secs_f64(chunk.len() as f64 / STREAM as f64);
            let mut due = clock::now();
            while !until.load(Ordering::Relaxed) {
                if near.write_all(&chunk).is_err() {
                    return;
                }
                // What a full link made late is not made up for.
                due = (due + step).max(clock::now());
                clock::rest(due.saturating_duration_since(clock::now()));
            }
        });
        let count = Arc::clone(&arrived);
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(read @ 1..) = far.read(&mut buffer) {
                count.fetch_add(read as u64, Ordering::Relaxed);
            }
        });
        Ok(Self { over, arrived })
    }

    /// Ends it; bytes that arrived.
    fn finish(self) -> f64 {
        self.arrived.load(Ordering::Relaxed) as f64
    }
}

impl Drop for MemoryStream {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
