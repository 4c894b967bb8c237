//! A captured guest, a destination's QEMU that waits for it, and the smallest driver between them.
//! Used by the tests of post-copy and of scatter-gather against a real QEMU.
//!
//! qemu-system-x86_64 has to be installed, and the test may use userfaultfd.

#[path = "../qemus/mod.rs"]
pub(crate) mod qemus;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use bytes::Bytes;
use lifeboat_agent::clock;
use lifeboat_agent::postcopy::phase::Phase;
use lifeboat_agent::postcopy::service::{Action, Batch};
use lifeboat_agent::postcopy::{Event, Gather};
use lifeboat_agent::qemu::stream::return_path::{Message, ReturnReader};
use lifeboat_agent::qemu::stream::{
    PING_IN_PACKAGE, PageAt, RamLayout, RamRecord, Record, StreamReader, StreamWriter, compose,
    tail,
};
use lifeboat_scatter_gather::ledger::{Ledger, Where};
use serde_json::{Value, json};
use tempfile::TempDir;

use qemus::Qemus;

const PATIENCE: Duration = Duration::from_secs(60);
/// Where the captured guest's program writes for ever (see `testdata/stream/capture.py`).
const WRITTEN: u64 = 0x20000;
/// Where it lies.
const PROGRAM: u64 = 0xf0000;
const PROGRAM_BYTES: [u8; 8] = [0x31, 0xdb, 0xb8, 0x00, 0x20, 0xb9, 0x04, 0x00];

/// What a source's agent has absorbed.
pub(crate) struct Absorbed {
    machine: String,
    layout: RamLayout,
    /// The newest version of each page; `None` is zeroes.
    pub(crate) pages: HashMap<PageAt, Option<Bytes>>,
    devices: Vec<u8>,
}

/// Reads a captured pre-copy as a source's agent would.
pub(crate) fn absorb(name: &str) -> Absorbed {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/stream").join(name);
    let mut reader = StreamReader::new();
    reader.feed(std::fs::read(path).unwrap().into());
    let (mut machine, mut pages, mut rest) = (String::new(), HashMap::new(), Vec::new());
    while let Some(record) = reader.read().unwrap() {
        match record {
            Record::Configuration { machine: name } => machine = name,
            Record::Ram(RamRecord::Page { at, data, .. }) => drop(pages.insert(at, Some(data))),
            Record::Ram(RamRecord::Zero { at, .. }) => drop(pages.insert(at, None)),
            Record::DeviceState(bytes) => rest.extend_from_slice(&bytes),
            _ => {}
        }
    }
    reader.finish().unwrap();
    let devices = tail::split(&rest).unwrap().devices.to_vec();
    Absorbed { machine, layout: reader.layout().clone(), pages, devices }
}

/// A destination's QEMU that stands still and waits for a stream.
struct Destination {
    process: Child,
    control: BufReader<UnixStream>,
    folder: TempDir,
}

impl Drop for Destination {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Destination {
    fn start(program: &Path, machine: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let firmware = folder.path().join("program.bin");
        std::fs::write(&firmware, vec![0; 65_536]).unwrap();
        let control = folder.path().join("qmp");
        let process = Command::new(program)
            .args(["-machine", machine, "-accel", "tcg", "-m", "2", "-nodefaults", "-vga", "none"])
            .args(["-display", "none", "-S", "-incoming", "defer", "-bios"])
            .arg(firmware)
            .args(["-qmp", &format!("unix:{},server=on,wait=off", control.display())])
            .spawn()
            .expect("qemu-system-x86_64 is installed");
        let control = BufReader::new(connect(&control));
        let mut destination = Self { process, control, folder };
        destination.line();
        destination.ask("qmp_capabilities", json!({}));
        let capability = json!([{"capability": "postcopy-ram", "state": true}]);
        destination.ask("migrate-set-capabilities", json!({ "capabilities": capability }));
        destination
    }

