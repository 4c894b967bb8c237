//! What does a guest wait for a page that is in a store, against one bare GET?
//!
//! ```text
//!   h1 ── s1 ── h2      a guest of 192 MiB moves to and fro by scatter-gather; h2 fetches slowly in
//!          |            the background, so that the guest asks for most of its pages itself
//!          i1: store
//! ```
//!
//! While the destination gathers, this program sends a GET now and then from the destination's host, on
//! a connection of its own, for a value of as many bytes as one page takes in a store: TLS, Redis and the
//! network are the same, QEMU, the ledger and decryption are left out. The guest's waits are the
//! agent's own count, from the request read off QEMU to the page written to QEMU, of pages that were in a
//! store when they were asked for. What of the background overtook a page is the agent's count, too.
//!
//! A page that is still at the source is asked of it straight, where the paper has the source put it into a store
//! first: `ways` measures both over the same links, once the guest has been ended.
//!
//! What others show: SOLive (V-B) names the wait for faults as the price of scatter-gather, and states
//! no figure.
//!
//! `solive-5` moves the same guest between the same hosts, in packs of several sizes.

mod ways;

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use lifeboat_agent::tls::TlsIdentity;
use lifeboat_lab::experiment::statistics::ratios;
use lifeboat_lab::experiment::{Bound, Check, Record, Sample};
use lifeboat_protocol::agent::{Mode, PageStore, Phase, ScatterPlan};
use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units::{BitsPerSec, Bytes};
use lifeboat_scatter_gather::pack::Width;
use lifeboat_scatter_gather::page::PackId;
use lifeboat_scatter_gather::store::{Key, KeySpace, Login, RedisStore, Secret, User};
use serde_json::json;

use self::ways::{BESIDE, WAYS, Way, Ways};
use super::Setting;
use super::machine::machine;
use super::twins::lives;
use crate::clock;
use crate::rig::agents::{Agent, Manner, Prepared, make_certificates};
use crate::rig::network::{self, Namespace};
use crate::rig::program::run as run_program;
use crate::rig::switch::Switch;
use crate::rig::userfaultfd::Allowed;
use crate::rig::{RigError, private, stores};

/// Its name.
pub const NAME: &str = "faults";

const HOSTS: [&str; 3] = ["h1", "h2", "i1"];
const ADDRESSES: [Ipv4Addr; 3] =
    [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 3)];
const PORTS: [&str; 3] = ["to-h1", "to-h2", "to-i1"];
const VM: &str = "guest";
const MEMORY: Bytes = Bytes::from_mib(192);
const ROOM: Bytes = Bytes::from_mib(320);
/// It looks at all of its memory again and again, page by page.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 nokaslr tsc=unstable no_timer_check mitigations=off \
                                lb.name=guest lb.role=M lb.region=96MiB lb.dirty=200 lb.check=3000";
/// The background's pace: much less than what the guest asks for.
const GATHER: BitsPerSec = BitsPerSec(40_000_000);
const DOWNTIME: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two bare GETs; the guest's own requests come about as often.
const PAUSE: Duration = Duration::from_micros(500);
/// The name of the value that is fetched bare: no pack of a migration has such a number.
const BARE: PackId = PackId(u64::MAX);

pub(super) const FAULT: &str = "fault_p99_us";
const GET: &str = "bare_get_p99_us";
pub(super) const SERVED: &str = "faults_served_from_the_store";
const GETS: &str = "bare_gets";
pub(super) const EVICTED: &str = "eviction_seconds";
pub(super) const DOWNTIME_MS: &str = "downtime_ms";
pub(super) const AHEAD: &str = "pages_ahead";
pub(super) const GATHERED: &str = "gathered_seconds";
const OVERTAKEN: &str = "batches_that_overtook_a_fault_at_most";
pub(super) const WRONG: &str = "wrong_bytes_reported";
const CASE: &str = "while the destination gathers";

/// What every link carries while pages come by several ways, as the lab's.
const LINK: u64 = 200_000_000;
/// Pages by each way, in all and with nothing beside them in each round.
const PAGES_LEAST: usize = 1000;
/// Rounds of these: a full link takes its time.
const ROUNDS_OF_WAYS: usize = 5;

