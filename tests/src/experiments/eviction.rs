//! How soon is a guest off its host, by ways of ours and by QEMU's own, when its destination is as
//! fast as its source?
//!
//! ```text
//!   h1 ─┐ 200               two guests of one kind, each moved to and fro between h1 and h2: one by
//!       ├─ Open vSwitch     agents (post-copy; scatter-gather over one store without redundancy, over two
//!   h2 ─┤ 200 Mbit/s each   with a mirror, over three with parity), one by QEMU alone (its post-copy; its
//!   i1 ─┤                   pre-copy over two connections with zstd)
//!   i2 ─┤
//!   i3 ─┘
//! ```
//!
//! All of them have a turn in every round, one after the other over the same links, in rotating order; both
//! guests run all the time. Measured is the time from the order until the source's QEMU has gone.
//! Nobody is told what the links carry. With redundancy scatter-gather sends every page 1.5 times (parity of
//! three) or twice (mirror) over the same link, and there is nothing to win by it where a destination is as
//! fast as this (decision 33): these two are measured and drawn, with what left by the source's port, and
//! have no bound.
//!
//! What others show: QEMU's own figures are the baseline. SOLive (figure 8) compares with post-copy
//! and not with compression.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use lifeboat_agent::qemu::launch::LaunchSpec;
use lifeboat_lab::experiment::{Bound, Check, Record, Sample};
use lifeboat_protocol::agent::{Mode, Phase, Redundancy, ScatterPlan};
use lifeboat_protocol::units::Bytes;
use serde_json::json;

use super::Setting;
use super::machine::machine;
use super::plot::{Ground, Plot, Series, Shape};
use super::twins::{Twins, lives, made};
use crate::clock;
use crate::rig::agents::{Agent, Manner, Prepared, make_certificates};
use crate::rig::direct::{Direct, Leaving, Place};
use crate::rig::network::{self, Namespace};
use crate::rig::program::run as run_program;
use crate::rig::switch::Switch;
use crate::rig::userfaultfd::Allowed;
use crate::rig::{RigError, private};

/// Its name.
pub const NAME: &str = "eviction";

/// The first two have the guests, the others keep pages.
const HOSTS: [&str; 5] = ["h1", "h2", "i1", "i2", "i3"];
const ADDRESSES: [Ipv4Addr; 5] = [
    Ipv4Addr::new(10, 0, 0, 1),
    Ipv4Addr::new(10, 0, 0, 2),
    Ipv4Addr::new(10, 0, 0, 3),
    Ipv4Addr::new(10, 0, 0, 4),
    Ipv4Addr::new(10, 0, 0, 5),
];
const PORTS: [&str; 5] = ["to-h1", "to-h2", "to-i1", "to-i2", "to-i3"];
const MEMORY: Bytes = Bytes::from_mib(192);
const ROOM: Bytes = Bytes::from_mib(320);
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 nokaslr tsc=unstable no_timer_check mitigations=off \
                                lb.role=M lb.region=96MiB lb.dirty=500 lb.check=1000";
const LINK: u64 = 200_000_000;
const TWINS: Twins = Twins { memory: MEMORY, kernel_arguments: KERNEL_ARGUMENTS };
/// So often a guest says that it lives before that is believed.
const SIGNS: usize = 2;
const DOWNTIME: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(120);
const REST: Duration = Duration::from_millis(700);
/// How much slower than the better of QEMU's ways a way of ours may be.
const AT_MOST: f64 = 1.05;

const EVICTION: &str = "eviction_seconds";
/// What left by the source's port meanwhile.
const WIRE: &str = "wire_mib";
const WRONG: &str = "wrong_bytes_reported";

/// A way to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    PostCopy,
    /// Over as many stores.
    Scattered(Redundancy, usize),
    Qemu(Leaving),
}

impl Way {
    /// Whether what it takes is held against QEMU's own ways.
    fn is_bounded(&self) -> bool {
        matches!(self, Self::PostCopy | Self::Scattered(Redundancy::None, _))
    }
}

