//! SOLive's figure 8: how soon a host is empty when its pages wait at intermediaries, against
//! post-copy, which is as slow as its destination.
//!
//! ```text
//!   h1 ── 180 of 200 Mbit/s ── s1 ──┬── 180: d9   ┬── 180 to one, 90 to each of several: i1, i2, i3
//!                                   ├── 160: d8   └── 60 to each: t1, t2, t3
//!                                   ├── 140: d7
//!                                   ├── 120: d6
//!                                   ├── 100: d5
//!                                   └── 22.5: d1                   (lab/scenarios/solive-8.toml)
//! ```
//!
//! One guest of 1 GiB, all of it different, leaves h1 at urgency 90 with a strict and fixed
//! reservation, and comes back by pre-copy before the next run. *Eviction* is the agent's: from the
//! order to the end of the source's QEMU. The *floor* of a run is what left by the source's port,
//! divided by what iperf3 gets by a queue of the same rate just before and after. QEMU alone brings a twin
//! of that guest by its own post-copy out of the same port, by a queue of what the destination has reserved.
//! The paper's finding (V-D): post-copy is as slow as its destination; with three intermediaries at 1/3 each
//! scatter-gather is not quicker than with two, at 1/2 each it needs 57 % of the time of post-copy at 50 %.
//! What is claimed is measured in every round, what lies between in the first.

mod cases;
mod native;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use lifeboat_lab::experiment::statistics::{median, ratios};
use lifeboat_lab::experiment::{Bound, Check, Record, Sample};
use lifeboat_protocol::units::BitsPerSec;
use serde_json::Value;

use self::cases::{
    CASES, Case, DESTINATIONS, LINES, Mover, POST_COPY_1, POST_COPY_5, QEMU_1, QEMU_5, QUICK,
    THREE, THREE_1,
};
use super::{Arm, REST, WRONG, blank, reported_at_the_end};
use crate::clock;
use crate::experiments::Setting;
use crate::experiments::plot::{Ground, Plot, Point, Series, Shape};
use crate::rig::RigError;
use crate::rig::cloud::Cloud;
use crate::rig::userfaultfd::Allowed;

/// Its name.
pub const NAME: &str = "solive-8";

const SOURCE: &str = "h1";
const GUEST: &str = "vm";
/// A gibibyte over the narrowest link takes 390 s.
const LIMIT: Duration = Duration::from_secs(600);
/// What the source has reserved, bit/s.
const RESERVED: u64 = 180_000_000;
/// The share of a link that is reserved at urgency 90.
const SHARE_PERCENT: u64 = 90;

const EVICTION: &str = "eviction_seconds";
const FLOOR: &str = "eviction_ratio_to_floor";
const WIRE: &str = "wire_mib";

/// Runs it.
///
/// # Errors
/// When the cloud cannot be raised, or the guest does not arrive.
pub async fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let rounds = setting.runs.unwrap_or(if setting.quick { 1 } else { 3 });
    let first = setting.quick && setting.only.is_empty();
    let cases = if first { &CASES[..QUICK] } else { &CASES[..] };
    let cases: Vec<&Case> = cases.iter().filter(|case| setting.wants(case.arm.name)).collect();
    let arms: Vec<Arm> = cases.iter().map(|case| case.arm).collect();
    let mut record = blank(&setting, (NAME, NAME), rounds, &arms);
    record.question = "how soon is a host empty whose pages wait at intermediaries?".to_owned();
    record.others_show =
        "SOLive Fig. 8: post-copy is as slow as its destination; scatter-gather over \
                          three intermediaries at 1/2 each takes 0.57 of post-copy at 50 %"
            .to_owned();
    let _allowed = Allowed::now()?;
    // QEMU runs as somebody else, who has to pass through.
    fs::set_permissions(setting.folder, fs::Permissions::from_mode(0o755))
        .map_err(RigError::io("cannot open the folder to QEMU's user"))?;
    let end = setting.minutes.map(|minutes| clock::now() + Duration::from_secs(minutes * 60));
    let lab = setting.images.parent().unwrap_or(setting.images);
    let cloud = Cloud::raise(lab, NAME, &setting.folder.join("up.log"))?;
    clock::rest(REST * 2);
    let due = |round: usize| -> Vec<&Case> {
        cases.iter().copied().filter(|case| round == 0 || case.each_round).collect()
    };
    let all: Vec<&Case> = (0..rounds).flat_map(due).collect();
    eprintln!("{NAME}: {} runs, about {} minutes", all.len(), about_minutes(&cloud, &all)?);
    for round in 0..rounds {
        let mut turn = due(round);
        let begins = round % turn.len().max(1);
        turn.rotate_left(begins);
        for case in turn {
            if end.is_some_and(|end| clock::now() > end) {
                break;
            }
            let figures = match case.mover {
                Mover::Lifeboat => measured(&cloud, case)?,
                Mover::Qemu => {
                    native::measured(&cloud, (setting.folder, setting.images), case).await?
                }
            };
            record.samples.push(Sample { case: case.arm.name.to_owned(), run: round, figures });
            setting.keep(&record, record.samples.len(), all.len());
        }
    }
    record.checks = checks(&record);
    Ok(record)
}

