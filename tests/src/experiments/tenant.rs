//! What does a migration do to an application that has a queue of its own?
//!
//! ```text
//!   source      ─┐   migration: 70 of 100 Mbit/s reserved, takes what it gets
//!   application ─┼─ rack ═100 Mbit/s═ core ─ destination
//!   bystander   ─┘  application: 25 Mbit/s of its own, offers 80 % of that, and asks small questions
//!                   bystander: what is left, flooded, so that the link is full with or without us
//! ```
//!
//! In turn with the migration and without it; everything else stays. What the application gets is
//! counted at the destination, and its round trips go through its own queue, too. The mark of its
//! queue is put on by a flow that is not ours, as a tenant's controller would.
//!
//! What others show: SOLive (V-C) sees "no obvious degradation" of guests that hardly use the
//! network; nobody shows what a reservation does to a neighbour's round trips.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::time::Duration;

use lifeboat_lab::experiment::statistics::{differences, ratios};
use lifeboat_lab::experiment::{Bound, Check, Record, Sample};
use lifeboat_ovs::openflow::flow::FlowMod;
use lifeboat_ovs::openflow::{Action, Instruction, Masked, Match, Oxm, PortNo};
use serde_json::json;

use super::Setting;
use super::machine::{CpuTime, machine};
use super::plot::{Ground, Plot, Series, Shape};
use crate::clock;
use crate::rig::RigError;
use crate::rig::echo::round_trips;
use crate::rig::rack::{APPLICATION, DESTINATION, Rack, SOURCE};
use crate::rig::switch::Datapath;
use crate::rig::traffic::{Carrier, Flood, Flow};

/// Its name.
pub const NAME: &str = "tenant";

const LINK: u64 = 100_000_000;
const MIGRATION: u64 = 70_000_000;
const APPLICATIONS: u64 = 25_000_000;
const OFFERED: u64 = APPLICATIONS / 10 * 8;
/// Beyond what is left, so that the link is full.
const FLOOD: u64 = 110_000_000;
/// Queues, and the marks of their packets.
const MIGRATION_QUEUE: u8 = 7;
const APPLICATION_QUEUE: u8 = 3;
const PAGE_PORT: u16 = 7445;
const APPLICATION_PORT: u16 = 9000;
const ECHO_PORT: u16 = 9001;
const FLOOD_PORT: u16 = 9002;
/// Ours and the tenant's.
const OUR_COOKIE: u64 = 0x1b << 56;
const THEIR_COOKIE: u64 = 0x7e << 56;
const BEAT: Duration = Duration::from_millis(2);
const SETTLE: Duration = Duration::from_millis(1500);
/// Round trips of all runs of a case.
const ROUND_TRIPS: usize = 10_000;

const WITH: &str = "with a migration";
const WITHOUT: &str = "without a migration";
const RATE: &str = "application_mbit_per_sec";
const P99: &str = "round_trip_p99_ms";
const P50: &str = "round_trip_p50_ms";
const MIGRATES: &str = "migration_mbit_per_sec";

/// Raises the network, takes turns, judges.
///
/// # Errors
/// When the rig cannot be raised.
pub async fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let rounds = setting.runs.unwrap_or(if setting.quick { 3 } else { 10 }).max(1);
    let each = if setting.quick { ROUND_TRIPS / 10 } else { ROUND_TRIPS / rounds };
    let mut record = blank(&setting, rounds, each);
    let rack = raise(&setting).await?;
    for run in 0..rounds {
        let both = if run % 2 == 0 { [WITHOUT, WITH] } else { [WITH, WITHOUT] };
        for case in both {
            let figures = measure(&rack, case == WITH, each)?;
            record.samples.push(Sample { case: case.to_owned(), run, figures });
        }
        setting.keep(&record, run + 1, rounds);
    }
    record.checks = checks(&record);
    Ok(record)
}

fn blank(setting: &Setting<'_>, rounds: usize, each: usize) -> Record {
    Record {
        name: NAME.to_owned(),
        question: "what does a migration that fills its reservation do to an application with a \
                   queue of its own, on a full link?"
            .to_owned(),
        others_show: "SOLive V-C: no obvious degradation of guests that hardly use the network; \
                      round trips are not shown"
            .to_owned(),
        quick: setting.quick,
        began_unix: clock::unix_now().as_secs(),
        machine: machine(),
        parameters: json!({
            "datapath": Datapath::here().words(),
            "link_bits_per_sec": LINK,
            "migration_reserves": MIGRATION,
            "application_has": APPLICATIONS,
            "application_offers": OFFERED,
            "bystanders_flood": FLOOD,
            "round_trips_per_run": each,
            "question_each_ms": BEAT.as_millis() as u64,
            "rounds": rounds,
        }),
        samples: Vec::new(),
        checks: Vec::new(),
    }
}