    fn incoming(&mut self) -> UnixStream {
        let path = self.folder.path().join("stream");
        self.ask("migrate-incoming", json!({"uri": format!("unix:{}", path.display())}));
        connect(&path)
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.control.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        self.control.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let mut answer = self.line();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
        }
    }

    fn status(&mut self) -> String {
        self.ask("query-status", json!({}))["status"].as_str().unwrap().to_owned()
    }

    /// Some of the guest's memory, by its physical address.
    fn memory(&mut self, address: u64, length: usize) -> Vec<u8> {
        let path = self.folder.path().join("memory");
        let file = path.display().to_string();
        self.ask("pmemsave", json!({"val": address, "size": length, "filename": file}));
        std::fs::read(path).unwrap()
    }
}

fn connect(path: &Path) -> UnixStream {
    let end = clock::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) => assert!(clock::now() < end, "{}: {error}", path.display()),
        }
        clock::pause_thread(Duration::from_millis(20));
    }
}

/// Where a guest's pages wait.
pub(crate) trait Pages {
    /// Where this one is.
    fn place(&self, at: PageAt) -> Where;
    /// Fetches one page on demand.
    fn fetch(&mut self, at: PageAt, place: Where) -> Bytes;
    /// Fetches the background's batch.
    fn fetch_batch(&mut self, batch: Batch) -> Vec<(PageAt, Bytes)>;
}

/// The destination's driver in its simplest form: every answer comes at once.
struct Driver<'a, P> {
    absorbed: &'a Absorbed,
    pages: P,
    came: HashMap<PageAt, Bytes>,
    gather: Gather,
    writer: StreamWriter,
    link: UnixStream,
    answers: ReturnReader,
    destination: &'a mut Destination,
    faults: usize,
}

impl<P: Pages> Driver<'_, P> {
    fn apply(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let mut actions = Vec::new();
            self.gather.apply(event, &mut actions).unwrap();
            for action in actions {
                self.perform(action, &mut events);
            }
        }
        for slice in self.writer.take() {
            self.link.write_all(&slice).unwrap();
        }
    }

    fn perform(&mut self, action: Action, events: &mut Vec<Event>) {
        match action {
            Action::Load => {
                let pages = self.absorbed.pages.keys().copied();
                let mut absent: Vec<PageAt> = pages.collect();
                absent.sort_unstable();
                compose::discards(&mut self.writer, absent);
                compose::package(&mut self.writer, &self.absorbed.devices);
            }
            Action::Resume => drop(self.destination.ask("cont", json!({}))),
            Action::Fetch { at, place } => {
                let data = self.pages.fetch(at, place);
                self.came.insert(at, data);
                events.push(Event::Came(at));
            }
            Action::FetchBatch(batch) => {
                events.push(Event::BatchEnded);
                for (at, data) in self.pages.fetch_batch(batch) {
                    self.came.entry(at).or_insert(data);
                    events.push(Event::BatchCame(at));
                }
            }
            Action::Place(at) => {
                let data = self.came[&at].clone();
                compose::part(&mut self.writer, |writer| writer.page(at, data));
            }
            Action::Zeroes(pages) => compose::part(&mut self.writer, |writer| {
                pages.into_iter().for_each(|at| writer.zero(at));
            }),
            Action::Close => compose::closing(&mut self.writer),
            Action::Finish => {}
        }
    }

    /// Takes in what QEMU says within `wait`; returns what is not a request.
    fn listen(&mut self, wait: Duration) -> Vec<Message> {
        let mut buffer = [0; 4096];
        self.link.set_read_timeout(Some(wait)).unwrap();
        match self.link.read(&mut buffer) {
            Ok(0) => panic!("QEMU hung up"),
            Ok(length) => self.answers.feed(Bytes::copy_from_slice(&buffer[..length])),
            Err(error) => assert!(
                matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
                "{error}"
            ),
        }
        let mut others = Vec::new();
        while let Some(message) = self.answers.read().unwrap() {
            match message {
                Message::RequestPages { block, range } => {
                    self.faults += range.count as usize;
                    for page in range.first..range.first + range.count {
                        self.apply(Event::Fault(PageAt { block, page }));
                    }
                }
                other => others.push(other),
            }
        }
        others
    }

    /// Serves the guest until QEMU says `wanted`.
    fn until(&mut self, wanted: &Message, turns: bool) {
        let end = clock::now() + PATIENCE;
        loop {
            if turns {
                self.apply(Event::Turn);
            }
            let said = self.listen(Duration::from_millis(10));
            if said.contains(wanted) {
                return;
            }
            let faults = self.faults;
            assert!(clock::now() < end, "never said {wanted:?}; {faults} faults; {said:?}");
        }
    }
}