/// Raises three hosts, moves the guest to and fro, judges.
///
/// # Errors
/// When the rig cannot be raised, or a migration fails.
pub async fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let runs = setting.runs.unwrap_or(if setting.quick { 3 } else { 15 });
    let mut record = blank(&setting, runs);
    let _allowed = Allowed::now()?;
    let mut rig = Rig::raise(&setting).await?;
    for run in 0..runs {
        let asked = Asked { background: GATHER, ..Asked::default() };
        let figures = rig.measure(run, asked).await?;
        record.samples.push(Sample { case: CASE.to_owned(), run, figures });
        setting.keep(&record, run + 1, runs);
    }
    rig.ways(runs.min(ROUNDS_OF_WAYS), &setting, &mut record).await?;
    record.checks = checks(&record);
    Ok(record)
}

fn blank(setting: &Setting<'_>, runs: usize) -> Record {
    Record {
        name: NAME.to_owned(),
        question: "what does a guest wait for a page that is in a store, against a bare GET?"
            .to_owned(),
        others_show:
            "SOLive (V-B) names this wait as the price of scatter-gather, without a figure"
                .to_owned(),
        quick: setting.quick,
        began_unix: clock::unix_now().as_secs(),
        machine: machine(),
        parameters: json!({
            "runs": runs,
            "guest_memory_bytes": MEMORY.0,
            "kernel_arguments": KERNEL_ARGUMENTS,
            "background_bits_per_sec": GATHER.0,
            "value_bytes": Width::WHOLE.slot_bytes(true),
            "microseconds_between_bare_gets": PAUSE.as_micros() as u64,
            "store_link": "TLS 1.3 over one userspace Open vSwitch bridge, unshaped",
            "link_bits_per_sec_of_pages_by_several_ways": LINK,
        }),
        samples: Vec::new(),
        checks: Vec::new(),
    }
}

fn checks(record: &Record) -> Vec<Check> {
    let figures = |name: &str| record.figures(CASE, name);
    let waits: Vec<(f64, f64)> = figures(FAULT).into_iter().zip(figures(GET)).collect();
    let mut checks = vec![
        Check::median(
            "p99 of a fault from the store, times that of a bare GET in the same run",
            Bound::AtMost(3.0),
            &ratios(&waits),
        ),
        Check::worst("faults served from the store", Bound::AtLeast(1000.0), &figures(SERVED)),
        Check::worst("bare GETs beside them", Bound::AtLeast(1000.0), &figures(GETS)),
        Check::worst(
            "batches of the background that ended while a fault was waited for",
            Bound::AtMost(1.0),
            &figures(OVERTAKEN),
        ),
        Check::worst("wrong bytes reported by a guest", Bound::AtMost(0.0), &figures(WRONG)),
    ];
    for beside in BESIDE {
        let (ours, theirs) =
            (ways::case(Way::Straight, beside), ways::case(Way::ThroughStore, beside));
        for (name, figure) in [("half wait at most", ways::HALF), ("99 %", ways::MOST)] {
            let claim = format!("{ours}: what {name}, ratio to the paper's way by a store");
            let pairs = ratios(&record.pairs(&ours, &theirs, figure));
            checks.push(Check::median(&claim, Bound::AtMost(1.0), &pairs));
        }
        let asked =
            WAYS.map(|way| record.figures(&ways::case(way, beside), ways::NUMBER).iter().sum());
        let claim = format!("{ours}: pages by this way and by each that it is compared with");
        checks.push(Check::worst(&claim, Bound::AtLeast(PAGES_LEAST as f64), &asked));
    }
    checks
}

/// How the guest's pages go.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Asked {
    /// In batches of so many; 0: as is usual.
    pub(super) batch_pages: u32,
    /// The background's pace; zero: as fast as it goes.
    pub(super) background: BitsPerSec,
    /// From while the guest still runs at its source.
    pub(super) ahead: bool,
    /// What the source may send.
    pub(super) limit: Option<BitsPerSec>,
}

/// What it is, for records.
pub(super) fn guest() -> serde_json::Value {
    json!({ "memory_bytes": MEMORY.0, "kernel_arguments": KERNEL_ARGUMENTS })
}

/// Three hosts and a guest on one of the first two.
pub(super) struct Rig {
    namespaces: [Namespace; 3],
    agents: [Agent; 3],
    identities: [TlsIdentity; 2],
    _switch: Switch,
}

