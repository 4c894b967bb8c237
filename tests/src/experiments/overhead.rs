//! What does a migration through Lifeboat cost, against QEMU migrating by itself?
//!
//! ```text
//!   h1 ─┐                      two guests of one kind, each moved to and fro between h1 and h2:
//!       ├─ Open vSwitch        one by two agents (its pages through both of them, encrypted, and a
//!   h2 ─┘                      durable COMMIT), one by QEMU alone (`migrate tcp:`, in the clear)
//! ```
//!
//! Runs come in pairs, one after the other over the same link, in alternating order; both guests run
//! all the time. Whatever is compared is seen from outside of both: bytes that the source's interface
//! has sent, QEMU's own STOP and RESUME, CPU time of all processes that take part (QEMU's holds its
//! guest's, which is the same kind of guest on both sides). The time is from the order to RESUME at
//! the destination; starting the destination's QEMU comes before, on both sides. On the shaped link
//! both are told what it carries: an agent by its controller, QEMU by `max-bandwidth`.
//!
//! What others show: QEMU's own figures are the baseline. MigrateFS (section V) and SOLive (V) relay
//! through user-space brokers and do not state what that costs.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use lifeboat_agent::qemu::launch::LaunchSpec;
use lifeboat_lab::experiment::statistics::{differences, ratios};
use lifeboat_lab::experiment::{Bound, Check, Record, Sample};
use lifeboat_protocol::agent::{Mode, Phase};
use lifeboat_protocol::units::Bytes;
use serde_json::json;

use super::Setting;
use super::machine::machine;
use super::twins::{MACHINE, Twins, lives, made};
use crate::clock;
use crate::rig::agents::{Agent, Manner, Prepared, make_certificates};
use crate::rig::cpu::CpuMeter;
use crate::rig::direct::{Aim, Direct, Moments, Place};
use crate::rig::network::{self, Namespace};
use crate::rig::program::run as run_program;
use crate::rig::switch::Switch;
use crate::rig::{RigError, private};

/// Its name.
pub const NAME: &str = "overhead";

const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)];
const HOSTS: [&str; 2] = ["h1", "h2"];
const PORTS: [&str; 2] = ["to-h1", "to-h2"];
const MEMORY: Bytes = Bytes::from_mib(256);
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 nokaslr tsc=unstable no_timer_check mitigations=off \
                                lb.role=M lb.region=160MiB lb.dirty=500 lb.check=1000";
const TWINS: Twins = Twins { memory: MEMORY, kernel_arguments: KERNEL_ARGUMENTS };
/// So often a guest says that it lives before that is believed.
const SIGNS: usize = 1;
const DOWNTIME: Duration = Duration::from_millis(300);
const SHAPED: u64 = 200_000_000;
const PATIENCE: Duration = Duration::from_secs(120);
const REST: Duration = Duration::from_millis(700);
const GIB: f64 = (1 << 30) as f64;

/// Names of the two links, and what they carry.
const LINKS: [(&str, Option<u64>); 2] = [("unshaped", None), ("200 Mbit/s", Some(SHAPED))];
/// Of the pause, where it went: as the source's agent timed it.
const PHASES: [(Phase, &str); 2] =
    [(Phase::Switchover, "source_switchover_ms"), (Phase::Committing, "source_committing_ms")];
const OURS: &str = "Lifeboat";
const DIRECT: &str = "QEMU alone";

/// Raises two hosts and two guests, moves them in turn, judges.
///
/// # Errors
/// When the rig cannot be raised, or a migration fails.
pub async fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let pairs = if setting.quick { 3 } else { 20 };
    let mut record = blank(&setting, pairs);
    let mut rig = Rig::raise(&setting).await?;
    for (link, rate) in LINKS {
        for port in PORTS {
            network::limit(&Namespace::own(), port, rate)?;
        }
        for run in 0..pairs {
            let both = if run % 2 == 0 { [OURS, DIRECT] } else { [DIRECT, OURS] };
            for which in both {
                clock::rest(REST);
                let figures = match which {
                    OURS => rig.move_ours(rate).await?,
                    _ => rig.move_direct(rate).await?,
                };
                record.samples.push(Sample { case: format!("{which}, {link}"), run, figures });
            }
            rig.turn();
            setting.keep(&record, record.samples.len() / 2, pairs * LINKS.len());
        }
    }
    record.checks = checks(&record);
    Ok(record)
}