/// An even number of each kind: after a round both guests are where they were.
const WAYS: [(Way, &str); 6] = [
    (Way::PostCopy, "Lifeboat, post-copy"),
    (Way::Qemu(Leaving::PostCopy), "QEMU alone, post-copy"),
    (Way::Scattered(Redundancy::None, 1), "Lifeboat, scatter-gather over one store"),
    (Way::Qemu(Leaving::MultifdZstd), "QEMU alone, multifd and zstd"),
    (Way::Scattered(Redundancy::Mirror, 2), "Lifeboat, scatter-gather, mirror in two stores"),
    (Way::Scattered(Redundancy::Parity, 3), "Lifeboat, scatter-gather, parity in three stores"),
];

/// Raises hosts and two guests, moves them in turn, judges.
///
/// # Errors
/// When the rig cannot be raised, or a migration fails.
pub async fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let rounds = setting.runs.unwrap_or(if setting.quick { 2 } else { 15 });
    let mut record = blank(&setting, rounds);
    let _allowed = Allowed::now()?;
    let mut rig = Rig::raise(&setting).await?;
    let ways: Vec<(Way, &str)> = WAYS.into_iter().filter(|(_, name)| setting.wants(name)).collect();
    for run in 0..rounds {
        for turn in 0..ways.len() {
            clock::rest(REST);
            let (way, name) = ways[(turn + run) % ways.len()];
            let figures = match way {
                Way::PostCopy => rig.move_ours(None).await?,
                Way::Scattered(redundancy, stores) => {
                    rig.move_ours(Some((redundancy, stores))).await?
                }
                Way::Qemu(leaving) => rig.move_direct(leaving).await?,
            };
            record.samples.push(Sample { case: name.to_owned(), run, figures });
        }
        setting.keep(&record, run + 1, rounds);
    }
    record.checks = checks(&record);
    Ok(record)
}

fn blank(setting: &Setting<'_>, rounds: usize) -> Record {
    Record {
        name: NAME.to_owned(),
        question:
            "how soon is a guest off its host, against QEMU's own ways, when the destination \
                   is as fast as the source?"
                .to_owned(),
        others_show:
            "QEMU by itself is the baseline; SOLive (figure 8) compares with post-copy only"
                .to_owned(),
        quick: setting.quick,
        began_unix: clock::unix_now().as_secs(),
        machine: machine(),
        parameters: json!({
            "rounds": rounds,
            "guest_memory_bytes": MEMORY.0,
            "kernel_arguments": KERNEL_ARGUMENTS,
            "link_bits_per_sec": LINK,
            "multifd_channels": 2,
            "lifeboat_page_link": "TLS 1.3",
        }),
        samples: Vec::new(),
        checks: Vec::new(),
    }
}

fn checks(record: &Record) -> Vec<Check> {
    let of = |wanted: fn(&Way) -> bool| {
        WAYS.iter().filter(move |(way, _)| wanted(way)).map(|(_, name)| *name)
    };
    let rivals: Vec<Vec<f64>> =
        of(|way| matches!(way, Way::Qemu(_))).map(|name| record.figures(name, EVICTION)).collect();
    let best =
        |run: usize| rivals.iter().filter_map(|times| times.get(run).copied()).reduce(f64::min);
    let mut checks = Vec::new();
    for name in of(Way::is_bounded) {
        let times = record.figures(name, EVICTION);
        let ratios: Vec<f64> =
            (0..).zip(times).filter_map(|(run, time)| Some(time / best(run)?)).collect();
        let claim = format!("{name}: eviction, ratio to the better of QEMU's own ways");
        checks.push(Check::median(&claim, Bound::AtMost(AT_MOST), &ratios));
    }
    let wrong: Vec<f64> =
        record.samples.iter().filter_map(|sample| sample.figures.get(WRONG)).copied().collect();
    checks.push(Check::worst("wrong bytes reported by a guest", Bound::AtMost(0.0), &wrong));
    checks
}