impl Rig {
    /// Starts the hosts' agents and the guest.
    ///
    /// # Errors
    /// When the network cannot be made, or a program does not start.
    pub(super) async fn raise(setting: &Setting<'_>) -> Result<Self, RigError> {
        let folder = setting.folder;
        // QEMUs and stores run as somebody else, who has to pass through.
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
            .map_err(RigError::io("cannot open the folder to QEMU's user"))?;
        let [a, b, c] = HOSTS;
        let namespaces = [Namespace::make(a)?, Namespace::make(b)?, Namespace::make(c)?];
        for (index, namespace) in namespaces.iter().enumerate() {
            network::plug(namespace, ADDRESSES[index], &Namespace::own(), PORTS[index])?;
        }
        let switch_folder = folder.join("switch");
        fs::create_dir(&switch_folder).map_err(RigError::io("cannot make a folder"))?;
        let switch = Switch::start(&Namespace::own(), &switch_folder)?;
        switch.bridge("br0", &PORTS).await?;
        for address in &ADDRESSES[1..] {
            run_program(&mut namespaces[0].command(&format!("ping -q -c2 -i0.2 -W2 {address}")))?;
        }
        private::switches_are_up()?;
        let named: Vec<_> = HOSTS.into_iter().zip(ADDRESSES).collect();
        make_certificates(folder, &named)?;
        let vms = folder.join("h1/vms");
        fs::create_dir_all(&vms).map_err(RigError::io("cannot make a folder"))?;
        fs::write(vms.join("guest.toml"), definition())
            .map_err(RigError::io("cannot define the guest"))?;
        let start = |index: usize| {
            let (host, address) = (HOSTS[index], ADDRESSES[index]);
            Agent::start(&namespaces[index], host, address, folder, setting.images)
        };
        let mut agents = [start(0).await?, start(1).await?, start(2).await?];
        agents[0].start_vm(VM).await?;
        lives(&agents[0].serial_log(VM), 2)?;
        let identity = |host: &str| {
            let loaded = TlsIdentity::load(&folder.join(format!("certs/agent-{host}")));
            loaded.map_err(RigError::refused("the certificates"))
        };
        let identities = [identity(a)?, identity(b)?];
        Ok(Self { namespaces, agents, identities, _switch: switch })
    }

    /// Ends the guest, and asks for pages by several ways.
    ///
    /// # Errors
    /// When a page does not come.
    async fn ways(
        &mut self,
        rounds: usize,
        setting: &Setting<'_>,
        record: &mut Record,
    ) -> Result<(), RigError> {
        const MIGRATION: &str = "ways";
        let guest_at = record.samples.len() % 2;
        self.agents[guest_at].stop_vm(VM).await?;
        // The source's uplink, and what the switch sends to each of them.
        network::limit(&self.namespaces[0], "eth0", Some(LINK))?;
        for port in PORTS {
            network::limit(&Namespace::own(), port, Some(LINK))?;
        }
        let store = self.agents[2].store(MIGRATION, VM, ROOM).await?;
        let host = |index: usize| (self.namespaces[index].clone(), self.identities[index].clone());
        let mut ways = Ways::raise(&[host(0), host(1)], store, MIGRATION).await?;
        for run in 0..rounds {
            for beside in BESIDE {
                let pages = match beside {
                    ways::Beside::Nothing => PAGES_LEAST,
                    ways::Beside::Scattering => PAGES_LEAST.div_ceil(rounds),
                };
                for (way, figures) in WAYS.into_iter().zip(ways.faults(pages, beside).await?) {
                    record.samples.push(Sample { case: ways::case(way, beside), run, figures });
                }
            }
            setting.keep(record, run + 1, rounds);
        }
        ways.end()?;
        self.agents[2].release(MIGRATION).await
    }