fn blank(setting: &Setting<'_>, pairs: usize) -> Record {
    Record {
        name: NAME.to_owned(),
        question: "what does a migration through two agents cost, against QEMU by itself?"
            .to_owned(),
        others_show:
            "QEMU by itself is the baseline; MigrateFS and SOLive relay through user space, \
                      too, and do not state what it costs"
                .to_owned(),
        quick: setting.quick,
        began_unix: clock::unix_now().as_secs(),
        machine: machine(),
        parameters: json!({
            "pairs": pairs,
            "guest_memory_bytes": MEMORY.0,
            "kernel_arguments": KERNEL_ARGUMENTS,
            "machine": MACHINE,
            "downtime_limit_ms": DOWNTIME.as_millis() as u64,
            "shaped_link_bits_per_sec": SHAPED,
            "accelerator": "tcg",
            "lifeboat_page_link": "TLS 1.3",
        }),
        samples: Vec::new(),
        checks: Vec::new(),
    }
}

fn checks(record: &Record) -> Vec<Check> {
    let pairs = |link: &str, figure: &str| {
        record.pairs(&format!("{OURS}, {link}"), &format!("{DIRECT}, {link}"), figure)
    };
    let median = |claim: &str, bound, samples: &[f64]| Check::median(claim, bound, samples);
    let [(free, _), (shaped, _)] = LINKS;
    let wrong: Vec<f64> = record
        .samples
        .iter()
        .filter_map(|s| s.figures.get("wrong_bytes_reported"))
        .copied()
        .collect();
    vec![
        median(
            "throughput over an unshaped link, ratio to QEMU alone",
            Bound::AtLeast(0.7),
            &ratios(&pairs(free, "throughput_mbit_per_sec")),
        ),
        median(
            "total time at 200 Mbit/s, ratio to QEMU alone",
            Bound::AtMost(1.03),
            &ratios(&pairs(shaped, "total_seconds")),
        ),
        median(
            "downtime over an unshaped link, ms more than QEMU alone",
            Bound::AtMost(10.0),
            &differences(&pairs(free, "downtime_ms")),
        ),
        median(
            "downtime at 200 Mbit/s, ms more than QEMU alone",
            Bound::AtMost(10.0),
            &differences(&pairs(shaped, "downtime_ms")),
        ),
        Check::worst("wrong bytes reported by a guest", Bound::AtMost(0.0), &wrong),
    ]
}

struct Rig {
    namespaces: [Namespace; 2],
    folders: [PathBuf; 2],
    agents: [Agent; 2],
    spec: LaunchSpec,
    direct: Option<Direct>,
    /// Which host both guests are on.
    at: usize,
    migrations: usize,
    _switch: Switch,
}

type Figures = BTreeMap<&'static str, f64>;

impl Rig {
    async fn raise(setting: &Setting<'_>) -> Result<Self, RigError> {
        let folder = setting.folder;
        // QEMUs run as somebody else, who has to pass through.
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
            .map_err(RigError::io("cannot open the folder to QEMU's user"))?;
        let namespaces = [Namespace::make(HOSTS[0])?, Namespace::make(HOSTS[1])?];
        for index in [0, 1] {
            network::plug(&namespaces[index], ADDRESSES[index], &Namespace::own(), PORTS[index])?;
        }
        let switch_folder = made(folder, "switch")?;
        let switch = Switch::start(&Namespace::own(), &switch_folder)?;
        switch.bridge("br0", &PORTS).await?;
        run_program(
            &mut namespaces[0].command(&format!("ping -q -c2 -i0.2 -W2 {}", ADDRESSES[1])),
        )?;
        private::switches_are_up()?;

        make_certificates(folder, &[(HOSTS[0], ADDRESSES[0]), (HOSTS[1], ADDRESSES[1])])?;
        let definition = made(folder, "h1/vms")?.join("ours.toml");
        fs::write(definition, TWINS.ours()).map_err(RigError::io("cannot define the guest"))?;
        let start = |index: usize| {
            Agent::start(&namespaces[index], HOSTS[index], ADDRESSES[index], folder, setting.images)
        };
        let mut agents = [start(0).await?, start(1).await?];
        agents[0].start_vm("ours").await?;
        let folders = [made(folder, "h1/direct")?, made(folder, "h2/direct")?];
        let spec = TWINS.direct(setting.images);
        let place = Place { namespace: &namespaces[0], address: ADDRESSES[0], folder: &folders[0] };
        let direct = Direct::boot(&spec, place).await?;
        lives(&agents[0].serial_log("ours"), SIGNS)?;
        lives(&direct.serial_log(), SIGNS)?;
        let direct = Some(direct);
        Ok(Self {
            namespaces,
            folders,
            agents,
            spec,
            direct,
            at: 0,
            migrations: 0,
            _switch: switch,
        })
    }