/// How soon, and with how much on the wire: with redundancy pages go more than once.
#[must_use]
pub fn plots(record: &Record) -> Vec<Plot> {
    let names = WAYS.map(|(_, name)| name);
    let places: Vec<(f64, &str)> = (0_u32..).map(f64::from).zip(names).collect();
    let plot = |name: &str, title: &str, height: &str, figure: &str| Plot {
        name: format!("{NAME}-{name}"),
        title: title.to_owned(),
        others_show: record.others_show.clone(),
        ground: Ground::names("how it leaves", &names),
        height: height.to_owned(),
        series: vec![Series::of(record, name, Shape::Bars, figure, &places)],
    };
    vec![
        plot("time", "Time until a guest of 192 MiB is off its host", "seconds", EVICTION),
        plot("bytes", "What leaves by the source's port for it", "MiB", WIRE),
    ]
}

struct Rig {
    namespaces: [Namespace; HOSTS.len()],
    folders: [PathBuf; 2],
    agents: [Agent; HOSTS.len()],
    spec: LaunchSpec,
    direct: Option<Direct>,
    /// Which host our guest is on, and which QEMU's.
    ours_at: usize,
    direct_at: usize,
    migrations: usize,
    _switch: Switch,
}

type Figures = BTreeMap<&'static str, f64>;

impl Rig {
    async fn raise(setting: &Setting<'_>) -> Result<Self, RigError> {
        let folder = setting.folder;
        // QEMUs and stores run as somebody else, who has to pass through.
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
            .map_err(RigError::io("cannot open the folder to QEMU's user"))?;
        let [a, b, c, d, e] = HOSTS;
        let make = Namespace::make;
        let namespaces = [make(a)?, make(b)?, make(c)?, make(d)?, make(e)?];
        for (index, namespace) in namespaces.iter().enumerate() {
            network::plug(namespace, ADDRESSES[index], &Namespace::own(), PORTS[index])?;
        }
        let switch = Switch::start(&Namespace::own(), &made(folder, "switch")?)?;
        switch.bridge("br0", &PORTS).await?;
        for address in &ADDRESSES[1..] {
            run_program(&mut namespaces[0].command(&format!("ping -q -c2 -i0.2 -W2 {address}")))?;
        }
        private::switches_are_up()?;
        for (namespace, port) in namespaces.iter().zip(PORTS) {
            network::limit(namespace, "eth0", Some(LINK))?;
            // The sender's end decides: two of one rate in a row would share that.
            network::limit(&Namespace::own(), port, Some(LINK + LINK / 50))?;
        }
        let named: Vec<_> = HOSTS.into_iter().zip(ADDRESSES).collect();
        make_certificates(folder, &named)?;
        let definition = made(folder, "h1/vms")?.join("ours.toml");
        fs::write(definition, TWINS.ours()).map_err(RigError::io("cannot define the guest"))?;
        let start = |index: usize| {
            let (host, address) = (HOSTS[index], ADDRESSES[index]);
            Agent::start(&namespaces[index], host, address, folder, setting.images)
        };
        let [a, b] = [start(0).await?, start(1).await?];
        let mut agents = [a, b, start(2).await?, start(3).await?, start(4).await?];
        agents[0].start_vm("ours").await?;
        let folders = [made(folder, "h1/direct")?, made(folder, "h2/direct")?];
        let spec = TWINS.direct(setting.images);
        let place = Place { namespace: &namespaces[0], address: ADDRESSES[0], folder: &folders[0] };
        let direct = Direct::boot(&spec, place).await?;
        lives(&agents[0].serial_log("ours"), SIGNS)?;
        lives(&direct.serial_log(), SIGNS)?;
        Ok(Self {
            namespaces,
            folders,
            agents,
            spec,
            direct: Some(direct),
            ours_at: 0,
            direct_at: 0,
            migrations: 0,
            _switch: switch,
        })
    }