/// A captured guest, and the QEMU that gets it: with the newer QEMU, the older's guest to both.
pub(crate) fn moves() -> Vec<(&'static str, PathBuf)> {
    let installed = ("pre-copy-7.2.stream", Qemus::installed().destination);
    if !qemus::is_full() {
        return vec![installed];
    }
    vec![
        installed,
        ("pre-copy-7.2.stream", qemus::newer()),
        ("pre-copy-10.0.stream", qemus::newer()),
    ]
}

/// Gives a guest to a real QEMU as a post-copy, and sees it arrive.
pub(crate) fn convert(program: &Path, absorbed: &Absorbed, pages: impl Pages) {
    eprintln!("== a guest of {} to {}", absorbed.machine, program.display());
    let mut destination = Destination::start(program, &absorbed.machine);
    let link = destination.incoming();
    let blocks: Vec<u32> = absorbed.layout.blocks().iter().map(|block| block.pages).collect();
    let mut writer = StreamWriter::new();
    compose::opening(&mut writer, &absorbed.machine, &[], &absorbed.layout);
    let mut driver = Driver {
        absorbed,
        pages,
        came: HashMap::new(),
        gather: Gather::new(Ledger::new(&blocks, 10_000).unwrap(), 16),
        writer,
        link,
        answers: ReturnReader::new(absorbed.layout.clone()),
        destination: &mut destination,
        faults: 0,
    };
    for at in absorbed.pages.keys() {
        let place = driver.pages.place(*at);
        driver.apply(Event::Noted(*at, place));
    }
    driver.apply(Event::Complete);
    driver.until(&Message::Pong(PING_IN_PACKAGE), false);
    driver.apply(Event::Loaded);
    assert_ne!(driver.destination.status(), "running", "it ran before COMMIT");
    driver.apply(Event::Committed);
    for _ in 0..50 {
        driver.listen(Duration::from_millis(10));
    }
    assert!(driver.faults > 0, "the guest waited for no page");
    driver.until(&Message::Shut(0), true);
    driver.apply(Event::Shut);
    assert_eq!(driver.gather.phase(), Phase::Done);
    arrived_whole(&mut destination);
}

/// The guest runs, writes where its program writes, and its other memory is as it was.
fn arrived_whole(destination: &mut Destination) {
    assert_eq!(destination.status(), "running");
    let end = clock::now() + PATIENCE;
    while destination.ask("query-migrate", json!({}))["status"] != "completed" {
        assert!(clock::now() < end, "the migration never completed");
        clock::pause_thread(Duration::from_millis(20));
    }
    assert_eq!(destination.memory(PROGRAM, PROGRAM_BYTES.len()), PROGRAM_BYTES);
    assert_eq!(destination.memory(0x50000, 4096), [0; 4096]);
    let before = destination.memory(WRITTEN, 2);
    while destination.memory(WRITTEN, 2) == before {
        assert!(clock::now() < end, "the guest stands still");
        clock::pause_thread(Duration::from_millis(20));
    }
}