    /// Both guests have moved: the next pair goes the other way.
    fn turn(&mut self) {
        self.at = 1 - self.at;
    }

    async fn move_ours(&mut self, limit: Option<u64>) -> Result<Figures, RigError> {
        self.migrations += 1;
        let migration = format!("m{}", self.migrations);
        let (to, wire) = (1 - self.at, Wire::start(&self.namespaces[self.at])?);
        let [one, other] = &mut self.agents;
        let (source, destination) = if self.at == 0 { (one, other) } else { (other, one) };
        let manner = Manner::of(Mode::PreCopy);
        let prepared = Prepared::at(source, destination, "ours", &migration, manner).await?;
        let (from, there) =
            (source.vm("ours").await?.qemu_pid, destination.vm("ours").await?.qemu_pid);
        let relays = [source.pid(), destination.pid()];
        let cpu = CpuMeter::start(&[relays[0], relays[1], from, there]);
        let began = clock::unix_now();
        prepared.start(source, DOWNTIME, limit).await?;
        let sent = source.ended(&migration, PATIENCE).await?;
        if sent.phase() != Phase::Completed {
            let why = format!("{:?}: {}", sent.phase(), sent.reason);
            return Err(RigError::refused("a migration")(why));
        }
        let taken = destination.ended(&migration, PATIENCE).await?;
        let used = cpu.finish();
        let moments = Moments { stop: sent.stop_unix_us, resume: taken.resume_unix_us };
        let mut figures = wire.figures(&self.namespaces[self.at], began, moments, &used)?;
        let relayed: f64 = relays.iter().filter_map(|pid| used.get(pid)).sum();
        figures.insert("agents_cpu_seconds", relayed);
        figures.insert("iterations", f64::from(sent.iteration));
        for (phase, name) in PHASES {
            let of_phase = sent.phase_times.iter().filter(|time| time.phase() == phase);
            figures.insert(name, of_phase.map(|time| time.micros as f64 / 1e3).sum());
        }
        let serial = self.agents[to].serial_log("ours");
        figures.insert("wrong_bytes_reported", lives(&serial, SIGNS)?);
        Ok(figures)
    }

    async fn move_direct(&mut self, limit: Option<u64>) -> Result<Figures, RigError> {
        let to = 1 - self.at;
        let place = Place {
            namespace: &self.namespaces[to],
            address: ADDRESSES[to],
            folder: &self.folders[to],
        };
        let aim = Aim { downtime: DOWNTIME, limit, within: PATIENCE };
        let waiting = Direct::listen(&self.spec, place).await?;
        let running = self.direct.take();
        let running = running.ok_or_else(|| RigError::refused("a guest")("there is none"))?;
        let wire = Wire::start(&self.namespaces[self.at])?;
        let cpu = CpuMeter::start(&[running.pid(), waiting.pid()]);
        let began = clock::unix_now();
        let moments = running.migrate_to(&waiting, ADDRESSES[to], aim).await?;
        let used = cpu.finish();
        let mut figures = wire.figures(&self.namespaces[self.at], began, moments, &used)?;
        figures.insert("wrong_bytes_reported", lives(&waiting.serial_log(), SIGNS)?);
        self.direct = Some(waiting);
        Ok(figures)
    }
}

/// Bytes that a host had sent when a run began.
struct Wire {
    before: u64,
}

impl Wire {
    fn start(at: &Namespace) -> Result<Self, RigError> {
        Ok(Self { before: sent(at)? })
    }

    fn figures(
        &self,
        at: &Namespace,
        began: Duration,
        moments: Moments,
        used: &BTreeMap<u32, f64>,
    ) -> Result<Figures, RigError> {
        let bytes = sent(at)?.saturating_sub(self.before) as f64;
        let total = (moments.resume as f64 - began.as_micros() as f64) / 1e6;
        let cpu: f64 = used.values().sum();
        Ok(BTreeMap::from([
            ("total_seconds", total),
            ("downtime_ms", (moments.resume as f64 - moments.stop as f64) / 1e3),
            ("wire_mib", bytes / f64::from(1 << 20)),
            ("throughput_mbit_per_sec", bytes * 8.0 / total / 1e6),
            ("cpu_seconds", cpu),
            ("cpu_seconds_per_gib", cpu / (bytes / GIB)),
        ]))
    }
}

fn sent(at: &Namespace) -> Result<u64, RigError> {
    Ok(at.bytes_sent()?.get("eth0").copied().unwrap_or_default())
}