type Figures = BTreeMap<&'static str, f64>;

fn about_minutes(cloud: &Cloud, cases: &[&Case]) -> Result<u64, RigError> {
    let bits = cloud.scenario().vms.first().map_or(0, |vm| vm.memory.0 * 8);
    let seconds =
        cases.iter().map(|case| Ok(case.about_seconds(bits, reserved_at(cloud, case.to)?)));
    Ok(seconds.sum::<Result<u64, RigError>>()?.div_ceil(60))
}

/// What is reserved from the source to a host.
fn reserved_at(cloud: &Cloud, host: &str) -> Result<BitsPerSec, RigError> {
    let found = cloud.scenario().hosts.iter().find(|one| one.name.as_str() == host);
    let found =
        found.ok_or_else(|| RigError::refused("a scenario")(format!("it has no host {host}")))?;
    Ok(BitsPerSec((found.plug.capacity_in.0 * SHARE_PERCENT / 100).min(RESERVED)))
}

fn measured(cloud: &Cloud, case: &Case) -> Result<Figures, RigError> {
    let before = goodput(cloud)?;
    let listener = cloud.listen(SOURCE, GUEST)?;
    let sent = sent_by(cloud)?;
    let order = ["--urgency", "90", "--reservation", "strict", "--fixed"];
    let words = [&order[..], case.arm.words].concat();
    let mut off_the_wire = None;
    let report = reported_at_the_end(cloud, SOURCE, case.to, &words, LIMIT, |evacuation| {
        if off_the_wire.is_none() && evacuation["migrations"][0]["evicted"] == true {
            off_the_wire = sent_by(cloud).ok();
        }
    })?;
    let bytes = off_the_wire.unwrap_or(sent_by(cloud)?) - sent;
    let mut figures = reported(&report)?;
    let said = listener.heard(&cloud.serial(case.to, GUEST))?;
    back(cloud, case.to)?;
    let goodput = f64::midpoint(before, goodput(cloud)?);
    let floor = bytes * 8.0 / goodput;
    figures.insert(WIRE, bytes / 1_048_576.0);
    figures.insert("iperf3_mbit", goodput / 1e6);
    figures.insert("floor_seconds", floor);
    figures.insert(FLOOR, figures[EVICTION] / floor);
    figures.insert(WRONG, said.matches("LIFEBOAT-CORRUPT").count() as f64);
    Ok(figures)
}

/// What the controller says of the guest.
fn reported(report: &Value) -> Result<Figures, RigError> {
    let vm = &report["vms"][0];
    if vm["outcome"] != "moved" {
        return Err(RigError::refused("an evacuation")(format!("the guest did not move: {vm}")));
    }
    let of = |key: &str| vm[key].as_u64().unwrap_or_default() as f64;
    Ok(BTreeMap::from([
        (EVICTION, of("eviction_ms") / 1e3),
        ("total_seconds", of("total_ms") / 1e3),
        ("downtime_ms", of("downtime_us") / 1e3),
        ("predicted_eviction_seconds", of("predicted_eviction_ms") / 1e3),
        ("predicted_total_seconds", of("predicted_total_ms") / 1e3),
    ]))
}

/// The guest comes back to the source, as quickly as that goes.
fn back(cloud: &Cloud, from: &str) -> Result<(), RigError> {
    let words = ["--mode", "pre-copy", "--urgency", "95"];
    let report = reported_at_the_end(cloud, from, SOURCE, &words, LIMIT, |_| ())?;
    reported(&report)?;
    clock::rest(REST);
    Ok(())
}

/// Bytes that have left by the source's uplink.
fn sent_by(cloud: &Cloud) -> Result<f64, RigError> {
    let file = format!("/sys/class/net/{SOURCE}-up/statistics/tx_bytes");
    let said = cloud.on(SOURCE, &format!("cat {file}"))?;
    said.trim().parse().map_err(RigError::refused("a counter"))
}

/// All that leaves the source goes by one queue, as long as this lives.
struct Shaped<'a> {
    cloud: &'a Cloud,
}

impl<'a> Shaped<'a> {
    fn to(cloud: &'a Cloud, rate: BitsPerSec) -> Result<Self, RigError> {
        let shaped = Self { cloud };
        let rate = rate.0;
        shaped.vsctl(&format!(
            "set port {SOURCE}-up qos=@q -- --id=@q create qos type=linux-htb \
             other-config:max-rate={rate} queues:0=@d -- --id=@d create queue \
             other-config:max-rate={rate}"
        ))?;
        Ok(shaped)
    }

    fn vsctl(&self, words: &str) -> Result<String, RigError> {
        let database = format!("--db=unix:{}", self.cloud.database(SOURCE).display());
        self.cloud.on(SOURCE, &format!("ovs-vsctl {database} {words}"))
    }
}