    /// Post-copy, or over so many stores.
    async fn move_ours(
        &mut self,
        scattered: Option<(Redundancy, usize)>,
    ) -> Result<Figures, RigError> {
        self.migrations += 1;
        let migration = format!("m{}", self.migrations);
        let (from, to) = (self.ours_at, 1 - self.ours_at);
        let sent_before = sent_by(&self.namespaces[from])?;
        let [one, other, keepers @ ..] = &mut self.agents;
        let (source, destination) = if to == 1 { (one, other) } else { (other, one) };
        let mut manner = Manner::of(Mode::PostCopy);
        let keepers = &mut keepers[..scattered.map_or(0, |(_, stores)| stores)];
        if let Some((redundancy, _)) = scattered {
            let mut stores = Vec::new();
            for keeper in keepers.iter_mut() {
                stores.push(keeper.store(&migration, "ours", ROOM).await?);
            }
            let redundancy = redundancy.into();
            manner.mode = Mode::ScatterGather;
            manner.scatter = Some(ScatterPlan { stores, redundancy, ..ScatterPlan::default() });
        }
        let prepared = Prepared::at(source, destination, "ours", &migration, manner).await?;
        prepared.start(source, DOWNTIME, None).await?;
        let sent = source.ended(&migration, PATIENCE).await?;
        let wire = sent_by(&self.namespaces[from])? - sent_before;
        let taken = destination.ended(&migration, PATIENCE).await?;
        for side in [&sent, &taken] {
            if side.phase() != Phase::Completed {
                let why = format!("{:?}: {}", side.phase(), side.reason);
                return Err(RigError::refused("a migration")(why));
            }
        }
        for keeper in keepers {
            keeper.release(&migration).await?;
        }
        self.ours_at = to;
        Ok(BTreeMap::from([
            (EVICTION, sent.eviction_ms as f64 / 1e3),
            (WIRE, wire / 1_048_576.0),
            ("gathered_seconds", taken.total_ms as f64 / 1e3),
            ("downtime_ms", sent.downtime_us as f64 / 1e3),
            (WRONG, lives(&destination.serial_log("ours"), SIGNS)?),
        ]))
    }

    async fn move_direct(&mut self, leaving: Leaving) -> Result<Figures, RigError> {
        let (from, to) = (self.direct_at, 1 - self.direct_at);
        let place = Place {
            namespace: &self.namespaces[to],
            address: ADDRESSES[to],
            folder: &self.folders[to],
        };
        let waiting = Direct::listen_for(&self.spec, place, leaving).await?;
        let running = self.direct.take();
        let running = running.ok_or_else(|| RigError::refused("a guest")("there is none"))?;
        let sent_before = sent_by(&self.namespaces[from])?;
        let took = running.leave(ADDRESSES[to], leaving, PATIENCE).await?;
        let wire = sent_by(&self.namespaces[from])? - sent_before;
        let figures = BTreeMap::from([
            (EVICTION, took.as_secs_f64()),
            (WIRE, wire / 1_048_576.0),
            (WRONG, lives(&waiting.serial_log(), SIGNS)?),
        ]);
        (self.direct, self.direct_at) = (Some(waiting), to);
        Ok(figures)
    }
}

/// Bytes that have left a host so far.
fn sent_by(host: &Namespace) -> Result<f64, RigError> {
    let sent = host.bytes_sent()?.get("eth0").copied();
    sent.map(|bytes| bytes as f64).ok_or_else(|| RigError::refused("a counter")("no eth0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_round_is_compared_with_the_better_of_qemus_ways_in_it() {
        let mut record = blank_of(&[]);
        // The last two are compared with nobody.
        let rounds = [[10.0, 10.0, 10.0, 12.0, 99.0, 99.0], [10.0, 12.0, 10.0, 10.0, 99.0, 99.0]];
        for (run, times) in rounds.iter().enumerate() {
            for ((_, name), time) in WAYS.iter().zip(times) {
                let figures = BTreeMap::from([(EVICTION, *time), (WRONG, 0.0)]);
                record.samples.push(Sample { case: (*name).to_owned(), run, figures });
            }
        }
        let [post_copy, scattered, wrong] = &checks(&record)[..] else { panic!("three checks") };
        assert_eq!((post_copy.figure, post_copy.holds), (Some(1.0), true));
        assert_eq!((scattered.figure, wrong.holds), (Some(1.0), true));
    }

    fn blank_of(samples: &[Sample]) -> Record {
        Record {
            name: NAME.to_owned(),
            question: String::new(),
            others_show: String::new(),
            quick: true,
            began_unix: 0,
            machine: machine(),
            parameters: json!({}),
            samples: samples.to_vec(),
            checks: Vec::new(),
        }
    }
}