fn checks(record: &Record) -> Vec<Check> {
    let pairs = |figure: &str| record.pairs(WITH, WITHOUT, figure);
    let filled: Vec<f64> =
        record.figures(WITH, MIGRATES).iter().map(|mbit| mbit * 1e8 / MIGRATION as f64).collect();
    vec![
        Check::median(
            "the migration's rate in % of its reservation",
            Bound::AtLeast(95.0),
            &filled,
        ),
        Check::median(
            "the application's throughput, ratio to the run without a migration",
            Bound::Within(0.95, 1.05),
            &ratios(&pairs(RATE)),
        ),
        Check::median(
            "the application's p99 round trip, ms more than without a migration",
            Bound::AtMost(1.0),
            &differences(&pairs(P99)),
        ),
    ]
}

/// Round trips with and without a migration.
#[must_use]
pub fn plot(record: &Record) -> Plot {
    let line = |name: &str, figure: &str| {
        Series::of(record, name, Shape::Bars, figure, &[(0.0, WITHOUT), (1.0, WITH)])
    };
    Plot {
        name: NAME.to_owned(),
        title: "Round trips of an application with a queue of its own, on a full link".to_owned(),
        others_show: record.others_show.clone(),
        ground: Ground::names("the link is full", &[WITHOUT, WITH]),
        height: "ms".to_owned(),
        series: vec![line("half of them within", P50), line("99 % within", P99)],
    }
}

async fn raise(setting: &Setting<'_>) -> Result<Rack, RigError> {
    let rack = Rack::raise(setting.folder).await?;
    let left = LINK - MIGRATION - APPLICATIONS;
    rack.queue("tenant", APPLICATION_QUEUE.into(), APPLICATIONS, left, LINK).await?;
    rack.queue("lifeboat", MIGRATION_QUEUE.into(), MIGRATION, left, LINK).await?;
    rack.classify().await?;
    rack.flows(OUR_COOKIE, &our_flows()).await?;
    rack.flows(THEIR_COOKIE, &their_flows()).await?;
    Ok(rack)
}

fn to_queue(queue: u8) -> Vec<Instruction> {
    vec![Instruction::ApplyActions(vec![
        Action::SetQueue(queue.into()),
        Action::SetField(Oxm::IpDscp(queue)),
        Action::output(PortNo::NORMAL),
    ])]
}

fn our_flows() -> [FlowMod; 1] {
    let pages = Match::any()
        .with(Oxm::EthType(0x0800))
        .with(Oxm::IpProto(6))
        .with(Oxm::Ipv4Src(Masked::exact(SOURCE)))
        .with(Oxm::Ipv4Dst(Masked::exact(DESTINATION)))
        .with(Oxm::TcpDst(PAGE_PORT));
    [FlowMod::add(OUR_COOKIE, 1000, pages, to_queue(MIGRATION_QUEUE))]
}

fn their_flows() -> [FlowMod; 2] {
    [APPLICATION_PORT, ECHO_PORT].map(|port| {
        let application = Match::any()
            .with(Oxm::EthType(0x0800))
            .with(Oxm::IpProto(17))
            .with(Oxm::Ipv4Src(Masked::exact(APPLICATION)))
            .with(Oxm::UdpDst(port));
        FlowMod::add(THEIR_COOKIE, 500, application, to_queue(APPLICATION_QUEUE))
    })
}

fn measure(
    rack: &Rack,
    migrates: bool,
    each: usize,
) -> Result<BTreeMap<&'static str, f64>, RigError> {
    let to = |port| SocketAddrV4::new(DESTINATION, port);
    let start = |at, carrier, port| {
        Flood::start(at, &rack.destination, Flow { carrier, to: to(port), dscp: 0 })
    };
    let _bystanders = start(&rack.bystander, Carrier::Udp(FLOOD), FLOOD_PORT)?;
    let application = start(&rack.application, Carrier::Udp(OFFERED), APPLICATION_PORT)?;
    let pages = || start(&rack.source, Carrier::Tcp, PAGE_PORT);
    let migration = migrates.then(pages).transpose()?;
    clock::rest(SETTLE);
    let bits = |flood: &Flood| flood.bits_on_the_wire();
    let idle = CpuTime::now();
    let (begin, before) =
        (clock::now(), (bits(&application), migration.as_ref().map_or(0.0, bits)));
    let mut trips = round_trips(&rack.application, &rack.destination, to(ECHO_PORT), each, BEAT)?;
    let seconds = clock::now().duration_since(begin).as_secs_f64();
    let after = (bits(&application), migration.as_ref().map_or(0.0, bits));
    trips.sort_unstable();
    let percentile = |percent: usize| {
        let at = (trips.len() * percent / 100).min(trips.len().saturating_sub(1));
        trips.get(at).map_or(f64::NAN, |trip| trip.as_secs_f64() * 1e3)
    };
    Ok(BTreeMap::from([
        (RATE, (after.0 - before.0) / seconds / 1e6),
        (MIGRATES, (after.1 - before.1) / seconds / 1e6),
        (P50, percentile(50)),
        (P99, percentile(99)),
        ("round_trip_worst_ms", percentile(100)),
        ("machine_idle_percent", CpuTime::now().idle_percent_since(idle)),
    ]))
}