impl Drop for Shaped<'_> {
    fn drop(&mut self) {
        // Where that fails the controller refuses the next reservation, and says what stands there.
        let _ = self.vsctl(&format!(
            "clear port {SOURCE}-up qos -- --all destroy qos -- --all destroy queue"
        ));
    }
}

/// What iperf3 gets from the source to an intermediary by a queue of what is reserved, bit/s.
fn goodput(cloud: &Cloud) -> Result<f64, RigError> {
    let shaped = Shaped::to(cloud, BitsPerSec(RESERVED))?;
    // It ends after one test.
    cloud.on("i1", "iperf3 -s -D -1")?;
    clock::rest(Duration::from_millis(500));
    let address = cloud.address("i1")?;
    let said = cloud.on(SOURCE, &format!("iperf3 -c {address} -t 4 -O 1 -J"));
    drop(shaped);
    let said: Value = serde_json::from_str(&said?).map_err(RigError::refused("iperf3"))?;
    said["end"]["sum_received"]["bits_per_second"]
        .as_f64()
        .ok_or_else(|| RigError::refused("iperf3")(format!("no rate in its answer: {said}")))
}

fn checks(record: &Record) -> Vec<Check> {
    let measured = |case: &&Case| !record.figures(case.arm.name, EVICTION).is_empty();
    let bounded = CASES.iter().filter(measured).filter_map(|case| Some((case, case.bound?)));
    let mut checks: Vec<Check> = bounded
        .map(|(case, bound)| {
            let claim = format!("{}: eviction, ratio to its floor", case.arm.name);
            Check::median(&claim, Bound::AtMost(bound), &record.figures(case.arm.name, FLOOR))
        })
        .collect();
    for (ours, theirs, bound) in [
        (THREE, POST_COPY_5, 0.58),
        (THREE_1, POST_COPY_1, 0.14),
        (THREE, QEMU_5, 0.58),
        (THREE_1, QEMU_1, 0.14),
    ] {
        let pairs = ratios(&record.pairs(ours, theirs, EVICTION));
        if !pairs.is_empty() {
            let claim = format!("{ours}: eviction, ratio to {theirs}");
            checks.push(Check::median(&claim, Bound::AtMost(bound), &pairs));
        }
    }
    let wrong: Vec<f64> =
        CASES.iter().flat_map(|case| record.figures(case.arm.name, WRONG)).collect();
    checks.push(Check::worst("wrong bytes reported by a guest", Bound::AtMost(0.0), &wrong));
    checks
}

/// The paper's picture: eviction by what the destination has reserved; and by case, where that is 5/9.
#[must_use]
pub fn plots(record: &Record) -> Vec<Plot> {
    vec![by_destination(record), by_case(record)]
}

fn by_destination(record: &Record) -> Plot {
    let line = |(name, mover, words): (&str, Mover, &[&str])| {
        let point = |(at, host): (f64, &str)| {
            let on_it =
                |case: &&Case| (case.mover, case.arm.words, case.to) == (mover, words, host);
            let case = CASES.iter().find(on_it)?;
            Point::of(at, &record.figures(case.arm.name, EVICTION))
        };
        let points = DESTINATIONS.into_iter().filter_map(point).collect();
        Series { name: name.to_owned(), shape: Shape::Line, points }
    };
    Plot {
        name: format!("{NAME}-destination"),
        title: "Time until a guest of 1 GiB is off its host, by its destination".to_owned(),
        others_show: record.others_show.clone(),
        ground: Ground::numbers("reserved at the destination, % of a link (at the source: 90)"),
        height: "seconds".to_owned(),
        series: LINES.into_iter().map(line).collect(),
    }
}

fn by_case(record: &Record) -> Plot {
    let measured = |case: &&Case| {
        case.to == "d5" && median(&record.figures(case.arm.name, EVICTION)).is_some()
    };
    let names: Vec<&str> = CASES.iter().filter(measured).map(|case| case.arm.name).collect();
    let places: Vec<(f64, &str)> = (0_u32..).map(f64::from).zip(names.iter().copied()).collect();
    let bars = |name: &str, figure: &str| Series::of(record, name, Shape::Bars, figure, &places);
    Plot {
        name: format!("{NAME}-eviction"),
        title: "Time until a guest of 1 GiB is off its host".to_owned(),
        others_show: record.others_show.clone(),
        ground: Ground::names("how it leaves", &names),
        height: "seconds".to_owned(),
        series: vec![bars("eviction", EVICTION), bars("floor", "floor_seconds")],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_a_guest_that_moved_has_figures() {
        let report = |outcome: &str| {
            json!({"vms": [{"outcome": outcome, "eviction_ms": 48_000, "total_ms": 90_000,
                            "downtime_us": 120_000}]})
        };
        let figures = reported(&report("moved")).unwrap();
        assert_eq!((figures[EVICTION], figures["downtime_ms"]), (48.0, 120.0));
        assert!(reported(&report("left-behind")).is_err());
    }
}