    /// Moves the guest to the other host. `run` counts these moves.
    ///
    /// # Errors
    /// When the migration fails.
    pub(super) async fn measure(
        &mut self,
        run: usize,
        asked: Asked,
    ) -> Result<BTreeMap<&'static str, f64>, RigError> {
        let migration = format!("m{}", run + 1);
        let to = (run + 1) % 2;
        let Self { namespaces, agents: [one, other, keeper], identities, .. } = self;
        let (source, destination) = if to == 1 { (one, other) } else { (other, one) };
        let store = keeper.store(&migration, VM, ROOM).await?;
        let bare = Bare::new(&namespaces[to], &identities[to], &store, &migration).await?;
        let (batch_pages, while_live) = (asked.batch_pages, asked.ahead);
        let stores = vec![store];
        let plan = ScatterPlan { stores, batch_pages, while_live, ..ScatterPlan::default() };
        let mode = Mode::ScatterGather;
        let manner = Manner { mode, scatter: Some(plan), gather_limit: asked.background };
        let prepared = Prepared::at(source, destination, VM, &migration, manner).await?;
        prepared.start(source, DOWNTIME, asked.limit.map(|limit| limit.0)).await?;
        let sent = source.ended(&migration, PATIENCE).await?;
        if sent.phase() != Phase::Completed {
            let why = format!("{:?}: {}", sent.phase(), sent.reason);
            return Err(RigError::refused("a migration")(why));
        }
        // From here on everything that is not at the destination is in the store.
        let mut gets = Vec::new();
        let deadline = clock::now() + PATIENCE;
        let progress = loop {
            let progress = destination.progress(&migration).await?;
            if progress.phase() != Phase::Gather || clock::now() > deadline {
                break progress;
            }
            gets.extend(bare.gets(100).await?);
        };
        if progress.phase() != Phase::Completed {
            let why = format!("{:?}: {}", progress.phase(), progress.reason);
            return Err(RigError::refused("to gather")(why));
        }
        gets.sort_unstable();
        keeper.release(&migration).await?;
        let wrong = lives(&destination.serial_log(VM), 2)?;
        Ok(BTreeMap::from([
            (FAULT, progress.fault_wait_p99_us as f64),
            ("fault_p50_us", progress.fault_wait_p50_us as f64),
            (GET, at(&gets, 99)),
            ("bare_get_p50_us", at(&gets, 50)),
            (SERVED, progress.faults_from_stores as f64),
            (GETS, gets.len() as f64),
            (OVERTAKEN, progress.fault_overtaken as f64),
            (EVICTED, sent.eviction_ms as f64 / 1e3),
            (DOWNTIME_MS, sent.downtime_us as f64 / 1e3),
            (AHEAD, sent.pages_ahead as f64),
            ("megabytes_sent", sent.bytes_sent as f64 / 1e6),
            (GATHERED, progress.total_ms as f64 / 1e3),
            (WRONG, wrong),
        ]))
    }
}

/// A connection on which nothing is asked for but one value.
struct Bare {
    store: RedisStore,
    key: Key,
}

impl Bare {
    async fn new(
        from: &Namespace,
        identity: &TlsIdentity,
        at: &PageStore,
        migration: &str,
    ) -> Result<Self, RigError> {
        let address: SocketAddr =
            at.address.parse().map_err(RigError::refused("a store's address"))?;
        let store = stores::connect(from, address, &login(at, migration)?, identity).await?;
        let key = store.keys().pack(BARE);
        let value = vec![7; Width::WHOLE.slot_bytes(true)];
        store.put(&key, &value).await.map_err(RigError::refused("a value"))?;
        Ok(Self { store, key })
    }

    /// What each of so many GETs waits, one after the other.
    async fn gets(&self, number: usize) -> Result<Vec<Duration>, RigError> {
        let mut waits = Vec::with_capacity(number);
        for _ in 0..number {
            let begin = clock::now();
            self.store.get(&self.key).await.map_err(RigError::refused("a value"))?;
            waits.push(begin.elapsed());
            tokio::time::sleep(PAUSE).await;
        }
        Ok(waits)
    }
}

fn migration_id(name: &str) -> Result<MigrationId, RigError> {
    MigrationId::new(name).map_err(RigError::refused("a name"))
}

/// How a migration comes into its store.
fn login(at: &PageStore, migration: &str) -> Result<Login, RigError> {
    let user = User { name: at.user.clone(), secret: Secret::given(at.secret.clone()) };
    let keys = KeySpace::new(&migration_id(migration)?);
    Ok(Login { user, keys, patience: PATIENCE, expected: None })
}

/// The wait that `percent` of all do not exceed, in microseconds. `waits` ascend.
fn at(waits: &[Duration], percent: usize) -> f64 {
    let place = waits.len().saturating_sub(1) * percent / 100;
    waits.get(place).map_or(f64::NAN, |wait| wait.as_secs_f64() * 1e6)
}

fn definition() -> String {
    format!(
        "name = \"{VM}\"\nmemory = \"{} MiB\"\nvcpus = 1\nmachine = \"pc-i440fx-7.2\"\n\
         cpu_model = \"max\"\nkernel = \"vmlinuz\"\ninitrd = \"initrd\"\n\
         kernel_arguments = \"{KERNEL_ARGUMENTS}\"\n",
        MEMORY.mib()
    )
}
